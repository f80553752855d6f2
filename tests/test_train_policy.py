"""Whole runs of PPO by its script: what they write, interruptions, wrong input, and that the policy learns."""

import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from salmon import ppo
from salmon.config import Model
from salmon.optimization import ReplicatedOptimizer
from salmon.principles import WeightedPrinciple
from salmon.sampling import TransformersSampler
from salmon.shared_base import SharedBase
from salmon.work import WorkFolder
from tests import forks
from tests.ppo_world import (
    CHECKPOINT,
    LORA,
    STEPS,
    World,
    read_board,
    read_metrics,
    relative,
    run,
    signalled,
    weights,
)
from tests.running import SCRIPTS, environment, failing, on_a_full_disk


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
    """Other batches and memory on the GPU give the same run up to rounding; recomputing calls the layers more often."""
    start, forward = weights(world.adapter), LlamaMLP.forward
    calls = dict.fromkeys(("false", "true"), 0)
    for recomputed in calls:

        def counted(*arguments: Any, recomputed: str = recomputed, **named: Any) -> Any:
            calls[recomputed] += 1
            return forward(*arguments, **named)

        hardware = {"sampling-batch-size": 8, "tokens-per-pass": 1, "gradient-checkpointing": recomputed}
        with mock.patch.object(LlamaMLP, "forward", counted):
            status, log = run(world.arguments(tmp_path / recomputed, hardware))
        assert status == 0, log
        assert relative(weights(tmp_path / recomputed) - start, weights(policy) - start) < 1e-3
    assert calls["true"] > calls["false"]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(world: World, policy: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "policy", tmp_path / ".work" / "policy"
    # After a checkpoint, in the middle of the next step but one: a step is done that no checkpoint holds.
    line = [sys.executable, "-c", signalled("SIGKILL", CHECKPOINT + 2), *world.arguments(output)]
    killed = forks.run(line, env=environment())
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    before = (work / "metrics.jsonl").read_text()
    assert before.count("\n") == CHECKPOINT + 1

    status, log = run(world.arguments(output))
    assert status == 0, log
    assert f"resuming after step {CHECKPOINT}" in log
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
    said = failing([sys.executable, "-c", signalled("SIGTERM", 3), *world.arguments(output)])
    assert "stopped by SIGTERM after step 3; a checkpoint is written" in said
    assert not output.exists()
    # On a GPU with less memory: the same up to rounding.
    status, log = run(world.arguments(output, {"tokens-per-pass": 1, "tokens-per-forward-pass": 100}))
    assert status == 0, log
    assert "resuming after step 3" in log
    start = weights(world.adapter)
    assert relative(weights(output) - start, weights(policy) - start) < 1e-3
    for found, expected in zip(read_metrics(output), read_metrics(policy), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_full_disk_is_an_error_and_leaves_no_half_checkpoint(world: World, policy: Path, tmp_path: Path) -> None:
    """A limit of 20,000 bytes per file stands in for the full disk: weights do not fit, metrics do."""
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
    """A run of 3 steps that finished all of them, but could not write the policy."""
    with mock.patch.object(SharedBase, "save_policy", side_effect=OSError(28, "No space left on device")):
        status, log = run(world.arguments(tmp_path / "policy", max_steps=3, save_steps=2))
    assert status == 1
    assert "No space left" in log
    assert not (tmp_path / "policy").exists()
    return tmp_path / "policy"


def test_a_checkpoint_after_the_last_step(world: World, unfinished: Path) -> None:
    """Reference, defect 16: also where the number of steps is not a multiple of save_steps."""
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
        assert run(other.arguments(interrupted, max_steps=1, warmup_steps=0))[0] == 1
    if change:
        change(other)
    for output in (interrupted, fresh):
        status, log = run(other.arguments(output, max_steps=1, warmup_steps=0, **settings))
        assert status == 0, log
        assert "continuing" not in log
        assert ("starting again" in log) == (output == interrupted)
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
    "all prompts too long": (lambda w: ({}, {"query_length": 1}), "query_length is 1, and .* no instruction fits"),
    "no reward model": (lambda w: ({"reward-model": w.folder / "none"}, {}), "none does not exist; build it first"),
    "no head": (lambda w: ({"reward-model": without_head(w)}, {}), "holds no head"),
    "unknown key": (lambda w: ({}, {"temprature": 1.0}), "ppo.temprature: unknown key"),
    "value out of range": (lambda w: ({}, {"temperature": 0}), "ppo.temperature: .*greater than or equal to 0.001"),
    "batches do not divide": (
        lambda w: ({}, {"minibatch_size": 3}),
        r"ppo\.rollout_batch_size: \d+ is not a multiple of ppo\.minibatch_size 3",
    ),
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
    """The runs differ only in the sign of the length bonus: responses become longer, or shorter."""
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
        ReplicatedOptimizer(shared, settings.max_grad_norm),
        TransformersSampler(world.tokenizer, "cpu", batch_size=32),
        world.tokenizer,
        prompts,
        [WeightedPrinciple(dimension="d", definition="d", weight=1)],
        settings,
        world.policy_prompt.model_copy(update={"stop": []}),
        work,
        tokens_per_pass=1024,
        tokens_per_forward_pass=4096,
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
