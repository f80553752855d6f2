"""GPU time and memory of each stage, computed from a model's shape and the amount of work.

Times are ranges: each pass takes as long as its arithmetic or as the launches of its kernels, whichever is longer;
4-bit weights are unpacked once for each use in a pass over many rows. Memory is the sum of the objects that the code
creates. Both were compared with measurements on an H100 (`tests/test_cost.py`, benchmarks/gpu-h100.json).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from salmon.assumptions import Assumptions
from salmon.checkpoints import KEPT
from salmon.configuration import Config
from salmon.likelihood import LOGITS, PER_LOGIT
from salmon.optimization import buffer_bytes
from salmon.recompute import COPY, MARGIN, TRAINED, states_bytes
from salmon.shape import Shape
from salmon.workload import Work

Range = tuple[float, float]

KERNELS = 14
"""Kernels per linear layer with LoRA in a forward pass, including all other kernels: a 7B model has 3,162 for 224
layers, a 1B model 1,546 for 112 (benchmarks/gpu-h100.json)."""
IN_4_BITS = 1.5
"""Slowdown factor if weights are unpacked, measured on the updates of a 1B model (the same file)."""
UNPACKING = 4.5
"""Bytes of memory traffic per unpacked 4-bit weight: half a byte is read, two bytes are written and read again."""
RESERVED = 1.2e9
"""Bytes that CUDA, its libraries and NCCL take on a GPU in addition to PyTorch."""
FLOAT32 = 4


@dataclass(frozen=True)
class EngineHardware:
    """An engine's share of the GPUs: options of `vllm_server.Hardware`.

    Attributes:
        memory: share of a GPU's memory.
        tensor_parallel: number of GPUs that hold one model.
        rows: number of responses sampled at once.
        is_here: whether it runs on the job's GPUs rather than at a URL.
    """

    memory: float = 0.9
    tensor_parallel: int = 1
    rows: int = 256
    is_here: bool = True


@dataclass(frozen=True)
class Hardware:
    """The resources of a rule that affect time and memory.

    Attributes:
        jobs: number of jobs of the stage.
        nodes: number of nodes per job.
        ranks: number of GPUs per node.
        batch_size: rows that a GPU samples or judges at a time.
        tokens_per_pass: tokens of a pass with gradients.
        tokens_per_forward_pass: tokens of a pass without gradients.
        recompute: whether activations are recomputed; `auto`: only if they do not fit.
        zero: stage of DeepSpeed's sharding; 0 for none.
        together: whether all GPUs of a job hold one model.
        engine: the engine that samples, or None if our own loop does.
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
    engine: EngineHardware | None = None

    @property
    def gpus(self) -> int:
        """Number of GPUs of a job."""
        return self.nodes * self.ranks

    @property
    def divided(self) -> int:
        """Number of GPUs that hold one model during sampling and judging."""
        return self.gpus if self.together else self.engine.tensor_parallel if self.engine else 1

    @property
    def working(self) -> int:
        """Number of copies of the model over all jobs, each of which computes different rows."""
        return max(1, self.jobs * self.gpus // self.divided)


@dataclass(frozen=True)
class Cost:
    """Time, memory and disk space of one stage.

    Attributes:
        seconds: duration of one of its jobs, the pessimistic value first.
        parts: the same for its parts.
        memory: bytes of a GPU that are in use throughout, by purpose.
        phases: bytes on top of `memory`, by phase; phases follow one another, so only the largest counts.
        recomputed: whether activations are recomputed, which `auto` decides by the memory.
        fits: whether the GPU has enough memory.
        advice: what to change if the stage does not fit or would be refused.
        disk: bytes that stay on disk after the stage.
        passing: bytes of checkpoints, which are removed when the stage ends.
    """

    seconds: Range = (0.0, 0.0)
    parts: Mapping[str, Range] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    recomputed: bool = False
    fits: bool = True
    advice: str = ""
    disk: float = 0.0
    passing: float = 0.0

    @property
    def fixed(self) -> float:
        """Bytes of a GPU in use throughout."""
        return RESERVED + sum(self.memory.values())

    @property
    def peak(self) -> float:
        """Largest number of bytes of a GPU in use."""
        return self.fixed + max(self.phases.values(), default=0.0)


@dataclass
class _Time:
    """Adds up the seconds of one rank.

    Attributes:
        shape: shape of the model.
        assumed: the section `plan`.
        is_4_bit: whether weights are unpacked.
        gathered: bytes of weights that a rank receives from others for each use (ZeRO-3).
        parts: seconds by part, the pessimistic value first.
    """

    shape: Shape
    assumed: Assumptions
    is_4_bit: bool
    gathered: float = 0.0
    parts: dict[str, Range] = field(default_factory=dict)

    def passes(self, name: str, arithmetic: float, number: float, uses: int = 1) -> None:
        """Add passes over many tokens.

        Args:
            name: name of the part.
            arithmetic: operations of a rank in all passes.
            number: number of passes.
            uses: how often a pass runs through the layers: forward, backward (with twice as many kernels), recomputed.
        """
        card, found = self.assumed.card, []
        for end in self._ends():
            kernels = (uses + (uses > 1)) * self.shape.modules * KERNELS * (IN_4_BITS if self.is_4_bit else 1)
            seconds = max(arithmetic / (card.tflops * 1e12 * end.arithmetic), number * kernels * end.launch)
            if self.is_4_bit:
                seconds += number * uses * self.shape.linear * UNPACKING / (card.bandwidth * 1e9 * end.bandwidth)
            found.append(seconds + number * uses * self.gathered / end.interconnect)
        self._add(name, found)

    def sampling(self, name: str, steps: Sequence[float], rows: int, length: float, hardware: Hardware) -> None:
        """Add steps that give each slot a token.

        Args:
            name: name of the part.
            steps: number of steps of a rank, the pessimistic value first.
            rows: number of slots.
            length: length of a text, including its prompt, that a token finds in the cache.
            hardware: hardware of the stage.
        """
        shape, card, found = self.shape, self.assumed.card, []
        # An engine has 16-bit weights. A matrix product with 4-bit weights reads them packed for few rows and unpacks
        # them for many.
        few = shape.weights("nf4" if self.is_4_bit and not hardware.engine else "none")
        many = shape.linear * UNPACKING + (shape.others + shape.experts) * shape.itemsize if self.is_4_bit else few
        cache = rows * length * shape.cache
        for number, read, end in zip(steps, (few if hardware.engine else many, few), self._ends(), strict=True):
            moved = (read + cache) / hardware.divided / (card.bandwidth * 1e9 * end.bandwidth)
            computed = shape.arithmetic(rows, length, answers=rows) / hardware.divided
            seconds = max(moved, computed / (card.tflops * 1e12 * end.arithmetic))
            if not hardware.engine:  # an engine launches all kernels of a step together
                seconds = max(seconds, shape.modules * KERNELS * end.launch) + end.step
            found.append(number * (seconds + self.gathered / end.interconnect))
        self._add(name, found)

    def _ends(self) -> tuple["_End", "_End"]:
        """The pessimistic and the optimistic assumptions."""
        one = self.assumed
        slow, fast = (
            _End(share, bandwidth, 1e-6 * launch, 1e-3 * step, 1e9 * interconnect)
            for share, bandwidth, launch, step, interconnect in zip(
                sorted(one.arithmetic),
                sorted(one.bandwidth),
                sorted(one.launch, reverse=True),
                sorted(one.step, reverse=True),
                sorted(one.interconnect),
                strict=True,
            )
        )
        return slow, fast

    def _add(self, name: str, seconds: Sequence[float]) -> None:
        slow, fast = self.parts.get(name, (0.0, 0.0))
        self.parts[name] = (slow + seconds[0], fast + seconds[1])

    @property
    def seconds(self) -> Range:
        """Seconds of all parts."""
        slow, fast = (sum(part[end] for part in self.parts.values()) for end in (0, 1))
        return slow, fast


@dataclass(frozen=True)
class _End:
    """Assumptions at one end of their ranges, as shares, seconds and bytes per second."""

    arithmetic: float
    bandwidth: float
    launch: float
    step: float
    interconnect: float


def sampling(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """Cost of sampling response0 or response1."""

    def price(hardware: Hardware) -> Cost:
        time = _time(config, shape, assumed)
        rows, answers = work.rows / hardware.working, work.answers / hardware.working
        at_once = max(1, min(slots(hardware), round(rows)))
        prompts = shape.arithmetic(work.tokens / hardware.working, work.length) / hardware.divided
        time.passes("prompts", prompts, rows / at_once)
        steps = [answers / at_once / share for share in sorted(assumed.useful)]
        time.sampling("answers", steps, at_once, work.length, hardware)
        if hardware.engine:
            return Cost(time.seconds, time.parts, _of_engine(shape, assumed, hardware, config.sampling.max_length), {})
        memory = {"weights": shape.weights(config.model.quantization) / hardware.divided}
        if config.model.adapter:
            memory["adapters"] = shape.lora * FLOAT32 / hardware.divided
        phases = {"reading": at_once * work.prompt * _working(shape) / hardware.divided}
        phases["sampling"] = _cache(shape, at_once, work.longest) / hardware.divided
        return Cost(time.seconds, time.parts, memory, phases)

    return _advised(price, hardware, assumed, config, {"batch_size": ("reading", "sampling")})


def judging(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """Cost of judging all pairs."""

    def price(hardware: Hardware) -> Cost:
        time = _time(config, shape, assumed)
        share = shape.arithmetic(work.tokens / hardware.working, work.length) / hardware.divided
        time.passes("pairs", share, work.passes)
        memory = {"weights": shape.weights(config.model.quantization) / hardware.divided}
        if config.model.adapter:
            memory["adapters"] = shape.lora * FLOAT32 / hardware.divided
        tokens = hardware.batch_size * work.longest
        mask = tokens * work.longest * shape.itemsize
        phases = {"judging": tokens * (_working(shape) + shape.cache) / hardware.divided + mask}
        return Cost(time.seconds, time.parts, memory, phases)

    return _advised(price, hardware, assumed, config, {"batch_size": ("judging",)})


def training(
    config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware, *, is_sft: bool = False
) -> Cost:
    """Cost of SFT, or of pre-training or training the reward model."""

    def price(hardware: Hardware, recomputed: bool) -> Cost:
        ranks = hardware.working
        memory = {"weights": _weights(config, shape, hardware), **_trained(shape.lora, 1, hardware)}
        tokens = max(hardware.tokens_per_pass, work.longest if is_sft else 2 * work.longest)
        logits = tokens * shape.vocabulary * PER_LOGIT if is_sft else 0
        kept, again = _activations(shape, shape.autocast, tokens, work.longest)
        kept += MARGIN * FLOAT32 * shape.lora  # autocast's copies of the adapters
        time = _time(config, shape, assumed, hardware)
        answers = work.tokens if is_sft else 0
        once = shape.arithmetic(work.tokens, work.length, answers=answers, backward=True)
        once += shape.arithmetic(work.tokens, work.length) * recomputed
        time.passes("updating", once / ranks, work.passes, uses=3 if recomputed else 2)
        held = shape.arithmetic(work.scored, work.length) / ranks
        time.passes("held out", held, work.scored / ranks / hardware.tokens_per_pass)
        phases = {"updating": (again if recomputed else kept) + logits, **_loading(config, shape, hardware)}
        passing = _passing(shape.lora, hardware)
        return Cost(time.seconds, time.parts, memory, phases, recomputed, disk=_disk(shape.lora), passing=passing)

    return _advised(_chosen(price, assumed), hardware, assumed, config, {"tokens_per_pass": ("updating",)})


def policy(config: Config, shape: Shape, assumed: Assumptions, work: Work, hardware: Hardware) -> Cost:
    """Cost of one run's PPO."""
    ppo, model = config.ppo, config.model

    def price(hardware: Hardware, recomputed: bool) -> Cost:
        ranks = hardware.gpus
        adapters = (2 if model.adapter else 1) * shape.lora * FLOAT32  # reward model and reference
        memory = {"weights": _weights(config, shape, hardware), "adapters": adapters}
        memory |= _trained(shape.lora, 2, hardware)
        memory |= _of_engine(shape, assumed, hardware, config.ppo.query_length + config.ppo.response_length)
        rows = work.rows / work.steps / ranks
        at_once = max(1, min(slots(hardware), round(rows)))
        longest = max(work.longest, ppo.reward_max_length)
        kept, again = _activations(shape, shape.graph, max(hardware.tokens_per_pass, work.longest), work.longest)
        logits = min(LOGITS, hardware.tokens_per_pass * shape.vocabulary) * PER_LOGIT
        passed = max(hardware.tokens_per_forward_pass, longest) * _working(shape)
        tokens, answer = work.tokens + work.answers, work.answers / work.rows
        time = _time(config, shape, assumed, hardware)
        time.passes("sampling", shape.arithmetic(work.tokens, work.length) / ranks, work.steps * rows / at_once)
        # If all rows of a step are sampled at once, the step ends with the longest row.
        waited = work.steps * ppo.response_length, work.steps * min(2 * answer, ppo.response_length)
        shares = sorted(assumed.useful)
        steps = [
            max(work.answers / ranks / at_once / share, least) for share, least in zip(shares, waited, strict=True)
        ]
        time.sampling("sampling", steps, at_once, work.length, hardware)
        measured = 3 * shape.arithmetic(tokens, work.length) + 2 * shape.arithmetic(0, 0, answers=work.answers)
        measured += shape.arithmetic(work.scored, work.scored / work.rows)
        time.passes("measuring", measured / ranks, work.forward_passes)
        updated = shape.arithmetic(tokens, work.length, answers=work.answers, backward=True)
        updated += shape.arithmetic(tokens, work.length, backward=True)
        updated += 2 * shape.arithmetic(tokens, work.length) * recomputed
        time.passes("updating", ppo.inner_epochs * updated / ranks, 2 * work.passes, uses=3 if recomputed else 2)
        phases = {"measuring": passed + logits, "updating": (again if recomputed else kept) + logits}
        phases |= _loading(config, shape, hardware)
        if not hardware.engine:
            reading = at_once * ppo.query_length * _working(shape)
            phases["sampling"] = max(reading, _cache(shape, at_once, work.longest))
        passing = 2 * _passing(shape.lora, hardware)
        return Cost(time.seconds, time.parts, memory, phases, recomputed, disk=_disk(shape.lora), passing=passing)

    names = {"batch_size": ("sampling",), "tokens_per_pass": ("updating",), "tokens_per_forward_pass": ("measuring",)}
    return _advised(_chosen(price, assumed), hardware, assumed, config, names)


def _time(config: Config, shape: Shape, assumed: Assumptions, hardware: Hardware | None = None) -> _Time:
    gathered = shape.weights(config.model.quantization) if hardware and hardware.zero == 3 else 0.0
    return _Time(shape, assumed, config.model.quantization == "nf4", gathered)


def slots(hardware: Hardware) -> int:
    """Number of rows sampled at once."""
    return hardware.engine.rows if hardware.engine else hardware.batch_size


def _of_engine(shape: Shape, assumed: Assumptions, hardware: Hardware, length: int) -> dict[str, float]:
    """Bytes that an engine takes on a GPU: its share, or more if 16-bit weights and a cache do not fit into it.

    Args:
        length: tokens of the longest row.
    """
    engine = hardware.engine
    if engine is None or not engine.is_here:
        return {}
    least = shape.weights("none") / engine.tensor_parallel + shape.cache * length
    return {"engine": max(engine.memory * assumed.card.memory * 1e9, least)}


def _chosen(price: Callable[[Hardware, bool], Cost], assumed: Assumptions) -> Callable[[Hardware], Cost]:
    """The cost with or without recomputed activations, chosen by the resource or like `recompute.is_wanted`."""

    def chosen(hardware: Hardware) -> Cost:
        if hardware.recompute != "auto":
            return price(hardware, hardware.recompute)
        kept = price(hardware, False)
        fits = kept.fixed + kept.phases["updating"] <= assumed.card.memory * 1e9
        return kept if fits and hardware.zero != 3 else price(hardware, True)

    return chosen


def _weights(config: Config, shape: Shape, hardware: Hardware) -> float:
    """Bytes of the base model's weights; ZeRO-3 divides them and gathers one layer at a time."""
    whole = shape.weights(config.model.quantization)
    return whole / hardware.gpus + whole / shape.layers if hardware.zero == 3 else whole


def _loading(config: Config, shape: Shape, hardware: Hardware) -> dict[str, float]:
    """Extra bytes while 4-bit weights are loaded, because ZeRO-3 divides them only after loading."""
    if hardware.zero != 3 or config.model.quantization == "none":
        return {}
    return {"loading": shape.weights("nf4") - _weights(config, shape, hardware)}


def _trained(lora: int, adapters: int, hardware: Hardware) -> dict[str, float]:
    """Bytes of trained adapters, and of their gradients and moments (DeepSpeed divides these and a float32 copy)."""
    parameters = adapters * lora
    buffers = buffer_bytes(hardware.zero)
    return {
        "trained adapters": FLOAT32 * parameters,
        "gradients and moments": states_bytes(parameters, hardware.gpus if hardware.zero else 0),
        **({"DeepSpeed's buffers": buffers} if buffers else {}),
    }


def _activations(shape: Shape, graph: tuple[float, float] | None, tokens: int, length: int) -> tuple[float, float]:
    """Bytes that a pass keeps for its backward pass, first without recomputation, then recomputed layer by layer."""
    linear, quadratic = graph or (_like_a_llama(shape), 0.0)
    kept = MARGIN * (linear + quadratic * length) * tokens
    return kept, shape.layers * shape.width * shape.itemsize * tokens + kept / shape.layers


def _like_a_llama(shape: Shape) -> float:
    """Bytes that autograd keeps per token, if the number is not known."""
    return 34.0 * shape.layers * shape.width * shape.itemsize


def _working(shape: Shape) -> float:
    """Bytes per token of a pass without gradients: the intermediate results of one layer."""
    linear, _ = shape.graph or (_like_a_llama(shape), 0.0)
    return linear / shape.layers


def _cache(shape: Shape, rows: int, length: int) -> float:
    """Bytes during sampling: the cache, one layer of which is copied for each token, and the logits."""
    return rows * length * shape.cache * (1 + 1 / shape.layers) + 4 * FLOAT32 * rows * shape.vocabulary


def _disk(lora: int) -> float:
    """Bytes that stay on disk after training: the adapter in float32."""
    return FLOAT32 * lora


def _passing(lora: int, hardware: Hardware) -> float:
    """Bytes of an adapter's checkpoints: those kept, plus the one written before the oldest is removed."""
    return (KEPT + 1.0) * (TRAINED + COPY * (hardware.zero > 0)) * lora


def _advised(
    price: Callable[[Hardware], Cost],
    hardware: Hardware,
    assumed: Assumptions,
    config: Config,
    names: Mapping[str, Sequence[str]],
) -> Cost:
    """The cost with this hardware and, if it does not fit, what to change, found by trying.

    Args:
        price: gives the cost with any hardware.
        hardware: hardware of the profile.
        assumed: the section `plan`.
        config: configuration of the run.
        names: resource -> the phases that it makes smaller.
    """
    free = assumed.card.memory * 1e9
    cost = price(hardware)
    if hardware.together and config.model.quantization != "none":
        return replace(
            cost, fits=False, advice="tensor_parallel divides only 16-bit weights: set model.quantization to none"
        )
    if cost.peak <= free:
        return cost
    is_training = "tokens_per_pass" in names
    others: list[tuple[str, Hardware]] = [("", hardware)]
    if is_training and hardware.recompute is False:
        others.append(("set gradient_checkpointing to auto", replace(hardware, recompute="auto")))
    if is_training and hardware.zero < 3 and hardware.gpus > 1:
        others.append(("shard the weights with zero3.json", replace(hardware, zero=3, recompute="auto")))
    if not is_training and config.model.quantization == "none" and hardware.gpus > 1 and not hardware.together:
        others.append(("set tensor_parallel", replace(hardware, together=True)))
    others += _other_engines(hardware)
    for said, other in others:
        found, changes = _smaller(price, other, free, names)
        if price(found).peak <= free:
            return replace(cost, fits=False, advice=", and ".join(filter(None, [said, *changes])))
    # An engine's weights have 16 bits in any case.
    quantise = (
        ""
        if config.model.quantization == "nf4" or (hardware.engine and not is_training)
        else "set model.quantization to nf4, or "
    )
    more = "" if hardware.gpus > 1 and is_training else "split the model across several GPUs (docs/slurm.md), or "
    return replace(cost, fits=False, advice=f"{quantise}{more}use larger GPUs")


def _other_engines(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    """The same hardware with an engine that takes less of each GPU, or is divided among all of them."""
    engine = hardware.engine
    if engine is None or not engine.is_here:
        return
    shares = [share / 20 for share in range(19, 0, -1) if share / 20 < engine.memory]
    divided = replace(engine, tensor_parallel=hardware.gpus // hardware.nodes)
    for one in (engine, divided) if divided.tensor_parallel > engine.tensor_parallel else (engine,):
        said = [] if one is engine else [f"set --engine.tensor-parallel to {one.tensor_parallel}"]
        for memory in [engine.memory, *shares]:
            words = said + ([f"lower --engine.memory to {memory}"] if memory < engine.memory else [])
            yield " and ".join(words), replace(hardware, engine=replace(one, memory=memory))


def _smaller(
    price: Callable[[Hardware], Cost], hardware: Hardware, free: float, names: Mapping[str, Sequence[str]]
) -> tuple[Hardware, list[str]]:
    """The hardware with each resource at the largest value for which its phases fit, and the changes in words."""
    said = []
    for resource, phases in names.items():
        low, high = 1, int(getattr(hardware, resource))
        if _fits(price, hardware, resource, high, phases, free) or not _fits(
            price, hardware, resource, 1, phases, free
        ):
            continue
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            low, high = (middle, high) if _fits(price, hardware, resource, middle, phases, free) else (low, middle)
        hardware = _with(hardware, resource, low)
        said.append(f"lower {'sampling_' * (resource == 'batch_size' and len(names) > 1)}{resource} to {low}")
    return hardware, said


def _with(hardware: Hardware, resource: str, value: int) -> Hardware:
    return replace(hardware, **{resource: value})  # type: ignore[arg-type]


def _fits(
    price: Callable[[Hardware], Cost],
    hardware: Hardware,
    resource: str,
    value: int,
    phases: Sequence[str],
    free: float,
) -> bool:
    """Whether some phases fit with this value of a resource."""
    found = price(_with(hardware, resource, value))
    return found.fixed + max((found.phases.get(phase, 0.0) for phase in phases), default=0.0) <= free
