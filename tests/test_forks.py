"""A fork behaves as a process of its own does, for its client and for the script."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forks
from tests.running import SCRIPTS, environment, launch

SEEN = """
import os, sys
from salmon import config
print(__name__, sys.argv, sorted(name for name in vars() if not name.startswith("__")), os.getcwd(), sys.stdin.read())
print(os.environ["MINE"], "HOME" in os.environ, sys.path[:3], config.__file__, file=sys.stderr)
"""
ENDS = {
    "nothing": "",
    "status": "raise SystemExit(7)",
    "negative": "raise SystemExit(-1)",
    "object": "raise SystemExit(ValueError('why'))",
    "text": "import sys; print('out'); sys.exit('why')",
    "error": "def inner():\n    1 / 0\ninner()",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "at the end": "import atexit, threading, time; atexit.register(print, 'last')\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "threads": "import torch; print(torch.get_num_threads())",
}


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """The tests' server; one of these tests alone if forks are switched off."""
    if os.environ.get(forks.FOLDER):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forks.FOLDER, "")
        server = forks.open_server()
        yield
        server.communicate()


def both(line: list[str], **more: object) -> tuple[tuple[int, str, str], tuple[int, str, str]]:
    """What a process of its own and a fork answer."""
    own = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    fork = forks.run(line, **more)  # type: ignore[arg-type]
    return (own.returncode, own.stdout, own.stderr), (fork.returncode, fork.stdout, fork.stderr)


@pytest.mark.parametrize("how", ["text", "file"])
def test_a_script_sees_the_same(tmp_path: Path, how: str) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    (tmp_path / "here").mkdir()
    program = {"text": ["-c", SEEN], "file": [str(tmp_path / "seen.py")]}[how]
    known = {name: value for name, value in environment().items() if name != "HOME"} | {"MINE": "1"}
    own, fork = both([sys.executable, *program, "--option", "ä b"], cwd=tmp_path / "here", env=known)
    assert own[0] == 0, own
    assert fork == own


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_the_same(name: str) -> None:
    own, fork = both([sys.executable, "-c", ENDS[name]], env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert fork[:2] == own[:2]
    assert fork[2].splitlines()[-1:] == own[2].splitlines()[-1:]


def test_a_script_of_another_checkout_has_its_own_library(tmp_path: Path) -> None:
    library = tmp_path / "workflow_scripts" / "salmon"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("")
    (library / "mine.py").write_text("print('mine')")
    script = library.parent / "script.py"
    script.write_text("import sys; print('salmon' in sys.modules, 'torch' in sys.modules)\nfrom salmon import mine\n")
    assert forks.run([sys.executable, script]).stdout == "False True\nmine\n"


def test_what_its_imports_would_read_makes_it_a_process_of_its_own() -> None:
    line = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert forks.run(line).stdout == "True\n"
    assert forks.run(line, env=os.environ | {"HF_HUB_OFFLINE": "0"}).stdout == "False\n"
    assert forks.run([sys.executable, "-X", "utf8", *line[1:]]).stdout == "False\n"


def test_forks_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forks.FOLDER, "")
    assert forks.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"]).stdout == "False\n"
    assert forks.jobs() == {}


def test_jobs_of_snakemake_find_it(tmp_path: Path) -> None:
    """Called as in a rule. The job ends when its fork is killed, and the fork when its job is."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time; print('torch' in sys.modules, os.getpid(), flush=True); time.sleep(60)")
    for path in (script, SCRIPTS / "launch.sh"):
        words = f"python {script}" if path == script else f"bash {path} 1 1 1 {script}"
        line = ["bash", "-c", f"exec {words}"]
        with subprocess.Popen(line, env=os.environ | forks.jobs(), stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout
            imported, number = job.stdout.readline().split()
            assert imported == "True"
            if path == script:
                os.kill(int(number), signal.SIGKILL)
                assert job.wait() == -signal.SIGKILL
            else:
                job.kill()
                assert job.stdout.read() == ""  # which the fork would have open for a minute


def test_ranks_are_forks_and_end_with_one_of_them(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import os, sys; print(os.environ['RANK'], 'torch' in sys.modules, sys.argv[1:])")
    done = launch(2, script, "--option", "a b")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} True ['--option', 'a b']" for rank in range(2)]
    script.write_text("import os, time; os.environ['RANK'] == '1' and os._exit(3); time.sleep(600)")
    assert launch(2, script).returncode == 1
