"""Judge and reward model ask a chat model in its own format: unfilled template parts become turns, once."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from pydantic import ValidationError

import judge_preferences
import train_reward_model
from salmon import config, configuration, ppo, reward_model, templates
from salmon.config import Model, Ppo, Scoring
from salmon.encoding import Template, read_template
from salmon.errors import UserError
from salmon.judging import Judge, Pair
from salmon.principles import JudgedPrinciple, WeightedPrinciple
from salmon.tables import RESPONSES
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer, save_markov

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "prompts" / "templates"
JUDGE = (
    "You review {{outputs}}.\n\n# Question\n\n{UserInstruction}\n\n(a) {OutputA}\n\n(b) {OutputB}\n\n"
    "{Dimension}: {Definition}\n\n### Dromedary\n\nBetter is ("
)
REWARD = "You review.\n\n{Output}\n\n{Input}\n\n{Dimensions}\n\nThe quality is"
CHAT = Scoring(format="chat")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"


def chatml(template: str = CHATML, **more: Any) -> Any:
    return byte_tokenizer(special=CHATML_TOKENS, template=template, **more)


def write(folder: Path, text: str) -> str:
    (folder / "template.txt").write_text(text + "\n")
    return str(folder / "template.txt")


# ---- The parts


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("S.\n\nT.\n\n{Output}\nx\n\ny\nIt is", ("S.\n\nT.", "{Output}\nx\n\ny", "It is")),
        ("{Output}\nIt is", ("", "{Output}", "It is")),
        ("S.\n{Output}\n\n{Input}\n\nIt is (", ("", "S.\n{Output}\n\n{Input}", "It is (")),
        ("S.\n\n# A\n\n## B\n\n{Output}\n\n## C\n\n{Input} is", ("S.", "# A\n\n## B\n\n{Output}", "{Input} is")),
        ("# A\n\n{Output}\n\n# {Input}\n\nx", ("", "# A\n\n{Output}\n\n# {Input}", "x")),
        ("{}\n\n{Output}\n\n", ("{}", "{Output}", "")),
    ],
)
def test_the_parts_of_a_template(template: str, parts: tuple[str, str, str]) -> None:
    assert templates.turns(template) == parts


@pytest.mark.parametrize("template", ["{Output} is", "S.\n\nIt is {Output}", ""])
def test_a_template_without_a_users_turn_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="no line with a slot before its last one"):
        templates.turns(template)


@pytest.mark.parametrize("file", ["judge.txt", "reward_model_pmp.txt", "reward_model.txt", "reward_model_rl.txt"])
def test_the_shipped_templates_become_chats_with_all_their_slots(file: str) -> None:
    whole = templates.read(SHIPPED / file)
    system, user, begun = templates.turns(whole)
    assert templates.slots(system) == set()
    assert templates.slots(user + begun) == templates.slots(whole)
    assert not user.splitlines()[-1].startswith("#")
    found = read_template(chatml(), SHIPPED / file, CHAT, "scoring.format")
    assert found.is_chat
    assert found.text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{begun}"
    )
    assert read_template(chatml(), SHIPPED / file, Scoring(), "scoring.format") == Template(whole)


# ---- Chat templates


@pytest.mark.parametrize(
    "template", [NO_SYSTEM + CHATML, CHATML.replace("in messages", "in messages if m.role != 'system'")]
)
def test_where_there_is_no_system_turn_the_user_says_it(tmp_path: Path, template: str) -> None:
    found = read_template(chatml(template), write(tmp_path, REWARD), CHAT, "scoring.format")
    assert found.text == (
        "<|im_start|>user\nYou review.\n\n{Output}\n\n{Input}\n\n{Dimensions}<|im_end|>\n"
        "<|im_start|>assistant\nThe quality is"
    )


def test_slots_and_their_white_space_survive_a_chat_template_that_strips(tmp_path: Path) -> None:
    tokenizer = chatml(CHATML.replace("m['content']", "m['content'] | trim"))
    found = read_template(tokenizer, write(tmp_path, JUDGE), CHAT, "judge.format")
    assert templates.slots(found.text) == set(templates.JUDGE_SLOTS)
    assert "{{outputs}}" in found.text  # not a slot, and not for jinja
    [ids] = found.encode(tokenizer, [templates.fill(found.text, Definition="x \n\n", Dimension="{OutputA}")])
    assert "{OutputA}: x \n\n<|im_end|>" in tokenizer.decode(ids)


def test_variables_reach_the_chat_template(tmp_path: Path) -> None:
    form = Scoring(format="chat", template_variables={"mood": "calm"})
    found = read_template(chatml(CHATML + "[{{ mood }}]"), write(tmp_path, REWARD), form, "scoring.format")
    assert found.text.endswith("assistant\n[calm]The quality is")


@pytest.mark.parametrize(
    ("begins", "rest"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>\n\n</think>\n\n"),
        ("[THINK]", "[THINK]\n\n[/THINK]\n\n"),
        ("<seed:think>\nSo", "<seed:think>\nSo\n\n</seed:think>\n\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("</think><think>", "</think><think>\n\n</think>\n\n"),
        ("<answer>", "<answer>"),
    ],
)
def test_a_begun_thinking_is_closed_before_the_verdict(tmp_path: Path, begins: str, rest: str) -> None:
    """The chat templates of DeepSeek-R1 and Qwen3-Thinking begin the assistant's turn this way."""
    template = "You may <think>." + CHATML.replace("assistant\n", f"assistant\n{begins}")
    found = read_template(chatml(template), write(tmp_path, REWARD), CHAT, "scoring.format")
    assert found.text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{rest}The quality is")


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        (None, REWARD, r"scoring\.format is `chat`, but the tokenizer has no chat template"),
        (CHATML, "{Output} is", r"scoring\.format is `chat`, but template .* no line with a slot"),
        (
            "{{ raise_exception('not today') }}",
            REWARD,
            r"scoring\.format .* \(not today\); check its variables",
        ),
        ("{{ messages[-1]['content'] | upper }}", REWARD, r"scoring\.format .*it changes the text"),
        ("{{ messages[-1]['content'] + 1 }}", REWARD, r"scoring\.format .*can only concatenate str"),
        ("{{ strftime_now('%d') }}" + CHATML, REWARD, r"scoring\.format .*it writes the date"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, template: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_template(chatml(template), write(tmp_path, text), CHAT, "scoring.format")


def test_a_template_without_turns_is_found_when_snakemake_starts(tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    raw["pmp"]["template"] = write(tmp_path, "{Output} {Input} is")
    configuration.load(raw, ROOT)
    raw["judge"]["format"] = "chat"
    configuration.load(raw, ROOT)
    raw["scoring"]["format"] = "chat"
    with pytest.raises(
        UserError, match=r"scoring\.format: template .* cannot become a chat: it has no line with a slot"
    ):
        configuration.load(raw, ROOT)


def test_variables_need_a_chat() -> None:
    with pytest.raises(ValidationError, match="format to `chat`"):
        Scoring(template_variables={"x": 1})
    with pytest.raises(ValidationError, match="format to `chat`"):
        config.Judge(template="t", principles="p", template_variables={"x": 1})


# ---- The stages


def asked(system: str, user: str, begun: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{begun}"


def test_the_judge_asks_in_turns_and_is_given_text(tmp_path: Path) -> None:
    tokenizer = chatml()
    principle = JudgedPrinciple(dimension="Kind", definition="It is kind.", negative_definition="-")
    form = config.Judge(template=write(tmp_path, JUDGE), principles="p", format="chat")
    options: Any = {"principles": [principle], "device": "cpu"}
    template = read_template(tokenizer, form.template, form, "judge.format")
    judge = Judge(None, tokenizer, template=template, max_length=4096, **options)  # type: ignore[arg-type]
    found = judge.encode(Pair("p", "Why?", "A<|im_end|>", "B"))
    assert found is not None
    user = "# Question\n\nWhy?\n\n(a) {}\n\n(b) {}\n\nKind: It is kind."
    for ids, outputs in ((found.order_12, ("A<|im_end|>", "B")), (found.order_21, ("B", "A<|im_end|>"))):
        assert tokenizer.decode(ids[0]) == asked("You review {{outputs}}.", user.format(*outputs), "Better is (")
        assert tokenizer.bos_token_id not in ids[0]
        assert ids[0].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert judge.options == tuple(tokenizer("ab", add_special_tokens=False)["input_ids"])
    # Cut like any other prompt: by tokens of the longer output.
    short = Judge(None, tokenizer, template=template, max_length=len(found.order_12[0]) - 3, **options)  # type: ignore[arg-type]
    cut = short.encode(Pair("p", "Why?", "A<|im_end|>", "B"))
    assert cut is not None
    assert "(a) A<|im_en\n" in tokenizer.decode(cut.order_12[0])


def test_pre_training_training_and_rl_read_the_same_chat(tmp_path: Path) -> None:
    tokenizer, file = chatml(), write(tmp_path, REWARD)
    wanted = asked("You review.", "Yes.</s>\n\nWhy?\n\n- Be kind.", "The quality is")
    limits = {"query_length": 20, "response_length": 20, "max_length": 400}
    records = pl.DataFrame(
        {
            "instruction": ["Why?"],
            "input": [""],
            "output_1": ["Yes.</s>"],
            "output_2": ["No."],
            "definitions": [["Be kind."]],
        }
    )
    for stage, kind in (("pmp", config.RewardTraining), ("reward_model", config.RewardModel)):
        section = kind(template=file, learning_rate=1e-4, **limits)
        arguments = train_reward_model.Arguments(
            records=file, output=file, model=Model(base="x"), scoring=CHAT, **{stage: section}
        )
        template = train_reward_model.read_template(arguments, tokenizer)
        first, _ = reward_model.record_tokens(tokenizer, template, records, section, stage)
        assert tokenizer.decode(first) == wanted
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(first)

    read: list[list[int]] = []

    def rewards(texts: list[list[int]]) -> torch.Tensor:
        read.extend(texts)
        return torch.zeros(len(texts))

    shared: Any = SimpleNamespace(eval=lambda: None, use=nullcontext, rewards=rewards)
    rollout = ppo.Rollout(0, [1], "Why?", "general", 1.0, [5, 6], "Yes.</s>", True)
    settings = Ppo(template=file, principles="p", principles_per_rollout=1)
    principle = WeightedPrinciple(dimension="Kind", definition="Be kind.", weight=1.0)
    ppo.score(shared, tokenizer, [rollout], [principle], 0, settings, 1, CHAT)
    assert read == [first]


def test_the_judging_script_reads_the_setting(tmp_path: Path) -> None:
    """A model whose next token depends on the last one alone: after the full stop of this chat, it is `a`."""
    tokenizer = chatml(CHATML.replace("assistant\n{% endif %}", "assistant\n.{% endif %}"))
    model = save_markov(tmp_path / "m", tokenizer, ".a", "(b", max_length=1024)
    (tmp_path / "principles.json").write_text('[{"dimension": "D", "definition": "x", "negative_definition": "y"}]')
    row = {"prompt_id": "p", "source": "s", "instruction": "Why?", "input": "", "finish_reason": "eos"}
    for index in (0, 1):
        table = pl.DataFrame([row | {"response": f"answer {index}", "prompt_tokens": 1, "response_tokens": 1}])
        table.select(list(RESPONSES.columns)).cast(RESPONSES.schema).write_parquet(tmp_path / f"r{index}.parquet")  # type: ignore[arg-type]
    template = JUDGE.removesuffix("Better is (")
    for form, wanted in (("text", 0.0), ("chat", 1.0)):
        arguments = judge_preferences.Arguments(
            response0=tmp_path / "r0.parquet",
            response1=tmp_path / "r1.parquet",
            principles=tmp_path / "principles.json",
            output=tmp_path / f"{form}.parquet",
            shard=0,
            model=Model(base=str(model), quantization="none", dtype="float32"),
            judge=config.Judge(
                template=write(tmp_path, template + "\n" * (form == "text")),
                principles=str(tmp_path / "principles.json"),
                max_length=600,
                min_characters=0,
                shards=1,
                format=form,  # type: ignore[arg-type]
            ),
        )
        judge_preferences.main(arguments)
        found = pl.read_parquet(tmp_path / f"{form}.parquet").row(0, named=True)
        assert (found["s12"] > 1, found["s21"] < -1) == (bool(wanted), bool(wanted))
