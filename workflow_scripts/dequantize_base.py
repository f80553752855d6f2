"""Write the base model with its 4-bit weights dequantised, for an engine that cannot read 4-bit weights.

Engine and trainer then have the same weights: sampling and training use the same model.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, models, provenance, script
from salmon.config import Model
from salmon.distributed import init
from salmon.tokenizers import load_tokenizer


class Arguments(script.Arguments):
    """Write the base model with its 4-bit weights dequantised."""

    output: Path = Field(description="folder of the model, in model.dtype, with its tokenizer and manifest.json")
    model: Model = Field(description="section of the configuration; its adapter is not used")


def main(arguments: Arguments) -> None:
    """Load in 4 bits, and write each layer with the weights that it computes with."""
    base = arguments.model.without_adapter()
    tokenizer = load_tokenizer(base)
    origin = provenance.dequantize_base(base)
    inputs = origin.identify()
    model = models.load_dequantized(base, init())
    with artifacts.atomic(arguments.output) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        artifacts.write_json(folder / "manifest.json", origin.manifest(inputs, {}))


if __name__ == "__main__":
    script.run(main, Arguments)
