"""The interface between stages and sampling engines: `Sampler` and its implementations.

The stages ask a sampler for responses to prompts, each with its own seed, and never call a model's generation
themselves: no other module imports `generation`. `TransformersSampler`, our own loop, is the reference. Another engine
is another class here.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from salmon.generation import REFILL, Generation, Ranks, Watch, generate, replay, tokens_of_beginning, without_thinking

__all__ = [
    "Generation",
    "Ranks",
    "Sampler",
    "TransformersSampler",
    "Watch",
    "replay",
    "tokens_of_beginning",
    "without_thinking",
]


class Sampler(Protocol):
    """Samples responses from the model of the last `sync`."""

    def sync(self, policy: nn.Module) -> None:
        """From now on, sample from this policy in its present state. All ranks call this.

        Args:
            policy: a causal language model, which the caller keeps active until the next `sync`. In RL it is a
                `SharedBase` with the policy's adapter active; a separate engine takes its adapter from there.
        """

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Sample one response per prompt.

        The draws of a row depend on its prompt, seed and limit, and not on the rows around it, as far as the engine's
        arithmetic gives equal logits.

        Args:
            prompts: token ids, at least one per prompt, special tokens included; the list may be empty.
            seeds: one per prompt, 0 or more.
            max_new_tokens: at least 1 for each prompt.
            temperature: logits are divided by it; 0 takes the most probable token.
            top_p: keeps the most probable tokens that together reach this probability, at least one.
            stop: strings that end a response. One may begin with the last characters of the prompt.

        Returns:
            One generation per prompt, in order: the tokens as sampled, the text up to the stop string, the reason for
            its end, and the log probability of each token if the engine returns it.

        Raises:
            UserError: if the model's logits are not finite, or the engine fails.
        """


class TransformersSampler:
    """Samples with our own loop around a transformers model (`generation.generate`).

    Args:
        tokenizer: the model's tokenizer.
        device: the model's device.
        batch_size: prompts sampled at once; only speed and memory depend on it.
        ranks: how the ranks work together (see `generate`).
        refill: share of the batch that must be free before the next prompts are read; 1 for one batch after another.
        model: the model until the first `sync`.
        watch: receives tokens as they are drawn (see `generate`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str,
        *,
        batch_size: int,
        ranks: Ranks = "apart",
        refill: float = REFILL,
        model: nn.Module | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.batch_size = batch_size
        self.ranks = ranks
        self.refill = refill
        self.model = model
        self.watch = watch

    def sync(self, policy: nn.Module) -> None:
        """See `Sampler`; the policy's weights are used in place."""
        self.model = policy

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """See `Sampler`."""
        if self.model is None:
            raise ValueError("there is no model to sample from yet; call sync")
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            seeds,
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            device=self.device,
            ranks=self.ranks,
            refill=self.refill,
            watch=self.watch,
        )
