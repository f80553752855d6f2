"""Run a server, and end all its processes when the process that started this one ends, for whatever reason.

`python engine_guard.py FOLDER COMMAND [ARGUMENT ...]`. Standard input is a pipe that the starter holds and never writes
to: the kernel closes it even after SIGKILL. The folder belongs to the server and is deleted with it. The script imports
nothing of the library, so it starts immediately.

The server is first asked to end, because it has its own processes and shared memory to clean up. Then its whole process
group is killed, and its remaining shared memory is deleted. This process ends after all of them: their GPU memory is
then free.
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
"""Seconds that its other processes have after it has ended."""
SHARED = tuple(f"{os.sep}dev/shm/{name}" for name in ("psm_", "sem.mp-"))
"""Prefixes of the names that Python's multiprocessing gives to shared memory."""
_PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


def main(folder: str, command: list[str]) -> int:
    """Wait for the end of the command or of the pipe, whichever comes first; returns the command's status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the starter; this process ends with it
        signal.signal(number, lambda *_: None)  # a server would inherit ignored signals
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # the server's orphans become its children
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    shared: set[str] = set()
    try:
        ended, told = os.pipe()

        def watch() -> None:  # a thread, because not every build of Python has os.pidfd_open
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
    """Living processes of a group, without the first one."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat") as file:
            state, _, of_group, *_ = file.read().rpartition(")")[2].split()
            if int(of_group) == group and int(name) != group and state != "Z":
                found.append(int(name))
    return found


def _shared(group: int) -> set[str]:
    """Shared-memory files of a group's processes."""
    found = set()
    for process in [group, *_others(group)]:
        with suppress(OSError), open(f"/proc/{process}/maps") as file:
            paths = (line[line.find("/") :].rstrip() for line in file if "/" in line)
            found |= {path for path in paths if path.startswith(SHARED) and not path.endswith("(deleted)")}
    return found


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2:])
    sys.exit(128 - status if status < 0 else status)
