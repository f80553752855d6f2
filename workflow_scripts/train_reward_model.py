"""Train a reward model on preference records: its pre-training (PMP), and the principle-following stage.

Bradley-Terry loss on pairs, QLoRA, a linear head on the last token (paper section 3.3); see
`salmon/reward_model.py`. Runs on one process, or on several ranks, with or without DeepSpeed; the
result is that of the global batch, however it is spread. Interrupted, it resumes from its last checkpoint.
"""

import json
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from pydantic import Field, model_validator
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from salmon import (
    artifacts,
    checkpoints,
    distributed,
    encoding,
    models,
    optimization,
    provenance,
    reward_model,
    script,
    stopping,
    templates,
)
from salmon.border import read_json, reading
from salmon.config import Lora, Model, RewardModel, RewardTraining, Scoring
from salmon.encoding import Template
from salmon.errors import UserError
from salmon.models import check_context
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger("salmon.train_reward_model")


class Arguments(script.Arguments):
    """Train a reward model on preference records."""

    records: Path = Field(description="preference records (parquet)")
    output: Path = Field(description="folder of the reward model: adapter, head, metrics.json, manifest.json")
    init: Path | None = Field(None, description="reward model to start from; without it, a fresh adapter and head")
    model: Model = Field(description="section of the configuration")
    tokenizer: Model | None = Field(None, description="model whose tokenizer is used; without it, that of `model`")
    lora: Lora = Field(Lora(), description="section of the configuration")
    pmp: RewardTraining | None = Field(None, description="section of the configuration, for pre-training (PMP)")
    reward_model: RewardModel | None = Field(
        None, description="section of the configuration, for the principle-following stage"
    )
    scoring: Scoring = Field(Scoring(), description="section of the configuration")
    micro_batch_size: int = Field(2, ge=1, description="hardware: pairs per forward pass on each GPU")
    deepspeed: Path | None = Field(None, description="hardware: DeepSpeed configuration (JSON)")
    gradient_checkpointing: bool = Field(True, description="hardware: recompute activations to save memory")

    @model_validator(mode="after")
    def _one_stage(self) -> Self:
        if (self.pmp is None) == (self.reward_model is None):
            raise ValueError("give either --pmp or --reward-model, the settings of the training")
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


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Progress in our log, a stop where the loss is lost or on request, and a mark on checkpoints that are whole."""

    def __init__(self, stage: str, work: WorkFolder) -> None:
        self.stage, self.work = stage, work
        self.first_step = 0
        self.started = self.last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from where the run begins or resumes."""
        self.first_step = state.global_step
        self.started = self.last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """One line an interval: steps, rate, time left, loss, learning rate."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(f"the loss of step {state.global_step} is {logs['loss']}; lower {self.stage}.learning_rate")
        now = time.monotonic()
        if now - self.last >= script.INTERVAL or state.global_step == state.max_steps:
            line = tqdm.format_meter(
                state.global_step,
                state.max_steps,
                now - self.started,
                unit=" steps",
                initial=self.first_step,
                ncols=120,
                postfix=f"loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}",
            )
            log.info("%s", line)
            self.last = now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint and an end, where any rank was asked to stop and steps are left."""
        if stopping.stop_requested(args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint after the last rank has written its part."""
        checkpoints.seal(self.work, self.work.path / f"checkpoint-{state.global_step}")


def main(arguments: Arguments) -> None:
    """Read and split the records, train, evaluate, write the folder."""
    device = distributed.init()
    stopping.listen()
    if arguments.deepspeed:
        distributed.init_deepspeed(device)
    settings, stage = arguments.settings, arguments.stage
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    template = read_template(arguments, tokenizer)
    records, counts = reward_model.read_records(arguments.records)
    check_slots(arguments, template.text, records)
    train, held = reward_model.split(records, settings.eval_examples, settings.seed)
    lengths = train.select(
        length=sum(pl.col(name).str.len_bytes() for name in ("instruction", "input"))
        + pl.max_horizontal(pl.col(name).str.len_bytes() for name in ("output_1", "output_2"))
    )["length"].to_list()
    order = reward_model.training_order(lengths, settings.batch_size, settings.epochs, settings.seed)
    if not order or len(held) < settings.eval_examples:
        raise UserError(
            f"{arguments.records} has {len(records)} usable records, too few to hold out {settings.eval_examples} "
            f"({stage}.eval_examples) and train a batch of {settings.batch_size} ({stage}.batch_size) in "
            f"{settings.epochs:g} epochs ({stage}.epochs)"
        )
    counts |= {"trained_on": len(set(order)), "held_out": len(held), "steps": len(order) // settings.batch_size}
    counts["left_out_of_last_batch"] = len(train) - counts["trained_on"]

    if arguments.init:
        check_init(arguments.init, arguments.lora)
    work = WorkFolder(arguments.output)
    # ZeRO-3 shards a model while it is loaded, so its configuration (in here) comes before the model.
    training = training_arguments(arguments, work.path, counts["steps"], device)
    origin = origin_of(arguments)
    inputs = distributed.broadcast(origin.identify() if distributed.is_main() else None)
    if open_work(arguments, work, origin.fingerprint(inputs)):
        distributed.leave()
        return
    checkpoint = checkpoints.newest(work)
    model = load_model(arguments, device)
    check_context(model, settings.max_length, f"{stage}.max_length")

    def batch(indices: list[int]) -> dict[str, torch.Tensor]:
        chosen = train[indices]
        rows = reward_model.record_tokens(tokenizer, template, chosen, settings, stage)
        return {**reward_model.collate(rows), "labels": torch.tensor(chosen["preference"].to_list())}

    trainer = Trainer(
        model=model,
        args=training,
        data_collator=batch,
        train_dataset=order,
        compute_loss_func=partial(batch_loss, batch_size=settings.batch_size),
        callbacks=[Reporter(arguments.stage, work)],
    )
    trainer.remove_callback(PrinterCallback)
    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise stopping.Stopped(trainer.state.global_step)

    rows = reward_model.record_tokens(tokenizer, template, held, settings, stage)
    rewards = score_over_ranks(trainer.model, rows, 2 * arguments.micro_batch_size, device)
    # DeepSpeed shards or rounds what it trains.
    weights = optimization.full_weights(trainer.model) if trainer.is_deepspeed_enabled else None
    if distributed.is_main():
        metrics = {
            "evaluation": reward_model.evaluate(held, rewards.view(-1, 2)),
            "training": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        with work.finish(origin.manifest(inputs, counts)) as folder:
            trainer.model.save_pretrained(str(folder), state_dict=weights)
            artifacts.write_json(folder / "metrics.json", metrics)
        log.info("held out: %s", json.dumps(metrics["evaluation"]))
    distributed.barrier()
    distributed.leave()


def read_template(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template, with the slots that any reward model needs."""
    template = encoding.read_template(tokenizer, arguments.settings.template, arguments.scoring, "scoring.format")
    key = f"{arguments.stage}.template"
    templates.check_slots(template.text, arguments.settings.template, templates.PMP_SLOTS, key)
    return template


def check_slots(arguments: Arguments, template: str, records: pl.DataFrame) -> None:
    """Records with principles need a template with a place for them, and the other way round."""
    has_slot = "Dimensions" in templates.slots(template)
    for row in records.filter((pl.col("definitions").list.len() > 0) != has_slot).iter_rows(named=True):
        raise UserError(
            f"record {row['record_id']} of {arguments.records} has {len(row['definitions'])} principles, but "
            f"{arguments.stage}.template {arguments.settings.template} has {'a' if has_slot else 'no'} slot "
            "{Dimensions}"
        )


def check_init(init: Path, lora: Lora) -> None:
    """The reward model to start from is whole, and its adapter is as the settings say."""
    models.read_head(init)
    with reading(f"adapter {init}", "copy the reward model again, or let it be built again"):
        adapter = PeftConfig.from_pretrained(str(init))
        adapter = LoraConfig(r=adapter.r, lora_alpha=adapter.lora_alpha)  # which another kind of adapter has not
    if (adapter.r, adapter.lora_alpha) != (lora.r, lora.alpha):
        raise UserError(
            f"{init} has r {adapter.r} and alpha {adapter.lora_alpha}, but the configuration has lora.r {lora.r} and "
            f"lora.alpha {lora.alpha}"
        )


def origin_of(arguments: Arguments) -> provenance.Origin:
    """What decides the reward model."""
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


def open_work(arguments: Arguments, work: WorkFolder, fingerprint: str) -> bool:
    """Open the work folder, with the checkpoints of the same settings and inputs, if any; see `WorkFolder.open`."""
    # Other hardware may resume from a checkpoint, but for the shards of DeepSpeed.
    deepspeed = arguments.deepspeed
    layout = (
        json.dumps([read_json(deepspeed, "", "it has to be a DeepSpeed configuration in JSON"), distributed.world()])
        if deepspeed
        else ""
    )
    return work.open(fingerprint, layout)


def training_arguments(arguments: Arguments, folder: Path, steps: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments for `steps` steps of the global batch."""
    settings, world = arguments.settings, distributed.world()
    if settings.batch_size % (arguments.micro_batch_size * world):
        raise UserError(
            f"{arguments.stage}.batch_size {settings.batch_size} is not a multiple of micro_batch_size "
            f"{arguments.micro_batch_size} x {world} processes (on SLURM, site.yaml sets micro_batch_size as "
            "reward_model_micro_batch_size)"
        )
    paged = device.type == "cuda" and arguments.model.quantization == "nf4" and not arguments.deepspeed
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // (arguments.micro_batch_size * world),
        num_train_epochs=1,  # of the order, which holds the epochs of the settings
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="paged_adamw_32bit" if paged else "adamw_torch",
        bf16=arguments.model.dtype == "bfloat16",
        fp16=arguments.model.dtype == "float16" and device.type == "cuda",
        activation_checkpointing=arguments.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if arguments.gradient_checkpointing else None,
        deepspeed=str(arguments.deepspeed) if arguments.deepspeed else None,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=checkpoints.KEPT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    if world == 1:
        training._n_gpu = min(training.n_gpu, 1)  # one process is one GPU: never torch's DataParallel
    return training


def load_model(arguments: Arguments, device: torch.device) -> PeftModel:
    """The reward model to train, what is trained of it in float32: small steps vanish in bfloat16."""
    if arguments.init:
        model = models.load_reward_model(arguments.model, arguments.init, device, trainable=True)
    else:
        model = models.new_reward_model(arguments.model, arguments.lora, device, arguments.settings.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.config.use_cache = False
    return model


def batch_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, batch_size: int) -> torch.Tensor:
    """Share of a micro-batch in the mean loss of the global batch.

    Its size is the setting, since steps are whole. The Trainer's count is not used: for a causal language model it
    counts labels as those of next tokens, one less per row.
    """
    return reward_model.pair_losses(outputs.logits.view(-1, 2), labels).sum() / batch_size


def score_over_ranks(model: PeftModel, rows: list[list[int]], batch_size: int, device: torch.device) -> torch.Tensor:
    """`reward_model.score`, each rank taking its share; the same number of forward passes on all (for ZeRO-3)."""
    if not rows:
        return torch.empty(0)
    world = distributed.world()
    padded = rows + [rows[-1]] * (-len(rows) % world)
    mine = reward_model.score(model, padded[distributed.rank() :: world], batch_size, device)
    return torch.stack(distributed.gather(mine), dim=1).flatten()[: len(rows)]


if __name__ == "__main__":
    script.run(main, Arguments)
