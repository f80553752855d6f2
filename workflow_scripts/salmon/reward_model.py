"""The principle-following reward model: its text, its loss, its scores (paper section 3.3).

A reward model reads response, instruction and principles in one text that ends with "The quality of the output
is"; the reward is a linear head on the last token. A preference is a pair of such texts, so a batch of pairs
has two rows per pair:

    row 0   output_1 of pair 0   t t t t t t t . . .      t  token      .  padding (right)
    row 1   output_2 of pair 0   t t t t t t t t t .
    row 2   output_1 of pair 1   t t t t t t t t t t      the reward is read at the last t of each row
    row 3   output_2 of pair 1   t t t t . . . . . .
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from salmon import checked, templates
from salmon.batching import halves, right_pad, select_rows
from salmon.config import RewardTraining
from salmon.encoding import Template, guard, token_spans
from salmon.errors import UserError
from salmon.margins import common_prefix, prefill
from salmon.script import Meter
from salmon.tables import MEND, PREFERENCE_RECORDS
from salmon.text import join_instruction

log = logging.getLogger(__name__)

ALIKE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Allowed difference of rewards of whole texts and rewards with a cache, as a share of the largest (at least 1)."""
SECOND_CALL = {False: (400, 9e11), True: (900, 1.2e12)}
"""What a second call of the layers costs a GPU, without and with 4-bit weights, forward and backward: tokens that it
could compute instead; and parameters times tokens that it computes while the kernels of a layer are launched twice. An
H200 with slow cores took 6 ms (4 bits: 8) to launch a layer's kernels once, here at 3e14 operations per second and 4
per parameter and token (benchmarks/two_calls.py; that run had no autocast, unlike trainings)."""
NAME = "reward model"
"""Name of the draws of its training: the split and the order of the records."""


def read_records(path: Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """Read preference records, sorted by `record_id`, and leave out pairs with an empty output.

    Returns:
        The records (`PREFERENCE_RECORDS`), and the counts of rows.

    Raises:
        UserError: for an unreadable file, missing columns, nulls, duplicate ids, a preference that is not 1 or 2.
    """
    table = checked.read(path, PREFERENCE_RECORDS).sort("record_id").collect()
    wrong = table.filter(~pl.col("preference").is_in([1, 2]))
    if len(wrong):
        first = wrong.row(0, named=True)
        raise UserError(
            f"{path}: {len(wrong)} records have a preference that is neither 1 nor 2; the first is record "
            f"{first['record_id']} with {first['preference']}"
        )
    lists = (pl.col(name).list.len() for name in ("dimensions", "negated", "definitions"))
    shown = pl.col("deciding").is_null() | pl.col("deciding").is_in(pl.col("dimensions"))
    odd = table.filter(~(pl.all_horizontal(each == pl.col("definitions").list.len() for each in lists) & shown))
    if len(odd):
        raise UserError(
            f"{path}: in {len(odd)} records, dimensions, negated, definitions and deciding do not match; the first is "
            f"record {odd['record_id'][0]}; {MEND}"
        )
    whole = table.filter(*(pl.col(name).str.strip_chars() != "" for name in ("output_1", "output_2")))
    return whole, {"records": len(table), "skipped_empty_output": len(table) - len(whole)}


def reward_text_tokens(
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    instructions: Sequence[str],
    outputs: Sequence[str],
    definitions: Sequence[Sequence[str]],
    *,
    query_length: int,
    response_length: int,
    max_length: int,
    keys: str,
    cut: dict[str, set[int]] | None = None,
) -> list[list[int]]:
    """Token ids of reward-model texts, for training and for scoring in RL (reference, step 2).

    An instruction is cut on its left to `query_length` tokens, an output on its right to `response_length` tokens, both
    between characters of the text. Then the template is filled once and the whole text is tokenised
    (`encoding.tokenize`; the values are guarded). If it is longer than `max_length`, only its output is shortened: the
    principles and the end, where the reward is read, always stay.

    Args:
        tokenizer: a fast one (with offsets).
        template: has {Output}, {Input} and, for principles, {Dimensions}: plain text, or a chat
            (`encoding.read_template`).
        instructions: the instructions, joined with their input (`text.join_instruction`), one per text.
        outputs: the outputs, one per text.
        definitions: the sentences of the principles, one list per text; empty lists for a template without the slot.
        query_length: in tokens, like the other two.
        keys: prefix of these three keys in the configuration, for messages.
        cut: gains, under `instructions` and `outputs`, the indices of texts whose instruction or output was cut.

    Returns:
        One list of 1 to max_length ids per text.

    Raises:
        UserError: if template, instruction and principles alone exceed `max_length`.
    """
    if not instructions:
        return []
    template = Template.of(template)
    instructions, outputs = ([guard(tokenizer, text) for text in texts] for texts in (instructions, outputs))
    queries = [
        text[spans[-query_length][0] :] if len(spans) > query_length else text
        for text, spans in zip(instructions, token_spans(tokenizer, instructions), strict=True)
    ]
    output_spans = token_spans(tokenizer, outputs)
    keep = [min(len(spans), response_length) for spans in output_spans]
    rows: list[list[int]] = [[] for _ in queries]
    todo = list(range(len(queries)))
    while todo:
        texts = [
            templates.fill(
                template.text,
                Output=_head(outputs[index], output_spans[index], keep[index]),
                Input=queries[index],
                Dimensions=templates.bullets(guard(tokenizer, definition) for definition in definitions[index]),
            )
            for index in todo
        ]
        for index, ids in zip(todo, template.encode(tokenizer, texts), strict=True):
            rows[index] = ids
        todo = [index for index in todo if len(rows[index]) > max_length]
        for index in todo:
            if keep[index] == 0:
                raise UserError(
                    f"a reward-model text has {len(rows[index])} tokens without any output, but {keys}max_length is "
                    f"{max_length}: template, instruction ({keys}query_length {query_length}) and "
                    f"{len(definitions[index])} principles need more; raise {keys}max_length or lower "
                    f"{keys}query_length"
                )
            keep[index] = max(0, keep[index] - (len(rows[index]) - max_length))
    if cut is not None:
        long = {index for index, (text, query) in enumerate(zip(instructions, queries, strict=True)) if text != query}
        cut.setdefault("instructions", set()).update(long)
        long = {index for index, (spans, kept) in enumerate(zip(output_spans, keep, strict=True)) if kept < len(spans)}
        cut.setdefault("outputs", set()).update(long)
    return rows


def record_tokens(
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    records: pl.DataFrame,
    settings: RewardTraining,
    stage: str,
    cut: dict[str, set[int]] | None = None,
) -> list[list[int]]:
    """Token ids of both texts of each record: output_1 and output_2 of the first, of the second, and so on.

    Args:
        tokenizer: a fast one.
        template: the stage's template.
        records: `PREFERENCE_RECORDS`.
        settings: the stage's settings.
        stage: name of its section in the configuration.
        cut: as for `reward_text_tokens`, with indices in the result.

    Returns:
        2 N lists for N records; see `reward_text_tokens`.
    """
    columns = [records[name].to_list() for name in ("instruction", "input", "output_1", "output_2", "definitions")]
    rows = list(zip(*columns, strict=True))
    return reward_text_tokens(
        tokenizer,
        template,
        [join_instruction(row[0], row[1]) for row in rows for _ in range(2)],
        [output for row in rows for output in row[2:4]],
        [row[4] for row in rows for _ in range(2)],
        query_length=settings.query_length,
        response_length=settings.response_length,
        max_length=settings.max_length,
        keys=f"{stage}.",
        cut=cut,
    )


def collate(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the length of the longest.

    Returns:
        `input_ids` and `attention_mask`, both int64 [B, T]. Only the mask marks the padding.
    """
    return {"input_ids": right_pad(rows), "attention_mask": right_pad([[1] * len(row) for row in rows])}


@dataclass(frozen=True, slots=True)
class Apart:
    """When the longer and the shorter texts of a pass are computed in separate calls (`batching.halves`).

    Attributes:
        saving: tokens that the second call must save.
        least: tokens that remain, so that a GPU computes them no faster than the calls are launched.
    """

    saving: float = 0
    least: float = 0


def when_apart(model: PeftModel, device: torch.device) -> Apart:
    """When a second call pays: on CPUs if it saves a token, on GPUs if it saves its cost (`SECOND_CALL`).

    It never does with ZeRO-3, where each call gathers the weights and all ranks must make as many, and for adapters of
    experts, whose weights every call computes and keeps.
    """
    if is_deepspeed_zero3_enabled() or any(config.target_parameters for config in model.peft_config.values()):
        return Apart(saving=math.inf)
    if device.type != "cuda":
        return Apart()
    _, parameters = model.get_nb_trainable_parameters()  # of 4-bit weights, those that are packed
    base = model.get_base_model()
    layers = base.config.get_text_config().num_hidden_layers
    return apart_on_gpu(parameters, layers, is_packed=getattr(base, "is_loaded_in_4bit", False))


def apart_on_gpu(parameters: int, layers: int, *, is_packed: bool) -> Apart:
    """When a second call pays on a GPU, for a model with these parameters and layers, in 4 bits or not."""
    saving, launches = SECOND_CALL[is_packed]
    return Apart(saving=saving, least=launches * layers / parameters)


def collate_pairs(rows: Sequence[Sequence[int]], apart: Apart) -> dict[str, torch.Tensor]:
    """The same for texts of pairs, with `longer`, bool [B]: texts that `models.Scoring` computes in a separate call.

    Both texts of a pair belong to one pass, and often one is much longer: two rectangles need little padding.
    """
    longer = torch.zeros(len(rows), dtype=torch.bool)
    longer[halves([*map(len, rows)], apart.saving, apart.least)[0]] = True
    return {**collate(rows), "longer": longer}


def tokens_of_pairs(lengths: Sequence[tuple[int, int]], apart: Apart) -> int:
    """Tokens of a pass of pairs whose texts have these lengths, padding included; see `collate_pairs`."""
    of_texts = [length for pair in lengths for length in pair]
    return sum(len(part) * of_texts[part[0]] for part in halves(of_texts, apart.saving, apart.least) if part)


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), the negative log likelihood of a preference (paper section 3.3).

    Args:
        chosen: rewards of the preferred outputs, any float type, shape [B].
        rejected: rewards of the others, shape [B].

    Returns:
        float32 [B], one loss per pair.
    """
    return -nn.functional.logsigmoid(chosen.float() - rejected.float())


def pair_losses(rewards: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss of pairs as `record_tokens` orders them.

    Args:
        rewards: [B, 2], for output_1 and output_2.
        preference: int [B], 1 or 2.

    Returns:
        float32 [B].
    """
    second_wins = preference == 2
    chosen, rejected = torch.where(second_wins, rewards.flip(1).T, rewards.T)
    return bradley_terry_loss(chosen, rejected)


def score(
    model: PeftModel, token_lists: Sequence[Sequence[int]], batch_size: int, device: torch.device | str
) -> torch.Tensor:
    """Rewards of tokenised texts, batched by length, without gradients.

    Args:
        model: a reward model (`models.load_reward_model`), or one that is wrapped for several ranks.
        token_lists: from `reward_text_tokens`.
        batch_size: texts per forward pass.
        device: the model's device.

    Returns:
        float32 [N] on the CPU, in the order of `token_lists`.
    """
    rewards = torch.empty(len(token_lists), dtype=torch.float32)
    order = sorted(range(len(token_lists)), key=lambda index: -len(token_lists[index]))
    was_training = model.training
    model.eval()
    meter = Meter(total=len(order), what="texts scored", says_end=False)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([token_lists[index] for index in chosen])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            rewards[chosen] = _finite(model(**batch).logits[:, 0])
            meter.advance(len(chosen))
    model.train(was_training)
    return rewards


def score_alike(
    model: PeftModel, groups: Sequence[Sequence[list[int]]], batch_size: int, device: torch.device | str
) -> torch.Tensor:
    """Rewards of texts in groups with a common beginning, such as one answer under many principles; without gradients.

    The common part of a group's texts is computed once, if that gives the same results as whole texts: the first group
    is computed both ways.

    Args:
        model: as for `score`.
        groups: N groups of M texts each, M at least 1.
        batch_size: whole texts per forward pass; four times as many if only their ends are read.
        device: the model's device.

    Returns:
        float32 [N, M] on the CPU.
    """
    if not groups:
        return torch.empty(0, 0)
    first = score(model, groups[0], batch_size, device)
    if len(groups[0]) > 1:
        ends = _score_ends(model, groups[0], 4 * batch_size, device)
        if (ends - first).abs().max() <= ALIKE[model.dtype] * max(1.0, first.abs().max().item()):
            found = [first]
            meter = Meter(total=len(groups), what="groups of texts scored", done=1, says_end=False)
            for group in groups[1:]:
                found.append(_score_ends(model, group, 4 * batch_size, device))
                meter.advance()
            return torch.stack(found)
        log.info("%s: texts with a common beginning are computed separately", type(model.get_base_model()).__name__)
    flat = [text for group in groups[1:] for text in group]
    return torch.cat([first, score(model, flat, batch_size, device)]).view(len(groups), -1)


@torch.no_grad()
def _score_ends(
    model: PeftModel, group: Sequence[list[int]], batch_size: int, device: torch.device | str
) -> torch.Tensor:
    """Rewards of texts, [M], each computed with a copy of the cache of their common beginning."""
    shared = common_prefix(group)
    if shared == 0:
        return score(model, group, batch_size, device)
    head = torch.tensor([group[0][:shared]])
    beginning = prefill(model, head, torch.ones_like(head), device)
    rewards = torch.empty(len(group))
    for chosen in _of_like_lengths([len(text) - shared for text in group], batch_size):
        cache = copy.deepcopy(beginning)
        select_rows(cache, torch.zeros(len(chosen), dtype=torch.int64, device=device))
        ends, mask = collate([group[place][shared:] for place in chosen]).values()
        read = torch.cat([torch.ones(len(chosen), shared, dtype=torch.int64), mask], dim=1)
        positions = torch.arange(shared, read.shape[1], device=device).expand(len(chosen), -1)
        output = model(
            input_ids=ends.to(device),
            attention_mask=read.to(device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        rewards[chosen] = _finite(output.logits[:, 0])
    return rewards


def _finite(rewards: torch.Tensor) -> torch.Tensor:
    """The same in float32 on the CPU; refuses NaN, which would count as a wrong answer."""
    if not rewards.isfinite().all():
        raise UserError(
            "the reward model's scores are not finite; float16 overflows: set model.dtype to bfloat16 or float32"
        )
    return rewards.float().cpu()


def _of_like_lengths(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, where none is longer than twice the shortest, to save padding."""
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if not found or len(found[-1]) == size or lengths[place] > 2 * lengths[found[-1][0]]:
            found.append([])
        found[-1].append(place)
    return found


def evaluate(records: pl.DataFrame, rewards: torch.Tensor) -> dict[str, Any]:
    """How well rewards agree with held-out preferences.

    Args:
        records: N records, with `preference`, `deciding`, `dimensions` and `negated`.
        rewards: [N, 2], for output_1 and output_2.

    Returns:
        Number, accuracy (equal rewards count half) and mean loss: for all records, by deciding dimension, and by
        whether the deciding principle is shown plain or negated. Also the share of records that prefer output_1. A mean
        of nothing is null.
    """
    preference = torch.tensor(records["preference"].to_list(), dtype=torch.long)
    rewards = rewards.reshape(-1, 2)
    margin = (rewards[:, 0] - rewards[:, 1]) * (3 - 2 * preference)
    correct = (margin > 0).double() + 0.5 * (margin == 0).double()
    losses = pair_losses(rewards, preference).double()

    def summary(chosen: Sequence[int]) -> dict[str, Any]:
        index = torch.tensor(chosen, dtype=torch.long)
        means = {"accuracy": correct[index].mean().item(), "loss": losses[index].mean().item()} if chosen else {}
        return {"number": len(chosen), "accuracy": None, "loss": None} | means

    by_dimension: dict[str, list[int]] = {}
    shown: dict[str, list[int]] = {"plain": [], "negated": []}
    columns = (records[name].to_list() for name in ("deciding", "dimensions", "negated"))
    for number, (deciding, dimensions, negated) in enumerate(zip(*columns, strict=True)):
        if deciding is None:
            continue
        by_dimension.setdefault(deciding, []).append(number)
        shown["negated" if negated[dimensions.index(deciding)] else "plain"].append(number)
    return {
        **summary(range(len(records))),
        "positive_labels": (preference == 1).double().mean().item() if len(records) else None,
        "by_deciding_dimension": {name: summary(chosen) for name, chosen in sorted(by_dimension.items())},
        "by_deciding_shown": {name: summary(chosen) for name, chosen in shown.items()},
    }


def _head(text: str, spans: Sequence[tuple[int, int]], keep: int) -> str:
    """The text up to the end of its first `keep` tokens; the whole text if it has no more."""
    if keep >= len(spans):
        return text
    return text[: spans[keep - 1][1]] if keep else ""
