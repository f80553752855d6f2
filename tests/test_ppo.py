"""PPO: its parts against slow references, whole runs of the script, interruptions, ranks, and that it learns."""

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from peft import TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tests.running import on_a_full_disk
from transformers import AutoModelForCausalLM

import train_policy
from salmon import distributed, models, ppo, reward_model, script, templates
from salmon.artifacts import WorkFolder
from salmon.checkpoints import WHOLE
from salmon.config import Lora, Model, PolicyPrompt, Ppo
from salmon.errors import UserError
from salmon.optimization import WholeOptimizer
from salmon.principles import WeightedPrinciple, draw, read_weighted
from salmon.randomness import rng
from salmon.shared_base import SharedBase

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"
LORA = Lora(r=4)
STEPS = 6  # of the settings below: 2 epochs of 25 prompts in steps of 8
CHECKPOINT = 4  # every so many steps, which 6 is no multiple of
TYPES = ["general", "reasoning", "red_teaming"]


class World:
    """A folder with all that the script reads, small, and its command line."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base
        self.prompts = folder / "rl.parquet"
        self.reward_model = folder / "reward-model"
        self.adapter = folder / "adapter"
        self.model = Model(base=str(base), adapter=str(self.adapter), quantization="none", dtype="float32")
        self.policy_prompt = PolicyPrompt(template=str(folder / "policy.txt"), stop=["e"])

    def build(self) -> None:
        """Make the files."""
        rows = [
            {
                "prompt_id": f"p{i}",
                "source": "x",
                "instruction": f"Tell me {'more ' * (i % 5)}about number {i}" if i else "too long " * 100,
                "input": "5, 6, 7" if i == 3 else "",
                "question_type": TYPES[i % 3],
                "length_bonus": [1.0, -0.4, 0.0][i % 3],
            }
            for i in range(26)
        ]
        pl.DataFrame(rows).write_parquet(self.prompts)
        (self.folder / "policy.txt").write_text("A chat.\n### User\n")
        (self.folder / "reward.txt").write_text("Out: {Output}\nIn: {Input}\nBy:\n{Dimensions}\nThe quality is\n")
        weights = {"Concise": 1, "Long": 2, "Numerical Sensitive": 1, "Ethical": 3, "Harmless": 1}
        principles = [{"dimension": name, "definition": f"It is {name}.", "weight": w} for name, w in weights.items()]
        (self.folder / "principles.json").write_text(json.dumps(principles))
        bare = self.model.model_copy(update={"adapter": None})
        torch.manual_seed(3)
        policy = get_peft_model(models.load_base(bare, "cpu"), models.lora_config(LORA, TaskType.CAUSAL_LM))
        for model, folder in (
            (models.new_reward_model(bare, LORA, "cpu", 3), self.reward_model),
            (policy, self.adapter),
        ):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:  # zero at first: the adapter would change nothing
                        parameter.normal_(0, 0.1)
            model.save_pretrained(str(folder))

    @functools.cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self.model)

    @functools.cached_property
    def principles(self) -> list[WeightedPrinciple]:
        return read_weighted(self.folder / "principles.json")

    def ppo(self, **changes: Any) -> Ppo:
        """The settings of a run of `STEPS` steps."""
        return Ppo.model_validate(self.plain_ppo(**changes))

    def plain_ppo(self, **changes: Any) -> dict[str, Any]:
        return {
            "template": str(self.folder / "reward.txt"),
            "principles": str(self.folder / "principles.json"),
            "rollout_batch_size": 8,
            "minibatch_size": 4,
            "query_length": 64,
            "response_length": 16,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_steps": CHECKPOINT,
            **changes,
        }

    def shared(self) -> SharedBase:
        return SharedBase(self.model, LORA, self.reward_model, torch.device("cpu"), seed=1)

    def read_prompts(self) -> pl.DataFrame:
        return pl.read_parquet(self.prompts)[1:]  # without the one that is too long

    def arguments(self, output: Path, options: dict[str, Any] | None = None, **ppo: Any) -> list[str]:
        """Words of a command line; `options` replace those of the same name, None leaves one out."""
        found = {
            "prompts": self.prompts,
            "reward-model": self.reward_model,
            "output": output,
            "model": self.model.model_dump_json(),
            "lora": LORA.model_dump_json(),
            "policy-prompt": self.policy_prompt.model_dump_json(),
            "ppo": json.dumps(self.plain_ppo(**ppo)),
            "sampling-batch-size": 5,
            "micro-batch-size": 3,
            **(options or {}),
        }
        return [str(word) for key, value in found.items() if value is not None for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    found = World(tmp_path_factory.mktemp("world"), tiny_model)
    found.build()
    return found


@pytest.fixture(scope="module")
def shared(world: World) -> SharedBase:
    """For tests that change nothing in it."""
    return world.shared()


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """A script sets up logging for a process of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def run(arguments: list[str]) -> tuple[int, str]:
    """Run the script as the command line does, but in this process, which is faster: exit status and log."""
    log = io.StringIO()
    with (
        kept_logging(),
        mock.patch.object(sys, "argv", ["train_policy.py", *arguments]),
        contextlib.redirect_stderr(log),
    ):
        try:
            script.run(train_policy.main, train_policy.Arguments)
        except SystemExit as end:
            return int(end.code or 0), log.getvalue()
    return 0, log.getvalue()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Metrics without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in lines]


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def weights(folder: Path) -> torch.Tensor:
    found = load_file(folder / "adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)]).double()


@pytest.fixture(scope="module")
def policy(world: World) -> Path:
    """What an undisturbed run writes."""
    output = world.folder / "undisturbed" / "policy"
    status, log = run(world.arguments(output))
    assert status == 0, log
    return output


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
    settings = world.ppo(learning_rate=0.5, warmup_steps=4)
    rates = [ppo.learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4:] == pytest.approx([0.25 + 0.25 * math.cos(math.pi * k / 16) for k in range(16)])
    assert rates[-1] > 0  # no step is done in vain
    assert ppo.learning_rate(0, 1, world.ppo(learning_rate=0.5, warmup_steps=0)) == 0.5


def sample(world: World, shared: SharedBase, step: int = 0, **changes: Any) -> list[ppo.Rollout]:
    return ppo.sample(shared, world.tokenizer, world.read_prompts(), step, world.ppo(**changes), world.policy_prompt, 5)


@pytest.fixture(scope="module")
def rollouts(world: World, shared: SharedBase) -> list[ppo.Rollout]:
    """Measured and scored, of many prompts, so that some end by the end token, some by the stop string."""
    found = sample(world, shared, rollout_batch_size=60, minibatch_size=60)
    ppo.measure(shared, found, 0.7, 7)
    ppo.score(shared, world.tokenizer, found, world.principles, 0, world.ppo(), 7)
    return found


def test_rollouts_belong_to_places_and_not_to_ranks(world: World, shared: SharedBase) -> None:
    """Reference, defect 5. What two ranks sample is what one samples."""
    alone = sample(world, shared, 3)
    assert [rollout.place for rollout in alone] == list(range(8))
    prompts = world.read_prompts()["instruction"]
    rows = ppo.rows_of_step(3, len(prompts), world.ppo())
    assert [rollout.instruction.split("\n")[0] for rollout in alone] == [prompts[row] for row in rows]
    for rank in (0, 1):
        with (
            mock.patch.object(distributed, "rank", return_value=rank),
            mock.patch.object(distributed, "world", return_value=2),
        ):
            mine = sample(world, shared, 3)
        assert [(r.place, r.query, r.response) for r in mine] == [
            (r.place, r.query, r.response) for r in alone[rank::2]
        ]
    assert [r.response for r in sample(world, shared, 4)] != [r.response for r in alone]


def test_prompts_hold_the_instruction(world: World, rollouts: list[ppo.Rollout]) -> None:
    """Reference, defect 6: with the input, if any."""
    for rollout in rollouts:
        text = world.tokenizer.decode(rollout.query, skip_special_tokens=True)
        assert text == f"A chat.\n### User\n{rollout.instruction}\n\n### Dromedary\n"
    assert any(rollout.instruction.endswith("\n\n5, 6, 7") for rollout in rollouts)


def test_responses_end_by_themselves_or_not(world: World, rollouts: list[ppo.Rollout]) -> None:
    """Reference, defect 12: by EOS too; and all sampled tokens stay, also those of the stop string."""
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
        ppo.score(shared, world.tokenizer, part, world.principles, 5, settings, 3)
    template = templates.read(settings.template)
    alone = models.load_reward_model(world.model, world.reward_model, "cpu", trainable=False)
    sets = set()
    for rollout in mine:
        drawn = draw(world.principles, rollout.question_type, settings, rng("ppo-principles", 42, 5, rollout.place))
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


def test_a_rank_may_have_no_rollouts(world: World, shared: SharedBase) -> None:
    with (
        mock.patch.object(distributed, "rank", return_value=8),
        mock.patch.object(distributed, "world", return_value=9),
    ):
        assert sample(world, shared) == []
    ppo.measure(shared, [], 0.7, 3)
    ppo.score(shared, world.tokenizer, [], world.principles, 0, world.ppo(), 3)
    ppo.estimate_advantages([], world.ppo())


def test_metrics_are_means_over_rollouts_or_tokens(world: World, rollouts: list[ppo.Rollout]) -> None:
    ppo.estimate_advantages(rollouts, world.ppo())
    found = ppo.describe(rollouts, world.ppo())
    tokens = [
        (float(kl), float(entropy), float(target), float(value - target) ** 2)
        for r in rollouts
        for kl, entropy, target, value in zip(r.logprobs - r.reference, r.entropy, r.returns, r.values, strict=True)
    ]
    names = ("kl_token", "entropy", "returns", "value_error")
    expected = {name: sum(row[i] for row in tokens) / len(tokens) for i, name in enumerate(names)}
    for name in ("score", "reward", "finished"):
        expected[name] = sum(getattr(rollout, name) for rollout in rollouts) / len(rollouts)
    expected["response_tokens"] = len(tokens) / len(rollouts)
    expected["kl_sequence"] = sum(row[0] for row in tokens) / len(rollouts)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -- the update


def made_up(places: Sequence[int]) -> list[ppo.Rollout]:
    """Rollouts as they are before advantages are estimated, of any lengths; each place is always the same."""
    found = []
    for place in places:
        random = np.random.default_rng(place)
        length = [1, 9, 4, 6, 2, 11, 5, 3][place]
        floats = [torch.tensor(random.normal(-2, 1, length)).float() for _ in range(4)]
        found.append(
            ppo.Rollout(
                place=place,
                query=[1, *random.integers(3, 300, 2 + place % 3).tolist()],
                instruction="",
                question_type="general",
                length_bonus=0.0,
                response=random.integers(3, 300, length).tolist(),
                text="",
                finished=True,
                reward=float(random.normal()),
                logprobs=floats[0],
                reference=floats[1],
                values=floats[2],
                entropy=floats[3].abs(),
            )
        )
    return found


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


def ready(world: World, shared: SharedBase, places: Sequence[int]) -> list[ppo.Rollout]:
    """Made-up rollouts with advantages, whose log probabilities and values are near those of the models."""
    found = made_up(places)
    ppo.measure(shared, found, 0.7, 3)
    for rollout in found:
        shift = np.random.default_rng(100 + rollout.place).normal(0, 0.3, (2, len(rollout.response)))
        rollout.logprobs = rollout.logprobs + torch.tensor(shift[0]).float()
        rollout.values = rollout.values + torch.tensor(shift[1]).float()
    ppo.estimate_advantages(found, world.ppo())
    return found


def flat_gradient(shared: SharedBase) -> torch.Tensor:
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in shared.trained()])
    shared.zero_grad()
    return found.double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def slow_gradient(world: World, shared: SharedBase, rollouts: Sequence[ppo.Rollout]) -> torch.Tensor:
    """Of the loss as the paper writes it: one token after the other, a mean over all real tokens."""
    settings, total = world.ppo(), sum(len(rollout.response) for rollout in rollouts)
    for rollout in rollouts:
        with shared.use("policy"):
            (logprobs,), _ = shared.logprobs([rollout.query], [rollout.response], 0.7)
            loss = torch.zeros(())
            for new, old, advantage in zip(logprobs, rollout.logprobs, rollout.advantages, strict=True):
                ratio = (new - old).exp()
                loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (loss / total).backward()
        with shared.use("value"):
            (values,) = shared.values([rollout.query], [rollout.response])
            loss = torch.zeros(())
            for new, old, target in zip(values, rollout.values, rollout.returns, strict=True):
                clipped = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
                loss = loss + 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2)
            (settings.value_coefficient * loss / total).backward()
    return flat_gradient(shared)


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_gradient_is_that_of_the_mean_over_tokens(world: World, micro_batch: int) -> None:
    """Whatever the micro-batches: reference, defect 10."""
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    total = float(sum(len(rollout.response) for rollout in rollouts))
    expected = slow_gradient(world, shared, rollouts)
    sums = ppo.accumulate_gradients(shared, WholeOptimizer(shared, 1.0), rollouts, total, world.ppo(), micro_batch)
    assert relative(flat_gradient(shared), expected) < 1e-5
    assert 0 < sums["clip_fraction"] < 1
    # The shift that `ready` added, averaged: old minus new.
    shifts = [np.random.default_rng(100 + place).normal(0, 0.3, (2, n))[0] for place, n in lengths(rollouts)]
    assert sums["approximate_kl"] == pytest.approx(float(np.concatenate(shifts).mean()), abs=1e-5)


def lengths(rollouts: Sequence[ppo.Rollout]) -> list[tuple[int, int]]:
    return [(rollout.place, len(rollout.response)) for rollout in rollouts]


def test_update_uses_every_rollout_once_an_inner_epoch(world: World) -> None:
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    seen: list[tuple[list[int], float]] = []

    def note(
        models: Any, _: Any, chosen: Sequence[ppo.Rollout], total: float, *__: Any, **___: Any
    ) -> dict[str, float]:
        assert models.lm.get_base_model().model.layers[0].training  # or it would not checkpoint
        seen.append(([rollout.place for rollout in chosen], total))
        for parameter in models.trained():
            parameter.grad = torch.full_like(parameter, 100.0)
        return {"policy_loss": float(len(seen))}

    optimizer = WholeOptimizer(shared, 0.5)
    optimizer.adamw = torch.optim.SGD(shared.trained(), lr=0.1)
    before = [parameter.detach().clone() for parameter in shared.trained()]
    with mock.patch.object(ppo, "accumulate_gradients", note):
        found = ppo.update(shared, optimizer, rollouts, 7, world.ppo(), 3, 1.0)
    assert not shared.lm.get_base_model().model.layers[0].training
    assert [len(places) for places, _ in seen] == [4, 4, 4, 4]
    assert all(sorted(seen[i][0] + seen[i + 1][0]) == list(range(8)) for i in (0, 2))
    assert seen[0][0] != seen[2][0]
    sizes = dict(lengths(rollouts))
    assert all(total == sum(sizes[place] for place in places) for places, total in seen)
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
        WholeOptimizer(shared, settings.max_grad_norm),
        world.tokenizer,
        world.read_prompts(),
        world.principles,
        settings,
        world.policy_prompt,
        work,
        sampling_batch_size=2,
        micro_batch_size=2,
    )
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(shared.trained(), before, strict=True)]
    assert moved == pytest.approx([ppo.learning_rate(0, 1, settings)] * len(moved), rel=0.02)


def test_gradients_that_are_not_finite_end_the_run(world: World) -> None:
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    rollouts[3].advantages = torch.full_like(rollouts[3].advantages, torch.inf)
    with pytest.raises(UserError, match="step 8: the gradient is not finite"):
        ppo.update(shared, WholeOptimizer(shared, 1.0), rollouts, 7, world.ppo(), 3, 1.0)


# -- ranks

MINIBATCHES = [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 5], [2, 4, 6]]


def be_a_rank(folder: Path, base: Path) -> None:
    """What each rank does when this file is started by launch.sh: gradients of minibatches, and a whole run."""
    distributed.init()
    world = World(folder, base)
    shared = world.shared()
    rollouts = ready(world, shared, range(distributed.rank(), 8, distributed.world()))
    for number, chosen in enumerate(MINIBATCHES):
        mine = [rollout for rollout in rollouts if rollout.place in chosen]
        tokens = sum(len(rollout.response) for rollout in mine)
        total = float(distributed.sum_over_ranks(torch.tensor(tokens)))
        ppo.accumulate_gradients(shared, WholeOptimizer(shared, 1.0), mine, total, world.ppo(), 2)
        distributed.sum_gradients(shared.trained())
        gradient = flat_gradient(shared)
        if distributed.is_main():
            torch.save(gradient, folder / "two-ranks" / f"{number}.pt")
    sys.argv = ["train_policy.py", *world.arguments(folder / "two-ranks" / "policy")]
    script.run(train_policy.main, train_policy.Arguments)


@pytest.fixture(scope="module")
def two_ranks(world: World) -> Path:
    """Folder of what two ranks made."""
    (world.folder / "two-ranks").mkdir()
    done = subprocess.run(
        ["bash", SCRIPTS / "launch.sh", "1", "2", "2", __file__, world.folder, world.base],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return world.folder / "two-ranks"


def test_two_ranks_sum_to_the_gradient_of_one(world: World, two_ranks: Path) -> None:
    """Reference, defect 7. Also where one of the ranks holds nothing of the minibatch (the last one), and with
    advantages whitened over the rollouts of both (defect 10)."""
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    for number, chosen in enumerate(MINIBATCHES):
        expected = slow_gradient(world, shared, [rollout for rollout in rollouts if rollout.place in chosen])
        assert relative(torch.load(two_ranks / f"{number}.pt", weights_only=True), expected) < 1e-5, chosen


def test_two_ranks_train_the_policy_of_one(world: World, policy: Path, two_ranks: Path) -> None:
    """Reference, defect 7. The same rollouts, therefore the same numbers up to the order of sums in float32.

    Six steps of Adam carry that rounding on (an element whose gradient is nothing but rounding moves by the learning
    rate in either direction), so that weights are compared as a whole: by how far they moved. Without
    synchronisation, or with other rollouts, the difference is as large as the way itself.
    """
    start, one, two = (weights(folder) for folder in (world.adapter, policy, two_ranks / "policy"))
    assert relative(two - start, one - start) < 1e-3
    for found, expected in zip(read_metrics(two_ranks / "policy"), read_metrics(policy), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found["response_tokens"] == expected["response_tokens"]


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2), (2, 1)])
def test_ranks_of_deepspeed_train_the_policy_of_one_process(
    world: World, policy: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    """ZeRO-2 and ZeRO-3 take the steps of a process without them; stopped and started again as well."""
    output = tmp_path / "policy"
    arguments = world.arguments(output, {"deepspeed": SCRIPTS.parent / "profiles" / "deepspeed" / f"zero{stage}.json"})
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}

    def start(program: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        line = ["bash", SCRIPTS / "launch.sh", "1", str(ranks), "2", *program, *arguments]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)

    (tmp_path / "stopped.py").write_text(STOPPED)
    stopped = start([tmp_path / "stopped.py"])
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped by SIGTERM after step 3; a checkpoint is written" in stopped.stderr
    done = start([SCRIPTS / "train_policy.py"])
    assert done.returncode == 0, done.stderr
    assert "going on after step 3" in done.stderr
    first, one, two = (weights(folder) for folder in (world.adapter, policy, output))
    assert relative(two - first, one - first) < 1e-3
    for found, expected in zip(read_metrics(output), read_metrics(policy), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_zero3_of_a_four_bit_model_trains_as_two_whole_ones(world: World, tmp_path: Path) -> None:
    """NF4 and bfloat16, as the paper's run: two ranks with shards of the model, and two that hold it whole."""
    model = world.model.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    for name, more in (("whole", {}), ("shards", {"deepspeed": SCRIPTS.parent / "profiles/deepspeed/zero3.json"})):
        arguments = world.arguments(tmp_path / name, {"model": model.model_dump_json(), **more}, max_steps=1)
        line = ["bash", SCRIPTS / "launch.sh", "1", "2", "2", SCRIPTS / "train_policy.py", *arguments]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    (one,), (two,) = (read_metrics(tmp_path / name) for name in ("whole", "shards"))
    for name in ("score", "response_tokens", "kl_sequence", "value_error"):  # as it was before the first update
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    # Means over four updates; in bfloat16 the second is already another one in its last bits.
    for name in ("gradient_norm", "value_loss", "policy_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-2), name


# Rank 1 is asked to stop in the middle of the third step.
STOPPED = """
import os, signal, train_policy
from salmon import distributed, ppo, script
measure = ppo.measure
def ask(*arguments):
    ask.calls += 1
    if ask.calls == 3 and distributed.rank() == distributed.world() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    measure(*arguments)
ask.calls = 0
ppo.measure = ask
script.run(train_policy.main, train_policy.Arguments)
"""


# -- whole runs


def test_what_a_run_writes(world: World, policy: Path) -> None:
    files = {path.name for path in policy.iterdir()}
    assert files >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "manifest.json",
        "tensorboard",
    }
    assert not (policy.parent / ".work").exists()
    lines = read_metrics(policy)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    rates = [ppo.learning_rate(step, STEPS, world.ppo()) for step in range(STEPS)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert abs(lines[0]["kl_sequence"]) < 1e-4 < max(abs(line["kl_sequence"]) for line in lines)
    counts = json.loads((policy / "manifest.json").read_text())["counts"]
    assert counts == {"rows": 26, "prompts": 25, "longer_than_query_length": 1, "steps": STEPS}
    board = read_board(policy)
    assert set(board) >= set(lines[0]) - {"step"}
    for tag in set(lines[0]) - {"step"}:
        assert board[tag] == [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines]
    start = weights(world.adapter)
    assert float((weights(policy) - start).abs().max()) > 1e-4


def test_hardware_settings_change_no_step(world: World, policy: Path, tmp_path: Path) -> None:
    """Other batches on the GPU, other memory: the same run up to rounding."""
    hardware = {"sampling-batch-size": 8, "micro-batch-size": 1, "gradient-checkpointing": "false"}
    status, log = run(world.arguments(tmp_path / "policy", hardware))
    assert status == 0, log
    start = weights(world.adapter)
    assert relative(weights(tmp_path / "policy") - start, weights(policy) - start) < 1e-3


def test_a_killed_run_goes_on_as_if_nothing_had_happened(world: World, policy: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "policy", tmp_path / ".work" / "policy"
    killed = subprocess.Popen(
        [sys.executable, SCRIPTS / "train_policy.py", *world.arguments(output)], stderr=subprocess.DEVNULL
    )
    # After a checkpoint, in the middle of the next step but one: a step is done that no checkpoint holds.
    metrics, checkpoint = work / "metrics.jsonl", work / f"checkpoint-{CHECKPOINT}"
    ends = time.monotonic() + 100
    while not ((checkpoint / WHOLE).exists() and metrics.read_text().count("\n") > CHECKPOINT):
        assert killed.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not output.exists()
    before = metrics.read_text()

    status, log = run(world.arguments(output))
    assert status == 0, log
    assert f"going on after step {CHECKPOINT}" in log
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (policy / name).read_bytes()
    assert read_metrics(output) == read_metrics(policy)
    kept = "".join(before.splitlines(keepends=True)[:CHECKPOINT])
    assert (output / "metrics.jsonl").read_text().startswith(kept)  # with their times: these steps were not repeated
    assert {tag: [step for step, _ in events] for tag, events in read_board(output).items()} == {
        tag: list(range(1, STEPS + 1)) for tag in read_board(policy)
    }
    assert not work.exists()


def test_stopped_by_sigterm_and_started_again(world: World, policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "policy"
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED, *world.arguments(output)],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 1
    assert "stopped by SIGTERM after step 3; a checkpoint is written" in stopped.stderr
    assert not output.exists()
    status, log = run(world.arguments(output))
    assert status == 0, log
    assert "going on after step 3" in log
    assert (output / "adapter_model.safetensors").read_bytes() == (policy / "adapter_model.safetensors").read_bytes()
    assert read_metrics(output) == read_metrics(policy)


def test_a_full_disk_is_an_error_and_leaves_no_half_checkpoint(world: World, policy: Path, tmp_path: Path) -> None:
    """Files of at most 20,000 bytes stand for the full disk: weights do not fit, metrics do."""
    output = tmp_path / "policy"
    said = on_a_full_disk([sys.executable, SCRIPTS / "train_policy.py", *world.arguments(output)], 20_000)
    assert "File too large" in said
    assert not output.exists()
    assert not list((tmp_path / ".work" / "policy").glob("checkpoint-*/whole"))
    status, log = run(world.arguments(output))  # there is room again
    assert status == 0, log
    assert "is incomplete" in log
    assert (output / "adapter_model.safetensors").read_bytes() == (policy / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def unfinished(world: World, tmp_path: Path) -> Path:
    """Where a run of 3 steps did all of them, but could not write the policy."""
    with mock.patch.object(SharedBase, "save_policy", side_effect=OSError(28, "No space left on device")):
        status, log = run(world.arguments(tmp_path / "policy", max_steps=3, save_steps=2))
    assert status == 1
    assert "No space left" in log
    assert not (tmp_path / "policy").exists()
    return tmp_path / "policy"


def test_a_checkpoint_after_the_last_step(world: World, unfinished: Path) -> None:
    """Reference, defect 16: also where the number of steps is no multiple of save_steps."""
    work = unfinished.parent / ".work" / "policy"
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    before = (work / "metrics.jsonl").read_text()
    status, log = run(world.arguments(unfinished, max_steps=3, save_steps=2))
    assert status == 0, log
    assert (unfinished / "metrics.jsonl").read_text() == before


def change_principles(world: World) -> None:
    file = world.folder / "principles.json"
    file.write_text(file.read_text().replace("It is", "It is not"))


def change_reward_model(world: World) -> None:
    file = world.reward_model / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "settings"),
    [(None, {"kl_coefficient": 0.5}), (None, {"seed": 1}), (change_principles, {}), (change_reward_model, {})],
)
def test_changed_settings_or_inputs_never_continue_a_stale_run(
    world: World, tmp_path: Path, change: Any, settings: dict[str, Any]
) -> None:
    shutil.copytree(world.folder, tmp_path / "world", ignore=shutil.ignore_patterns("undisturbed", "two-ranks"))
    other = World(tmp_path / "world", world.base)
    interrupted, fresh = tmp_path / "a" / "policy", tmp_path / "b" / "policy"
    with mock.patch.object(SharedBase, "save_policy", side_effect=OSError(28, "No space left on device")):
        assert run(other.arguments(interrupted, max_steps=1))[0] == 1
    if change:
        change(other)
    for output in (interrupted, fresh):
        status, log = run(other.arguments(output, max_steps=1, **settings))
        assert status == 0, log
        assert "continuing" not in log
        assert ("starting anew" in log) == (output == interrupted)
    assert (interrupted / "adapter_model.safetensors").read_bytes() == (
        fresh / "adapter_model.safetensors"
    ).read_bytes()


# -- what a user can get wrong


def changed_table(world: World, change: Any) -> Path:
    file = world.folder / "changed.parquet"
    change(pl.read_parquet(world.prompts)).write_parquet(file)
    return file


def without_head(world: World) -> Path:
    target = world.folder / "headless"
    shutil.copytree(world.reward_model, target, dirs_exist_ok=True)
    found = load_file(world.reward_model / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in found.items() if "score" not in name}
    save_file(kept, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def bad_template(world: World) -> str:
    file = world.folder / "slotless.txt"
    file.write_text("Out: {Output}\nBy:\n{Dimensions}\n")
    return str(file)


WRONG: dict[str, tuple[Any, str]] = {
    "no such table": (lambda w: ({"prompts": w.folder / "none.parquet"}, {}), "none.parquet cannot be read"),
    "column missing": (
        lambda w: ({"prompts": changed_table(w, lambda t: t.drop("length_bonus"))}, {}),
        "lacks columns: length_bonus",
    ),
    "column of another type": (
        lambda w: ({"prompts": changed_table(w, lambda t: t.with_columns(question_type=0))}, {}),
        "lacks columns: question_type",
    ),
    "nulls": (
        lambda w: ({"prompts": changed_table(w, lambda t: t.with_columns(instruction=pl.lit(None, pl.String)))}, {}),
        "nulls in instruction",
    ),
    "empty table": (lambda w: ({"prompts": changed_table(w, lambda t: t[:0])}, {}), "0 prompts in 2 epochs"),
    "too few prompts": (lambda w: ({}, {"rollout_batch_size": 60, "minibatch_size": 60}), "25 prompts in 2 epochs"),
    "all prompts too long": (lambda w: ({}, {"query_length": 1}), "0 prompts in 2 epochs"),
    "no reward model": (lambda w: ({"reward-model": w.folder / "none"}, {}), "none does not exist; build it first"),
    "no head": (lambda w: ({"reward-model": without_head(w)}, {}), "holds no head"),
    "unknown key": (lambda w: ({}, {"temprature": 1.0}), "ppo.temprature: unknown key"),
    "value out of range": (lambda w: ({}, {"temperature": 0}), "ppo.temperature: .*greater than 0"),
    "batches do not divide": (lambda w: ({}, {"minibatch_size": 3}), "no multiple of minibatch_size 3"),
    "option missing": (lambda w: ({"prompts": None}, {}), "prompts: required"),
    "no such principles": (lambda w: ({}, {"principles": "none.json"}), "principles none.json cannot be read"),
    "too few principles": (lambda w: ({}, {"principles_per_rollout": 6}), "principles_per_rollout is 6.* 5 principles"),
    "no such template": (lambda w: ({}, {"template": "none.txt"}), "template none.txt cannot be read"),
    "template without slot": (lambda w: ({}, {"template": bad_template(w)}), "slotless.txt has no slot {Input}"),
    "no such base model": (lambda w: ({"model.base": "./none"}, {}), "none does not exist"),
    "response too long": (lambda w: ({}, {"response_length": 4096}), "response_length is 41.* 4096 tokens"),
    "reward text too long": (lambda w: ({}, {"reward_max_length": 4097}), "reward_max_length is 4097.* 4096 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_message(world: World, tmp_path: Path, name: str) -> None:
    make, finding = WRONG[name]
    options, settings = make(world)
    status, log = run(world.arguments(tmp_path / "policy", options, **settings))
    assert status == (2 if any(word in name for word in ("key", "range", "divide", "option")) else 1)
    assert re.search(finding, log), log
    assert log.count("ERROR") == 1, log
    assert "Traceback" not in log
    assert not list(tmp_path.iterdir())


# -- does it learn?


@pytest.fixture(scope="module")
def eager(world: World, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model, but its responses of up to 12 tokens often end early, and it has something like a bias:
    all embeddings share a direction, along which the output layer finds the end token."""
    folder = tmp_path_factory.mktemp("eager")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
        model.lm_head.weight *= 0.1
        model.lm_head.weight[2] = 0.22
    model.save_pretrained(folder)
    return world.model.model_copy(update={"base": str(folder), "adapter": None})


@pytest.mark.parametrize("bonus", [1.0, -1.0])
def test_it_learns_to_be_long_or_short(world: World, eager: Model, tmp_path: Path, bonus: float) -> None:
    """The same but for the sign of the length bonus: responses become longer, or shorter."""
    settings = world.ppo(
        **{"principles_per_rollout": 0, "kl_coefficient": 0, "stop_penalty": 0},
        **{"length_reward": 10, "length_reward_cap": 1, "response_length": 12},
        **{"learning_rate": 1e-2, "warmup_steps": 0, "epochs": 100, "max_steps": 6},
        **{"rollout_batch_size": 32, "minibatch_size": 32},
    )
    prompts = world.read_prompts().with_columns(length_bonus=pl.lit(bonus))
    work = WorkFolder(tmp_path / "policy")
    work.open("")
    shared = SharedBase(eager, LORA, world.reward_model, torch.device("cpu"), seed=1)
    ppo.train(
        shared,
        WholeOptimizer(shared, settings.max_grad_norm),
        world.tokenizer,
        prompts,
        [WeightedPrinciple(dimension="d", definition="d", weight=1)],
        settings,
        world.policy_prompt.model_copy(update={"stop": []}),
        work,
        sampling_batch_size=32,
        micro_batch_size=32,
    )
    lines = read_metrics(work.path)
    assert len(lines) == 6
    assert 5 < lines[0]["response_tokens"] < 9
    if bonus > 0:
        assert lines[-1]["response_tokens"] > 11
        assert lines[-1]["reward"] > lines[0]["reward"] + 2
    else:
        assert lines[-1]["response_tokens"] < 2
        assert lines[-1]["reward"] > lines[0]["reward"] + 3


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
