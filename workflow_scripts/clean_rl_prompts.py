"""Prompts of the RL stage (SALMON step 3): public questions of many kinds, cleaned, distinct, of 2 to 256 tokens.

Writes one row a prompt: prompt_id, source, instruction, input, question_type, length_bonus.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from salmon import artifacts, prompts, script, sources
from salmon.config import Model, RlPrompts, is_local
from salmon.errors import UserError


class Arguments(script.Arguments):
    """Options of the command line; of the model, only the tokenizer is used."""

    output: Path
    rl_prompts: RlPrompts
    model: Model


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, model = arguments.rl_prompts, arguments.model
    tokenizer = load_tokenizer(model)
    table, counts = prompts.read_rl_prompts(settings, tokenizer)
    artifacts.write_table(table, arguments.output)
    vocabulary = prompts.digest(sorted(tokenizer.get_vocab().items()))
    inputs = {
        **sources.describe_sources(settings.sources),
        model.base: f"vocabulary {vocabulary}" if is_local(model.base) else model.revision or "main",
    }
    manifest = artifacts.manifest({"rl_prompts": settings, "model": model}, inputs, counts)
    artifacts.write_json(artifacts.manifest_path(arguments.output), manifest)


def load_tokenizer(model: Model) -> Any:
    """The policy's tokenizer; `salmon.models` has one too, but needs torch, which this script does without."""
    try:
        return AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the tokenizer of {model.base} cannot be loaded: {reason}. Check model.base") from error


if __name__ == "__main__":
    script.run(main, Arguments)
