"""Prompts: what each data set gives, what cleaning strips, what a draw under a limit depends on."""

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from salmon import formats, prompts
from salmon.config import Prompts, RlPrompts
from salmon.errors import UserError
from salmon.formats import PROMPT_FORMATS, Prompt
from salmon.tables import PROMPTS, RL_PROMPTS
from tests import forks, synthetic

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def extract(kind: Any, rows: Sequence[Any]) -> tuple[list[Prompt], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(prompts.extract(kind, [(f"row {n}", row) for n, row in enumerate(rows)], counts)), counts


def instructions(kind: Any, rows: Sequence[Any]) -> list[str]:
    return [prompt.instruction for prompt in extract(kind, rows)[0]]


def settings(path: Path | list[Path], kind: str, **more: Any) -> Prompts:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    return Prompts.model_validate({"sources": {"it": {"format": kind, "path": paths, **more}}})


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as stream:
        return [json.loads(line) for line in stream]


def message(name: str, parent: str | None, text: str | None = "text") -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "text": text}


# What each data set gives


def test_oasst1_gives_the_roots_that_have_a_reply_whatever_the_order() -> None:
    rows = [
        message("root", None, " asked "),
        message("reply", "root"),
        message("deeper", "reply"),
        message("lonely", None),
        message("orphan", "absent"),
        message("blank", None, " "),
        message("reply to blank", "blank"),
    ]
    for _ in range(20):
        random.Random(1).shuffle(rows)
        found, counts = extract("oasst1", rows)
        assert [prompt.instruction for prompt in found] == ["asked"]
        assert counts == {"no root of a tree": 4, "root without a reply": 1, "empty": 1}


def test_deleted_messages_and_spam_of_oasst1_are_no_messages() -> None:
    rows = [
        {**message("asked", None), "deleted": False, "review_result": True},
        {**message("reply", "asked"), "deleted": None, "review_result": None},
        {**message("deleted", None), "deleted": True, "review_result": None},
        message("reply to deleted", "deleted"),
        {**message("spam", None), "review_result": False},
        message("reply to spam", "spam"),
        message("answered by spam", None),
        {**message("spam reply", "answered by spam"), "deleted": False, "review_result": False},
    ]
    found, counts = extract("oasst1", rows)
    assert [prompt.instruction for prompt in found] == ["text"]
    assert counts == {"deleted": 1, "spam": 2, "no root of a tree": 3, "root without a reply": 1}


def test_a_message_that_occurs_twice_is_an_error() -> None:
    with pytest.raises(UserError, match="row 2: message_id occurs twice"):
        extract("oasst1", [message("a", None), message("b", "a"), message("a", None)])


def test_sharegpt_gives_the_first_turn_if_a_humans() -> None:
    def talk(*turns: tuple[str, str | None]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}

    found, counts = extract(
        "sharegpt",
        [
            talk(("human", "first\n1 / 1"), ("gpt", "answer"), ("human", "second")),
            talk(("human", "alone")),
            talk(),
            talk(("gpt", "answer"), ("human", "late")),
            talk(("system", "be kind"), ("human", "late")),
            talk(("user", "other name"), ("gpt", "answer")),
            talk(("human", None), ("gpt", "answer")),
        ],
    )
    assert [prompt.instruction for prompt in found] == ["first", "other name"]
    assert counts == {"fewer than two turns": 2, "no human turn first": 1, "a system turn first": 1, "empty": 1}
    marked = {"from": "human", "value": "<p>as page</p>", "markdown": "as text"}
    assert instructions("sharegpt", [{"conversations": [marked, marked]}]) == ["as text"]


def test_dolly_gives_the_categories_without_context() -> None:
    def row(category: str, context: str | None = "") -> dict[str, Any]:
        return {"instruction": category, "context": context, "category": category}

    assert instructions("dolly", [row(category) for category in formats.DOLLY_CATEGORIES]) == list(
        formats.DOLLY_CATEGORIES
    )
    rows = [row("closed_qa"), row("summarization"), row("information_extraction"), row("open_qa", "context")]
    found, counts = extract("dolly", rows)
    assert not found
    assert counts == {"other category": 3, "with context": 1}


def test_openorca_gives_four_families_without_inference() -> None:
    rows = [{"id": f"{family}.12", "question": family} for family in ("niv", "flan", "t0", "cot", "t5", "fla", "")]
    rows += [
        {"id": "flan.1", "question": f"about {word}"}
        for word in ("a premise", "the Premise:", "the hypothesis", "Hypothesis", "it is not possible to tell")
    ]
    found, counts = extract("openorca", rows)
    assert [(prompt.family, prompt.instruction) for prompt in found] == [(f, f) for f in ("niv", "flan", "t0", "cot")]
    assert counts == {"other family": 3, "NLI": 5}
    assert not formats.is_nli("PREMISE, promises and hypothetical: It is not possible")


def test_hh_rlhf_gives_the_first_human_turn() -> None:
    rows = [
        {"chosen": "\n\nHuman: how?\n\nAssistant: so\n\nHuman: why?\n\nAssistant: thus", "rejected": "other"},
        {"chosen": "\n\nHuman: two\n\nHuman: in a row\n\nAssistant: so", "rejected": ""},
        {"chosen": "\n\nHuman: without an answer", "rejected": ""},
        {"chosen": "\n\nAssistant: so\n\nHuman: late", "rejected": ""},
        {"chosen": None, "rejected": None},
    ]
    found, counts = extract("hh_rlhf", rows)
    assert [prompt.instruction for prompt in found] == ["how?", "two", "without an answer"]
    assert counts == {"no human turn first": 2}


def test_prompt_files_keep_their_type_and_bonus() -> None:
    rows = [
        {"instruction": "a", "input": " b ", "question_type": 2, "length_bonus": 0.5},
        {"instruction": "c", "question_type": "reasoning"},
        {"instruction": "d", "input": None, "question_type": None, "length_bonus": None},
    ]
    assert extract("prompts", rows)[0] == [
        Prompt("a", "b", question_type="red_teaming", length_bonus=0.5),
        Prompt("c", question_type="reasoning"),
        Prompt("d"),
    ]


# Cleaning


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("tell me1 / 1", "tell me"),
        ("tell me\n13 / 13\n", "tell me"),
        ("2 / 3tell me", "tell me"),
        ("3 / 3\ntell me 2 / 2", "tell me"),
        ("an old draft 1 / 1 tell me", "tell me"),
        ("draft1 / 1draft1 / 1tell me1 / 1", "tell me"),
        ("in 20231 / 1", "in 2023"),
        ("tell meShare Prompt", "tell me"),
        ("tell me1 / 1Share Prompt", "tell me"),
        ("tell me\n \n지금 번역하기", "tell me"),
        ("tell me Translate now", "tell me"),
        ("tell me\nLanguage: English", "tell me"),
        ("tell me\nLanguage: 한국어", "tell me"),
        ("tell me 2 / 2 Share Prompt\nTranslate now", "tell me"),
        ("tell me\nLanguage: Chinese (Traditional)", "tell me"),
        ("tell me 1 / 1\n \nLanguage:Chinese (Simplified)", "tell me"),
        ("tell me\n \n지금 번역하기\nand what else the page says", "tell me"),
        ("~You see a chat with Bing, it is not ChatGPT's~\ntell me", "tell me"),
        ("2 / 2 ~~Bing, and not ChatGPT~~ 3/3 tell me", "tell me"),
        ("tell me1/1", "tell me"),
        ("tell me.2/3", "tell me."),
        ("tell me\n2/3\nShare Prompt", "tell me"),
        ("tell me 2/2", "tell me"),
        ("2/3tell me", "tell me"),
        ("2/3\ntell me", "tell me"),
        ("2/2 tell me", "tell me"),
        ("1 / 1", ""),
        ("", ""),
        # nothing in these comes from the page
        ("what is 3 / 2", "what is 3 / 2"),
        ("what is 21 / 10 of it", "what is 21 / 10 of it"),
        ("5 / 1000 of it", "5 / 1000 of it"),
        ("Share Prompt ideas with me", "Share Prompt ideas with me"),
        ("Language: English, please", "Language: English, please"),
        ("Language: Chinese (Traditional), please", "Language: Chinese (Traditional), please"),
        ("a line in Chinese (Traditional)", "a line in Chinese (Traditional)"),
        ("~~ why is Bing not ChatGPT", "~~ why is Bing not ChatGPT"),
        ("~softly~ tell me", "~softly~ tell me"),
        ("what is ~Bing, not ChatGPT~", "what is ~Bing, not ChatGPT~"),
        ("what is 3/4", "what is 3/4"),
        ("3/4 of what", "3/4 of what"),
        ("who did 9/11", "who did 9/11"),
        ("solve x=3/4", "solve x=3/4"),
        ("born on 4/5/23", "born on 4/5/23"),
        ("1/2. tell me", "1/2. tell me"),
        ("from 121/200", "from 121/200"),
        ("tell me3/2", "tell me3/2"),
        ("one\n\n  two", "one\n\n  two"),
    ],
)
def test_what_the_page_added_is_stripped(text: str, clean: str) -> None:
    assert formats.clean_web_text(text) == clean


def plain_clean(text: str) -> str:
    """The same cleaning step by step on whole texts, which takes time quadratic in their length."""
    language = r"Language: ?(?:Chinese \((?:Traditional|Simplified)\)|[^\W\d_]+)"
    label = re.compile(rf"(?:Share Prompt|Translate now|{language})$")

    def is_page(found: re.Match[str], beside: str, marks: str) -> bool:
        number, of = int(found[1]), int(found[2])
        glued = beside in ("", "\n", "\r", *marks) or beside.isalpha()
        return (glued and number <= of) or (beside.isspace() and number == of)

    text, previous = text.partition("지금 번역하기")[0], None
    while text != previous:
        previous = text
        text = label.sub("", text.strip()).rstrip()
        counter = re.search(r"(\d{1,3}) / (\d{1,3})$", text)
        pages = [n for n in range(3) if counter and n < len(counter[1]) and int(counter[1][n:]) <= int(counter[2])]
        if counter and pages:
            text = text[: counter.start(1) + pages[0]]
        elif (found := re.search(r"(\d{1,3})/(\d{1,3})$", text)) and is_page(found, text[: found.start()][-1:], ".?!"):
            text = text[: found.start()]
        elif (counter := re.match(r"(\d{1,3}) / (\d{1,3})(?!\d)", text)) and int(counter[1]) <= int(counter[2]):
            text = text[counter.end() :]
        elif (found := re.match(r"(\d{1,3})/(\d{1,3})(?!\d)", text)) and is_page(found, text[found.end() :][:1], ""):
            text = text[found.end() :]
        elif (notice := re.match(r"~{1,9}([^~\n]+)~{1,9}", text)) and "Bing" in notice[1] and "ChatGPT" in notice[1]:
            text = text[notice.end() :]
    return re.split(r"(?<!\d)1 / 1(?!\d)", text)[-1].strip()


def test_cleaning_is_that_of_the_plain_rules() -> None:
    pieces = [
        "1 / 1",
        "2 / 3",
        " / ",
        "2/2",
        "2/3",
        "3/2",
        "/",
        ".",
        "1",
        "333",
        " ",
        "\n",
        "\x1f",
        "x",
        "²",
        "٣",
        "_",
        "Share Prompt",
        "Translate now",
    ]
    pieces += ["지금 번역하기", "Language: ", "Language:", "English", "한국어", "Chinese (Traditional)"]
    pieces += ["~", "~Bing, not ChatGPT~"]
    rng = random.Random(4)
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        assert formats.clean_web_text(text) == plain_clean(text)


@pytest.mark.parametrize(
    "piece",
    [
        "1 / 1",
        "1/1",
        "1/1 ",
        "~Bing ChatGPT",
        "~",
        "1",
        " ",
        "1 / ",
        "Language: ",
        "Language: x",
        "Share Prompt",
        "\n",
        "x",
    ],
)
def test_cleaning_takes_time_in_proportion_to_the_text(piece: str) -> None:
    for before, after in (("x", "x"), ("", ""), ("", "x" * 100_000), ("x" * 100_000, "")):
        formats.clean_web_text(before + piece * 20_000 + after)  # minutes, if it were quadratic


# Draws


def draw(found: Sequence[Prompt], limit: int | None, seed: int = 0, **more: Any) -> list[Prompt]:
    options: dict[str, Any] = {"reject": prompts.keep_all, "taken": set(), "counts": Counter(), **more}
    return prompts.draw_prompts(found, name="it", limit=limit, seed=seed, **options)


MANY = [Prompt(f"question {number % 4000}", family="ab"[number % 2]) for number in range(5000)]


def test_a_draw_does_not_depend_on_the_order_of_rows() -> None:
    found = draw(MANY, 300)
    shuffled = MANY.copy()
    random.Random(3).shuffle(shuffled)
    assert set(draw(shuffled, 300)) == set(found)
    assert Counter(prompt.family for prompt in found) == {"a": 300, "b": 300}
    assert len(set(found)) == 600
    assert sorted(found, key=MANY.index) == found


def test_a_draw_depends_on_seed_and_is_even() -> None:
    overlap = len(set(draw(MANY, 300, seed=1)) & set(draw(MANY, 300, seed=2)))
    assert 0.5 * 90 < overlap < 1.5 * 90  # two draws of 600 of 4000 share 600 * 600 / 4000 on average
    first_half = sum(int(prompt.instruction.split()[1]) < 2000 for prompt in draw(MANY, 300))
    assert 250 < first_half < 350


def test_a_draw_under_the_limit_takes_all_distinct() -> None:
    for limit in (None, 2000, 5000):
        counts: Counter[str] = Counter()
        assert len(draw(MANY, limit, counts=counts)) == 4000
        assert counts["duplicate"] == 1000
        assert counts["over the limit"] == 0


def test_rejected_texts_take_no_place_in_a_draw_and_are_counted() -> None:
    def odd(texts: Sequence[str]) -> list[str | None]:
        return ["odd" if int(text.split()[1]) % 2 else None for text in texts]

    found = [Prompt(f"question {number}") for number in range(5000)]
    counts: Counter[str] = Counter()
    kept = draw(found, 1000, reject=odd, counts=counts)
    assert len(kept) == 1000
    assert not any(odd([prompt.text])[0] for prompt in kept)
    assert len(kept) + sum(counts.values()) == 5000
    assert set(kept) == set(draw([prompt for prompt in found if not odd([prompt.text])[0]], 1000))


def test_a_text_in_two_families_or_sources_is_kept_once() -> None:
    twice = [Prompt("same", family="b"), Prompt("same", family="a"), Prompt("other", family="b")]
    for order in (twice, twice[::-1]):
        assert {(p.instruction, p.family) for p in draw(order, 5)} == {("same", "a"), ("other", "b")}
    taken: set[str] = set()
    draw(twice[:1], None, taken=taken)
    assert [prompt.instruction for prompt in draw(twice, None, taken=taken)] == ["other"]


# Tables


def test_the_id_of_a_prompt_depends_on_its_source_and_text_only(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": ""}, {"instruction": "b", "input": "c"}, {"instruction": "b\n\nc"}]
    path = write_json(tmp_path / "a.json", rows)
    other = write_json(tmp_path / "b.json", [{"instruction": "z"}, *reversed(rows[:2])])
    table, counts = prompts.collect_prompts(settings(path, "prompts"))
    assert dict(table.schema) == PROMPTS.schema
    assert counts == {"it: rows": 3, "it: duplicate": 1, "it: kept": 2}
    again, _ = prompts.collect_prompts(settings(other, "prompts"))
    assert set(table.rows()) < set(again.rows())
    assert table["prompt_id"].n_unique() == 2
    renamed, _ = prompts.collect_prompts(
        Prompts.model_validate({"sources": {"x": {"format": "prompts", "path": str(path)}}})
    )
    assert not set(table["prompt_id"]) & set(renamed["prompt_id"])


def test_our_own_table_can_be_a_source(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"instruction": "a", "input": "b"}, {"instruction": "c"}])
    table, _ = prompts.collect_prompts(settings(path, "prompts"))
    table.write_parquet(tmp_path / "a.parquet")
    again, _ = prompts.collect_prompts(settings(tmp_path / "a.parquet", "prompts"))
    assert again.equals(table)


def word_tokenizer() -> Any:
    """A tokenizer with one token per word, and one in front."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


def test_the_rl_table_has_type_and_bonus_and_keeps_the_limits(tmp_path: Path) -> None:
    plain = [{"instruction": "word " * number} for number in range(1, 7)]
    own = [{"instruction": "a b", "question_type": 1, "length_bonus": 0.25}, {"instruction": "c d", "input": "e f g h"}]
    raw = {
        "min_tokens": 3,  # the one in front counts
        "max_tokens": 6,
        "sources": {
            "plain": {"format": "prompts", "path": str(write_json(tmp_path / "p.json", plain))},
            "own": {
                "format": "prompts",
                "path": str(write_json(tmp_path / "o.json", own)),
                "question_type": "red_teaming",
            },
        },
    }
    table, counts = prompts.collect_rl_prompts(RlPrompts.model_validate(raw), word_tokenizer())
    assert dict(table.schema) == RL_PROMPTS.schema
    assert table.select("source", "question_type", "length_bonus").rows() == [
        *[("plain", "general", 1.0)] * 4,
        ("own", "reasoning", 0.25),
    ]
    assert counts["plain: fewer than 3 tokens"] == counts["plain: more than 6 tokens"] == 1
    assert counts["own: more than 6 tokens"] == 1
    with pytest.raises(ValueError, match="no factor for reasoning, red_teaming"):
        RlPrompts.model_validate(raw | {"length_bonus": {"general": 1.0}})


COUNTED = {
    "oasst1": DATA / "oasst1",
    "hh_rlhf": DATA / "hh-rlhf",
    "dolly": DATA / "databricks-dolly-15k",
    "math": DATA / "MATH",
    "gsm8k": DATA / "gsm8k",
    "sharegpt": synthetic.sharegpt,
    "openorca": synthetic.openorca,
    "prompts": lambda: [{"instruction": text} for text in ("a b", "a b", " ", "c d", "e", "f g")],
}


@pytest.mark.parametrize("kind", list(PROMPT_FORMATS))
@pytest.mark.parametrize("limit", [None, 3])
def test_the_counts_add_up_to_the_rows_read(tmp_path: Path, kind: str, limit: int | None) -> None:
    origin = COUNTED[kind]
    folder = origin if isinstance(origin, Path) else tmp_path / "in"
    if callable(origin):
        folder.mkdir()
        write_json(folder / "rows.json", origin())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"else": 1}\n[]\n{')
    sources = {
        name: {"format": kind, "path": [str(folder), str(bad)], "limit": limit, "max_bad_rows": 3}
        for name in ("a", "b")
    }
    raw = {"sources": sources, "max_tokens": 40}
    table, counts = prompts.collect_rl_prompts(RlPrompts.model_validate(raw), word_tokenizer())
    for name in ("a", "b"):
        here = {what.partition(": ")[2]: number for what, number in counts.items() if what.startswith(f"{name}: ")}
        assert here.pop("rows") == sum(here.values()) > here["bad rows"] == 3
        assert min(here.values()) >= 0
        assert here["kept"] == (table["source"] == name).sum()


# Real data, and made-up data where no licence lets us ship real ones


def test_real_oasst1(tmp_path: Path) -> None:
    file = DATA / "oasst1" / "validation_sample.parquet"
    rows = pl.read_parquet(file).to_dicts()
    roots = [
        row["text"].strip()
        for row in rows
        if row["parent_id"] is None and any(other["parent_id"] == row["message_id"] for other in rows)
    ]
    table, counts = prompts.collect_prompts(settings(file, "oasst1"))
    assert len(roots) > 100
    assert table["instruction"].to_list() == list(dict.fromkeys(roots))
    assert counts["it: rows"] == len(rows)
    lines = tmp_path / "sample.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert prompts.collect_prompts(settings(lines, "oasst1"))[0].equals(table)
    shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="message_id occurs twice"):
        prompts.collect_prompts(settings(tmp_path, "oasst1"))  # the folder has the same messages in two files


def test_synthetic_sharegpt(tmp_path: Path) -> None:
    rows = synthetic.sharegpt()
    talks = [row["conversations"] for row in rows]
    first = [talk[0]["value"] for talk in talks if len(talk) > 1 and talk[0]["from"] == "human"]
    table, counts = prompts.collect_prompts(settings(write_json(tmp_path / "sg.json", rows), "sharegpt"))
    assert len(first) - 20 < len(table) <= len(set(first))
    typed = [row["typed"] for row in rows if row["typed"]]
    assert table["instruction"].to_list() == list(dict.fromkeys(typed))
    assert counts == {
        "it: rows": len(rows),
        "it: fewer than two turns": sum(len(talk) < 2 for talk in talks),
        "it: no human turn first": sum(len(talk) > 1 and talk[0]["from"] == "gpt" for talk in talks),
        "it: a system turn first": sum(len(talk) > 1 and talk[0]["from"] == "system" for talk in talks),
        "it: empty": len(first) - len(typed),
        "it: duplicate": len(typed) - len(set(typed)),
        "it: kept": len(set(typed)),
    }
    assert min(counts.values()) > 0
    assert any(text.endswith(("1 / 1", "Share Prompt", "지금 번역하기")) for text in first)
    assert not any(text.endswith(("1 / 1", "Share Prompt", "지금 번역하기")) for text in table["instruction"])
    untouched = {
        text.strip() for text in first if not re.search(r"\d ?/ ?\d|Prompt|번역|Translate|Language|Bing", text)
    }
    assert untouched
    assert untouched <= {*table["instruction"], ""}


def test_real_dolly_and_math() -> None:
    folder = DATA / "databricks-dolly-15k"
    rows = read_lines(folder / "sample.jsonl.gz")
    wanted = ("creative_writing", "brainstorming", "open_qa", "general_qa", "classification")
    asked = {row["instruction"].strip() for row in rows if row["category"] in wanted}
    assert 0 < len(asked) < len(rows)
    assert set(prompts.collect_prompts(settings(folder, "dolly"))[0]["instruction"]) == asked
    problems = {row["problem"].strip() for row in read_lines(DATA / "MATH" / "test_sample.jsonl.gz")}
    table, _ = prompts.collect_prompts(settings(DATA / "MATH", "math", limit=len(problems) // 2))
    assert len(table) == len(set(table["instruction"]) & problems) == len(problems) // 2


def test_synthetic_questions_of_openorca() -> None:
    rows = synthetic.openorca()
    found, counts = extract("openorca", rows)
    families = [row["id"].partition(".")[0] for row in rows]
    expected = [(family, row["question"]) for family, row in zip(families, rows, strict=True) if row["kept"]]
    assert [(prompt.family, prompt.instruction) for prompt in found] == expected
    assert len(found) + sum(counts.values()) == len(rows)
    assert counts["other family"] == families.count("dialog")
    assert 0 < counts["NLI"] < len(rows) // 5


def test_real_hh_rlhf() -> None:
    folder = DATA / "hh-rlhf"
    rows = read_lines(folder / "helpful_test_sample.jsonl.gz")
    turns = [re.split("\n\n(?:Human|Assistant):", row["chosen"])[1].strip() for row in rows]
    table, _ = prompts.collect_prompts(settings(folder, "hh_rlhf"))
    assert len(set(turns)) < len(turns)
    assert table["instruction"].to_list() == list(dict.fromkeys(turns))


# Scripts


def run(name: str, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "workflow_scripts" / f"{name}.py"
    command = [sys.executable, str(script), "--output", str(output), *options]
    return forks.run(command)


def test_the_script_writes_table_and_manifest(tmp_path: Path) -> None:
    rows = [message("root", None, "a secret question"), message("reply", "root")]
    path = write_json(tmp_path / "in.json", rows)
    output = tmp_path / "out" / "prompts.parquet"
    done = run("clean_prompts", output, "--prompts", settings(path, "oasst1").model_dump_json())
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert pl.read_parquet(output)["instruction"].to_list() == ["a secret question"]
    manifest = json.loads((tmp_path / "out" / "prompts.manifest.json").read_text())
    assert manifest["counts"] == {"it: rows": 2, "it: no root of a tree": 1, "it: kept": 1}
    assert list(manifest["inputs"]) == [str(path)]
    assert manifest["settings"]["prompts"]["seed"] == 42
    assert sorted(file.name for file in output.parent.iterdir()) == ["prompts.manifest.json", "prompts.parquet"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"instruction": "secret"}, {"instruction": ', "in.json: broken JSON"),
        ('[{"question": "secret"}]', "column instruction is missing"),
        ('[{"instruction": " "}]', "no prompt is left"),
        ("[]", "holds no rows"),
    ],
)
def test_the_script_fails_on_bad_input_and_leaves_nothing(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(content)
    done = run("clean_prompts", tmp_path / "out.parquet", "--prompts", settings(path, "prompts").model_dump_json())
    assert done.returncode == 1
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["in.json"]


def test_the_rl_script_counts_tokens_with_the_models_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    texts = [" ".join(["planet"] * number) for number in range(1, 40)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = {text: len(tokenizer(text)["input_ids"]) for text in texts}
    path = write_json(tmp_path / "in.json", [{"instruction": text} for text in texts])
    raw = {"max_tokens": 60, "min_tokens": 10, "sources": {"it": {"format": "prompts", "path": str(path)}}}
    output = tmp_path / "out.parquet"
    done = run("clean_rl_prompts", output, "--rl-prompts", json.dumps(raw), "--model.base", str(tiny_model))
    assert done.returncode == 0, done.stderr
    kept = pl.read_parquet(output)["instruction"].to_list()
    assert kept == [text for text in texts if 10 <= lengths[text] <= 60]
    assert 0 < len(kept) < len(texts)
    inputs = json.loads((tmp_path / "out.manifest.json").read_text())["inputs"]
    assert set(inputs) == {str(path), str(tiny_model)}

    output.unlink()
    done = run("clean_rl_prompts", output, "--rl-prompts", json.dumps(raw), "--model.base", str(tmp_path / "no"))
    assert done.returncode == 1
    assert "does not exist (model.base)" in done.stderr
    assert not output.exists()
