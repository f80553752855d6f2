"""What `plan` assumes where nothing is known yet: the section `plan` of the configuration. It changes no result."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from salmon.config import OneOf, Positive, Section, Tokens

_End = Annotated[float, Field(gt=0, le=1e12)]
Range = tuple[_End, _End]
TableName = Literal["sft_data", "prompts", "pmp_data", "rl_prompts"]


ROWS: dict[TableName, int] = {"sft_data": 288_000, "prompts": 10_000, "pmp_data": 300_000, "rl_prompts": 100_000}
"""About as many as the paper's data have."""


class Gpu(Section):
    """What a GPU can do, by its maker's data sheet."""

    memory: Positive = Field(description="GB")
    tflops: Positive = Field(description="10^12 operations per second in 16 bits, of dense matrices")
    bandwidth: Positive = Field(description="of its memory, GB per second")


@dataclass(frozen=True)
class _Gpu:
    memory: float
    tflops: float
    bandwidth: float


GPUS = {
    "rtx3090": _Gpu(24, 71, 936),
    "rtx4090": _Gpu(24, 165, 1008),
    "a10g": _Gpu(24, 70, 600),
    "l40s": _Gpu(48, 362, 864),
    "a100_40gb": _Gpu(40, 312, 1555),
    "a100_80gb": _Gpu(80, 312, 2039),
    "h100": _Gpu(80, 989, 3352),
    "h200": _Gpu(141, 989, 4800),
    "b200": _Gpu(180, 2250, 7700),
}
"""NVIDIA's data sheets; rtx: with sums in float32."""


class Assumptions(Section):
    """What `snakemake plan` assumes; ranges have the pessimist's and the optimist's number."""

    gpu: Annotated[str, OneOf(tuple(GPUS))] | Gpu = Field(
        "a100_80gb",
        description=f"of the jobs: {', '.join(GPUS)}, or a section of its own: `memory`, `tflops`, `bandwidth`",
    )
    arithmetic: Range = Field(
        (0.3, 0.55), description="share of the GPU's arithmetic that passes over many tokens reach"
    )
    bandwidth: Range = Field((0.5, 0.85), description="share of its memory's bandwidth")
    launch: Range = Field(
        (40.0, 10.0),
        description="microseconds until the next kernel is launched, which models of few parameters wait for",
    )
    step: Range = Field(
        (70.0, 10.0), description="milliseconds of a step of sampling beside the model, without an engine"
    )
    interconnect: Range = Field(
        (25.0, 200.0), description="GB per second that a GPU gets from others, whose weights ZeRO-3 waits for"
    )
    useful: Range = Field(
        (0.55, 0.85), description="share of the steps of sampling slots that give a token; the rest waits for others"
    )
    instruction_tokens: Tokens = Field(40, description="of a prompt, without what all prompts have in common")
    response_tokens: Tokens = Field(200, description="of a response")
    rows: dict[TableName, Annotated[int, Field(ge=1, le=10**12)]] = Field(
        ROWS,
        description="of tables that are not there yet",
    )

    @field_validator("rows")
    @classmethod
    def _all_tables(cls, rows: dict[TableName, int]) -> dict[TableName, int]:
        """Those that are not named have the numbers of the paper's data."""
        return ROWS | rows

    @property
    def card(self) -> Gpu | _Gpu:
        """The GPU's numbers."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu
