"""The output of `plan`: sizes against loaded models, memory and time against an H100, counts against a run."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import TaskType
from torch import nn
from transformers import LlamaConfig

from salmon import configuration, cost, models, price, recompute, shape, templates, workload
from salmon.adapters import add_lora
from salmon.assumptions import Assumptions
from salmon.config import Lora, Model
from salmon.cost import Hardware
from salmon.errors import UserError
from salmon.optimization import BUCKET, read_deepspeed
from salmon.plan import Plan
from salmon.principles import read_judged
from salmon.shape import Shape
from salmon.text import cut_at_markers, join_instruction
from salmon.tokenizers import load_tokenizer
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
    if kind not in ("gemma2", "gpt_oss"):  # their windows are shorter than these texts
        assert (
            found.cache == sum(state.nbytes for layer in cache.layers for state in (layer.keys, layer.values)) / TOKENS
        )
    adapted = add_lora(base, lora, TaskType.CAUSAL_LM).eval()
    assert found.lora == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    if found.graph is None:
        assert kind in ("qwen3_moe", "gpt_oss")  # what experts do depends on values
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


@pytest.fixture(scope="module")
def shape_1b(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    folder = tmp_path_factory.mktemp("1b")
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
def test_memory_is_what_an_h100_had_in_use(shape_1b: Shape, again: bool, part: str) -> None:
    """In the H100's run, a pass had four rollouts and kept all logits, and the optimiser's moments were paged out."""
    hardware = Hardware(tokens_per_pass=4 * 384, tokens_per_forward_pass=4 * 384, recompute=again, batch_size=4)
    config = configured(model={"quantization": "none"})
    found = cost.policy(config, shape_1b, Assumptions(), rollouts(), hardware)
    pieces = cost.LOGITS * cost.PER_LOGIT
    whole = 4 * 256 * shape_1b.vocabulary * cost.PER_LOGIT
    moments = 2 * 2 * shape_1b.lora * 4
    reference = shape_1b.lora * 4  # that run's reference was an adapter
    graph = found.phases["updating"] - pieces
    if not again:
        graph /= recompute.MARGIN  # for other peaks; there are none here
    said = sum(found.memory.values()) - moments + reference + whole + graph
    assert said == pytest.approx(cell(part)["peak GB"] * 1e9, rel=0.06)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("again", "part"), [(False, "update, paged AdamW"), (True, "update with checkpointing, paged AdamW")]
)
def test_the_time_of_an_h100_is_within_the_range(shape_1b: Shape, quantization: str, again: bool, part: str) -> None:
    hardware = Hardware(tokens_per_pass=4 * 384, tokens_per_forward_pass=4 * 384, recompute=again)
    assumed = Assumptions(gpu="h100")
    model = {"quantization": quantization}
    found = cost.policy(configured(model=model), shape_1b, assumed, rollouts(), hardware)
    precision = {"none": "bf16", "nf4": "nf4"}[quantization]
    for name, measured_part in (("updating", part), ("measuring", "measure")):
        slow, fast = found.parts[name]
        seconds = cell(measured_part, precision)["seconds"]
        seconds += cell("score", precision)["seconds"] if name == "measuring" else 0
        assert fast < seconds < 1.05 * slow, name


def sampled(rows: int, cap: int) -> Work:
    """A batch of benchmarks/gpu.py: prompts of 256 tokens at most, answers of `cap` at most."""
    return Work(rows=rows, tokens=rows * 107, answers=rows * cap, length=107 + cap / 2, longest=256 + cap, prompt=256)


@pytest.mark.parametrize("batch", [16, 64, 128])
def test_sampling_takes_what_it_took_on_an_h100(shape_1b: Shape, batch: int) -> None:
    """Memory, and a step's time."""
    (one,) = (
        one
        for one in MEASURED
        if (one["table"], one["model"], one["precision"], one.get("engine")) == ("sampling", "1b", "bf16", "ours")
        and one["batch"] == batch
    )
    config = configured(model={"quantization": "none"})
    found = cost.sampling(
        config, shape_1b, Assumptions(gpu="h100"), sampled(batch, one["cap"]), Hardware(batch_size=batch)
    )
    assert found.peak - cost.RESERVED == pytest.approx(one["peak GB"] * 1e9, rel=0.25)
    steps = [one["cap"] / share for share in sorted(Assumptions().useful)]
    slow, fast = (seconds / number for seconds, number in zip(found.parts["answers"], steps, strict=True))
    assert fast < one["ms a call"] / 1000 < slow


def follow(advice: str, hardware: Hardware) -> Hardware:
    """The hardware, changed as advised."""
    if "gradient_checkpointing to auto" in advice:
        hardware = replace(hardware, recompute="auto")
    if "zero3.json" in advice:
        hardware = replace(hardware, zero=3, recompute="auto")
    if "set tensor_parallel" in advice:
        hardware = replace(hardware, together=True)
    for key, value in re.findall(r"--engine\.([\w-]+) to ([\d.]+\d|\d)", advice):
        number = float(value) if key == "memory" else int(value)
        hardware = replace(hardware, engine=replace(hardware.engine, **{key.replace("-", "_"): number}))
    for name, value in re.findall(r"lower (?:sampling_)?(\w+) to (\d+)", advice):
        assert 0 < int(value) < getattr(hardware, name)
        hardware = replace(hardware, **{name: int(value)})
    return hardware


LARGE = Work(
    rows=288 * 4,
    tokens=288 * 4 * 128,
    answers=288 * 4 * 256,
    scored=288 * 4 * 384,
    length=384,
    longest=384,
    prompt=128,
    steps=4,
    passes=40,
    forward_passes=40,
)


HARDWARE: list[tuple[str, Any, int, float | None]] = [
    *((stage, recomputed, 0, None) for stage in ("sampling", "judging") for recomputed in (False, "auto")),
    *(
        (stage, recomputed, zero, None)
        for stage in ("policy", "training")
        for recomputed in (False, "auto")
        for zero in (0, 2)
    ),
    *(("policy", "auto", zero, 0.9) for zero in (0, 2)),
    ("sampling", "auto", 0, 0.9),
]
"""Stage, gradient_checkpointing, ZeRO stage, and an engine's share of the memory."""


@pytest.mark.parametrize("memory", [2.5, 4.0, 6.0, 9.0, 13.0, 24.0])
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize(("stage", "recomputed", "zero", "engine"), HARDWARE)
def test_who_follows_the_advice_fits(
    stage: str, memory: float, ranks: int, recomputed: Any, zero: int, engine: float | None, shape_1b: Shape
) -> None:
    """If the advice is that only another model or GPU helps, then nothing else does."""
    price: Any = {
        "policy": cost.policy,
        "training": cost.training,
        "sampling": cost.sampling,
        "judging": cost.judging,
    }[stage]
    config = configured(model={"quantization": "none"})
    assumed = Assumptions.model_validate({"gpu": {"memory": memory, "tflops": 70, "bandwidth": 600}})
    hardware = Hardware(
        ranks=ranks,
        batch_size=512,
        tokens_per_pass=2**15,
        tokens_per_forward_pass=2**16,
        recompute=recomputed,
        zero=zero if ranks > 1 else 0,
        engine=cost.EngineHardware(memory=engine) if engine else None,
    )
    found = price(config, shape_1b, assumed, LARGE, hardware)
    assert found.fits == (found.peak <= memory * 1e9)
    assert bool(found.advice) != found.fits
    if not found.fits and "use larger GPUs" not in found.advice:
        assert price(config, shape_1b, assumed, LARGE, follow(found.advice, hardware)).fits, found.advice
    if "use larger GPUs" in found.advice:
        least = Hardware(
            ranks=ranks,
            batch_size=1,
            tokens_per_pass=1,
            tokens_per_forward_pass=1,
            engine=hardware.engine and replace(hardware.engine, memory=0.05, tensor_parallel=ranks),
        )
        assert not price(config, shape_1b, assumed, LARGE, least).fits


def test_4_bits_are_not_divided(shape_1b: Shape) -> None:
    config = configured(model={"quantization": "nf4"})
    found = cost.sampling(config, shape_1b, Assumptions(), sampled(16, 64), Hardware(ranks=2, together=True))
    assert not found.fits
    assert "model.quantization to none" in found.advice


def test_gpus_that_hold_one_model_share_its_weights_and_time(shape_1b: Shape) -> None:
    config, quick = configured(model={"quantization": "none"}), Assumptions(launch=(1e-9, 1e-9), step=(1e-9, 1e-9))
    work = sampled(16, 64)
    one = cost.sampling(config, shape_1b, quick, work, Hardware(batch_size=16))
    both = cost.sampling(config, shape_1b, quick, work, Hardware(ranks=2, batch_size=16, together=True))
    assert both.seconds == pytest.approx([seconds / 2 for seconds in one.seconds])
    assert both.memory["weights"] == one.memory["weights"] / 2


def test_an_engine_has_16_bit_weights_and_its_share_of_memory(shape_1b: Shape) -> None:
    config = configured(model={"quantization": "nf4"})
    engine = cost.EngineHardware(memory=0.5)
    found = cost.sampling(config, shape_1b, Assumptions(gpu="rtx4090"), sampled(16, 64), Hardware(engine=engine))
    assert found.memory == {"engine": 12e9}
    small = Assumptions.model_validate({"gpu": {"memory": 3, "tflops": 70, "bandwidth": 600}})
    assert not cost.sampling(config, shape_1b, small, sampled(16, 64), Hardware(engine=engine)).fits
    ours = cost.sampling(config, shape_1b, Assumptions(gpu="rtx4090"), sampled(16, 64), Hardware(batch_size=16))
    assert found.seconds[1] < ours.seconds[1]


def test_zero3_waits_for_weights_and_4_bit_ones_are_read_whole(shape_1b: Shape) -> None:
    config = configured(model={"quantization": "nf4"})
    two, three = (
        cost.policy(config, shape_1b, Assumptions(), LARGE, Hardware(ranks=8, batch_size=36, zero=zero, recompute=True))
        for zero in (2, 3)
    )
    steps = two.parts["sampling"][1] / (three.parts["sampling"][1] - two.parts["sampling"][1])
    assert steps > 0
    assert three.seconds[0] > two.seconds[0]
    assert three.fixed + three.phases["loading"] >= shape_1b.weights("nf4")


def test_ranks_share_time_and_zero_shares_memory(shape_1b: Shape) -> None:
    config, work = configured(model={"quantization": "none"}), rollouts()
    one, of_zero2, two = (
        cost.policy(
            config,
            shape_1b,
            Assumptions(launch=(1e-9, 1e-9), interconnect=(1e9, 1e9)),
            work,
            Hardware(ranks=ranks, batch_size=4, recompute=True, zero=zero),
        )
        for ranks, zero in ((1, 0), (2, 2), (2, 3))
    )
    assert two.parts["updating"][0] == pytest.approx(one.parts["updating"][0] / 2)
    weights = shape_1b.weights("none")
    assert two.memory["weights"] == pytest.approx(weights / 2 + weights / shape_1b.layers)
    assert two.memory["gradients and moments"] == pytest.approx(one.memory["gradients and moments"] / 12 * 16 / 2)
    # Two buffers of float32, as the file for ZeRO-2 and `read_deepspeed` say.
    assert "DeepSpeed's buffers" not in one.memory
    for stage, buffers, sharded in ((2, 2, of_zero2), (3, 1, two)):
        found = read_deepspeed(ROOT / f"profiles/deepspeed/zero{stage}.json")["zero_optimization"]
        assert (found["stage"], found["reduce_bucket_size"]) == (stage, BUCKET)
        assert sharded.memory["DeepSpeed's buffers"] == buffers * 4 * BUCKET


def test_without_resources_the_scripts_have_their_defaults() -> None:
    import judge_preferences
    import sample_responses
    import train_policy

    def default(script: Any, name: str) -> Any:
        return script.Arguments.model_fields[name].default

    sampled = default(sample_responses, "batch_size")
    judged, policy = default(judge_preferences, "batch_size"), default(train_policy, "sampling_batch_size")
    expected = {"response0": sampled, "response1": sampled, "preferences": judged, "policy": policy}
    assert expected == price.BATCH_SIZE
    assert default(train_policy, "engine").memory == price.ENGINE_MEMORY
    assert default(sample_responses, "engine").memory == 0.9


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


def test_judged_tokens_are_those_of_packed_prompts(
    priced: dict[tuple[str, str], price.Priced], small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    one = priced["preferences", "default"]
    manifest = json.loads(Path(one.path).with_suffix(".manifest.json").read_text())
    assert one.work.rows == manifest["counts"]["judged"]
    prompts = [[1, 2, 3, 7], [1, 2, 3, 8, 9], [1, 2, 4]]
    assert workload.packed(prompts) == 2 + 2 + 3 + 1
    assert manifest["counts"]["cut"] == 0, "outputs were shortened, which is not done below"
    raw = configuration.read([ROOT / "config.yaml", small_run / "config.yaml"])
    config = Plan(configuration.load(raw, ROOT)).runs["default"]
    tokenizer = load_tokenizer(config.model)
    asked, other = (pl.read_parquet(small_run / f"results/responses/response{index}.parquet") for index in (0, 1))
    judged, second = pl.read_parquet(one.path)["prompt_id"].unique(), dict(other["prompt_id", "response"].iter_rows())
    tokens = 0
    for row in asked.filter(pl.col("prompt_id").is_in(judged.implode())).iter_rows(named=True):
        texts = (row["response"], second[row["prompt_id"]])
        said = [cut_at_markers(text, config.judge.turn_markers) for text in texts]
        for outputs in (said, said[::-1]):
            ids = [
                tokenizer(
                    templates.fill(
                        templates.read(config.judge.template),
                        UserInstruction=join_instruction(row["instruction"], row["input"]),
                        OutputA=outputs[0],
                        OutputB=outputs[1],
                        Dimension=principle.dimension,
                        Definition=principle.definition,
                    )
                ).input_ids
                for principle in read_judged(config.judge.principles)
            ]
            head = len(os.path.commonprefix(ids))  # noqa: RUF071 (of lists)
            tokens += head + sum(len(each) - head for each in ids)
    assert one.work.tokens == tokens


def test_disk_is_what_trainings_leave(priced: dict[tuple[str, str], price.Priced]) -> None:
    for (name, _), one in priced.items():
        if name in ("sft", "pmp", "reward_model", "policy"):
            size = sum(file.stat().st_size for file in Path(one.path).rglob("*.safetensors"))
            assert one.cost.disk == pytest.approx(size, rel=0.1)


def test_nothing_needs_a_table(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without results, everything is assumed, and the report says so."""
    monkeypatch.chdir(ROOT)
    raw = configuration.read([ROOT / "config.yaml", small_run / "config.yaml"])
    raw = configuration.merge(raw, {"pathvars": {"results": str(tmp_path)}, "targets": ["policies"]})
    raw = configuration.merge(raw, {"plan": {"rows": {"prompts": 50, "pmp_data": 64, "rl_prompts": 64}}})
    plan = Plan(configuration.load(raw, ROOT))
    found = [*price.stages(plan, {})]
    assert not any(one.is_there or one.work.counted for one in found)
    text = "\n".join(price.report(found, plan.runs["default"].plan))
    assert "| response0 | default | 50 * |" in text
    assert "The remaining stages take" in text

    def seconds(name: str, end: int) -> float:
        return max((one.cost.seconds[end] for one in found if one.name == name), default=0.0)

    for end, hours in enumerate(price.wall_hours(found)):
        judged = max(seconds("response0", end), seconds("response1", end)) + seconds("preferences", end)
        rewarded = max(judged, seconds("pmp", end)) + seconds("reward_model", end)
        assert hours * 3600 == pytest.approx(seconds("sft", end) + rewarded + seconds("policy", end))


def test_a_model_that_is_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = Plan(configuration.load(configuration.read([ROOT / "config.yaml"]), ROOT))
    with pytest.raises(UserError, match="Llama-2-70b"):
        next(price.stages(plan, {}))
