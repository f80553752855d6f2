"""What `plan` says: sizes against loaded models, memory and time against an H100, counts against a run."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import TaskType
from torch import nn
from transformers import LlamaConfig

from salmon import configuration, cost, models, price, recompute, shape, workload
from salmon.adapters import add_lora
from salmon.assumptions import GPUS, Assumptions
from salmon.config import Lora, Model
from salmon.cost import Hardware
from salmon.errors import UserError
from salmon.plan import Plan
from salmon.shape import Shape
from salmon.workload import Work
from tests import zoo

ROOT = Path(__file__).parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "gpu-h100.json").read_text())["cells"]
EAGER = ("gemma2", "gpt_oss", "bloom")
TOKENS = 64
ONE_B: dict[str, Any] = {  # as benchmarks/gpu.py has it
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


# -- shapes


def stored(model: nn.Module) -> int:
    """Bytes of a model's weights, each storage once, with what 4-bit weights need."""
    found: dict[int, int] = {}
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        more = () if state is None else (state.absmax, state.code, state.state2.absmax, state.state2.code)
        for tensor in (weight, *more):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "kind", ["llama_tied", "qwen3", "qwen3_moe", "gemma2", "gpt_oss", "opt", "phi3_longrope", "bloom"]
)
def test_sizes_are_those_of_a_loaded_model(kind: str, quantization: Any, tmp_path: Path) -> None:
    zoo.build(kind, tmp_path)
    attention: Any = "eager" if kind in EAGER else "sdpa"
    model = Model(base=str(tmp_path), quantization=quantization, dtype="bfloat16", attention=attention)
    lora = Lora(r=4)
    found = shape.measure(model, lora)
    base = models.prepare(models.load_base(model, "cpu"), model)
    assert found.weights(quantization) == pytest.approx(stored(base), rel=5e-3)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        cache = base.base_model(input_ids=ids, use_cache=True).past_key_values
    if kind not in ("gemma2", "gpt_oss"):  # whose windows are shorter than these texts
        assert (
            found.cache == sum(state.nbytes for layer in cache.layers for state in (layer.keys, layer.values)) / TOKENS
        )
    adapted = add_lora(base, lora, TaskType.CAUSAL_LM).eval()
    assert found.lora == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    if found.graph is None:
        assert kind in ("qwen3_moe", "gpt_oss")  # what experts do depends on numbers
        return
    linear, quadratic = found.graph

    def forward(ids: torch.Tensor) -> Any:
        return base.base_model(input_ids=ids, use_cache=False)

    for length in (64, 96):
        kept = recompute.graph_bytes(forward, adapted.parameters(), length, length, torch.device("cpu"))
        assert linear + quadratic * length == pytest.approx(kept / length, rel=0.01)


def test_arithmetic_is_counted_by_hand(tmp_path: Path) -> None:
    """Every multiplication and addition of a small Llama with LoRA on all of its linear layers."""
    width, hidden, layers, words, heads, rank, length = 64, 128, 2, 512, 4, 4, 10
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config.save_pretrained(tmp_path)
    found = shape.measure(Model(base=str(tmp_path), quantization="none", dtype="float32"), Lora(r=rank))
    one = 4 * width * width + 3 * width * hidden
    adapter = rank * (4 * (width + width) + 3 * (width + hidden))
    scores = 2 * 2 * width * (length * length / 2)  # queries by keys, and weights by values, in the lower triangle
    forward = layers * (2 * length * (one + adapter) + scores)
    assert found.arithmetic(length, length) == pytest.approx(forward)
    assert found.arithmetic(0, 0, answers=3) == 2 * 3 * words * width
    backward = layers * (2 * length * (one + 2 * adapter) + 2 * scores)
    assert found.arithmetic(length, length, backward=True) == pytest.approx(forward + backward)


# -- memory and time, against an H100


def one_b(folder: Path) -> Shape:
    LlamaConfig(**ONE_B).save_pretrained(folder)
    return shape.measure(Model(base=str(folder), quantization="none", dtype="bfloat16"), Lora(r=64))


def cell(part: str, precision: str = "bf16") -> dict[str, Any]:
    (found,) = (
        one
        for one in MEASURED
        if one["table"] == "ppo" and (one["model"], one["precision"], one.get("part")) == ("1b", precision, part)
    )
    return found


def rollouts() -> Work:
    """One update of 16 rollouts of 128 + 256 tokens, four per pass."""
    return Work(
        rows=16,
        tokens=16 * 128,
        answers=16 * 256,
        scored=16 * 384,
        length=384,
        longest=384,
        steps=1,
        passes=4,
        forward_passes=16,
    )


def configured(**changes: Any) -> configuration.Config:
    raw = configuration.read([ROOT / "config.yaml"])
    raw = configuration.merge(raw, {"ppo": {"inner_epochs": 1, "reward_max_length": 384, "query_length": 128}})
    raw = configuration.merge(raw, {"ppo": {"reward_query_length": 8, "reward_response_length": 256}})
    return configuration.load(configuration.merge(raw, changes), ROOT)["default"]


@pytest.mark.parametrize(
    ("again", "part"), [(False, "update, paged AdamW"), (True, "update with checkpointing, paged AdamW")]
)
def test_memory_is_what_an_h100_had_in_use(tmp_path: Path, again: bool, part: str) -> None:
    """That run kept all logits of its passes, of four rollouts, and its optimiser's moments were paged out."""
    measured = one_b(tmp_path)
    hardware = Hardware(tokens_per_pass=4 * 384, tokens_per_forward_pass=4 * 384, recompute=again, batch_size=4)
    config = configured(model={"quantization": "none"})
    found = cost.policy(config, measured, Assumptions(), rollouts(), hardware)
    pieces = cost.LOGITS * cost.PER_LOGIT
    whole = 4 * 256 * measured.vocabulary * cost.PER_LOGIT
    moments = 2 * 2 * measured.lora * 4
    reference = measured.lora * 4  # as an adapter, which that run had
    margin = 1 - 1 / recompute.MARGIN
    graph = found.phases["updating"] - pieces
    said = sum(found.memory.values()) - moments + reference + whole + graph * (1 if again else 1 - margin)
    assert said == pytest.approx(cell(part)["peak GB"] * 1e9, rel=0.06)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("again", "part"), [(False, "update, paged AdamW"), (True, "update with checkpointing, paged AdamW")]
)
def test_the_time_of_an_h100_is_within_the_range(tmp_path: Path, quantization: str, again: bool, part: str) -> None:
    measured = one_b(tmp_path)
    hardware = Hardware(tokens_per_pass=4 * 384, tokens_per_forward_pass=4 * 384, recompute=again)
    assumed = Assumptions(gpu="h100")
    model = {"quantization": quantization}
    found = cost.policy(configured(model=model), measured, assumed, rollouts(), hardware)
    precision = {"none": "bf16", "nf4": "nf4"}[quantization]
    for name, measured_part in (("updating", part), ("measuring", "measure")):
        slow, fast = found.parts[name]
        seconds = cell(measured_part, precision)["seconds"]
        seconds += cell("score", precision)["seconds"] if name == "measuring" else 0
        assert fast < seconds < 1.05 * slow, name


def test_what_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    measured = one_b(tmp_path)
    config, work = configured(model={"quantization": "none"}), rollouts()
    hardware = Hardware(tokens_per_pass=2**15, tokens_per_forward_pass=384, recompute=False)
    fits = cost.policy(config, measured, Assumptions(gpu="b200"), work, hardware)
    assert fits.fits
    assert not fits.advice
    too_many = cost.policy(config, measured, Assumptions(gpu="a100_80gb"), work, hardware)
    assert not too_many.fits
    share = float(too_many.advice.split("to ")[1].split("%")[0]) / 100
    assert "tokens_per_pass" in too_many.advice
    lower = replace(hardware, tokens_per_pass=int(share * 2**15))
    assert cost.policy(config, measured, Assumptions(gpu="a100_80gb"), work, lower).fits
    # `auto` recomputes instead, as the job would.
    auto = cost.policy(config, measured, Assumptions(gpu="a100_80gb"), work, replace(hardware, recompute="auto"))
    assert auto.fits
    assert auto.recomputed
    assert auto.seconds[0] > fits.seconds[0] * GPUS["a100_80gb"].tflops / GPUS["b200"].tflops
    tiny = Assumptions.model_validate({"gpu": {"memory": 2, "tflops": 70, "bandwidth": 600}})
    advice = cost.policy(config, measured, tiny, work, replace(hardware, tokens_per_pass=384)).advice
    assert "nf4" in advice
    assert "zero3" in advice


def test_ranks_share_time_and_zero_shares_memory(tmp_path: Path) -> None:
    measured = one_b(tmp_path)
    config, work = configured(model={"quantization": "none"}), rollouts()
    one = cost.policy(config, measured, Assumptions(launch=(1e-9, 1e-9)), work, Hardware(batch_size=4, recompute=True))
    two = cost.policy(
        config,
        measured,
        Assumptions(launch=(1e-9, 1e-9)),
        work,
        Hardware(ranks=2, batch_size=4, recompute=True, zero=3),
    )
    assert two.parts["updating"][0] == pytest.approx(one.parts["updating"][0] / 2)
    weights = measured.weights("none")
    assert two.memory["weights"] == pytest.approx(weights / 2 + weights / measured.layers)
    assert two.memory["gradients and moments"] == pytest.approx(one.memory["gradients and moments"] / 12 * 16 / 2)


# -- counts, against a run


@pytest.fixture(scope="module")
def priced(small_run: Path) -> dict[tuple[str, str], price.Priced]:
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        raw = configuration.read([ROOT / "config.yaml", small_run / "config.yaml"])
        plan = Plan(configuration.load(raw, ROOT))
        resources = {"train_policy": {"tokens_per_pass": 256, "tokens_per_forward_pass": 512}}
        return {(one.name, one.run): one for one in price.stages(plan, resources)}
    finally:
        os.chdir(before)


def test_every_stage_that_takes_a_gpu_is_priced(priced: dict[tuple[str, str], price.Priced]) -> None:
    names = {name for name, _ in priced}
    assert names >= {"sft", "response0", "response1", "preferences", "pmp", "reward_model", "policy"}
    assert all(one.is_there and one.work.counted for one in priced.values())
    assert all(0 < one.gpu_hours[1] < one.gpu_hours[0] and math.isfinite(one.cost.peak) for one in priced.values())


def test_tokens_of_responses_are_the_tables(priced: dict[tuple[str, str], price.Priced]) -> None:
    for name in ("response0", "response1"):
        one = priced[name, "default"]
        table = pl.read_parquet(one.path).filter(pl.col("finish_reason") != "prompt_too_long")
        assert (one.work.rows, one.work.tokens, one.work.answers) == (
            table.height,
            table["prompt_tokens"].sum(),
            table["response_tokens"].sum(),
        )


def test_tokens_of_trainings_are_the_runs(priced: dict[tuple[str, str], price.Priced]) -> None:
    for name in ("sft", "pmp", "reward_model"):
        one = priced[name, "default"]
        counts = json.loads((Path(one.path) / "manifest.json").read_text())["counts"]
        assert (one.work.tokens, one.work.steps) == (counts["tokens"], counts["steps"]), name


def test_tokens_of_rl_are_the_runs(priced: dict[tuple[str, str], price.Priced], small_run: Path) -> None:
    for (name, _), one in priced.items():
        if name == "policy":
            lines = [json.loads(line) for line in (Path(one.path) / "metrics.jsonl").read_text().splitlines()]
            rollouts = one.work.rows / one.work.steps
            assert one.work.steps == len(lines)
            assert one.work.tokens == pytest.approx(sum(line["query_tokens"] for line in lines) * rollouts)


def test_judged_tokens_are_those_of_packed_prompts(priced: dict[tuple[str, str], price.Priced]) -> None:
    one = priced["preferences", "default"]
    manifest = json.loads(Path(one.path).with_suffix(".manifest.json").read_text())
    assert one.work.rows == manifest["counts"]["judged"]
    prompts = [[1, 2, 3, 7], [1, 2, 3, 8, 9], [1, 2, 4]]
    assert (
        workload.packed(prompts)
        == len({tuple(prompt[: end + 1]) for prompt in prompts for end in range(2)}) + 2 + 3 + 1
    )


def test_disk_is_what_trainings_leave(priced: dict[tuple[str, str], price.Priced]) -> None:
    for (name, _), one in priced.items():
        if name in ("sft", "pmp", "reward_model", "policy"):
            size = sum(file.stat().st_size for file in Path(one.path).rglob("*.safetensors"))
            assert one.cost.disk == pytest.approx(size, rel=0.1)


def test_nothing_needs_a_table(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other results, all is assumed, and the report says so."""
    monkeypatch.chdir(ROOT)
    raw = configuration.read([ROOT / "config.yaml", small_run / "config.yaml"])
    raw = configuration.merge(raw, {"pathvars": {"results": str(tmp_path)}, "targets": ["policies"]})
    raw = configuration.merge(raw, {"plan": {"rows": {"prompts": 50, "pmp_data": 64, "rl_prompts": 64}}})
    plan = Plan(configuration.load(raw, ROOT))
    found = [*price.stages(plan, {})]
    assert not any(one.is_there or one.work.counted for one in found)
    text = "\n".join(price.report(found, plan.runs["default"].plan))
    assert "| response0 | default | 50 * |" in text
    assert "What is not done takes" in text


def test_a_model_that_is_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(configuration.load(configuration.read([ROOT / "config.yaml"]), ROOT))
    with pytest.raises(UserError, match="Llama-2-70b"):
        next(price.stages(plan, {}))
