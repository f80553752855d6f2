"""What the page of the playground does, and how it looks."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import gradio as gr
import torch

from playground import tables
from playground.results import Policy
from playground.workbench import Workbench, decode
from salmon.border import reason
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple

log = logging.getLogger(__name__)

OWN = "my own principle"
MOST = 1024  # tokens of an answer that can be asked for
A_ROW = 3  # answers beside each other
NOTHING_YET = "Ask something, or type an answer: its rewards appear here."


def sentence_of(error: BaseException) -> str:
    """What went wrong, for the page."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "There is not enough memory for this. Ask for a shorter answer, or start with --device cpu."
    log.error("unexpected error", exc_info=error)
    return f"Something unexpected went wrong ({reason(error)}). The terminal shows where."


def spoken(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose errors the page shows as a sentence."""

    @wraps(function)
    def inner(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None

    return inner


class Page:
    """What the page does; its inputs and outputs are the values of components, answers in the order of the policies."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.found = bench, bench.results
        self.names = list(bench.policies)
        self.by_name = {one.dimension: one for one in self.found.principles}

    def ask(
        self, before: str, instruction: str, chosen: list[str], temperature: float, seed: float | None, tokens: float
    ) -> Iterator[list[Any]]:
        """Sample the answers of the chosen policies one after another, as they grow; `before` was asked last.

        Yields:
            What has been asked, and one answer for each policy.
        """
        # Answers to something else would be taken for answers to this.
        kept = gr.skip() if instruction == before else ""
        answers: list[Any] = ["" if name in chosen else kept for name in self.names]
        failed: dict[str, str] = {}
        for place, name in enumerate(self.names):
            if name not in chosen:
                continue
            policy = self.bench.policies[name]
            try:
                for text in self.bench.answers(
                    policy, instruction, temperature=temperature, seed=int(seed or 0), max_tokens=int(tokens)
                ):
                    answers[place] = text
                    yield [instruction, *answers]
                if not answers[place].strip():
                    answers[place] = gr.update(value="", placeholder="(the answer is empty)")
                    yield [instruction, *answers]
            except Exception as error:
                failed[name] = sentence_of(error)
        if not chosen:
            raise gr.Error("Choose at least one policy.", print_exception=False)
        if failed:
            same = len(failed) == len(chosen)
            said = next(iter(failed.values())) if same else " ".join(f"{name}: {why}" for name, why in failed.items())
            raise gr.Error(said, print_exception=False)

    def shown(self, ticked: list[str], negated: list[str], own: str) -> list[tuple[str, str]]:
        """The principles that are shown: label and sentence."""
        found = []
        for name in ticked:
            one = self.by_name[name]
            is_negated = name in negated
            label, sentence = (f"{name}, negated", one.negative_definition) if is_negated else (name, one.definition)
            found.append((label, sentence))
        return [*found, (OWN, own.strip())] if own.strip() else found

    def score(
        self, scorer_name: str, ticked: list[str], negated: list[str], own: str, instruction: str, *answers: str
    ) -> str:
        """The table of rewards, or the sentence that says why there is none."""
        try:
            return self._score(scorer_name, self.shown(ticked, negated, own), instruction, self._given(answers))
        except Exception as error:
            return tables.note(sentence_of(error))

    def _given(self, answers: Sequence[str | None]) -> dict[str, str]:
        pairs = zip(self.names, answers, strict=True)
        return {name: text for name, text in pairs if text and text.strip()}

    def _score(self, name: str, shown: list[tuple[str, str]], instruction: str, given: dict[str, str]) -> str:
        scorer = self.bench.scorers[name]
        takes = self.bench.reads_principles(scorer)
        if not given:
            return tables.note(NOTHING_YET)
        if takes and not shown:
            return tables.note("Tick a principle, or write one of your own.")
        rows = [(label, sentence, [sentence]) for label, sentence in shown]
        if not takes:
            rows = [("whatever is ticked", "This reward model reads no principles.", list[str]())]
        elif len(shown) > 1:
            rows.insert(0, ("all of these together", "", [sentence for _, sentence in shown]))
        rewards, cut = self.bench.rewards(
            scorer, instruction, list(given.values()), [sentences for *_, sentences in rows]
        )
        table = tables.scores(list(given), [(*row[:2], found) for row, found in zip(rows, rewards, strict=True)])
        long = ", ".join(answer for place, answer in enumerate(given) if place in cut)
        return table + (
            tables.note(f"Too long for the reward model, which read only the beginning: {long}.") if cut else ""
        )

    def compare(
        self, first: str, second: str, own_name: str, ticked: list[str], negated: list[str], own: str, instruction: str,
        *answers: str,
    ) -> str:  # fmt: skip
        """What the judge says of two answers; and its prompts, folded.

        The judge is asked about a principle as it is, and its verdict about the negation is the opposite, as in the
        workflow (`aggregate_preferences`).
        """
        given = self._given(answers)
        if first == second or not (first in given and second in given):
            raise UserError("Choose two policies that have answered.")
        asked = [self.by_name[name] for name in ticked]
        if own.strip():
            if not own_name.strip():
                raise UserError(
                    "Give your principle a name: an adjective or a short noun. The judge's prompt asks for the more … "
                    "output."
                )
            asked.append(JudgedPrinciple(dimension=own_name.strip(), definition=own.strip(), negative_definition="-"))
        if not asked:
            raise UserError("Tick a principle, or write one of your own: the judge goes by one at a time.")
        verdicts, cut = self.bench.judge(instruction, given[first], given[second], asked)
        verdicts = [
            replace(one, dimension=f"{one.dimension}, negated", s12=-one.s12, s21=-one.s21)
            if one.dimension in negated and one.dimension in ticked
            else one
            for one in verdicts
        ]
        note = tables.note("The answers are too long for the judge, which read only their beginnings.") if cut else ""
        return tables.verdicts(first, second, verdicts) + note + tables.judge_prompts(verdicts)

    def texts(
        self, scorer_name: str, ticked: list[str], negated: list[str], own: str, instruction: str, *answers: str
    ) -> str:
        """The exact texts that policies and the reward model read."""
        bench = self.bench
        parts = [
            (f"What {name} continues", decode(bench.tokenizers[name], bench.prompt(policy, instruction)))
            for name, policy in bench.policies.items()
        ]
        scorer = bench.scorers[scorer_name]
        for name, answer in [*self._given(answers).items()][:1]:
            sentences = [sentence for _, sentence in self.shown(ticked, negated, own)]
            shown = sentences if bench.reads_principles(scorer) else []
            [tokens], _ = bench.reward_texts(scorer, instruction, [answer], [shown])
            text = decode(bench.scorer_tokenizers[scorer_name], tokens)
            parts.append((f"What {scorer_name} scores, for the answer of {name}", text))
        return "\n\n".join(f"=== {title}\n{text}" for title, text in tables.merged(parts))


@dataclass(slots=True)
class Parts:
    """Components that others act on."""

    instruction: gr.Textbox
    sampling: list[gr.components.Component]
    answers: list[gr.Textbox]
    scorer: gr.Dropdown
    ticked: gr.CheckboxGroup
    negated: gr.CheckboxGroup
    own: gr.Textbox
    scores: gr.HTML

    @property
    def live(self) -> list[gr.components.Component]:
        """What rewards depend on."""
        return [self.scorer, self.ticked, self.negated, self.own, self.instruction, *self.answers]


ALONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def build(bench: Workbench) -> gr.Blocks:
    """The page."""
    page = Page(bench)
    blocks = gr.Blocks(title="SALMON playground", analytics_enabled=False, fill_width=True)
    with blocks:
        gr.Markdown(
            "# SALMON playground\nAsk the policies, then tick principles: the reward model follows whatever it is "
            "shown, plain, negated, or in your own words. You can edit the answers; they are scored as they stand."
        )
        for sentence in bench.results.notes:
            gr.Markdown(f"*{sentence}*")
        parts = _parts(page)
        if bench.results.judge:
            _judge(page, parts)
        with gr.Accordion("The exact texts that policies and the reward model read", open=False):
            show = gr.Button("Show", elem_id="show-texts")
            texts = gr.Textbox(show_label=False, lines=12, max_lines=40, elem_id="texts")
            show.click(spoken(page.texts), parts.live, texts, **ALONE)
        gr.Markdown("## The runs")
        gr.HTML(tables.runs(bench.results.policies), elem_id="runs")
    blocks.queue(api_open=False)
    return blocks


def _parts(page: Page) -> Parts:
    """Instruction, answers and rewards."""
    policies, dimensions = page.found.policies, [one.dimension for one in page.found.principles]
    longest = max(policy.ppo.response_length for policy in policies)
    most = min(max(MOST, longest), page.bench.limit or MOST)
    with gr.Row():
        instruction = gr.Textbox(label="Instruction", lines=2, scale=5, elem_id="instruction")
        with gr.Column(scale=1, min_width=120):
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
    before = gr.State("")
    with gr.Row():
        chosen = gr.CheckboxGroup(page.names, value=page.names, label="Policies", scale=4, elem_id="policies")
        temperature = gr.Slider(0, 1.5, value=policies[0].ppo.temperature, step=0.1, label="Temperature")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        tokens = gr.Slider(1, most, value=min(longest, most), step=1, label="Tokens at most")
    answers: list[gr.Textbox] = []
    for start in range(0, len(policies), A_ROW):
        with gr.Row():
            for policy in policies[start : start + A_ROW]:
                label, name = describe(policy), f"answer-{len(answers)}"
                answers.append(gr.Textbox(label=label, lines=4, max_lines=14, elem_id=name, interactive=True))
    gr.Markdown("## What the reward model makes of them")
    scorers = page.bench.scorers
    best = next((name for name, one in scorers.items() if page.bench.reads_principles(one)), None)
    with gr.Row():
        with gr.Column(scale=2):
            parts = Parts(
                instruction=instruction,
                sampling=[chosen, temperature, seed, tokens],
                answers=answers,
                scorer=gr.Dropdown(
                    [*scorers], value=best or next(iter(scorers)), label="Reward model", elem_id="scorer"
                ),
                ticked=gr.CheckboxGroup(dimensions, label="Principles shown", elem_id="principles"),
                negated=gr.CheckboxGroup(dimensions, label="Of these, negated", elem_id="negated"),
                own=gr.Textbox(label="A principle in your own words", placeholder="The output …", elem_id="own"),
                scores=gr.HTML(render=False, elem_id="scores", value=tables.note(NOTHING_YET)),
            )
        with gr.Column(scale=3):
            parts.scores.render()  # type: ignore[no-untyped-call]
    asked = gr.on(
        [ask.click, instruction.submit],
        page.ask,
        [before, instruction, *parts.sampling],
        [before, *answers],
        show_progress="minimal",
        **ALONE,
    )
    stop.click(None, cancels=[asked])
    asked.then(page.score, parts.live, parts.scores, show_progress="minimal", **ALONE)
    changes = [parts.scorer.change, parts.ticked.change, parts.negated.change, parts.own.input, instruction.input]
    changes += [one.input for one in answers]
    gr.on(changes, page.score, parts.live, parts.scores, show_progress="minimal", trigger_mode="always_last", **ALONE)
    return parts


def _judge(page: Page, parts: Parts) -> None:
    """Two answers and their verdicts."""
    gr.Markdown("## What the judge says of two answers, one principle at a time, in both orders")
    with gr.Row():
        first = gr.Dropdown(page.names, value=page.names[0], label="One answer", elem_id="first")
        second = gr.Dropdown(page.names, value=page.names[-1], label="The other", elem_id="second")
        own_name = gr.Textbox(
            label="Name of your own principle", placeholder="an adjective, such as concise", elem_id="own-name"
        )
        compare = gr.Button("Ask the judge", elem_id="judge")
    verdicts = gr.HTML(elem_id="verdicts")
    compare.click(spoken(page.compare), [first, second, own_name, *parts.live[1:]], verdicts, **ALONE)


def describe(policy: Policy) -> str:
    """A policy and the principles that it was trained by."""
    if policy.folder is None:
        return policy.name
    if not policy.principles:
        return f"{policy.name}: no principle"
    names = [one.dimension for one in policy.principles]
    return f"{policy.name}: {', '.join(names)}" if len(names) < 4 else f"{policy.name}: {len(names)} principles"
