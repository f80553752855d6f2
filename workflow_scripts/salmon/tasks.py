"""Benchmarks through lm-eval: its tasks and those of `evaluation_tasks`, run on a model that is loaded here.

Quantisation, adapter and tokenizer are therefore the run's. lm-eval itself gives the same numbers for the same weights.
"""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from salmon import encoding, intervals, shipped
from salmon.border import reading, reason
from salmon.config import Evaluation, TaskPrompt
from salmon.errors import UserError

log = logging.getLogger(__name__)

Metric = dict[str, float | int | None]
"""`value` of a task's metric, lm-eval's standard error `stderr`, `low` and `high` of its interval, and `number` of
items; null if there is none."""


class _Cut(logging.Filter):
    """Counts questions that exceed the model's length; lm-eval logs a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Let no line pass."""
        self.number += record.getMessage().startswith(("Combined length", "Left truncation"))
        return False


# Its lines contain texts of the data, and its warnings concern command lines.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
_CUT = _Cut()
_reader = logging.getLogger(HFLM.__module__)
_reader.setLevel(logging.WARNING)
_reader.addFilter(_CUT)


class Benchmarks:
    """lm-eval around a model.

    Args:
        model: causal language model in eval mode, with or without an adapter.
        tokenizer: the model's tokenizer.
        prompt: whether tasks are asked in a chat, and the variables of its template.
        evaluation: the tasks, and how to ask them.
        batch_size: texts at a time.

    Raises:
        UserError: if there is no task of a name, or the tokenizer's chat template cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: TaskPrompt,
        evaluation: Evaluation,
        batch_size: int,
    ) -> None:
        self.evaluation = evaluation
        self.manager = _manager(evaluation.tasks_folder, *evaluation.tasks_data.items())
        _check_names(evaluation.tasks, self.manager.all_tasks)
        self.chat = prompt.template == "chat"
        self.lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            think_end_token=prompt.thinking[1] if prompt.thinking else None,
            chat_template_args=_chat_options(tokenizer, prompt) if self.chat else None,
        )

    def measure(self, task: str) -> dict[str, dict[str, Metric]]:
        """Run a task, or all tasks of a group.

        Returns:
            Name of the task, or of the group and each of its tasks -> metric -> its values. A metric with several
            filters has the filter's name appended.

        Raises:
            UserError: if its data are unavailable, or it runs code that the model writes.
        """
        advice = (
            "without a network, the data must be in the hub's cache, or, for this workflow's own "
            "tasks, be named in evaluation.tasks_data"
        )
        with reading(f"the data of the task {task} (evaluation.tasks)", advice):
            loaded = self.manager.load([task])["tasks"]
        if unsafe := sorted(name for name, one in loaded.items() if getattr(one, "UNSAFE_CODE", False)):
            raise UserError(
                f"the task {unsafe[0]} (evaluation.tasks) runs code that the model writes, which the workflow does not "
                "do: remove it, and run it with lm-eval's own command line in a sandbox (docs/evaluation.md)"
            )
        before = _CUT.number
        try:
            found: Any = lm_eval.simple_evaluate(
                self.lm,
                tasks=[task],
                limit=self.evaluation.tasks_limit,
                task_manager=self.manager,
                apply_chat_template=self.chat,
                log_samples=True,  # used here for the intervals, not written
            )
        except AssertionError as error:  # lm-eval's way to say that an answer does not fit into the model
            raise UserError(
                f"the task {task} (evaluation.tasks) cannot be run on this model, which reads at most "
                f"{self.lm.max_length} tokens: {reason(error)}; remove it"
            ) from error
        if cut := _CUT.number - before:
            log.warning("%s: %d texts exceeded the model's length and were cut on the left", task, cut)
        check_finite(task, found["samples"])
        return metrics(found["results"], found["samples"], found.get("group_subtasks", {}), self.evaluation.seed)


@cache
def _manager(folder: str | None, *data: tuple[str, str]) -> TaskManager:
    """All existing tasks. Reading their thousands of files takes seconds."""
    folders = [str(shipped.TASKS), *([folder] if folder else [])]
    return TaskManager(include_path=folders, metadata=dict(data))


def _check_names(tasks: list[str], known: list[str]) -> None:
    """Refuse tasks that do not exist."""
    if unknown := [name for name in tasks if name not in known]:
        like = difflib.get_close_matches(unknown[0], known, n=3)
        raise UserError(
            f"evaluation.tasks: neither lm-eval {lm_eval.__version__} nor this workflow has a task {unknown[0]}"
            + (f"; similar are {', '.join(like)}" if like else "")
        )


def _chat_options(tokenizer: PreTrainedTokenizerBase, prompt: TaskPrompt) -> dict[str, Any]:
    """The arguments for the chat template."""
    try:
        return encoding.chat_options(tokenizer, prompt.template_variables)
    except UserError as error:
        raise UserError(
            f"tasks cannot be asked as turns of a chat: {error}; check policy_prompt.template_variables, or set "
            "evaluation.tasks_format to text"
        ) from None


def metrics(
    results: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    parts: Mapping[str, Sequence[str]],
    seed: int,
) -> dict[str, dict[str, Metric]]:
    """The numbers in lm-eval's results, by task and metric; see `Benchmarks.measure`.

    Intervals are by question, because several items may share one (HHH). If a metric is not a mean over the items, its
    interval is plus or minus 1.96 times lm-eval's standard error.

    Args:
        results: task -> `METRIC,FILTER` -> value; tasks and groups of them.
        samples: task -> its items, with their metrics.
        parts: group -> its tasks or groups.
        seed: seed of the intervals.
    """
    found: dict[str, dict[str, Metric]] = {}
    for task, values in results.items():
        items = [item for name in _leaves(task, parts) for item in samples.get(name, ())]
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                whole, error = _finite(value), _finite(values.get(f"{metric}_stderr,{chosen}"))
                of_items = [item for item in items if item["filter"] == chosen and _is_number(item.get(metric))]
                low, high = _interval(whole, [float(item[metric]) for item in of_items], of_items, seed)
                if low is None and whole is not None and error is not None:
                    low, high = whole - 1.96 * error, whole + 1.96 * error
                named = metric if chosen == "none" else f"{metric} ({chosen})"
                number = int(values["sample_len"])
                one: Metric = {"value": whole, "stderr": error, "low": low, "high": high, "number": number}
                found.setdefault(task, {})[named] = one
    return found


def check_finite(task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse answers whose log likelihoods are not numbers: lm-eval would treat the first choice as the model's.

    Args:
        task: the task's name.
        samples: as `metrics` takes them.
    """

    def numbers(part: Any) -> Iterator[float]:
        if isinstance(part, float):
            yield part
        elif isinstance(part, list | tuple):
            for each in part:
                yield from numbers(each)

    if any(
        not math.isfinite(number) for items in samples.values() for item in items for number in numbers(item["resps"])
    ):
        raise UserError(
            f"the task {task} (evaluation.tasks): the model's log likelihoods are not finite; float16 overflows: set "
            "model.dtype to bfloat16 or float32"
        )


def _leaves(task: str, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    below = parts.get(task) or []
    return [leaf for part in below for leaf in _leaves(part, parts)] if below else [task]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _interval(
    whole: float | None, values: Sequence[float], items: Sequence[Mapping[str, Any]], seed: int
) -> tuple[float | None, float | None]:
    """Values by question, if the metric is the mean over its items; otherwise none."""
    if whole is None or not values or not math.isclose(sum(values) / len(values), whole, abs_tol=1e-9):
        return None, None
    questions = [str(item["arguments"][0][0]) for item in items]  # the text that the model reads before an answer
    are_shares = all(0 <= value <= 1 for value in values)
    estimated = (intervals.share if are_shares else intervals.estimate)(values, questions, seed)
    return estimated["low"], estimated["high"]


def _finite(value: Any) -> float | None:
    """A number; null if lm-eval has none, or says N/A."""
    number = math.nan if value is None or isinstance(value, str) else float(value)
    return number if math.isfinite(number) else None
