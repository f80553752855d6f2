"""How probable answers are under a model."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from salmon import batching, ppo_math


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
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
    device = next(model.parameters()).device
    rows = [row for row, answer in enumerate(answers) if answer]
    lengths = [len(prompts[row]) + len(answers[row]) for row in rows]
    for batch in batching.batches(lengths, batch_size):
        chosen = [rows[index] for index in batch]
        ids, mask = batching.left_pad([[*prompts[row], *answers[row]] for row in chosen])
        width = max(len(answers[row]) for row in chosen)
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=batching.position_ids(mask).to(device),
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits[:, :-1]
        values, _ = ppo_math.token_logprobs(logits, ids[:, -width:].to(device), temperature)
        for row, line in zip(chosen, values, strict=True):
            sums[row] = float(line[width - len(answers[row]) :].double().sum())
    return sums
