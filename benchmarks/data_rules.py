"""Time and peak memory of the data rules on stand-ins of the true size, compared with the plain way in pandas.

    python benchmarks/data_rules.py [--scale 0.05] [--times 1 4] [--rules openorca pmp ...] [--no-plain]

The data are those of `stand_ins`. `--times 4` means four times as many rows with the same limits. Each rule's script,
and the plain way, runs in a separate process. The plain way is the authors' (reference, steps 1 to 3): load everything,
loop over the rows, keep the results in lists. It prints a Markdown table. Times are wall-clock times; in brackets is
the time of all CPUs, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow_scripts"
sys.path[:0] = [str(SCRIPTS), str(ROOT)]

from benchmarks.stand_ins import (  # noqa: E402
    JUDGED,
    SHARDS,
    make_judged,
    make_oasst1,
    make_openorca,
    make_pmp,
    make_shards,
    make_sharegpt,
)
from salmon import language  # noqa: E402
from salmon.config import Aggregation  # noqa: E402
from salmon.formats import OPENORCA_FAMILIES, is_nli  # noqa: E402

PER_FAMILY = 10_000


@dataclass(frozen=True)
class Rule:
    """One data rule.

    Attributes:
        rows: rows of its data set in full size.
        what: description of its input.
        make: writes a stand-in with this many rows into a folder.
        command: script and options, for a folder, an output and a factor of the limits.
        plain: does the same in the plain way.
    """

    rows: int
    what: str
    make: Callable[[Path, int], None]
    command: Callable[[Path, Path, float], list[str]]
    plain: Callable[[Path, Path, float], None]


def main() -> None:
    """Make the stand-ins, run each rule both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the stand-ins and limits; 1 is the true size")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4], help="multiples of the number of rows")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain way")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="checkout with the scripts, to compare versions")
    parser.add_argument("--plain-in", nargs=3, help=argparse.SUPPRESS)  # folder, output, rule: in a separate process
    options = parser.parse_args()
    if options.plain_in:
        folder, output, name = options.plain_in
        RULES[name].plain(Path(folder), Path(output), options.scale)
        return
    print("| rule | reads | rows | MB | time | peak memory | plain: time | plain: memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.rules:
        for times in options.times:
            with tempfile.TemporaryDirectory() as folder:
                print(line(name, times, options, Path(folder)), flush=True)


def line(name: str, times: int, options: argparse.Namespace, folder: Path) -> str:
    """A row of the table."""
    scale = options.scale
    rule, rows = RULES[name], round(RULES[name].rows * scale * times)
    (folder / "in").mkdir()
    rule.make(folder / "in", rows)
    size = sum(file.stat().st_size for file in (folder / "in").rglob("*") if "tokenizer" not in file.parts) / 1e6
    script, *arguments = rule.command(folder / "in", folder / "out.parquet", scale)
    cells = [*measure([str(options.checkout / "workflow_scripts" / script), *arguments])]
    if not options.no_plain:
        here = [str(folder / "in"), str(folder / "plain.parquet"), name]
        cells += measure([str(Path(__file__)), "--scale", str(scale), "--plain-in", *here])
    return f"| {name} | {rule.what} | {rows:,} | {size:,.0f} | " + " | ".join(cells) + " |"


def measure(command: list[str]) -> tuple[str, str]:
    """Wall time and peak resident memory of a Python process.

    Raises:
        RuntimeError: if it fails, with its last lines.
    """
    peak = 0
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        # rusage would give at least the peak of this process, as which the child begins.
        status_file = Path(f"/proc/{child.pid}/status")
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            found = re.search(r"VmHWM:\s+(\d+) kB", status_file.read_text())
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if ended[1]:
            log.seek(0)
            raise RuntimeError(f"{command[0]} failed:\n{log.read().decode()[-2000:]}")
    return f"{seconds:.1f} s ({ended[2].ru_utime + ended[2].ru_stime:.1f} s)", f"{peak * 1024 / 1e9:.2f} GB"


# The rules' scripts


def source(folder: Path, name: str, kind: str, **more: Any) -> dict[str, Any]:
    """A section `sources` with one source."""
    return {"it": {"format": kind, "path": str(folder / name), **more}}


def rl_prompts(folder: Path, output: Path, sources: dict[str, Any]) -> list[str]:
    """The command of RL prompts."""
    settings = json.dumps({"sources": sources})
    tokenizer = str(folder / "tokenizer")
    return ["clean_rl_prompts.py", f"--output={output}", f"--rl-prompts={settings}", f"--model.base={tokenizer}"]


def openorca_command(folder: Path, output: Path, scale: float) -> list[str]:
    """RL prompts from OpenOrca alone."""
    sources = source(folder, "data.parquet", "openorca", limit=round(PER_FAMILY * scale), question_type="reasoning")
    return rl_prompts(folder, output, sources)


def pmp_command(folder: Path, output: Path, scale: float) -> list[str]:
    """PMP data from both sources."""
    paths = {"shp": str(folder / "shp.parquet"), "hh_rlhf": str(folder / "hh.jsonl")}
    sources = {kind: {"format": kind, "path": path} for kind, path in paths.items()}
    return ["clean_pmp_data.py", f"--output={output}", f"--pmp-data={json.dumps({'sources': sources})}"]


def gather_command(folder: Path, output: Path, kind: str) -> list[str]:
    """Gathering one table's shards."""
    shards = json.dumps([str(folder / kind / f"{shard}.parquet") for shard in range(SHARDS[kind])])
    return ["gather_shards.py", f"--shards={shards}", f"--output={output}"]


def aggregate_command(folder: Path, output: Path, language_rule: bool) -> list[str]:
    """Aggregation with the paper's settings."""
    inputs = [f"--{name}={folder / name}.parquet" for name in ("preferences", "response0", "response1")]
    settings = {"dimensions": [principle.dimension for principle in JUDGED][:8], "language_rule": language_rule}
    file = ROOT / "prompts/principles/judge.json"
    aggregation = f"--aggregation={json.dumps(settings)}"
    return ["aggregate_preferences.py", *inputs, f"--principles={file}", f"--output={output}", aggregation]


# The plain way


def plain_rl_prompts(texts: Iterator[tuple[str, str]], folder: Path, output: Path, limit: int | None) -> None:
    """Tokenise every text, keep distinct ones in lists, draw from these."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for family, text in texts:
        if text not in seen and 2 <= len(tokenizer(text)["input_ids"]) <= 256:
            seen.add(text)
            found.setdefault(family, []).append(text)
    rng = random.Random(0)  # noqa: S311
    drawn = [text for each in found.values() for text in rng.sample(each, min(limit or len(each), len(each)))]
    pd.DataFrame({"instruction": drawn}).to_parquet(output)


def plain_openorca(folder: Path, output: Path, scale: float) -> None:
    """Load the table, loop over its rows."""

    def texts() -> Iterator[tuple[str, str]]:
        for _, row in pd.read_parquet(folder / "data.parquet").iterrows():
            family = row["id"].split(".")[0]
            if family in OPENORCA_FAMILIES and not is_nli(row["question"]):
                yield family, row["question"].strip()

    plain_rl_prompts(texts(), folder, output, round(PER_FAMILY * scale))


def plain_sharegpt(folder: Path, output: Path, scale: float) -> None:
    """Load the list, loop over it."""
    from salmon.formats import clean_web_text

    def texts() -> Iterator[tuple[str, str]]:
        for row in json.loads((folder / "data.json").read_text(encoding="utf-8")):
            if len(row["conversations"]) > 1 and row["conversations"][0]["from"] == "human":
                yield "", clean_web_text(row["conversations"][0]["value"])

    plain_rl_prompts(texts(), folder, output, None)


def plain_oasst1(folder: Path, output: Path, scale: float) -> None:
    """Load the table, loop over its rows twice."""
    table = pd.read_parquet(folder / "data.parquet")
    parents = {row["parent_id"] for _, row in table.iterrows()}
    roots = table["parent_id"].isna()
    found = [row["text"].strip() for _, row in table[roots].iterrows() if row["message_id"] in parents]
    pd.DataFrame({"instruction": list(dict.fromkeys(found))}).to_parquet(output)


def plain_pmp(folder: Path, output: Path, scale: float) -> None:
    """Load both data sets, loop over them, shuffle a list of records."""
    records = []
    for _, row in pd.read_parquet(folder / "shp.parquet").iterrows():
        if row["score_ratio"] > 2:
            outputs = [row["human_ref_A"], row["human_ref_B"]]
            records.append({"instruction": row["history"], "outputs": outputs, "preference": 2 - row["labels"]})
    for _, row in pd.read_json(folder / "hh.jsonl", lines=True).iterrows():
        shared = os.path.commonprefix([row["chosen"], row["rejected"]])  # noqa: RUF071
        query, marker, _ = shared.rpartition("\n\nAssistant:")
        start = len(query) + len(marker)
        records.append(
            {"instruction": query, "outputs": [row["chosen"][start:], row["rejected"][start:]], "preference": 1}
        )
    random.Random(0).shuffle(records)  # noqa: S311
    pd.DataFrame(records).to_parquet(output)


def plain_gather(folder: Path, output: Path, kind: str) -> None:
    """Load all shards, sort them."""
    shards = [pd.read_parquet(folder / kind / f"{shard}.parquet") for shard in range(SHARDS[kind])]
    pd.concat(shards).sort_values("prompt_id", kind="stable").to_parquet(output)


def plain_aggregate(folder: Path, output: Path, language_rule: bool) -> None:
    """Load all, loop over pairs and passes, keep the records in a list."""
    settings = Aggregation(dimensions=[principle.dimension for principle in JUDGED][:8])
    shown = {principle.dimension: principle for principle in JUDGED[:8]}
    judged: dict[str, dict[str, float]] = {}
    for _, row in pd.read_parquet(folder / "preferences.parquet").iterrows():
        judged.setdefault(row["prompt_id"], {})[row["dimension"]] = (row["s12"] + row["s21"]) / 2
    deviation = {name: np.var([scores[name] for scores in judged.values()]) for name in shown}
    both = pd.merge(*(pd.read_parquet(folder / f"response{n}.parquet") for n in (0, 1)), on="prompt_id")
    rng = random.Random(0)  # noqa: S311
    records = []
    for number in range(settings.passes):
        for _, row in both.iterrows():
            texts = [row["instruction_x"], row["response_x"], row["response_y"]]
            asked, *spoken = language.detect(texts) if language_rule else [None] * 3
            names = rng.sample(list(shown), rng.randint(1, 8))
            scores = [judged[row["prompt_id"]][name] / deviation[name] for name in names]
            better = 1 if max(scores, key=abs) > 0 else 2
            definitions = [shown[name].definition for name in names]
            records.append([number, *texts, better, names, definitions, scores, asked, *spoken])
    pd.DataFrame(records).to_parquet(output)


def gather_rule(kind: str) -> Rule:
    """The rule that gathers one table."""
    return Rule(
        98_000,
        f"{kind} of this many pairs in {SHARDS[kind]} shards",
        make_shards,
        lambda folder, output, _: gather_command(folder, output, kind),
        lambda folder, output, _: plain_gather(folder, output, kind),
    )


def aggregate_rule(language_rule: bool) -> Rule:
    """The aggregation rule, with or without its language rule."""
    return Rule(
        98_000,
        f"pairs with 11 judgements each, language rule {'on' if language_rule else 'off'}",
        make_judged,
        lambda folder, output, _: aggregate_command(folder, output, language_rule),
        lambda folder, output, _: plain_aggregate(folder, output, language_rule),
    )


RULES = {
    "openorca": Rule(1_000_000, "OpenOrca, Parquet", make_openorca, openorca_command, plain_openorca),
    "sharegpt": Rule(
        90_000,
        "ShareGPT, one JSON list",
        make_sharegpt,
        lambda folder, output, _: rl_prompts(folder, output, source(folder, "data.json", "sharegpt")),
        plain_sharegpt,
    ),
    "oasst1": Rule(
        84_000,
        "OASST1, Parquet",
        make_oasst1,
        lambda folder, output, _: [
            "clean_prompts.py",
            f"--output={output}",
            f"--prompts={json.dumps({'sources': source(folder, 'data.parquet', 'oasst1')})}",
        ],
        plain_oasst1,
    ),
    "pmp": Rule(349_000, "SHP, Parquet; and HH-RLHF (161 for 349), JSON lines", make_pmp, pmp_command, plain_pmp),
    **{f"gather_{kind}": gather_rule(kind) for kind in SHARDS},
    "aggregate": aggregate_rule(True),
    "aggregate_without_languages": aggregate_rule(False),
}


if __name__ == "__main__":
    main()
