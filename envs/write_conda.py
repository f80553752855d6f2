"""Write the conda environment files from the pins in the text files: `make envs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
KINDS = {
    "data": ["data.txt"],
    "model": ["data.txt", "model.txt"],
    "evaluation": ["data.txt", "model.txt", "evaluation.txt"],
}


def conda_file(texts: list[str]) -> str:
    """A conda environment with the pins of the given text files."""
    lines = [line for text in texts for line in (HERE / text).read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    # DeepSpeed builds without isolation, so what it builds with must be there.
    head = ["channels: [conda-forge, nodefaults]", "dependencies:", "  - python=3.11", "  - pip", "  - setuptools"]
    return "\n".join(
        ["# Written by `make envs` from the text files.", *head, "  - pip:", *(f"      - {pin}" for pin in pins), ""]
    )


if __name__ == "__main__":
    for kind, texts in KINDS.items():
        (HERE / f"{kind}.yaml").write_text(conda_file(texts))
    sys.stdout.write("wrote " + ", ".join(f"envs/{kind}.yaml" for kind in KINDS) + "\n")
