"""Kill every stage at all kinds of moments; check that nothing is lost and the artifacts are equal byte for byte.

A stage is one command line of the workflow. It is started again and again in a process that is killed (SIGKILL) right
before one of its changes to the file system, drawn at random: opening a file to write, renaming, linking, deleting.
What Snakemake deletes after a failed job is deleted in between. Some runs have a second process on the same artifact.
Run by `tests/test_pipeline.py`; `make soak` runs the long form.
"""

import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WHEN_OR_HOW_FAST = re.compile(r"manifest\.json$|events\.out\.tfevents|\.snakemake_timestamp$")


@dataclass
class Stage:
    """One job of the workflow, with a different place for its artifact."""

    name: str
    line: list[str]  # arguments of the script
    output: Path  # where its artifact is made here
    changes: int = 0
    expected: dict[str, Any] = field(default_factory=dict)  # what it makes when undisturbed
    parts: int = 0
    found: Counter[str] = field(default_factory=Counter)


def read_stages(printed: str, folder: Path) -> list[Stage]:
    """The stages of a run of the workflow, from the command lines that Snakemake printed: one job of each rule."""
    stages: dict[str, Stage] = {}
    for line in re.findall(r"(?:python|bash) \S*workflow_scripts/.*(?= > )", printed):
        words = shlex.split(line)
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        made = Path(words[words.index("--output") + 1])
        name = f"{Path(words[start]).stem} {made.stem if 'train' in words[start] else ''}".strip()
        if name not in stages:
            output = folder / name.replace(" ", "-") / made.name
            arguments = words[start + 1 :]
            arguments[arguments.index("--output") + 1] = str(output)
            stages[name] = Stage(name, arguments, output)
    return list(stages.values())


def start(stage: Stage, kill_at: int | None, log: Path) -> tuple[int, int]:
    """Fork a process for a stage, to be killed before its n-th change; return its id and the pipe it reports to."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        seen = Counter[str]()
        inside = f"{stage.output.parent}{os.sep}"

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                change = isinstance(flags, int) and bool(flags & WRITING)
            else:
                change = event in CHANGES
                path = arguments[0] if change else ""
            if not change or not str(path).startswith(inside):
                return
            seen["changes"] += 1
            if event == "os.rename" and re.search(r"/part-[^/]*\.parquet$", str(arguments[1])):
                seen["parts"] += 1
            if seen["changes"] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        module = importlib.import_module(stage.name.split()[0])
        os.environ["SALMON_KEEP_FINISHED"] = "1"  # as in Snakemake's jobs
        sys.argv = [stage.name, *stage.line]
        status = 0
        try:
            module.script.run(module.main, module.Arguments)
        except SystemExit as ending:
            status = int(ending.code or 0)
        os.write(writing, json.dumps(seen).encode())
        os._exit(status)
    finally:
        os._exit(70)


def end(process: int, reading: int) -> tuple[int, Counter[str]]:
    """Wait for a process; return its status (negative: killed) and what it counted."""
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), Counter(json.loads(said or "{}"))


def manifest_of(artifact: Path) -> Path:
    """See `artifacts.manifest_path`, which is not imported here: a process that forks must have used no library."""
    return artifact.with_suffix(".manifest.json") if artifact.suffix == ".parquet" else artifact / "manifest.json"


def delete_outputs(stage: Stage) -> None:
    """What Snakemake does with the declared outputs of a job that failed."""
    if stage.output.is_dir():
        shutil.rmtree(stage.output)
    stage.output.unlink(missing_ok=True)
    manifest_of(stage.output).unlink(missing_ok=True)


def contents(artifact: Path) -> dict[str, Any]:
    """What has to be equal: the bytes of all files, except for times in metrics and manifests."""
    files = [artifact] if artifact.is_file() else sorted(file for file in artifact.rglob("*") if file.is_file())
    found: dict[str, Any] = {}
    for file in files:
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[file.name] = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
        elif not WHEN_OR_HOW_FAST.search(str(file)):
            found[str(file.relative_to(artifact.parent))] = file.read_bytes()
    manifest = json.loads(manifest_of(artifact).read_text())
    return {**found, "manifest": {name: manifest[name] for name in ("settings", "inputs", "counts")}}


def sweep(stage: Stage) -> None:
    """What Snakemake does when it ends."""
    process = os.fork()
    if not process:
        work = importlib.import_module("salmon.work")
        work.sweep(stage.output.parent)
        os._exit(0)
    os.waitpid(process, 0)


def kept(stage: Stage) -> tuple[int, int]:
    """Finished parts, and steps of the newest sealed checkpoint, in the work folder."""
    work = stage.output.parent / ".work" / stage.output.name
    sealed = [int(file.parent.name.split("-")[1]) for file in work.glob("checkpoint-*/whole")]
    return len(list(work.glob("part-*.parquet"))), max(sealed, default=0)


def once(stage: Stage, kills: int, draws: random.Random) -> None:
    """Make the artifact of a stage with some kills on the way, and check it."""
    shutil.rmtree(stage.output.parent, ignore_errors=True)
    stage.output.parent.mkdir(parents=True)
    log = stage.output.parent.with_suffix(".log")
    rounds = 0
    while True:
        rounds += 1
        before = kept(stage)
        whole = (stage.output.parent / ".work" / stage.output.name / "finished").is_dir()
        kill_at = draws.randint(1, max(1, stage.changes)) if kills > 0 else None
        first = start(stage, kill_at, log)
        second = start(stage, None, log.with_suffix(".second.log")) if draws.random() < 0.15 else None
        status, seen = end(*first)
        if second:
            stage.found["two at once"] += 1
            other, _ = end(*second)
            if other != 0:
                stage.found["failed"] += 1
                print(stage.name, "second:", log.with_suffix(".second.log").read_text()[-2000:])
        if status == -signal.SIGKILL:
            kills -= 1
            stage.found["kills"] += 1
            if not second:  # otherwise the second has finished it
                delete_outputs(stage)
                continue
        elif status != 0:
            stage.found["failed"] += 1
            print(stage.name, status, log.read_text()[-3000:])
            return
        elif not second and not whole and rounds > 1:
            resumed = re.search(r"resuming after step (\d+)", log.read_text())
            steps = int(resumed[1]) if resumed else 0
            parts = stage.parts - seen["parts"]
            if (parts, steps) != before:
                stage.found["lost"] += 1
                print(f"{stage.name}: kept {before}, resumed from {(parts, steps)}", log.read_text()[-1500:])
        break
    sweep(stage)
    if contents(stage.output) != stage.expected:
        stage.found["unequal"] += 1
    expected = {stage.output.name, *([manifest_of(stage.output).name] if stage.output.is_file() else [])}
    left = {path.name for path in stage.output.parent.iterdir()} - expected
    if second and status == -signal.SIGKILL:  # the next process on this artifact deletes what the killed one has left
        left = set()
    if left:
        stage.found["left"] += 1
        print(stage.name, "left:", left, [str(p) for p in (stage.output.parent / ".work").rglob("*")])


def main(printed: Path, folder: Path, kills: int, seed: int) -> int:
    """Kill `kills` times, spread over the stages; print a table; return how much went wrong."""
    stages = read_stages(printed.read_text(), folder)
    for stage in stages:  # imported once, before the forks
        importlib.import_module(stage.name.split()[0])
    started = time.monotonic()
    draws = random.Random(seed)
    for stage in stages:
        stage.output.parent.mkdir(parents=True)
        log = folder / f"{stage.output.parent.name}.log"
        status, seen = end(*start(stage, None, log))
        if status:
            raise SystemExit(f"{stage.name} fails undisturbed: {log.read_text()}")
        stage.changes, stage.parts = seen["changes"], seen["parts"]
        stage.expected = contents(stage.output)
    while (done := sum(stage.found["kills"] for stage in stages)) < kills:
        stage = min(stages, key=lambda each: each.found["kills"])
        once(stage, min(draws.randint(1, 3), kills - done), draws)
    columns = ("kills", "two at once", "failed", "lost", "unequal", "left")
    print("| stage | changes | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 2))
    for stage in stages:
        print(f"| {stage.name} | {stage.changes} | " + " | ".join(str(stage.found[name]) for name in columns) + " |")
    totals = {name: sum(stage.found[name] for stage in stages) for name in columns}
    print(f"{totals} in {time.monotonic() - started:.0f} s")
    return sum(totals[name] for name in columns[2:])


if __name__ == "__main__":
    sys.exit(min(99, main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
