"""The initial policy as judge: which of two outputs it prefers by one principle (paper section 3.2, reference step 1).

The judge reads a template that ends with `Output (` and is asked for one more token; the logits of the letters
`a` and `b` are its verdict. Each pair is judged by every principle and in both orders. Where that is right for a model
(`Way`, `prove`), every token is computed once: the prompts of a pair in one order become one row, in which each tail
sees the common head and itself.

    | padding | head: instruction, output (a), output (b) | tail of principle 1 | tail of principle 2 | ...
                                                        logits a, b ^         logits a, b ^

The head is found in the tokens, so any template works; one that ends with the principle is fast. Neither the
head's cache nor its computation is repeated, so that memory grows little with the number of principles.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from salmon import distributed
from salmon.batching import batches, left_pad, position_ids, select_rows
from salmon.encoding import Template, guard, token_spans, tokenize
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple
from salmon.templates import fill

log = logging.getLogger(__name__)

OPTIONS = ("a", "b")

Way = Literal["packed", "shared", "whole"]
"""How the prompts of a pair are computed, the fastest first.

`packed`: as above. Needs attention that heeds a mask and positions for each token: not sliding windows shorter than a
prompt, recurrent or convolution layers, or ALiBi. `shared`: the head's cache is computed once and repeated for each
tail. `whole`: each prompt by itself, in batches by length; right wherever padded batches are.
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two outputs for one instruction."""

    prompt_id: str
    instruction: str
    output_1: str
    output_2: str


@dataclass(frozen=True, slots=True)
class PairPrompts:
    """Token ids of a pair's prompts, one a principle: with output_1 as (a), and with output_2 as (a)."""

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
        """The template filled with guarded texts, one text a principle."""
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


@torch.no_grad()
def margins(
    model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    options: tuple[int, int],
    device: torch.device | str,
    way: Way = "packed",
) -> Tensor:
    """logit(a) - logit(b) after every prompt.

    Args:
        model: causal language model in eval mode; for `packed` with attention that takes a mask (sdpa, eager).
        prompts: token ids, shape [groups, members, any length above 0]; the prompts of a group begin alike.
        options: token ids of a and b.
        device: where the model is.
        way: see `Way`.

    Returns:
        float64 on the CPU, shape [groups, members].
    """
    compute = {"packed": _packed_logits, "shared": _shared_logits, "whole": _whole_logits}[way]
    with _options_in_float32(model, list(options)) as places:
        logits = compute(model, prompts, places, device)
    first, second = logits.double().cpu().unbind(dim=-1)
    return first - second


@contextmanager
def _options_in_float32(model: nn.Module, options: list[int]) -> Iterator[list[int]]:
    """Inside the block, the output layer gives the options' logits only, in float32; yields their places in it.

    In bfloat16 a logit of 16 to 32 has steps of 0.125, so that most margins would be a tie. Layers that are divided
    among GPUs, or not of 16 bits, are left as they are.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if type(output) is not nn.Linear or output.weight.dtype not in (torch.bfloat16, torch.float16):
        yield options
        return
    weight = output.weight[options].float()
    bias = None if output.bias is None else output.bias[options].float()
    hook = output.register_forward_hook(lambda _, inputs, __: nn.functional.linear(inputs[0].float(), weight, bias))
    try:
        yield list(range(len(options)))
    finally:
        hook.remove()


def _packed_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    options: list[int],
    device: torch.device | str,
) -> Tensor:
    """Logits of the options, [groups, members, options]: tails behind their common head in one row."""
    groups, members = len(prompts), len(prompts[0])
    shared = [common_prefix(group) for group in prompts]
    heads, head_mask = left_pad([group[0][:length] for group, length in zip(prompts, shared, strict=True)])
    cache = _prefill(model, heads, head_mask, device) if max(shared) > 0 else None
    # Tails of equal width, one after another in a row: the last tokens of all of them are at the same places.
    rest = [prompt[length:] for group, length in zip(prompts, shared, strict=True) for prompt in group]
    tails, tail_mask = left_pad(rest)
    width = tails.shape[1]
    positions = head_mask.sum(dim=1).view(groups, 1, 1) + position_ids(tail_mask).view(groups, members, width)
    seen = tail_attention(head_mask, tail_mask.view(groups, members, width)).to(device)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    attention = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    logits: Tensor = model(
        input_ids=tails.view(groups, -1).to(device),
        attention_mask=attention,
        position_ids=positions.view(groups, -1).to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=torch.arange(width - 1, members * width, width, device=device),
    ).logits
    return logits[:, :, options]


def _shared_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    options: list[int],
    device: torch.device | str,
) -> Tensor:
    """The same: one row for each tail, behind a copy of its group's head; a group at a time.

    Tails are padded on their right: recurrent and convolution layers, and windows, go on from the head's end.
    """
    rows = []
    for group in prompts:
        shared = common_prefix(group)
        if shared == 0:
            rows.append(_whole_logits(model, [group], options, device)[0])
            continue
        heads = torch.tensor([group[0][:shared]])
        cache = _prefill(model, heads, torch.ones_like(heads), device)
        select_rows(cache, torch.zeros(len(group), dtype=torch.int64, device=device))
        lengths = torch.tensor([len(prompt) - shared for prompt in group])
        width = int(lengths.max())
        tails = torch.tensor([prompt[shared:] + [0] * (width + shared - len(prompt)) for prompt in group])
        mask = torch.ones(len(group), shared + width, dtype=torch.int64)
        mask[:, shared:] = torch.arange(width) < lengths[:, None]
        last, place = torch.unique(lengths - 1, return_inverse=True)
        logits = model(
            input_ids=tails.to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(shared, shared + width, device=device).expand(len(group), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last.to(device),
        ).logits
        rows.append(logits[torch.arange(len(group)), place][:, options])
    return torch.stack(rows)


def _whole_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    options: list[int],
    device: torch.device | str,
) -> Tensor:
    """The same: every prompt from its beginning, as many at a time as there are groups, the longest first."""
    flat = [prompt for group in prompts for prompt in group]
    logits: list[Tensor] = [torch.empty(0)] * len(flat)
    for batch in batches([len(prompt) for prompt in flat], len(prompts)):
        ids, mask = left_pad([flat[row] for row in batch])
        output = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=position_ids(mask).to(device),
            use_cache=False,
            logits_to_keep=1,
        )
        for row, found in zip(batch, output.logits[:, -1, options], strict=True):
            logits[row] = found
    return torch.stack(logits).view(len(prompts), len(prompts[0]), len(options))


def _prefill(model: nn.Module, ids: Tensor, mask: Tensor, device: torch.device | str) -> Cache:
    """The cache after these tokens, padded on their left."""
    cache: Cache = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=position_ids(mask).to(device),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    return cache


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
    found = Proof(right[0], max(map(len, flat)), noise, differences)
    answer: Proof = distributed.broadcast(found)
    return answer


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
    cache = _prefill(model, ids, torch.ones_like(ids), device)
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
    output = judge.model.get_output_embeddings()  # type: ignore[operator]
    dtype = logits.dtype if output is None else output.weight.dtype
    return float(logits.abs().max()) * torch.finfo(dtype).eps / 2


def tail_attention(head_mask: Tensor, tail_mask: Tensor) -> Tensor:
    """What the tokens of tails may see: the head of their group, and their own tail up to themselves.

    Args:
        head_mask: 1 token, 0 padding; shape [groups, head].
        tail_mask: the same; shape [groups, tails, width].

    Returns:
        bool, shape [groups, 1, tails * width, head + tails * width].
    """
    groups, tails, width = tail_mask.shape
    own = torch.block_diag(*[torch.ones(width, width).tril()] * tails).bool()
    of_tail = own & tail_mask.view(groups, 1, -1).bool()
    of_head = head_mask.bool()[:, None].expand(-1, tails * width, -1)
    return torch.cat([of_head, of_tail], dim=-1)[:, None]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Length of the longest common prefix that leaves every sequence at least one token."""
    first, last = min(sequences), max(sequences)  # what these two have in common, all have
    limit = min(map(len, sequences)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)


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
