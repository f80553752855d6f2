"""The judge's computation: the margin between two option tokens after each of many prompts that share a beginning.

If this is right for a model, the prompts of a group become one row, in which each tail sees the common head and
itself:

    | padding | head: instruction, output (a), output (b) | tail of principle 1 | tail of principle 2 | ...
                                                        logits a, b ^         logits a, b ^

The head is found in the tokens, so any template works; one that ends with the principle is fast. Neither the
head's cache nor its computation is repeated, so memory grows little with the number of principles.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from salmon.batching import batches, left_pad, position_ids, select_rows

Way = Literal["packed", "shared", "whole"]
"""Ways to compute the prompts of a pair, the fastest first.

`packed`: as above. Needs attention that respects a mask and positions for each token: not sliding windows shorter than
a prompt, recurrent or convolution layers, or ALiBi. `shared`: the head's cache is computed once and repeated for each
tail. `whole`: each prompt separately, in batches by length; right wherever padded batches are.
"""


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
        prompts: token ids, shape [groups, members, any length above 0]; the prompts of a group share a beginning.
        options: token ids of a and b.
        device: the model's device.
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
    """Inside the block, compute the options' logits in float32 from the last hidden states; yields their indices.

    In bfloat16 a logit of 16 to 32 has steps of 0.125, so many margins would be ties. A plain output layer gives only
    the options' logits; one with LoRA, or divided among GPUs, gives all of them.
    """
    output = output_layer(model)
    dtypes = set() if output is None else {parameter.dtype for parameter in output.parameters()}
    if dtypes.isdisjoint((torch.bfloat16, torch.float16)):
        yield options
        return
    if type(output) is nn.Linear:
        weight = output.weight[options].float()
        bias = None if output.bias is None else output.bias[options].float()
        places = list(range(len(options)))
        hook = output.register_forward_hook(lambda _, inputs, __: nn.functional.linear(inputs[0].float(), weight, bias))
    else:
        places = options
        hook = _in_float32(output)
    try:
        yield places
    finally:
        hook.remove()


def _in_float32(layer: nn.Module) -> RemovableHandle:
    """Make a layer of any class compute in float32, whatever the dtype of its weights, until the handle is removed."""
    weights = {name: parameter.float() for name, parameter in layer.named_parameters()}
    is_inside = False

    def compute_again(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> Tensor | None:
        nonlocal is_inside
        if is_inside:  # called by the call below
            return None
        is_inside = True
        try:
            found: Tensor = functional_call(layer, weights, (inputs[0].float(), *inputs[1:]))
            return found
        finally:
            is_inside = False

    return layer.register_forward_hook(compute_again)


def output_layer(model: nn.Module) -> Any:
    """The layer that turns hidden states into logits, with or without adapters around the model; None if unknown."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _packed_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    options: list[int],
    device: torch.device | str,
) -> Tensor:
    """Logits of the options, [groups, members, options]: tails after their common head in one row."""
    groups, members = len(prompts), len(prompts[0])
    shared = [common_prefix(group) for group in prompts]
    heads, head_mask = left_pad([group[0][:length] for group, length in zip(prompts, shared, strict=True)])
    cache = prefill(model, heads, head_mask, device) if max(shared) > 0 else None
    # Tails of equal width, one after another in a row, so their last tokens are at the same places in every row.
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
    """The same with one row for each tail, after a copy of its group's head; one group at a time.

    Tails are padded on the right, because recurrent and convolution layers, and windows, continue from the head's end.
    """
    rows = []
    for group in prompts:
        shared = common_prefix(group)
        if shared == 0:
            rows.append(_whole_logits(model, [group], options, device)[0])
            continue
        heads = torch.tensor([group[0][:shared]])
        cache = prefill(model, heads, torch.ones_like(heads), device)
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
    """The same with every prompt from its beginning, as many at a time as there are groups, the longest first."""
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


def prefill(model: nn.Module, ids: Tensor, mask: Tensor, device: torch.device | str) -> Cache:
    """The cache after these tokens, which are padded on the left."""
    cache: Cache = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=position_ids(mask).to(device),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    return cache


def tail_attention(head_mask: Tensor, tail_mask: Tensor) -> Tensor:
    """The attention mask of tail tokens: they see the head of their group, and their own tail up to themselves.

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
    first, last = min(sequences), max(sequences)  # all share what these two share
    limit = min(map(len, sequences)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)
