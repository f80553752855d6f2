"""Reward models and policies in the layout of the authors' release: read completely, and never run as code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from salmon import models, published, reward_model
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.identity import identify, model_files
from tests.authors_world import old_config, publish_adapter, publish_reward_model
from tests.damaged_models import logits, make_adapter, randomised, settings
from tests.test_planted import saved_by_torch

TEXTS = [[5, 6, 7, 8, 9], [11, 3, 42], list(range(20, 60))]
INNER = "adapter_model/lora_default"


@pytest.fixture(scope="module")
def standard(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of ours, whose adapter changes the scores."""
    folder = tmp_path_factory.mktemp("standard")
    made = randomised(models.new_reward_model(settings(tiny_model), Lora(r=4, alpha=8.0), "cpu", 0))
    made.save_pretrained(str(folder))
    return folder


def bring_in(name: str | Path, model: Model, folder: Path) -> Path:
    config, weights, _ = published.read_reward_model(str(name), None, model)
    published.save_reward_model(config, weights, folder)
    return folder


def scores(model: Model, folder: Path) -> torch.Tensor:
    return reward_model.score(models.load_reward_model(model, folder, "cpu", trainable=False), TEXTS, 2, "cpu")


def on_the_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copy a folder into the hub's cache as a snapshot; return its hub id."""
    hub = cache / "models--owner--published"
    shutil.copytree(folder, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return "owner/published"


@pytest.mark.parametrize("layout", ["standard", "authors", "authors, inner folder", "hub", "bfloat16"])
def test_scores_are_those_of_the_published_model_but_for_the_bias(
    tiny_model: Path, standard: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, theirs = settings(tiny_model), tmp_path / "theirs"
    source: str | Path = theirs
    if layout == "standard":
        source = standard
    else:
        publish_reward_model(standard, theirs)
    if layout == "authors, inner folder":
        source = theirs / "adapter_model"
    elif layout == "hub":
        source = on_the_hub(theirs, tmp_path / "cache", monkeypatch)
    elif layout == "bfloat16":
        for file in (theirs / INNER / "adapter_model.bin", theirs / "adapter_model" / "reward_head"):
            torch.save({name: each.bfloat16() for name, each in torch.load(file).items()}, file)
    ours = bring_in(source, model, tmp_path / "ours")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in ours.iterdir()}
    expected = scores(model, standard)
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(model, ours), expected, rtol=0, atol=0.05 if layout == "bfloat16" else 1e-6)
    again = bring_in(ours, model, tmp_path / "again")
    assert torch.equal(scores(model, again), scores(model, ours))


def change_weights(file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Any:
    def apply(folder: Path) -> None:
        torch.save(change(torch.load(folder / file)), folder / file)

    return apply


WEIGHTS, HEAD = f"{INNER}/adapter_model.bin", "adapter_model/reward_head"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / HEAD).unlink(), "is not a reward model: .* no head .* no file reward_head"),
        (lambda f: shutil.rmtree(f / INNER), "holds no adapter, .* the folder has README.md, adapter_model"),
        (lambda f: (f / INNER / "adapter_config.json").unlink(), "has weights but no adapter_config.json"),
        (lambda f: (f / WEIGHTS).unlink(), "has no weights .adapter_model.safetensors or adapter_model.bin"),
        (lambda f: shutil.copytree(f / INNER, f / "checkpoint-20"), "holds 2 adapters: name one of .*checkpoint-20"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "cannot be read"),
        (lambda f: (f / HEAD).write_text("a head"), "reward_head cannot be read"),
        (lambda f: torch.save(torch.zeros(1, 64), f / HEAD), "reward_head holds a Tensor, but a head has weight"),
        (change_weights(HEAD, lambda w: w | {"scale": 1.5}), "reward_head holds .*scale float, but a head has weight"),
        (change_weights(HEAD, lambda w: {"weight": 1.5}), "reward_head holds weight float, but a head has weight"),
        (change_weights(HEAD, lambda w: w | {"weight": w["weight"] * torch.nan}), "not finite .score.weight"),
        (change_weights(WEIGHTS, lambda w: w | {max(w): w[max(w)] / 0}), r"not finite .*lora_B"),
        (lambda f: torch.save(torch.zeros(1), f / WEIGHTS), "holds a Tensor, not a dictionary of weights"),
        (change_weights(HEAD, lambda w: w | {"scale": w["bias"]}), r"scale \(1,\), but a head has weight"),
        (change_weights(HEAD, lambda w: w | {"bias": torch.zeros(2)}), r"bias \(2,\), but a head has"),
        (change_weights(HEAD, lambda w: w | {"weight": torch.zeros(2, 64)}), r"shape \(2, 64\)"),
        (change_weights(HEAD, lambda w: w | {"weight": torch.zeros(1, 65)}), "reads 65 numbers, but .* gives 64"),
        (change_weights(HEAD, lambda w: w | {"weight": torch.zeros(1, 64, dtype=torch.int8)}), "type torch.int8"),
        (change_weights(WEIGHTS, lambda w: dict(list(w.items())[1:])), "1 weights are missing"),
        (change_weights(WEIGHTS, lambda w: w | {f"{min(w)[:-14]}x.lora_A.weight": w[min(w)]}), "1 weights fit nothing"),
        (change_weights(WEIGHTS, lambda w: w | {"base_model.model.lm_head.weight": w[min(w)]}), "are not LoRA"),
        (lambda f: old_config(f / INNER, r=8), "have a shape that does not fit .*/llama-2"),
        (lambda f: old_config(f / INNER, target_modules=["q_proj"]), "fit nothing"),
        (lambda f: old_config(f / INNER, peft_type="IA3"), "cannot be read|type"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    tiny_model: Path, standard: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = publish_reward_model(standard, tmp_path / "theirs")
    change(folder)
    with pytest.raises(UserError, match=f"(?s){said}") as told:
        bring_in(folder, settings(tiny_model), tmp_path / "ours")
    assert not any(word in str(told.value) for word in ("delete", "weights_only"))
    assert not (tmp_path / "ours").exists()


def test_another_base_model_is_refused(llama: Path, tiny_model: Path, standard: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    folder = publish_reward_model(standard, tmp_path / "theirs")
    with pytest.raises(UserError, match="have a shape that does not fit"):
        bring_in(folder, settings(tmp_path / "wider"), tmp_path / "ours")


@pytest.mark.parametrize("file", [WEIGHTS, HEAD])
def test_a_pickle_with_a_payload_is_refused_and_does_not_run(
    tiny_model: Path, standard: Path, tmp_path: Path, file: str
) -> None:
    folder = publish_reward_model(standard, tmp_path / "theirs")
    saved_by_torch(folder / file, tmp_path / "payload-ran")
    with pytest.raises(UserError, match="a pickle is read only if it holds nothing but tensors") as told:
        bring_in(folder, settings(tiny_model), tmp_path / "ours")
    assert "weights_only" not in str(told.value)  # which torch advises to turn off
    assert not (tmp_path / "payload-ran").exists()


def two_checkpoints(standard: Path, folder: Path) -> Path:
    """Two reward models in one folder; the second one's scores are all 0."""
    publish_reward_model(standard, folder / "checkpoint-10")
    publish_reward_model(standard, folder / "checkpoint-20")
    zeros = {"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}
    torch.save(zeros, folder / "checkpoint-20" / "adapter_model" / "reward_head")
    return folder


def test_of_two_checkpoints_the_one_that_is_named(tiny_model: Path, standard: Path, tmp_path: Path) -> None:
    """By its adapter, as the error advises: its head lies above the named folder, and is part of the identity."""
    folder, model = two_checkpoints(standard, tmp_path / "theirs"), settings(tiny_model)
    with pytest.raises(UserError, match="holds 2 adapters: name one of the folders ") as told:
        bring_in(folder, model, tmp_path / "ours")
    advised = str(told.value).partition("folders ")[2].split(", ")
    assert advised == [str(folder / f"checkpoint-{step}" / INNER) for step in (10, 20)]
    found = [scores(model, bring_in(name, model, tmp_path / str(n))) for n, name in enumerate(advised)]
    torch.testing.assert_close(found[0], scores(model, standard), rtol=0, atol=1e-6)
    assert not found[1].any()
    before, head = identify(Model(base=advised[0])), folder / "checkpoint-10" / "adapter_model" / "reward_head"
    assert model_files(Path(advised[0]))[-1] == head
    head.write_text("another")
    assert identify(Model(base=advised[0])) != before


@pytest.mark.parametrize("change", [lambda f: None, lambda f: (f / HEAD).rename(f / INNER / "reward_head")])
def test_a_reward_model_is_no_policy(
    tiny_model: Path, standard: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Neither the published one nor one of ours; its adapter would be loaded without a complaint."""
    change(publish_reward_model(standard, tmp_path / "theirs"))
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / INNER, standard):
        with pytest.raises(UserError, match=r"is a reward model .* name it in reward_model\.path, and a policy's"):
            models.load_initial_policy(settings(tiny_model, adapter=str(folder)), "cpu")


@pytest.mark.parametrize("file", [WEIGHTS, HEAD, f"{INNER}/adapter_model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tiny_model: Path, standard: Path, tmp_path: Path, file: str) -> None:
    """For what a clone without LFS leaves, torch's own message would be wrong."""
    folder = publish_reward_model(standard, tmp_path / "theirs")
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{file} is a Git LFS pointer, not the file: run `git lfs pull` where") as told:
        bring_in(folder, settings(tiny_model), tmp_path / "ours")
    assert "pickle" not in str(told.value)


def test_a_head_elsewhere_has_to_be_the_only_one(tiny_model: Path, standard: Path, tmp_path: Path) -> None:
    folder, model = publish_reward_model(standard, tmp_path / "theirs"), settings(tiny_model)
    for name in ("one", "two"):
        (folder / "heads" / name).mkdir(parents=True)
    (folder / HEAD).rename(folder / "heads" / "two" / "reward_head")
    torch.testing.assert_close(scores(model, bring_in(folder, model, tmp_path / "ours")), scores(model, standard))
    shutil.copy(folder / "heads" / "two" / "reward_head", folder / "heads" / "one")
    with pytest.raises(UserError, match=r"holds 2 heads, .*heads/one/reward_head, .*heads/two/reward_head"):
        bring_in(folder, model, tmp_path / "again")


# ---- The published policy, as the initial policy's adapter


@pytest.fixture(scope="module")
def policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_adapter(tiny_model, folder)
    return folder


@pytest.mark.parametrize("nested", [".", INNER, "hub"])
def test_a_published_policy_is_an_adapter(
    tiny_model: Path, policy: Path, tmp_path: Path, nested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(publish_adapter(policy, tmp_path / "theirs", INNER if nested == "hub" else nested))
    if nested == "hub":
        adapter = on_the_hub(Path(adapter), tmp_path / "cache", monkeypatch)
    expected = logits(models.load_initial_policy(settings(tiny_model, adapter=str(policy)), "cpu"))
    found = logits(models.load_initial_policy(settings(tiny_model, adapter=adapter), "cpu"))
    assert torch.equal(found, expected)
    assert not torch.allclose(logits(models.load_base(settings(tiny_model), "cpu")), expected)


def test_the_files_of_a_nested_adapter_count(policy: Path, tmp_path: Path) -> None:
    """Rules have them as inputs, and manifests their hash."""
    folder = publish_adapter(policy, tmp_path / "theirs")
    (folder / "adapter_model" / "reward_head").write_text("a")
    names = [file.relative_to(folder).as_posix() for file in model_files(folder)]
    assert names == [f"{INNER}/adapter_config.json", WEIGHTS, HEAD]
    before = identify(Model(base=str(folder)))
    (folder / HEAD).write_text("b")
    changed = identify(Model(base=str(folder)))
    assert changed != before
    # Which adapter is read does not depend on what else is there, such as a base model's configuration.
    (folder / "config.json").write_text("{}")
    beside = identify(Model(base=str(folder)))
    (folder / WEIGHTS).write_text("others")
    assert identify(Model(base=str(folder))) != beside
