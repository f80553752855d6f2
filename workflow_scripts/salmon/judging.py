"""The initial policy as judge: which of two outputs it prefers by one principle (paper section 3.2, reference step 1).

The judge reads a template that ends with `Output (` and is asked for one more token. The logits of the letters `a` and
`b` are its verdict. Each pair is judged by every principle and in both orders. `margins` computes the prompts of a pair
together; `prove` finds out which way of doing so is right for a model.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import polars as pl
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from salmon import distributed
from salmon.config import Judge as JudgeSettings
from salmon.encoding import Template, guard, token_spans, tokenize
from salmon.errors import UserError
from salmon.margins import Way, margins, output_layer, prefill
from salmon.principles import JudgedPrinciple
from salmon.tables import PROMPT_TOO_LONG
from salmon.templates import fill
from salmon.text import cut_at_markers, join_instruction

log = logging.getLogger(__name__)

OPTIONS = ("a", "b")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two outputs for one instruction."""

    prompt_id: str
    instruction: str
    output_1: str
    output_2: str


def with_partners(first: pl.LazyFrame, second: pl.LazyFrame) -> pl.DataFrame:
    """Rows of response0 that have a partner in response1, each with it.

    Returns:
        The table RESPONSES, in the order of `first`, with response_1 and finish_reason_1.
    """
    partners = second.select("prompt_id", response_1="response", finish_reason_1="finish_reason")
    return first.join(partners, on="prompt_id", maintain_order="left").collect()


def select_pairs(table: pl.DataFrame, settings: JudgeSettings) -> tuple[list[Pair], Counter[str]]:
    """The pairs to judge, their responses cut at the first turn marker, and the counts of omitted pairs."""
    pairs = []
    counts = Counter(pairs=table.height, prompt_too_long=0, too_short=0)
    for row in table.iter_rows(named=True):
        if PROMPT_TOO_LONG in (row["finish_reason"], row["finish_reason_1"]):
            counts["prompt_too_long"] += 1
            continue
        outputs = [cut_at_markers(row[name], settings.turn_markers) for name in ("response", "response_1")]
        if min(map(len, outputs)) < settings.min_characters:
            counts["too_short"] += 1
            continue
        instruction = join_instruction(row["instruction"], row["input"])
        pairs.append(Pair(row["prompt_id"], instruction, *outputs))
    return pairs, counts


@dataclass(frozen=True, slots=True)
class PairPrompts:
    """Token ids of a pair's prompts, one per principle: with output_1 as (a), and with output_2 as (a)."""

    order_12: list[list[int]]
    order_21: list[list[int]]


class Judge:
    """A model that judges pairs by principles.

    Args:
        model: causal language model in eval mode, with or without adapters, quantised or not.
        tokenizer: the model's tokenizer, with offsets (a "fast" one).
        template: with the slots `templates.JUDGE_SLOTS`: plain text, or a chat (`encoding.read_template`).
        principles: at least one.
        max_length: maximum tokens of a prompt.
        device: the model's device.
        way: way to compute prompts; `prove` finds the fastest correct one for a model.

    Attributes:
        cut: prompt_ids of the pairs so far whose outputs were too long to be read completely.

    Raises:
        UserError: if the tokenizer has no separate tokens for the options after the template.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | Template,
        principles: Sequence[JudgedPrinciple],
        max_length: int,
        device: torch.device | str,
        way: Way = "packed",
    ) -> None:
        self.way: Way = way
        self.cut: set[str] = set()
        self.model = model
        self.tokenizer = tokenizer
        self.template = Template.of(template)
        self.principles = principles
        self.max_length = max_length
        self.device = device
        self.options = option_tokens(tokenizer, self._texts("", "", ""), add_special_tokens=not self.template.is_chat)

    def judge(self, pairs: Sequence[Pair]) -> list[list[tuple[float, float]] | None]:
        """Scores (s12, s21) of every principle, for every pair; None if a pair does not fit (see `encode`).

        Both are positive if output_1 is preferred. All pairs are one batch. In another batch the scores differ by the
        rounding of the model's arithmetic.
        """
        prompts = [self.encode(pair) for pair in pairs]
        fitting = [each for each in prompts if each is not None]
        s12 = self._margins([each.order_12 for each in fitting])
        s21 = self._margins([each.order_21 for each in fitting])
        scores = iter([list(zip(ab, [-margin for margin in ba], strict=True)) for ab, ba in zip(s12, s21, strict=True)])
        return [None if each is None else next(scores) for each in prompts]

    def encode(self, pair: Pair) -> PairPrompts | None:
        """The prompts of a pair, each of at most `max_length` tokens.

        If the longest is too long, the ends of the outputs are cut off, from the longer one first, until all prompts
        fit. All principles and both orders read the same outputs, and the template stays complete.

        Returns:
            None if the prompts are too long even with empty outputs.
        """
        instruction, *whole = (guard(self.tokenizer, text) for text in (pair.instruction, pair.output_1, pair.output_2))
        outputs = list(whole)
        ends: list[list[int]] | None = None  # ends of the outputs' tokens, in characters; most pairs never need them
        budget = 0
        while True:
            prompts = self._encode(instruction, *outputs)
            excess = max(map(len, prompts.order_12 + prompts.order_21)) - self.max_length
            if excess <= 0:
                return prompts
            if ends is None:
                ends = [[end for _, end in spans] for spans in token_spans(self.tokenizer, whole)]
                budget = sum(map(len, ends))
            if budget == 0:
                return None
            self.cut.add(pair.prompt_id)
            # Cutting can change the tokens of the rest, so another round may be necessary.
            budget = max(0, budget - excess)
            kept = share(len(ends[0]), len(ends[1]), budget)
            outputs = [
                output[: places[number - 1] if number else 0]
                for output, places, number in zip(whole, ends, kept, strict=True)
            ]

    def _encode(self, instruction: str, output_1: str, output_2: str) -> PairPrompts:
        """Token ids of the prompts, whatever their length; the three texts are guarded."""
        texts = self._texts(instruction, output_1, output_2) + self._texts(instruction, output_2, output_1)
        tokens = self.template.encode(self.tokenizer, texts)
        return PairPrompts(tokens[: len(self.principles)], tokens[len(self.principles) :])

    def _texts(self, instruction: str, output_a: str, output_b: str) -> list[str]:
        """The template filled with guarded texts, one text per principle."""
        return [
            fill(
                self.template.text,
                UserInstruction=instruction,
                OutputA=output_a,
                OutputB=output_b,
                Dimension=guard(self.tokenizer, principle.dimension),
                Definition=guard(self.tokenizer, principle.definition),
            )
            for principle in self.principles
        ]

    def _margins(self, prompts: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """The results of `margins` as lists, checked."""
        if not prompts:
            return []
        scores = margins(self.model, prompts, self.options, self.device, self.way)
        if not scores.isfinite().all():
            raise UserError(
                "the judge's logits are not finite; float16 overflows: set model.dtype to bfloat16 or float32"
            )
        as_lists: list[list[float]] = scores.tolist()
        return as_lists


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of `prove`.

    Attributes:
        way: the fastest way that is right for the model.
        tokens: number of tokens of the longest prompt that was tried.
        noise: how much a padded batch changes a score; root mean square, in units of the logits.
        differences: the same for every way, against single prompts without padding; None if the way failed.
    """

    way: Way
    tokens: int
    noise: float
    differences: dict[Way, float | None]


@torch.no_grad()
def prove(judge: Judge) -> Proof:
    """Find the fastest way that scores prompts, up to the judge's length, like one plain forward pass per prompt.

    Two made-up pairs are judged by up to three principles: one short pair and one that fills `max_length`. A way is
    right if its scores are as close to those of single prompts as the scores of ordinary padded batches are, given the
    rounding of the model's dtype. Sliding windows are checked separately, because their effect may be smaller than the
    rounding of 16 bits. All ranks call this and get rank 0's answer.

    Raises:
        UserError: if even padded batches and single prompts give different scores.
    """
    prompts = _made_prompts(judge)
    flat = [prompt for group in prompts for prompt in group]
    one_by_one = [margins(judge.model, [[prompt]], judge.options, judge.device, "whole")[0, 0] for prompt in flat]
    single = torch.stack(one_by_one).view(len(prompts), -1)
    differences: dict[Way, float | None] = {}
    for way in get_args(Way):
        differences[way] = None
        if way == "packed" and not _heeds_a_mask(judge, prompts[0][0]):
            continue
        try:
            scores = margins(judge.model, prompts, judge.options, judge.device, way)
            differences[way] = float((scores - single).square().mean().sqrt())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AttributeError, TypeError, IndexError) as error:
            log.info("judging %s is not possible: %s", way, str(error).partition("\n")[0])
    scale = float(single.square().mean().sqrt())
    noise = differences["whole"]
    step = _rounding(judge, flat[0])
    if noise is None or not noise <= 0.1 * scale + 1e-3 + 4 * step:
        raise UserError(
            f"{type(judge.model).__name__} scores prompts differently in padded batches than alone (by {noise}, with "
            f"scores of about {scale:.2g}): this model cannot judge, see docs/models.md"
        )
    limit = 4 * noise + 1e-4 * max(scale, 1.0) + step
    right = [way for way, difference in differences.items() if difference is not None and difference <= limit]
    proof: Proof = distributed.broadcast(Proof(right[0], max(map(len, flat)), noise, differences))
    return proof


def _made_prompts(judge: Judge) -> list[list[list[int]]]:
    """Prompts of a short pair and of one with the judge's full length, by up to three principles, in one order."""
    words = " ".join([*judge.template.text.split(), *(principle.definition for principle in judge.principles)]).split()
    long = " ".join(words * (judge.max_length // max(1, len(words)) + 1))
    longest = max(range(len(judge.principles)), key=lambda place: len(judge.principles[place].definition))
    places = sorted({0, longest, len(judge.principles) - 1})
    groups = []
    for first, second in (("yes", "no, " + " ".join(words[:9])), (long, f"so {long}")):
        encoded = judge.encode(Pair("made up", "Which one?", first, second))
        if encoded is None:
            raise UserError(f"judge.max_length {judge.max_length} leaves no room for outputs in the judge's template")
        groups.append([encoded.order_12[place] for place in places])
    return groups


def _heeds_a_mask(judge: Judge, prompt: list[int]) -> bool:
    """Whether masks and positions alone decide what a token sees: no window, no state, and positions in use."""
    model, device = judge.model, judge.device
    ids = torch.tensor([prompt[:8]])
    cache = prefill(model, ids, torch.ones_like(ids), device)
    if not all(
        layer.sliding_window >= judge.max_length
        if isinstance(layer, DynamicSlidingWindowLayer)
        else type(layer) is DynamicLayer
        for layer in getattr(cache, "layers", [None])
    ):
        return False
    # ALiBi counts places in the row and ignores the given positions.
    near, far = (
        model(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            position_ids=(step * torch.arange(ids.shape[1], device=device))[None],
            use_cache=False,
            logits_to_keep=1,
        ).logits
        for step in (1, 2)
    )
    return not torch.equal(near, far)


def _rounding(judge: Judge, prompt: list[int]) -> float:
    """The rounding of the model's dtype in a score: half a step at the size of the largest logit."""
    ids = torch.tensor([prompt], device=judge.device)
    logits = judge.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    output = output_layer(judge.model)
    dtype = logits.dtype if output is None else output.weight.dtype
    return float(logits.abs().max()) * torch.finfo(dtype).eps / 2


def share(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens two outputs keep if they may have `budget` together: the longer one is cut first.

    If both must be cut, both keep the same number, so neither output gains by its position.
    """
    if first + second <= budget:
        return first, second
    half = budget // 2
    if first <= half:
        return first, budget - first
    if second <= half:
        return budget - second, second
    return half, half


def option_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, add_special_tokens: bool = True
) -> tuple[int, int]:
    """Token ids of `a` and `b` after these prompts.

    Usually this is the token that the tokenizer puts there. If the tokenizer would join the letter with the prompt's
    last characters, it is the token that continues the prompt's own tokens by exactly the letter.

    Raises:
        UserError: if there is no such token, or it differs between prompts.
    """
    answers = {
        tuple(_continuation(tokenizer, prompt, letter, add_special_tokens) for letter in OPTIONS) for prompt in prompts
    }
    first, second = next(iter(answers))
    if len(answers) > 1 or None in (first, second) or first == second:
        raise UserError(
            "the tokenizer has no single token for the options `a` and `b` after judge.template (it continues with "
            f"{sorted(map(str, answers))}); end judge.template with ` (`, or another mark that stays a token"
        )
    assert first is not None
    assert second is not None
    return first, second


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, letter: str, add_special_tokens: bool) -> int | None:
    """The token that continues a prompt by one letter."""
    before, after = tokenize(tokenizer, [prompt, prompt + letter], add_special_tokens=add_special_tokens)
    if after[:-1] == before:
        return None if after[-1] == tokenizer.unk_token_id else after[-1]
    token = tokenizer.convert_tokens_to_ids(letter)
    if token is None or token == tokenizer.unk_token_id:
        return None
    text, longer = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, [*before, token]))
    return int(token) if longer == text + letter else None
