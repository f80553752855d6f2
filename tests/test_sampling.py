"""The interface for samplers: our own loop, and another sampler that RL uses unchanged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from salmon import models, ppo
from salmon.config import Model
from salmon.generation import Generation, generate
from salmon.optimization import ReplicatedOptimizer
from salmon.sampling import Sampler, TransformersSampler
from salmon.shared_base import SharedBase
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder
from tests.ppo_world import World


def test_a_sampler_gives_the_rows_of_single_calls_in_their_order(tiny_model: Path) -> None:
    settings = Model(base=str(tiny_model), quantization="none", dtype="float32")
    model, tokenizer = models.load_initial_policy(settings, "cpu"), load_tokenizer(settings)
    prompts = [tokenizer(text)["input_ids"] for text in ("Why?", "Which of the planets has rings?", "A", "In orbit")]
    limits = [9, 3, 12, 1]
    sampler = TransformersSampler(tokenizer, "cpu", batch_size=3, model=model)
    with mock.patch("salmon.sampling.generate", side_effect=generate) as calls:
        found = sampler.sample(prompts, [5, 6, 7, 8], max_new_tokens=limits, temperature=0.8, top_p=0.9, stop=["e"])
    assert calls.call_count == 1
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        (alone,) = generate(
            model,
            tokenizer,
            [prompt],
            [5 + row],
            batch_size=1,
            max_new_tokens=limit,
            temperature=0.8,
            top_p=0.9,
            stop=["e"],
            device="cpu",
        )
        assert found[row] == alone
    assert sampler.sample([], [], max_new_tokens=[], temperature=1.0) == []


def test_a_sampler_without_a_model_says_so(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(Model(base=str(tiny_model), quantization="none"))
    with pytest.raises(ValueError, match="call sync"):
        TransformersSampler(tokenizer, "cpu", batch_size=1).sample([[1]], [0], max_new_tokens=[1], temperature=1.0)


class Canned:
    """A sampler that answers from a list, and remembers what it was asked for and given."""

    def __init__(self, answers: Sequence[list[int]], end: int) -> None:
        self.answers, self.end = answers, end
        self.policies: list[nn.Module] = []
        self.weights: list[torch.Tensor] = []
        self.asked: list[dict[str, Any]] = []

    def sync(self, policy: nn.Module) -> None:
        assert isinstance(policy, SharedBase)
        self.policies.append(policy)
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in policy.trained()]))

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **options: Any) -> list[Generation]:
        assert len(self.policies) == len(self.asked) + 1  # given the policy before every step
        self.asked.append({"prompts": prompts, "seeds": seeds, **options})
        tokens = [[*self.answers[row % len(self.answers)], self.end] for row in range(len(prompts))]
        return [Generation(one, "x " * len(one), "eos", [-1.0] * len(one)) for one in tokens]


def test_another_sampler_drives_ppo(world: World, tmp_path: Path) -> None:
    shared, settings = world.shared(), world.ppo(max_steps=2, warmup_steps=0)
    sampler = Canned([[7, 8, 9], [10, 11], [12, 13, 14, 15]], world.tokenizer.eos_token_id)
    as_protocol: Sampler = sampler
    work = WorkFolder(tmp_path / "policy")
    work.open("this run")
    ppo.train(
        shared,
        ReplicatedOptimizer(shared, settings.max_grad_norm),
        as_protocol,
        world.tokenizer,
        world.read_prompts(),
        world.principles,
        settings,
        world.policy_prompt,
        work,
        tokens_per_pass=100,
        tokens_per_forward_pass=400,
    )
    assert len(sampler.asked) == 2
    assert all(len(asked["prompts"]) == settings.rollout_batch_size for asked in sampler.asked)
    assert all(asked["max_new_tokens"] == [settings.response_length] * len(asked["seeds"]) for asked in sampler.asked)
    assert not set(sampler.asked[0]["seeds"]) & set(sampler.asked[1]["seeds"])
    assert all(asked["temperature"] == settings.temperature for asked in sampler.asked)
    assert (sampler.weights[1] - sampler.weights[0]).abs().max() > 0  # the second weights are those of a later step
    lines = (work.path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"finished": 1.0' in lines[0]
