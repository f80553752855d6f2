"""The cost of a configuration's runs on the hardware of a profile: work and cost of each stage."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from salmon import cost, shape
from salmon.assumptions import Assumptions
from salmon.border import read_json
from salmon.config import Model
from salmon.configuration import Config
from salmon.cost import Cost, EngineHardware, Hardware, Range
from salmon.errors import UserError
from salmon.plan import ON_GPUS, Name, Plan, is_imported, judge_model
from salmon.shape import Shape
from salmon.tokenizers import load_tokenizer
from salmon.workload import Counter, Work

Resources = Mapping[str, Mapping[str, Any]]
GB = 1e9


@dataclass(frozen=True)
class Priced:
    """One artifact that needs GPUs.

    Attributes:
        name: name of the artifact.
        run: the first run that has it.
        path: path of the artifact.
        is_there: whether the artifact exists already.
        work: amount of computation.
        hardware: hardware that the profile gives it.
        cost: time, memory and disk space that the work takes.
        after: paths of the artifacts that it is made from, directly or not.
    """

    name: Name
    run: str
    path: str
    is_there: bool
    work: Work
    hardware: Hardware
    cost: Cost
    after: frozenset[str]

    @property
    def gpu_hours(self) -> Range:
        """GPU hours of all jobs; the optimistic value comes last."""
        slow, fast = (self.hardware.jobs * self.hardware.gpus * seconds / 3600 for seconds in self.cost.seconds)
        return slow, fast


def stages(plan: Plan, resources: Resources) -> Iterator[Priced]:
    """Every artifact of the targets that needs GPUs, in the order of the DAG, without those of the evaluation.

    Args:
        plan: plan of all runs.
        resources: rule -> resources of the profile.

    Raises:
        UserError: if a base model's configuration cannot be read, or the profile lacks a rule.
    """
    shapes: dict[str, Shape] = {}
    tokenizers: dict[str, Any] = {}
    works: dict[str, Work] = {}
    for name, rule in ON_GPUS.items():
        for run, config in plan.runs.items():
            path = plan.path(run, name)
            if path in works or path not in plan.wanted() or is_imported(config, name):
                continue
            model = judge_model(config) if name == "preferences" else config.model
            # A judge that is another model has its own tokenizer.
            reads = plan.tokenizer(run) if model == config.model else model
            key = repr((model.model_dump(exclude={"adapter", "adapter_revision"}), config.lora))
            if key not in shapes:
                shapes[key] = shape.measure(model.without_adapter(), config.lora)
            if repr(reads) not in tokenizers:
                tokenizers[repr(reads)] = _tokenizer(reads)
            hardware = _hardware(name, config, resources.get(rule, {}))
            counter = Counter(config, config.plan, tokenizers[repr(reads)])
            try:
                works[path] = work = _work(plan, run, name, counter, hardware, works)
                found = _cost(
                    name, config.model_copy(update={"model": model}), shapes[key], config.plan, work, hardware
                )
            except UserError as error:  # the stage would raise the same error
                works[path] = work = Work(rows=0, tokens=0)
                found = Cost(fits=False, advice=str(error))
            after = plan.ancestry([path]) - {path}
            yield Priced(name, run, path, Path(path).exists(), work, hardware, found, after)


def _tokenizer(model: Model) -> Any:
    """The tokenizer, or None if it is not available, in which case lengths are estimated."""
    try:
        return load_tokenizer(model)
    except UserError:
        return None


BATCH_SIZE: dict[Name, int] = {"response0": 16, "response1": 16, "preferences": 4, "policy": 32}
ENGINE_MEMORY = 0.4
"""Defaults of the scripts, for stages whose resources are not given: rows at a time, and the policy's engine."""


def _hardware(name: Name, config: Config, resources: Mapping[str, Any]) -> Hardware:
    """The resources of a rule as numbers."""
    shards = {"response0": config.sampling.shards, "response1": config.sampling.shards}
    shards["preferences"] = config.judge.shards
    sampled = {"response0": config.sampling.engine, "response1": config.sampling.engine, "policy": config.ppo.engine}
    return Hardware(
        jobs=shards.get(name, 1),
        nodes=int(resources.get("nodes", 1)),
        ranks=int(resources.get("ranks", 1)),
        batch_size=int(resources.get("sampling_batch_size", resources.get("batch_size", BATCH_SIZE.get(name, 1)))),
        tokens_per_pass=int(resources.get("tokens_per_pass", 2048)),
        tokens_per_forward_pass=int(resources.get("tokens_per_forward_pass", 8192)),
        recompute=_recompute(str(resources.get("gradient_checkpointing", "auto")).lower()),
        zero=_zero(str(resources.get("deepspeed") or "null")),
        together=str(resources.get("tensor_parallel", "false")).lower() == "true" and sampled.get(name) != "vllm",
        engine=_engine(name, str(resources.get("engine", ""))) if sampled.get(name) == "vllm" else None,
    )


def _recompute(setting: str) -> bool | Literal["auto"]:
    return "auto" if setting == "auto" else setting == "true"


def _zero(file: str) -> int:
    """ZeRO stage in a DeepSpeed configuration file; 0 without a file."""
    if file == "null":
        return 0
    found = read_json(file, "", "it must be a DeepSpeed configuration in JSON")
    return int(found.get("zero_optimization", {}).get("stage", 0))


def _engine(name: Name, words: str) -> EngineHardware:
    """The options of a stage's engine that affect its cost."""
    options = dict(re.findall(r"--engine\.([\w-]+)[ =](\S+)", words))
    return EngineHardware(
        memory=float(options.get("memory", ENGINE_MEMORY if name == "policy" else 0.9)),
        tensor_parallel=int(options.get("tensor-parallel", 1)),
        rows=int(options.get("max-rows", 256)),
        is_here="url" not in options,
    )


def _work(plan: Plan, run: str, name: Name, counter: Counter, hardware: Hardware, works: Mapping[str, Work]) -> Work:
    """The work of a stage."""

    def table(of: Name) -> Path:
        return Path(plan.path(run, of))

    match name:
        case "sft":
            return counter.sft(table("sft_data"), hardware.tokens_per_pass, hardware.gpus)
        case "response0" | "response1":
            at_once = cost.slots(hardware) * hardware.working
            return counter.sampling(table("prompts"), table(name), table("response0"), at_once)
        case "preferences":
            both = (table("response0"), table("response1"))
            return counter.judging(table("prompts"), both, hardware.batch_size * hardware.working)
        case "pmp" | "reward_model":
            records = table("pmp_data" if name == "pmp" else "reward_data")
            judged = works.get(plan.path(run, "preferences"))
            pairs = judged.rows if judged else counter.assumed.rows["prompts"]
            budget = hardware.tokens_per_pass
            return counter.reward(records, name, table("response0"), pairs, budget, hardware.gpus)
    budgets = hardware.tokens_per_pass, hardware.tokens_per_forward_pass
    return counter.rl(table("rl_prompts"), table("response0"), *budgets, hardware.gpus)


def _cost(name: Name, config: Config, measured: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """The cost of that work."""
    match name:
        case "response0" | "response1":
            return cost.sampling(config, measured, assumed, work, hardware)
        case "preferences":
            return cost.judging(config, measured, assumed, work, hardware)
        case "sft" | "pmp" | "reward_model":
            return cost.training(config, measured, assumed, work, hardware, is_sft=name == "sft")
    return cost.policy(config, measured, assumed, work, hardware)


def report(priced: Iterable[Priced], assumed: Assumptions) -> Iterator[str]:
    """Lines of Markdown: the work, its cost, and stages that do not fit."""
    found = [*priced]
    card = assumed.card
    yield f"GPU: {card.memory:g} GB, {card.tflops:g} TFLOPS, {card.bandwidth:g} GB/s (`plan.gpu`)."
    yield "A range goes from the optimistic to the pessimistic value."
    yield "*: rows or lengths are assumed (`plan.rows`, `plan.response_tokens`). They are counted if the tables exist:"
    yield "`prompts`, `pmp_data` and `rl_prompts` need no GPU, and `response0` shows how long responses are."
    yield ""
    head = ("stage", "run", "rows", "tokens read", "tokens sampled", "steps", "passes per GPU", "jobs x GPUs")
    yield from _table((*head, "GPU hours", "hours per job"), [_counts(one) for one in found])
    left = [one for one in found if not one.is_there]
    yield ""
    hours = _range(sum(one.gpu_hours[end] for one in left) for end in (0, 1))
    one_by_one = [sum(one.hardware.jobs * one.cost.seconds[end] / 3600 for one in left) for end in (0, 1)]
    stays = sum(one.cost.disk for one in left)
    yield f"The remaining stages take {hours} GPU hours and leave {_size(stays)} GB of models on disk."
    if left:
        yield f"Wall time: {_range(wall_hours(left))} hours if all jobs that can run at the same time do so, or"
        yield f"{_range(one_by_one)} hours if one job runs after another."
    yield "The evaluation, jobs without a GPU, queues and tables are not included."
    yield ""
    yield from _table(("stage", "run", "GB per GPU", "of which", "GB on disk"), [_sizes(one) for one in found])
    yield ""
    yield "Phases in brackets follow one another, so only the largest counts. On disk: first the files that stay, then"
    yield "checkpoints, which are removed when the stage ends."
    for one in left:
        if not one.cost.fits:
            what = f"does not fit into {card.memory:g} GB" if one.work.rows else "would be refused"
            yield ""
            yield f"**{one.name} of {one.run} {what}**: {one.cost.advice}."


def wall_hours(priced: Iterable[Priced]) -> Range:
    """Hours from the start to the end, with as many GPUs as all jobs need that can run at the same time.

    Args:
        priced: stages that remain, in the order of the DAG.
    """
    ends: dict[str, Range] = {}
    for one in priced:
        before = [ends[path] for path in one.after if path in ends]
        slow, fast = (max((end[which] for end in before), default=0.0) for which in (0, 1))
        ends[one.path] = slow + one.cost.seconds[0] / 3600, fast + one.cost.seconds[1] / 3600
    return max(end[0] for end in ends.values()), max(end[1] for end in ends.values())


def _counts(one: Priced) -> list[str]:
    """A row of the table of work and time."""
    work, hardware = one.work, one.hardware
    passes = f"{work.passes:,}" + (f" + {work.forward_passes:,} forward" if work.forward_passes else "")
    times = ["done", ""] if one.is_there else [_range(one.gpu_hours), _range(end / 3600 for end in one.cost.seconds)]
    return [
        one.name,
        one.run,
        f"{work.rows:,}{'' if work.counted else ' *'}",
        f"{work.tokens:,}",
        f"{work.answers:,}" if work.answers else "",
        f"{work.steps:,}" if work.steps else "",
        passes,
        f"{hardware.jobs} x {hardware.gpus}",
        *times,
    ]


def _sizes(one: Priced) -> list[str]:
    """A row of the table of memory and disk space."""
    found = one.cost
    parts = [f"{name} {_size(size)}" for name, size in found.memory.items()]
    phases = [f"{name} {_size(size)}" for name, size in found.phases.items()]
    parts += [f"[{', '.join(phases)}]"] if phases else []
    parts += ["activations recomputed"] if found.recomputed else []
    disk = f"{_size(found.disk)}; {_size(found.passing)}" if found.disk else ""
    return [one.name, one.run, f"{found.peak / GB:.1f}{'' if found.fits else ' **too large**'}", ", ".join(parts), disk]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _size(size: float) -> str:
    """A size in GB with two digits."""
    return f"{float(f'{size / GB:.2g}'):,g}"


def _range(ends: Iterable[float]) -> str:
    """Two numbers with two digits each, the smaller first."""
    low, high = (f"{float(f'{end:.2g}'):,g}" for end in sorted(ends))
    return low if low == high else f"{low} to {high}"
