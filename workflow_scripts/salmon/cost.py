"""What each stage takes of a GPU's time and memory: arithmetic on a model's shape and on what there is to compute.

Times are ranges: each pass takes as long as its arithmetic or, where that is less, as the launching of its kernels;
4-bit weights are unpacked once for each use in a pass of many rows. Memory is what the objects take that the code
makes. Both were compared with what was measured on an H100 (`tests/test_cost.py`, benchmarks/gpu-h100.json).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from salmon.assumptions import Assumptions
from salmon.configuration import Config
from salmon.likelihood import LOGITS, PER_LOGIT
from salmon.recompute import MARGIN, TRAINED
from salmon.shape import Shape
from salmon.workload import Work

Range = tuple[float, float]
Stage = Literal["sft", "response0", "response1", "preferences", "pmp", "reward_model", "policy"]

KERNELS = 14
"""Kernels per linear layer with LoRA in a forward pass, all else included: a 7B has 3,162 for 224 layers, a 1B 1,546
for 112 (benchmarks/gpu-h100.json)."""
IN_4_BITS = 1.5
"""As many times as long where weights are unpacked, by the updates of a 1B (the same file)."""
UNPACKING = 4.5
"""Bytes that memory moves per 4-bit weight that is unpacked: half a byte is read, two are written and read again."""
RESERVED = 1.2e9
"""Bytes that CUDA, its libraries and NCCL take of a GPU beside PyTorch."""
FLOAT32 = 4


@dataclass(frozen=True)
class Hardware:
    """The resources of a rule, as far as they decide time and memory.

    Attributes:
        jobs: of the stage.
        nodes: of a job.
        ranks: GPUs of a node.
        batch_size: rows that a GPU samples or judges at a time.
        tokens_per_pass: with gradients.
        tokens_per_forward_pass: without.
        recompute: whether activations are; `auto`: where they do not fit.
        zero: stage of DeepSpeed's sharding; 0: none.
        together: whether all GPUs of a job hold one model.
        engine_memory: share of the GPU's memory that an engine takes; 0 without one.
    """

    jobs: int = 1
    nodes: int = 1
    ranks: int = 1
    batch_size: int = 1
    tokens_per_pass: int = 1
    tokens_per_forward_pass: int = 1
    recompute: bool | Literal["auto"] = "auto"
    zero: int = 0
    together: bool = False
    engine_memory: float = 0.0

    @property
    def gpus(self) -> int:
        """Of a job."""
        return self.nodes * self.ranks

    @property
    def working(self) -> int:
        """Ranks of all jobs that compute different rows."""
        return self.jobs * (1 if self.together else self.gpus)


@dataclass(frozen=True)
class Cost:
    """What one stage takes.

    Attributes:
        seconds: of one of its jobs, the pessimist's first.
        parts: the same of its parts.
        memory: bytes of a GPU by what they are for; those of parts that come one after another are in `phases`.
        phases: bytes on top of `memory`, by phase; the largest counts.
        recomputed: whether activations are computed again, which `auto` decides by the memory.
        fits: whether the GPU has as much.
        advice: where it does not: what to change.
        disk: bytes that the stage leaves.
        passing: bytes of checkpoints until it has ended.
    """

    seconds: Range
    parts: Mapping[str, Range]
    memory: Mapping[str, float]
    phases: Mapping[str, float]
    recomputed: bool = False
    fits: bool = True
    advice: str = ""
    disk: float = 0.0
    passing: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes of a GPU."""
        return RESERVED + sum(self.memory.values()) + max(self.phases.values(), default=0.0)


@dataclass
class _Time:
    """Adds up seconds of one rank."""

    shape: Shape
    assumed: Assumptions
    is_4_bit: bool
    slow: float = 0.0
    fast: float = 0.0
    parts: dict[str, Range] = field(default_factory=dict)

    def passes(self, name: str, arithmetic: float, number: float, uses: int = 1) -> None:
        """Passes over many tokens.

        Args:
            name: of the part.
            arithmetic: operations of a rank, in all passes.
            number: of passes.
            uses: how often a pass goes through the layers: forward, backward (whose kernels are twice as many), again.
        """
        card, found = self.assumed.card, []
        for share, bandwidth, launch in self._ends():
            seconds = arithmetic / (card.tflops * 1e12 * share)
            kernels = (uses + (uses > 1)) * self.shape.modules * KERNELS * (IN_4_BITS if self.is_4_bit else 1)
            seconds = max(seconds, number * kernels * launch)
            if self.is_4_bit:
                seconds += number * uses * self.shape.linear * UNPACKING / (card.bandwidth * 1e9 * bandwidth)
            found.append(seconds)
        self._add(name, found)

    def sampling(self, name: str, steps: Range, rows: int, length: float, *, engine: bool) -> None:
        """Steps that give each slot a token.

        Args:
            name: of the part.
            steps: of a rank, the pessimist's first.
            rows: slots.
            length: of a text, half of which a token finds in the cache on average, and its prompt.
            engine: whether an engine samples, whose kernels are launched together.
        """
        shape, card, found = self.shape, self.assumed.card, []
        # A matrix product with 4-bit weights reads them as they are for few rows, and unpacks them for many.
        reads = shape.weights("nf4" if self.is_4_bit else "none")
        many = shape.linear * UNPACKING + (shape.others + shape.experts) * shape.itemsize if self.is_4_bit else reads
        cache = rows * length * shape.cache
        for number, read, (share, bandwidth, launch) in zip(steps, (many, reads), self._ends(), strict=True):
            moved = (read + cache) / (card.bandwidth * 1e9 * bandwidth)
            computed = shape.arithmetic(rows, length, answers=rows) / (card.tflops * 1e12 * share)
            launched = 0 if engine else shape.modules * KERNELS * launch
            found.append(number * max(moved, computed, launched))
        self._add(name, found)

    def _ends(self) -> list[tuple[float, float, float]]:
        """The pessimist's numbers, and the optimist's."""
        assumed = self.assumed
        launches = sorted(assumed.launch, reverse=True)
        shares = zip(sorted(assumed.arithmetic), sorted(assumed.bandwidth), launches, strict=True)
        return [(share, bandwidth, launch * 1e-6) for share, bandwidth, launch in shares]

    def _add(self, name: str, seconds: list[float]) -> None:
        self.slow, self.fast = self.slow + seconds[0], self.fast + seconds[1]
        before = self.parts.get(name, (0.0, 0.0))
        self.parts[name] = (before[0] + seconds[0], before[1] + seconds[1])

    @property
    def seconds(self) -> Range:
        """In all."""
        return self.slow, self.fast


def sampling(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """Response0 or response1."""
    model = config.model
    time, engine = _time(config, shape, assumed), hardware.engine_memory > 0
    rows, answers = work.rows / hardware.working, work.answers / hardware.working
    at_once = max(1, min(hardware.batch_size, round(rows)))
    divided = hardware.gpus if hardware.together else 1
    time.passes("prompts", shape.arithmetic(work.tokens / hardware.working, work.length) / divided, rows / at_once)
    steps = tuple(answers / at_once / share for share in sorted(assumed.useful))
    time.sampling("answers", (steps[0], steps[1]), at_once, work.length, engine=engine)
    memory = {"weights": shape.weights(model.quantization) / divided}
    if model.adapter:
        memory["adapters"] = shape.lora * FLOAT32 / divided
    phases = {"sampling": _cache(shape, at_once, work.longest) / divided}
    if engine:
        memory, phases = {"engine": hardware.engine_memory * assumed.card.memory * 1e9}, {}
    return _judged(Cost(time.seconds, time.parts, memory, phases), assumed, {"sampling": "batch_size"}, config)


def judging(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """The judging of all pairs."""
    time = _time(config, shape, assumed)
    divided = hardware.gpus if hardware.together else 1
    share = work.tokens / hardware.working
    time.passes("pairs", shape.arithmetic(share, work.length) / divided, work.passes)
    memory = {"weights": shape.weights(config.model.quantization) / divided}
    if config.model.adapter:
        memory["adapters"] = shape.lora * FLOAT32 / divided
    tokens = hardware.batch_size * max(work.longest, 1)
    phases = {"judging": tokens * (_working(shape) + shape.cache) / divided + tokens * work.longest * shape.itemsize}
    return _judged(Cost(time.seconds, time.parts, memory, phases), assumed, {"judging": "batch_size"}, config)


def training(
    config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware, *, is_sft: bool = False
) -> Cost:
    """SFT, pre-training or training of the reward model."""
    ranks = hardware.working
    memory = {"weights": _weights(config, shape, hardware), **_trained(shape.lora, 1, hardware)}
    tokens = max(hardware.tokens_per_pass, work.longest if is_sft else 2 * work.longest)
    logits = tokens * shape.vocabulary * PER_LOGIT if is_sft else 0
    kept, again = _activations(shape, tokens, work.longest)

    def cost(recomputed: bool) -> Cost:
        time = _time(config, shape, assumed)
        answers = work.tokens if is_sft else 0
        once = shape.arithmetic(work.tokens, work.length, answers=answers, backward=True)
        if recomputed:
            once += shape.arithmetic(work.tokens, work.length)
        time.passes("updating", once / ranks, work.passes, uses=3 if recomputed else 2)
        held = shape.arithmetic(work.scored, work.length) / ranks
        time.passes("held out", held, work.scored / ranks / hardware.tokens_per_pass)
        phases = {"updating": (again if recomputed else kept) + logits}
        found = Cost(
            time.seconds, time.parts, memory, phases, recomputed, disk=_disk(shape.lora), passing=_passing(shape.lora)
        )
        return _judged(found, assumed, {"updating": "tokens_per_pass"}, config)

    return _choose(hardware, cost)


def policy(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """PPO of one run."""
    ppo, model, ranks = config.ppo, config.model, hardware.gpus
    engine = ppo.engine == "vllm"
    adapters = (4 if model.adapter else 3) * shape.lora * FLOAT32
    memory = {"weights": _weights(config, shape, hardware), "adapters": adapters - 2 * shape.lora * FLOAT32}
    memory |= _trained(shape.lora, 2, hardware)
    if engine:
        memory["engine"] = hardware.engine_memory * assumed.card.memory * 1e9
    rows = work.rows / work.steps / ranks
    at_once = max(1, min(hardware.batch_size, round(rows)))
    longest = max(work.longest, ppo.reward_max_length)
    kept, again = _activations(shape, max(hardware.tokens_per_pass, work.longest), work.longest)
    logits = min(LOGITS, hardware.tokens_per_pass * shape.vocabulary) * PER_LOGIT
    passed = max(hardware.tokens_per_forward_pass, longest) * _working(shape)
    tokens, answer = work.tokens + work.answers, work.answers / work.rows

    def cost(recomputed: bool) -> Cost:
        time = _time(config, shape, assumed)
        prompts = shape.arithmetic(work.tokens, work.length) / ranks
        time.passes("sampling", prompts, work.steps * rows / at_once)
        # Where all rows of a step are sampled at once, the step ends with the longest of them.
        waited = work.steps * ppo.response_length, work.steps * min(2 * answer, ppo.response_length)
        shares = sorted(assumed.useful)
        steps = [
            max(work.answers / ranks / at_once / share, least) for share, least in zip(shares, waited, strict=True)
        ]
        time.sampling("sampling", (steps[0], steps[1]), at_once, work.length, engine=engine)
        measured = 3 * shape.arithmetic(tokens, work.length) + 2 * shape.arithmetic(0, 0, answers=work.answers)
        measured += shape.arithmetic(work.scored, work.scored / work.rows)
        time.passes("measuring", measured / ranks, work.forward_passes)
        updated = shape.arithmetic(tokens, work.length, answers=work.answers, backward=True)
        updated += shape.arithmetic(tokens, work.length, backward=True)
        updated += 2 * shape.arithmetic(tokens, work.length) * recomputed
        time.passes("updating", ppo.inner_epochs * updated / ranks, 2 * work.passes, uses=3 if recomputed else 2)
        phases = {"measuring": passed + logits, "updating": (again if recomputed else kept) + logits}
        if not engine:
            phases["sampling"] = _cache(shape, at_once, work.longest)
        names = {"sampling": "sampling_batch_size", "updating": "tokens_per_pass"}
        found = Cost(
            time.seconds,
            time.parts,
            memory,
            phases,
            recomputed,
            disk=_disk(shape.lora),
            passing=2 * _passing(shape.lora),
        )
        return _judged(found, assumed, names | {"measuring": "tokens_per_forward_pass"}, config)

    return _choose(hardware, cost)


def _time(config: Config, shape: Shape, assumed: Assumptions) -> _Time:
    return _Time(shape, assumed, config.model.quantization == "nf4")


def _choose(hardware: Hardware, cost: Callable[[bool], Cost]) -> Cost:
    """With or without recomputed activations, as the resource says, or as `recompute.is_wanted` would."""
    if hardware.recompute != "auto":
        return cost(hardware.recompute)
    kept = cost(False)
    return cost(True) if hardware.zero == 3 or not kept.fits else kept


def _weights(config: Config, shape: Shape, hardware: Hardware) -> float:
    """Bytes of the base model's weights; ZeRO-3 divides them, and gathers one layer's at a time."""
    whole = shape.weights(config.model.quantization)
    return whole / hardware.gpus + whole / shape.layers if hardware.zero == 3 else whole


def _trained(lora: int, adapters: int, hardware: Hardware) -> dict[str, float]:
    """Bytes of trained adapters, their gradients and moments (DeepSpeed divides these, and a copy in float32)."""
    parameters = adapters * lora
    states = (TRAINED + FLOAT32) / hardware.gpus if hardware.zero else TRAINED
    return {"trained adapters": FLOAT32 * parameters, "gradients and moments": states * parameters}


def _activations(shape: Shape, tokens: int, length: int) -> tuple[float, float]:
    """Bytes that a pass keeps for its backward pass; and where they are computed again, layer by layer."""
    linear, quadratic = shape.graph or (34 * shape.layers * shape.width * shape.itemsize, 0.0)  # or by a Llama's
    graph = MARGIN * (linear + quadratic * length) * tokens
    return graph, shape.layers * shape.width * shape.itemsize * tokens + graph / shape.layers


def _working(shape: Shape) -> float:
    """Bytes per token of a pass that keeps nothing: some results of one layer."""
    linear, _ = shape.graph or (34 * shape.layers * shape.width * shape.itemsize, 0.0)
    return linear / shape.layers


def _cache(shape: Shape, rows: int, length: int) -> float:
    """Bytes while sampling: the cache, of which one layer's is written anew for each token; and the logits."""
    return rows * length * shape.cache * (1 + 1 / shape.layers) + 4 * FLOAT32 * rows * shape.vocabulary


def _disk(lora: int) -> float:
    """Bytes that a training leaves: its adapter, in float32."""
    return FLOAT32 * lora


def _passing(lora: int) -> float:
    """Bytes of two checkpoints of an adapter, of which the older one goes when the newer one is whole."""
    return 2.0 * TRAINED * lora


def _judged(cost: Cost, assumed: Assumptions, names: Mapping[str, str], config: Config) -> Cost:
    """The same with what to change where it does not fit."""
    free = assumed.card.memory * 1e9
    if cost.peak <= free:
        return cost
    fixed = RESERVED + sum(cost.memory.values())
    largest = max(cost.phases, key=lambda name: cost.phases[name], default="")
    if fixed + 0.05 * cost.phases.get(largest, 0.0) < free and largest:
        share = (free - fixed) / cost.phases[largest]
        advice = f"lower {names[largest]} to {share:.0%} of what it is"
    elif config.model.quantization == "none":
        advice = "set model.quantization to nf4, share the weights (zero3.json, tensor_parallel), or take larger GPUs"
    else:
        advice = "take larger GPUs, or model.quantization none with shared weights (zero3.json, tensor_parallel)"
    return replace(cost, fits=False, advice=advice)
