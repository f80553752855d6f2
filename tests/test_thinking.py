"""Thinking models: template variables reach the chat template, and nothing reads the thinking."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from pydantic import ValidationError

import sample_responses
from salmon import ppo
from salmon.config import Model, PolicyPrompt, Ppo, Sampling
from salmon.encoding import begins_thinking, encode_prompt
from salmon.errors import UserError
from salmon.sampling import Generation, without_thinking
from salmon.text import cut_thinking
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer, save_markov

THINK = ("<think>", "</think>")
# As Qwen3's: where thinking is off, the prompt holds an empty one.
OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN = CHATML.replace("assistant\n{% endif %}", "assistant\n" + OFF + "{% endif %}")
# As DeepSeek-R1's: the prompt begins the thinking.
BEGUN = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Yes.", "Yes."),
        (" Yes.\n", " Yes.\n"),
        ("", ""),
        ("<think>\nHm.\n</think>\n\nYes.\n", "Yes.\n"),
        ("\n<think></think>\n\nYes.", "Yes."),
        ("Hm.\n</think>\n\nYes.", "Yes."),
        ("Yes. <think>Hm.", "Yes."),
        ("<think>Hm.", ""),
        ("Yes.\n<think>Hm.</think>\n", "Yes."),
        ("A <think>Hm.</think>B<think>Hm.</think>", "A B"),
        ("<think>A<think>B</think>C</think>D", "D"),
        ("</think></think>D", "D"),
        ("A</think>B<think>C", "B"),
    ],
)
def test_what_is_cut(text: str, rest: str) -> None:
    assert cut_thinking(text, *THINK) == rest


def tokenizers() -> list[Any]:
    """The markers as special tokens, which decoding drops, as other added tokens, and as plain text."""
    return [
        byte_tokenizer(special=(*CHATML_TOKENS, *THINK)),
        byte_tokenizer(special=CHATML_TOKENS, added=THINK),
        byte_tokenizer(special=CHATML_TOKENS),
    ]


@pytest.mark.parametrize("tokenizer", tokenizers())
@pytest.mark.parametrize(
    ("said", "ended", "rest", "cut"),
    [
        ("Yes.", "</s>", "Yes.", False),
        ("<think>Hm.</think>\n\nYes.", "</s>", "Yes.", True),
        ("Hm.</think>Yes.", "<|im_end|>", "Yes.", True),
        ("Yes.<think>Hm.", "", "Yes.", True),
        ("<think>Hm.", "", "", True),
        ("<think>Hm.</think>Yes.", "\nUser", "Yes.", True),
        ("<think>Hm.", "\nUser", "", True),
        ("a<|im_start|>b<think>c<|im_start|>d</think>e<|im_start|>f", "</s>", "abef", True),
    ],
)
def test_responses_have_no_thinking_however_it_is_marked(
    tokenizer: Any, said: str, ended: str, rest: str, cut: bool
) -> None:
    ids = tokenizer(said + ended, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(tokenizer(said, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    generation = Generation(ids, text, "stop")
    assert without_thinking(tokenizer, generation, THINK, begun=False) == (rest, cut)
    assert without_thinking(tokenizer, generation, None, begun=False) == (text, False)


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_thinking_that_the_prompt_begins(tokenizer: Any) -> None:
    for said, rest in (("Hm.", ""), ("Hm.</think>Yes.", "Yes.")):
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        generation = Generation(ids, tokenizer.decode(ids, skip_special_tokens=True), "length")
        assert without_thinking(tokenizer, generation, THINK, begun=True) == (rest, True)


def test_a_prompt_that_begins_thinking_is_seen() -> None:
    chat = PolicyPrompt(template="chat")
    off = PolicyPrompt(template="chat", template_variables={"enable_thinking": False})
    assert begins_thinking(byte_tokenizer(template=BEGUN), chat, "")
    assert not begins_thinking(byte_tokenizer(template=BEGUN), PolicyPrompt(template="chat", thinking=None), "")
    for prompt in (chat, off):
        assert not begins_thinking(byte_tokenizer(template=QWEN), prompt, "")
    assert begins_thinking(byte_tokenizer(), PolicyPrompt(template="policy.txt", assistant_marker="<think>"), "")


@pytest.mark.parametrize("about", ["Put thoughts after <think>.", "Do not <think>.", "First </think>."])
def test_a_prompt_that_speaks_of_thinking_does_not_begin_it(about: str) -> None:
    chat = PolicyPrompt(template="chat")
    assert not begins_thinking(byte_tokenizer(), PolicyPrompt(template="policy.txt"), about)
    assert not begins_thinking(byte_tokenizer(template=about + CHATML), chat, "")
    assert begins_thinking(byte_tokenizer(template=about + BEGUN), chat, "")


def test_a_chat_template_that_refuses_an_empty_turn() -> None:
    empty = "{% if not messages[0].content %}{{ raise_exception('empty') }}{% endif %}"
    assert begins_thinking(byte_tokenizer(template=empty + BEGUN), PolicyPrompt(template="chat"), "")


CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("markers", "said", "rest", "cut"),
    [
        ((ANALYSIS, FINAL), f"{ANALYSIS}Hm.<|end|>{FINAL}Yes.<|return|>", "Yes.", True),
        ((ANALYSIS, "<|channel|>final<|message|>"), f"{ANALYSIS}Hm.<|end|>{FINAL}Yes.", "Yes.", True),
        ((ANALYSIS, "<|channel|>final<|message|>"), "<|channel|>final<|message|>Yes.<|return|>", "Yes.", True),
        ((ANALYSIS, FINAL), f"{ANALYSIS}Hm.<|end|>", "", True),
        ((ANALYSIS, FINAL), "Yes.<|end|>", "Yes.", False),
        ((ANALYSIS, FINAL), "Yes<|message|>.<|end|>", "Yes.", False),
        ((ANALYSIS, "<|end|>"), f"{ANALYSIS}Hm.<|end|>Yes.<|end|>", "Yes.", True),
    ],
)
def test_markers_of_several_special_tokens(markers: tuple[str, str], said: str, rest: str, cut: bool) -> None:
    """The channels of gpt-oss."""
    tokenizer = byte_tokenizer(special=CHANNELS)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    ended = said.endswith(("<|return|>", "<|end|>"))
    generation = Generation(ids, tokenizer.decode(ids, skip_special_tokens=True), "eos" if ended else "length")
    assert without_thinking(tokenizer, generation, markers, begun=False) == (rest, cut)


DATED = "Today is {{ strftime_now('%d %b %Y') }}." + CHATML
LLAMA = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}" + CHATML
)


@pytest.mark.parametrize(
    ("template", "variables", "begins"),
    [
        (DATED, {}, None),
        (DATED, {"strftime_now": "2026-01-31"}, "Today is 31 Jan 2026.<"),
        (DATED, {"strftime_now": "tomorrow"}, None),
        (LLAMA, {}, None),
        (LLAMA, {"date_string": "1 May"}, "1 May<"),
        ("{% set today = strftime_now('%d') %}" + CHATML, {}, "<|im_start|>user"),
    ],
)
def test_a_chat_template_that_writes_the_date(template: str, variables: dict[str, Any], begins: str | None) -> None:
    """Otherwise a run's prompts would change at midnight."""
    prompt = PolicyPrompt(template="chat", template_variables=variables)
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template)
    if begins is None:
        said = "Invalid isoformat" if variables else "it writes the date.*date_string"
        with pytest.raises(UserError, match=rf"{said}.*policy_prompt\.template_variables"):
            encode_prompt(tokenizer, "Why?", prompt, "")
    else:
        assert tokenizer.decode(encode_prompt(tokenizer, "Why?", prompt, "")).startswith(begins)


def test_variables_reach_the_chat_template() -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, added=THINK, template=QWEN)
    for variables, ends in (({}, "assistant\n"), ({"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n")):
        ids = encode_prompt(tokenizer, "Why?", PolicyPrompt(template="chat", template_variables=variables), "")
        assert tokenizer.decode(ids) == f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>{ends}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"template": "policy.txt", "template_variables": {"x": 1}}, "template to `chat`"),
        ({"template": "chat", "template_variables": {"tokenize": True}}, "tokenize cannot be set"),
        ({"template": "chat", "template_variables": {"not a name": 1}}, "not a name cannot be set"),
        ({"template": "chat", "template_variables": {"x": [1]}}, "template_variables"),
        ({"template": "chat", "thinking": ["<t>", "<t>"]}, "markers must differ"),
        ({"template": "chat", "thinking": ["<t>"]}, "thinking"),
        ({"template": "chat", "thinking": ["", "<t>"]}, "thinking"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolicyPrompt(**wrong)


def test_variables_keep_their_types() -> None:
    given = {"a": True, "b": 1, "c": 0.5, "d": "x", "e": None}
    prompt = PolicyPrompt(template="chat", template_variables=given)
    again = PolicyPrompt.model_validate_json(prompt.model_dump_json()).template_variables
    assert [(value, type(value)) for value in again.values()] == [(value, type(value)) for value in given.values()]


def test_a_chat_template_that_refuses_the_prompt() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('no turns without a tool') }}")
    with pytest.raises(UserError, match=r"no turns without a tool.*policy_prompt\.template"):
        encode_prompt(tokenizer, "Why?", PolicyPrompt(template="chat"), "")


# ---- Stages


@pytest.mark.parametrize("special", [True, False])
def test_the_script_writes_responses_without_thinking(tmp_path: Path, special: bool) -> None:
    names = {"special": (*CHATML_TOKENS, *THINK)} if special else {"special": CHATML_TOKENS, "added": THINK}
    tokenizer = byte_tokenizer(**names, template=QWEN)
    model = save_markov(tmp_path / "m", tokenizer, "\n<think>hm</think>Yes<|im_end|>", ends=("</s>", "<|im_end|>"))
    pl.DataFrame({"prompt_id": ["p"], "source": ["x"], "instruction": ["Is it?"], "input": [""]}).write_parquet(
        tmp_path / "p.parquet"
    )

    def run(output: str, **prompt: Any) -> tuple[dict[str, Any], int]:
        arguments = sample_responses.Arguments(
            prompts=tmp_path / "p.parquet",
            output=tmp_path / output,
            index=0,
            shard=0,
            model=Model(base=str(model), quantization="none", dtype="float32"),
            sampling=Sampling(max_length=80, shards=1),
            policy_prompt=PolicyPrompt(template="chat", **prompt),
        )
        sample_responses.main(arguments)
        manifest = json.loads((tmp_path / output).with_suffix(".manifest.json").read_text())
        return pl.read_parquet(tmp_path / output).row(0, named=True), manifest["counts"]["thinking_cut"]

    row, cut = run("cut.parquet")
    assert (row["response"], row["finish_reason"], row["response_tokens"], cut) == ("Yes", "eos", len("THmTYesE"), 1)
    row, cut = run("whole.parquet", thinking=None)
    assert (row["response"], cut) == ("hmYes" if special else "<think>hm</think>Yes", 0)


class Said:
    """A sampler of given responses."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.found = [
            Generation(ids, tokenizer.decode(ids, skip_special_tokens=True), "eos")
            for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        ]

    def sync(self, policy: Any) -> None:
        pass

    def sample(self, prompts: Any, seeds: Any, **_: Any) -> list[Generation]:
        assert len(prompts) == len(self.found)
        return self.found


def test_rl_rewards_the_text_and_trains_on_all_tokens() -> None:
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, added=THINK, template=QWEN)
    table = pl.DataFrame(
        {"instruction": ["a", "b"], "input": ["", ""], "question_type": "general", "length_bonus": 1.0}
    )
    shared: Any = SimpleNamespace(eval=lambda: None, use=nullcontext)
    settings = Ppo(template="t", principles="p", rollout_batch_size=2, minibatch_size=2)
    sampler = Said(tokenizer, ["<think>Hm.</think>Yes.</s>", "No.</s>"])
    rollouts = ppo.sample(shared, sampler, tokenizer, table, 0, settings, PolicyPrompt(template="chat"))
    assert [(each.text, each.thinking_cut) for each in rollouts] == [("Yes.", True), ("No.", False)]
    assert [each.response for each in rollouts] == [each.tokens for each in sampler.found]
    for each in rollouts:
        each.logprobs = each.reference = each.values = each.returns = each.entropy = torch.zeros(len(each.response))
    assert ppo.summarize(rollouts)["thinking_cut"] == 0.5


CUT = {  # what is sampled -> the text that is scored, and the text of the tokens that are trained on
    "Yes.\nNote: it is good.</s>": ("Yes.", "Yes."),
    "Yes.\n\nUpdates follow</s>": ("Yes.\n", "Yes.\n"),
    "A Note.\n Note\nCommented.\nNote</s>": ("A Note.\n Note", "A Note.\n Note"),
    "Note this.\nnote</s>": ("Note this.\nnote", "Note this.\nnote</s>"),
    "\nNote</s>": ("", "\n"),  # there has to be a token to be rewarded
    "<think>a\nNote b</think>\n\nSo 🙂\nNote</s>": ("So 🙂", "<think>a\nNote b</think>\n\nSo 🙂"),
    "Yes <think>a</think> and\nComment</s>": ("Yes  and", "Yes <think>a</think> and"),
    "<think>a\nNote b</s>": ("", "<think>a\nNote b</s>"),
}


@pytest.mark.parametrize("special", [False, True])
def test_a_response_is_cut_where_a_line_praises_it(special: bool) -> None:
    """At one of the paper's three words at the start of a line, outside thinking: the rest and the stop are lost."""
    names = {"special": (*CHATML_TOKENS, *THINK)} if special else {"special": CHATML_TOKENS, "added": THINK}
    tokenizer = byte_tokenizer(**names, template=QWEN)
    size = len(CUT)
    table = pl.DataFrame(
        {"instruction": [str(n) for n in range(size)], "input": "", "question_type": "general", "length_bonus": 1.0}
    )
    shared: Any = SimpleNamespace(eval=lambda: None, use=nullcontext)
    settings = Ppo(template="t", principles="p", rollout_batch_size=size, minibatch_size=size)

    def sample(changed: Ppo) -> list[ppo.Rollout]:
        sampler = Said(tokenizer, list(CUT))
        return ppo.sample(shared, sampler, tokenizer, table, 0, changed, PolicyPrompt(template="chat"))

    rollouts = sample(settings)
    for said, (text, trained), rollout in zip(CUT, CUT.values(), rollouts, strict=True):
        assert rollout.text == text, said
        assert tokenizer.decode(rollout.response) == trained
        assert rollout.marker_cut == (said != trained)
        assert rollout.finished == (said == trained)
        rollout.logprobs = rollout.reference = rollout.values = torch.zeros(len(rollout.response))
        rollout.returns = rollout.entropy = rollout.values
    assert ppo.summarize(rollouts)["marker_cut"] == 6 / size
    for said, rollout in zip(CUT, sample(settings.model_copy(update={"cut_markers": []})), strict=True):
        assert tokenizer.decode(rollout.response) == said
        assert rollout.finished
        assert not rollout.marker_cut
