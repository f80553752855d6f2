"""A server never outlives the job that started it, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salmon import engine_guard

# A server with a child process, like vLLM; both write down who they are, and may ignore SIGTERM.
SERVER = """
import os, signal, subprocess, sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=10000)
memory.buf[0] = 1
if STUBBORN:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, sys.argv[0], sys.argv[1]])
with open(f"{sys.argv[1]}/{'server' if len(sys.argv) > 2 else 'engine'}.pid", "w") as file:
    file.write(f"{os.getpid()} {memory.name}")
time.sleep(600)
"""
JOB = """
import subprocess, sys, time
guard = subprocess.Popen(
    [sys.executable, "-I", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
)
time.sleep(600)
"""


def wait_for(condition: object, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


@pytest.mark.parametrize(
    ("number", "stubborn"), [(signal.SIGKILL, True), (signal.SIGTERM, False), (signal.SIGINT, False)]
)
def test_it_ends_with_its_job(tmp_path: Path, number: signal.Signals, stubborn: bool) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "server.py").write_text(SERVER.replace("STUBBORN", str(stubborn)))
    (tmp_path / "job.py").write_text(JOB)
    (own / "socket").touch()
    guard = Path(engine_guard.__file__).read_text()
    assert guard.count("GRACE = 15.0") == 1
    (tmp_path / "guard.py").write_text(guard.replace("GRACE = 15.0", "GRACE = 2.0"))  # less to wait for
    line = [tmp_path / "guard.py", own, sys.executable, tmp_path / "server.py", tmp_path, "first"]
    command = [str(word) for word in line]
    job = subprocess.Popen([sys.executable, str(tmp_path / "job.py"), *command], start_new_session=True)
    files = [tmp_path / f"{name}.pid" for name in ("server", "engine")]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    pids, shared = zip(*(file.read_text().split() for file in files), strict=True)
    memory = [Path("/dev/shm") / name for name in shared]
    assert all(file.exists() for file in memory)
    os.killpg(job.pid, number)  # as a person at a terminal, or an executor, ends a job
    job.wait()
    wait_for(lambda: not any(map(is_alive, map(int, pids))))
    wait_for(lambda: not own.exists())
    wait_for(lambda: not any(file.exists() for file in memory))


@pytest.mark.parametrize(("program", "status"), [("import sys; sys.exit(3)", 3), ("import os; os.abort()", 134)])
def test_it_ends_with_its_command(tmp_path: Path, program: str, status: int) -> None:
    own = tmp_path / "own"
    own.mkdir()
    command = [sys.executable, "-I", engine_guard.__file__, str(own), sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(30) == status
    assert not own.exists()
