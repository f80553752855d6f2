"""PPO on several ranks, with the model whole on each and with DeepSpeed's shards, against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from salmon import models
from tests.ppo_rank import SHARES, in_step
from tests.ppo_world import MINIBATCHES, World, read_metrics, ready, relative, run, signalled, slow_gradient, weights
from tests.running import ROOT, SCRIPTS, launch

pytestmark = pytest.mark.ranks
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def two_ranks(world: World) -> Path:
    """Folder with what two ranks made."""
    (world.folder / "two-ranks").mkdir()
    done = launch(2, ROOT / "tests" / "ppo_rank.py", world.folder, world.base)
    assert done.returncode == 0, done.stderr
    return world.folder / "two-ranks"


def test_two_ranks_sum_to_the_gradient_of_one(world: World, two_ranks: Path) -> None:
    """Reference, defect 7. Also where one of the ranks has nothing to do in the last pass."""
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    for number, chosen in enumerate(MINIBATCHES):
        expected = slow_gradient(world, shared, [rollout for rollout in rollouts if rollout.place in chosen])
        assert relative(torch.load(two_ranks / f"{number}.pt", weights_only=True), expected) < 1e-5, chosen


def test_two_ranks_train_the_policy_of_one(world: World, policy: Path, two_ranks: Path) -> None:
    """Reference, defect 7. The same rollouts, therefore the same numbers up to the order of sums in float32.

    Six steps of Adam carry that rounding on (an element whose gradient is nothing but rounding moves by the learning
    rate in either direction), so the weights are compared as a whole: by how far they moved. Without
    synchronisation, or with other rollouts, the difference is as large as the movement itself.
    """
    start, one, two = (weights(folder) for folder in (world.adapter, policy, two_ranks / "policy"))
    assert relative(two - start, one - start) < 1e-3
    for found, expected in zip(read_metrics(two_ranks / "policy"), read_metrics(policy), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found["response_tokens"] == expected["response_tokens"]


def test_two_ranks_sample_in_step_what_one_samples(world: World, two_ranks: Path) -> None:
    """As under ZeRO-3, all ranks call the model equally often, with different shares, one of which is empty."""
    model = models.load_initial_policy(world.model, "cpu").double()
    first, second = (json.loads((two_ranks / f"lockstep{rank}.json").read_text()) for rank in (0, 1))
    for shares, (tokens, calls), (other_tokens, other_calls) in zip(SHARES, first, second, strict=True):
        assert calls == other_calls
        assert tokens + other_tokens == in_step(model, world.tokenizer, shares)[0]


class Payload:
    """What a pickle can do when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def plant(work: Path, mark: Path) -> list[Path]:
    """Put a payload into every pickle of the checkpoints; return their paths."""
    pickles = [file for file in work.rglob("*") if file.suffix in (".pt", ".pth", ".bin")]
    for file in pickles:
        torch.save(Payload(mark), file)
    assert pickles
    return pickles


IN_PIECES = """
import sys, train_policy
from salmon import likelihood, script
likelihood.LOGITS = 3000  # the output layer is called for some tokens at a time, and again in the backward pass
"""
SAYING_HOW_RANKS_SAMPLE = """
make_sampler = train_policy.make_sampler
def load(*arguments):
    sampler = make_sampler(*arguments)
    print("sampling", sampler.ranks, file=sys.stderr)
    return sampler
train_policy.make_sampler = load
"""


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2), (2, 1)])
def test_ranks_of_deepspeed_train_the_policy_of_one_process(
    world: World, policy: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    """ZeRO-2 and ZeRO-3 take the steps of a process without them, even if stopped and started again.

    Ranks of ZeRO-2 do not wait for each other while they sample.

    One rollout per pass: the gradients of a minibatch are those of all its passes. Until the stop, logits are computed
    for a few tokens at a time; afterwards, for all tokens of a pass.
    """
    output = tmp_path / "policy"
    options = {"deepspeed": ROOT / f"profiles/deepspeed/zero{stage}.json", "tokens-per-pass": 1}
    arguments = world.arguments(output, options)
    (tmp_path / "stopped.py").write_text(IN_PIECES + SAYING_HOW_RANKS_SAMPLE + signalled("SIGTERM", 3))
    stopped = launch(ranks, tmp_path / "stopped.py", *arguments)
    assert stopped.returncode == 1, stopped.stderr
    assert f"sampling {'lockstep' if stage == 3 else 'apart'}" in stopped.stderr
    assert "stopped by SIGTERM after step 3; a checkpoint is written" in stopped.stderr
    planted = [] if ranks > 1 else plant(tmp_path / ".work" / "policy", tmp_path / "ran")
    budgets = {"tokens-per-pass": 100, "tokens-per-forward-pass": 150}  # of another size
    done = launch(ranks, SCRIPTS / "train_policy.py", *world.arguments(output, options | budgets), real=True)
    assert done.returncode == 0, done.stderr
    assert ("which is damaged" if planted else "resuming after step 3") in done.stderr
    assert not (tmp_path / "ran").exists()
    first, one, two = (weights(folder) for folder in (world.adapter, policy, output))
    assert relative(two - first, one - first) < 1e-3
    for found, expected in zip(read_metrics(output), read_metrics(policy), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_rank_of_zero3_that_has_nothing_to_do(world: World, tmp_path: Path) -> None:
    """Minibatches of three rollouts, one per rank and pass: all ranks call the output layer equally often."""
    few = {"rollout_batch_size": 6, "minibatch_size": 3, "max_steps": 2, "warmup_steps": 0}
    status, log = run(world.arguments(tmp_path / "one", **few))
    assert status == 0, log
    options = {"deepspeed": ROOT / "profiles/deepspeed/zero3.json", "tokens-per-pass": 1}
    (tmp_path / "pieces.py").write_text(IN_PIECES + "script.run(train_policy.main, train_policy.Arguments)")
    done = launch(2, tmp_path / "pieces.py", *world.arguments(tmp_path / "two", options, **few))
    assert done.returncode == 0, done.stderr
    for found, expected in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_sharding_of_a_four_bit_model_trains_as_two_whole_ones(world: World, tmp_path: Path, sharding: str) -> None:
    """NF4 and bfloat16, as in the paper's run: two ranks with shards of states or model, and two with whole models."""
    model = world.model.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    for name, more in (("whole", {}), ("shards", {"deepspeed": ROOT / f"profiles/deepspeed/{sharding}.json"})):
        # One update: in bfloat16 the second would already differ in its last bits.
        only = {"max_steps": 1, "warmup_steps": 0, "inner_epochs": 1, "minibatch_size": world.ppo().rollout_batch_size}
        arguments = world.arguments(tmp_path / name, {"model": model.model_dump_json(), **more}, **only)
        done = launch(2, SCRIPTS / "train_policy.py", *arguments)
        assert done.returncode == 0, done.stderr
    (one,), (two,) = (read_metrics(tmp_path / name) for name in ("whole", "shards"))
    for name in ("score", "response_tokens", "kl_sequence", "value_error"):  # as it was before the update
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for name in ("gradient_norm", "value_loss", "policy_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-2), name
    # Each adapter has moved, and in the same direction. Adam's first step has the size of the rate in every element, so
    # one whose gradient is mostly rounding in bfloat16 goes either way.
    first, whole, shards = (
        load_file(each / WEIGHTS) for each in (world.adapter, tmp_path / "whole", tmp_path / "shards")
    )
    for name, before in first.items():
        moved, expected = (after[name].double().flatten() - before.double().flatten() for after in (shards, whole))
        assert moved.norm() > 0, name
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.9, name
