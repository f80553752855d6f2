"""RL against the principle-following reward model (paper section 3.4): rollouts, rewards, updates, checkpoints.

`train` is the loop and reads from top to bottom; the functions above it are its parts in the order of their use.
The rollouts of a step are dealt to the ranks by the length of their prompts. Draws are keyed by (seed, step, place in
the step), minibatches are drawn over all ranks and losses divided by totals over all ranks, so that the number of ranks
changes nothing but the rounding.
"""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from salmon import checkpoints, distributed, ppo_math, stopping
from salmon.artifacts import atomic
from salmon.batching import batches, dealt
from salmon.config import PolicyPrompt, Ppo, Scoring
from salmon.encoding import (
    begins_thinking,
    check_query_length,
    encode_prompt,
    prompt_text,
    read_preamble,
    read_template,
    tokenize,
)
from salmon.errors import UserError
from salmon.optimization import Optimizer
from salmon.principles import WeightedPrinciple, draw_principles
from salmon.randomness import rng, seed_of
from salmon.reward_model import reward_text_tokens
from salmon.sampling import Sampler, tokens_of_beginning, without_thinking
from salmon.shared_base import Role, SharedBase
from salmon.text import cut_at_markers, join_instruction
from salmon.work import WorkFolder

log = logging.getLogger(__name__)

_UNSET = torch.empty(0)
DRIFT = 0.1  # of the mean ratio of trainer and engine from 1; by rounding alone it is far less
DOCUMENT = Scoring()


@dataclass(slots=True)
class Rollout:
    """One prompt, the response that the policy sampled, and what was measured on it.

    The policy is trained on all of `response`; the reward model reads `text`, which has no thinking. Both end
    before the first of the cut markers.

    Tensors are float32 [R] on the CPU, R the tokens of the response. `sampled` are the log probabilities that an engine
    gave to the tokens it drew, empty where it does not tell; `weights` are those of the policy's loss.
    """

    place: int
    query: list[int]
    instruction: str
    question_type: str
    length_bonus: float
    response: list[int]
    text: str
    finished: bool
    thinking_cut: bool = False
    marker_cut: bool = False
    score: float = 0.0
    reward: float = 0.0
    logprobs: torch.Tensor = _UNSET
    reference: torch.Tensor = _UNSET
    values: torch.Tensor = _UNSET
    entropy: torch.Tensor = _UNSET
    advantages: torch.Tensor = _UNSET
    returns: torch.Tensor = _UNSET
    sampled: torch.Tensor = _UNSET
    weights: torch.Tensor = _UNSET

    def __post_init__(self) -> None:
        """All tokens weigh alike, unless an engine has drawn them (`correct_for_engine`)."""
        self.weights = torch.ones(len(self.response))


def within_query_length(
    prompts: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: Ppo, policy_prompt: PolicyPrompt
) -> pl.DataFrame:
    """The prompts of at most `query_length` tokens as the policy reads them, template included.

    Longer ones are left out, not cut: of half an instruction nobody knows what answers it.

    Raises:
        UserError: where the policy's template alone has as many tokens.
    """
    check_query_length(tokenizer, settings, policy_prompt)
    preamble = read_preamble(policy_prompt)
    fits: list[bool] = []
    for part in prompts.iter_slices(4096):
        rows = part.select("instruction", "input").iter_rows()
        texts = [prompt_text(tokenizer, join_instruction(*row), policy_prompt, preamble) for row in rows]
        encoded = tokenize(tokenizer, texts, add_special_tokens=not policy_prompt.is_chat)
        fits += [len(each) <= settings.query_length for each in encoded]
    return prompts.filter(pl.Series(fits, dtype=pl.Boolean))


def total_steps(prompts: int, settings: Ppo) -> int:
    """PPO steps of the whole run.

    Raises:
        UserError: where the prompts do not fill a single step.
    """
    steps = settings.epochs * prompts // settings.rollout_batch_size
    if steps == 0:
        raise UserError(
            f"{prompts} prompts in {settings.epochs} epochs do not fill one step of {settings.rollout_batch_size} "
            "rollouts: lower ppo.rollout_batch_size or add prompts"
        )
    return min(steps, settings.max_steps or steps)


def rows_of_step(step: int, prompts: int, settings: Ppo) -> list[int]:
    """Rows of the prompt table that step `step` (from 0) uses: every epoch in an order of its own."""
    first = step * settings.rollout_batch_size
    places = range(first, first + settings.rollout_batch_size)
    orders = {
        epoch: rng("ppo-order", settings.seed, epoch).permutation(prompts)
        for epoch in {place // prompts for place in places}
    }
    return [int(orders[place // prompts][place % prompts]) for place in places]


def sample(
    shared: SharedBase,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pl.DataFrame,
    step: int,
    settings: Ppo,
    policy_prompt: PolicyPrompt,
) -> list[Rollout]:
    """This rank's rollouts of a step, sampled from the policy as it is now."""
    preamble = read_preamble(policy_prompt)
    records = prompts[rows_of_step(step, len(prompts), settings)].to_dicts()
    instructions = [join_instruction(record["instruction"], record["input"]) for record in records]
    queries = [encode_prompt(tokenizer, instruction, policy_prompt, preamble) for instruction in instructions]
    places = dealt([len(query) for query in queries], distributed.rank(), distributed.world())
    begun = begins_thinking(tokenizer, policy_prompt, preamble)
    shared.eval()
    with shared.use("policy") as policy:
        sampler.sync(policy)
        generations = sampler.sample(
            [queries[place] for place in places],
            [seed_of("ppo-sample", settings.seed, step, place) for place in places],
            max_new_tokens=[settings.response_length] * len(places),
            temperature=settings.temperature,
            stop=policy_prompt.stop,
        )
    rollouts = []
    for place, generation in zip(places, generations, strict=True):
        record = records[place]
        whole, thinking_cut = without_thinking(tokenizer, generation, policy_prompt.thinking, begun=begun)
        text, response = cut_at_markers(whole, settings.cut_markers), generation.tokens
        marker_cut = text != whole
        if marker_cut:  # what follows is lost, and with it the stop
            response = tokens_of_beginning(tokenizer, generation, text, policy_prompt.thinking, begun=begun)
        rollouts.append(
            Rollout(
                place=place,
                query=queries[place],
                instruction=instructions[place],
                question_type=record["question_type"],
                length_bonus=record["length_bonus"],
                response=response,
                text=text,
                finished=generation.finish_reason != "length" and not marker_cut,
                thinking_cut=thinking_cut,
                marker_cut=marker_cut,
                sampled=torch.tensor((generation.logprobs or [])[: len(response)]),
            )
        )
    return rollouts


@torch.no_grad()
def measure(shared: SharedBase, rollouts: Sequence[Rollout], temperature: float, batch_size: int) -> None:
    """Log probabilities under policy and reference, and values: one forward pass a model and rollout."""
    shared.eval()
    sizes = [len(rollout.query) + len(rollout.response) for rollout in rollouts]
    role: Role
    for role in ("policy", "reference", "value"):
        with shared.use(role):
            for batch in batches(sizes, batch_size):
                chosen = [rollouts[index] for index in batch]
                queries, responses = [r.query for r in chosen], [r.response for r in chosen]
                if role == "value":
                    values = shared.values(queries, responses).cpu()
                    for rollout, value in zip(chosen, values, strict=True):
                        rollout.values = value[: len(rollout.response)]
                    continue
                logprobs, entropies = (tensor.cpu() for tensor in shared.logprobs(queries, responses, temperature))
                for rollout, logprob, entropy in zip(chosen, logprobs, entropies, strict=True):
                    length = len(rollout.response)
                    if role == "policy":
                        rollout.logprobs, rollout.entropy = logprob[:length], entropy[:length]
                    else:
                        rollout.reference = logprob[:length]


def correct_for_engine(rollouts: Sequence[Rollout], settings: Ppo) -> dict[str, float]:
    """Weights of the policy's loss, which correct for an engine that computes otherwise than the trainer.

    Returns:
        Over the tokens of all ranks: mean and largest ratio of trainer and engine, and the share above the cap, where a
        drift between the two shows; nothing where our own loop has sampled, which is the trainer.
    """
    if settings.engine == "transformers":
        return {}
    sums, largest = torch.zeros(3, dtype=torch.float64), 0.0
    for rollout in rollouts:
        ratios = ppo_math.rollout_ratios(rollout.logprobs, rollout.sampled, torch.ones(len(rollout.response)))
        above = ratios > settings.rollout_correction_cap
        sums += torch.tensor([ratios.sum(), above.sum(), len(ratios)])
        largest = max(largest, ratios.max().item())
        if settings.rollout_correction == "truncated":
            rollout.weights = ratios.clamp(max=settings.rollout_correction_cap)
    total, above, tokens = distributed.sum_over_ranks(sums).tolist()
    if abs(total / tokens - 1) > DRIFT:
        log.warning(
            "the engine computes otherwise than the trainer: its tokens are %.2f times as probable to the trainer. "
            "Look for another version of the weights, or another dtype",
            total / tokens,
        )
    return {
        "engine_ratio": total / tokens,
        "engine_ratio_largest": max(distributed.gather(largest)),
        "engine_ratio_capped": above / tokens,
    }


@torch.no_grad()
def score(
    shared: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Rollout],
    principles: Sequence[WeightedPrinciple],
    step: int,
    settings: Ppo,
    batch_size: int,
    scoring: Scoring = DOCUMENT,
) -> None:
    """The reward model's scores under principles drawn for each rollout, and the shaped rewards of the responses."""
    if not rollouts:
        return
    template = read_template(tokenizer, settings.template, scoring, "scoring.format")
    drawn = [
        draw_principles(
            principles,
            rollout.question_type,
            settings,
            rng("ppo-principles", settings.seed, step, rollout.place),
        )
        for rollout in rollouts
    ]
    texts = reward_text_tokens(
        tokenizer,
        template,
        [rollout.instruction for rollout in rollouts],
        [rollout.text for rollout in rollouts],
        [[principle.definition for principle in chosen] for chosen in drawn],
        query_length=settings.reward_query_length,
        response_length=settings.reward_response_length,
        max_length=settings.reward_max_length,
        keys="ppo.reward_",
    )
    shared.eval()
    with shared.use("reward"):
        for batch in batches([len(text) for text in texts], batch_size):
            for index, value in zip(batch, shared.rewards([texts[index] for index in batch]).tolist(), strict=True):
                rollouts[index].score = value
    rewards = ppo_math.sequence_rewards(
        torch.tensor([rollout.score for rollout in rollouts]),
        torch.tensor([rollout.finished for rollout in rollouts]),
        torch.tensor([len(rollout.response) for rollout in rollouts]),
        torch.tensor([rollout.length_bonus for rollout in rollouts]),
        max_length=settings.response_length,
        stop_penalty=settings.stop_penalty,
        length_reward=settings.length_reward,
        length_reward_cap=settings.length_reward_cap,
    )
    for rollout, reward in zip(rollouts, rewards.tolist(), strict=True):
        rollout.reward = reward


def estimate_advantages(rollouts: Sequence[Rollout], settings: Ppo) -> None:
    """Advantages, whitened over all rollouts of all ranks, and returns."""
    mask = _pad([torch.ones(len(rollout.response)) for rollout in rollouts])
    values = _pad([rollout.values for rollout in rollouts])
    kl = ppo_math.kl_estimate(
        _pad([rollout.logprobs for rollout in rollouts]),
        _pad([rollout.reference for rollout in rollouts]),
        settings.kl_estimator,
    )
    rewards = ppo_math.token_rewards(
        torch.tensor([rollout.reward for rollout in rollouts]), kl, mask, settings.kl_coefficient
    )
    advantages, returns = ppo_math.advantages_and_returns(rewards, values, mask, settings.gamma, settings.lam)
    if settings.whiten_advantages:
        advantages = ppo_math.whiten(advantages, mask)
    for rollout, advantage, value in zip(rollouts, advantages, returns, strict=True):
        rollout.advantages = advantage[: len(rollout.response)]
        rollout.returns = value[: len(rollout.response)]


def accumulate_gradients(
    shared: SharedBase,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    total: float,
    settings: Ppo,
    micro_batch_size: int,
    *,
    min_passes: int = 0,
    filler: Rollout | None = None,
) -> dict[str, float]:
    """Add the gradients of one minibatch's policy and value losses; this rank's share of it.

    Args:
        rollouts: those of the minibatch that this rank holds; may be none.
        total: response tokens of the minibatch over all ranks.
        min_passes: at least so many micro-batches, the last ones of `filler` alone and without weight.
        filler: any rollout.

    Returns:
        Sums over this rank's tokens, divided by `total`.
    """
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approximate_kl"), 0.0)
    sizes = [len(rollout.query) + len(rollout.response) for rollout in rollouts]
    parts = [(1.0, [rollouts[index] for index in batch]) for batch in batches(sizes, micro_batch_size)]
    parts += [(0.0, [filler])] * (min_passes - len(parts)) if filler else []
    for weight, chosen in parts:
        queries, responses = [r.query for r in chosen], [r.response for r in chosen]
        mask = _pad([torch.full((len(response),), weight) for response in responses]).to(shared.device)
        old, advantages, old_values, returns, weights = (
            _pad([getattr(r, name) for r in chosen]).to(shared.device)
            for name in ("logprobs", "advantages", "values", "returns", "weights")
        )
        with shared.use("policy"):
            logprobs, _ = shared.logprobs(queries, responses, settings.temperature)
            policy_loss, clipped = ppo_math.policy_loss(logprobs, old, advantages, mask, settings.clip, total, weights)
            optimizer.backward(policy_loss)
        with shared.use("value"):
            values = shared.values(queries, responses)
            value_loss = ppo_math.value_loss(values, old_values, returns, mask, settings.value_clip, total)
            optimizer.backward(settings.value_coefficient * value_loss)
        sums["policy_loss"] += policy_loss.item()
        sums["value_loss"] += value_loss.item()
        sums["clip_fraction"] += clipped.item() / total
        moved = ppo_math.kl_estimate(old, logprobs.detach(), "k1")
        sums["approximate_kl"] += (moved * mask).sum().item() / total
    return sums


def update(
    shared: SharedBase,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    step: int,
    settings: Ppo,
    micro_batch_size: int,
    rate: float,
) -> dict[str, float]:
    """All inner epochs over the rollouts of a step; returns means over its optimiser steps."""
    held = distributed.gather([(rollout.place, len(rollout.response)) for rollout in rollouts])  # by rank
    lengths = {place: length for of_rank in held for place, length in of_rank}
    mine = {rollout.place: rollout for rollout in rollouts}
    history: list[dict[str, float]] = []
    shared.train()
    for epoch in range(settings.inner_epochs):
        order = rng("ppo-minibatches", settings.seed, step, epoch).permutation(len(lengths))
        for start in range(0, len(order), settings.minibatch_size):
            places = {int(place) for place in order[start : start + settings.minibatch_size]}
            total = float(sum(lengths[place] for place in places))
            min_passes = 0
            if optimizer.lockstep:
                most = max(sum(place in places for place, _ in of_rank) for of_rank in held)
                min_passes = math.ceil(most / micro_batch_size)
            sums = accumulate_gradients(
                shared,
                optimizer,
                [rollout for place, rollout in mine.items() if place in places],
                total,
                settings,
                micro_batch_size,
                min_passes=min_passes,
                filler=rollouts[0] if rollouts else None,
            )
            norm = optimizer.step(rate)
            if not math.isfinite(norm):
                raise UserError(f"step {step + 1}: the gradient is not finite; lower ppo.learning_rate or use bfloat16")
            joined = distributed.sum_over_ranks(torch.tensor(list(sums.values()), device=shared.device).double())
            history.append({**dict(zip(sums, joined.tolist(), strict=True)), "gradient_norm": norm})
    shared.eval()
    return {name: float(np.mean([entry[name] for entry in history])) for name in history[0]}


def summarize(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the rollouts of all ranks; those per token are weighted by tokens."""
    per_rollout = {
        "score": [r.score for r in rollouts],
        "reward": [r.reward for r in rollouts],
        "response_tokens": [float(len(r.response)) for r in rollouts],
        "finished": [float(r.finished) for r in rollouts],
        "thinking_cut": [float(r.thinking_cut) for r in rollouts],
        "marker_cut": [float(r.marker_cut) for r in rollouts],
        "kl_sequence": [float((r.logprobs - r.reference).sum()) for r in rollouts],
    }
    per_token = {
        "kl_token": [float((r.logprobs - r.reference).sum()) for r in rollouts],
        "entropy": [float(r.entropy.sum()) for r in rollouts],
        "returns": [float(r.returns.sum()) for r in rollouts],
        "value_error": [float(((r.values - r.returns) ** 2).sum()) for r in rollouts],
    }
    sums = [sum(values) for values in (*per_rollout.values(), *per_token.values())]
    counts = [float(len(rollouts)), float(sum(len(r.response) for r in rollouts))]
    *sums, rows, tokens = distributed.sum_over_ranks(torch.tensor([*sums, *counts], dtype=torch.float64)).tolist()
    divisors = [rows] * len(per_rollout) + [tokens] * len(per_token)
    return {name: s / d for name, s, d in zip((*per_rollout, *per_token), sums, divisors, strict=True)}


def learning_rate(step: int, steps: int, settings: Ppo) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine to 0; constant over one PPO step (from 0).

    As transformers' schedule, and so the reward model's, it counts from 0: the rate of the first step is 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def save_checkpoint(work: WorkFolder, optimizer: Optimizer, step: int) -> None:
    """Write the state after `step` steps, whole or not at all, and delete all but the newest checkpoints."""
    folder = checkpoints.new(work, step)
    optimizer.save(folder)
    checkpoints.seal(work, folder)


def load_checkpoint(work: WorkFolder, optimizer: Optimizer) -> int:
    """Continue from the newest checkpoint; returns the number of steps done, 0 where there is none."""
    newest = checkpoints.newest(work)
    if newest is None:
        return 0
    optimizer.load(newest)
    return checkpoints.step_of(newest)


class Metrics:
    """Metrics of every step as JSON lines and for TensorBoard, in the work folder; one rank writes."""

    def __init__(self, work: WorkFolder, done: int) -> None:
        self.work, folder = work, work.path
        self.file = folder / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        if distributed.is_main():
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            if len(lines) < done:
                raise UserError(f"{self.file} has {len(lines)} of {done} lines; delete {folder} to start anew")
            with atomic(self.file) as temporary:  # steps after the checkpoint are done once more
                temporary.write_text("".join(f"{line}\n" for line in lines[:done]))
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Write one step's values (steps count from 1)."""
        if self.board is None:
            return
        self.work.check()
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as what a checkpoint holds
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()


def train(
    shared: SharedBase,
    optimizer: Optimizer,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pl.DataFrame,
    principles: Sequence[WeightedPrinciple],
    settings: Ppo,
    policy_prompt: PolicyPrompt,
    work: WorkFolder,
    *,
    scoring: Scoring = DOCUMENT,
    scoring_batch_size: int,
    micro_batch_size: int,
) -> None:
    """Train the policy in `shared`, continuing from `work` and leaving checkpoints and metrics there.

    Args:
        shared: policy, reference, value and reward model.
        optimizer: of what `shared` trains.
        sampler: of rollouts; it is given the policy anew before every step.
        tokenizer: of all models.
        prompts: prompt_id, instruction, input, question_type, length_bonus.
        principles: to draw from, with their weights.
        work: opened with the fingerprint of this run.
        scoring: how the reward model reads its texts.
        scoring_batch_size: rollouts scored at once on a rank (hardware).
        micro_batch_size: rollouts of which all logits are held at once on a rank (hardware).

    Raises:
        Stopped: where SIGTERM asked for it; the checkpoint is written.
    """
    done = load_checkpoint(work, optimizer)
    metrics = Metrics(work, done)
    steps = total_steps(len(prompts), settings)
    began = time.monotonic()
    for step in range(done, steps):
        started = time.monotonic()
        # 1. Sample responses from the policy.
        rollouts = sample(shared, sampler, tokenizer, prompts, step, settings, policy_prompt)
        sampled = time.monotonic()
        # 2. Measure them: log probabilities of policy and reference, values; and how far an engine is from that.
        measure(shared, rollouts, settings.temperature, micro_batch_size)
        drift = correct_for_engine(rollouts, settings)
        # 3. Score them with the reward model, each under its own principles; shape the rewards.
        score(shared, tokenizer, rollouts, principles, step, settings, scoring_batch_size, scoring)
        # 4. Advantages and returns.
        estimate_advantages(rollouts, settings)
        measured = time.monotonic()
        # 5. Improve policy and value model.
        rate = learning_rate(step, steps, settings)
        losses = update(shared, optimizer, rollouts, step, settings, micro_batch_size, rate)
        # 6. Report, and keep a checkpoint.
        now = time.monotonic()
        values = {
            **summarize(rollouts),
            **losses,
            **drift,
            "learning_rate": rate,
            "seconds_sampling": sampled - started,
            "seconds_measuring": measured - sampled,
            "seconds_updating": now - measured,
        }
        metrics.add(step + 1, values)
        left = (now - began) / (step + 1 - done) * (steps - step - 1)
        log.info(
            "step %d/%d: score %.3f, reward %.3f, KL %.3f, %.0f tokens, %.0f %% finished; %.1f s, %.0f s left",
            step + 1,
            steps,
            values["score"],
            values["reward"],
            values["kl_sequence"],
            values["response_tokens"],
            100 * values["finished"],
            now - started,
            left,
        )
        stop = stopping.stop_requested(shared.device) and step + 1 < steps
        if stop or (step + 1) % settings.save_steps == 0 or step + 1 == steps:
            save_checkpoint(work, optimizer, step + 1)
        if stop:
            raise stopping.Stopped(step + 1)


def _pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths as [B, R], zeros on the right; [0, 1] where a rank holds no row."""
    return pad_sequence(list(rows), batch_first=True) if rows else torch.zeros(0, 1)
