"""No model is used with a weight missing, left over or of another shape: base, adapter or head, whatever loads it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from salmon import models
from salmon.adapters import load_adapter
from salmon.config import Lora
from salmon.configuration import load
from salmon.errors import UserError
from salmon.identity import context_limit
from salmon.shared_base import SharedBase
from tests import zoo
from tests.damaged_models import (
    ADAPTER,
    SCORE,
    WEIGHTS,
    change_json,
    damage,
    logits,
    randomised,
    rewrite,
    settings,
    without,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no output layer", "1 are missing .lm_head.weight"),
        ("no layer", "are missing .*layers.1"),
        ("a layer more", "are missing .*layers.3"),
        ("a layer fewer", "have no place in it .*layers.2"),
        ("another shape", "norm.weight|shape|ignore_mismatched"),
        ("cut off", "cannot be read"),
        ("pickle", "safetensors only, because a pickle may run code"),
    ],
)
def test_a_base_model_that_is_not_whole_is_refused(llama: Path, tmp_path: Path, how: str, said: str) -> None:
    shutil.copytree(llama, tmp_path / "m")
    damage(tmp_path / "m", how)
    for attempt in (
        lambda: models.load_initial_policy(settings(tmp_path / "m"), "cpu"),
        lambda: models.new_reward_model(settings(tmp_path / "m"), Lora(r=2), "cpu", 0),
    ):
        with pytest.raises(UserError, match=said):
            attempt()


def test_tied_output_layers_are_not_missing(tmp_path: Path) -> None:
    zoo.build("llama_tied", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    models.load_base(settings(tmp_path), "cpu")


def test_a_model_in_the_home_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    model = settings(Path("~") / llama.name, adapter="~/a")
    assert (model.base, model.adapter) == (str(llama), str(llama.parent / "a"))
    models.load_base(model, "cpu")


def test_attention_that_a_model_does_not_have_names_the_key(tmp_path: Path) -> None:
    zoo.build("bloom", tmp_path)
    with pytest.raises(UserError, match=r"has no sdpa: set model\.attention to eager"):
        models.load_base(settings(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {k.replace("q_proj", "q_projection"): v for k, v in w.items()}, "are missing .*fit nothing"),
        (lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, "are missing"),
        (lambda w: w | {"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(4, 4)}, "fit nothing"),
        (lambda w: {k: v[:2] if "lora_A" in k else v for k, v in w.items()}, "cannot be read"),
        (lambda w: w | {"base_model.model.model.embed_tokens.weight": torch.ones(320, 64)}, "not LoRA .*merge"),
        (lambda w: {}, "no weights"),
    ],
)
def test_an_adapter_is_used_whole_or_not_at_all(
    llama: Path, adapter: Path, tmp_path: Path, change: Any, said: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    rewrite(tmp_path / "a" / ADAPTER, change)
    with pytest.raises(UserError, match=f"(?s){said}"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")
    with pytest.raises(UserError, match=f"(?s){said}"):  # as a further adapter, where PEFT does not even warn
        load_adapter(load_adapter(models.load_base(settings(llama), "cpu"), str(adapter)), str(tmp_path / "a"), "other")


def test_a_base_model_of_git_lfs_pointers(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{WEIGHTS} is a Git LFS pointer"):
        models.load_base(settings(folder), "cpu")


def test_a_prefix_is_mapped(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The classes of a model with a tower name the same layers in two ways."""
    shutil.copytree(adapter, tmp_path / "a")
    rewrite(
        tmp_path / "a" / ADAPTER,
        lambda w: {k.replace("model.model.layers", "model.model.language_model.layers"): v for k, v in w.items()},
    )
    wanted = logits(models.load_initial_policy(settings(llama, adapter=str(adapter)), "cpu"))
    found = logits(models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu"))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert (wanted - logits(models.load_base(settings(llama), "cpu"))).abs().max() > 0.1


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "of tomorrow"])
def test_an_adapter_that_changes_the_base_is_refused(llama: Path, adapter: Path, tmp_path: Path, begun: str) -> None:
    """Put on the base a second time, for the reference, it would change everything already on the base."""
    shutil.copytree(adapter, tmp_path / "a")
    change_json(tmp_path / "a" / "adapter_config.json", init_lora_weights=begun)
    with pytest.raises(UserError, match=f"init_lora_weights '{begun}'.*path_initial_model_for_weight_conversion"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_such_an_adapter_saved_as_plain_lora_is_right_in_rl(llama: Path, tmp_path: Path, begun: str) -> None:
    """The adapter is saved as the message describes."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=begun),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "begun"))
    model.peft_config["default"].init_lora_weights = begun
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    given = settings(llama, adapter=str(tmp_path / "a"))
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path / "rm"))
    shared = SharedBase(given, Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    for role in ("policy", "reference"):
        with shared.use(role):
            torch.testing.assert_close(logits(shared), logits(model.eval()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"alpha_pattern": {"model.layers.0.mlp.gate_proj": 64}},
        {"alpha_pattern": {r"^model\.layers\.0\.mlp\.gate_proj": 64}},
        {"rank_pattern": {"model.layers.0.mlp.gate_proj": 2}},
        {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"up_proj": 8}},
    ],
)
def test_patterns_of_an_adapter_are_mapped_with_its_keys(tmp_path: Path, patterns: dict[str, Any]) -> None:
    """An adapter that was trained on the language model alone, loaded onto the model with its tower."""
    zoo.build("gemma3_vision", tmp_path / "m")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "gate_proj", "up_proj"], **patterns)
    model = randomised(get_peft_model(text, config)).eval()
    model.save_pretrained(str(tmp_path / "a"))
    # Its targets must not be found in the tower, which has a `q_proj`, too.
    found = models.load_initial_policy(settings(tmp_path / "m", adapter=str(tmp_path / "a")), "cpu")
    torch.testing.assert_close(logits(found), logits(model), atol=2e-4, rtol=2e-4)
    assert not [key for key, _ in found.named_parameters() if "vision" in key and "lora" in key]


def test_lora_on_embeddings_is_verified_and_trained(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)).eval()
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    given = settings(llama, adapter=str(tmp_path / "a"))
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path / "rm"))
    shared = SharedBase(given, Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    names = {id(parameter): key for key, parameter in shared.named_parameters()}
    trained = {names[id(parameter)] for parameter in shared.trained()}
    assert {key for key in names.values() if ".embed_tokens.lora_" in key and key.endswith("default")} <= trained
    shared.save_policy(tmp_path / "policy")
    again = models.load_initial_policy(settings(llama, adapter=str(tmp_path / "policy")), "cpu")
    torch.testing.assert_close(logits(again), logits(model))
    for half in "AB":
        shutil.copytree(tmp_path / "a", tmp_path / half)
        rewrite(tmp_path / half / ADAPTER, without(f"lora_embedding_{half}"))
        with pytest.raises(UserError, match="are missing"):
            models.load_initial_policy(settings(llama, adapter=str(tmp_path / half)), "cpu")


@pytest.mark.parametrize(
    ("file", "contents", "said"),
    [
        ("adapter_config.json", "[]", "TypeError"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", {"r": "8"}, "cannot be read"),
        (ADAPTER, "short", "cannot be read"),
        ("adapter_model.bin", "no pickle", "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused_in_a_sentence(
    llama: Path, adapter: Path, tmp_path: Path, file: str, contents: Any, said: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    if isinstance(contents, dict):
        change_json(tmp_path / "a" / file, **contents)
    else:
        (tmp_path / "a" / file).write_text(contents)
    if file.endswith(".bin"):
        (tmp_path / "a" / ADAPTER).unlink()
    with pytest.raises(UserError, match=rf"(?s)adapter .*{said}.*it must be a PEFT folder"):
        models.load_initial_policy(settings(llama, adapter=str(tmp_path / "a")), "cpu")


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("model.safetensors.index.json", {}, "KeyError"),
        ("config.json", {"num_attention_heads": "four"}, "num_attention_heads"),
        ("config.json", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}}, "rope"),
    ],
)
def test_damaged_settings_of_a_base_model_are_refused_in_a_sentence(
    tmp_path: Path, file: str, entries: dict[str, Any], said: str
) -> None:
    zoo.build("phi3_longrope", tmp_path)
    if "index" in file:
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / file).write_text("{}")
    change_json(tmp_path / file, **entries)
    if "rope_scaling" in entries:
        config = json.loads((tmp_path / file).read_text())
        del config["rope_parameters"]
        (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"(?s)cannot be read: .*{said}.*model\.base"):
        models.load_base(settings(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-50], "cannot be read: .*; copy or build the reward model again"),
        (lambda w: w | {SCORE: torch.zeros(2, 64)}, r"shape \(2, 64\)"),
        (lambda w: w | {SCORE: torch.zeros(64)}, r"shape \(64,\)"),
        (lambda w: w | {SCORE: torch.zeros(1, 65)}, "reads 65 numbers, but .* gives 64|size mismatch"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(llama: Path, tmp_path: Path, change: Any, said: str) -> None:
    models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path))
    if said.startswith("cannot be read"):
        (tmp_path / ADAPTER).write_bytes(change((tmp_path / ADAPTER).read_bytes()))
    else:
        rewrite(tmp_path / ADAPTER, change)
    with pytest.raises(UserError, match=f"(?s){said}"):
        models.load_reward_model(settings(llama), tmp_path, "cpu", trainable=False)
    with pytest.raises(UserError, match=f"(?s){said}"):
        SharedBase(settings(llama), Lora(r=2), tmp_path, torch.device("cpu"), seed=0)


def test_a_reward_model_without_a_layer_is_refused_in_rl(llama: Path, tmp_path: Path) -> None:
    model = models.new_reward_model(settings(llama), Lora(r=2), "cpu", 0)
    model.save_pretrained(str(tmp_path / "rm"))
    SharedBase(settings(llama), Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    rewrite(tmp_path / "rm" / ADAPTER, lambda w: {k: v for k, v in w.items() if ".layers.2." not in k})
    with pytest.raises(UserError, match="are missing"):
        SharedBase(settings(llama), Lora(r=2), tmp_path / "rm", torch.device("cpu"), seed=0)
    with pytest.raises(UserError, match="are missing"):
        models.load_reward_model(settings(llama), tmp_path / "rm", "cpu", trainable=False)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({}, None),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "longrope"},
                "original_max_position_embeddings": 4096,
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_how_much_a_model_reads(config: dict[str, Any], limit: int | None) -> None:
    assert context_limit(config) == limit


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_lengths_are_held_against_the_model_before_any_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    folder = tmp_path / "m"
    if where == "cache":
        cache = tmp_path / "models--our--model"
        folder = cache / "snapshots" / "abc"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 1300}')
    raw["model"]["base"] = str(folder) if where == "folder" else "our/model"
    with pytest.raises(UserError) as error:
        load(raw, ROOT)
    found = re.findall(r"^  (\S.*): \d+ tokens, but", str(error.value), flags=re.M)
    assert found == ["judge.max_length", "ppo.query_length + ppo.response_length"][: len(found)]
    assert "judge.max_length" in found
