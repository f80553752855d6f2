"""The model's tokenizer. Apart from `models`, because the data rules do without torch."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from salmon.config import Model, is_local
from salmon.errors import UserError


def check_folder(name: str, key: str) -> None:
    """Refuse a local model folder that is not there, which libraries would look for on the hub."""
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model folder {name} does not exist ({key})")


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of the base model, padding on the left, with a padding token in any case.

    Where a model has none, its unknown token pads (Llama-2), else its end token; masks, never token ids,
    decide what counts, so a padding token that also has a meaning is harmless.

    Raises:
        UserError: where it cannot be loaded, or has no end token.
    """
    check_folder(model.base, "model.base")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the tokenizer of {model.base} cannot be loaded: {reason}. Check model.base and model.revision; a gated "
            "model also needs a login on the hub, and a machine without network a copy in the cache or a local folder."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model.base} has no end token; without one no response can end")
    tokenizer.padding_side = "left"
    return tokenizer
