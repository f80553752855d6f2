"""How probable answers are under a model.

The logits of a long answer under a large vocabulary take more memory than all else. So the layers are computed for the
whole text, and the output layer for the answers' tokens alone, some at a time; where a gradient is wanted, their logits
are computed once more in the backward pass instead of kept.
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
"""Bytes that a logit takes with all that is computed from it, its gradient included."""
APART = 1e-3
"""How far logits may be from those of the whole model, as a share of the largest, where the output layer is called for
itself; between two shapes of the same sums, bfloat16 has its rounding on top."""
_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Result(BaseModelOutputWithPast):
    """What layers give, and nothing else of it, whatever the architecture asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Known(nn.Module):
    """In the place of a model's layers, when their result is known; it has their settings."""

    def __init__(self, layers: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.states = states
        object.__setattr__(self, "layers", layers)  # not a module of this one

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        """What is known."""
        return _Result(last_hidden_state=self.states)

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else getattr(self.layers, name)  # OPT calls its layers' layers


def answer_logprobs(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    *,
    most: int = 0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log probability of each token of answers after their prompts, and the entropies of what they were drawn from.

    Args:
        model: a causal language model, or LoRA on one.
        prompts: token ids, B lists of one at least.
        answers: likewise.
        temperature: the logits are divided by it.
        most: tokens of all answers on the rank that has most of them: ranks call the output layer equally often, which
            ZeRO-3 needs.
        with_entropy: whether entropies are computed.

    Returns:
        float32 [B, R] on the model's device, R the longest answer, 0 behind the others; the entropies likewise, without
        gradient, or None.
    """
    causal: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    tokens = batching.right_pad([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    tokens = tokens.to(causal.device)
    lengths = [len(answer) for answer in answers]
    pairs = enumerate(zip(prompts, lengths, strict=True))
    before = [(row, len(prompt) - 1 + step) for row, (prompt, length) in pairs for step in range(length)]
    rows, columns = torch.tensor(before, device=tokens.device).T  # of the tokens whose next one is an answer's
    drawn = torch.tensor([*chain.from_iterable(answers)], device=tokens.device)

    def read(states: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        return ppo_math.token_logprobs(logits_of(causal, states), drawn, temperature, with_entropy=with_entropy)

    if has_apart(causal, tokens[:1, :2]):
        states = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state[rows, columns]
        count = math.ceil(max(len(drawn), most) * causal.config.get_text_config().vocab_size / LOGITS)
        again = count > 1 and torch.is_grad_enabled()
        # Shapes are not compared: ZeRO-3 has given away the output layer's weights by then, and gathers them once more.
        options: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}
        pieces = [
            checkpoint(read, *piece, **options) if again else read(*piece)
            for piece in zip(states.tensor_split(count), drawn.tensor_split(count), strict=True)
        ]
    else:
        first = min(map(len, prompts)) - 1  # whose logits are read
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
    """Logits of hidden states, [N, H] to [N, V], with all that the architecture does to them: factors, caps.

    That is the model's own forward pass, with its layers' result in their place.
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
    """Whether the output layer can be called for itself (`logits_of`); found out once per model.

    Args:
        causal: a causal language model.
        tokens: to try it with, [B, T].
    """
    if causal not in _apart:
        whole = causal(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
        try:
            states = causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            away = (logits_of(causal, states).float() - whole).abs().max().item()
        except Exception as error:  # whatever a model of remote code raises
            log.debug("%s: %s", type(causal).__name__, error)
            away = math.inf
        bound = max(APART, 8 * torch.finfo(causal.dtype).eps) * max(1.0, whole.abs().max().item())
        _apart[causal] = away <= bound
        if not _apart[causal]:
            log.info("%s: all logits of a pass are kept at once", type(causal).__name__)
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
        prompts: token ids, N lists; `answers` likewise, those as they were sampled, which may be empty.
        answers: likewise.
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
