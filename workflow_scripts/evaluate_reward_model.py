"""Measure a reward model on held-out records, also with reversed principles, and on human preferences.

Whole prompts are held out (`training.split`), so training has seen none of their texts. A reward model that was made
elsewhere is measured only on human preferences.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from salmon.tables import EVALUATION_PAIRS, JUDGEMENTS, PMP_RECORDS, PREFERENCE_RECORDS, PRINCIPLE_RECORDS
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.evaluate_reward_model")


class Arguments(script.Arguments):
    """Measure a reward model."""

    reward_model: Path = Field(description="folder of the reward model")
    records: Path | None = Field(None, description="preference records that it was trained on (parquet), if known")
    preferences: Path | None = Field(
        None, description="judgements (parquet), if records were also made from those whose two orders disagree"
    )
    pairs: Path | None = Field(None, description="human preferences (parquet), if any")
    pmp_data: Path | None = Field(
        None,
        description="records of its pre-training (parquet), to measure it on those that were held out; needs --pmp",
    )
    principles: Path = Field(description="JSON list of dimension, definition, negative_definition")
    output: Path = Field(description="folder to write: reward_model.json, manifest.json")
    model: Model = Field(description="section of the configuration")
    tokenizer: Model | None = Field(None, description="model whose tokenizer is used; by default, that of `model`")
    pmp: RewardTraining | None = Field(
        None, description="section of the configuration, for a pre-trained reward model, or with --pmp-data"
    )
    trained: RewardModel | None = Field(None, description="section reward_model of the configuration, for any other")
    dimensions: script.JsonList[str] = Field([], description="names of the principles shown with human pairs")
    scoring: Scoring = Field(Scoring(), description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(8, ge=1, description="hardware: texts per forward pass on each GPU")

    @property
    def settings(self) -> RewardTraining:
        """The settings of the training."""
        if self.pmp_data and not (self.pmp and self.trained):
            raise UserError("--pmp-data needs --pmp, the settings of the pre-training, and --trained, those after it")
        if not self.pmp_data and bool(self.pmp) == bool(self.trained):
            raise UserError("set either --pmp or --trained, the settings of the reward model's training")
        settings = self.trained or self.pmp
        assert settings is not None
        return settings

    @property
    def stage(self) -> Literal["pmp", "reward_model"]:
        """The section of the settings."""
        return "reward_model" if self.trained else "pmp"


class Reader:
    """Rewards of records."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments, self.device = arguments, distributed.init()
        self.cut: dict[str, set[int]] = {}
        self.tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
        settings = arguments.settings
        self.template = encoding.read_template(self.tokenizer, settings.template, arguments.scoring, "scoring.format")
        self.model: PeftModel = models.load_reward_model(
            arguments.model, arguments.reward_model, self.device, trainable=False
        )

    def counts(self, what: str) -> dict[str, int]:
        """Number of texts in the last call that exceeded the reward model's length."""
        return {f"{what}: {which} cut": len(places) for which, places in self.cut.items()}

    def margins(self, records: pl.DataFrame) -> npt.NDArray[np.float64]:
        """Reward of output 1 minus reward of output 2, [N]."""
        if not len(records):
            return np.empty(0)
        score = partial(rewards.score, self.model, batch_size=self.arguments.batch_size, device=self.device)
        scored = distributed.over_ranks(self._texts(records), score).view(-1, 2).double()
        margins: npt.NDArray[np.float64] = (scored[:, 0] - scored[:, 1]).numpy()
        return margins

    def margins_under(
        self, pairs: pl.DataFrame, ways: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, int]]:
        """The same under several lists of definitions, by name; and the numbers of texts cut under the first."""
        texts, counts = [], dict[str, int]()
        for definitions in ways.values():
            table = pairs.with_columns(pl.lit(list(definitions), dtype=pl.List(pl.String)).alias("definitions"))
            texts.append(self._texts(table))
            counts = counts or self.counts("pairs")
        if not len(pairs):
            return {way: np.empty(0) for way in ways}, counts
        groups = [list(group) for group in zip(*texts, strict=True)]  # each output's texts share a beginning
        score = partial(rewards.score_alike, self.model, batch_size=self.arguments.batch_size, device=self.device)
        scored = distributed.over_ranks(groups, score).view(-1, 2, len(ways)).double().numpy()
        return {way: scored[:, 0, place] - scored[:, 1, place] for place, way in enumerate(ways)}, counts

    def _texts(self, records: pl.DataFrame) -> list[list[int]]:
        """Tokens of the texts, two per record; records which were cut."""
        self.cut = {}
        arguments = self.arguments
        return rewards.record_tokens(
            self.tokenizer, self.template, records, arguments.settings, arguments.stage, self.cut
        )


def main(arguments: Arguments) -> None:
    """Read the data, score them, write the folder."""
    settings, seed = arguments.settings, arguments.evaluation.seed
    of_records = arguments.records and settings.eval_examples
    of_pmp = arguments.pmp_data and arguments.pmp and arguments.pmp.eval_examples
    if not (arguments.pairs or of_records or of_pmp):
        raise UserError(
            "there is nothing to measure the reward model with: set --pairs, or --records or --pmp-data of a training "
            "that held some out (pmp.eval_examples, reward_model.eval_examples)"
        )
    judged = {one.dimension: one for one in principles.read_judged(arguments.principles)}
    opposite = {name: (one.definition, one.negative_definition) for name, one in judged.items()}
    held = pl.DataFrame(schema=PREFERENCE_RECORDS.schema)
    if arguments.records:
        records, _ = rewards.read_records(arguments.records)
        _, held = training.split(records, settings.eval_examples, settings.seed, rewards.NAME)
    unknown = {name for row in held["dimensions"] for name in row} | {*arguments.dimensions}
    if unknown := unknown - judged.keys():
        raise UserError(
            f"{arguments.principles} does not define the principle {min(unknown)}, which is to be shown; name the file "
            "that does"
        )
    pairs = read_pairs(arguments.pairs) if arguments.pairs else None
    before = held_out_of_pmp(arguments.pmp_data, arguments.pmp) if arguments.pmp_data and arguments.pmp else None
    reader = Reader(arguments)
    found: dict[str, Any] = {}
    counts = {"held_out": len(held), "turned": 0, "pairs": 0 if pairs is None else len(pairs)}
    if arguments.records and len(held):
        clean = clean_records(arguments.records, arguments.preferences, held)
        variants = evaluation.turned(held, opposite)
        counts["turned"] = len(variants)
        log.info("%d records held out, %d with a principle reversed", len(held), len(variants))
        margins = reader.margins(held)
        counts |= reader.counts("held_out")
        found["held_out"] = evaluation.held_out(held, margins, variants, reader.margins(variants), seed, clean)
    if pairs is not None:
        shown = {name: opposite[name] for name in arguments.dimensions}
        found["people"], by_subset, cut = agreement(reader, pairs, shown, seed)
        found |= {"subsets": by_subset} if by_subset else {}
        counts |= cut
    if before is not None:
        counts["held_out_of_pmp"] = len(before)
        shown_all = {"all": [opposite[name][0] for name in arguments.dimensions]}
        by_way, cut = reader.margins_under(before, shown_all)
        found["held_out_of_pmp"] = evaluation.agreement(before, by_way["all"], seed)
        counts |= {name.replace("pairs", "held_out_of_pmp"): number for name, number in cut.items()}
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
    """Which held-out records have the label of the judge or of a rule, not reversed by label noise.

    Args:
        path: the table of all records.
        preferences: judgements; those count whose two orders agree about the deciding principle; without
            them, all records count.
        held: the N held-out records.

    Returns:
        [N]; None for human preferences, where it is unknown.
    """
    if "flipped" not in tables.schema_of(path):
        return None
    noise = checked.read(path, PRINCIPLE_RECORDS, ("record_id", "flipped", "rule")).collect()
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
        # If the sum of all principles decided, there is no single verdict whose two orders could agree.
        clean &= here.select(agree.fill_null(pl.col("rule").is_not_null())).to_series().to_numpy()
    return clean


def read_pairs(path: Path) -> pl.DataFrame:
    """Human preferences (`EVALUATION_PAIRS`); a table of PMP records has no subsets."""
    if "subset" in tables.schema_of(path):
        return checked.read(path, EVALUATION_PAIRS).collect()
    return checked.read(path, PMP_RECORDS).collect().with_columns(subset=pl.lit(None, pl.String))


def held_out_of_pmp(path: Path, settings: RewardTraining) -> pl.DataFrame:
    """The pairs of people that the pre-training held out; `rewards.read_records` has no `source`."""
    records, _ = rewards.read_records(path)
    _, held = training.split(records, settings.eval_examples, settings.seed, rewards.NAME)
    sources = checked.read(path, PMP_RECORDS, ("record_id", "source")).collect()
    return held.join(sources, on="record_id", how="left", maintain_order="left")


def agreement(
    reader: Reader, pairs: pl.DataFrame, shown: Mapping[str, tuple[str, str]], seed: int
) -> tuple[dict[str, evaluation.BySource], dict[str, evaluation.BySource], dict[str, int]]:
    """Agreement with people: with all principles shown, and with each alone, plain and negated.

    Returns:
        Way of showing principles -> by source; source -> by subset with all principles shown, for sources with subsets;
        and how many texts were then cut.
    """
    ways = {"all": [plain for plain, _ in shown.values()]}
    for name, (plain, negated) in shown.items():
        # With a single principle, this equals showing all.
        ways |= {**({name: [plain]} if len(shown) > 1 else {}), f"{name}, negated": [negated]}
    margins, counts = reader.margins_under(pairs, ways)
    found = {way: evaluation.agreement(pairs, margins[way], seed) for way in ways}
    for way, by_source in found.items():
        log.info("people, %s: %s", way, {name: one["value"] for name, one in by_source.items()})
    return found, evaluation.agreement_by_subset(pairs, margins["all"], seed), counts


def origin_of(arguments: Arguments) -> provenance.Origin:
    """The settings that affect the numbers."""
    return provenance.evaluate_reward_model(
        arguments.reward_model,
        arguments.records,
        arguments.pairs,
        arguments.principles,
        arguments.preferences,
        arguments.pmp_data,
        stage=arguments.stage,
        settings=arguments.settings,
        pmp=arguments.pmp if arguments.pmp_data else None,
        dimensions=arguments.dimensions,
        model=arguments.model,
        tokenizer=arguments.tokenizer or arguments.model,
        scoring=arguments.scoring,
        evaluation=arguments.evaluation,
    )


if __name__ == "__main__":
    script.run(main, Arguments)
