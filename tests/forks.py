"""A Python whose runs are forks of one process that has imported the libraries: a run takes no longer than its work.

`python tests/forks.py FOLDER` is that process. It imports at its first run, and must not compute anything itself: the
threads of polars, tokenizers and torch do not survive a fork. A run has its client's arguments, environment, folder and
files, and executes the script from its file, as Python does. Clients are the functions here, and `FOLDER/python` and
`FOLDER/torchrun`, which `jobs` puts in front of the PATH of Snakemake's jobs. A run whose environment differs in what
libraries read when they are imported is a real process. What a run does not have of its client: namespaces, umask,
session and process group, and further descriptors. All runs have one seed for the hashes of strings.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import select
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow_scripts"
OURS = tuple(f"{ROOT / name}{os.sep}" for name in ("workflow_scripts", "demo", "tests"))
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
FOLDER = "SALMON_FORKS"  # environment variable; empty: every run is a real process
PATIENCE = 1800  # seconds until a run counts as stuck: a busy machine must not fail a test
READ_BY_IMPORTS = ("PYTHON", "HF_", "TRANSFORMERS_", "TORCH", "BNB_", "LD_")  # such variables must be equal

AT_START = dict(os.environ)
OF_TORCHRUN = ("TORCHELASTIC_", "TORCH_NCCL_")  # what it tells a rank

LIBRARIES = (
    *("transformers.models.llama.modeling_llama", "transformers.trainer", "transformers.integrations.peft"),
    *("peft.tuners.lora", "torch.utils.tensorboard", "safetensors.torch", "datasets", "jinja2", "py3langid", "ijson"),
    *("lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models.huggingface"),
    *("torch.distributed.run", "tokenizers", "jsonschema", "snakemake.cli", "snakemake_executor_plugin_slurm"),
)


# ---- Clients


class Fork:
    """A run in progress, as `subprocess.Popen` has it."""

    def __init__(
        self, words: Sequence[object], files: Sequence[int], cwd: Path, env: Mapping[str, str], limits: dict[str, int]
    ) -> None:
        """Ask for a run.

        Args:
            words: what follows `python` on the command line.
            files: descriptors of standard input, standard output and standard error.
            limits: resource limits (names without RLIMIT_).

        Raises:
            LookupError: this has to be a real process, or there is no process to fork.
        """
        if not os.environ.get(FOLDER):
            raise LookupError(f"{FOLDER} is not set")
        folder = Path(os.environ[FOLDER])
        self.connection = socket.socket(socket.AF_UNIX)
        try:
            self.connection.connect(str(folder / "socket"))
        except OSError:
            raise _ended(folder) from None
        with tempfile.TemporaryFile() as request:
            asked = {"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(env), "limits": limits}
            request.write(json.dumps(asked).encode())
            request.flush()
            socket.send_fds(self.connection, [b"."], [*files, request.fileno()])
            self.replies = self.connection.makefile()
            said = self.replies.readline()
        if not said:
            raise _ended(folder)
        self.pid = int(said)
        if not self.pid:
            raise LookupError(f"python {words} has to be a real process")

    def wait(self, timeout: float | None = None) -> int:
        """The status of the run, or the negative number of the signal that has ended it."""
        if not select.select([self.connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"run {self.pid}", timeout or 0)
        return int(self.replies.readline())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it has not ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _ended(folder: Path) -> RuntimeError:
    return RuntimeError(f"the process to fork has ended:\n{(folder / 'log').read_text()[-3000:]}")


def run(
    line: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    limits: dict[str, int] | None = None,
    until: Callable[[], bool] | None = None,
    patience: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run(line, …, capture_output=True, text=True)` gives for a line that starts this Python.

    Args:
        line: the command line.
        cwd: the folder to run it in; by default, this process's.
        env: the whole environment; by default, this process's.
        limits: resource limits by name, without `RLIMIT_`.
        until: when to kill the run.
        patience: seconds until it counts as stuck.
    """
    program, *words = map(str, line)
    assert program == sys.executable
    cwd, env, limits = cwd or Path.cwd(), env or os.environ, limits or {}
    (output, output_end), (errors, errors_end) = os.pipe(), os.pipe()
    with open(os.devnull) as nothing, ThreadPoolExecutor(2) as readers:
        said = [readers.submit(_read, end) for end in (output, errors)]
        files = (nothing.fileno(), output_end, errors_end)
        try:
            status = _wait(_started(words, files, cwd, env, limits), until, patience)
        finally:
            os.close(output_end)
            os.close(errors_end)
        return subprocess.CompletedProcess([program, *words], status, *(each.result() for each in said))


def _started(
    words: Sequence[str], files: tuple[int, int, int], cwd: Path, env: Mapping[str, str], limits: dict[str, int]
) -> "Fork | subprocess.Popen[bytes]":
    try:
        return Fork(words, files, cwd, env, limits)
    except LookupError:
        more: dict[str, Any] = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
        if limits:
            more["preexec_fn"] = lambda: _limit(limits)
        return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, **more)


def _wait(process: "Fork | subprocess.Popen[bytes]", until: Callable[[], bool] | None, patience: float) -> int:
    end = time.monotonic() + patience
    try:
        while True:
            try:
                return process.wait(0.002 if until else end - time.monotonic())
            except subprocess.TimeoutExpired:
                if time.monotonic() > end:
                    raise
                if until and until():
                    process.kill()
                    until = None
    except BaseException:  # otherwise the readers would wait for the run's end
        process.kill()
        raise


def _read(end: int) -> str:
    with os.fdopen(end, errors="replace") as file:
        return file.read()


def options(given: Mapping[str, Any]) -> list[str]:
    """The options of a command line; strings and paths as they are, everything else as JSON."""
    found = []
    for name, value in given.items():
        found.append(f"--{name.replace('_', '-')}")
        found.append(str(value) if isinstance(value, str | Path) else json.dumps(value))
    return found


def snakemake(
    words: Sequence[object], folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `snakemake WORDS` says, called in a folder; its jobs are forks, too."""
    return run([sys.executable, "-m", "snakemake", *words], folder, (environment or os.environ) | jobs())


def _limit(limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def jobs() -> dict[str, str]:
    """The environment in which Snakemake's jobs, and ranks of `launch.sh`, find `FOLDER/python` as their Python."""
    return {"BASH_ENV": f"{os.environ[FOLDER]}/bash"} if os.environ.get(FOLDER) else {}


def be_python(words: Sequence[str]) -> None:
    """`FOLDER/python`: it passes signals on to its run, and ends as its run does, or with its torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        fork = Fork(words, (0, 1, 2), Path.cwd(), os.environ, {})
    except LookupError:
        os.execv(sys.executable, [sys.executable, *words])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: fork.kill(number))
    status = fork.wait()
    if status < 0:
        _be_killed(-status)
    os._exit(status)


def _be_killed(number: int) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def open_server() -> "subprocess.Popen[bytes]":
    """Start the process; it ends when its standard input is closed: at the latest with the process that calls this."""
    folder = tempfile.mkdtemp(prefix="salmon-forks-")
    os.environ[FOLDER] = folder
    python = f'"{sys.executable}" -SI "{__file__}" --client'
    torchrun = f'-m torch.distributed.run --no-python "$1" "$2" "$3" "{folder}/python"'  # as workflow_scripts/launch.sh
    for name, program in (("python", f'{python} "$@"'), ("torchrun", f'{python} {torchrun} "${{@:4}}"')):
        Path(folder, name).write_text(f"#!/usr/bin/env bash\nexec {program}\n")
        Path(folder, name).chmod(0o755)
    Path(folder, "bash").write_text(f"PATH={shlex.quote(folder)}:$PATH\n")
    line = [sys.executable, __file__, folder]
    # What is read when libraries are loaded: see workflow_scripts/launch.sh, and `_start` for the GPUs.
    known = {"GOMP_SPINCOUNT": "3000"} | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with Path(folder, "log").open("w") as log:
        server = subprocess.Popen(line, env=known, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
    assert server.stdout
    assert server.stdout.readline() == b"ready\n"
    return server


# ---- The process


def serve(folder: Path) -> None:
    """Serve until standard input is closed: reply to a request with the fork's process ID, and later its status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end is ours
    events = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(16)
    os.write(1, b"ready\n")
    os.dup2(2, 1)
    events.register(0, selectors.EVENT_READ)
    events.register(listener, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}  # by number of the process
    imported = False
    while True:
        for key, _ in events.select():
            if key.fd == 0:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                shutil.rmtree(folder)
                return
            if key.fileobj is listener:
                client, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(client, 1, 4)
                if not imported:
                    import_libraries()
                    imported = True
                if child := _start(files, [events, listener, *running.values(), client]) if len(files) == 4 else 0:
                    running[child] = client
                    events.register(os.pidfd_open(child), selectors.EVENT_READ, child)
                    events.register(client, selectors.EVENT_READ, child)
                for file in files:
                    os.close(file)
                with suppress(OSError):  # the client is gone
                    client.sendall(f"{child}\n".encode())
                if not child:
                    client.close()
            elif isinstance(key.fileobj, socket.socket):  # it says nothing after its request: the client is gone
                if running.get(key.data) is key.fileobj:
                    os.kill(key.data, signal.SIGKILL)
                    events.unregister(key.fileobj)
            else:
                client = running.pop(key.data)
                status = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                events.unregister(key.fd)
                os.close(key.fd)
                with suppress(KeyError, OSError):  # the client is gone
                    events.unregister(client)
                    client.sendall(f"{status}\n".encode())
                client.close()


def import_libraries() -> None:
    """Import all scripts, and what they import only while they work."""
    sys.path[0] = str(SCRIPTS)  # instead of this file's folder
    for name in (*sorted(path.stem for path in SCRIPTS.glob("*.py")), *LIBRARIES):
        importlib.import_module(name)
    importlib.import_module("salmon.language").detect(["Loads what it needs."])
    sys.path.pop(0)
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        each.atexit = False  # only forks end, and need not tidy up these libraries
    sys.stdout.flush()  # otherwise each fork would print it
    gc.freeze()


def _start(files: list[int], ours: list[Any]) -> int:
    """Fork for a request, unless it has to be a real process (0)."""
    with open(files.pop(), encoding="utf-8") as file:
        file.seek(0)
        asked = json.load(file)
    words, env = asked["words"], asked["env"]
    path = env.get("PYTHONPATH", "")
    if not _same_for_imports(env) or not words or not (words[0] in ("-c", "-m") or words[0].endswith(".py")):
        return 0
    # A fork cannot use CUDA, which libraries initialise when they are imported.
    if Path("/dev/nvidiactl").exists() and env.get("CUDA_VISIBLE_DEVICES") != "":
        return 0
    child = os.fork()
    if child == 0:
        for each in ours:
            each.close()
        _be_process(words, files, asked, [entry for entry in path.split(os.pathsep) if entry])
    return child


def _same_for_imports(env: Mapping[str, str]) -> bool:
    """Whether the libraries would be imported alike; the client may have imported them, which sets some variables."""
    names = {name for name in (*env, *AT_START) if name.startswith(READ_BY_IMPORTS)} - {"PYTHONPATH"}
    names = {name for name in names if not name.startswith(OF_TORCHRUN)}
    return all(env.get(name) in (AT_START.get(name), os.environ.get(name)) for name in names)


def _be_process(words: list[str], files: list[int], asked: dict[str, Any], path: list[str]) -> None:
    """In the fork: what Python does from its start to its end."""
    status = 1
    try:
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None
        sys.modules["numpy"].random.seed()  # Python itself sees to `random`
        _limit(asked["limits"])
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        torch: Any = sys.modules["torch"]
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        script = Path(words[0]).resolve()
        _forget_unless(str(script).startswith(OURS) or str(SCRIPTS) in path)
        sys.path[:0] = [{"-c": "", "-m": os.getcwd()}.get(words[0], str(script.parent)), *path]
        try:
            _execute(words)
            status = 0
        except SystemExit as end:
            status = end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
            if end.code is not None and not isinstance(end.code, int):
                sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        import traceback

        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            status = -signal.SIGINT
    finally:
        _end(status)


def _forget_unless(ours: bool) -> None:
    """Unless a script is ours, forget our modules: another checkout imports its own."""
    for name, module in [] if ours else list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(OURS) and name != "__main__":
            del sys.modules[name]


def _execute(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _end(status: int) -> None:
    """The end of the interpreter, except that it frees no memory."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if status < 0:
            _be_killed(-status)
    finally:
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--client":
        be_python(sys.argv[2:])
    else:
        serve(Path(sys.argv[1]))
