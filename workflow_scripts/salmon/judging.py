"""The initial policy as judge: which of two outputs it prefers by one principle (paper section 3.2, reference step 1).

The judge reads a template that ends with `Output (` and is asked for one more token; the logits of the letters
`a` and `b` are its verdict. Each pair is judged by every principle and in both orders. How the prompts of a pair are
computed together is in `margins`; which way is right for a model, `prove` finds out.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from salmon import distributed
from salmon.encoding import Template, guard, token_spans, tokenize
from salmon.errors import UserError
from salmon.margins import Way, margins, output_layer, prefill
from salmon.principles import JudgedPrinciple
from salmon.templates import fill

log = logging.getLogger(__name__)

OPTIONS = ("a", "b")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two outputs for one instruction."""

    prompt_id: str
    instruction: str
    output_1: str
    output_2: str


@dataclass(frozen=True, slots=True)
class PairPrompts:
    """Token ids of a pair's prompts, one per principle: with output_1 as (a), and with output_2 as (a)."""

    order_12: list[list[int]]
    order_21: list[list[int]]


class Judge:
    """A model that judges pairs by principles.

    Args:
        model: causal language model in eval mode, with or without adapters, quantised or not.
        tokenizer: of the model, with offsets (a "fast" one).
        template: with the slots `templates.JUDGE_SLOTS`: plain text, or a chat (`encoding.read_template`).
        principles: at least one.
        max_length: tokens a prompt may have.
        device: where the model is.
        way: how prompts are computed; `prove` finds the fastest that is right for a model.

    Attributes:
        cut: prompt_ids of the pairs so far whose outputs were too long to be read to their ends.

    Raises:
        UserError: where the tokenizer gives the options no token of their own after the template.
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
        """Scores (s12, s21) of every principle, for every pair; None where a pair does not fit (see `encode`).

        Both are positive where output_1 is preferred. All pairs are one batch; in another batch the scores differ
        as far as the rounding of the model's arithmetic goes.
        """
        prompts = [self.encode(pair) for pair in pairs]
        fitting = [each for each in prompts if each is not None]
        s12 = self._margins([each.order_12 for each in fitting])
        s21 = self._margins([each.order_21 for each in fitting])
        scores = iter([list(zip(ab, [-margin for margin in ba], strict=True)) for ab, ba in zip(s12, s21, strict=True)])
        return [None if each is None else next(scores) for each in prompts]

    def encode(self, pair: Pair) -> PairPrompts | None:
        """The prompts of a pair, each of at most `max_length` tokens.

        Where the longest is too long, the ends of the outputs are cut off, from the longer one first, until all
        prompts fit; every principle and both orders read the same outputs, and the template stays whole.

        Returns:
            None where the prompts are too long even with empty outputs.
        """
        instruction, *whole = (guard(self.tokenizer, text) for text in (pair.instruction, pair.output_1, pair.output_2))
        outputs = list(whole)
        ends: list[list[int]] | None = None  # of the outputs' tokens, as characters; most pairs never need them
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
            # Cutting can change how the rest is tokenised, so that another round may be needed.
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
        """`margins` as lists, checked."""
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
    """What `prove` found.

    Attributes:
        way: the fastest that is right for the model.
        tokens: of the longest prompt it was tried on.
        noise: what a padded batch changes in a score; root mean square, in units of the logits.
        differences: the same of every way tried, to each prompt alone without padding; None where it failed.
    """

    way: Way
    tokens: int
    noise: float
    differences: dict[Way, float | None]


@torch.no_grad()
def prove(judge: Judge) -> Proof:
    """Find the fastest way that scores prompts, up to the judge's length, as one plain forward pass for each does.

    Two made-up pairs are judged by up to three principles, a short one and one that fills `max_length`. A way is right
    where its scores are as near to those of single prompts as those of ordinary padded batches, rounding being what it
    is in the model's dtype. Windows are looked up besides: what they change may be less than the rounding of 16 bits.
    All ranks call this, and get the answer of rank 0.

    Raises:
        UserError: where even padded batches give other scores than single prompts.
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
            f"{type(judge.model).__name__} scores prompts in padded batches otherwise than alone (by {noise}, where "
            f"scores are about {scale:.2g}): this model cannot judge, see docs/models.md"
        )
    limit = 4 * noise + 1e-4 * max(scale, 1.0) + step
    right = [way for way, difference in differences.items() if difference is not None and difference <= limit]
    proof: Proof = distributed.broadcast(Proof(right[0], max(map(len, flat)), noise, differences))
    return proof


def _made_prompts(judge: Judge) -> list[list[list[int]]]:
    """Prompts of a short pair and of one as long as the judge reads, by up to three principles, in one order."""
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
    """Whether masks and positions decide what a token sees: no window, no state, and positions that are heeded."""
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
    # ALiBi counts places in the row, whatever the positions are said to be.
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
    """What the model's dtype rounds in a score: half a step at the size of the largest logit."""
    ids = torch.tensor([prompt], device=judge.device)
    logits = judge.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    output = output_layer(judge.model)
    dtype = logits.dtype if output is None else output.weight.dtype
    return float(logits.abs().max()) * torch.finfo(dtype).eps / 2


def share(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens two outputs keep when they may have `budget` together: the longer one gives first.

    Where both have to give, both keep the same number, so that neither output gains by its place.
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

    Each is the token that the tokenizer puts there; where it would rather join the letter with the prompt's last
    characters, it is the token that continues the prompt's own tokens by exactly the letter.

    Raises:
        UserError: where there is no such token, or the prompts differ in it.
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
