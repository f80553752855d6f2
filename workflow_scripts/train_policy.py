"""Train the policy by PPO against the principle-following reward model (SALMON step 3).

Policy, reference, value and reward model share one base model. Each rollout is rewarded under its own principles, drawn
by weight and question type. The policy is an ordinary PEFT adapter folder, with its metrics next to it.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from salmon import (
    checked,
    distributed,
    likelihood,
    ppo,
    provenance,
    recompute,
    script,
    stopping,
    templates,
    vllm,
    vllm_server,
)
from salmon.config import Lora, Model, PolicyPrompt, Ppo, Scoring
from salmon.errors import UserError
from salmon.formats import QUESTION_TYPES
from salmon.optimization import Optimizer, ReplicatedOptimizer, ShardedOptimizer, buffer_bytes, read_deepspeed
from salmon.principles import WeightedPrinciple, read_weighted
from salmon.sampling import Ranks, Sampler, TransformersSampler
from salmon.shared_base import SharedBase, check_lengths
from salmon.tables import MEND, RL_PROMPTS
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger(__name__)


class Arguments(script.Arguments):
    """Train the policy by PPO against the principle-following reward model."""

    prompts: Path = Field(description="Parquet table of RL prompts")
    reward_model: Path = Field(description="folder of the reward model")
    output: Path = Field(description="folder of the policy: adapter, metrics.jsonl, tensorboard/")
    model: Model = Field(description="section of the configuration")
    lora: Lora = Field(description="section of the configuration")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    ppo: Ppo = Field(description="section of the configuration")
    scoring: Scoring = Field(Scoring(), description="section of the configuration")
    sampling_batch_size: int = Field(32, ge=1, description="hardware: rollouts sampled at once on a GPU")
    tokens_per_pass: int = Field(
        2048,
        ge=1,
        description="hardware: maximum tokens of a pass with gradients on a GPU, padding included; at least one text",
    )
    tokens_per_forward_pass: int = Field(8192, ge=1, description="hardware: the same for a pass without gradients")
    engine_base: Path | None = Field(
        None, description="folder of dequantize_base; the engine serves it in place of 4-bit weights"
    )
    engine: vllm_server.Hardware = Field(
        vllm_server.Hardware(memory=0.4), description="hardware: where the engine runs, if there is one"
    )
    deepspeed: Path | None = Field(None, description="hardware: DeepSpeed configuration, ZeRO-2 or ZeRO-3")
    gradient_checkpointing: recompute.Setting = Field(
        "auto", description="hardware: recompute activations to save memory; auto: if they do not fit"
    )


def main(args: Arguments) -> None:
    """Train, or resume training, and write the policy."""
    device = distributed.init()
    stopping.listen()
    tokenizer = load_tokenizer(args.model)
    prompts, counts = read_prompts(args, tokenizer)
    principles = read_principles(args)
    origin = provenance.train_policy(
        args.prompts,
        args.reward_model,
        model=args.model,
        lora=args.lora,
        policy_prompt=args.policy_prompt,
        ppo=args.ppo,
        scoring=args.scoring,
    )
    inputs = origin.identify()
    packages = vllm_server.packages(args.engine) if args.ppo.engine == "vllm" else {}
    counts["steps"] = steps = ppo.total_steps(len(prompts), args.ppo)
    if max(ppo.learning_rate(step, steps, args.ppo) for step in range(steps)) == 0:
        raise UserError(
            f"the learning rate is 0 in all PPO steps ({steps}), because of the warm-up: lower ppo.warmup_steps"
        )
    if steps <= args.ppo.warmup_steps:
        log.warning("the warm-up (ppo.warmup_steps %d) does not end within %d steps", args.ppo.warmup_steps, steps)
    log.info("%d prompts, %d steps of %d rollouts", len(prompts), steps, args.ppo.rollout_batch_size)

    layout = ""  # other hardware may resume from a checkpoint, except for DeepSpeed's shards
    if args.deepspeed:
        sharding, _keep = prepare_deepspeed(args, device)  # ZeRO-3 shards a model while it is loaded
        layout = json.dumps([sharding, distributed.world()])
    work = WorkFolder(args.output)
    if work.open(origin.fingerprint(inputs, packages), layout):
        distributed.leave()
        return
    with open_engine(args) as engine:  # takes its memory first
        shared = SharedBase(args.model, args.lora, args.reward_model, device, seed=args.ppo.seed)
        check_lengths(shared, tokenizer, args.ppo, args.policy_prompt)

        if recomputes(args, shared):
            shared.lm.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer: Optimizer = (
            ShardedOptimizer(shared, args.ppo.max_grad_norm, sharding)
            if args.deepspeed
            else ReplicatedOptimizer(shared, args.ppo.max_grad_norm)
        )
        sampler = make_sampler(args, engine, tokenizer, shared, optimizer, work)
        ppo.train(
            shared,
            optimizer,
            sampler,
            tokenizer,
            prompts,
            principles,
            args.ppo,
            args.policy_prompt,
            work,
            scoring=args.scoring,
            tokens_per_pass=args.tokens_per_pass,
            tokens_per_forward_pass=args.tokens_per_forward_pass,
        )
        if isinstance(sampler, vllm.VllmSampler):
            sampler.close()
    weights = optimizer.trained_weights()
    if distributed.is_main():
        with work.finish(origin.manifest(inputs, counts, packages)) as folder:
            shared.save_policy(folder, weights)
            shutil.copy(work.path / "metrics.jsonl", folder)
            shutil.copytree(work.path / "tensorboard", folder / "tensorboard")
    distributed.barrier()
    distributed.leave()


def recomputes(args: Arguments, shared: SharedBase) -> bool:
    """Whether to recompute activations in the backward pass."""

    def forward(tokens: torch.Tensor) -> None:
        with shared.use("value"):
            shared(head="value", input_ids=tokens)

    return recompute.is_wanted(
        args.gradient_checkpointing,
        forward,
        shared.parameters(),
        longest=args.ppo.query_length + args.ppo.response_length,
        tokens=args.tokens_per_pass,
        device=shared.device,
        besides=likelihood.PER_LOGIT * likelihood.LOGITS + (buffer_bytes(2) if args.deepspeed else 0),
        divided=args.deepspeed is not None,
        sharded=is_deepspeed_zero3_enabled(),
    )


@contextmanager
def open_engine(args: Arguments) -> Iterator[vllm_server.Engine | None]:
    """The engine that samples the rollouts, unless our own loop does."""
    if args.ppo.engine == "transformers":
        yield None
        return
    longest = args.ppo.query_length + args.ppo.response_length
    model = vllm_server.served(args.model, args.engine_base)
    rank = vllm.adapter_rank(model, args.lora)
    with vllm_server.start(
        args.engine, model, longest=longest, key="ppo.query_length + ppo.response_length", rank=rank
    ) as engine:
        yield engine


def make_sampler(
    args: Arguments,
    engine: vllm_server.Engine | None,
    tokenizer: PreTrainedTokenizerBase,
    shared: SharedBase,
    optimizer: Optimizer,
    work: WorkFolder,
) -> Sampler:
    """The sampler of the rollouts; `ppo.train` gives it the policy of each step."""
    if engine is None:
        ranks: Ranks = "lockstep" if optimizer.gathers_weights else "apart"
        return TransformersSampler(tokenizer, shared.device, batch_size=args.sampling_batch_size, ranks=ranks)

    def export(folder: Path) -> None:
        weights = optimizer.trained_weights()
        if distributed.is_main():
            shared.save_policy(folder, weights)

    ends = vllm.end_tokens(args.model, tokenizer)
    return vllm.VllmSampler(engine, tokenizer, ends, folder=work.path / "engine", export=export)


def prepare_deepspeed(args: Arguments, device: torch.device) -> tuple[dict[str, Any], object]:
    """DeepSpeed's configuration, and the object through which transformers knows it while the object lives."""
    from transformers.integrations import HfDeepSpeedConfig

    assert args.deepspeed is not None
    config = read_deepspeed(args.deepspeed)
    if args.ppo.rollout_batch_size % distributed.world():
        raise UserError(
            f"ppo.rollout_batch_size {args.ppo.rollout_batch_size} is not a multiple of the {distributed.world()} "
            "processes, which DeepSpeed needs here"
        )
    distributed.init_deepspeed(device)
    log.info("ZeRO-%d on %d ranks", config["zero_optimization"]["stage"], distributed.world())
    return config, HfDeepSpeedConfig(config)


def read_prompts(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> tuple[pl.DataFrame, dict[str, int]]:
    """The usable prompts, and the numbers of prompts in the table, used and left out."""
    columns = ("prompt_id", "instruction", "input", "question_type", "length_bonus")
    table = checked.read(args.prompts, RL_PROMPTS, columns).collect()
    if unknown := set(table["question_type"]) - set(QUESTION_TYPES):
        raise UserError(
            f"{args.prompts} has {len(unknown)} unknown question types; known are {', '.join(QUESTION_TYPES)}: {MEND}"
        )
    used = ppo.within_query_length(table, tokenizer, args.ppo, args.policy_prompt)
    left_out = len(table) - len(used)
    if left_out:
        log.warning(
            "leaving out %d prompts of more than %d tokens with their template (ppo.query_length)",
            left_out,
            args.ppo.query_length,
        )
    return used, {"rows": len(table), "prompts": len(used), "longer_than_query_length": left_out}


def read_principles(args: Arguments) -> list[WeightedPrinciple]:
    """The principles to draw from. Also checks the template that shows them."""
    template = args.ppo.template
    templates.check_slots(templates.read(template), template, templates.REWARD_SLOTS, "ppo.template")
    principles = read_weighted(args.ppo.principles)
    drawable = sum(principle.weight > 0 for principle in principles)
    if drawable < args.ppo.principles_per_rollout:
        raise UserError(
            f"ppo.principles_per_rollout is {args.ppo.principles_per_rollout}, but {args.ppo.principles} has "
            f"{drawable} principles with a weight above 0"
        )
    return principles


if __name__ == "__main__":
    script.run(main, Arguments)
