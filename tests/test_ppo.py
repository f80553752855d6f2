"""The parts of PPO against slow references: rollouts, scores, advantages, gradients, updates."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from salmon import distributed, models, ppo, reward_model, templates
from salmon.errors import UserError
from salmon.optimization import ReplicatedOptimizer
from salmon.principles import draw_principles
from salmon.randomness import rng
from salmon.sampling import TransformersSampler
from salmon.shared_base import SharedBase
from salmon.work import WorkFolder
from tests.ppo_world import STEPS, World, flat_gradient, lengths, made_up, ready, relative, slow_gradient


@pytest.fixture(scope="module")
def shared(world: World) -> SharedBase:
    """For tests that do not change it."""
    return world.shared()


# -- which prompts, which draws


@pytest.mark.parametrize(("prompts", "batch"), [(24, 8), (10, 4), (3, 8)])
def test_every_epoch_uses_every_prompt_once(world: World, prompts: int, batch: int) -> None:
    settings = world.ppo(rollout_batch_size=batch, minibatch_size=batch, epochs=8)
    steps = ppo.total_steps(prompts, settings)
    assert steps == 8 * prompts // batch
    used = [row for step in range(steps) for row in ppo.rows_of_step(step, prompts, settings)]
    assert len(used) == steps * batch
    epochs = [used[start : start + prompts] for start in range(0, len(used), prompts)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert all(set(epoch) == set(range(prompts)) for epoch in epochs[: len(used) // prompts])
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = settings.model_copy(update={"seed": 43})
    assert used != [row for step in range(steps) for row in ppo.rows_of_step(step, prompts, other)]


def test_number_of_steps(world: World) -> None:
    assert ppo.total_steps(25, world.ppo()) == STEPS
    assert ppo.total_steps(25, world.ppo(max_steps=2)) == 2
    assert ppo.total_steps(25, world.ppo(max_steps=200)) == STEPS
    with pytest.raises(UserError, match=r"3 prompts in 2 epochs.*rollout_batch_size"):
        ppo.total_steps(3, world.ppo())


def test_learning_rate(world: World) -> None:
    """Warm-up from 0, as the paper's run and transformers' schedule of the same name have it."""
    settings = world.ppo(learning_rate=0.5, warmup_steps=4)
    rates = [ppo.learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:4] == pytest.approx([0, 0.125, 0.25, 0.375])
    assert rates[4:] == pytest.approx([0.25 + 0.25 * math.cos(math.pi * k / 16) for k in range(16)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 20)
    for rate in rates:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()
    assert rates[-1] > 0  # every step changes something
    assert ppo.learning_rate(0, 1, world.ppo(learning_rate=0.5, warmup_steps=0)) == 0.5


def sample(world: World, shared: SharedBase, step: int = 0, **changes: Any) -> list[ppo.Rollout]:
    sampler = TransformersSampler(world.tokenizer, shared.device, batch_size=5)
    settings = world.ppo(**changes)
    return ppo.sample(shared, sampler, world.tokenizer, world.read_prompts(), step, settings, world.policy_prompt)


@pytest.fixture(scope="module")
def rollouts(world: World, shared: SharedBase) -> list[ppo.Rollout]:
    """Measured and scored, for many prompts, so that some end with the end token and some with the stop string."""
    found = sample(world, shared, rollout_batch_size=60, minibatch_size=60)
    ppo.measure(shared, found, 0.7, 300)
    ppo.score(shared, world.tokenizer, found, world.principles, 0, world.ppo(), 500)
    return found


def test_rollouts_belong_to_places_and_not_to_ranks(world: World, shared: SharedBase) -> None:
    """Reference, defect 5. What two ranks sample is what one samples."""
    alone = sample(world, shared, 3)
    assert [rollout.place for rollout in alone] == list(range(8))
    prompts = world.read_prompts()["instruction"]
    rows = ppo.rows_of_step(3, len(prompts), world.ppo())
    assert [rollout.instruction.split("\n")[0] for rollout in alone] == [prompts[row] for row in rows]
    of_ranks = []
    for rank in (0, 1):
        with (
            mock.patch.object(distributed, "rank", return_value=rank),
            mock.patch.object(distributed, "world", return_value=2),
        ):
            of_ranks.append(sample(world, shared, 3))
    mine = sorted((r.place, r.query, r.response) for rollouts in of_ranks for r in rollouts)
    assert mine == [(r.place, r.query, r.response) for r in alone]
    # Dealt by length: each rank has as many long ones as short ones.
    first, second = (sorted((len(r.query) for r in rollouts), reverse=True) for rollouts in of_ranks)
    assert all(a >= b for a, b in zip(first, second, strict=True))
    assert all(b >= a for b, a in zip(second, first[1:], strict=False))
    assert [r.response for r in sample(world, shared, 4)] != [r.response for r in alone]


def test_prompts_hold_the_instruction(world: World, rollouts: list[ppo.Rollout]) -> None:
    """Reference, defect 6: with the input, if any."""
    for rollout in rollouts:
        text = world.tokenizer.decode(rollout.query, skip_special_tokens=True)
        assert text == f"A chat.\n### User\n{rollout.instruction}\n\n### Dromedary\n"
    assert any(rollout.instruction.endswith("\n\n5, 6, 7") for rollout in rollouts)


def test_responses_end_by_themselves_or_not(world: World, rollouts: list[ppo.Rollout]) -> None:
    """Reference, defect 12: by EOS, too; and all sampled tokens stay, even those of the stop string."""
    seen: Counter[str] = Counter()
    for rollout in rollouts:
        whole = world.tokenizer.decode(rollout.response, skip_special_tokens=True)
        by_eos, by_stop = rollout.response[-1] == 2, "e" in whole
        assert rollout.finished == (by_eos or by_stop)
        assert rollout.finished or len(rollout.response) == 16
        assert rollout.text == (whole[: whole.index("e")] if by_stop else whole)
        assert 2 not in rollout.response[:-1]
        seen["eos" if by_eos else "stop" if by_stop else "length"] += 1
    assert len(seen) == 3, seen


def test_rollouts_are_measured_as_they_were_sampled(
    world: World, shared: SharedBase, rollouts: list[ppo.Rollout]
) -> None:
    """One row, one token at a time, the softmax in float64; each token of the response, and nothing else."""
    alone = models.load_initial_policy(world.model, "cpu")
    for rollout in rollouts[:4]:
        expected = []
        for t, token in enumerate(rollout.response):
            with torch.no_grad():
                logits = alone(input_ids=torch.tensor([rollout.query + rollout.response[:t]])).logits[0, -1].double()
            expected.append(float(torch.log_softmax(logits / 0.7, 0)[token]))
        torch.testing.assert_close(rollout.logprobs.tolist(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(rollout.reference.tolist(), expected, atol=2e-5, rtol=1e-5)
        with torch.no_grad(), shared.use("reward"):
            before = shared.rewards([rollout.query + rollout.response[:t] for t in range(len(rollout.response))])
        torch.testing.assert_close(rollout.values, before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [3, 0])
def test_scores_and_rewards(world: World, shared: SharedBase, rollouts: list[ppo.Rollout], number: int) -> None:
    """Each rollout under its own principles, by the reward model alone; 0 principles are a control run.

    Scored in another order, a part at a time, as other ranks would.
    """
    settings = world.ppo(principles_per_rollout=number)
    mine = rollouts[::3][::-1]
    for part in (mine[:4], mine[4:]):
        ppo.score(shared, world.tokenizer, part, world.principles, 5, settings, 300)
    template = templates.read(settings.template)
    alone = models.load_reward_model(world.model, world.reward_model, "cpu", trainable=False)
    sets = set()
    for rollout in mine:
        drawn = draw_principles(
            world.principles, rollout.question_type, settings, rng("ppo-principles", 42, 5, rollout.place)
        )
        sets.add(tuple(principle.dimension for principle in drawn))
        text = templates.fill(
            template,
            Output=rollout.text,
            Input=rollout.instruction,
            Dimensions="\n".join(f"- {principle.definition}" for principle in drawn),
        )
        score = reward_model.score(alone, [world.tokenizer(text)["input_ids"]], 1, "cpu").item()
        share = min(len(rollout.response) / 16 * rollout.length_bonus, 0.8)
        assert rollout.score == pytest.approx(score, abs=2e-5)
        assert rollout.reward == pytest.approx(score + 5 * share - 6 * (not rollout.finished), abs=2e-5)
    assert len(sets) == 1 if number == 0 else len(sets) > 5  # not the same for all (reference, defect 5)


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_every_rank_has_a_part_in_every_pass(world: World, ranks: int) -> None:
    """A rank without a part computes another rank's rollout and discards the result: DeepSpeed waits for all ranks."""
    found = made_up(range(8))
    lengths = [len(rollout.query) + len(rollout.response) for rollout in found]
    of_ranks = []
    for rank in range(ranks):
        with (
            mock.patch.object(distributed, "rank", return_value=rank),
            mock.patch.object(distributed, "world", return_value=ranks),
        ):
            of_ranks.append(ppo.parts(found, lengths, 20))
    assert len({len(parts) for parts in of_ranks}) == 1
    kept = [rollout.place for parts in of_ranks for part in parts if part.real for rollout in part.rollouts]
    assert sorted(kept) == list(range(8))
    assert all(part.rollouts for parts in of_ranks for part in parts)
    assert all(part.real for parts in of_ranks for part in parts) == (ranks != 9)
    for passes in zip(*of_ranks, strict=True):
        assert {part.most for part in passes} == {
            max(sum(len(rollout.response) for rollout in part.rollouts) for part in passes)
        }


def test_metrics_are_means_over_rollouts_or_tokens(world: World, rollouts: list[ppo.Rollout]) -> None:
    ppo.estimate_advantages(rollouts, world.ppo())
    found = ppo.summarize(rollouts)
    tokens = [
        (float(kl), float(entropy), float(target), float(value - target) ** 2)
        for r in rollouts
        for kl, entropy, target, value in zip(r.logprobs - r.reference, r.entropy, r.returns, r.values, strict=True)
    ]
    names = ("kl_token", "entropy", "returns", "value_error")
    expected = {name: sum(row[i] for row in tokens) / len(tokens) for i, name in enumerate(names)}
    for name in ("score", "reward", "finished", "thinking_cut", "marker_cut"):
        expected[name] = sum(getattr(rollout, name) for rollout in rollouts) / len(rollouts)
    expected["response_tokens"] = len(tokens) / len(rollouts)
    expected["query_tokens"] = sum(len(rollout.query) for rollout in rollouts) / len(rollouts)
    expected["kl_sequence"] = sum(row[0] for row in tokens) / len(rollouts)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -- the update


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_of_rollouts(world: World, whiten: bool) -> None:
    found = made_up(range(8))
    ppo.estimate_advantages(found, world.ppo(kl_coefficient=0.1, whiten_advantages=whiten))
    expected, returns = [], []
    for rollout in found:
        kl = (rollout.logprobs - rollout.reference).double().tolist()
        to_go = [rollout.reward - 0.1 * sum(kl[t:]) for t in range(len(kl))]
        returns.append(to_go)
        expected.append([r - v for r, v in zip(to_go, rollout.values.tolist(), strict=True)])
    if whiten:
        every = np.array([value for row in expected for value in row])
        expected = [[(value - every.mean()) / every.std() for value in row] for row in expected]
    for rollout, advantages, to_go in zip(found, expected, returns, strict=True):
        assert rollout.advantages.tolist() == pytest.approx(advantages, abs=1e-5)
        assert rollout.returns.tolist() == pytest.approx(to_go, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_gradient_is_that_of_the_mean_over_tokens(world: World, budget: int) -> None:
    """The division into passes does not matter (reference, defect 10)."""
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    expected = slow_gradient(world, shared, rollouts)
    sums = ppo.accumulate_gradients(shared, ReplicatedOptimizer(shared, 1.0), rollouts, world.ppo(), budget)
    assert relative(flat_gradient(shared), expected) < 1e-5
    assert 0 < sums["clip_fraction"] < 1
    # The shift that `ready` added, averaged: old minus new.
    shifts = [np.random.default_rng(100 + place).normal(0, 0.3, (2, n))[0] for place, n in lengths(rollouts)]
    assert sums["approximate_kl"] == pytest.approx(float(np.concatenate(shifts).mean()), abs=1e-5)


@pytest.mark.parametrize("correction", ["truncated", "none"])
def test_rollouts_of_an_engine_are_corrected(world: World, correction: str) -> None:
    """The gradient is that of the slow loss, whose tokens are weighted; the metrics are those of the slow weights."""
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    for rollout in rollouts:
        drift = np.random.default_rng(200 + rollout.place).normal(0, 1.0, len(rollout.response))
        rollout.sampled = rollout.logprobs + torch.tensor(drift).float()
    settings = world.ppo(engine="vllm", rollout_correction=correction)
    found = ppo.correct_for_engine(rollouts, settings)
    told = [pair for r in rollouts for pair in zip(r.logprobs.tolist(), r.sampled.tolist(), strict=True)]
    ratios = [math.exp(own) / math.exp(engine) for own, engine in told]
    above = sum(ratio > 2 for ratio in ratios)
    assert above >= 3
    expected = {
        "engine_ratio": sum(ratios) / len(ratios),
        "engine_ratio_largest": max(ratios),
        "engine_ratio_capped": above / len(ratios),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    if correction == "none":
        for rollout in rollouts:
            rollout.sampled = torch.empty(0)
    slow = slow_gradient(world, shared, rollouts)
    ppo.accumulate_gradients(shared, ReplicatedOptimizer(shared, 1.0), rollouts, settings, 40)
    assert relative(flat_gradient(shared), slow) < 1e-5
    if correction == "truncated":
        for rollout in rollouts:
            rollout.weights = torch.ones(len(rollout.response))
        ppo.accumulate_gradients(shared, ReplicatedOptimizer(shared, 1.0), rollouts, settings, 40)
        assert relative(flat_gradient(shared), slow) > 0.05  # the weights are what made them equal
    assert ppo.correct_for_engine(rollouts, world.ppo()) == {}


def test_update_uses_every_rollout_once_an_inner_epoch(world: World) -> None:
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    seen: list[list[int]] = []

    def note(policy: SharedBase, _: Any, chosen: Sequence[ppo.Rollout], *__: Any) -> dict[str, float]:
        assert policy.lm.get_base_model().model.layers[0].training  # or it would not checkpoint
        seen.append([rollout.place for rollout in chosen])
        for parameter in policy.trained():
            parameter.grad = torch.full_like(parameter, 100.0)
        return {"policy_loss": float(len(seen))}

    optimizer = ReplicatedOptimizer(shared, 0.5)
    optimizer.adamw = torch.optim.SGD(shared.trained(), lr=0.1)
    before = [parameter.detach().clone() for parameter in shared.trained()]
    with mock.patch.object(ppo, "accumulate_gradients", note):
        found = ppo.update(shared, optimizer, rollouts, 7, world.ppo(), 40, 1.0)
    assert not shared.lm.get_base_model().model.layers[0].training
    assert [len(places) for places in seen] == [4, 4, 4, 4]
    assert all(sorted(seen[i] + seen[i + 1]) == list(range(8)) for i in (0, 2))
    assert seen[0] != seen[2]
    assert found["policy_loss"] == 2.5
    # Four steps of SGD along one direction, each clipped to a norm of 0.5.
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, shared.trained(), strict=True)])
    assert float(moved.norm()) == pytest.approx(4 * 0.5, rel=1e-4)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_optimiser_goes_by_the_learning_rate(world: World, tmp_path: Path, warmup: int) -> None:
    """The first step of Adam moves whatever has a gradient by the learning rate."""
    settings = world.ppo(
        learning_rate=0.02, warmup_steps=warmup, max_steps=1, inner_epochs=1, rollout_batch_size=2, minibatch_size=2
    )
    shared, work = world.shared(), WorkFolder(tmp_path / "policy")
    before = [parameter.detach().clone() for parameter in shared.trained()]
    work.open("")
    ppo.train(
        shared,
        ReplicatedOptimizer(shared, settings.max_grad_norm),
        TransformersSampler(world.tokenizer, "cpu", batch_size=2),
        world.tokenizer,
        world.read_prompts(),
        world.principles,
        settings,
        world.policy_prompt,
        work,
        tokens_per_pass=60,
        tokens_per_forward_pass=200,
    )
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(shared.trained(), before, strict=True)]
    assert moved == pytest.approx([ppo.learning_rate(0, 1, settings)] * len(moved), rel=0.02)


def test_gradients_that_are_not_finite_end_the_run(world: World) -> None:
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    rollouts[3].advantages = torch.full_like(rollouts[3].advantages, torch.inf)
    with pytest.raises(UserError, match="step 8: the gradient is not finite"):
        ppo.update(shared, ReplicatedOptimizer(shared, 1.0), rollouts, 7, world.ppo(), 40, 1.0)


# -- ranks
