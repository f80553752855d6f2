"""A model's identity: the files that matter, and the changes that their hash detects."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from salmon import identity
from salmon.config import Model
from salmon.errors import UserError
from tests.running import environment

GIB = 1 << 30


def of(folder: Path) -> str:
    return identity.identify(Model(base=str(folder)))[str(folder)]


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to / "model")


@pytest.fixture
def in_samples() -> Iterator[None]:
    """Weights files of any size are read in samples of a few bytes."""
    with patch.multiple(identity, WHOLE=1 << 14, BLOCK=64, SPREAD=4, EDGE=16):
        yield


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


# ---- Files


def names(files: list[Path], folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in files]


def test_the_files_of_a_model() -> None:
    shipped = Path(__file__).parents[1] / "demo" / "model"
    tokenizer = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names(identity.tokenizer_files(shipped), shipped) == tokenizer
    assert names(identity.model_files(shipped), shipped) == sorted(
        [*tokenizer, "generation_config.json", "model.safetensors"]
    )


def test_the_files_of_a_folder_from_the_hub(tmp_path: Path) -> None:
    tokenizer = {
        *("config.json", "configuration_own.py", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
        *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken"),
    }
    weights = {
        *("generation_config.json", "adapter_config.json", "adapter_model.safetensors"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    }
    others = {
        *("README.md", "LICENSE", "manifest.json", "metrics.jsonl", "tensorboard/events.out", "trainer_state.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "training_args.bin", "train.log"),
        *(".gitattributes", "original/consolidated.safetensors", "checkpoint-1/model.safetensors"),
    }
    for name in tokenizer | weights | others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(identity.tokenizer_files(tmp_path), tmp_path) == sorted(tokenizer)
    assert names(identity.model_files(tmp_path), tmp_path) == sorted(tokenizer | weights)
    (tmp_path / "adapter_model.safetensors").unlink()
    for name in weights:
        (tmp_path / name).unlink(missing_ok=True)
    assert names(identity.model_files(tmp_path), tmp_path) == sorted(tokenizer | {"adapter_model.bin"})


def test_an_adapter_in_a_pickle_beside_other_weights(tmp_path: Path) -> None:
    """It is read where there is no adapter_model.safetensors."""
    for name in ("adapter_config.json", "adapter_model.bin", "value_head.safetensors"):
        (tmp_path / name).write_text(name)
    before = of(tmp_path)
    (tmp_path / "adapter_model.bin").write_text("another")
    assert of(tmp_path) != before


def test_without_torch() -> None:
    code = "import sys; from salmon import identity; sys.exit('torch' in sys.modules or 'polars' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


# ---- What is seen


def test_a_model_elsewhere_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    other = copy(tiny_model, tmp_path)
    os.utime(other / "model.safetensors", (0, 0))
    for name in ("README.md", "manifest.json", "metrics.jsonl", "pytorch_model.bin"):
        (other / name).write_text("new")
    (other / "tensorboard").mkdir()
    assert of(other) == of(tiny_model)


def test_a_model_on_the_hub(adapter: Path) -> None:
    model = Model(base="owner/name", adapter="owner/adapter", adapter_revision="v1")
    assert identity.identify(model) == {"owner/name": "main", "owner/adapter": "v1"}
    assert identity.identify_tokenizer(Model(base="owner/name", revision="abc")) == {"owner/name": "abc"}
    mixed = identity.identify(Model(base="owner/name", revision="abc", adapter=str(adapter)))
    assert mixed == {"owner/name": "abc", str(adapter): of(adapter)}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_small_file(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """Files of the same size differ by content; a tokenizer's identity depends only on its files."""
    other = copy(tiny_model, tmp_path)
    text = (other / name).read_text()
    (other / name).write_text(text.replace("2", "3", 1))
    assert (other / name).read_text() != text
    assert of(other) != of(tiny_model)
    before, after = (
        identity.identify_tokenizer(Model(base=str(folder)))[str(folder)] for folder in (tiny_model, other)
    )
    assert (before != after) == (name != "generation_config.json")


def test_a_file_more_or_less(tiny_model: Path, tmp_path: Path) -> None:
    other = copy(tiny_model, tmp_path)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    more = of(other)
    assert more != of(tiny_model)
    (other / "chat_template.jinja").rename(other / "merges.txt")
    assert of(other) not in (more, of(tiny_model))
    (other / "merges.txt").unlink()
    (other / "generation_config.json").unlink()
    assert of(other) != of(tiny_model)


def test_any_number_of_small_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Files of at most 64 MiB are hashed whole."""
    other = copy(tiny_model, tmp_path)
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    assert of(other) != of(tiny_model)


@pytest.mark.usefixtures("in_samples")
@pytest.mark.parametrize("where", ["everywhere", "beginning", "middle", "end"])
def test_any_tensor_of_large_weights(tiny_model: Path, tmp_path: Path, where: str) -> None:
    """Changing any one tensor, in a file of the same size, makes it another model."""
    other = copy(tiny_model, tmp_path)
    file = other / "model.safetensors"
    tensors, size = load_file(file), file.stat().st_size
    seen = {of(other)}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        if where == "everywhere":
            changed *= 1.001
        else:
            changed.view(-1)[{"beginning": 0, "middle": tensor.numel() // 2, "end": -1}[where]] += 1
        save_file(tensors | {name: changed}, file, metadata={"format": "pt"})
        assert file.stat().st_size == size
        assert of(other) not in seen, name
        seen.add(of(other))
    save_file(tensors, file, metadata={"format": "pt"})
    assert of(other) == of(tiny_model)


@pytest.mark.usefixtures("in_samples")
@pytest.mark.parametrize(("one", "another"), [("layers.0.mlp.up", "layers.1.mlp.up"), ("F32", "I32")])
def test_another_header(tiny_model: Path, tmp_path: Path, one: str, another: str) -> None:
    """The same numbers under other names, or of another type."""
    other = copy(tiny_model, tmp_path)
    file = other / "model.safetensors"
    data = file.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    header = data[8:first].decode().replace(one, "?").replace(another, one).replace("?", another)
    file.write_bytes(data[:8] + header.encode() + data[first:])
    assert file.stat().st_size == len(data)
    assert file.read_bytes() != data
    assert of(other) != of(tiny_model)


@pytest.mark.usefixtures("in_samples")
def test_a_model_of_several_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert {*files, folder / "model.safetensors.index.json"} < set(identity.model_files(folder))
    before = of(folder)
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert of(folder) != before
        file.write_bytes(data)
    assert of(folder) == before
    one, other = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(other)
    files[1].write_bytes(one)
    assert of(folder) != before
    files[0].write_bytes(one)
    files[1].write_bytes(other)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "00002-of", 1))
    assert of(folder) != before


def test_an_adapter(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = copy(adapter, tmp_path)
    (other / "README.md").write_text("another")
    model = Model(base=str(tiny_model), adapter=str(other))
    before = identity.identify(model)
    assert before[str(other)] == of(adapter)
    data = bytearray((other / "adapter_model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (other / "adapter_model.safetensors").write_bytes(data)
    after = identity.identify(model)
    assert after[str(other)] != before[str(other)]
    assert after[str(tiny_model)] == before[str(tiny_model)]


# ---- What it costs


def write_holes(file: Path, tensors: int, size: int) -> int:
    """Write a safetensors file of zeros that take no disk space; return the offset of its data."""
    entry = {"dtype": "BF16", "shape": [size // 2]}
    header = json.dumps(
        {f"t{n}": entry | {"data_offsets": [n * size, (n + 1) * size]} for n in range(tensors)}
    ).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + tensors * size)
    return 8 + len(header)


@pytest.mark.parametrize(("tensors", "size"), [(20, GIB), (4000, 5 << 20)])
def test_twenty_gigabytes(tmp_path: Path, tensors: int, size: int) -> None:
    """A few large tensors, or many small ones (experts): what is read is capped, but every tensor is looked at."""
    file = tmp_path / "model.safetensors"
    first = write_holes(file, tensors, size)
    with patch.object(os, "pread", side_effect=os.pread) as pread:
        before = of(tmp_path)
    assert sum(call.args[1] for call in pread.call_args_list) < 100 << 20
    for tensor in (0, tensors // 2, tensors - 1):
        with file.open("r+b") as stream:
            stream.seek(first + tensor * size)
            stream.write(b"x")
        assert of(tmp_path) != before
        before = of(tmp_path)


@pytest.mark.usefixtures("in_samples")
@pytest.mark.parametrize("damage", ["cut", "longer", "no header", "other header"])
def test_damaged_weights(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    other = copy(tiny_model, tmp_path)
    file = other / "model.safetensors"
    data = file.read_bytes()
    damaged = {
        "cut": data[:-100],
        "longer": data + b"x",
        "no header": b"\xff" * len(data),
        "other header": (9).to_bytes(8, "little") + b'{"t": []}' + data,
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors .*download it again"):
        of(other)
