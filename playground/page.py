"""What the page of the playground does, and how it looks."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import gradio as gr
import torch

from playground import tables
from playground.results import Policy
from playground.workbench import Workbench
from salmon.border import reason
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple

log = logging.getLogger(__name__)

OWN = "my own principle"
MOST = 1024  # tokens of an answer that can be asked for
A_ROW = 3  # answers side by side
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
        self, instruction: str, chosen: list[str], temperature: float, seed: float | None, tokens: float
    ) -> Iterator[list[Any]]:
        """Sample the answers of the chosen policies one after another, as they grow."""
        answers: list[Any] = ["" if name in chosen else gr.skip() for name in self.names]
        try:
            if not chosen:
                raise UserError("Choose at least one policy.")
            for place, name in enumerate(self.names):
                if name not in chosen:
                    continue
                policy = self.bench.policies[name]
                for text in self.bench.answers(
                    policy, instruction, temperature=temperature, seed=int(seed or 0), max_tokens=int(tokens)
                ):
                    answers[place] = text
                    yield answers
        except Exception as error:
            raise gr.Error(sentence_of(error), print_exception=False) from None

    def shown(self, ticked: list[str], negated: list[str], own: str) -> list[tuple[str, str]]:
        """The principles that are shown: label and sentence."""
        found = []
        for name in ticked:
            one = self.by_name[name]
            reverse = name in negated
            found.append(
                (f"{name}, negated" if reverse else name, one.negative_definition if reverse else one.definition)
            )
        return [*found, (OWN, own.strip())] if own.strip() else found

    def score(
        self, scorer_name: str, ticked: list[str], negated: list[str], own: str, instruction: str, *answers: str
    ) -> str:
        """The table of rewards."""
        scorer = self.bench.scorers[scorer_name]
        given = {name: text for name, text in zip(self.names, answers, strict=True) if text}
        if not given:
            return tables.note(NOTHING_YET)
        shown = self.shown(ticked, negated, own)
        takes = self.bench.reads_principles(scorer)
        if takes and not shown:
            return tables.note("Tick a principle, or write one of your own.")
        if not takes:
            rows = [("any principle", "This reward model reads no principles.", list[str]())]
        else:
            rows = [(label, sentence, [sentence]) for label, sentence in shown]
            if len(shown) > 1:
                rows.insert(0, ("all of these together", "", [sentence for _, sentence in shown]))
        rewards = self.bench.rewards(scorer, instruction, list(given.values()), [sentences for *_, sentences in rows])
        return tables.scores(list(given), [(*row[:2], found) for row, found in zip(rows, rewards, strict=True)])

    def compare(
        self, first: str, second: str, ticked: list[str], negated: list[str], own: str, instruction: str, *answers: str
    ) -> str:
        """What the judge says of two answers; and its prompts, folded."""
        given = dict(zip(self.names, answers, strict=True))
        if first == second or not (given.get(first) and given.get(second)):
            raise UserError("Choose two policies that have answered.")
        shown = [
            JudgedPrinciple(dimension=a, definition=b, negative_definition=b)
            for a, b in self.shown(ticked, negated, own)
        ]
        if not shown:
            raise UserError("Tick a principle, or write one of your own: the judge needs one to compare by.")
        verdicts, prompts = self.bench.judge(instruction, given[first], given[second], shown)
        return tables.verdicts(first, second, verdicts) + tables.judge_prompts(verdicts, prompts)

    def texts(
        self, scorer_name: str, ticked: list[str], negated: list[str], own: str, instruction: str, *answers: str
    ) -> str:
        """The exact texts that policies and the reward model read."""
        parts = [
            (f"What {name} continues", self.bench.tokenizers[name].decode(self.bench.prompt(policy, instruction)))
            for name, policy in self.bench.policies.items()
        ]
        scorer = self.bench.scorers[scorer_name]
        given = {name: text for name, text in zip(self.names, answers, strict=True) if text}
        if given:
            name, answer = next(iter(given.items()))
            sentences = [sentence for _, sentence in self.shown(ticked, negated, own)]
            [tokens] = self.bench.reward_texts(
                scorer, instruction, [answer], [sentences if self.bench.reads_principles(scorer) else []]
            )
            parts.append((f"What {scorer_name} scores, for the answer of {name}", self.bench.tokenizer.decode(tokens)))
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
        for sentence in bench.results.left_out:
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
    with gr.Row():
        instruction = gr.Textbox(label="Instruction", lines=2, scale=5, elem_id="instruction")
        ask = gr.Button("Ask", variant="primary", scale=1, elem_id="ask")
    with gr.Row():
        chosen = gr.CheckboxGroup(page.names, value=page.names, label="Policies", scale=4, elem_id="policies")
        temperature = gr.Slider(0, 1.5, value=policies[0].ppo.temperature, step=0.1, label="Temperature")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        tokens = gr.Slider(1, max(MOST, longest), value=min(longest, MOST), step=1, label="Tokens at most")
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
                negated=gr.CheckboxGroup([], label="Of these, negated", elem_id="negated"),
                own=gr.Textbox(label="A principle in your own words", placeholder="The output …", elem_id="own"),
                scores=gr.HTML(render=False, elem_id="scores", value=tables.note(NOTHING_YET)),
            )
        with gr.Column(scale=3):
            parts.scores.render()  # type: ignore[no-untyped-call]
    asked = gr.on(
        [ask.click, instruction.submit],
        page.ask,
        [instruction, *parts.sampling],
        answers,
        show_progress="minimal",
        **ALONE,
    )
    score = spoken(page.score)
    asked.then(score, parts.live, parts.scores, show_progress="minimal", **ALONE)
    parts.ticked.change(
        lambda names, before: gr.CheckboxGroup(choices=names, value=[name for name in before if name in names]),
        [parts.ticked, parts.negated],
        parts.negated,
        show_progress="hidden",
    )
    changes = [parts.scorer.change, parts.ticked.change, parts.negated.change, parts.own.input]
    changes += [one.input for one in answers]
    gr.on(changes, score, parts.live, parts.scores, show_progress="minimal", trigger_mode="always_last", **ALONE)
    return parts


def _judge(page: Page, parts: Parts) -> None:
    """Two answers and their verdicts."""
    gr.Markdown("## What the judge says of two answers, one principle at a time, in both orders")
    with gr.Row():
        first = gr.Dropdown(page.names, value=page.names[0], label="One answer", elem_id="first")
        second = gr.Dropdown(page.names, value=page.names[-1], label="The other", elem_id="second")
        compare = gr.Button("Ask the judge", elem_id="judge")
    verdicts = gr.HTML(elem_id="verdicts")
    compare.click(spoken(page.compare), [first, second, *parts.live[1:]], verdicts, **ALONE)


def describe(policy: Policy) -> str:
    """A policy and the principles that it was trained by."""
    if policy.folder is None:
        return policy.name
    if not policy.principles:
        return f"{policy.name}: no principle"
    names = [one.dimension for one in policy.principles]
    return f"{policy.name}: {', '.join(names)}" if len(names) < 4 else f"{policy.name}: {len(names)} principles"
