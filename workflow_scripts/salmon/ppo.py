"""RL against the principle-following reward model (paper section 3.4): rollouts, rewards, updates, checkpoints.

`train` is the loop and reads from top to bottom; the functions above it are its parts in the order of their use. Every
rank holds all rollouts of a step, which are small, and computes its part of each pass of a model; the parts of one pass
cost about the same. Draws are keyed by (seed, step, index in the step), and losses are divided by totals over all
ranks. Therefore the number of ranks and the tokens per pass change only the rounding.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
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
from salmon.batching import dealt, passes
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

_MEASURED = ("logprobs", "reference", "values", "entropy")
_UNSET = torch.empty(0)
DRIFT = 0.1  # deviation from 1 of the mean ratio of trainer and engine; rounding alone gives far less
DOCUMENT = Scoring()


@dataclass(slots=True)
class Rollout:
    """One prompt, the response that the policy sampled, and its measurements.

    The policy is trained on all of `response`; the reward model reads `text`, which has no thinking. Both end before
    the first cut marker.

    Tensors are float32 [R] on the CPU, R the tokens of the response. `sampled` are the engine's log probabilities of
    the tokens it drew, empty if it does not return them; `weights` are those of the policy's loss.
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
        """All tokens have equal weights, unless an engine has drawn them (`correct_for_engine`)."""
        self.weights = torch.ones(len(self.response))


def within_query_length(
    prompts: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: Ppo, policy_prompt: PolicyPrompt
) -> pl.DataFrame:
    """The prompts with at most `query_length` tokens, template included.

    Longer ones are left out, not cut: half an instruction may have no sensible answer.

    Raises:
        UserError: if the policy's template alone has that many tokens.
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
    """Number of PPO steps of the whole run.

    Raises:
        UserError: if the prompts do not fill a single step.
    """
    steps = settings.epochs * prompts // settings.rollout_batch_size
    if steps == 0:
        raise UserError(
            f"{prompts} prompts in {settings.epochs} epochs do not fill one step of {settings.rollout_batch_size} "
            "rollouts: lower ppo.rollout_batch_size or add prompts"
        )
    return min(steps, settings.max_steps or steps)


def rows_of_step(step: int, prompts: int, settings: Ppo) -> list[int]:
    """Rows of the prompt table that step `step` (from 0) uses: every epoch has a different order."""
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
    """The rollouts of a step, sampled from the present policy, each rank its share; in the order of their indices.

    Prompts are divided among the ranks by length.
    """
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
        if marker_cut:  # the rest is dropped, including the stop
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
    return sorted((each for of_rank in distributed.gather(rollouts) for each in of_rank), key=lambda each: each.place)


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one rank in one pass of a model."""

    rollouts: list[Rollout]
    real: bool
    """False if this rank has nothing to do and computes the shortest rollout, because DeepSpeed waits for all ranks."""
    most: int
    """Response tokens of the rank that computes most in this pass."""

    @property
    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Queries and responses."""
        return [rollout.query for rollout in self.rollouts], [rollout.response for rollout in self.rollouts]


def parts(rollouts: Sequence[Rollout], lengths: Sequence[int], budget: int) -> list[Part]:
    """This rank's part of every pass over rollouts; every rank has the same number of parts.

    Args:
        rollouts: the rollouts, equal on all ranks.
        lengths: number of tokens that the model reads of each.
        budget: maximum tokens of a part, padding included (`batching.passes`).
    """
    found = []
    shortest = min(range(len(rollouts)), key=lengths.__getitem__, default=0)
    for by_rank in passes(lengths, budget, distributed.world()):
        computed = [part or [shortest] for part in by_rank]
        most = max(sum(len(rollouts[index].response) for index in part) for part in computed)
        rank = distributed.rank()
        found.append(Part([rollouts[index] for index in computed[rank]], bool(by_rank[rank]), most))
    return found


def spread(rollouts: Sequence[Rollout], mine: Iterable[Rollout], names: Sequence[str]) -> None:
    """Share each rank's results for its rollouts with all ranks."""
    found = [(rollout.place, [getattr(rollout, name) for name in names]) for rollout in mine]
    by_place = {rollout.place: rollout for rollout in rollouts}
    for of_rank in distributed.gather(found):
        for place, values in of_rank:
            for name, value in zip(names, values, strict=True):
                setattr(by_place[place], name, value)


@torch.no_grad()
def measure(shared: SharedBase, rollouts: Sequence[Rollout], temperature: float, budget: int) -> None:
    """Log probabilities under policy and reference, and values: one forward pass per model and rollout.

    Args:
        shared: the models.
        rollouts: the rollouts, equal on all ranks.
        temperature: sampling temperature.
        budget: maximum tokens of a pass on a rank.
    """
    shared.eval()
    share = parts(rollouts, [len(rollout.query) + len(rollout.response) for rollout in rollouts], budget)
    role: Role
    for role in ("policy", "reference", "value"):
        with shared.use(role):
            for part in share:
                if role == "value":
                    found = {"values": shared.values(*part.texts)}
                else:
                    logprobs, entropy = shared.logprobs(
                        *part.texts, temperature, most=part.most, with_entropy=role == "policy"
                    )
                    found = {"reference": logprobs} if entropy is None else {"logprobs": logprobs, "entropy": entropy}
                for name, rows in found.items():
                    for rollout, row in zip(part.rollouts, rows.cpu(), strict=True):
                        setattr(rollout, name, row[: len(rollout.response)].clone())
    spread(rollouts, (rollout for part in share if part.real for rollout in part.rollouts), _MEASURED)


def correct_for_engine(rollouts: Sequence[Rollout], settings: Ppo) -> dict[str, float]:
    """Set weights of the policy's loss that correct for differences between engine and trainer.

    Returns:
        Over all tokens: mean and largest ratio of trainer and engine, and the share above the cap, which reveal a drift
        between the two. Empty if our own loop has sampled, because that is the trainer.
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
    total, above, tokens = sums.tolist()
    if abs(total / tokens - 1) > DRIFT:
        log.warning(
            "engine and trainer disagree: the trainer gives the engine's tokens %.2f times the engine's probability. "
            "Check whether the engine has another version of the weights, or another dtype",
            total / tokens,
        )
    return {
        "engine_ratio": total / tokens,
        "engine_ratio_largest": largest,
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
    budget: int,
    scoring: Scoring = DOCUMENT,
) -> None:
    """The reward model's scores under principles drawn for each rollout, and the shaped rewards of the responses.

    Args:
        shared: the models.
        tokenizer: the tokenizer of all models.
        rollouts: the rollouts, equal on all ranks.
        principles: the principles to draw from.
        step: the step, counted from 0.
        settings: the run's settings.
        budget: maximum tokens of a pass on a rank.
        scoring: how the reward model reads its texts.
    """
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
    by_place = {rollout.place: text for rollout, text in zip(rollouts, texts, strict=True)}
    share = parts(rollouts, [len(text) for text in texts], budget)
    shared.eval()
    with shared.use("reward"):
        for part in share:
            scores = shared.rewards([by_place[rollout.place] for rollout in part.rollouts]).tolist()
            for rollout, value in zip(part.rollouts, scores, strict=True):
                rollout.score = value
    spread(rollouts, (rollout for part in share if part.real for rollout in part.rollouts), ("score",))
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
    """Advantages, whitened over all rollouts, and returns."""
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
    shared: SharedBase, optimizer: Optimizer, rollouts: Sequence[Rollout], settings: Ppo, budget: int
) -> dict[str, float]:
    """Add the gradients of this rank's share of one minibatch's policy and value losses.

    Args:
        shared: the models.
        optimizer: optimiser of the trained weights.
        rollouts: the minibatch, equal on all ranks.
        settings: the run's settings.
        budget: maximum tokens of a pass on a rank.

    Returns:
        Sums over this rank's response tokens, divided by the number in the minibatch.
    """
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approximate_kl"), 0.0)
    total = float(sum(len(rollout.response) for rollout in rollouts))
    for part in parts(rollouts, [len(rollout.query) + len(rollout.response) for rollout in rollouts], budget):
        mask = _pad([torch.full((len(each.response),), float(part.real)) for each in part.rollouts]).to(shared.device)
        old, advantages, old_values, returns, weights = (
            _pad([getattr(each, name) for each in part.rollouts]).to(shared.device)
            for name in ("logprobs", "advantages", "values", "returns", "weights")
        )
        with shared.use("policy"):
            logprobs, _ = shared.logprobs(*part.texts, settings.temperature, most=part.most)
            policy_loss, clipped = ppo_math.policy_loss(logprobs, old, advantages, mask, settings.clip, total, weights)
            optimizer.backward(policy_loss)
        with shared.use("value"):
            values = shared.values(*part.texts)
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
    budget: int,
    rate: float,
) -> dict[str, float]:
    """Run all inner epochs over the rollouts of a step; returns means over its optimiser steps."""
    history: list[dict[str, float]] = []
    shared.train()
    for epoch in range(settings.inner_epochs):
        order = rng("ppo-minibatches", settings.seed, step, epoch).permutation(len(rollouts))
        for start in range(0, len(order), settings.minibatch_size):
            minibatch = [rollouts[place] for place in sorted(order[start : start + settings.minibatch_size])]
            sums = accumulate_gradients(shared, optimizer, minibatch, settings, budget)
            norm = optimizer.step(rate)
            if not math.isfinite(norm):
                raise UserError(f"step {step + 1}: the gradient is not finite; lower ppo.learning_rate or use bfloat16")
            joined = distributed.sum_over_ranks(torch.tensor(list(sums.values()), device=shared.device).double())
            history.append({**dict(zip(sums, joined.tolist(), strict=True)), "gradient_norm": norm})
    shared.eval()
    return {name: float(np.mean([entry[name] for entry in history])) for name in history[0]}


def summarize(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts; per-token values are weighted by tokens."""
    per_rollout = {
        "score": [r.score for r in rollouts],
        "reward": [r.reward for r in rollouts],
        "query_tokens": [float(len(r.query)) for r in rollouts],
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
    rows, tokens = len(rollouts), sum(len(rollout.response) for rollout in rollouts)
    means = {name: math.fsum(values) / rows for name, values in per_rollout.items()}
    return means | {name: math.fsum(values) / tokens for name, values in per_token.items()}


def learning_rate(step: int, steps: int, settings: Ppo) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine to 0; constant over one PPO step (from 0).

    It counts from 0, like transformers' schedule and therefore the reward model's: the rate of the first step is 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def save_checkpoint(work: WorkFolder, optimizer: Optimizer, step: int) -> None:
    """Write the state after `step` steps, completely or not at all, and delete all but the newest checkpoints."""
    folder = checkpoints.new(work, step)
    optimizer.save(folder)
    checkpoints.seal(work, folder)


def load_checkpoint(work: WorkFolder, optimizer: Optimizer) -> int:
    """Continue from the newest checkpoint; returns the number of completed steps, 0 if there is none."""
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
                raise UserError(f"{self.file} has {len(lines)} of {done} lines; delete {folder} to start again")
            with atomic(self.file) as temporary:  # steps after the checkpoint are repeated
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
            os.fsync(file.fileno())  # like the contents of a checkpoint
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
    tokens_per_pass: int,
    tokens_per_forward_pass: int,
) -> None:
    """Train the policy in `shared`. Resumes from `work`, and keeps checkpoints and metrics there.

    Args:
        shared: policy, reference, value and reward model.
        optimizer: optimiser of the weights that `shared` trains.
        sampler: samples the rollouts; gets the new policy before every step.
        tokenizer: the tokenizer of all models.
        prompts: prompt_id, instruction, input, question_type, length_bonus.
        principles: the principles to draw from, with their weights.
        work: opened with the fingerprint of this run.
        scoring: how the reward model reads its texts.
        tokens_per_pass: maximum tokens per rank, padding included, with gradients (hardware).
        tokens_per_forward_pass: the same without gradients (hardware).

    Raises:
        Stopped: if SIGTERM asked for it; the checkpoint is written.
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
        # 2. Measure them: log probabilities of policy and reference, values; and how far an engine deviates from these.
        measure(shared, rollouts, settings.temperature, tokens_per_forward_pass)
        drift = correct_for_engine(rollouts, settings)
        # 3. Score them with the reward model, each under its own principles; shape the rewards.
        score(shared, tokenizer, rollouts, principles, step, settings, tokens_per_forward_pass, scoring)
        # 4. Advantages and returns.
        estimate_advantages(rollouts, settings)
        measured = time.monotonic()
        # 5. Improve policy and value model.
        rate = learning_rate(step, steps, settings)
        losses = update(shared, optimizer, rollouts, step, settings, tokens_per_pass, rate)
        # 6. Report, and write a checkpoint.
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
    """Rows of different lengths as [B, R], padded with zeros on the right."""
    return pad_sequence(list(rows), batch_first=True)
