"""An adapter that comes with its own tokenizer or chat template is used with it, in all stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen2Config

from salmon import identity, tokenizers
from salmon.config import Model
from salmon.errors import UserError
from salmon.tokenizers import load_tokenizer
from tests import forks
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer

OWN = CHATML.replace("assistant", "helper")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    byte_tokenizer(special=CHATML_TOKENS, template=CHATML).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as PEFT saves it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "base"}'
    )
    (tmp_path / "adapter" / "README.md").write_text("x")
    return tmp_path / "adapter"


def load(base: Path, adapter: Path | str | None) -> Any:
    return load_tokenizer(Model(base=str(base), adapter=adapter and str(adapter)))


def test_an_adapter_without_a_tokenizer_has_the_bases(base: Path, adapter: Path) -> None:
    assert load(base, adapter).chat_template == load(base, None).chat_template == CHATML


def test_an_adapters_tokenizer_is_used(base: Path, adapter: Path) -> None:
    own = byte_tokenizer(special=CHATML_TOKENS, template=OWN)
    own.eos_token = "<|im_end|>"
    own.save_pretrained(adapter)
    found = load(base, adapter)
    assert (found.chat_template, found.eos_token, found.padding_side) == (OWN, "<|im_end|>", "left")
    assert load(base, None).eos_token == "</s>"


def test_an_adapters_tokenizer_without_a_chat_template_takes_the_bases(base: Path, adapter: Path) -> None:
    byte_tokenizer(special=CHATML_TOKENS, bos=False).save_pretrained(adapter)
    found = load(base, adapter)
    assert found.chat_template == CHATML
    assert found("a")["input_ids"] == found("a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("chat_template.jinja", OWN),
        ("tokenizer_config.json", json.dumps({"chat_template": OWN})),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]}
            ),
        ),
    ],
)
def test_an_adapters_chat_template_alone(base: Path, adapter: Path, file: str, contents: str) -> None:
    (adapter / file).write_text(contents)
    assert load(base, adapter).get_chat_template() == OWN


@pytest.mark.parametrize("settings", ["{}", '{"chat_template": null}'])
def test_settings_of_a_tokenizer_without_a_template_change_nothing(base: Path, adapter: Path, settings: str) -> None:
    (adapter / "tokenizer_config.json").write_text(settings)
    assert load(base, adapter).chat_template == CHATML


@pytest.mark.parametrize("settings", ["{", "[]", '{"chat_template": [1]}'])
def test_damaged_settings_of_a_tokenizer_are_refused(base: Path, adapter: Path, settings: str) -> None:
    (adapter / "tokenizer_config.json").write_text(settings)
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read"):
        load(base, adapter)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ((*CHATML_TOKENS, "[PAD]"), r"has 262 tokens, and the one of .* has 261; 1 of them differ, such as '\[PAD\]'"),
        (CHATML_TOKENS[::-1], "2 of them differ"),
    ],
)
def test_another_vocabulary_is_refused(base: Path, adapter: Path, special: tuple[str, ...], message: str) -> None:
    byte_tokenizer(special=special).save_pretrained(adapter)
    with pytest.raises(UserError, match=rf"{message}.*set model\.base to that; or"):
        load(base, adapter)


def test_an_adapter_that_is_not_there(base: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist \(model\.adapter\)"):
        load(base, adapter.parent / "other")
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"check model\.adapter and model\.adapter_revision"):
        load(base, adapter)


def test_an_adapter_on_the_hub(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is looked up in the hub's cache; a file that is not cached, and cannot be fetched, does not exist."""
    assert load(base, "owner/adapter").chat_template == CHATML
    (adapter / "chat_template.jinja").write_text(OWN)
    asked = []

    def cached_file(name: str, file: str, revision: str | None, **_: Any) -> str | None:
        asked.append((name, revision))
        return str(adapter / file) if (adapter / file).exists() else None

    monkeypatch.setattr(tokenizers, "cached_file", cached_file)
    model = Model(base=str(base), adapter="owner/adapter", adapter_revision="v1")
    assert load_tokenizer(model).chat_template == OWN
    assert set(asked) == {("owner/adapter", "v1")}


def test_the_identity_of_a_tokenizer_is_that_of_both_folders(base: Path, adapter: Path) -> None:
    model = Model(base=str(base), adapter=str(adapter))
    before = identity.identify_tokenizer(model)
    (adapter / "adapter_config.json").write_text("{}")
    assert identity.identify_tokenizer(model) == before
    (adapter / "chat_template.jinja").write_text(OWN)
    after = identity.identify_tokenizer(model)
    assert after[str(base)] == before[str(base)]
    assert after[str(adapter)] != before[str(adapter)]


@pytest.mark.parametrize("own", [True, False])
def test_the_rules_hand_on_an_adapter_with_a_tokenizer(base: Path, adapter: Path, own: bool) -> None:
    """Scripts that only read tokens get it, and so does the training of reward models on the bare base."""
    if own:
        (adapter / "chat_template.jinja").write_text(OWN)
    overlay = {"model": {"base": "base", "adapter": "adapter"}}
    (base.parent / "mine.yaml").write_text(yaml.safe_dump(overlay))
    words = ["-n", "-p", "-s", ROOT / "Snakefile", "--configfile", "mine.yaml", "--", "policy"]
    done = forks.snakemake(words, base.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = {"clean_rl_prompts.py": "--model '", "train_reward_model.py": "--tokenizer '"}
    given = [
        json.loads(line.partition(option)[2].partition("'")[0]).get("adapter")
        for script, option in scripts.items()
        for line in done.stdout.splitlines()
        if f"workflow_scripts/{script}" in line
    ]
    assert given == ["adapter" if own else None] * 3
    assert ("adapter/chat_template.jinja" in done.stdout) == own


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """From the configuration of some architectures, transformers makes a tokenizer without any tokens."""
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no vocabulary.*tokenizer\.json"):
        load(tmp_path, None)
