"""Batched sampling from a language model, with random numbers that belong to the row.

Guarantees: A row's random numbers depend on its seed and on its number of tokens so far. They do not depend on the
other rows, the row's position among them, the shard, the rank or the device. The same prompts, seeds and settings in
one call of `generate` give the same tokens on the same machine, byte for byte. With other rows in the batch, or on
other hardware, the logits differ in their last bits, because batched matrix products sum in a different order. A row
then keeps its tokens unless a random number falls within that rounding of the border between two tokens (in float32 for
about one token in a million, in bfloat16 more often).
"""

import logging
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from salmon import caches, distributed, encoding
from salmon.batching import batches, left_pad, position_ids
from salmon.errors import UserError
from salmon.script import Meter
from salmon.text import cut_thinking

log = logging.getLogger(__name__)

FinishReason = Literal["eos", "stop", "length"]
Ranks = Literal["apart", "together", "lockstep"]
Watch = Callable[[Sequence[int], Sequence[int]], None]
"""Receives, at each call of the model, the rows that have drawn a token, and their tokens."""

REFILL = 0.25
"""Share of the slots that must be free before the next prompts are read. Reading costs a separate call of the model;
idle slots cost half of this share on average. An eighth and a quarter are equally fast, a half is slower
(`benchmarks/sampling.py`: 339, 337 and 312 tokens/s), and a quarter reads long prompts in fewer calls."""

_UNIT = 2.0**48  # probabilities become integers in this unit, so that their sums are exact


@dataclass(frozen=True, slots=True)
class Generation:
    """A response that a model sampled after a prompt.

    Attributes:
        tokens: as sampled, including the end token or the tokens of the stop string at the end.
        text: without special tokens, cut before the stop string.
        finish_reason: `eos`: the model ended its turn; `stop`: a stop string appeared; `length`: no room was left.
        logprobs: log probability of each token under the distribution it was drawn from, in nats; None if the
            engine does not return it.
    """

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None = None


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int | Sequence[int],
    temperature: float,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    device: torch.device | str,
    ranks: Ranks = "apart",
    refill: float = REFILL,
    watch: Watch | None = None,
) -> list[Generation]:
    """Sample one response per prompt, `batch_size` at a time; rows that end make room for the next prompts.

    The longest prompts come first: a lack of memory shows immediately, and later prompts need no additional room.
    Newcomers read their prompts together, in a separate call of the model, and join the others with their caches.

    A stop string must appear completely. It may begin with the line break that ends the prompt, so the user's turn
    marker also ends a response that has no other text.

    Args:
        model: causal language model in eval mode, with or without adapters, quantised or not.
        tokenizer: the model's tokenizer; names the end token (the model's generation config may name more).
        prompts: token ids, at least one per prompt, special tokens included.
        seeds: one per prompt, 0 or more; see the guarantees above.
        batch_size: rows at a time, at least 1.
        max_new_tokens: at least 1; one number for all rows, or one per row.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: keeps the most probable tokens that together reach this probability, at least one.
        stop: strings that end a response.
        device: the model's device.
        ranks: `apart`: this rank samples for itself. `together`: all ranks hold parts of one model and sample the same
            rows; rank 0 draws. `lockstep`: each rank may have different rows, but all call the model equally often,
            because each call gathers its weights from all ranks (ZeRO-3).
        refill: newcomers join as soon as this share of the `batch_size` is free; with 1, only when all rows have ended,
            as for a model whose caches cannot be joined.
        watch: receives tokens as they are drawn; an exception from it ends the sampling.

    Returns:
        One generation per prompt, in the order of the prompts.

    Raises:
        UserError: if the model's logits are not finite.
    """
    if model.training:
        raise ValueError("the model is in training mode, with dropout and possibly without a cache; call model.eval()")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    responses = _Responses(prompts, seeds, limits, end_tokens(model, tokenizer), StopStrings(tokenizer, stop))
    waiting = _Waiting([len(prompt) for prompt in prompts], batch_size, refill)
    running = nobody = _Rows.begin({}, device)
    while True:
        busy, admit = bool(running.rows or waiting.rows), waiting.ready(len(running.rows))
        if ranks == "lockstep":
            busy, admit = distributed.any_true([busy, admit], device)
        if not busy:
            break
        # If another rank admits rows, this one also does, as far as it may: all call the model now.
        part = running
        if admit:
            part = _Rows.begin({row: prompts[row] for row in waiting.admit(len(running.rows))}, device)
        uniforms = torch.tensor(responses.draw(part.rows), dtype=torch.float64, device=device)
        logits = part.call(model)
        if not part.rows:  # this rank only called the model to keep step
            continue
        drawn = sample_tokens(logits, uniforms, temperature, top_p)
        drawn = distributed.from_main(drawn) if ranks == "together" else drawn
        keep = responses.add(part.rows, tokens := drawn.tolist())
        if watch:
            watch(part.rows, tokens)
        if waiting.refills and part is not running:
            if caches.can_join(part.cache):
                caches.make_room(part.cache)
            else:
                _say_that_batches_drain(type(model).__name__)
                waiting.drain()
        part = part.advance(drawn, keep) if keep else nobody
        running = running.join(part) if admit else part
        if running.rows and waiting.refills:
            running.cut_padding(responses.longest(running.rows))
    return responses.generations()


def replay(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[tuple[Sequence[int], Sequence[float]]],
    *,
    max_new_tokens: Sequence[int],
    ends: set[int],
    stop: Sequence[str] = (),
) -> list[Generation | None]:
    """End responses from another engine where `generate` would have ended them.

    Args:
        tokenizer: the model's tokenizer.
        prompts: as for `generate`.
        sampled: tokens of each response and their log probabilities; tokens after an end are dropped.
        max_new_tokens: one for each prompt.
        ends: end tokens.
        stop: strings that end a response.

    Returns:
        One generation per prompt; None if nothing ends the response by the rules of `generate`.
    """
    responses = _Responses(prompts, [0] * len(prompts), max_new_tokens, ends, StopStrings(tokenizer, stop))
    has_ended = [any(not responses.add([row], [token]) for token in tokens) for row, (tokens, _) in enumerate(sampled)]
    return [
        replace(generation, logprobs=list(logprobs[: len(generation.tokens)])) if ended else None
        for generation, (_, logprobs), ended in zip(responses.generations(), sampled, has_ended, strict=True)
    ]


class _Responses:
    """The tokens sampled so far, and the rules that end a response."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        limits: Sequence[int],
        ends: set[int],
        stops: "StopStrings",
    ) -> None:
        if not len(prompts) == len(seeds) == len(limits):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(limits)} limits")
        if prompts and (min(limits) < 1 or not all(prompts)):
            raise ValueError("a prompt has no tokens, or no room for another one")
        self.prompts, self.limits, self.ends, self.stops = prompts, limits, ends, stops
        self.leads = [stops.lead(prompt) for prompt in prompts]
        self.sampled: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[FinishReason] = ["length"] * len(prompts)
        self.random = [np.random.default_rng(seed) for seed in seeds]
        self.meter = Meter(total=len(prompts), what="responses", says_end=False)

    def draw(self, rows: Sequence[int]) -> list[float]:
        """The random numbers of the next tokens, in [0, 1)."""
        return [self.random[row].random() for row in rows]

    def add(self, rows: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Draw a token for each row; returns the indices of the rows that continue."""
        if min(tokens) < 0:
            raise UserError("the model's logits are not finite; float16 may overflow where bfloat16 does not")
        going_on = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            sampled = self.sampled[row]
            sampled.append(token)
            if token in self.ends:
                self.reasons[row] = "eos"
            elif self.stops.complete(self.leads[row], sampled):
                self.reasons[row] = "stop"
            elif len(sampled) < self.limits[row]:
                going_on.append(place)
                continue
            self.meter.advance()
        return going_on

    def longest(self, rows: Sequence[int]) -> int:
        """Number of tokens of the longest row, prompt included."""
        return max(len(self.prompts[row]) + len(self.sampled[row]) for row in rows)

    def generations(self) -> list[Generation]:
        """The results of all rows, which have ended."""
        return [
            Generation(tokens, self.stops.text(lead, tokens, reason), reason)
            for lead, tokens, reason in zip(self.leads, self.sampled, self.reasons, strict=True)
        ]


class _Waiting:
    """The rows that wait to be sampled, longest prompts first, and the rule that admits them.

    Attributes:
        least: number of free slots at which rows are admitted.
    """

    def __init__(self, lengths: Sequence[int], slots: int, refill: float) -> None:
        self.rows = deque(chain(*batches(lengths, slots)))
        self.slots, self.least = slots, min(slots, max(1, math.ceil(refill * slots)))

    @property
    def refills(self) -> bool:
        """Whether rows may join others."""
        return self.least < self.slots

    def drain(self) -> None:
        """From now on, admit rows only when all slots are free."""
        self.least = self.slots

    def ready(self, running: int) -> bool:
        """Whether to admit rows to a batch of this size."""
        # The last rows need not wait for more free slots than they will fill.
        least = min(self.least, len(self.rows)) if self.refills else self.slots
        return bool(self.rows) and self.slots - running >= least

    def admit(self, running: int) -> list[int]:
        """The rows that may join a batch of this size, even if they are fewer than `least`."""
        free = 0 if running and not self.refills else self.slots - running
        return [self.rows.popleft() for _ in range(min(free, len(self.rows)))]


@dataclass(slots=True)
class _Rows:
    """Rows that are sampled together: the input of the model's next call, and the cache of earlier calls.

    Attributes:
        rows: indices in the list of prompts; may be empty: then a call's logits are meaningless.
        ids: int64, [rows, tokens to read]; likewise `positions`.
        mask: int64, [rows, tokens in the cache plus tokens to read].
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    cache: Any = None

    @classmethod
    def begin(cls, prompts: Mapping[int, Sequence[int]], device: torch.device | str) -> Self:
        """Rows that have not read their prompts yet."""
        ids, mask = (tensor.to(device) for tensor in left_pad(list(prompts.values()) or [[0]]))
        return cls(list(prompts), ids, mask, position_ids(mask))

    def call(self, model: nn.Module) -> Tensor:
        """Logits of the next tokens, [rows, vocabulary]."""
        output = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values if self.rows else None
        logits: Tensor = output.logits[:, -1]
        return logits

    def advance(self, drawn: Tensor, keep: Sequence[int]) -> Self:
        """Continue with the drawn tokens (int64, [rows]) of the rows to keep, at least one."""
        self.ids, self.positions = drawn[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        if len(keep) < len(self.rows):
            # The last rows move to the places of those that ended, so the others need not be copied.
            kept, last = set(keep), [place for place in keep if place >= len(keep)]
            places = [place if place in kept else last.pop() for place in range(len(keep))]
            caches.keep_rows(self.cache, places, drawn.device)
            self.ids, self.positions, self.mask = self.ids[places], self.positions[places], self.mask[places]
            self.rows = [self.rows[place] for place in places]
        return self

    def join(self, others: Self) -> Self:
        """Join these rows and others in one cache. Each row is about to read one token."""
        if not self.rows or not others.rows:
            return self if self.rows else others
        self.mask = caches.join_masks(self.mask, others.mask)
        caches.join_rows(self.cache, others.cache)
        self.ids = torch.cat([self.ids, others.ids])
        self.positions = torch.cat([self.positions, others.positions])
        self.rows += others.rows
        return self

    def cut_padding(self, longest: int) -> None:
        """Remove the padding that all rows share, given the length of the longest row."""
        surplus = self.mask.shape[1] - longest
        if surplus:
            caches.cut_padding(self.cache, surplus)
            self.mask = self.mask[:, surplus:]


@cache
def _say_that_batches_drain(model: str) -> None:
    """Log this once per model class."""
    log.info(
        "%s: its caches cannot be joined: each batch of prompts waits until the whole previous batch has ended",
        model,
    )


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token per row by inverting the cumulative distribution, in vocabulary order.

    The probabilities are rounded down to multiples of 2**-48. Sums are therefore exact in any order, the ends of the
    distribution need no special care, and a token of probability zero is never drawn.

    Args:
        logits: any float dtype, shape [rows, vocabulary].
        uniforms: float64, shape [rows], in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: see `generate`.

    Returns:
        int64, shape [rows]; -1 if the largest logit is not finite.
    """
    logits = logits.double()
    finite = logits.amax(dim=-1).isfinite()
    if temperature == 0:
        return torch.where(finite, logits.argmax(dim=-1), -1)
    weights = (torch.softmax(logits / temperature, dim=-1) * _UNIT).long()
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum((uniforms[:, None] * total).long(), total - 1)
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return torch.where(finite, tokens, -1)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Keep the largest weights that together reach a share of `top_p`, zero the rest (int64, [rows, vocabulary])."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered * (before < top_p * weights.sum(dim=-1, keepdim=True))
    return torch.zeros_like(weights).scatter(-1, order, kept)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: those of the tokenizer and of the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return {token for token in [tokenizer.eos_token_id, *more] if token is not None}


def without_thinking(
    tokenizer: PreTrainedTokenizerBase, generation: Generation, markers: tuple[str, str] | None, *, begun: bool
) -> tuple[str, bool]:
    """The text of a response without its thinking (see `text.cut_thinking`).

    Args:
        tokenizer: the model's tokenizer.
        generation: the response.
        markers: that open and close thinking, as text and as special tokens, which `generation.text` lacks; None cuts
            nothing.
        begun: whether the prompt ends inside a thinking section (`encoding.begins_thinking`).

    Returns:
        The text, and whether anything was cut.
    """
    if markers is None:
        return generation.text, False
    text, tokens = generation.text, generation.tokens
    if generation.finish_reason == "eos":
        tokens = tokens[:-1]
    special = encoding.special_tokens(tokenizer)
    names = {token: name for name, token in special.items() if name and any(name in marker for marker in markers)}
    put_back = names.keys() & set(tokens)
    if put_back:
        # Put special tokens of markers back in place. The end, with a stop string, stays cut off.
        parts: list[list[int]] = [[]]
        marks: list[str] = []
        for token in tokens:
            if token in names:
                marks.append(names[token])
                parts.append([])
            else:
                parts[-1].append(token)
        *texts, last = [_decode(tokenizer, part) for part in parts]
        surplus = len(_decode(tokenizer, tokens)) - len(text)
        last = last[: max(0, len(last) - surplus)]
        text = "".join(part + mark for part, mark in zip(texts, marks, strict=True)) + last
    cut = cut_thinking(f"{markers[0]}{text}" if begun else text, *markers)
    was_cut = begun or cut != text
    for token in put_back:  # markers outside the cut part
        cut = cut.replace(names[token], "")
    return cut, was_cut


def tokens_of_beginning(
    tokenizer: PreTrainedTokenizerBase,
    generation: Generation,
    beginning: str,
    markers: tuple[str, str] | None,
    *,
    begun: bool,
) -> list[int]:
    """The fewest initial tokens of a response that cover a beginning of its text and all thinking before; at least one.

    Args:
        tokenizer: the model's tokenizer.
        generation: the response.
        beginning: a beginning of its text without thinking.
        markers: as for `without_thinking`; likewise `begun`.
    """

    def holds(count: int) -> bool:
        tokens = generation.tokens[:count]
        part = Generation(tokens, _decode(tokenizer, tokens), "length")
        return without_thinking(tokenizer, part, markers, begun=begun)[0].startswith(beginning)

    counts = range(1, len(generation.tokens))
    return generation.tokens[: 1 + bisect_left(counts, True, key=holds)]


class StopStrings:
    """Finds stop strings in tokens. Decodes only when a stop string may have been completed.

    A text has no special tokens. Therefore a stop string that names one is also looked for around that token: its part
    before the token must end the text before the token, and the rest must begin at the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.last = {string[-1] for string in self.stop}
        # A token has at least one byte; the first character of a tail may be broken, which takes up to 3 more.
        self.reach = max((len(string.encode()) for string in self.stop), default=0) + 3
        self.completing: dict[int, bool] = {}
        self.special: dict[int, list[tuple[str, str]]] = {}  # token -> the stop string before it, and from it on
        for string in self.stop:
            if found := encoding.first_special_token(tokenizer, string):
                token, place = found
                self.special.setdefault(token, []).append((string[:place], string[place:]))

    def lead(self, prompt: Sequence[int]) -> str:
        """The end of a prompt, where a stop string may begin."""
        return self._decode(prompt[-self.reach :]) if self.stop else ""

    def complete(self, lead: str, tokens: Sequence[int]) -> bool:
        """Whether the last of the tokens has completed a stop string."""
        if not self._can_complete(tokens[-1]):
            return False
        tail = self._decode(tokens[-self.reach :])
        if self._find(lead if len(tokens) <= self.reach else "", tail) is not None:
            return True
        return self._find_special(lead, tokens) is not None

    def text(self, lead: str, tokens: Sequence[int], reason: FinishReason) -> str:
        """Text of a finished response."""
        text = self._decode(tokens[:-1] if reason == "eos" else tokens)
        if reason != "stop":
            return text
        before = self._find_special(lead, tokens)
        return min((text[: self._find(lead, text)], *([] if before is None else [before])), key=len)

    def _find(self, lead: str, text: str) -> int | None:
        """Position in `text` of the first stop string; also 0 if it begins in `lead` and ends in `text`."""
        places = []
        for string in self.stop:
            before = lead[max(0, len(lead) - len(string) + 1) :]
            place = (before + text).find(string)
            if place >= 0:
                places.append(max(0, place - len(before)))
        return min(places, default=None)

    def _find_special(self, lead: str, tokens: Sequence[int]) -> str | None:
        """The text before the first stop string that names a special token among the last tokens."""
        for place in range(max(0, len(tokens) - self.reach), len(tokens)):
            for before, rest in self.special.get(tokens[place], ()):
                text = self._decode(tokens[:place])
                ends = self._decode(tokens[place:], skip_special_tokens=False)
                if (lead + text).endswith(before) and ends.startswith(rest):
                    return text[: max(0, len(text) - len(before))]
        return None

    def _can_complete(self, token: int) -> bool:
        """Whether a token may hold the last character of a stop string. Cached, because most tokens recur."""
        if token not in self.completing:
            piece = self._decode([token], skip_special_tokens=False)
            # Part of a character decodes to U+FFFD alone; a leading space may be stripped.
            self.completing[token] = token in self.special or (
                bool(self.last) and (not self.last.isdisjoint(piece) or "\ufffd" in piece or " " in self.last)
            )
        return self.completing[token]

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens, as `_decode` makes it."""
        return _decode(self.tokenizer, tokens, skip_special_tokens=skip_special_tokens)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Text of tokens, unmodified: special tokens only on demand, no cleaned-up spaces."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text
