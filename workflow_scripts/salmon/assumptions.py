"""The section `plan` of the configuration: what `snakemake plan` assumes about unknowns. It changes no result."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from salmon.config import OneOf, Positive, Section, Tokens

_End = Annotated[float, Field(gt=0, le=1e12)]
Range = tuple[_End, _End]
TableName = Literal["sft_data", "prompts", "pmp_data", "rl_prompts"]


ROWS: dict[TableName, int] = {"sft_data": 288_000, "prompts": 10_000, "pmp_data": 300_000, "rl_prompts": 100_000}
"""Approximate numbers of rows in the paper's data."""


class Gpu(Section):
    """Performance of a GPU, from the manufacturer's data sheet."""

    memory: Positive = Field(description="memory in GB")
    tflops: Positive = Field(description="10^12 operations per second in 16 bits, for dense matrices")
    bandwidth: Positive = Field(description="memory bandwidth in GB per second")


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
"""From NVIDIA's data sheets; for rtx cards, with accumulation in float32."""


class Assumptions(Section):
    """What `snakemake plan` assumes; ranges go from the pessimistic to the optimistic value."""

    gpu: Annotated[str, OneOf(tuple(GPUS))] | Gpu = Field(
        "a100_80gb",
        description=f"GPU of the jobs: {', '.join(GPUS)}, or a section with `memory`, `tflops` and `bandwidth`",
    )
    arithmetic: Range = Field(
        (0.3, 0.55), description="share of the GPU's peak FLOPS that passes over many tokens reach"
    )
    bandwidth: Range = Field((0.5, 0.85), description="share of its memory bandwidth that is reached")
    launch: Range = Field(
        (40.0, 10.0),
        description="microseconds between two kernel launches, which limit small models",
    )
    step: Range = Field((70.0, 10.0), description="milliseconds per sampling step outside the model, without an engine")
    interconnect: Range = Field(
        (25.0, 200.0), description="GB per second that a GPU receives from the others; ZeRO-3 waits for their weights"
    )
    useful: Range = Field(
        (0.55, 0.85), description="share of the steps of sampling slots that yield a token; idle slots wait for others"
    )
    instruction_tokens: Tokens = Field(40, description="tokens per prompt, without the part that all prompts share")
    response_tokens: Tokens = Field(200, description="tokens per response")
    rows: dict[TableName, Annotated[int, Field(ge=1, le=10**12)]] = Field(
        ROWS,
        description="number of rows of tables that do not exist yet",
    )

    @field_validator("rows")
    @classmethod
    def _all_tables(cls, rows: dict[TableName, int]) -> dict[TableName, int]:
        """Tables that are not named get the numbers of the paper's data."""
        return ROWS | rows

    @property
    def card(self) -> Gpu:
        """The GPU's numbers."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu
