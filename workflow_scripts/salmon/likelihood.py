"""The probabilities of answers under a model.

The logits of a long answer under a large vocabulary take more memory than everything else. Therefore the layers are
computed for the whole text, but the output layer only for the answers' tokens, some at a time. If a gradient is needed,
the backward pass computes these logits again instead of keeping them.
"""

import logging
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from salmon import batching, ppo_math

log = logging.getLogger(__name__)

LOGITS = 2**24
"""Logits at a time: 64 MiB in float32."""
PER_LOGIT = 5 * 4
"""Bytes per logit, including everything computed from it and its gradient."""
APART = 1e-3
"""How far logits may be from those of the whole model, as a share of the largest, if the output layer is called
separately. In bfloat16, different shapes of the same sums add rounding."""
_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Result(BaseModelOutputWithPast):
    """The layers' result, without the other fields that an architecture may ask for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Known(nn.Module):
    """Replaces a model's layers when their result is known. It has their settings."""

    def __init__(self, layers: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.states = states
        object.__setattr__(self, "layers", layers)  # not as a submodule

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        """The known result."""
        return _Result(last_hidden_state=self.states)

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else getattr(self.layers, name)  # OPT calls its layers' own layers


def answer_logprobs(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    *,
    most: int = 0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log probability of each answer token after its prompt, and the entropies of the distributions.

    Args:
        model: a causal language model, or LoRA on one.
        prompts: token ids, B lists with at least one each.
        answers: likewise.
        temperature: the logits are divided by it.
        most: number of answer tokens on the rank that has most: all ranks call the output layer equally often, which
            ZeRO-3 requires.
        with_entropy: whether entropies are computed.

    Returns:
        float32 [B, R] on the model's device, R the longest answer, 0 after the others; the entropies likewise, without
        gradient, or None.
    """
    causal: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    tokens = batching.right_pad([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    tokens = tokens.to(causal.device)
    lengths = [len(answer) for answer in answers]
    pairs = enumerate(zip(prompts, lengths, strict=True))
    before = [(row, len(prompt) - 1 + step) for row, (prompt, length) in pairs for step in range(length)]
    rows, columns = torch.tensor(before, device=tokens.device).T  # positions before answer tokens
    drawn = torch.tensor([*chain.from_iterable(answers)], device=tokens.device)

    def read(states: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        return ppo_math.token_logprobs(logits_of(causal, states), drawn, temperature, with_entropy=with_entropy)

    # The same trial on all ranks, so that all of them decide alike: ZeRO-3 gathers weights at each call.
    if has_apart(causal, torch.arange(2, device=tokens.device)[None]):
        states = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state[rows, columns]
        count = math.ceil(max(len(drawn), most) * causal.config.get_text_config().vocab_size / LOGITS)
        again = count > 1 and torch.is_grad_enabled()
        # Shapes are not compared: ZeRO-3 has released the output layer's weights by then, and gathers them again.
        options: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}
        pieces = [
            checkpoint(read, *piece, **options) if again else read(*piece)
            for piece in zip(states.tensor_split(count), drawn.tensor_split(count), strict=True)
        ]
    else:
        first = min(map(len, prompts)) - 1  # the first position whose logits are read
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tokens.shape[1] - first).logits
        logits = logits[rows, columns - (tokens.shape[1] - logits.shape[1])]
        pieces = [ppo_math.token_logprobs(logits, drawn, temperature, with_entropy=with_entropy)]
    logprobs, *entropies = (
        pad_sequence(list(torch.cat(each).split(lengths)), batch_first=True)
        for each in zip(*pieces, strict=True)
        if each[0] is not None
    )
    return logprobs, entropies[0] if entropies else None


def logits_of(causal: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits of hidden states, [N, H] to [N, V], including the architecture's factors and caps.

    This is the model's own forward pass, with the layers replaced by their result.
    """
    name = causal.base_model_prefix
    layers = getattr(causal, name)
    setattr(causal, name, _Known(layers, states.unsqueeze(0)))
    try:
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        logits: Tensor = causal.forward(input_ids=ids, use_cache=False).logits[0]
    finally:
        setattr(causal, name, layers)
    return logits


@torch.no_grad()
def has_apart(causal: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the output layer can be called separately (`logits_of`); determined once per model.

    Args:
        causal: a causal language model.
        tokens: tokens for the trial, [B, T].
    """
    if causal not in _apart:
        whole = causal(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
        try:
            states = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            away = (logits_of(causal, states).float() - whole).abs().max().item()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model with remote code may raise anything
            log.debug("%s: %s", type(causal).__name__, error)
            away = math.inf
        bound = max(APART, 8 * torch.finfo(causal.dtype).eps) * max(1.0, whole.abs().max().item())
        _apart[causal] = away <= bound
        if not _apart[causal]:
            log.info("%s: keeping all logits of a pass at once", type(causal).__name__)
    return _apart[causal]


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """Log probability of each answer after its prompt, the sum over its tokens.

    Args:
        model: a causal language model, in eval mode.
        prompts: token ids, N lists.
        answers: token ids as they were sampled, N lists, which may be empty.
        temperature: the logits are divided by it.
        batch_size: answers at a time; only speed and memory depend on it.

    Returns:
        [N], 0 for an empty answer.
    """
    sums = np.zeros(len(answers))
    rows = [row for row, answer in enumerate(answers) if answer]
    lengths = [len(prompts[row]) + len(answers[row]) for row in rows]
    for batch in batching.batches(lengths, batch_size):
        chosen = [rows[index] for index in batch]
        values, _ = answer_logprobs(
            model, [prompts[row] for row in chosen], [answers[row] for row in chosen], temperature
        )
        sums[chosen] = values.double().sum(1).cpu().numpy()
    return sums
