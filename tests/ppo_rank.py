"""What each rank does in tests/test_ppo_ranks.py: gradients of minibatches, sampling in step, a run of the script."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import train_policy
from salmon import distributed, models, ppo, script
from salmon.generation import generate
from salmon.optimization import ReplicatedOptimizer
from tests.ppo_world import MINIBATCHES, World, flat_gradient, ready

SHARES = (((5, 9, 30, 2, 14, 5, 8), (3, 22)), ((9, 4, 4), ()))  # prompt lengths of two ranks, in two cases


def in_step(model: Any, tokenizer: Any, ranks: tuple[tuple[int, ...], ...]) -> tuple[list[list[int]], int]:
    """Sample in lockstep for prompts of these ranks' lengths: tokens, and number of model calls."""
    lengths = [length for of_rank in ranks for length in of_rank]
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    sampled = generate(
        model,
        tokenizer,
        [[1 + place % 7 for place in range(length)] for length in lengths],
        [100 * length for length in lengths],
        batch_size=3,
        max_new_tokens=[1 + length * 5 % 11 for length in lengths],
        temperature=1.0,
        device="cpu",
        ranks="lockstep",
    )
    hook.remove()
    return [each.tokens for each in sampled], len(calls)


def be_a_rank(folder: Path, base: Path) -> None:
    distributed.init()
    world = World(folder, base)
    shared = world.shared()
    rollouts = ready(world, shared, range(8))
    for number, chosen in enumerate(MINIBATCHES):
        minibatch = [rollout for rollout in rollouts if rollout.place in chosen]
        ppo.accumulate_gradients(
            shared, ReplicatedOptimizer(shared, 1.0), minibatch, world.ppo(), 30 if number == 0 else 1
        )
        distributed.sum_gradients(shared.trained())
        gradient = flat_gradient(shared)
        if distributed.is_main():
            torch.save(gradient, folder / "two-ranks" / f"{number}.pt")
    model = models.load_initial_policy(world.model, "cpu").double()
    found = [in_step(model, world.tokenizer, (shares[distributed.rank()],)) for shares in SHARES]
    (folder / "two-ranks" / f"lockstep{distributed.rank()}.json").write_text(json.dumps(found))
    sys.argv = ["train_policy.py", *world.arguments(folder / "two-ranks" / "policy")]
    script.run(train_policy.main, train_policy.Arguments)


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
