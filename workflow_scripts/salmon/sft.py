"""Supervised fine-tuning of the initial policy: its texts, its loss, its fit to held-out answers.

Training uses the texts of sampling: the policy's prompt, token by token (`encoding.encode_prompt`), then the answer
that the policy should give. A row of a batch:

    p p p p p p a a a a a e e . . .      p  prompt     a  answer     e  its end     .  padding (right)
                0 0 0 0 0 0 0            the loss is over these tokens, each predicted from those before it

In sampling and in RL, an answer ends with an end token or a stop string, whichever comes first. Therefore the trained
end is only one of them, because a second one would never be sampled:

- with a template file: the user's turn marker (the first of `policy_prompt.stop`) after a blank line, as in the data of
  the authors; or the end token, if there is no stop string;
- with a chat template: the text that it puts after an answer, up to its first special token or stop string.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from salmon.config import PolicyPrompt
from salmon.encoding import (
    begins_thinking,
    encode_prompt,
    first_special_token,
    guard,
    prompt_text,
    read_preamble,
    render,
    tokens_and_ends,
)
from salmon.errors import UserError
from salmon.text import cut_at_markers

NAME = "SFT"  # name of the draws: the split and the order of the examples
IGNORED = -100
"""The label of a token that is not trained on, in torch and transformers."""
_QUESTION, _ANSWER = "Is it so?", "So."
Text = tuple[str, str, bool]
"""Instruction with its input, answer, and whether the answer is complete."""


class Frame(NamedTuple):
    """The text around an answer, special tokens written out."""

    before: str
    end: str


class Example(NamedTuple):
    """One text to train on.

    Attributes:
        tokens: tokens of prompt, answer and end, int32.
        prompt: number of prompt tokens.
        end: number of end tokens; 0 if the answer was cut off, or if a (slow) tokenizer gives no positions.
        is_cut: whether the text was too long.
    """

    tokens: NDArray[np.int32]
    prompt: int
    end: int
    is_cut: bool


def frame(tokenizer: PreTrainedTokenizerBase, prompt: PolicyPrompt) -> Frame:
    """The text around an answer that the policy learns.

    Raises:
        UserError: if a chat template does not show how an answer ends, or begins it with thinking.
    """
    if not prompt.is_chat:
        if not prompt.stop:
            return Frame("", str(tokenizer.eos_token))
        marker = prompt.stop[0]
        # A blank line separates turns, as in `templates.policy_prompt`.
        return Frame("", f"\n{marker}" if marker.startswith("\n") and not marker.startswith("\n\n") else marker)
    if begins_thinking(tokenizer, prompt, ""):
        raise UserError(
            "the tokenizer's chat template begins every answer with thinking, which the examples lack: set the "
            "variable that turns it off in policy_prompt.template_variables, or name a file in policy_prompt.template"
        )
    asked = prompt_text(tokenizer, _QUESTION, prompt, "")
    said = render(tokenizer, {"user": _QUESTION, "assistant": _ANSWER}, prompt.template_variables, begin=False)
    before, found, after = said.rpartition(_ANSWER)
    end = _first_end(tokenizer, after, prompt.stop)
    if not found or end is None:
        raise UserError(
            "the tokenizer's chat template has no end after an assistant's answer that the policy could learn: check "
            "policy_prompt.template_variables, or name a file in policy_prompt.template"
        )
    return Frame(before.removeprefix(asked) if before.startswith(asked) else "", after[:end])


def _first_end(tokenizer: PreTrainedTokenizerBase, text: str, stop: Sequence[str]) -> int | None:
    """End of the first special token or stop string in a text; None if it has none."""
    ends = [place + len(string) for string in stop if (place := text.find(string)) >= 0]
    if found := first_special_token(tokenizer, text):
        token, place = found
        ends.append(place + len(str(tokenizer.convert_ids_to_tokens(token))))
    return min(ends, default=None)


def check_end(tokenizer: PreTrainedTokenizerBase, prompt: PolicyPrompt, end: str, ends: Collection[int]) -> None:
    """Refuse an end that would not end an answer in sampling.

    Args:
        tokenizer: the policy's tokenizer.
        prompt: section with the stop strings.
        end: the end from `frame`.
        ends: the tokens that end an answer (`generation.end_tokens`).
    """
    tokens = tokens_and_ends(tokenizer, end)
    if not tokens:
        raise UserError(f"the tokenizer makes no tokens from {end!r}, the end of answers; fetch the model again")
    if tokens[-1][0] not in ends and not any(string in end for string in prompt.stop):
        raise UserError(
            f"in this chat template an answer ends with {end!r}, which is neither an end token of the model nor in "
            "policy_prompt.stop: every answer would run to its limit; add it there"
        )


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Text], prompt: PolicyPrompt, max_length: int
) -> list[Example | None]:
    """Texts to train on.

    An answer is read up to its first stop string, because nothing after it would be sampled. A text that is too long is
    cut at its end, and therefore has no trained end.

    Args:
        tokenizer: the policy's tokenizer.
        texts: texts from data.
        prompt: section with their template and stop strings.
        max_length: maximum tokens of prompt, answer and end.

    Returns:
        One per text; None if the prompt leaves no room for an answer, or the answer begins with a stop string.

    Raises:
        UserError: as for `frame`.
    """
    preamble, around = read_preamble(prompt), frame(tokenizer, prompt)
    examples: list[Example | None] = []
    for instruction, answer, is_whole in texts:
        query = encode_prompt(tokenizer, instruction, prompt, preamble)
        stopped = cut_at_markers(answer, prompt.stop)
        said = around.before + guard(tokenizer, stopped.rstrip())
        ends = is_whole or stopped != answer
        found = tokens_and_ends(tokenizer, said + around.end if ends else said)
        if len(query) >= max_length or not stopped.strip() or not found:
            examples.append(None)
            continue
        row = [*query, *(token for token, _ in found)]
        is_cut = len(row) > max_length
        end = 0 if is_cut or not ends else sum(place > len(said) for _, place in found)
        examples.append(Example(np.array(row[:max_length], dtype=np.int32), len(query), end, is_cut))
    return examples


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Examples padded on the right to the longest, without a mask, because no token reads later ones.

    Returns:
        `input_ids` and `labels`, int64 [B, T]. The labels of prompt and padding are `IGNORED`.
    """
    width = max(len(example.tokens) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, prompt, *_) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return {"input_ids": ids, "labels": labels}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of every trained token.

    Args:
        logits: any float type, [B, T, V]; the logits at t predict token t + 1.
        labels: int64 [B, T].

    Returns:
        float32 [B, T - 1], 0 where the label is `IGNORED`.
    """
    wanted = labels[:, 1:]
    chosen = wanted != IGNORED
    losses = torch.zeros(wanted.shape, dtype=torch.float32, device=logits.device)
    # Do not convert the logits of prompt tokens, most of a batch, to float32.
    losses[chosen] = nn.functional.cross_entropy(logits[:, :-1][chosen].float(), wanted[chosen], reduction="none")
    return losses


def batch_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """A pass's share of the mean over all trained tokens of the global batch.

    Args:
        outputs: the model's outputs, with `logits`.
        labels: the labels from `collate`.
        num_items_in_batch: the Trainer's count of trained tokens over all passes and ranks.
    """
    return token_losses(outputs.logits, labels).sum() / num_items_in_batch


def score(model: nn.Module, examples: Sequence[Example], batch_size: int, device: torch.device | str) -> torch.Tensor:
    """Losses of examples, batched by length, without gradients.

    Returns:
        float64 [N, 4] on the CPU: sum of the losses of answer and end, their number, and the same for the end alone.
    """
    found = torch.zeros(len(examples), 4, dtype=torch.float64)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].tokens))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: t.to(device) for name, t in collate([examples[index] for index in chosen]).items()}
            labels = batch.pop("labels")
            losses = token_losses(model(**batch, use_cache=False).logits, labels).double().cpu()
            for index, row in zip(chosen, losses, strict=True):
                tokens, prompt, end, _ = examples[index]
                last = row[len(tokens) - 1 - end : len(tokens) - 1]
                found[index] = torch.stack(
                    [row.sum(), torch.tensor(len(tokens) - prompt), last.sum(), torch.tensor(end)]
                )
    model.train(was_training)
    return found


def evaluate(scores: Callable[[], torch.Tensor], model: Any) -> dict[str, Any]:
    """Mean losses per token on held-out examples, for the trained model and its base model.

    Args:
        scores: returns the result of `score` for the model in its present state.
        model: the model with the trained adapter (`peft`).

    Returns:
        Number of examples and of tokens; mean loss of answers with their ends, and of ends alone (null without any).
    """
    trained = scores()
    with model.disable_adapter():
        base = scores()

    def means(of: torch.Tensor) -> dict[str, float | None]:
        loss, tokens, end_loss, end_tokens = of.sum(0).tolist()
        return {"loss": loss / tokens if tokens else None, "end_loss": end_loss / end_tokens if end_tokens else None}

    return {
        "number": len(trained),
        "answer_tokens": int(trained[:, 1].sum()),
        **means(trained),
        "base_model": means(base),
    }
