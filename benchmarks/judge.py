"""The judge's shared prefix against padding every prompt to the context, on CPU in float32.

Both sides read the same token ids: four pairs, one order, each of the RM principles, in our template. The padded side
is the authors' way (reference, defect 14): one row per pair and principle, padded on the left to 1536, with logits of
every position. The model has Llama's vocabulary and random weights, because speed does not depend on the weights.

    python benchmarks/judge.py [--repeats 3]

The exit status is 1 if the scores differ by more than 1e-4 or the ratio is below 10.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as launch.sh sets it for the judge; for both sides, before torch

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from salmon import principles, templates  # noqa: E402
from salmon.batching import left_pad  # noqa: E402
from salmon.judging import Judge, Pair  # noqa: E402
from salmon.margins import margins  # noqa: E402

CONTEXT = 1536
PAIRS = 4
WORDS = (200, 450)  # words of a response; prompts get about 800 to 1400 tokens
TOLERANCE = 1e-4
WANTED_RATIO = 10


def main() -> None:
    """Measure both sides alternately, print medians, ratio and difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; medians are printed")
    repeats = parser.parse_args().repeats

    tokenizer, model = make_tokenizer(), make_model()
    judge = Judge(
        model,
        tokenizer,
        template=templates.read(ROOT / "prompts/templates/judge.txt"),
        principles=principles.read_judged(ROOT / "prompts/principles/judge.json"),
        max_length=CONTEXT,
        device="cpu",
    )
    encoded = [judge.encode(pair) for pair in make_pairs()]
    prompts = [each.order_12 for each in encoded if each is not None]
    lengths = [len(tokens) for group in prompts for tokens in group]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {torch.get_num_threads()} threads; "
        f"{len(prompts)} pairs x {len(prompts[0])} principles, {min(lengths)} to {max(lengths)} tokens"
    )

    times: dict[str, list[float]] = {"padded": [], "shared": []}
    for _ in range(repeats):
        times["padded"].append(-time.perf_counter())
        padded = padded_margins(model, prompts, judge.options)
        times["padded"][-1] += time.perf_counter()
        times["shared"].append(-time.perf_counter())
        shared = margins(model, prompts, judge.options, "cpu")
        times["shared"][-1] += time.perf_counter()
    largest = float((padded - shared).abs().max())
    for name, seconds in times.items():
        print(f"{name}: median {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {repeats} runs)")
    ratio = median(times["padded"]) / median(times["shared"])
    print(f"ratio {ratio:.1f} x, largest difference of the scores {largest:.1e}")
    sys.exit(largest > TOLERANCE or ratio < WANTED_RATIO)


@torch.no_grad()
def padded_margins(model: torch.nn.Module, prompts: list[list[list[int]]], options: tuple[int, int]) -> torch.Tensor:
    """logit(a) - logit(b), every prompt padded to the context, all logits computed; float64, [pairs, principles].

    Batches of four rows keep the logits of all positions below a gigabyte.
    """
    rows = [tokens for group in prompts for tokens in group]
    found = []
    for start in range(0, len(rows), 4):
        # A row of the full context makes the rectangle that wide; it is dropped again.
        ids, mask = (tensor[1:] for tensor in left_pad([[0] * CONTEXT, *rows[start : start + 4]]))
        logits = model(input_ids=ids, attention_mask=mask).logits
        found.append((logits[:, -1, options[0]] - logits[:, -1, options[1]]).double())
    return torch.cat(found).view(len(prompts), -1)


def make_model() -> LlamaForCausalLM:
    """A Llama of 21M parameters with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on our prompts, that prepends `<s>`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<s>")  # noqa: S106


def make_pairs() -> list[Pair]:
    """Pairs of made-up texts: words of our prompts in random order."""
    rng = np.random.default_rng(0)
    words = " ".join(texts()).split()

    def say(number: int) -> str:
        return " ".join(rng.choice(words, number))

    return [Pair(str(row), say(30), *(say(int(number)) for number in rng.integers(*WORDS, 2))) for row in range(PAIRS)]


def texts() -> list[str]:
    """The text of our prompts."""
    return [file.read_text(encoding="utf-8") for file in sorted((ROOT / "prompts").rglob("*.*"))]


if __name__ == "__main__":
    main()
