"""Nothing that a script reads is ever run: pickles and code with a payload, planted wherever one could be read."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from salmon import models
from salmon.config import Model
from salmon.errors import UserError
from tests.border_world import BorderWorld


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Payload(mark)}))


def saved_by_torch(path: Path, mark: Path) -> None:
    torch.save({"base_model.model.score.weight": Payload(mark)}, path)


def saved_by_numpy(path: Path, mark: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Payload(mark)], dtype=object), allow_pickle=True)


def code(path: Path, mark: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")


def chat_template(path: Path, mark: Path) -> None:
    path.write_text(f"{{{{ cycler.__init__.__globals__.os.mkdir({str(mark)!r}) }}}}{{{{ messages[0].content }}}}")


Plant = Callable[[Path, Path], None]
# What is planted beside the inputs; INSTEAD names the inputs that are replaced.
BESIDE: dict[str, Plant] = {
    "pytorch_model.bin": saved_by_torch,
    "adapter_model.bin": saved_by_torch,
    "training_args.bin": saved_by_torch,
    "optimizer.pt": saved_by_torch,
    "scheduler.pt": saved_by_torch,
    "rng_state.pth": saved_by_torch,
    "model.pkl": pickled,
    "tokenizer.pkl": pickled,
    "tokenizer.model": pickled,
    "weights.npy": saved_by_numpy,
    "modeling_evil.py": code,
    "configuration_evil.py": code,
    "tokenization_evil.py": code,
    "__init__.py": code,
    "sitecustomize.py": code,
}
FOLDERS = ("model", "adapter", "reward_model")
INSTEAD: dict[str, tuple[str, ...]] = {
    "check_model": ("model/model.safetensors", "model/tokenizer.json", "model/config.json", "policy.txt"),
    "clean_prompts": ("own.jsonl",),
    "clean_sft_data": ("own.jsonl",),
    "train_sft": ("examples.parquet", "model/model.safetensors"),
    "clean_pmp_data": ("shp.json", "hh.jsonl.gz"),
    "clean_rl_prompts": ("openorca.parquet", "sharegpt.jsonl", "model/tokenizer.json", "model/tokenizer_config.json"),
    "sample_responses 0 0": ("prompts.parquet", "prompts.manifest.json", "adapter/adapter_model.safetensors"),
    "sample in chats": ("model/chat_template.jinja", "model/generation_config.json"),
    "gather responses 0": ("responses0/0.parquet", "responses0/0.manifest.json"),
    "judge_preferences 0": ("response0.parquet", "judge.json", "judge.txt", "model/model.safetensors"),
    "judge in chats": ("model/chat_template.jinja",),
    "gather judgements": ("judgements/0.parquet", "judgements/1.manifest.json"),
    "aggregate_preferences": ("preferences.parquet", "response1.parquet", "judge.json"),
    "train_reward_model": (
        *("principle.parquet", "reward.txt", "reward_model/adapter_model.safetensors"),
        "reward_model/adapter_config.json",
    ),
    "train_policy": ("rl.parquet", "rl.json", "reward_model/adapter_model.safetensors", "adapter/adapter_config.json"),
}


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What a payload creates: it must not exist after a test."""
    path = tmp_path / "payload-ran"
    yield path
    assert not path.exists()


def plant_beside(folder: Path, mark: Path, auto_map: bool) -> None:
    """Plant pickles and code in every folder of a model; with `auto_map`, a configuration names the code."""
    for name in FOLDERS:
        for file, plant in BESIDE.items():
            plant(folder / name / file, mark)
        code(folder / name / "custom_generate" / "generate.py", mark)
    for name in ("hh_script", "own"):  # a data set's script, and one with the name of a data file
        code(folder / f"{name}.py", mark)
    if auto_map:
        config = folder / "model" / "config.json"
        text = config.read_text().rstrip().removesuffix("}")
        config.unlink()
        config.write_text(
            f'{text}, "auto_map": {{"AutoConfig": "configuration_evil.Config", '
            '"AutoModelForCausalLM": "modeling_evil.Model"}}'
        )


def test_a_payload_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    """The other tests prove something only because these payloads run."""
    for number, plant in enumerate((pickled, saved_by_torch, saved_by_numpy)):
        mark = tmp_path / f"mark{number}"
        plant(tmp_path / "file", mark)
        if plant is pickled:
            pickle.loads((tmp_path / "file").read_bytes())
        elif plant is saved_by_torch:
            torch.load(tmp_path / "file", weights_only=False)
        else:
            np.load(tmp_path / "file", allow_pickle=True)
        assert mark.exists()


@pytest.mark.parametrize("name", list(INSTEAD))
def test_nothing_beside_the_inputs_is_run(border_world: BorderWorld, tmp_path: Path, mark: Path, name: str) -> None:
    """The script does not even notice."""
    job = border_world.jobs[name]
    folder = tmp_path / "here"
    border_world.copy(folder, job)
    plant_beside(folder, mark, auto_map=True)
    # A pickle with the name of SentencePiece's model may be refused for its content, but is not unpickled.
    status, said = border_world.run(job.script, job.options, folder)
    assert status in (0, 1), said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", list(INSTEAD))
def test_nothing_instead_of_an_input_is_run(border_world: BorderWorld, tmp_path: Path, mark: Path, name: str) -> None:
    job = border_world.jobs[name]
    for number, file in enumerate(INSTEAD[name]):
        plants: tuple[Plant, ...] = (pickled, saved_by_torch, saved_by_numpy)
        for plant in (*plants, chat_template) if file.endswith(".jinja") else plants:
            folder = tmp_path / f"{number} {plant.__name__}"
            border_world.copy(folder, job)
            (folder / file).unlink()
            plant(folder / file, mark)
            status, said = border_world.run(job.script, job.options, folder)
            assert status == 1, (file, plant.__name__, said)
            assert "Traceback" not in said, (file, plant.__name__, said)
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "file", "pickle_name"),
    [
        ("check_model", "model/model.safetensors", "pytorch_model.bin"),
        ("sample_responses 0 0", "adapter/adapter_model.safetensors", "adapter_model.bin"),
        ("train_reward_model", "reward_model/adapter_model.safetensors", "adapter_model.bin"),
        ("train_policy", "reward_model/adapter_model.safetensors", "adapter_model.bin"),
        ("train_policy", "adapter/adapter_model.safetensors", "adapter_model.bin"),
    ],
)
def test_weights_are_not_taken_from_a_pickle(
    border_world: BorderWorld, tmp_path: Path, mark: Path, name: str, file: str, pickle_name: str
) -> None:
    job = border_world.jobs[name]
    folder = tmp_path / "here"
    border_world.copy(folder, job)
    (folder / file).unlink()
    saved_by_torch((folder / file).with_name(pickle_name), mark)
    status, said = border_world.run(job.script, job.options, folder)
    assert status == 1, said
    assert "safetensors" in said
    assert "Traceback" not in said


def test_an_adapter_on_the_hub_may_be_a_pickle_of_tensors_and_of_nothing_else(
    border_world: BorderWorld, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, hub = border_world.folder / "adapter", tmp_path / "models--owner--adapter"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    shutil.copy(adapter / "adapter_config.json", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    settings = Model(base=str(border_world.folder / "model"), quantization="none", dtype="float32")
    whole = models.load_initial_policy(settings.model_copy(update={"adapter": str(adapter)}), "cpu").state_dict()

    remote = settings.model_copy(update={"adapter": "owner/adapter"})
    torch.save(load_file(adapter / "adapter_model.safetensors"), snapshot / "adapter_model.bin")
    read = models.load_initial_policy(remote, "cpu").state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in whole.items())
    saved_by_torch(snapshot / "adapter_model.bin", mark)
    with pytest.raises(UserError, match="owner/adapter cannot be read"):
        models.load_initial_policy(remote, "cpu")


@pytest.mark.parametrize("ending", [".npy", ".pkl", ".pt", ".py", ".parquet", ".jsonl", ".json.gz"])
def test_sources_are_data_whatever_their_folder_holds(
    border_world: BorderWorld, tmp_path: Path, mark: Path, ending: str
) -> None:
    """A folder as a data set: with a script of its name, as the hub used to have, and a pickle with each ending."""
    job = border_world.jobs["clean_prompts"]
    folder = tmp_path / "here"
    border_world.copy(folder, job)
    data = folder / "data"
    data.mkdir()
    shutil.copy(folder / "own.jsonl", data)
    code(data / "data.py", mark)
    saved_by_torch(data / f"planted{ending}", mark)
    options = job.options | {"prompts": {"sources": {"own": {"format": "prompts", "path": "./data"}}}}
    status, said = border_world.run(job.script, options, folder)
    is_data = ending in (".parquet", ".jsonl", ".json.gz")
    assert status == (1 if is_data else 0), said
    assert "Traceback" not in said
