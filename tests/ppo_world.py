"""What the tests of PPO share: a small world of files, made-up rollouts, and the slow gradient."""

import contextlib
import functools
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import torch
from peft import TaskType
from safetensors.torch import load_file

import train_policy
from salmon import adapters, models, ppo, script
from salmon.config import Lora, Model, PolicyPrompt, Ppo
from salmon.principles import WeightedPrinciple, read_weighted
from salmon.shared_base import SharedBase
from salmon.tokenizers import load_tokenizer

LORA = Lora(r=4)
STEPS = 6  # of the settings below: 2 epochs of 25 prompts in steps of 8
CHECKPOINT = 4  # steps between checkpoints; 6 is not a multiple of it
TYPES = ["general", "reasoning", "red_teaming"]


class World:
    """A small folder with all that the script reads, and its command line."""

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
        policy = adapters.add_lora(models.load_base(bare, "cpu"), LORA, TaskType.CAUSAL_LM)
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
        return load_tokenizer(self.model)

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
            "tokens-per-pass": 100,
            "tokens-per-forward-pass": 300,
            **(options or {}),
        }
        return [str(word) for key, value in found.items() if value is not None for word in (f"--{key}", value)]


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """A script sets up logging as if the process were its own."""
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


def made_up(places: Sequence[int]) -> list[ppo.Rollout]:
    """Rollouts of various lengths, before advantages are estimated; a place always gives the same one."""
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


def ready(world: World, shared: SharedBase, places: Sequence[int]) -> list[ppo.Rollout]:
    """Made-up rollouts with advantages; log probabilities and values are near those of the models."""
    found = made_up(places)
    ppo.measure(shared, found, 0.7, 40)
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


def slow_weights(rollout: ppo.Rollout) -> list[float]:
    """How much more probable each token is to the trainer than to the engine that drew it, at most twice."""
    if not len(rollout.sampled):
        return [1.0] * len(rollout.response)
    told = zip(rollout.logprobs.tolist(), rollout.sampled.tolist(), strict=True)
    return [min(2.0, math.exp(own) / math.exp(engine)) for own, engine in told]


def slow_gradient(world: World, shared: SharedBase, rollouts: Sequence[ppo.Rollout]) -> torch.Tensor:
    """The gradient of the paper's loss: one token after the other, a mean over all real tokens."""
    settings, total = world.ppo(), sum(len(rollout.response) for rollout in rollouts)
    for rollout in rollouts:
        with shared.use("policy"):
            (logprobs,), _ = shared.logprobs([rollout.query], [rollout.response], 0.7)
            loss = torch.zeros(())
            tokens = zip(logprobs, rollout.logprobs, rollout.advantages, slow_weights(rollout), strict=True)
            for new, old, advantage, weight in tokens:
                ratio = (new - old).exp()
                loss = loss - weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (loss / total).backward()
        with shared.use("value"):
            (values,) = shared.values([rollout.query], [rollout.response])
            loss = torch.zeros(())
            for new, old, target in zip(values, rollout.values, rollout.returns, strict=True):
                clipped = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
                loss = loss + 0.5 * torch.maximum((new - target) ** 2, (clipped - target) ** 2)
            (settings.value_coefficient * loss / total).backward()
    return flat_gradient(shared)


def lengths(rollouts: Sequence[ppo.Rollout]) -> list[tuple[int, int]]:
    return [(rollout.place, len(rollout.response)) for rollout in rollouts]


# Rollouts' places, by minibatch; the last two have one rollout per pass, so one of two ranks has nothing to do.
MINIBATCHES = [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 5], [5]]


def signalled(name: str, step: int) -> str:
    """A program: the script, whose last rank gets a signal in the middle of a step."""
    return f"""
import os, signal, train_policy
from salmon import distributed, ppo, script
measure = ppo.measure
def ask(*arguments):
    ask.calls += 1
    if ask.calls == {step} and distributed.rank() == distributed.world() - 1:
        os.kill(os.getpid(), signal.{name})
    measure(*arguments)
ask.calls = 0
ppo.measure = ask
script.run(train_policy.main, train_policy.Arguments)
"""
