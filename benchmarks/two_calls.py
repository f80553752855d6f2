"""What a second call of the layers costs in a reward model's training on a GPU, with random weights.

    python benchmarks/two_calls.py [--shapes 1b 7b] [--precisions bf16 nf4] [--tokens 512 ... 8192] [--output FILE]

A pass of a reward model's training may compute its longer and its shorter texts in two calls
(`reward_model.collate_pairs`). Here all texts are equally long, so two calls compute just what one does, and the
difference of their times, forward and backward, is the cost of the second call. A large pass hides the launches of its
kernels; the rest, such as unpacking 4-bit weights, it does not hide (`reward_model.SECOND_CALL`). The last rows of a
model are passes of pairs with the lengths of OASST1's answers, padded to one rectangle and to two.

The models and their adapters are those of benchmarks/gpu.py. Medians of `--rounds` in turn; the GPU is awaited at the
end of each pass.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts"), str(ROOT)]

from peft import PeftModel  # noqa: E402

from benchmarks.balance import real_pairs  # noqa: E402
from benchmarks.gpu import LORA, SHAPES, Bench, describe, free  # noqa: E402
from salmon import models  # noqa: E402
from salmon.reward_model import Apart, collate_pairs, pair_losses, when_apart  # noqa: E402

LENGTH = 256  # tokens of each text
PAIRS = 64  # from which a pass of real lengths is taken


def main() -> None:
    """Measure each model, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows: list[dict[str, object]] = []
    for shape in args.shapes:
        for precision in args.precisions:
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(SimpleNamespace(), shape, device, Path(folder), None, None)  # type: ignore[arg-type]
                with mock.patch.object(models, "load_base", bench.load_base):
                    settings = bench.settings(precision).without_adapter()
                    model = models.new_reward_model(settings, LORA, device, seed=1).train()
            rule = when_apart(model, device)
            print(f"{shape} {precision}: today's rule: {rule}", flush=True)
            for tokens in args.tokens:
                texts = [LENGTH] * max(2, tokens // LENGTH)
                rows.append(row(model, device, shape, precision, "equal", texts, half_of(texts), args.rounds))
            for number in (4, 8, 16):  # neighbours by length, as in a pass
                first = (PAIRS - number) // 2
                pairs = sorted(real_pairs(PAIRS), key=max)[first : first + number]
                texts = [length for pair in pairs for length in pair]
                longer = collate_pairs([[0] * length for length in texts], Apart())["longer"]
                rows.append(row(model, device, shape, precision, "OASST1", texts, longer, args.rounds))
            del model
            free()
    if args.output:
        args.output.write_text(
            json.dumps({**describe(device), "length": LENGTH, "autocast": True, "rows": rows}, indent=1) + "\n"
        )


def half_of(texts: list[int]) -> torch.Tensor:
    """The first half of the texts, bool."""
    return torch.arange(len(texts)) < len(texts) // 2


def row(
    model: PeftModel,
    device: torch.device,
    shape: str,
    precision: str,
    lengths: str,
    texts: list[int],
    longer: torch.Tensor,
    rounds: int,
) -> dict[str, object]:
    """Milliseconds of a pass in one call and in two; None where memory does not suffice."""
    random = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 500, (length,), generator=random).tolist() for length in texts]
    both = collate_pairs(tokens, Apart())
    ways = {"one": torch.ones(len(texts), dtype=torch.bool), "two": longer}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    widths = {"one": len(texts) * max(texts)}
    parts = [
        [length for length, long in zip(texts, longer.tolist(), strict=True) if long is which]
        for which in (True, False)
    ]
    widths["two"] = sum(len(part) * max(part) for part in parts if part)
    try:
        for turn in range(rounds + 1):
            for way, chosen in ways.items():
                seconds = timed(model, device, {**both, "longer": chosen})
                if turn:  # the first is a warm-up
                    taken[way].append(1000 * seconds)
    except torch.OutOfMemoryError:
        taken = {way: [] for way in ways}
        free()
    found: dict[str, object] = {
        "model": shape,
        "precision": precision,
        "lengths": lengths,
        "texts": len(texts),
        **{f"tokens, {way}": widths[way] for way in ways},
        **{f"ms, {way}": round(statistics.median(taken[way]), 2) if taken[way] else None for way in ways},
    }
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def timed(model: PeftModel, device: torch.device, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a pass forward and backward."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    preference = torch.ones(len(batch["input_ids"]) // 2, dtype=torch.long, device=device)
    wait(device)
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):  # as in the trainings
        rewards = model(**batch).logits
    pair_losses(rewards.view(-1, 2), preference).sum().backward()  # type: ignore[no-untyped-call]
    wait(device)
    seconds = time.perf_counter() - began
    model.zero_grad()
    return seconds


def wait(device: torch.device) -> None:
    """Wait until the GPU has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
