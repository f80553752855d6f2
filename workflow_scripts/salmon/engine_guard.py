"""Run a server, and end all of its processes with whoever started this one, however that one ended.

`python engine_guard.py FOLDER COMMAND [ARGUMENT ...]`, with a pipe as standard input that the starter holds and never
writes to: the kernel closes it even after SIGKILL. The folder is the server's, and is deleted with it. Nothing of the
library is imported, so that this is up at once.

The server is asked to end first, since it has processes and shared memory of its own to clear away; then all of its
group is killed, and what shared memory is left of it is deleted. This process ends when all of them have: their GPU
memory is free then.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from threading import Thread

GRACE = 15.0
"""Seconds between asking the server to end and killing it."""
REST = 5.0
"""Seconds that are left to its other processes when it has ended."""
SHARED = tuple(f"{os.sep}dev/shm/{name}" for name in ("psm_", "sem.mp-"))
"""Beginnings of the names that Python's multiprocessing gives to shared memory."""
_PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def main(folder: str, command: list[str]) -> int:
    """Wait for the end of the command or of the pipe, whichever comes first; returns the command's status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the starter, with which this one ends
        signal.signal(number, lambda *_: None)  # a server would inherit it if signals were ignored
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what the server leaves becomes a child of this one
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    shared: set[str] = set()
    try:
        ended, told = os.pipe()

        def watch() -> None:  # a thread, since not every build of Python has os.pidfd_open
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            os.close(told)

        Thread(target=watch, daemon=True).start()
        if ended not in select.select([0, ended], [], [])[0]:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            select.select([ended], [], [], GRACE)
        shared |= _shared(process.pid)
        until = time.monotonic() + REST
        while _others(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        shared |= _shared(process.pid)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        shutil.rmtree(folder, ignore_errors=True)
        for file in shared:
            with suppress(OSError):
                os.unlink(file)
    return status


def _others(group: int) -> list[int]:
    """Living processes of a group, but for its first one."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat") as file:
            state, _, of_group, *_ = file.read().rpartition(")")[2].split()
            if int(of_group) == group and int(name) != group and state != "Z":
                found.append(int(name))
    return found


def _shared(group: int) -> set[str]:
    """Files of shared memory that processes of a group have."""
    found = set()
    for process in [group, *_others(group)]:
        with suppress(OSError), open(f"/proc/{process}/maps") as file:
            paths = (line[line.find("/") :].rstrip() for line in file if "/" in line)
            found |= {path for path in paths if path.startswith(SHARED) and not path.endswith("(deleted)")}
    return found


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2:])
    sys.exit(128 - status if status < 0 else status)
