"""The model's tokenizer. Separate from `models`, because the data rules do not need torch."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from salmon.border import read_json, read_text, reading
from salmon.config import Model, is_local
from salmon.errors import UserError
from salmon.identity import read_config

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""A folder with one of these has its own tokenizer."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DEEPEST = 10_000
FETCH = "save or fetch the adapter again"


def check_depth(name: str, revision: str | None) -> None:
    """Refuse a configuration with so many layers that a library would never finish.

    Args:
        name: a base model or adapter, hub id or folder.
        revision: revision on the hub.
    """
    raw = read_config(Model(base=name, revision=revision), Path())
    for part in (raw, raw.get("text_config")):
        for key in LAYERS:
            layers = part.get(key) if isinstance(part, dict) else None
            if isinstance(layers, int) and layers > DEEPEST:
                raise UserError(f"config.json of {name} has {layers} layers in {key}; fetch it again")


def check_folder(name: str, key: str) -> None:
    """Refuse a missing local model folder, which libraries would look for on the hub."""
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model folder {name} does not exist ({key})")


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of the initial policy. It pads on the left, and always has a padding token.

    It is the adapter's tokenizer if the adapter comes with one, because the adapter was trained with its chat template
    and special tokens; otherwise the base model's, with the adapter's chat template if the adapter has only that.

    If a model has no padding token, its unknown token pads (Llama-2), otherwise its end token. Masks, never token ids,
    mark the padding, so a padding token that also has a meaning is harmless.

    Raises:
        UserError: if it cannot be loaded, has no end token, or the adapter's has another vocabulary.
    """
    check_folder(model.base, "model.base")
    tokenizer = _load(model, model.base, model.revision, "model.base and model.revision")
    if model.adapter:
        check_folder(model.adapter, "model.adapter")
        tokenizer = _with_adapter(model, model.adapter, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model.base} has no end token; without one, no response can end")
    tokenizer.padding_side = "left"
    return tokenizer


def _load(model: Model, name: str, revision: str | None, named: str) -> Any:
    """The tokenizer of a folder or hub model."""
    advice = (
        f"check {named}. A gated model also needs a login on the hub. A machine without a network needs a cached copy "
        "or a local folder"
    )
    with reading(f"the tokenizer of {name}", advice):
        check_depth(name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=model.trust_remote_code)
        found = tokenizer("a", add_special_tokens=False).input_ids  # some settings are used only now
    if not found:
        # If a folder has no tokenizer, transformers makes such an empty one.
        raise UserError(f"the tokenizer of {name} has no vocabulary: its files, such as tokenizer.json, are missing")
    return tokenizer


def _with_adapter(model: Model, adapter: str, base: Any) -> Any:
    """The adapter's tokenizer, or the base's with the adapter's chat template."""
    if any(find_file(adapter, model.adapter_revision, name) for name in VOCABULARIES):
        own = _load(model, adapter, model.adapter_revision, "model.adapter and model.adapter_revision")
        _check_vocabulary(model, own.get_vocab(), base.get_vocab())
        # If only the base has a chat template, the adapter was trained with it or without any.
        own.chat_template = own.chat_template or base.chat_template
        return own
    if template := find_file(adapter, model.adapter_revision, "chat_template.jinja"):
        base.chat_template = read_text(template, "", FETCH)
    elif settings := find_file(adapter, model.adapter_revision, "tokenizer_config.json"):
        base.chat_template = _chat_template(settings) or base.chat_template
    return base


def _chat_template(settings: Path) -> str | dict[str, str] | None:
    """The chat template in a tokenizer_config.json, or several by name; None if it has none.

    Raises:
        UserError: if the file is damaged.
    """
    with reading(settings, FETCH):
        found = read_json(settings, "", FETCH).get("chat_template")
        return {each["name"]: each["template"] for each in found} if isinstance(found, list) else found


def find_file(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a folder, or of a hub model if available; None if there is none."""
    if Path(name).is_dir():
        found = Path(name) / file
        return found if found.exists() else None
    missing = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    cached = cached_file(
        name, file, revision=revision, **{f"_raise_exceptions_for_{what}": value for what, value in missing.items()}
    )
    return None if cached is None else Path(cached)


def _check_vocabulary(model: Model, own: dict[str, int], base: dict[str, int]) -> None:
    """Refuse an adapter whose tokens differ from the base model's."""
    if own == base:
        return
    others = sorted(token for token in own.keys() | base.keys() if own.get(token) != base.get(token))
    raise UserError(
        f"the tokenizer of the adapter {model.adapter} has {len(own)} tokens, and the one of {model.base} has "
        f"{len(base)}; {len(others)} of them differ, such as {others[0]!r}. An adapter needs its base's vocabulary. "
        "Merge it into the base, with the embeddings that it was trained with, save model and tokenizer in one folder "
        "and set model.base to that; or, if it was trained with the base's tokens alone, delete the tokenizer from its "
        "folder"
    )
