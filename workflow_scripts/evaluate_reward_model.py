"""Measure a reward model on records that its training held out, with principles reversed, and on human preferences.

Held out are whole prompts (`training.split`), so that no text of theirs was trained on. A reward model that was made
elsewhere is measured on human preferences alone.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from peft import PeftModel
from pydantic import Field

from salmon import (
    artifacts,
    checked,
    distributed,
    encoding,
    evaluation,
    models,
    principles,
    provenance,
    script,
    tables,
    training,
)
from salmon import reward_model as rewards
from salmon.config import Evaluation, Model, RewardModel, RewardTraining, Scoring
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS, PMP_RECORDS, PREFERENCE_RECORDS, PRINCIPLE_RECORDS
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.evaluate_reward_model")


class Arguments(script.Arguments):
    """Measure a reward model."""

    reward_model: Path = Field(description="folder of the reward model")
    records: Path | None = Field(None, description="preference records that it was trained on (parquet), if known")
    preferences: Path | None = Field(
        None, description="judgements (parquet), where records were also made of those whose two orders disagree"
    )
    pairs: Path | None = Field(None, description="people's preferences (parquet), if any")
    principles: Path = Field(description="JSON list of dimension, definition, negative_definition")
    output: Path = Field(description="folder to write: reward_model.json, manifest.json")
    model: Model = Field(description="section of the configuration")
    tokenizer: Model | None = Field(None, description="model whose tokenizer is used; without it, that of `model`")
    pmp: RewardTraining | None = Field(None, description="section of the configuration, for a model of pre-training")
    trained: RewardModel | None = Field(None, description="section reward_model of the configuration, for any other")
    dimensions: script.JsonList[str] = Field([], description="names of the principles shown with people's pairs")
    scoring: Scoring = Field(Scoring(), description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(8, ge=1, description="hardware: texts per forward pass on each GPU")

    @property
    def settings(self) -> RewardTraining:
        """Of the training."""
        settings = self.pmp or self.trained
        if settings is None or (self.pmp and self.trained):
            raise UserError("give either --pmp or --trained, the settings of the reward model's training")
        return settings


class Reader:
    """Rewards of records."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments, self.device = arguments, distributed.init()
        self.tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
        settings = arguments.settings
        self.template = encoding.read_template(self.tokenizer, settings.template, arguments.scoring, "scoring.format")
        self.model: PeftModel = models.load_reward_model(
            arguments.model, arguments.reward_model, self.device, trainable=False
        )

    def margins(self, records: pl.DataFrame) -> npt.NDArray[np.float64]:
        """Reward of output 1 less that of output 2, [N]."""
        if not len(records):
            return np.empty(0)
        arguments = self.arguments
        stage = "pmp" if arguments.pmp else "reward_model"
        rows = rewards.record_tokens(self.tokenizer, self.template, records, arguments.settings, stage)
        score = partial(rewards.score, self.model, batch_size=arguments.batch_size, device=self.device)
        scored = distributed.over_ranks(rows, score).view(-1, 2).double()
        margins: npt.NDArray[np.float64] = (scored[:, 0] - scored[:, 1]).numpy()
        return margins


def main(arguments: Arguments) -> None:
    """Read what is measured, score it, write the folder."""
    settings, seed = arguments.settings, arguments.evaluation.seed
    if not (arguments.records or arguments.pairs):
        raise UserError("there is nothing to measure the reward model by: give --records, --pairs or both")
    judged = {one.dimension: one for one in principles.read_judged(arguments.principles)}
    opposite = {name: (one.definition, one.negative_definition) for name, one in judged.items()}
    held = pl.DataFrame(schema=PREFERENCE_RECORDS.schema)
    if arguments.records:
        records, _ = rewards.read_records(arguments.records)
        _, held = training.split(records, settings.eval_examples, settings.seed, rewards.NAME)
    unknown = {name for row in held["dimensions"] for name in row} | {*arguments.dimensions}
    if unknown := unknown - judged.keys():
        raise UserError(f"{arguments.principles} has no principle {min(unknown)}, which is to be shown; name its file")
    pairs = checked.read(arguments.pairs, PMP_RECORDS).collect() if arguments.pairs else None
    reader = Reader(arguments)
    found: dict[str, Any] = {}
    counts = {"held_out": len(held), "turned": 0, "pairs": 0 if pairs is None else len(pairs)}
    if arguments.records and len(held):
        clean = clean_records(arguments.records, arguments.preferences, held)
        variants = evaluation.turned(held, opposite)
        counts["turned"] = len(variants)
        log.info("%d records held out, %d with a principle reversed", len(held), len(variants))
        found["held_out"] = evaluation.held_out(
            held, reader.margins(held), variants, reader.margins(variants), seed, clean
        )
    if pairs is not None:
        found["people"] = agreement(reader, pairs, {name: opposite[name] for name in arguments.dimensions}, seed)
    if distributed.is_main():
        origin = origin_of(arguments)
        with artifacts.atomic(arguments.output) as folder:
            folder.mkdir()
            artifacts.write_json(folder / "reward_model.json", found)
            artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))
        log.info("held out: %s", found.get("held_out", {}).get("accuracy"))
    distributed.barrier()
    distributed.leave()


def clean_records(path: Path, preferences: Path | None, held: pl.DataFrame) -> npt.NDArray[np.bool_] | None:
    """Of which held-out records the label is what the judge or a rule says: not reversed by label noise.

    Args:
        path: of all records.
        preferences: judgements, of which those count whose two orders agree about the principle that decided; without
            them, those of all records do.
        held: the records held out, N of them.

    Returns:
        [N]; None of people's preferences, of which it is not known.
    """
    if "flipped" not in tables.schema_of(path):
        return None
    noise = checked.read(path, PRINCIPLE_RECORDS, ("record_id", "flipped")).collect()
    rows = held.join(noise, on="record_id", how="left", maintain_order="left")
    clean: npt.NDArray[np.bool_] = ~rows["flipped"].to_numpy()
    if preferences:
        judged = checked.read(preferences, JUDGEMENTS).collect()
        here = rows.join(
            judged,
            left_on=("prompt_id", "deciding"),
            right_on=("prompt_id", "dimension"),
            how="left",
            maintain_order="left",
        )
        agree = (pl.col("s12") > 0) & (pl.col("s21") > 0) | (pl.col("s12") < 0) & (pl.col("s21") < 0)
        clean &= here.select(agree.fill_null(pl.col("deciding").is_null())).to_series().to_numpy()
    return clean


def agreement(
    reader: Reader, pairs: pl.DataFrame, shown: Mapping[str, tuple[str, str]], seed: int
) -> dict[str, dict[str, evaluation.Estimate]]:
    """Agreement with people by source: with all the principles shown, and with each alone, plain and negated."""
    ways: dict[str, list[tuple[str, bool]]] = {"all": [(name, False) for name in shown]}
    for name in shown if len(shown) > 1 else ():
        ways |= {name: [(name, False)], f"{name}, negated": [(name, True)]}
    found = {}
    for way, chosen in ways.items():
        definitions = [shown[name][negated] for name, negated in chosen]
        table = pairs.with_columns(pl.lit(definitions, dtype=pl.List(pl.String)).alias("definitions"))
        found[way] = evaluation.agreement(pairs, reader.margins(table), seed)
        log.info("people, %s: %s", way, {name: one["value"] for name, one in found[way].items()})
    return found


def origin_of(arguments: Arguments) -> provenance.Origin:
    """What decides the numbers."""
    return provenance.evaluate_reward_model(
        arguments.reward_model,
        arguments.records,
        arguments.pairs,
        arguments.principles,
        arguments.preferences,
        stage="pmp" if arguments.pmp else "reward_model",
        settings=arguments.settings,
        dimensions=arguments.dimensions,
        model=arguments.model,
        tokenizer=arguments.tokenizer or arguments.model,
        scoring=arguments.scoring,
        evaluation=arguments.evaluation,
    )


if __name__ == "__main__":
    script.run(main, Arguments)
