"""Run a command, and end all of its processes with whoever started this one, however that one ended.

`python engine_guard.py FOLDER COMMAND [ARGUMENT ...]`, with a pipe as standard input that the starter holds and never
writes to: the kernel closes it even after SIGKILL. The folder is the command's, and is deleted with it. Nothing of the
library is imported, so that this is up at once.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

GRACE = 5.0
"""Seconds between asking the processes to end and killing them."""


def main(folder: str, command: list[str]) -> int:
    """Wait for the end of the command or of the pipe, whichever comes first; returns the command's status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the starter, with which this one ends
        signal.signal(number, signal.SIG_IGN)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, restore_signals=True)
    ended = os.pidfd_open(process.pid)
    readable, _, _ = select.select([0, ended], [], [])
    if ended not in readable:
        _signal(process.pid, signal.SIGTERM)
        select.select([ended], [], [], GRACE)
    _signal(process.pid, signal.SIGKILL)  # what the command has left behind as well
    shutil.rmtree(folder, ignore_errors=True)
    return process.wait()


def _signal(group: int, number: int) -> None:
    """Send a signal to all processes of a group, if there are any left."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    status = main(sys.argv[1], sys.argv[2:])
    sys.exit(128 - status if status < 0 else status)
