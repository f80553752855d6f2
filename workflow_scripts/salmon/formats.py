r"""The upstream schemas of public data sets, and how to get prompts, examples or comparisons from their rows.

A format is one entry here: a `TypedDict` of the columns that it needs, and a function that takes one such row, under
`@prompts_from("NAME")`, `@examples_from("NAME")` or `@comparisons_from("NAME")`. The function's annotation gives the
schema, the configuration accepts every registered name, and docs/configuration.md lists them. A function returns its
result, or `Skipped` with the reason why the row gives none; reasons are counted (reference: steps 1 to 3).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypeVar, get_args, get_type_hints

from pydantic import FiniteFloat
from typing_extensions import TypedDict, is_typeddict

from salmon.border import Number
from salmon.errors import UserError
from salmon.text import join_instruction

QuestionType = Literal["general", "reasoning", "red_teaming"]
QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)  # 0, 1, 2 in the authors' files
DOLLY_CATEGORIES = ("creative_writing", "brainstorming", "open_qa", "general_qa", "classification")
OPENORCA_FAMILIES = ("niv", "flan", "t0", "cot")
HUMANS, ASSISTANTS = ("human", "user"), ("gpt", "chatgpt", "assistant")  # names of the speakers in shared conversations
HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"
SELF_ALIGN_END = "\n### User"

_NLI = ("premise", "Premise", "hypothesis", "Hypothesis", "it is not possible to tell")
_COUNTER_AT_END = re.compile(r"(\d{1,3}) / (\d{1,3})$")
_COUNTER_AT_START = re.compile(r"(\d{1,3}) / (\d{1,3})(?!\d)")
_BARE_AT_END = re.compile(r"(\d{1,3})/(\d{1,3})$")
_BARE_AT_START = re.compile(r"(\d{1,3})/(\d{1,3})(?!\d)")
_COUNTER_LENGTH = len("999 / 999")
_FIRST_OF_ONE = re.compile(r"(?<!\d)1 / 1(?!\d)")
_LABELS = ("Share Prompt", "Translate now")
_LAST_LABEL = "지금 번역하기"  # "translate now"; the text after it also belongs to the page
_LANGUAGE_LABELS = ("Language: ", "Language:")  # precede the name of a language
_LANGUAGES = ("Chinese (Traditional)", "Chinese (Simplified)")  # names that are not letters only
# With this, an extension says that the conversation is with Bing, not with ChatGPT.
_BING = re.compile(r"~{1,9}(?=[^~\n]{0,300}Bing)(?=[^~\n]{0,300}ChatGPT)[^~\n]{1,300}~{1,9}")


class Prompt(NamedTuple):
    """A prompt; type and bonus if the row states them."""

    instruction: str
    input: str = ""
    family: str = ""  # a limit applies to each family of a source
    question_type: QuestionType | None = None
    length_bonus: float | None = None

    @property
    def text(self) -> str:
        """The text that the policy reads. Prompts with equal texts are duplicates."""
        return join_instruction(self.instruction, self.input)


class Example(NamedTuple):
    """An instruction with an answer to learn."""

    instruction: str
    input: str
    output: str
    is_whole: bool = True  # whether the answer is complete; otherwise it was cut off
    family: str = ""

    @property
    def text(self) -> str:
        """Examples with equal keys are duplicates."""
        return f"{join_instruction(self.instruction, self.input)}\0{self.output}"


class Comparison(NamedTuple):
    """Two answers to a query, one preferred by a person; with the strength and the subset of the source, if known."""

    query: str
    preferred: str
    other: str
    score_ratio: float | None = None
    subset: str | None = None


class Skipped(str):
    """The reason why a row gives nothing."""

    __slots__ = ()


Located = tuple[str, Any]
"""A row's location, for messages; and the row."""
Row = TypeVar("Row")
Found = TypeVar("Found", Prompt, Example)


@dataclass(frozen=True)
class PromptFormat:
    """A schema that gives prompts.

    Attributes:
        row: a `TypedDict`; other columns are left out.
        extract: returns the prompts of a data set's rows; omitted rows are counted by reason.
    """

    row: Any
    extract: Callable[[Iterable[Located], Counter[str]], Iterator[Prompt]]


@dataclass(frozen=True)
class ExampleFormat:
    """A schema of instructions with answers; otherwise like `PromptFormat`."""

    row: Any
    extract: Callable[[Iterable[Located], Counter[str]], Iterator[Example]]


@dataclass(frozen=True)
class PairFormat:
    """A schema of human preferences: `row` as in `PromptFormat`; `compare` takes one row."""

    row: Any
    compare: Callable[[Any], Comparison | Skipped]


PROMPT_FORMATS: dict[str, PromptFormat] = {}
EXAMPLE_FORMATS: dict[str, ExampleFormat] = {}
PAIR_FORMATS: dict[str, PairFormat] = {}


def prompts_from(name: str) -> Callable[[Callable[[Row], Prompt | Skipped]], Callable[[Row], Prompt | Skipped]]:
    """Register a function of one row as a prompt format."""

    def register(function: Callable[[Row], Prompt | Skipped]) -> Callable[[Row], Prompt | Skipped]:
        _add(PROMPT_FORMATS, name, PromptFormat(_schema(function), _each(function)))
        return function

    return register


def examples_from(name: str) -> Callable[[Callable[[Row], Example | Skipped]], Callable[[Row], Example | Skipped]]:
    """Register a function of one row as a format for instructions with answers."""

    def register(function: Callable[[Row], Example | Skipped]) -> Callable[[Row], Example | Skipped]:
        _add(EXAMPLE_FORMATS, name, ExampleFormat(_schema(function), _each(function)))
        return function

    return register


def _each(
    function: Callable[[Any], Found | Skipped],
) -> Callable[[Iterable[Located], Counter[str]], Iterator[Found]]:
    """The results of a function for all rows; omitted rows are counted by reason."""

    def extract(rows: Iterable[Located], counts: Counter[str]) -> Iterator[Found]:
        for _, row in rows:
            found = function(row)
            if isinstance(found, Skipped):
                counts[found] += 1
            else:
                yield found

    return extract


def comparisons_from(
    name: str,
) -> Callable[[Callable[[Row], Comparison | Skipped]], Callable[[Row], Comparison | Skipped]]:
    """Register a function of one row as a format for human preferences."""

    def register(function: Callable[[Row], Comparison | Skipped]) -> Callable[[Row], Comparison | Skipped]:
        _add(PAIR_FORMATS, name, PairFormat(_schema(function), function))
        return function

    return register


def _schema(function: Callable[..., Any]) -> Any:
    """The `TypedDict` that annotates a function's `row`."""
    schema = get_type_hints(function).get("row")
    if not is_typeddict(schema):
        raise TypeError(f"{function.__name__}: annotate its parameter `row` with the TypedDict of the columns it needs")
    return schema


def _add(formats: dict[str, Any], name: str, entry: Any) -> None:
    """Put an entry into a register, once."""
    if name in formats:
        raise TypeError(f"format {name} is registered twice")
    formats[name] = entry


# ---- The formats. A text may be null if its row is then omitted and counted; a deciding column may not. ----


class Oasst1Row(TypedDict):
    """One message of a tree (`OpenAssistant/oasst1`); a root has no parent, and spam a negative review result."""

    message_id: str
    parent_id: str | None
    text: str | None
    deleted: NotRequired[bool | None]
    review_result: NotRequired[bool | None]


def oasst1_prompts(rows: Iterable[tuple[str, Oasst1Row]], counts: Counter[str]) -> Iterator[Prompt]:
    """Root messages that have at least one reply, in the order in which they appear; see `_oasst1_roots`."""
    return (Prompt(text) for _, text in _oasst1_roots(rows, counts))


def _oasst1_roots(rows: Iterable[tuple[str, Oasst1Row]], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Id and text of root messages that have at least one reply, in the order in which they appear.

    Deleted messages and spam do not count as messages, as in upstream's own exports: they neither ask nor reply. (The
    hub's table has some of them, although its trees are those that were ready for export.)

    Replies may precede their root, and messages may have an absent parent. Memory holds the roots and the ids of all
    messages.

    Raises:
        UserError: if two messages have the same id.
    """
    roots: dict[str, str] = {}
    ids: set[str] = set()
    parents: set[str] = set()
    for place, row in rows:
        if row["message_id"] in ids:
            raise UserError(f"{place}: message_id occurs twice; remove one of the files or rows with it")
        ids.add(row["message_id"])
        if row.get("deleted"):
            counts["deleted"] += 1
        elif row.get("review_result") is False:
            counts["spam"] += 1
        elif row["parent_id"]:
            parents.add(row["parent_id"])
            counts["no root of a tree"] += 1
        else:
            roots[row["message_id"]] = row["text"] or ""
    for root, text in roots.items():
        if root in parents:
            yield root, text
        else:
            counts["root without a reply"] += 1


# The only schema in which a prompt or an answer depends on other rows.
_add(PROMPT_FORMATS, "oasst1", PromptFormat(Oasst1Row, oasst1_prompts))


class Oasst1AnswerRow(Oasst1Row):
    """The same with a reply's rank among its siblings, from 0 (best); null if people did not rank them."""

    rank: int | None


def oasst1_examples(rows: Iterable[tuple[str, Oasst1AnswerRow]], counts: Counter[str]) -> Iterator[Example]:
    """Root messages with their reply of rank 0, in the order in which the roots appear.

    The same messages count as for `oasst1_prompts`. Memory holds the roots and the replies of rank 0.

    Raises:
        UserError: if two messages have the same id.
    """
    best: dict[str, str] = {}

    def ranked() -> Iterator[tuple[str, Oasst1AnswerRow]]:
        for place, row in rows:
            if (
                row["parent_id"]
                and row["rank"] == 0
                and not row.get("deleted")
                and row.get("review_result") is not False
            ):
                best[row["parent_id"]] = row["text"] or ""
            yield place, row

    for root, text in _oasst1_roots(ranked(), counts):  # yields after reading all rows
        if root in best:
            yield Example(text, "", best[root])
        else:
            counts["no reply of rank 0"] += 1


_add(EXAMPLE_FORMATS, "oasst1", ExampleFormat(Oasst1AnswerRow, oasst1_examples))


class ShpRow(TypedDict):
    """Two answers to a post (`stanfordnlp/SHP`); label 1: A is preferred."""

    history: str | None
    human_ref_A: str | None
    human_ref_B: str | None
    labels: Literal[0, 1]
    score_ratio: FiniteFloat


@comparisons_from("shp")
def shp_comparison(row: ShpRow) -> Comparison | Skipped:
    """Two answers to a post."""
    a, b = row["human_ref_A"] or "", row["human_ref_B"] or ""
    preferred, other = (a, b) if row["labels"] == 1 else (b, a)
    return Comparison(row["history"] or "", preferred, other, row["score_ratio"])


class HhRlhfRow(TypedDict):
    """Two dialogues with a common beginning (`Anthropic/hh-rlhf`)."""

    chosen: str | None
    rejected: str | None


class PairRow(TypedDict):
    """Two outputs with a preference: the authors' PMP data, AlpacaFarm's human preferences, or your own."""

    instruction: str | None
    input: NotRequired[str | None]
    output_1: str | None
    output_2: str | None
    preference: Literal[1, 2]
    score: NotRequired[FiniteFloat | None]


@comparisons_from("pairs")
def written_pair(row: PairRow) -> Comparison | Skipped:
    """A row of a file of pairs, with the score ratio if it has one (as the authors' SHP rows do)."""
    outputs = row["output_1"] or "", row["output_2"] or ""
    preferred, other = outputs if row["preference"] == 1 else outputs[::-1]
    query = join_instruction(row["instruction"] or "", row.get("input") or "")
    return Comparison(query, preferred, other, row.get("score"))


@comparisons_from("hh_rlhf")
def hh_rlhf_comparison(row: HhRlhfRow) -> Comparison | Skipped:
    r"""Split two dialogues at their last common "\n\nAssistant:" into the query and the two answers.

    The query keeps the names of the speakers. If one dialogue is the beginning of the other, the same rule holds: the
    assistant's turn that one ends and the other continues begins after the query. An empty human turn neither ends an
    answer nor asks for one.
    """
    preferred, other = row["chosen"] or "", row["rejected"] or ""
    shared = os.path.commonprefix([preferred, other])  # noqa: RUF071 (character by character is what we want)
    query, marker, _ = shared.rpartition(ASSISTANT_TURN)
    if not marker:
        return Skipped("no assistant turn in common")
    if query.rstrip().endswith(HUMAN_TURN):
        return Skipped("empty human turn")
    start = len(query) + len(marker)
    return Comparison(query, _without_empty_turn(preferred[start:]), _without_empty_turn(other[start:]))


def _without_empty_turn(answer: str) -> str:
    """An answer without the empty human turns at its end."""
    while (end := answer.rstrip()).endswith(HUMAN_TURN):
        answer = end.removesuffix(HUMAN_TURN)
    return answer


class RewardBenchRow(TypedDict):
    """An answer to a prompt that is better than another one (`allenai/reward-bench`)."""

    prompt: str | None
    chosen: str | None
    rejected: str | None
    subset: NotRequired[str | None]


@comparisons_from("rewardbench")
def rewardbench_comparison(row: RewardBenchRow) -> Comparison | Skipped:
    """A row of RewardBench, or of another data set with these columns."""
    outputs = row["chosen"] or "", row["rejected"] or ""
    return Comparison(row["prompt"] or "", *outputs, subset=row.get("subset") or None)


class HhhRow(TypedDict):
    """A question and its two answers, as keys of their scores (BIG-bench, `hhh_alignment`)."""

    input: str | None
    target_scores: dict[str, Literal[0, 1]]


@comparisons_from("hhh")
def hhh_comparison(row: HhhRow) -> Comparison | Skipped:
    """An example of the Helpful, Honest and Harmless evaluation, if exactly one of two answers is right."""
    scores = row["target_scores"]
    if sorted(scores.values()) != [0, 1]:
        return Skipped("not one right answer of two")
    preferred, other = sorted(scores, key=lambda answer: -scores[answer])
    return Comparison(row["input"] or "", preferred, other)


@prompts_from("hh_rlhf")
def hh_rlhf_prompt(row: HhRlhfRow) -> Prompt | Skipped:
    """The first human turn of the dialogue, which both sides share."""
    turn = first_turn(row["chosen"] or "")
    return Skipped("no human turn first") if turn is None else Prompt(turn)


def first_turn(dialogue: str) -> str | None:
    r"""The first human turn of a dialogue in HH-RLHF's format; None if the dialogue does not begin with one."""
    before, marker, after = dialogue.partition(HUMAN_TURN)
    return None if before or not marker else after.partition(ASSISTANT_TURN)[0].partition(HUMAN_TURN)[0]


class OpenOrcaRow(TypedDict):
    """A question of FLAN (`Open-Orca/OpenOrca`); its id begins with the family's name."""

    id: str
    question: str | None


@prompts_from("openorca")
def openorca_prompt(row: OpenOrcaRow) -> Prompt | Skipped:
    """The question, if it is from one of the four families and not natural language inference."""
    family = row["id"].partition(".")[0]
    if family not in OPENORCA_FAMILIES:
        return Skipped("other family")
    question = row["question"] or ""
    return Skipped("NLI") if is_nli(question) else Prompt(question, family=family)


def is_nli(question: str) -> bool:
    """Whether a question is a task of natural language inference (reference: step 3)."""
    return any(word in question for word in _NLI)


# A turn of a conversation; `zetavg/ShareGPT-Processed` also has the text as Markdown.
ShareGptTurn = TypedDict("ShareGptTurn", {"from": str, "value": str | None, "markdown": NotRequired[str | None]})


class ShareGptRow(TypedDict):
    """A conversation (`zetavg/ShareGPT-Processed`, the sg_90k files)."""

    conversations: list[ShareGptTurn]


@prompts_from("sharegpt")
def sharegpt_prompt(row: ShareGptRow) -> Prompt | Skipped:
    """The first turn, if human, of a conversation with at least two turns, without the web page's additions."""
    turns = row["conversations"]
    if len(turns) < 2:
        return Skipped("fewer than two turns")
    if turns[0]["from"] not in HUMANS:
        # A prompt after system instructions may not make sense without them.
        return Skipped("a system turn first" if turns[0]["from"] == "system" else "no human turn first")
    return Prompt(clean_web_text(_said(turns[0])))


@examples_from("sharegpt")
def sharegpt_example(row: ShareGptRow) -> Example | Skipped:
    """The first turn as a prompt, and the assistant's answer to it; later turns refer to earlier ones."""
    prompt = sharegpt_prompt(row)
    if isinstance(prompt, Skipped):
        return prompt
    answer = row["conversations"][1]
    if answer["from"] not in ASSISTANTS:
        return Skipped("no assistant turn second")
    return Example(prompt.instruction, "", _said(answer))


def _said(turn: ShareGptTurn) -> str:
    """Text of a turn."""
    return turn.get("markdown") or turn["value"] or ""


def clean_web_text(text: str) -> str:
    """A prompt as it was typed, without the additions of a scraped chat page (reference: step 3, "Cleaning").

    Removed at the end: page counters `n / m` with n <= m, and labels of the page and its extensions, one of them with
    all following text. Removed at the start: page counters, everything up to a counter `1 / 1`, and a sentence in
    tildes that names Bing and ChatGPT. Counters without blanks may be fractions or dates: see `_is_page`.
    """
    text = text.partition(_LAST_LABEL)[0]
    start, end = 0, len(text)  # the remaining part; slicing at every step would take quadratic time
    unlabelled = -1  # the end position at which no label was found
    previous = None
    while (start, end) != previous:
        previous = start, end
        start, end = _strip(text, start, end)
        if end != unlabelled:
            label = _label_length(text, start, end)
            start, end = _strip(text, start, end - label)
            unlabelled = -1 if label else end
        if (place := _counter_at_end(text, start, end)) is not None:
            end = place
        elif (place := _counter_at_start(text, start, end)) is not None:
            start = place
        elif notice := _BING.match(text, start, end):
            start = notice.end()
    *_, text = _FIRST_OF_ONE.split(text[start:end])
    return text.strip()


def _counter_at_end(text: str, start: int, end: int) -> int | None:
    """Start of the page counter at the end of a part of a text; None if there is none."""
    last = max(start, end - _COUNTER_LENGTH)
    if (counter := _COUNTER_AT_END.search(text[last:end])) and (page := _page(counter)):
        return last + counter.end(1) - len(page)
    if counter := _BARE_AT_END.search(text[last:end]):
        place = last + counter.start()
        if _is_page(counter, text[max(start, place - 1) : place], ".?!"):
            return place
    return None


def _counter_at_start(text: str, start: int, end: int) -> int | None:
    """End of the page counter at the start of a part of a text; None if there is none."""
    if (counter := _COUNTER_AT_START.match(text, start, end)) and int(counter[1]) <= int(counter[2]):
        return counter.end()
    counter = _BARE_AT_START.match(text, start, end)
    if counter and _is_page(counter, text[counter.end() : min(end, counter.end() + 1)]):
        return counter.end()
    return None


def _is_page(counter: re.Match[str], beside: str, marks: str = "") -> bool:
    """Whether `n/m` is a page counter, not a fraction or a date in the text.

    It is a counter if n <= m and it is on a separate line, or a letter or a mark of `marks` touches it, because the
    page put it there. With a blank between it and the text (`about 9/11`, `3/4 of it`), it is a counter only if n = m.
    """
    number, of = int(counter[1]), int(counter[2])
    if beside.isspace() and beside not in "\r\n":
        return number == of
    return number <= of and (beside in f"\r\n{marks}" or beside.isalpha())


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """Start and end of a part of a text, without surrounding white space."""
    while start < end and text[end - 1].isspace():
        end -= 1
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _label_length(text: str, start: int, end: int) -> int:
    """Length of the page label at the end of a part of a text; 0 if there is none."""
    for label in _LABELS:
        if text.endswith(label, start, end):
            return len(label)
    name = end - next((len(name) for name in _LANGUAGES if text.endswith(name, start, end)), 0)
    if name == end:
        while name > start and text[name - 1].isalnum() and not text[name - 1].isdecimal():
            name -= 1
    label = next((label for label in _LANGUAGE_LABELS if name < end and text.endswith(label, start, name)), "")
    return end - name + len(label) if label else 0


def _page(counter: re.Match[str]) -> str:
    """The digits of a counter's first number, which may touch digits of the text: as many as satisfy n <= m."""
    digits = counter[1]
    return next((digits[start:] for start in range(len(digits)) if int(digits[start:]) <= int(counter[2])), "")


class DollyRow(TypedDict):
    """An instruction (`databricks/databricks-dolly-15k`)."""

    instruction: str | None
    context: str | None
    category: str


@prompts_from("dolly")
def dolly_prompt(row: DollyRow) -> Prompt | Skipped:
    """The instruction, if its category needs no context."""
    if row["category"] not in DOLLY_CATEGORIES:
        return Skipped("other category")
    return Skipped("with context") if (row["context"] or "").strip() else Prompt(row["instruction"] or "")


class DollyAnswerRow(TypedDict):
    """The same instructions, with their answers."""

    instruction: str | None
    context: str | None
    response: str | None


@examples_from("dolly")
def dolly_example(row: DollyAnswerRow) -> Example:
    """Instruction, context and answer, from all categories."""
    return Example(row["instruction"] or "", row["context"] or "", row["response"] or "")


class MathRow(TypedDict):
    """A problem of MATH (`hendrycks/competition_math`)."""

    problem: str | None


@prompts_from("math")
def math_prompt(row: MathRow) -> Prompt | Skipped:
    """The problem."""
    return Prompt(row["problem"] or "")


class Gsm8kRow(TypedDict):
    """A word problem (`openai/gsm8k`)."""

    question: str | None


@prompts_from("gsm8k")
def gsm8k_prompt(row: Gsm8kRow) -> Prompt | Skipped:
    """The problem."""
    return Prompt(row["question"] or "")


class PromptRow(TypedDict):
    """A prompt in the authors' format, whose question types are numbers, or in ours."""

    instruction: str | None
    input: NotRequired[str | None]
    question_type: NotRequired[Literal[0, 1, 2] | QuestionType | None]
    length_bonus: NotRequired[Number | None]


@prompts_from("prompts")
def written_prompt(row: PromptRow) -> Prompt | Skipped:
    """A row of a prompt file (the authors' or ours), with type and bonus if it has them."""
    kind = row.get("question_type")
    return Prompt(
        row["instruction"] or "",
        row.get("input") or "",
        question_type=QUESTION_TYPES[kind] if isinstance(kind, int) else kind,
        length_bonus=row.get("length_bonus"),
    )


class InstructionRow(TypedDict):
    """An instruction and its answer, in the columns that Alpaca and many other data sets have."""

    instruction: str | None
    input: NotRequired[str | None]
    output: str | None


@examples_from("instructions")
def written_example(row: InstructionRow) -> Example:
    """A row of an instruction file."""
    return Example(row["instruction"] or "", row.get("input") or "", row["output"] or "")


@examples_from("self_align")
def self_align_example(row: InstructionRow) -> Example:
    """A row of the authors' data (`zhiqings/dromedary-2-70b-v2`), whose answers end with the user's turn marker.

    An answer without the marker was cut off at the sampling limit: its text is learnt, but not an end.
    """
    answer = (row["output"] or "").rstrip()
    return Example(
        row["instruction"] or "",
        row.get("input") or "",
        answer.removesuffix(SELF_ALIGN_END),
        is_whole=answer.endswith(SELF_ALIGN_END),
    )
