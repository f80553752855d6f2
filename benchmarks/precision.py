"""Distance of LoRA's gradients on a 4-bit model from those in float32, depending on the use of 16 bits.

    python benchmarks/precision.py [--model examples/smollm2/model] [--rows 3] [--tokens 48]

All ways have the same 4-bit weights; the float32 model has them dequantised. `as loaded` is the product: norms,
embeddings and output layer stay in bfloat16, and so do the activations. `QLoRA's preparation` is PEFT's
`prepare_model_for_kbit_training`, which converts them to float32; this was the project's former way. `under autocast`
is the same as transformers' Trainer runs it. `not quantised` compares a bfloat16 model with the same model in float32:
the effect of 16 bits alone. The policy's gradient is that of log probabilities of answers with random advantages; the
value model's is that of values of all tokens. LoRA has rank 8 on all linear layers, with random weights. The texts are
from README.md.
"""

import argparse
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts")]

from salmon import likelihood, models  # noqa: E402
from salmon.config import Model  # noqa: E402


def random_of(name: str, *shape: int) -> Tensor:
    """Random numbers that depend only on the name."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def gradients(base: PreTrainedModel, ids: Tensor, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients of a policy's and of a value model's loss, as float64 vectors."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base.requires_grad_(False), lora).eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in trained.items():
        parameter.data = 0.01 * random_of(name, *parameter.shape)
        parameter.requires_grad_(True)
    found = []
    for what in ("policy", "value"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if what == "policy":
                queries, answers = (part.tolist() for part in ids.chunk(2, 1))
                values, _ = likelihood.answer_logprobs(model, queries, answers, 1.0)
            else:
                values = base.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        weights = random_of("weights", *values.shape)
        parts = torch.autograd.grad((values * weights).sum(), [*trained.values()], allow_unused=True)
        found.append(torch.cat([part.double().flatten() for part in parts if part is not None]))
    return found[0], found[1]


def main() -> None:
    """Compute each way, and print its cosines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "smollm2" / "model"), help="a folder")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="of each query, and of each answer")
    arguments = parser.parse_args()

    def section(dtype: str, quantization: str) -> Model:
        return Model.model_validate({"base": arguments.model, "dtype": dtype, "quantization": quantization})

    def load(dtype: str, quantization: str) -> PreTrainedModel:
        return models.load_base(section(dtype, quantization), "cpu")

    def loaded(dtype: str, quantization: str) -> PreTrainedModel:
        return models.prepare(load(dtype, quantization), section(dtype, quantization))

    def upcast() -> PreTrainedModel:
        return prepare_model_for_kbit_training(loaded("bfloat16", "nf4"), use_gradient_checkpointing=False)

    words = AutoTokenizer.from_pretrained(arguments.model)((ROOT / "README.md").read_text()).input_ids
    ids = torch.tensor(words[: 2 * arguments.rows * arguments.tokens]).reshape(arguments.rows, -1)
    # quantised from the same 16 bits, and dequantised to them, as bitsandbytes does for each pass
    written = gradients(models.load_dequantized(section("bfloat16", "nf4"), "cpu").float(), ids)
    plain = gradients(loaded("bfloat16", "none").float(), ids)
    ways: list[tuple[str, Callable[[], PreTrainedModel], bool, tuple[Tensor, Tensor]]] = [
        ("nf4, as loaded", lambda: loaded("bfloat16", "nf4"), False, written),
        ("nf4, QLoRA's preparation", upcast, False, written),
        ("nf4, QLoRA's preparation under autocast", upcast, True, written),
        ("not quantised", lambda: loaded("bfloat16", "none"), False, plain),
    ]
    print(f"| {arguments.model} | policy | value model |\n| --- | --- | --- |")
    for name, make, autocast, expected in ways:
        found = gradients(make(), ids, autocast=autocast)
        cosines = [float(one @ two / one.norm() / two.norm()) for one, two in zip(found, expected, strict=True)]
        print(f"| {name} | {cosines[0]:.5f} | {cosines[1]:.5f} |", flush=True)


if __name__ == "__main__":
    main()
