"""A model's identity: the relevant files of a model folder, and a hash of them.

The rules and the data scripts use this module, so it does not import torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from salmon.config import Model, is_local
from salmon.errors import UserError

# The files that a tokenizer is loaded from. If no other file names the tokenizer's class, the model's configuration
# does, and the Python files may hold that class.
TOKENIZER_FILES = (
    *("config.json", "*.py", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("*vocab*.json", "vocab*.txt", "merges.txt", "bpe.codes", "*.model", "tokenizer.model.*", "*.spm", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
MODEL_FILES = (
    *TOKENIZER_FILES,
    *("generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
REWARD_HEAD = "reward_head"
"""File of a reward model's head in the authors' release: a pickle of tensors."""
SHOWN = 8  # names in a message
_POINTER = b"version https://git-lfs"  # beginning of the text that stands for a Git LFS file

WHOLE = 64 << 20  # a weights file of at most this many bytes is hashed completely
BLOCK = 64 << 10  # of a larger file, evenly spaced blocks of this size are read:
SPREAD = 64  # at least this many, and one for every WHOLE bytes;
EDGE = 4 << 10  # also this much at the beginning, in the middle and at the end of every tensor
THREADS, READS = 16, 16  # readers, and reads per reader at a time, because network file systems are slow
LONGEST_HEADER = 100_000_000  # bytes, by the safetensors format


def model_files(folder: Path) -> list[Path]:
    """The files of a local model or adapter that affect its output, sorted.

    Configuration, generation configuration, tokenizer, chat templates, weights in safetensors with their index, the
    adapter's configuration, and code, which `trust_remote_code` may run. A pickle (`adapter_model.bin`) counts only if
    there is no `adapter_model.safetensors`, which would take precedence. In a folder with an adapter further down
    (`adapter_folder`), the files there also count. So does the head of the authors' reward model, which comes last if
    it is above the folder (`nearest_head`). The README, the manifest, metrics, logs and a trainer's state do not
    count.
    """
    found = _matching(folder, MODEL_FILES)
    if not (folder / ADAPTER_CONFIG).is_file():
        found |= _matching(folder, (f"**/{name}" for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, REWARD_HEAD)))
    elif not (folder / "adapter_model.safetensors").is_file():
        found |= _matching(folder, ("adapter_model.bin",))
    adapters = [file.parent for file in found if file.name == ADAPTER_CONFIG]
    heads = {head for each in adapters if (head := nearest_head(folder, each))}
    return [*sorted(found), *sorted(heads - found)]


def adapter_folder(folder: Path) -> Path:
    """The PEFT folder of a local adapter: the folder itself, or the only folder below it that holds an adapter.

    The authors' release writes `adapter_model/lora_default/`, and trainers write a folder per checkpoint.

    Raises:
        UserError: if there is none, or more than one. The message lists what is there.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    nested = sorted({file.parent for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) for file in folder.rglob(name)})
    whole = [each for each in nested if (each / ADAPTER_CONFIG).is_file()]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UserError(
            f"adapter {folder} holds {len(whole)} adapters: name one of the folders "
            + ", ".join(str(each) for each in whole[:SHOWN])
            + (", …" if len(whole) > SHOWN else "")
        )
    if nested:
        raise UserError(f"adapter {nested[0]} has weights but no {ADAPTER_CONFIG}; also fetch or copy that file")
    entries = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    raise UserError(
        f"adapter {folder} holds no adapter, and neither does any folder below it: an adapter has {ADAPTER_CONFIG} and "
        f"{' or '.join(ADAPTER_WEIGHTS)}; the folder has {', '.join(entries[:SHOWN]) or 'no files'}"
        + (", …" if len(entries) > SHOWN else "")
    )


def nearest_head(folder: Path, adapter: Path) -> Path | None:
    """The head next to an adapter or above it, as in the authors' release; None if there is none.

    The search goes up to the named folder, and at least two folders above the adapter: in the release the head is in
    the first of these, and naming the adapter itself also names its reward model.

    Args:
        folder: the named folder.
        adapter: the result of `adapter_folder`.
    """
    above = [adapter, *(each for each in adapter.parents if each == folder or folder in each.parents)]
    above += adapter.resolve().parents[:2]
    return next((each / REWARD_HEAD for each in above if (each / REWARD_HEAD).is_file()), None)


def refuse_pointers(folder: Path) -> None:
    """Refuse weights that are only Git LFS pointers, before a library reports them as something else.

    Raises:
        UserError: with the first one.
    """
    for file in sorted(_matching(folder, ("*.safetensors", "adapter_model.bin", REWARD_HEAD))):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise UserError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull` where you cloned it")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files among `model_files` that a tokenizer is loaded from."""
    return sorted(_matching(folder, TOKENIZER_FILES))


def tokenizer_model(model: Model) -> Model:
    """The part of a model that affects its tokenizer. The adapter counts only if it has a tokenizer or template."""
    adapter = model.adapter
    has_own = adapter and not (Path(adapter).is_dir() and not tokenizer_files(Path(adapter)))
    names = {"base", "revision", "trust_remote_code"} | ({"adapter", "adapter_revision"} if has_own else set())
    return Model.model_validate(model.model_dump(include=names))


def identify(model: Model) -> dict[str, str]:
    """Identity of a model for manifests and fingerprints: name of the base and of the adapter -> revision or hash.

    A hub model is identified by its revision, `main` if none is set: pin a commit if the branch may move. A local
    folder is identified by one hash of the names, sizes and contents of its `model_files`; its location and the file
    times do not matter. Weights are sampled, so that 140 GB take seconds:

    - always detected: a change of any file other than weights; of weights in files of at most 64 MiB (most adapters);
      of a tensor's name, type, shape or position; of the size of a file or the number of files;
    - detected in larger files: a change at the beginning, in the middle or at the end (4 KiB each) of any tensor, or in
      one of the evenly spaced blocks of 64 KiB, one for every 64 MiB and at least 64 per file. Training, merging and
      quantising change almost every number of a tensor, so they are detected;
    - not detected: an edit of a few numbers of a large tensor between the samples.

    Raises:
        UserError: if a weights file is damaged.
    """
    names = ((model.base, model.revision), (model.adapter, model.adapter_revision))
    return {name: _identity(name, revision, model_files) for name, revision in names if name is not None}


def identify_tokenizer(model: Model) -> dict[str, str]:
    """Identity of a model's tokenizer, in the form of `identify`: a local one is identified by its files' contents."""
    names = ((model.base, model.revision), (model.adapter, model.adapter_revision))
    return {name: _identity(name, revision, tokenizer_files) for name, revision in names if name is not None}


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    """Files of a folder whose relative paths match a pattern."""
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def _identity(name: str, revision: str | None, files: Callable[[Path], list[Path]]) -> str:
    """Revision of a hub model, or hash of these files of a local model."""
    folder = Path(name)
    if not folder.is_dir():
        return revision or "main"
    digest = hashlib.sha256()
    for file in files(folder):
        outside = not file.is_relative_to(folder)
        place = Path(os.path.relpath(file, folder.resolve())) if outside else file.relative_to(folder)
        digest.update(f"{place.as_posix()}\0{file.stat().st_size}\0{_hash(file)}\n".encode())
    return digest.hexdigest()


def _hash(file: Path) -> str:
    """Hash of a file's contents: the whole file, or the header and samples of a large weights file."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= WHOLE or file.suffix != ".safetensors":
            return hashlib.file_digest(stream, "sha256").hexdigest()
        header, places = _samples(file, stream, size)
        if hasattr(os, "posix_fadvise"):  # do not read ahead around the samples
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

        def read(some: list[tuple[int, int]]) -> bytes:
            part = hashlib.sha256()
            for start, length in some:
                part.update(os.pread(stream.fileno(), length, start))
            return part.digest()

        digest = hashlib.sha256(header)
        with ThreadPoolExecutor(THREADS) as readers:
            for part in readers.map(read, (places[i : i + READS] for i in range(0, len(places), READS))):
                digest.update(part)
    return digest.hexdigest()


def _samples(file: Path, stream: BinaryIO, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Header of a safetensors file, and the samples that represent its weights: (first byte, bytes), sorted."""
    length = int.from_bytes(stream.read(8), "little")
    first = 8 + length
    try:
        if length > LONGEST_HEADER or first > size:
            raise ValueError("its header is too long")
        header = stream.read(length)
        tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        if any(not 0 <= begin <= end for begin, end in tensors) or max(end for _, end in tensors) != size - first:
            raise ValueError("its length differs from its header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}): copy or download it again") from error
    count = max(SPREAD, size // WHOLE)
    places = {(first + (size - first - BLOCK) * step // (count - 1), BLOCK) for step in range(count)}
    for begin, end in tensors:
        sample = min(EDGE, end - begin)
        places |= {(first + start, sample) for start in (begin, (begin + end - sample) // 2, end - sample)}
    return header, sorted(places)


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Maximum tokens that a model reads, from its config.json; None without a limit.

    With rotary positions of the types longrope and dynamic, the frequencies follow the longest text of a batch. Beyond
    the length of pre-training, a text's numbers then depend on its neighbours and on how much of it was cached.
    Therefore that length is the limit.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    limits = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    parts = [rope, *rope.values()] if isinstance(rope, Mapping) else []  # by type of layer, in some models
    for part in (part for part in parts if isinstance(part, Mapping)):
        if "longrope" in (part.get("rope_type"), part.get("type")):
            name = "original_max_position_embeddings"
            limits.append(part.get(name) or config.get(name))
    # Limits that are not numbers are reported when the model is loaded.
    return min((int(limit) for limit in limits if limit and isinstance(limit, int | float)), default=None)


def read_config(model: Model, root: Path) -> Mapping[str, Any]:
    """A base model's config.json: from a local folder, or from the cache for a hub model; empty if unavailable.

    Args:
        model: the model.
        root: folder to which relative paths refer.
    """
    file: Path | None = root / Path(model.base).expanduser() / "config.json"
    if not is_local(model.base):
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
        except ValueError:  # not a valid hub id, which is reported elsewhere
            cached = None
        file = Path(cached) if isinstance(cached, str) else None
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
