"""Sampling and the parts of a PPO step on one GPU, with random weights in the shapes of real models.

    python benchmarks/gpu.py [--shapes 1b 7b] [--batches 16 64 128] [--minutes 4] [--output gpu.json] [...]

It needs envs/data.txt and envs/model.txt (without bitsandbytes, NF4 is left out). Nothing is downloaded: the models are
made on the device. As in RL, `SharedBase` loads their four adapters (r 64, on all linear layers) and heads from files;
the sampled policy is the one that PPO samples from.

Sampling: lengths of prompts and responses are log-normal and skewed, like those of chats. Random weights do not end a
response, so each row gets its length as a limit. Transformers' `generate` has no limit per row: it runs each batch to
its longest row, as it does with ended rows, and only useful tokens count. Useful share: useful tokens per slot and call
of the model. Kernels and GPU time of a step are differences of two profiled runs at the smallest batch; copies do not
count as kernels. If time does not suffice for all tokens, both runs of a pair get the same lower cap (column `cap`:
tokens of the longest row).

PPO: rollouts of 128 + 256 tokens. `measure` computes log-probabilities of policy and reference, and values; `score`
runs the reward model; `update` is a backward pass of policy and value model over each rollout and a step of the
optimizer, with and without recomputed activations. Peak memory does not include the optimizer's paged states.

A failed cell is recorded with its error, and the rest continues. The file is rewritten after each cell.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, pre_tokenizers  # noqa: E402
from tokenizers import models as tokenizer_models  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from salmon import models, ppo, shared_base  # noqa: E402
from salmon.batching import batches, left_pad  # noqa: E402
from salmon.config import Lora, Model, Ppo  # noqa: E402
from salmon.optimization import ReplicatedOptimizer  # noqa: E402
from salmon.principles import read_weighted  # noqa: E402
from salmon.sampling import TransformersSampler  # noqa: E402
from salmon.shared_base import SharedBase  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {  # Llama-3.2-1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7b": {  # Llama-2-7B
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
ENGINES = ("ours", "transformers")
LORA = Lora(r=64)
TEMPERATURE = 0.7
STOP = ("\n\n### User",)
LONGEST_PROMPT = 256
PROMPT = (90, 0.6)  # median and sigma of a log-normal distribution of tokens
RESPONSE = (55, 0.9)  # with a cap of 256, the mean is a third of the longest
QUERY_TOKENS, RESPONSE_TOKENS = 128, 256  # tokens of a rollout
SHORT, LONG = 2, 6  # tokens per row, in runs whose difference is the cost of a step
UNITS = {"load": 3.0, "pair": 5.0, "ppo": 4.0}  # shares of the time, per layer of the model


@dataclass
class Clock:
    """Divides the remaining time among the remaining cells."""

    deadline: float
    todo: list[tuple[str, float]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def take(self, name: str) -> float:
        """Seconds for the next cell of this name, which then counts as done."""
        total = sum(weight for _, weight in self.todo)
        place = next(place for place, (each, _) in enumerate(self.todo) if each == name)
        return self.left * self.todo.pop(place)[1] / total

    def drop(self, prefix: str) -> None:
        """Drop the cells whose names begin with this."""
        self.todo = [each for each in self.todo if not each[0].startswith(prefix)]


@dataclass
class Results:
    """Cells by table, printed as they arrive and written to a file after each."""

    output: Path | None
    about: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **cell: Any) -> None:
        """Add a cell: `table` and its values."""
        self.cells.append(cell)
        print("  ".join(f"{name} {_show(value)}" for name, value in cell.items()), flush=True)
        if self.output:
            self.output.write_text(json.dumps({**self.about, "cells": self.cells}, indent=1) + "\n")

    def table(self, kind: str) -> str:
        """The cells of a table in Markdown, with errors below."""
        rows = [cell for cell in self.cells if cell["table"] == kind and "error" not in cell]
        errors = [cell for cell in self.cells if cell["table"] == kind and "error" in cell]
        lines = []
        if rows:
            heads = [name for name in rows[0] if name != "table"]
            lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += ["| " + " | ".join(_show(row.get(name)) for name in heads) + " |" for row in rows]
        for cell in errors:
            what = ", ".join(_show(value) for name, value in cell.items() if name not in ("table", "error"))
            lines.append(f"\n{what}: {cell['error']}")
        return "\n".join(lines)

    @contextmanager
    def noting(self, table: str, **what: Any) -> Iterator[None]:
        """Record an error as a cell, and continue."""
        try:
            yield
        except Exception as error:  # the next measurement may work
            lines = str(error).strip().splitlines() or [""]
            said = lines[0] if isinstance(error, torch.OutOfMemoryError) else lines[-1]
            traceback.print_exception(error, limit=-3)
            self.add(table=table, **what, error=f"{type(error).__name__}: {said[:300]}")
        free()


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def main() -> None:
    """Measure as much as time allows, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=1, help="rows to sample, as a multiple of the batch")
    parser.add_argument("--cap", type=int, default=256, help="largest number of tokens sampled per row")
    parser.add_argument("--rollouts", type=int, default=16, help="rollouts of the PPO step")
    parser.add_argument("--tokens-per-pass", type=int, default=4096, help="tokens of a backward pass, padding included")
    parser.add_argument("--only", nargs="+", choices=("sampling", "ppo"), default=["sampling", "ppo"])
    parser.add_argument("--minutes", type=float, default=4.0, help="approximate limit for the whole run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    clock = Clock(time.monotonic() + 60 * args.minutes)
    results = Results(args.output, {**describe(device), "options": {k: str(v) for k, v in vars(args).items()}})
    print(json.dumps(results.about), flush=True)
    if "nf4" in args.precisions and importlib.util.find_spec("bitsandbytes") is None:
        results.add(table="loading", model=None, precision="nf4", error="NF4: bitsandbytes is not installed")
        args.precisions = [each for each in args.precisions if each != "nf4"]
    for shape in args.shapes:
        for precision in args.precisions:
            cells = ["load", *(f"pair {size}" for size in args.batches if "sampling" in args.only)]
            cells += ["ppo"] if "ppo" in args.only else []
            layers = SHAPES[shape]["num_hidden_layers"]
            clock.todo += [
                (f"{shape} {precision} {cell}", layers * UNITS[cell.split()[0]] * (1.3 if precision == "nf4" else 1))
                for cell in cells
            ]
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder, results.noting("loading", model=shape):
            bench = Bench(args, shape, device, Path(folder), clock, results)
            began = time.monotonic()
            bench.save_adapters()
            free()
            seconds = time.monotonic() - began
            results.add(table="loading", model=shape, precision=None, what="adapters made and saved", seconds=seconds)
            for precision in args.precisions:
                with results.noting("loading", model=shape, precision=precision):
                    bench.run(precision)
                clock.drop(f"{shape} {precision}")
        clock.drop(shape)
    titles = {"loading": "Loading", "kernels": "A decoding step", "sampling": "Sampling", "ppo": "PPO"}
    for kind, title in titles.items():
        print(f"\n### {title}\n\n{results.table(kind)}")
    print(f"\n{60 * args.minutes - clock.left:.0f} s in all")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    packages = {}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    cuda = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        **packages,
    }


class Bench:
    """The cells of one shape.

    Args:
        args: the command-line arguments.
        shape: one of `SHAPES`.
        device: the models' device.
        folder: a folder for adapters.
        clock: the clock of all cells.
        results: the results of all cells.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        shape: str,
        device: torch.device,
        folder: Path,
        clock: Clock,
        results: Results,
    ) -> None:
        self.args, self.shape, self.device, self.folder = args, shape, device, folder
        self.clock, self.results = clock, results
        self.vocabulary = SHAPES[shape]["vocab_size"]
        self.tokenizer = make_tokenizer(self.vocabulary)

    def settings(self, precision: str) -> Model:
        """The model as a configuration names it; its base is created instead of read."""
        quantization = "nf4" if precision == "nf4" else "none"
        return Model(base="random", adapter=str(self.folder / "policy"), quantization=quantization, dtype="bfloat16")

    def load_base(self, model: Model, device: torch.device | str) -> PreTrainedModel:
        """Replaces `models.load_base`."""
        base = make_base(self.shape, model.attention, device)
        return quantize(base) if model.quantization == "nf4" else base

    def save_adapters(self) -> None:
        """A reward model with adapter and head, and the same adapter for a policy."""
        reward, policy = self.folder / "reward", self.folder / "policy"
        with mock.patch.object(models, "load_base", self.load_base):
            made = models.new_reward_model(self.settings("bf16").without_adapter(), LORA, self.device, seed=1)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:  # initially zero
                    parameter.normal_(0, 1e-3)
        made.save_pretrained(str(reward), save_embedding_layers=False)
        policy.mkdir()
        config = json.loads((reward / "adapter_config.json").read_text())
        config.update(task_type="CAUSAL_LM", modules_to_save=None)
        (policy / "adapter_config.json").write_text(json.dumps(config))
        weights = load_file(reward / "adapter_model.safetensors")
        save_file(
            {name: weight for name, weight in weights.items() if "lora_" in name},
            policy / "adapter_model.safetensors",
            {"format": "pt"},
        )

    def run(self, precision: str) -> None:
        """All cells of one precision."""
        what = {"model": self.shape, "precision": precision}
        prefix = f"{self.shape} {precision}"
        self.clock.take(f"{prefix} load")
        if self.clock.left < 10:
            raise TimeoutError("no time left")
        began = time.monotonic()
        with (
            mock.patch.object(shared_base, "load_base", self.load_base),
            mock.patch.object(models, "load_base", self.load_base),
        ):
            shared = SharedBase(self.settings(precision), LORA, self.folder / "reward", self.device, seed=1)
        free()
        self.results.add(table="loading", **what, what="four models loaded", seconds=time.monotonic() - began)
        if "sampling" in self.args.only:
            self.sampling(shared, what)
        if "ppo" in self.args.only:
            self.clock.take(f"{prefix} ppo")
            with self.results.noting("ppo", **what):
                self.ppo_step(shared, what)

    def sampling(self, shared: SharedBase, what: dict[str, str]) -> None:
        """Our loop against transformers', at each batch size."""
        shared.eval()
        with shared.use("policy"):
            policy = shared  # its active adapter is the policy's here
            for engine in ENGINES:
                with self.results.noting("kernels", **what, engine=engine):
                    self.decoding_step(policy, engine, what)
            for size in self.args.batches:
                budget = self.clock.take(f"{what['model']} {what['precision']} pair {size}")
                expected = 0.0  # time of both engines at the full cap
                for engine in ENGINES:
                    with suppress(Exception):  # recorded where it is measured
                        short, long = (self.seconds(policy, engine, size, tokens) for tokens in (SHORT, LONG))
                        expected += short + self.args.cap * max(0.0, long - short) / (LONG - SHORT)
                share = min(1.0, budget / max(1e-9, expected * self.args.rounds))
                for engine in ENGINES:
                    with self.results.noting("sampling", **what, batch=size, engine=engine):
                        if self.clock.left < 5:
                            raise TimeoutError("no time left")
                        self.skewed(policy, engine, size, share, what)

    def decoding_step(self, policy: SharedBase, engine: str, what: dict[str, str]) -> None:
        """Kernels and time of a step at the smallest batch, from the difference of a long and a short run."""
        size = min(self.args.batches)

        def run(tokens: int) -> None:
            self.sample(policy, engine, [tokens] * size, size)

        profiled(lambda: run(SHORT))  # warm-up, also of the profiler
        (few, busy), (many, busier) = (profiled(lambda n=n: run(n)) for n in (SHORT, LONG))  # type: ignore[misc]
        short, long = (self.seconds(policy, engine, size, tokens) for tokens in (SHORT, LONG))
        steps = LONG - SHORT
        self.results.add(
            table="kernels",
            **what,
            engine=engine,
            batch=size,
            kernels=(many - few) / steps if many else None,
            **{"GPU ms": (busier - busy) / steps if many else None, "wall ms": 1000 * (long - short) / steps},
        )

    def skewed(self, policy: SharedBase, engine: str, size: int, share: float, what: dict[str, str]) -> None:
        """Responses of skewed lengths, all shortened by this factor."""
        rows = size * self.args.rounds
        limits = [max(1, round(length * share)) for length in draw(RESPONSE, self.args.cap, rows, 2)]
        with counted(policy.lm.get_base_model()) as calls:
            tokens: list[int] = []
            seconds, peak = measured(lambda: tokens.append(self.sample(policy, engine, limits, size)))
        self.results.add(
            table="sampling",
            **what,
            batch=size,
            engine=engine,
            rows=rows,
            cap=max(limits),
            tokens=tokens[0],
            seconds=seconds,
            **{
                "tokens/s": tokens[0] / seconds,
                "ms a call": 1000 * seconds / len(calls),
                "useful share": tokens[0] / (size * len(calls)),
                "peak GB": peak,
            },
        )

    def seconds(self, policy: SharedBase, engine: str, size: int, tokens: int) -> float:
        """Seconds of one batch of equally long responses."""
        return measured(lambda: self.sample(policy, engine, [tokens] * size, size))[0]

    def sample(self, policy: SharedBase, engine: str, limits: Sequence[int], size: int) -> int:
        """Sample a response of each length, in batches; returns the useful tokens."""
        lengths = draw(PROMPT, LONGEST_PROMPT, len(limits), 1)
        random = np.random.default_rng(0)
        prompts = [random.integers(3, self.vocabulary, length).tolist() for length in lengths]
        if engine == "ours":
            sampler = TransformersSampler(self.tokenizer, self.device, batch_size=size)
            sampler.sync(policy)
            seeds = range(len(prompts))
            found = sampler.sample(prompts, seeds, max_new_tokens=limits, temperature=TEMPERATURE, stop=STOP)
            return sum(len(each.tokens) for each in found)
        torch.manual_seed(0)
        for batch in batches(lengths, size):
            ids, mask = (tensor.to(self.device) for tensor in left_pad([prompts[row] for row in batch]))
            config = GenerationConfig(
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(limits[row] for row in batch),
                pad_token_id=0,
            )
            with torch.no_grad():
                policy.lm.generate(input_ids=ids, attention_mask=mask, generation_config=config).tolist()
        return sum(limits)

    def ppo_step(self, shared: SharedBase, what: dict[str, str]) -> None:
        """The parts of a PPO step after sampling."""
        number, budget = self.args.rollouts, self.args.tokens_per_pass
        settings = Ppo(
            template=str(ROOT / "prompts/templates/reward_model_rl.txt"),
            principles=str(ROOT / "prompts/principles/rl.json"),
            response_length=RESPONSE_TOKENS,
            rollout_batch_size=number,
            minibatch_size=number,
            inner_epochs=1,
            temperature=TEMPERATURE,
        )
        principles = read_weighted(settings.principles)
        rollouts = self.rollouts(number)

        def measure(chosen: list[ppo.Rollout]) -> None:
            ppo.measure(shared, chosen, TEMPERATURE, 2 * budget)

        def score(chosen: list[ppo.Rollout]) -> None:
            ppo.score(shared, self.tokenizer, chosen, principles, 0, settings, 2 * budget)

        optimizer, named = make_optimizer(shared)

        def update(chosen: list[ppo.Rollout]) -> None:
            ppo.update(shared, optimizer, chosen, 0, settings, budget, 1e-6)

        def cell(part: str, run: Callable[[list[ppo.Rollout]], None]) -> None:
            with self.results.noting("ppo", **what, part=part):
                if self.clock.left < 5:
                    raise TimeoutError("no time left")
                run(rollouts[:4])  # warm-up
                took, peak = measured(lambda: run(rollouts))
                tokens = number * (QUERY_TOKENS + RESPONSE_TOKENS)
                self.results.add(
                    table="ppo",
                    **what,
                    part=part,
                    rollouts=number,
                    seconds=took,
                    **{"tokens/s": tokens / took, "peak GB": peak},
                )

        cell("measure", measure)
        cell("score", score)
        if not all(len(rollout.values) for rollout in rollouts):  # not measured, for lack of time or memory
            return
        ppo.estimate_advantages(rollouts, settings)
        cell(f"update, {named}", update)
        shared.lm.gradient_checkpointing_enable({"use_reentrant": False})
        cell(f"update with checkpointing, {named}", update)

    def rollouts(self, number: int) -> list[ppo.Rollout]:
        """Rollouts of random tokens."""
        random = np.random.default_rng(3)
        found = []
        for place in range(number):
            query, response = (
                random.integers(3, self.vocabulary, length).tolist() for length in (QUERY_TOKENS, RESPONSE_TOKENS)
            )
            found.append(
                ppo.Rollout(
                    place=place,
                    query=query,
                    instruction=self.tokenizer.decode(query),
                    question_type="general",
                    length_bonus=0.0,
                    response=response,
                    text=self.tokenizer.decode(response),
                    finished=True,
                )
            )
        return found


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word, for each id that the model knows, and no end token."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, vocabulary)}}
    whole = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", pad_token="<unk>")  # noqa: S106


def make_base(shape: str, attention: str, device: torch.device | str) -> PreTrainedModel:
    """A Llama with random weights, made on the device, in bfloat16 and eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    base.generation_config = GenerationConfig()
    return base.eval()


def quantize(base: PreTrainedModel) -> PreTrainedModel:
    """All linear layers except the output layer in NF4, with the options of `models.load_base`."""
    import bitsandbytes as bnb

    for name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or module is base.get_output_embeddings():
            continue
        options = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
        replaced = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            device="meta",
            **options,
        )
        weight = module.weight
        replaced.weight = bnb.nn.Params4bit(weight.detach(), requires_grad=False, **options).to(weight.device)
        replaced.weight.module = replaced
        base.set_submodule(name, replaced)
        del module, weight
    base.is_loaded_in_4bit = True  # PEFT checks this
    return base.eval()


def make_optimizer(shared: SharedBase) -> tuple[ReplicatedOptimizer, str]:
    """The product's optimizer; torch's AdamW on a GPU without bitsandbytes, and on the CPU."""
    if shared.device.type == "cuda":
        with suppress(ImportError):
            return ReplicatedOptimizer(shared, 1.0), "paged AdamW"
    with mock.patch.object(shared, "device", torch.device("cpu")):
        return ReplicatedOptimizer(shared, 1.0), "torch's AdamW"


def draw(distribution: tuple[float, float], largest: int, number: int, seed: int) -> list[int]:
    """Skewed lengths from 4 to `largest`, determined by the seed."""
    median, sigma = distribution
    lengths = np.random.default_rng(seed).lognormal(np.log(median), sigma, number)
    return [int(length) for length in lengths.clip(min(4, largest), largest)]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one at each call of the model."""
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def measured(run: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of a run, and the largest memory on the GPU in GB (10^9 bytes)."""
    cuda = torch.cuda.is_available()
    if cuda:
        free()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    return took, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


def profiled(run: Callable[[], object]) -> tuple[int, float]:
    """Kernels that a run starts, and GPU milliseconds; 0 if unknown."""
    if not torch.cuda.is_available():
        run()
        return 0, 0.0
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        events = [each for each in found.events() or [] if each.device_type.name == "CUDA"]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the profiler does not work everywhere
        print(f"no profile: {error}", flush=True)
        return 0, 0.0
    kernels = [each for each in events if not each.name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(each.time_range.elapsed_us() for each in events) / 1000


def free() -> None:
    """Free memory that nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
