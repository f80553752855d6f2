"""check_model accepts correct models, and refuses in a sentence what would fail in a later stage."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

import check_model
from salmon import checking, models
from salmon.adapters import add_lora
from salmon.config import Judge, Lora, PolicyPrompt, Ppo, Sampling, Scoring
from salmon.errors import UserError
from salmon.shared_base import SharedBase
from salmon.tokenizers import load_tokenizer
from tests.damaged_models import (
    damage,
    settings,
)
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer

ROOT = Path(__file__).parents[1]
REWARD = str(ROOT / "demo/templates/reward_model_rl.txt")


def sections(folder: Path, **more: Any) -> checking.Settings:
    return checking.Settings(
        model=settings(folder),
        policy_prompt=more.get("policy_prompt", PolicyPrompt(template=str(ROOT / "demo/templates/policy.txt"))),
        sampling=Sampling(max_length=more.get("sampling_length", 64)),
        judge=Judge(
            template=str(ROOT / "demo/templates/judge.txt"),
            principles=str(ROOT / "demo/principles/judge.json"),
            max_length=more.get("judge_length", 900),
        ),
        lora=Lora(r=2),
        scoring=more.get("scoring", Scoring()),
        ppo=Ppo(
            template=REWARD,
            principles=str(ROOT / "demo/principles/rl.json"),
            **({"query_length": 400, "response_length": 500, "reward_max_length": 1000} | more.get("ppo", {})),
        ),
    )


ALL: list[checking.Part] = ["sampling", "judging", "training", "rl"]


def test_the_check_passes_what_is_right(llama: Path, adapter: Path) -> None:
    report = checking.check_model(sections(llama), ALL, torch.device("cpu"))
    assert report.refusals == {}
    assert report.facts["judging"]["way"] == "packed"
    assert report.facts["training"]["linear weights without"] == 0
    given = dataclasses.replace(sections(llama), model=settings(llama, adapter=str(adapter)))
    assert checking.check_model(given, ["rl"], torch.device("cpu")).refusals == {}
    assert "## judging: passed" in report.markdown("llama")


def test_the_check_refuses_in_sentences(llama: Path, tmp_path: Path) -> None:
    report = checking.check_model(sections(llama, judge_length=1025), ["judging"], torch.device("cpu"))
    assert "judge.max_length is 1025, but the model reads 1024" in report.refusals["judging"]
    shutil.copytree(llama, tmp_path / "m")
    damage(tmp_path / "m", "no layer")
    report = checking.check_model(sections(tmp_path / "m"), ALL, torch.device("cpu"))
    assert set(report.refusals) == {"weights", "weights of the judge", "training", "rl"}
    assert "are missing" in report.refusals["weights"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AttributeError("no such layer"), "AttributeError: no such layer; .*not supported"),
        (torch.OutOfMemoryError(), "device"),
    ],
)
def test_whatever_is_raised_is_a_refusal(error: Exception, said: str) -> None:
    def fails() -> dict[str, Any]:
        raise error

    report = checking.Report()
    assert not report.check("it", fails)
    assert re.search(said, report.refusals["it"])


def test_an_adapter_that_a_stage_leaves_out_is_noticed_in_16_bit(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of the bare base model are far from those of the reward model, even with bfloat16's rounding."""
    given = sections(llama)
    given = dataclasses.replace(given, model=given.model.model_copy(update={"dtype": "bfloat16"}))
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert report.refusals == {}
    used = SharedBase.use
    monkeypatch.setattr(
        SharedBase, "use", lambda self, role: self.bare() if role == "reward" else used(self, role), raising=True
    )
    monkeypatch.setattr(SharedBase, "bare", contextmanager(_bare), raising=False)
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert "the reward model and RL's reward differ" in report.refusals["rl"]


def _bare(shared: SharedBase) -> Iterator[SharedBase]:
    with shared.lm.disable_adapter():
        yield shared


def test_a_refusal_leaves_its_report_beside(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "check"
    arguments = check_model.Arguments(
        output=output, model=settings(llama), judge=sections(llama, judge_length=1025).judge, parts=["judging"]
    )
    with pytest.raises(UserError, match=r"reads 1024 .* The full report is in .*check\.refused"):
        check_model.main(arguments)
    assert not output.exists()
    assert "## judging: refused" in (tmp_path / "check.refused" / "report.md").read_text()
    check_model.main(arguments.model_copy(update={"judge": sections(llama).judge}))
    assert [file.name for file in tmp_path.iterdir()] == ["check"]


def test_large_weights_that_are_no_layers_are_not_left_without_lora(llama: Path) -> None:
    """Some architectures hold their experts in one such matrix."""
    base = models.load_base(settings(llama), "cpu")
    base.model.layers[0].mlp.register_parameter("experts", torch.nn.Parameter(torch.zeros(512, 256)))
    with pytest.raises(UserError, match=r"would get no LoRA .*mlp\.experts"):
        add_lora(base, Lora(r=2), TaskType.CAUSAL_LM)


@pytest.mark.parametrize(
    ("more", "part", "said"),
    [
        ({"scoring": Scoring(format="chat")}, "training", r"scoring\.format is `chat`, but the tokenizer has no chat"),
        ({"scoring": Scoring(format="chat")}, "rl", r"scoring\.format is `chat`, but the tokenizer has no chat"),
        (
            {"sampling_length": 1024},
            "sampling",
            r"preamble \+ sampling\.max_length is 10\d\d, but the model reads 1024",
        ),
        ({"ppo": {"reward_max_length": 1025}}, "rl", r"ppo\.reward_max_length is 1025, but the model reads 1024"),
        ({"ppo": {"response_length": 625}}, "rl", r"ppo\.query_length \+ ppo\.response_length is 1025, but the model"),
        ({"ppo": {"query_length": 20}}, "rl", r"ppo\.query_length is 20, and policy_prompt\.template takes"),
    ],
)
def test_what_a_later_stage_would_find_is_found_first(llama: Path, more: Any, part: Any, said: str) -> None:
    report = checking.check_model(sections(llama, **more), [part], torch.device("cpu"))
    assert re.search(said, report.refusals[part])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)]),
        AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
    ],
)
def test_an_adapter_that_shares_a_base_with_no_other_is_refused_first(llama: Path, tmp_path: Path, config: Any) -> None:
    """It samples, and may judge; but RL has four adapters on one base."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(str(tmp_path / "a"))
    given = dataclasses.replace(sections(llama), model=settings(llama, adapter=str(tmp_path / "a")))
    models.load_initial_policy(given.model, "cpu")
    report = checking.check_model(given, ["rl"], torch.device("cpu"))
    assert f"RL cannot load adapter {tmp_path / 'a'} and" in report.refusals["rl"]


def test_a_tokenizer_of_more_tokens_than_the_model_has(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "m")
    tokenizer = load_tokenizer(settings(llama))
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "m")
    chat = PolicyPrompt(template="chat", stop=["<|im_end|>"])
    said = (
        r"the tokenizer has \d+ tokens and the model \d+ embeddings; prompts contain the token '<\|im_(start|end)\|>'"
    )
    report = checking.check_model(
        sections(tmp_path / "m", policy_prompt=chat, scoring=Scoring(format="chat")), ALL, torch.device("cpu")
    )
    assert set(report.refusals) == {"sampling", "training", "rl"}
    assert all(re.match(said, sentence) for sentence in report.refusals.values())
    assert checking.check_model(sections(tmp_path / "m"), ALL, torch.device("cpu")).refusals == {}


# ---- Chat templates


TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        TURN.replace("m.content", "m.content | upper"),
        TURN.replace("m.content", "m.content | tojson"),
        TURN.replace("m.content", "m.content | e"),
        TURN.replace("m.content", "m.content | truncate(200)"),
        TURN.replace("m.content", "m.content.split() | join(' ')"),
        TURN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
        TURN.replace("messages %}", "messages if m.role == 'human' %}"),
    ],
)
def test_a_chat_template_that_changes_the_instruction_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    given = sections(Path(), policy_prompt=PolicyPrompt(template="chat"))
    with pytest.raises(UserError, match="leaves an instruction out, or changes it"):
        checking.prompts(given, tokenizer)
    for right in (TURN, TURN.replace("m.content", "m.content | trim"), CHATML):
        tokenizer.chat_template = right
        checking.prompts(given, tokenizer)


@pytest.mark.parametrize(
    ("after", "stop", "said"),
    [
        ("</s>", [], None),
        (" \n</s>\n", [], None),
        ("<|im_end|>\n", ["<|im_end|>"], None),
        ("\n\n### User\n", ["\n### User\n"], None),
        ("<|im_end|>\n", [], "begins neither with an end token"),
        ("[/end]\n</s>", [], "begins neither with an end token"),  # Phi-3's, with another end token
        ("[/end]\n</s>", ["[/end]"], None),
        ("[/end]\n### User\n", ["\n### User\n"], "begins neither with an end token"),
        ("", [], "begins neither with an end token"),
        (None, [], "leaves an assistant's answer out"),
    ],
)
def test_an_answer_ends_with_what_comes_first_after_it(after: str | None, stop: list[str], said: str | None) -> None:
    turn = "{{ m.content | upper }}" if after is None else f"{{{{ m.content }}}}{{{{ {after!r} }}}}"
    template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{turn}{{% endfor %}}"
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    given = sections(Path(), policy_prompt=PolicyPrompt(template="chat", stop=stop))
    with pytest.raises(UserError, match=said) if said else nullcontext():
        checking.ends_of_turns(given, tokenizer, torch.nn.Module())


def test_a_chat_template_whose_turns_cannot_end_is_refused(llama: Path, tmp_path: Path) -> None:
    """The answer's turn ends with a token that is neither the model's end token nor a stop string."""
    shutil.copytree(llama, tmp_path / "m")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|over|>{% endfor %}"
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    for stop, refused in (([], True), (["<|over|>"], False)):
        prompt = PolicyPrompt(template="chat", stop=stop)
        report = checking.check_model(sections(tmp_path / "m", policy_prompt=prompt), ["sampling"], torch.device("cpu"))
        assert ("ends of turns" in report.refusals) == refused, report.refusals
