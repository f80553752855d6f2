"""What `plan` assumes where nothing is known yet: the section `plan` of the configuration. It changes no result."""

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


GPUS = {
    "rtx3090": Gpu(memory=24, tflops=71, bandwidth=936),
    "rtx4090": Gpu(memory=24, tflops=165, bandwidth=1008),
    "a10g": Gpu(memory=24, tflops=70, bandwidth=600),
    "l40s": Gpu(memory=48, tflops=362, bandwidth=864),
    "a100_40gb": Gpu(memory=40, tflops=312, bandwidth=1555),
    "a100_80gb": Gpu(memory=80, tflops=312, bandwidth=2039),
    "h100": Gpu(memory=80, tflops=989, bandwidth=3352),
    "h200": Gpu(memory=141, tflops=989, bandwidth=4800),
    "b200": Gpu(memory=180, tflops=2250, bandwidth=7700),
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
    def card(self) -> Gpu:
        """The GPU's numbers."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu
