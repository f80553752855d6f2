"""Train a reward model on preference records: pre-training (PMP) or the principle-following stage.

Bradley-Terry loss on pairs, QLoRA, a linear head on the last token (paper section 3.3); see
`salmon/reward_model.py`. It runs on one process or several ranks, with or without DeepSpeed. The result is that of the
global batch, however it is divided. After an interruption it resumes from its last checkpoint.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from salmon import distributed, encoding, models, provenance, reward_model, script, templates, training
from salmon.border import reading
from salmon.config import Lora, Model, RewardModel, RewardTraining, Scoring
from salmon.encoding import Template
from salmon.errors import UserError
from salmon.models import check_context
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger("salmon.train_reward_model")

COUNTED = 512
"""Pairs whose tokens are held at once while they are counted."""


class Arguments(training.Arguments):
    """Train a reward model on preference records."""

    records: Path = Field(description="preference records (parquet)")
    output: Path = Field(description="folder of the reward model: adapter, head, metrics.json, manifest.json")
    init: Path | None = Field(None, description="reward model to start from; without it, a new adapter and head")
    tokenizer: Model | None = Field(None, description="model whose tokenizer is used; by default, that of `model`")
    pmp: RewardTraining | None = Field(None, description="section of the configuration, for pre-training (PMP)")
    reward_model: RewardModel | None = Field(
        None, description="section of the configuration, for the principle-following stage"
    )
    scoring: Scoring = Field(Scoring(), description="section of the configuration")

    @model_validator(mode="after")
    def _one_stage(self) -> Self:
        if (self.pmp is None) == (self.reward_model is None):
            raise ValueError("set either --pmp or --reward-model, the settings of the training")
        return self

    @property
    def stage(self) -> Literal["pmp", "reward_model"]:
        """Name of the stage's section in the configuration."""
        return "pmp" if self.pmp else "reward_model"

    @property
    def settings(self) -> RewardTraining:
        """The stage's section."""
        settings = self.pmp or self.reward_model
        assert settings is not None
        return settings


def main(arguments: Arguments) -> None:
    """Read and split the records, train, evaluate, write the folder."""
    device = training.start(arguments)
    settings, stage = arguments.settings, arguments.stage
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    template = read_template(arguments, tokenizer)
    records, counts = reward_model.read_records(arguments.records)
    check_slots(arguments, template.text, records)
    train, held = training.split(records, settings.eval_examples, settings.seed, reward_model.NAME)
    order = training.training_order(len(train), settings.batch_size, settings.epochs, settings.seed, reward_model.NAME)
    counts |= training.count_rows(order, len(train), len(held), arguments, arguments.records)

    if arguments.init:
        check_init(arguments.init, arguments.lora)
    work = WorkFolder(arguments.output)
    origin = origin_of(arguments)
    inputs = distributed.broadcast(origin.identify() if distributed.is_main() else None)
    if training.open_work(arguments, work, origin.fingerprint(inputs)):
        distributed.leave()
        return
    tokenize = partial(reward_model.record_tokens, tokenizer, template, settings=settings, stage=stage)
    lengths = pair_lengths(tokenize, train)
    counts["tokens"] = sum(sum(lengths[row]) for row in order)
    padded = [2 * max(pair) for pair in lengths]
    layout = order, padded, settings.batch_size, arguments.tokens_per_pass, distributed.world()
    passes = training.passes_per_step(*layout)
    trainer_arguments = training.trainer_arguments(arguments, work.path, counts["steps"], passes, device)
    model = load_model(arguments, device)
    check_context(model, settings.max_length, f"{stage}.max_length")
    training.choose_recomputation(arguments, trainer_arguments, model, 2 * settings.max_length, device)
    apart = reward_model.when_apart(model, device)

    def cost(part: list[int]) -> int:
        return reward_model.tokens_of_pairs([lengths[row] for row in part], apart)

    def batch(part: list[int]) -> training.Batch:
        chosen = train[part]
        texts = reward_model.collate_pairs(tokenize(chosen), apart)
        return {**texts, "labels": torch.tensor(chosen["preference"].to_list())}

    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))
    loss = partial(batch_loss, batch_size=settings.batch_size)
    rows = training.micro_batches(*layout, passes, cost)
    trainer = training.train(model, trainer_arguments, rows, batch, loss, stage=stage, work=work)
    texts = tokenize(held)
    at_once = max(1, arguments.tokens_per_pass // settings.max_length)
    score = partial(reward_model.score, trainer.model, batch_size=at_once, device=device)
    rewards = distributed.over_ranks(texts, score) if texts else torch.empty(0)
    training.write(trainer, work, origin.manifest(inputs, counts), reward_model.evaluate(held, rewards.view(-1, 2)))


def pair_lengths(tokenize: Callable[[pl.DataFrame], list[list[int]]], records: pl.DataFrame) -> list[tuple[int, int]]:
    """Tokens of both texts of each pair.

    Each rank counts a share of the pairs.

    Args:
        tokenize: tokenises both texts of each record.
        records: N records.

    Returns:
        N pairs, equal on all ranks.
    """
    rank, world = distributed.rank(), distributed.world()
    slices = range(rank * COUNTED, len(records), world * COUNTED)
    mine: dict[int, list[tuple[int, int]]] = {}
    for start in script.progress(slices, total=len(slices), what=f"parts of {COUNTED} pairs counted"):
        texts = tokenize(records[start : start + COUNTED])
        mine[start] = [*zip(map(len, texts[::2]), map(len, texts[1::2]), strict=True)]
    found = {start: lengths for of_rank in distributed.gather(mine) for start, lengths in of_rank.items()}
    return [pair for start in sorted(found) for pair in found[start]]


def read_template(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template, checked for the slots that any reward model needs."""
    template = encoding.read_template(tokenizer, arguments.settings.template, arguments.scoring, "scoring.format")
    key = f"{arguments.stage}.template"
    templates.check_slots(template.text, arguments.settings.template, templates.PMP_SLOTS, key)
    return template


def check_slots(arguments: Arguments, template: str, records: pl.DataFrame) -> None:
    """Records with principles need a template with a slot for them, and vice versa."""
    has_slot = "Dimensions" in templates.slots(template)
    for row in records.filter((pl.col("definitions").list.len() > 0) != has_slot).iter_rows(named=True):
        raise UserError(
            f"record {row['record_id']} of {arguments.records} has {len(row['definitions'])} principles, but "
            f"{arguments.stage}.template {arguments.settings.template} has {'a' if has_slot else 'no'} slot "
            "{Dimensions}"
        )


def check_init(init: Path, lora: Lora) -> None:
    """Check that the reward model to start from is complete, and that its adapter matches the settings."""
    models.read_head(init)
    with reading(f"adapter {init}", "copy or build the reward model again"):
        adapter = PeftConfig.from_pretrained(str(init))
        adapter = LoraConfig(r=adapter.r, lora_alpha=adapter.lora_alpha)  # other kinds of adapter do not have these
    if (adapter.r, adapter.lora_alpha) != (lora.r, lora.alpha):
        raise UserError(
            f"{init} has r {adapter.r} and alpha {adapter.lora_alpha}, but the configuration has lora.r {lora.r} and "
            f"lora.alpha {lora.alpha}"
        )


def origin_of(arguments: Arguments) -> provenance.Origin:
    """The settings that affect the reward model."""
    return provenance.train_reward_model(
        arguments.records,
        arguments.init,
        stage=arguments.stage,
        settings=arguments.settings,
        model=arguments.model,
        tokenizer=arguments.tokenizer or arguments.model,
        lora=arguments.lora,
        scoring=arguments.scoring,
    )


def load_model(arguments: Arguments, device: torch.device) -> PeftModel:
    """The reward model to train."""
    if arguments.init:
        model = models.load_reward_model(arguments.model, arguments.init, device, trainable=True)
    else:
        model = models.new_reward_model(arguments.model, arguments.lora, device, arguments.settings.seed)
    return training.trainable_in_float32(model)


def batch_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, batch_size: int) -> torch.Tensor:
    """A pass's share of the mean loss of the global batch.

    The global batch size is the setting, because steps are complete. The Trainer's count is not used: for a causal
    language model it counts the labels of next tokens, one less per row.
    """
    return reward_model.pair_losses(outputs.logits.view(-1, 2), labels).sum() / batch_size


if __name__ == "__main__":
    script.run(main, Arguments)
