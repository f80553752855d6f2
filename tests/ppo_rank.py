"""What each rank does in tests/test_ppo_ranks.py: gradients of minibatches, and a whole run of the script."""

import sys
from pathlib import Path

import torch

import train_policy
from salmon import distributed, ppo, script
from salmon.optimization import ReplicatedOptimizer
from tests.ppo_world import MINIBATCHES, World, flat_gradient, ready


def be_a_rank(folder: Path, base: Path) -> None:
    distributed.init()
    world = World(folder, base)
    shared = world.shared()
    rollouts = ready(world, shared, range(distributed.rank(), 8, distributed.world()))
    for number, chosen in enumerate(MINIBATCHES):
        mine = [rollout for rollout in rollouts if rollout.place in chosen]
        tokens = sum(len(rollout.response) for rollout in mine)
        total = float(distributed.sum_over_ranks(torch.tensor(tokens)))
        ppo.accumulate_gradients(shared, ReplicatedOptimizer(shared, 1.0), mine, total, world.ppo(), 2)
        distributed.sum_gradients(shared.trained())
        gradient = flat_gradient(shared)
        if distributed.is_main():
            torch.save(gradient, folder / "two-ranks" / f"{number}.pt")
    sys.argv = ["train_policy.py", *world.arguments(folder / "two-ranks" / "policy")]
    script.run(train_policy.main, train_policy.Arguments)


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), Path(sys.argv[2]))
