"""Sampling from a language model, in batches, with randomness that belongs to the row.

What is guaranteed. A row's random numbers depend on its seed alone: not on the batch it is in, its place in
it, the shard, the rank or the device. The same batch on the same machine gives the same tokens, byte for byte.
In another batch, or on other hardware, the logits differ in their last bits, because the order of summation
in a batched matrix product does; then a row keeps its tokens except where a random number falls within that
rounding of the border between two tokens (in float32 about one token in a million, in bfloat16 more often).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from salmon import batching, distributed, encoding
from salmon.batching import left_pad, position_ids
from salmon.errors import UserError
from salmon.text import cut_thinking

FinishReason = Literal["eos", "stop", "length"]
Ranks = Literal["apart", "together", "lockstep"]

_UNIT = 2.0**48  # probabilities become integers in this unit, so that their sums are exact


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model sampled after a prompt.

    Attributes:
        tokens: as sampled, with the end token or the tokens that made up the stop string at the end.
        text: without special tokens, cut before the stop string.
        finish_reason: `eos` the model ended its turn, `stop` a stop string appeared, `length` no room was left.
        logprobs: log probability of each token under the distribution it was drawn from, in nats; None where the
            engine does not tell.
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
    max_new_tokens: int | Sequence[int],
    temperature: float,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    device: torch.device | str,
    ranks: Ranks = "apart",
) -> list[Generation]:
    """Sample one response a prompt; all prompts are one batch.

    A stop string must appear as a whole; it may begin with the line break that ends the prompt, so that the
    user's turn marker also ends a response that consists of nothing else. Finished rows leave the batch.

    Args:
        model: causal language model in eval mode, with or without adapters, quantised or not.
        tokenizer: of the model; names the end token (the model's generation config may name more).
        prompts: token ids, at least one a prompt, special tokens included.
        seeds: one a prompt, 0 or more; see the guarantee above.
        max_new_tokens: at least 1; for all rows, or one a row.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: the most probable tokens that together reach this probability are kept, at least one.
        stop: strings that end a response.
        device: where the model is.
        ranks: `apart` this rank samples for itself. `together` all ranks hold parts of one model and sample the same
            rows; what rank 0 draws counts. `lockstep` each rank has rows of its own, but all call the model equally
            often, because it is gathered from all at each call (ZeRO-3); `max_new_tokens` is the same on all.

    Returns:
        One generation a prompt, in their order.

    Raises:
        UserError: where the model's logits are not finite.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not len(prompts) == len(seeds) == len(limits):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(limits)} limits")
    if model.training:
        raise ValueError("the model is in training mode, which may drop units and the cache; call model.eval()")
    if not prompts:
        return []
    if min(limits) < 1 or not all(prompts):
        raise ValueError("a prompt has no token, or no room for one more")

    ends = end_tokens(model, tokenizer)
    stops = StopStrings(tokenizer, stop)
    leads = [stops.lead(prompt) for prompt in prompts]
    uniforms = torch.from_numpy(np.stack([np.random.default_rng(seed).random(max(limits)) for seed in seeds]))
    uniforms = uniforms.to(device)
    sampled: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)

    rows = list(range(len(prompts)))  # of the batch, as places in `prompts`
    ids, mask = (tensor.to(device) for tensor in left_pad(prompts))
    positions = position_ids(mask)
    cache = None
    for step in range(max(limits)):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        # Without rows of its own left, a rank only keeps step: it repeats the last token, and reads nothing.
        drawn = sample_tokens(output.logits[:, -1], uniforms[rows, step], temperature, top_p) if rows else ids[:, 0]
        drawn = distributed.from_main(drawn) if ranks == "together" else drawn
        keep = []
        for place, (row, token) in enumerate(zip(rows, drawn[: len(rows)].tolist(), strict=True)):
            if token < 0:
                raise UserError("the model's logits are not finite; float16 overflows where bfloat16 does not")
            sampled[row].append(token)
            if token in ends:
                reasons[row] = "eos"
            elif stops.complete(leads[row], sampled[row]):
                reasons[row] = "stop"
            elif len(sampled[row]) < limits[row]:
                keep.append(place)
        if distributed.all_true(not keep, device) if ranks == "lockstep" else not keep:
            break
        ids, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if len(keep) < len(rows):
            # One copy of the cache, no more than a step makes of it anyway; every later step is cheaper.
            kept = torch.tensor(keep or [0], device=device)
            batching.select_rows(cache, kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            rows = [rows[place] for place in keep]
    return [
        Generation(tokens, stops.text(lead, tokens, reason), reason)
        for lead, tokens, reason in zip(leads, sampled, reasons, strict=True)
    ]


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution, in the order of the vocabulary.

    The probabilities are rounded down to multiples of 2**-48, so that sums are exact in any order, the ends of
    the distribution need no care, and a token of probability zero is never drawn.

    Args:
        logits: any float dtype, shape [rows, vocabulary].
        uniforms: float64, shape [rows], in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: see `generate`.

    Returns:
        int64, shape [rows]; -1 where the largest logit is not finite.
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
    """Token ids that end a response: the tokenizer's, and those of the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return {token for token in [tokenizer.eos_token_id, *more] if token is not None}


def without_thinking(
    tokenizer: PreTrainedTokenizerBase, generation: Generation, markers: tuple[str, str] | None, *, begun: bool
) -> tuple[str, bool]:
    """The text of a response without its thinking (see `text.cut_thinking`).

    Args:
        tokenizer: of the model.
        generation: what was sampled.
        markers: that open and close thinking, of text and of special tokens, which `generation.text` lacks; None cuts
            nothing.
        begun: whether the prompt ends inside of thinking (`encoding.begins_thinking`).

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
        # Special tokens of markers are put back where they stood; the end, with a stop string, is cut off as it was.
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
    for token in put_back:  # those that stood elsewhere
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
    """The fewest first tokens of a response that hold the beginning of its text, and all thinking before; at least one.

    Args:
        tokenizer: of the model.
        generation: what was sampled.
        beginning: of its text without thinking.
        markers: as for `without_thinking`; likewise `begun`.
    """

    def holds(count: int) -> bool:
        tokens = generation.tokens[:count]
        part = Generation(tokens, _decode(tokenizer, tokens), "length")
        return without_thinking(tokenizer, part, markers, begun=begun)[0].startswith(beginning)

    counts = range(1, len(generation.tokens))
    return generation.tokens[: 1 + bisect_left(counts, True, key=holds)]


class StopStrings:
    """Finds stop strings in tokens, decoding only where one can have been completed.

    A text has no special tokens. So a stop string that names one is also looked for around that token: what stands
    before it in the stop string ends the text before the token, and the rest begins at the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        self.last = {string[-1] for string in self.stop}
        # A token holds a byte at least; the first character of a tail may be broken, which takes up to 3 more.
        self.reach = max((len(string.encode()) for string in self.stop), default=0) + 3
        self.completing: dict[int, bool] = {}
        self.special: dict[int, list[tuple[str, str]]] = {}  # token -> the stop string before it, and from it on
        for string in self.stop:
            if found := encoding.first_special_token(tokenizer, string):
                token, place = found
                self.special.setdefault(token, []).append((string[:place], string[place:]))

    def lead(self, prompt: Sequence[int]) -> str:
        """The end of a prompt, in which a stop string may begin."""
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
        """Where in `text` the first stop string begins; 0 also where it begins in `lead` and ends in `text`."""
        places = []
        for string in self.stop:
            before = lead[max(0, len(lead) - len(string) + 1) :]
            place = (before + text).find(string)
            if place >= 0:
                places.append(max(0, place - len(before)))
        return min(places, default=None)

    def _find_special(self, lead: str, tokens: Sequence[int]) -> str | None:
        """The text before the first stop string that names a special token, which is one of the last tokens."""
        for place in range(max(0, len(tokens) - self.reach), len(tokens)):
            for before, rest in self.special.get(tokens[place], ()):
                text = self._decode(tokens[:place])
                ends = self._decode(tokens[place:], skip_special_tokens=False)
                if (lead + text).endswith(before) and ends.startswith(rest):
                    return text[: max(0, len(text) - len(before))]
        return None

    def _can_complete(self, token: int) -> bool:
        """Whether a token may hold the last character of a stop string; remembered, most tokens come often."""
        if token not in self.completing:
            piece = self._decode([token], skip_special_tokens=False)
            # A part of a character decodes to U+FFFD alone; a space at the beginning may be stripped.
            self.completing[token] = token in self.special or (
                bool(self.last) and (not self.last.isdisjoint(piece) or "\ufffd" in piece or " " in self.last)
            )
        return self.completing[token]

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens, as `_decode` makes it."""
        return _decode(self.tokenizer, tokens, skip_special_tokens=skip_special_tokens)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Text of tokens as they stand: no special tokens but on demand, no beautified spaces."""
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text
