"""Waiting of ranks for each other and padding, by counting tokens, with the product's own divisions into passes.

    python benchmarks/balance.py [--ranks 8 48] [--budgets 2048 4096 8192] [--minibatches 200]

No model runs. Rollouts are as long as questions and answers of OASST1 (four characters count as a token; the prompt's
preamble is added), and their numbers are the paper's. The table compares passes of one or two rollouts, each computed
by the rank that sampled it (this project's first way), with `batching.passes`, which divides each minibatch again.

It prints means over minibatches: passes of the rank with most passes, relative to the mean rank; and the tokens,
padding included, that the slowest rank computes in each pass (under ZeRO all wait for it), relative to the mean rank's
tokens without padding.

The second table does the same for a step of the reward model, with the pairs of benchmarks/reward_model.py: passes as
one rectangle each, and with the longer and the shorter texts in separate ones wherever that saves a token, as on a
CPU (`reward_model.collate_pairs`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts")]

from salmon import reward_model, training  # noqa: E402
from salmon.batching import batches, dealt, passes  # noqa: E402
from salmon.config import Ppo  # noqa: E402

PREAMBLE = 150
PAIRS = 64
MAX_LENGTH, QUERY, RESPONSE, FRAME = 1280, 128, 768, 200
"""Tokens of a reward model's text, question and answer at most, and of its template and principles."""
Parts = list[list[list[int]]]
"""Indices of rollouts, by pass and rank."""


def real_lengths(settings: Ppo) -> np.ndarray:
    """Numbers of tokens of query and response, [N, 2], as for questions of OASST1 and their answers."""
    messages = pl.read_parquet(ROOT / "tests/data/oasst1/validation_sample.parquet")
    tokens = messages.select("message_id", asked=pl.col("text").str.len_chars() // 4 + PREAMBLE)
    answers = messages.filter(pl.col("role") == "assistant").join(tokens, left_on="parent_id", right_on="message_id")
    said = (pl.col("text").str.len_chars() // 4).clip(4, settings.response_length)
    return answers.filter(pl.col("asked") <= settings.query_length).select("asked", said).to_numpy()


def real_pairs(pairs: int) -> list[tuple[int, int]]:
    """Numbers of tokens of both texts of the reward model's pairs: a question of OASST1 with the answers to any two."""
    random = np.random.default_rng(0)
    messages = pl.read_parquet(ROOT / "tests/data/oasst1/validation_sample.parquet")
    tokens = messages.select("message_id", asked=(pl.col("text").str.len_chars() // 4).clip(4, QUERY))
    answers = messages.filter(pl.col("role") == "assistant").join(tokens, left_on="parent_id", right_on="message_id")
    said = (answers["text"].str.len_chars() // 4).clip(4, RESPONSE).to_numpy()
    asked = answers["asked"].to_numpy()
    found = []
    for row, one, two in random.integers(0, len(said), (pairs, 3)):
        first, second = (min(MAX_LENGTH, FRAME + int(asked[row]) + int(said[answer])) for answer in (one, two))
        found.append((first, second))
    return found


def where_sampled(ranks: Sequence[list[int]], minibatch: set[int], sizes: Sequence[int], rows: int) -> Parts:
    """Passes of `rows` rollouts; each rank computes those of the minibatch that it has sampled."""
    of_ranks = []
    for places in ranks:
        mine = [place for place in places if place in minibatch]
        of_ranks.append([[mine[row] for row in part] for part in batches([sizes[place] for place in mine], rows)])
    most = max(map(len, of_ranks))
    return [[parts[number] if number < len(parts) else [] for parts in of_ranks] for number in range(most)]


def measure(parts: Parts, sizes: Sequence[int]) -> tuple[float, float]:
    """Passes of the fullest rank relative to the mean rank; tokens of the slowest ranks relative to the mean rank."""
    ranks = len(parts[0])
    made = [sum(bool(each[rank]) for each in parts) for rank in range(ranks)]
    waited = sum(max(len(part) * max((sizes[place] for place in part), default=0) for part in each) for each in parts)
    real = sum(sizes[place] for each in parts for part in each for place in part) / ranks
    return max(made) / float(np.mean(made)), waited / real


def padding(size: int, ranks: int, budget: int, steps: int) -> tuple[float, float]:
    """Tokens of the slowest rank of each pass relative to the mean rank's without padding: one rectangle, and two."""
    lengths = real_pairs(size * steps)
    layout = range(len(lengths)), [2 * max(pair) for pair in lengths], size, budget, ranks

    def in_one(part: list[int]) -> int:
        return 2 * len(part) * max(max(lengths[row]) for row in part)

    def in_two(part: list[int]) -> int:
        return reward_model.tokens_of_pairs([lengths[row] for row in part], reward_model.Apart())

    found, passes = [], training.passes_per_step(*layout)
    for cost in (in_one, in_two):
        parts = [*map(cost, training.micro_batches(*layout, passes, cost))]
        found.append(sum(max(parts[start : start + ranks]) for start in range(0, len(parts), ranks)))
    real = sum(map(sum, lengths)) / ranks
    return found[0] / real, found[1] / real


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 8192], help="maximum tokens per pass")
    parser.add_argument("--minibatches", type=int, default=200)
    arguments = parser.parse_args()
    settings = Ppo.model_validate(yaml.safe_load((ROOT / "config.yaml").read_text())["ppo"])
    lengths, random = real_lengths(settings), np.random.default_rng(0)
    print(f"{settings.rollout_batch_size} rollouts in minibatches of {settings.minibatch_size}\n")
    print("| GPUs | a pass is | passes, fullest / mean | tokens waited for / mean |")
    print("| --- | --- | --- | --- |")
    for ranks in arguments.ranks:
        ways = [f"{what} where it was sampled" for what in ("a rollout", "two rollouts")]
        found: dict[str, list[tuple[float, float]]] = {
            way: [] for way in (*ways, *(f"{budget} tokens, dealt out" for budget in arguments.budgets))
        }
        for _ in range(arguments.minibatches):
            drawn = lengths[random.integers(0, len(lengths), settings.rollout_batch_size)]
            sizes = drawn.sum(1).tolist()
            minibatch = random.permutation(len(sizes))[: settings.minibatch_size].tolist()
            sampled = [dealt(drawn[:, 0].tolist(), rank, ranks) for rank in range(ranks)]
            for rows, way in enumerate(ways, 1):
                found[way].append(measure(where_sampled(sampled, set(minibatch), sizes, rows), sizes))
            chosen = [sizes[place] for place in minibatch]
            for budget in arguments.budgets:
                found[f"{budget} tokens, dealt out"].append(measure(passes(chosen, budget, ranks), chosen))
        for way, numbers in found.items():
            fullest, waited = np.mean(numbers, axis=0)
            print(f"| {ranks} | {way} | {fullest:.2f} | {waited:.2f} |")
    print("\nPairs of the reward model, tokens waited for / mean\n")
    print("| pairs per step | GPUs | a pass is | one rectangle | two |\n| --- | --- | --- | --- | --- |")
    for ranks in (1, *arguments.ranks):
        for budget in arguments.budgets:
            size = PAIRS if PAIRS % ranks == 0 else 2 * ranks
            one, two = padding(size, ranks, budget, arguments.minibatches)
            print(f"| {size} | {ranks} | {budget} tokens | {one:.2f} | {two:.2f} |")


if __name__ == "__main__":
    main()
