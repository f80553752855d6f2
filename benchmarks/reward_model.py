"""Seconds and memory of a step of a reward model's training: the authors' way, TRL's RewardTrainer, and the product.

    pip install --no-deps --target FOLDER trl==1.16.0
    python benchmarks/reward_model.py --trl FOLDER [--pairs 16] [--steps 3] [--rounds 3] [--budget 2048]

Base model and LoRA are those of benchmarks/ppo.py, in float32 on a CPU. A text has an answer as long as OASST1's (four
characters count as a token; at most 768 tokens), the question (at most 128) and 200 tokens of template and principles;
at most 1,280, the paper's limits. A pair's two texts differ in the answer. In each step all ways have the same pairs.
No way writes a checkpoint, and only the row that says so recomputes activations.

The authors' way pads every text to the limit, and computes logits that are not used. TRL (1.16) pads to the longest
text of a pass, with as many pairs as the authors' way or with one pair, in the order of the data; it gets tokens, so
its tokeniser is not measured. The product's passes have at most `budget` tokens, padding included. Rows between these
show each change's contribution. The product computes the longer and the shorter texts of a pass separately
(`reward_model.collate_pairs`). Each way runs in a separate process, in turn, `rounds` times; the table shows medians.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_utils import SaveStrategy

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts"), str(ROOT)]

import train_reward_model  # noqa: E402
from benchmarks.balance import MAX_LENGTH, QUERY, RESPONSE, real_pairs  # noqa: E402
from benchmarks.ppo import LORA, VOCABULARY, build, in_turn  # noqa: E402
from salmon import models, reward_model, training  # noqa: E402
from salmon.config import Model, RewardModel  # noqa: E402
from salmon.work import WorkFolder  # noqa: E402

PAIRS_PER_PASS = 2
TOKENS_PER_PASS = 2048  # as in profiles/cpu: larger passes are slower on a CPU
WAYS = {
    "authors": "the authors' way",
    "no_logits": "the same without logits",
    "masked": "passes by length, with a mask",
    "padded": "the same without a mask",
    "salmon": "the same, longer and shorter texts apart: the product",
    "recomputed": "the product, activations recomputed",
    "trl": "TRL's RewardTrainer",
    "trl_alone": "the same, one pair per pass",
}
Pairs = list[tuple[list[int], list[int]]]
"""Tokens of the preferred text, and of the other one."""


def draw(pairs: int) -> Pairs:
    """Random tokens; texts are as long as the reward model's."""
    random = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        found: list[int] = random.integers(3, VOCABULARY, length).tolist()
        return found

    return [(text(one), text(two)) for one, two in real_pairs(pairs)]


def authors(folder: Path, pairs: Pairs, size: int, _: Path, *, logits: bool = True) -> float:
    """Seconds of all steps, padded to the limit, with logits (multiplied by 0) or without."""
    base = Model(base=str(folder / "base"), quantization="none", dtype="float32")
    model = models.new_reward_model(base, LORA, "cpu", 0)
    scoring = model.get_base_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    model.train()
    began = time.perf_counter()
    for start in range(0, len(pairs), size):
        for first in range(start, start + size, PAIRS_PER_PASS):
            rows = [text for pair in pairs[first : first + PAIRS_PER_PASS] for text in pair]
            tokens = torch.zeros(len(rows), MAX_LENGTH, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, text in enumerate(rows):
                tokens[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            states = scoring.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            last = states[torch.arange(len(rows)), mask.sum(1) - 1]
            rewards = scoring.score(last)[:, 0]
            if logits:
                rewards = rewards + 0.0 * scoring.get_output_embeddings()(states).mean((1, 2))
            loss = reward_model.bradley_terry_loss(rewards[::2], rewards[1::2]).sum() / size
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def trl(folder: Path, pairs: Pairs, size: int, output: Path, *, per_pass: int = PAIRS_PER_PASS) -> float:
    """Seconds of `RewardTrainer.train`."""
    from trl import RewardConfig, RewardTrainer  # type: ignore[import-not-found]

    model = AutoModelForSequenceClassification.from_pretrained(str(folder / "base"), num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "base"))
    config = RewardConfig(
        output_dir=str(output),
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=size // per_pass,
        num_train_epochs=1,
        learning_rate=1e-5,
        max_length=MAX_LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"chosen_ids": one, "rejected_ids": two} for one, two in pairs]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS, r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", lora_dropout=0.0
        ),
    )
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def salmon(
    folder: Path,
    pairs: Pairs,
    size: int,
    output: Path,
    *,
    budget: int = TOKENS_PER_PASS,
    apart: bool = True,
    masked: bool = False,
    recomputed: bool = False,
) -> float:
    """Seconds of `training.train`; texts are already tokens, as for TRL."""
    arguments = train_reward_model.Arguments(
        records=folder / "none",
        output=output / "rm",
        model=Model(base=str(folder / "base"), quantization="none", dtype="float32"),
        lora=LORA,
        tokens_per_pass=budget,
        reward_model=RewardModel(
            template="none",
            learning_rate=1e-5,
            batch_size=size,
            eval_examples=0,
            warmup_ratio=0.0,
            save_steps=10**6,
            max_length=MAX_LENGTH,
            query_length=QUERY,
            response_length=RESPONSE,
        ),
    )
    layout = range(len(pairs)), [2 * max(map(len, pair)) for pair in pairs], size, budget, 1
    passes = training.passes_per_step(*layout)
    rows = training.micro_batches(*layout, passes)
    work = WorkFolder(arguments.output)
    work.open("benchmark", "")
    settings = training.trainer_arguments(arguments, work.path, len(pairs) // size, passes, torch.device("cpu"))
    settings.activation_checkpointing, settings.save_strategy = recomputed, SaveStrategy.NO
    settings.activation_checkpointing_kwargs = {"use_reentrant": False}
    model = train_reward_model.load_model(arguments, torch.device("cpu"))
    if masked:
        decoder = model.get_base_model().base_model
        decoder.register_forward_pre_hook(with_mask, with_kwargs=True)

    def batch(chosen: list[int]) -> training.Batch:
        texts = [text for place in chosen for text in pairs[place]]
        found = reward_model.collate_pairs(texts, reward_model.Apart()) if apart else reward_model.collate(texts)
        return {**found, "labels": torch.ones(len(chosen), dtype=torch.long)}

    loss = partial(train_reward_model.batch_loss, batch_size=size)
    began = time.perf_counter()
    training.train(model, settings, rows, batch, loss, stage="reward_model", work=work)
    return time.perf_counter() - began


def with_mask(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the decoder with a mask against padding (token 0, which `draw` never draws)."""
    return positional, {**named, "attention_mask": (named["input_ids"] != 0).long()}


def run(way: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Run one way in this process; print seconds per step and peak."""
    torch.set_num_threads(arguments.threads)
    if arguments.trl:
        sys.path.append(str(arguments.trl))
    pairs = draw(arguments.pairs * arguments.steps)
    ways: dict[str, Any] = {
        **{"authors": authors, "no_logits": partial(authors, logits=False)},
        **{"trl": trl, "trl_alone": partial(trl, per_pass=1)},
        "masked": partial(salmon, budget=arguments.budget, apart=False, masked=True),
        "padded": partial(salmon, budget=arguments.budget, apart=False),
        "salmon": partial(salmon, budget=arguments.budget),
        "recomputed": partial(salmon, budget=arguments.budget, recomputed=True),
    }
    with tempfile.TemporaryDirectory() as output:
        seconds = ways[way](folder, pairs, arguments.pairs, Path(output))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(len(text) for pair in pairs for text in pair) / (2 * len(pairs))
    print(json.dumps({"seconds": seconds / arguments.steps, "peak": peak / 2**20, "tokens": tokens}))


def main() -> None:
    """Print the table, or run one way of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with TRL; without it, TRL is left out")
    parser.add_argument("--budget", type=int, default=TOKENS_PER_PASS, help="tokens of a pass of the product's")
    parser.add_argument("--pairs", type=int, default=16, help="pairs per step")
    parser.add_argument("--steps", type=int, default=3)
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
        found = in_turn([way for way in WAYS if not way.startswith("trl") or arguments.trl], folder, arguments.rounds)
    mean = found["salmon"]["tokens"]
    print(f"steps of {arguments.pairs} pairs, whose texts have {mean:.0f} tokens on average\n")
    print("| | seconds per step | the product's speed | peak memory of the process |")
    print("| --- | --- | --- | --- |")
    for way, one in found.items():
        speed = one["seconds"] / found["salmon"]["seconds"]
        print(f"| {WAYS[way]} | {one['seconds']:.1f} | {speed:.2f} x | {one['peak']:.2f} GB |")


if __name__ == "__main__":
    main()
