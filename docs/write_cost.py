"""Write the tables of docs/cost.md, with `snakemake plan`, and the table of docs/slurm.md: `make docs-cost`.

    python docs/write_cost.py [--demo results/demo]

The models' configurations are written out here, so nothing is downloaded. Without their tokenizers, four characters of
a template count as a token, and lengths of texts are those that the section `plan` assumes.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from salmon import configuration, cost, price, shape  # noqa: E402
from salmon.assumptions import Assumptions  # noqa: E402
from salmon.config import Model  # noqa: E402
from salmon.cost import Cost, Hardware  # noqa: E402
from salmon.plan import Plan  # noqa: E402
from salmon.workload import Counter  # noqa: E402

MODELS: dict[str, PreTrainedConfig] = {
    "Llama-2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
    "Llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
EXAMPLES = {
    "paper": ("Llama-2-70b", "slurm", [], {}),
    "llama": (
        "Llama-3.1-8B",
        "local",
        ["--configfile", "examples/llama-3.1-8b.yaml"],
        {
            "train_policy": {"sampling_batch_size": 128, "tokens_per_pass": 5120},
            "sample_responses": {"batch_size": 128},
        },
    ),
    "qwen": (
        "Qwen2.5-0.5B",
        "local",
        ["--configfile", "examples/qwen2.5-0.5b.yaml"],
        {"train_policy": {"sampling_batch_size": 64, "tokens_per_pass": 2560}, "sample_responses": {"batch_size": 64}},
    ),
}
CARDS = {"llama": "h100", "qwen": "rtx4090"}
"""`plan.gpu` of an example, where it is not the default."""


def plan(folder: Path, name: str) -> str:
    """The output of `snakemake plan` for an example."""
    model, profile, more, resources = EXAMPLES[name]
    chosen = ROOT / "profiles" / profile
    if resources:
        found = yaml.safe_load((chosen / "profile.yaml").read_text(encoding="utf-8"))
        for rule, more_of_rule in resources.items():
            found["set-resources"][rule] |= more_of_rule
        chosen = folder / f"profile-{name}"
        chosen.mkdir()
        (chosen / "profile.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    line = [sys.executable, "-m", "snakemake", "--profile", str(chosen), "--executor", "local", "--quiet", "all"]
    line += ["--nolock", "--cores", "2", *more]
    places = {"results": f"{folder}/results", "logs": f"{folder}/logs"}
    line += ["--config", f"model={json.dumps({'base': f'{folder}/{model}'})}", f"pathvars={json.dumps(places)}"]
    line += [f"plan={json.dumps({'gpu': CARDS[name]})}"] if name in CARDS else []
    done = subprocess.run([*line, "--", "plan"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    start = next(number for number, text in enumerate(lines) if text.startswith("GPU: "))
    return "\n".join(text for text in lines[start:] if " INFO " not in text)


def fits(folder: Path) -> Iterator[str]:
    """Rows of docs/slurm.md: bytes per GPU by model and sharding."""
    yield "| model | weights | sampling | judging | reward model | policy | the same, zero2 on 8 | zero3 on 8 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in MODELS:
        for quantization in ("nf4", "none") if name != "Qwen2.5-0.5B" else ("none",):
            model = {"base": str(folder / name), "quantization": quantization}
            raw = configuration.merge(configuration.read([ROOT / "config.yaml"]), {"model": model})
            config = configuration.load(raw, ROOT)["default"]
            measured = shape.measure(Model.model_validate(model), config.lora)
            sizes = [measured.weights(quantization), *(found.peak for found in costs(config, measured))]
            yield f"| {name}, `{quantization}` | {' | '.join(f'{size / 1e9:.0f} GB' for size in sizes)} |"


def costs(config: configuration.Config, measured: shape.Shape) -> Iterator[Cost]:
    """Costs of the stages with the batch sizes of profiles/slurm/site.yaml."""
    nowhere, assumed = Path("/nonexistent"), Assumptions()
    counter = Counter(config, assumed, None)
    passes = {"tokens_per_pass": 4096, "tokens_per_forward_pass": 8192}
    sampled = counter.sampling(nowhere, nowhere, nowhere, 64)
    yield cost.sampling(config, measured, assumed, sampled, Hardware(batch_size=64))
    judged = counter.judging(nowhere, (nowhere, nowhere), 8)
    yield cost.judging(config, measured, assumed, judged, Hardware(batch_size=8))
    trained = counter.reward(nowhere, "reward_model", nowhere, judged.rows, 4096, 1)
    yield cost.training(config, measured, assumed, trained, Hardware(recompute=True, tokens_per_pass=4096))
    learned = counter.rl(nowhere, nowhere, 4096, 8192, 8)
    options: list[dict[str, Any]] = [{}, {"ranks": 8, "zero": 2}, {"ranks": 8, "zero": 3}]
    for more in options:
        hardware = Hardware(batch_size=24, recompute=True, **passes, **more)
        yield cost.policy(config, measured, assumed, learned, hardware)


def priced(results: Path) -> dict[tuple[str, str], price.Priced]:
    """The stages of the demo's configuration, with tables in a folder."""
    raw = configuration.read([ROOT / "config.yaml", ROOT / "demo" / "config.yaml"])
    raw = configuration.merge(raw, {"pathvars": {"results": str(results)}})
    plan = Plan(configuration.load(raw, ROOT))
    return {(one.name, one.run): one for one in price.stages(plan, {})}


def beside(results: Path, folder: Path) -> Iterator[str]:
    """Rows of the demo's run, compared with the estimate from its prompts and people's pairs alone."""
    for table in ("prompts", "reward_data/pmp.parquet", "reward_data/pmp.manifest.json", "data"):
        (folder / table).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (results / table).is_dir() else shutil.copy
        copy(results / table, folder / table)
    before, after = priced(folder), priced(results)
    yield "| stage | run | quantity | estimate | with all tables | the run's own record |"
    yield "| --- | --- | --- | --- | --- | --- |"
    sizes = [0.0, 0.0, 0.0]
    for (name, run), one in after.items():
        foretold = before[name, run]
        found: list[tuple[str, float, float, float]] = []
        if name.startswith("response"):
            table = pl.read_parquet(one.path)
            found.append(("tokens read", foretold.work.tokens, one.work.tokens, table["prompt_tokens"].sum()))
            found.append(("tokens sampled", foretold.work.answers, one.work.answers, table["response_tokens"].sum()))
        elif name == "preferences":
            judged = json.loads(Path(one.path).with_suffix(".manifest.json").read_text())["counts"]["judged"]
            found.append(("pairs", foretold.work.rows, one.work.rows, judged))
        elif name == "policy":
            lines = [json.loads(line) for line in (Path(one.path) / "metrics.jsonl").read_text().splitlines()]
            each = one.work.rows // one.work.steps
            for what, key, counted in (("read", "query_tokens", "tokens"), ("sampled", "response_tokens", "answers")):
                number = round(each * sum(line[key] for line in lines))
                found.append((f"tokens {what}", getattr(foretold.work, counted), getattr(one.work, counted), number))
        else:
            counts = json.loads((Path(one.path) / "manifest.json").read_text())["counts"]
            found.append(("tokens", foretold.work.tokens, one.work.tokens, counts["tokens"]))
            found.append(("steps", foretold.work.steps, one.work.steps, counts["steps"]))
        for what, *numbers in found:
            yield f"| {name} | {run} | {what} | {' | '.join(f'{number:,.0f}' for number in numbers)} |"
        if one.cost.disk:
            actual = sum(file.stat().st_size for file in Path(one.path).rglob("*") if file.is_file())
            sizes = [size + more for size, more in zip(sizes, (foretold.cost.disk, one.cost.disk, actual), strict=True)]
    shown = " | ".join(f"{size / 1e6:.2f} MB" for size in sizes)
    yield f"| all | all | models on disk | {shown} |"


def main() -> None:
    """Write each table between its marks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo", type=Path, help="results of the demo; without them, its table is left as it is")
    results = parser.parse_args().demo
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, config in MODELS.items():
            config.save_pretrained(folder / name)
        found = {name: plan(folder, name) for name in EXAMPLES} | {"fits": "\n".join(fits(folder))}
        if results:
            found["demo"] = "\n".join(beside(results.resolve(), folder / "demo"))
    for file in (ROOT / "docs" / "cost.md", ROOT / "docs" / "slurm.md"):
        text = file.read_text(encoding="utf-8")
        for name, table in found.items():
            marks = rf"(<!-- {name}: written by `make docs-cost` -->\n).*?(<!-- /{name} -->)"
            text = re.sub(marks, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
