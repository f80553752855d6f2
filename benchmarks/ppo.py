"""Seconds and memory of a step of PPO after sampling: the authors' way, the changes one by one, and the product.

    python benchmarks/ppo.py [--rollouts 12] [--rounds 3] [--threads 2]

A Llama of about 9M parameters with random weights, in float32 on a CPU; policy, reference, value and reward model are
LoRA on it. Rollouts are as long as questions and answers of OASST1 (four characters count as a token; the prompt's
preamble is added). The limits are the paper's: queries of 256 tokens, responses of 1,024, reward texts of 1,280. A step
measures the rollouts (policy, reference, values), scores them, and makes one update of policy and value model with all
of them.

The authors' way pads every text to its limit, and computes all logits for all tokens, including those of the value and
reward models, which are not used. Each row below removes one of these costs; the last is `salmon.ppo`. All ways hold
the same number of padded tokens at a time. Gradients are compared with those of the first way.

Each way runs in a separate process, in turn, `rounds` times; the table shows medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import TaskType
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts"), str(ROOT)]

from benchmarks.balance import real_lengths  # noqa: E402
from salmon import adapters, ppo, ppo_math  # noqa: E402
from salmon import models as salmon_models  # noqa: E402
from salmon.config import Lora, Model, Ppo  # noqa: E402
from salmon.optimization import ReplicatedOptimizer  # noqa: E402
from salmon.shared_base import SharedBase  # noqa: E402

VOCABULARY = 16_384
LORA = Lora(r=16)
ROWS = 2  # texts of full length held at a time
WAYS = {
    "authors": "the authors' way",
    "heads": "no logits of value and reward model",
    "responses": "logits of responses only",
    "salmon": "passes by length, no padding to the limits: the product",
}


def build(folder: Path) -> None:
    """A base model and a reward model on it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.05,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder / "base"))
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, "0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **{"eos_token": "2"}).save_pretrained(str(folder / "base"))
    base = Model(base=str(folder / "base"), quantization="none", dtype="float32")
    for name, model in (
        ("reward", salmon_models.new_reward_model(base, LORA, "cpu", 1)),
        ("adapter", adapters.add_lora(salmon_models.load_base(base, "cpu"), LORA, TaskType.CAUSAL_LM)),
    ):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.02)
        model.save_pretrained(str(folder / name))


def read_settings(rollouts: int) -> Ppo:
    """The paper's lengths; one update with all rollouts."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())["ppo"]
    raw |= {"rollout_batch_size": rollouts, "minibatch_size": rollouts, "inner_epochs": 1, "temperature": 1.0}
    return Ppo.model_validate(raw)


def draw(rollouts: int, settings: Ppo) -> tuple[list[ppo.Rollout], list[list[int]]]:
    """Rollouts that are neither measured nor scored, and the reward model's texts for them.

    Their lengths are evenly spaced quantiles of the real ones, so that few rollouts stand for all.
    """
    random = np.random.default_rng(0)
    lengths = real_lengths(settings)
    ordered = lengths[np.argsort(lengths.sum(1), kind="stable")]
    places = ((np.arange(rollouts) + 0.5) / rollouts * len(ordered)).astype(int)
    found, texts = [], []
    for place, (asked, said) in enumerate(random.permutation(ordered[places]).tolist()):
        query, response = (random.integers(3, VOCABULARY, number).tolist() for number in (asked, said))
        found.append(ppo.Rollout(place, query, "", "general", 0.0, response, "", True))
        read = min(len(response), settings.reward_response_length) + 200  # 200 tokens for template and principles
        texts.append(random.integers(3, VOCABULARY, min(read, settings.reward_max_length)).tolist())
    return found, texts


class Plain:
    """The authors' way, without the parts that are switched off.

    Args:
        shared: the models.
        heads: whether value and reward models compute logits.
        everywhere: whether the policy computes logits for all tokens.
    """

    def __init__(self, shared: SharedBase, settings: Ppo, *, heads: bool, everywhere: bool) -> None:
        self.shared, self.settings, self.heads, self.everywhere = shared, settings, heads, everywhere

    def inputs(self, queries: Sequence[list[int]], responses: Sequence[list[int]], left: int, right: int) -> Any:
        """Queries padded on the left and responses on the right, to the limits."""
        tokens = torch.zeros(len(queries), left + right, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            tokens[row, left - len(query) : left + len(response)] = torch.tensor([*query, *response])
            mask[row, left - len(query) : left + len(response)] = 1
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def logprobs(self, chosen: Sequence[ppo.Rollout], *, with_entropy: bool) -> tuple[torch.Tensor, Any]:
        """[B, response_length], of policy or reference."""
        right = self.settings.response_length
        inputs = self.inputs([r.query for r in chosen], [r.response for r in chosen], self.settings.query_length, right)
        keep = 0 if self.everywhere else right + 1
        logits = self.shared.lm(**inputs, use_cache=False, logits_to_keep=keep).logits.float()[:, -right - 1 : -1]
        return ppo_math.token_logprobs(logits, inputs["input_ids"][:, -right:], 1.0, with_entropy=with_entropy)

    def head(self, inputs: Any, weight: torch.Tensor) -> torch.Tensor:
        """Values at all tokens, with unused logits."""
        if not self.heads:
            found: torch.Tensor = (
                self.shared.lm.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
            )
            return (found @ weight.T).squeeze(-1)
        output = self.shared.lm(**inputs, use_cache=False, output_hidden_states=True)
        states: torch.Tensor = output.hidden_states[-1]
        unused: torch.Tensor = output.logits
        return (states @ weight.T).squeeze(-1) + 0.0 * unused.mean(-1)

    def values(self, chosen: Sequence[ppo.Rollout]) -> torch.Tensor:
        """[B, response_length]."""
        right = self.settings.response_length
        inputs = self.inputs([r.query for r in chosen], [r.response for r in chosen], self.settings.query_length, right)
        found = self.head(inputs, self.shared.value_head)
        return found[:, -right - 1 : -1]

    def step(self, rollouts: list[ppo.Rollout], texts: list[list[int]], optimizer: ReplicatedOptimizer) -> torch.Tensor:
        """Measure, score, update; returns the gradient."""
        shared, settings = self.shared, self.settings
        parts = [rollouts[start : start + ROWS] for start in range(0, len(rollouts), ROWS)]
        with torch.no_grad():
            for part in parts:
                with shared.use("policy"):
                    logprobs, entropy = self.logprobs(part, with_entropy=True)
                with shared.use("reference"):
                    reference, _ = self.logprobs(part, with_entropy=True)
                with shared.use("value"):
                    values = self.values(part)
                for row, each in enumerate(part):
                    number = len(each.response)
                    each.logprobs, each.entropy = logprobs[row, :number], entropy[row, :number]
                    each.reference, each.values = reference[row, :number], values[row, :number]
            with shared.use("reward"):
                for start in range(0, len(texts), ROWS):
                    rows = texts[start : start + ROWS]
                    inputs = self.inputs([[]] * len(rows), rows, 0, settings.reward_max_length)
                    scores = self.head(inputs, shared.reward_head)
                    for row, text in enumerate(rows):
                        rollouts[start + row].reward = scores[row, len(text) - 1].item()
        ppo.estimate_advantages(rollouts, settings)
        total = float(sum(len(each.response) for each in rollouts))
        for part in parts:
            width = settings.response_length

            def padded(rows: Sequence[torch.Tensor], width: int = width) -> torch.Tensor:
                return torch.stack([torch.cat([row, torch.zeros(width - len(row))]) for row in rows])

            mask = padded([torch.ones(len(each.response)) for each in part])
            names = ("logprobs", "advantages", "values", "returns")
            old, advantages, old_values, returns = (padded([getattr(each, name) for each in part]) for name in names)
            with shared.use("policy"):
                logprobs, _ = self.logprobs(part, with_entropy=True)
                optimizer.backward(ppo_math.policy_loss(logprobs, old, advantages, mask, settings.clip, total)[0])
            with shared.use("value"):
                loss = ppo_math.value_loss(self.values(part), old_values, returns, mask, settings.value_clip, total)
                optimizer.backward(settings.value_coefficient * loss)
        return gradient(shared)


def product(
    shared: SharedBase, settings: Ppo, rollouts: list[ppo.Rollout], texts: list[list[int]], budget: int
) -> torch.Tensor:
    """The same with `salmon.ppo`; texts are tokenised in advance, so the tokeniser is not measured."""
    ppo.measure(shared, rollouts, 1.0, budget)
    with torch.no_grad(), shared.use("reward"):
        for part in ppo.parts(rollouts, [len(text) for text in texts], budget):
            for each, score in zip(
                part.rollouts, shared.rewards([texts[each.place] for each in part.rollouts]).tolist(), strict=True
            ):
                each.reward = score
    ppo.estimate_advantages(rollouts, settings)
    ppo.accumulate_gradients(shared, ReplicatedOptimizer(shared, 1.0), rollouts, settings, budget)
    return gradient(shared)


def gradient(shared: SharedBase) -> torch.Tensor:
    """All gradients; clears them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in shared.trained() if parameter.grad is not None])
    for parameter in shared.trained():
        parameter.grad = None
    return flat


def run(way: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Run one way in this process; print seconds and peak, and write the gradient."""
    torch.set_num_threads(arguments.threads)
    settings = read_settings(arguments.rollouts)
    model = Model(base=str(folder / "base"), adapter=str(folder / "adapter"), quantization="none", dtype="float32")
    shared = SharedBase(model, LORA, folder / "reward", torch.device("cpu"), seed=0)
    rollouts, texts = draw(arguments.rollouts, settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    if way == "salmon":
        budget = ROWS * (settings.query_length + settings.response_length)
        found = product(shared, settings, rollouts, texts, budget)
    else:
        plain = Plain(shared, settings, heads=way == "authors", everywhere=way in ("authors", "heads"))
        found = plain.step(rollouts, texts, ReplicatedOptimizer(shared, 1.0))
    seconds = time.perf_counter() - began
    torch.save(found, folder / f"{way}.pt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tokens = sum(len(each.query) + len(each.response) for each in rollouts)
    print(json.dumps({"seconds": seconds, "peak": peak / 2**20, "tokens": tokens}))


def in_turn(ways: Sequence[str], folder: str, rounds: int) -> dict[str, dict[str, float]]:
    """Run this command's script once per way and round, each in a separate process; returns medians."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, numbers in found.items():
            line = [sys.executable, *sys.argv, "--way", way, "--folder", folder]
            done = subprocess.run(line, check=False, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            numbers.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        way: {key: statistics.median(each[key] for each in numbers) for key in numbers[0]}
        for way, numbers in found.items()
    }


def main() -> None:
    """Print the table, or run one way of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=[*WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run(arguments.way, arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        found = in_turn([*WAYS], folder, arguments.rounds)
        gradients = {way: torch.load(Path(folder) / f"{way}.pt", weights_only=True) for way in WAYS}
        first = gradients["authors"]
        mean = found["salmon"]["tokens"] / arguments.rollouts
        print(f"{arguments.rollouts} rollouts of {mean:.0f} tokens on average\n")
        print("| | seconds per step | speed | peak memory | gradient differs by |")
        print("| --- | --- | --- | --- | --- |")
        for way, one in found.items():
            speed, away = found["authors"]["seconds"] / one["seconds"], (gradients[way] - first).norm() / first.norm()
            print(f"| {WAYS[way]} | {one['seconds']:.1f} | {speed:.2f} x | {one['peak']:.2f} GB | {away:.0e} |")


if __name__ == "__main__":
    main()
