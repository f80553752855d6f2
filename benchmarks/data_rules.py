"""Time and peak memory of the data rules on stand-ins of the true size, beside the plain way in pandas.

    python benchmarks/data_rules.py [--scale 0.05] [--times 1 4] [--rules openorca pmp ...] [--no-plain]

The stand-ins have the schema, the number of rows and about the lengths of the public data sets, and made-up texts:
pieces of a long text of our prompts' words in random order. `--times 4` is four times as many rows, under the same
limits. Each rule's script, and the plain way, runs in a process of its own. The plain way is the authors' (reference,
steps 1 to 3): load all, loop over the rows, keep the results in lists. Prints a Markdown table; times are those of
the clock, and in brackets those of all CPUs, which other work on the machine disturbs less.
"""

import argparse
import hashlib
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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow_scripts"
sys.path[:0] = [str(SCRIPTS), str(ROOT)]

from salmon import artifacts, language, principles  # noqa: E402
from salmon.config import Aggregation  # noqa: E402
from salmon.formats import OPENORCA_FAMILIES, is_nli  # noqa: E402

BATCH = 20_000
PER_FAMILY = 10_000
SHARDS = {"responses": 4, "judgements": 8}
JUDGED = principles.read_judged(ROOT / "prompts/principles/judge.json")


@dataclass(frozen=True)
class Rule:
    """One data rule.

    Attributes:
        rows: of its data set in full size.
        what: that it reads.
        make: writes a stand-in of so many rows into a folder.
        command: script and options, given the folder, the output and the factor of the limits.
        plain: does the same the plain way.
    """

    rows: int
    what: str
    make: Callable[[Path, int], None]
    command: Callable[[Path, Path, float], list[str]]
    plain: Callable[[Path, Path, float], None]


def main() -> None:
    """Make the stand-ins, run each rule both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the stand-ins and limits; 1 is the true one")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4], help="so many times the rows")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain way")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose scripts run, to compare two versions")
    parser.add_argument("--plain-in", nargs=3, help=argparse.SUPPRESS)  # folder, output, rule: in a process of its own
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
        RuntimeError: with its last lines, where it fails.
    """
    peak = 0
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        # Of rusage, the peak would be at least that of this process, which the child begins as.
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


# Stand-ins


@cache
def long_text() -> str:
    """Our prompts' words in random order."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "prompts").rglob("*.*"))).split()
    return " ".join(random.Random(0).choices(words, k=1_000_000))  # noqa: S311


def pieces(rng: np.random.Generator, number: int, median: float, spread: float = 0.8) -> list[str]:
    """Texts of lengths that are log-normal, in characters; one in fifty is there twice."""
    text = long_text()
    lengths = np.minimum(rng.lognormal(np.log(median), spread, number).astype(int) + 8, 30_000)
    starts = rng.integers(0, len(text) - 30_000, number)
    found = [text[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
    for place in rng.integers(1, number, number // 50) if number > 1 else ():
        found[place] = found[place - 1]
    return found


def batches(rows: int) -> Iterator[tuple[np.random.Generator, int, int]]:
    """(generator, first row, number of rows) of each batch."""
    for start in range(0, rows, BATCH):
        yield np.random.default_rng(start), start, min(BATCH, rows - start)


def write_parquet(path: Path, tables: Iterator[dict[str, Any]]) -> None:
    """Batches of columns to one file."""
    writer = None
    for columns in tables:
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer as large as our prompts allow, in a folder that stands for a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([long_text()[:1_000_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(folder)  # noqa: S106
    (folder / "config.json").write_text('{"model_type": "llama"}')


def make_openorca(folder: Path, rows: int) -> None:
    """1M-GPT4-Augmented.parquet: four families, one question in twelve of natural language inference."""
    families = np.array(OPENORCA_FAMILIES)

    def tables() -> Iterator[dict[str, Any]]:
        for rng, start, number in batches(rows):
            family = families[rng.choice(4, number, p=[0.2, 0.45, 0.3, 0.05])]
            marks = np.where(rng.random(number) < 1 / 12, "Premise: ", "")
            yield {
                "id": [f"{name}.{start + place}" for place, name in enumerate(family)],
                "system_prompt": pieces(rng, number, 120),
                "question": [mark + text for mark, text in zip(marks, pieces(rng, number, 600), strict=True)],
                "response": pieces(rng, number, 500),
            }

    write_parquet(folder / "data.parquet", tables())
    make_tokenizer(folder / "tokenizer")


def make_sharegpt(folder: Path, rows: int) -> None:
    """sg_90k: one JSON list, six turns a conversation, a third of which do not begin with a human."""
    with (folder / "data.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for rng, start, number in batches(rows):
            asked, said = pieces(rng, number, 200, 1.2), iter(pieces(rng, 5 * number, 950))
            for place, first in enumerate(asked):
                who = ["human", "gpt"] if rng.random() < 2 / 3 else ["gpt", "human"]
                texts = [first + " 1 / 1", *(next(said) for _ in range(5))]
                talk = [{"from": who[turn % 2], "value": text} for turn, text in enumerate(texts)]
                row = {"id": f"c{start + place}_0", "conversations": talk}
                file.write(f"{',' if start + place else ''}\n{json.dumps(row)}")
        file.write("]")
    make_tokenizer(folder / "tokenizer")


def make_oasst1(folder: Path, rows: int) -> None:
    """Trees of eight messages."""

    def tables() -> Iterator[dict[str, Any]]:
        for rng, start, number in batches(rows):
            places = range(start, start + number)
            parents = [
                None if place % 8 == 0 else f"m{place - int(rng.integers(1, place % 8 + 1))}" for place in places
            ]
            yield {
                "message_id": [f"m{place}" for place in places],
                "parent_id": pa.array(parents, pa.string()),
                "text": pieces(rng, number, 500),
                "role": ["assistant" if parent else "prompter" for parent in parents],
                "lang": ["en"] * number,
                "review_result": rng.random(number) < 0.97,
                "deleted": rng.random(number) < 0.02,
            }

    write_parquet(folder / "data.parquet", tables())


def make_pmp(folder: Path, rows: int) -> None:
    """SHP as Parquet; and HH-RLHF as JSON lines, 161 pairs for 349 of SHP."""

    def tables() -> Iterator[dict[str, Any]]:
        for rng, start, number in batches(rows):
            yield {
                "post_id": [f"p{start + place}" for place in range(number)],
                "history": pieces(rng, number, 600),
                "human_ref_A": pieces(rng, number, 300),
                "human_ref_B": pieces(rng, number, 300),
                "labels": rng.integers(0, 2, number),
                "score_ratio": 1 + rng.exponential(2, number),
            }

    write_parquet(folder / "shp.parquet", tables())
    with (folder / "hh.jsonl").open("w", encoding="utf-8") as file:
        for rng, _, number in batches(round(rows * 161 / 349)):
            parts = zip(*(pieces(rng, number, length) for length in (100, 300, 100, 300, 300)), strict=True)
            for asked, said, more, good, bad in parts:
                start = f"\n\nHuman: {asked}\n\nAssistant: {said}\n\nHuman: {more}\n\nAssistant: "
                file.write(json.dumps({"chosen": start + good, "rejected": start + bad}) + "\n")


def prompt_ids(start: int, number: int) -> list[str]:
    """Ids that are spread as hashes are."""
    return [hashlib.sha256(str(place).encode()).hexdigest()[:20] for place in range(start, start + number)]


def response_tables(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Responses as they are sampled, 200 tokens long."""
    for rng, start, number in batches(rows):
        other = np.random.default_rng(start + seed)
        yield {
            "prompt_id": prompt_ids(start, number),
            "source": ["made up"] * number,
            "instruction": pieces(rng, number, 120),
            "input": [""] * number,
            "response": pieces(other, number, 900),
            "finish_reason": ["eos"] * number,
            "prompt_tokens": pa.array([200] * number, pa.int32()),
            "response_tokens": pa.array([200] * number, pa.int32()),
        }


def judgement_tables(rows: int) -> Iterator[dict[str, Any]]:
    """Eleven judgements a pair."""
    for rng, start, number in batches(rows):
        names = [principle.dimension for principle in JUDGED]
        s12, s21 = rng.normal(0, 1, (2, number * len(names)))
        yield {
            "prompt_id": np.repeat(prompt_ids(start, number), len(names)),
            "dimension": names * number,
            "s12": s12,
            "s21": s12 + s21,
        }


def make_shards(folder: Path, rows: int) -> None:
    """Shards of responses and judgements with their manifests, the rows of a prompt in one of them."""
    for kind, tables in (("responses", response_tables(rows, 1)), ("judgements", judgement_tables(rows))):
        (folder / kind).mkdir()
        paths = [folder / kind / f"{shard}.parquet" for shard in range(SHARDS[kind])]
        writers: list[pq.ParquetWriter] = []
        for columns in tables:
            table = pa.table(columns)
            writers = writers or [pq.ParquetWriter(path, table.schema) for path in paths]
            place = np.arange(len(table)) // (1 if kind == "responses" else len(JUDGED)) % len(paths)
            for shard, writer in enumerate(writers):
                writer.write_table(table.filter(pa.array(place == shard)))
        for shard, (writer, path) in enumerate(zip(writers, paths, strict=True)):
            writer.close()
            settings = {"shard": shard, "shards": len(paths)}
            number = pq.read_metadata(path).num_rows
            counts = {"rows": number} | ({"judged": number // len(JUDGED)} if kind == "judgements" else {})
            artifacts.write_json(artifacts.manifest_path(path), artifacts.manifest(settings, {}, counts))


def make_judged(folder: Path, rows: int) -> None:
    """Both responses and the judgements, gathered: sorted by prompt_id."""
    for name, tables in (
        ("response0", response_tables(rows, 1)),
        ("response1", response_tables(rows, 2)),
        ("preferences", judgement_tables(rows)),
    ):
        write_parquet(folder / f"{name}.unsorted", tables)
        pl.read_parquet(folder / f"{name}.unsorted").sort("prompt_id", maintain_order=True).write_parquet(
            folder / f"{name}.parquet"
        )
        (folder / f"{name}.unsorted").unlink()


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
    """RL prompts of OpenOrca alone."""
    sources = source(folder, "data.parquet", "openorca", limit=round(PER_FAMILY * scale), question_type="reasoning")
    return rl_prompts(folder, output, sources)


def pmp_command(folder: Path, output: Path, scale: float) -> list[str]:
    """Both sources of PMP data."""
    paths = {"shp": str(folder / "shp.parquet"), "hh_rlhf": str(folder / "hh.jsonl")}
    sources = {kind: {"format": kind, "path": path} for kind, path in paths.items()}
    return ["clean_pmp_data.py", f"--output={output}", f"--pmp-data={json.dumps({'sources': sources})}"]


def gather_command(folder: Path, output: Path, kind: str) -> list[str]:
    """Gathering of one table's shards."""
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
    """Tokenise every text, keep the distinct ones in lists, draw from these."""
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
    "gather_responses": Rule(
        98_000,
        "responses of so many pairs in 4 shards",
        make_shards,
        lambda folder, output, _: gather_command(folder, output, "responses"),
        lambda folder, output, _: plain_gather(folder, output, "responses"),
    ),
    "gather_judgements": Rule(
        98_000,
        "judgements of so many pairs, 11 each, in 8 shards",
        make_shards,
        lambda folder, output, _: gather_command(folder, output, "judgements"),
        lambda folder, output, _: plain_gather(folder, output, "judgements"),
    ),
    "aggregate": Rule(
        98_000,
        "so many pairs, 11 judgements each",
        make_judged,
        lambda folder, output, _: aggregate_command(folder, output, True),
        lambda folder, output, _: plain_aggregate(folder, output, True),
    ),
    "aggregate_without_languages": Rule(
        98_000,
        "the same, language rule off",
        make_judged,
        lambda folder, output, _: aggregate_command(folder, output, False),
        lambda folder, output, _: plain_aggregate(folder, output, False),
    ),
}


if __name__ == "__main__":
    main()
