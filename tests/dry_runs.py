"""Dry runs of Snakemake in forks of one process that has imported it, so a dry run takes no longer than its work.

`python tests/dry_runs.py` is that process. It reads one JSON line per run and answers with one: exit status, output and
error output. Only what Snakemake itself needs is imported; a fork imports the workflow's modules, from its checkout.
"""

import atexit
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
NEEDED = ("pandas", "polars", "pydantic", "jsonschema", "yaml", "snakemake_executor_plugin_slurm", "snakemake.cli")


def dry_run(
    words: Sequence[object], folder: Path = ROOT, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """What `snakemake WORDS` says, called in a folder; one of the words is `-n`."""
    assert "-n" in words
    server = _server()
    assert server.stdin
    assert server.stdout
    line = ["snakemake", *map(str, words)]
    server.stdin.write(json.dumps([line, str(folder), dict(environment)]) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(line, *json.loads(server.stdout.readline()))


@cache
def _server() -> subprocess.Popen[str]:
    """The process of this test process, started at the first dry run."""
    line = [sys.executable, __file__]
    server = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin
    atexit.register(server.stdin.close)
    return server


def serve() -> None:
    """Answer until the input ends."""
    from forks import wait

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        arguments, folder, environment = json.loads(line)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                _be_snakemake(arguments, folder, environment, output, errors)
            status = wait(child)
            said = []
            for file in (output, errors):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        answers.write(json.dumps([status, *said]) + "\n")
        answers.flush()


def _be_snakemake(
    arguments: list[str], folder: str, environment: dict[str, str], output: IO[bytes], errors: IO[bytes]
) -> None:
    """In the fork: what `python -m snakemake` would do."""
    from snakemake import cli

    status = 70
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.path[0] = arguments, folder
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        if status == 70:
            import traceback

            traceback.print_exc()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
