"""Stand-ins for the public data sets, with their schemas, numbers of rows, and approximate text lengths.

The texts are pieces of a long text of our prompts' words in random order.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow_scripts"
sys.path[:0] = [str(SCRIPTS), str(ROOT)]

from salmon import artifacts, principles  # noqa: E402
from salmon.formats import OPENORCA_FAMILIES  # noqa: E402

BATCH = 20_000
SHARDS = {"responses": 4, "judgements": 8}
JUDGED = principles.read_judged(ROOT / "prompts/principles/judge.json")


@cache
def long_text() -> str:
    """Our prompts' words in random order."""
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "prompts").rglob("*.*"))).split()
    return " ".join(random.Random(0).choices(words, k=1_000_000))  # noqa: S311


def pieces(rng: np.random.Generator, number: int, median: float, spread: float = 0.8) -> list[str]:
    """Texts with log-normal lengths, in characters; one in fifty occurs twice."""
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
    """Write batches of columns to one file."""
    writer = None
    for columns in tables:
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer as large as our prompts allow, in a folder in place of a model."""
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
    """1M-GPT4-Augmented.parquet: four families; one question in twelve is natural language inference."""
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
    """sg_90k: one JSON list, six turns per conversation; a third of the conversations do not begin with a human."""
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
    """Ids that are distributed like hashes."""
    return [hashlib.sha256(str(place).encode()).hexdigest()[:20] for place in range(start, start + number)]


def response_tables(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Responses like sampled ones, 200 tokens long."""
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
    """Eleven judgements per pair."""
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
    """Shards of responses and judgements with their manifests; all rows of a prompt are in one shard."""
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
