"""Run scripts in forks of one process that has imported everything, so a run takes no longer than its work.

`python tests/forks.py` is that process. It reads one JSON line per run and answers with one: exit status and log. It
must not compute anything itself, because the threads of polars, tokenizers and torch do not survive a fork.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CPU_SECONDS = 60  # for one run, which takes a few: more is a hang
WALL_SECONDS = 900  # a busy machine must not fail a test
HUNG = 124


class Forks:
    """Runs scripts, one at a time."""

    def __init__(self) -> None:
        path = f"{ROOT / 'workflow_scripts'}{os.pathsep}{ROOT}"
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "POLARS_MAX_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forks.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, options: dict[str, Any], folder: Path) -> tuple[int, str]:
        """Run `workflow_scripts/SCRIPT.py` in a folder: exit status (124 if it hung), and what it said."""
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([script, words(options), str(folder)]) + "\n")
        self.server.stdin.flush()
        status, said = json.loads(self.server.stdout.readline())
        return status, said

    def close(self) -> None:
        """End the process."""
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


def words(options: dict[str, Any]) -> list[str]:
    """The options of a command line; strings and paths as they are, everything else as JSON."""
    found = []
    for name, value in options.items():
        found.append(f"--{name.replace('_', '-')}")
        found.append(str(value) if isinstance(value, str | Path) else json.dumps(value))
    return found


def serve() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    names = sorted(path.stem for path in (ROOT / "workflow_scripts").glob("*.py"))
    scripts = {name: importlib.import_module(name) for name in names}
    for name in (
        *(
            "transformers.models.llama.modeling_llama",
            "transformers.trainer",
            "peft.tuners.lora",
            "jinja2",
            "py3langid",
        ),
        *("torch.utils.tensorboard", "transformers.integrations.peft", "tokenizers", "safetensors.torch", "ijson"),
    ):
        importlib.import_module(name)
    importlib.import_module("salmon.language").detect(["Loads what it needs."])
    for line in sys.stdin:
        name, arguments, folder = json.loads(line)
        with tempfile.TemporaryFile() as log:
            child = os.fork()
            if child == 0:
                _be_script(scripts[name], [f"{name}.py", *arguments], folder, log.fileno())
            status = wait(child)
            log.seek(0)
            said = log.read().decode(errors="replace")
        answers.write(json.dumps([status, said]) + "\n")
        answers.flush()


def _be_script(script: Any, arguments: list[str], folder: str, log: int) -> None:
    """In the fork: what the interpreter would do for the script."""
    from salmon import script as shared

    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.argv = arguments
        try:
            shared.run(script.main, script.Arguments)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    finally:
        if status == 70:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """The status of a fork that has ended or was killed."""
    until = time.monotonic() + WALL_SECONDS
    pause = 0.001
    while time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            return HUNG if status in (-signal.SIGXCPU, -signal.SIGKILL) else status
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HUNG


if __name__ == "__main__":
    serve()
