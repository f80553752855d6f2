"""A judge behind an OpenAI-compatible endpoint: chat completions over HTTP, with retries if they can help.

Logs and errors contain neither texts of requests and answers nor the key. A server's messages may repeat both.
"""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2

from salmon import mt_bench, templates
from salmon.config import JudgeEndpoint
from salmon.errors import UserError

log = logging.getLogger(__name__)

Verdict = Literal["A", "B", "tie"]

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""
REFUSED = frozenset({400, 413, 422})
"""Statuses that may concern this request only."""
FILTERED = "content_filter"
UNREADABLE = "unreadable"
"""The reason for a missing verdict when the judge's answer names none."""
LONGEST_WAIT = 60.0
"""Maximum seconds between two attempts, unless the server names them."""
_KEPT = "the verdicts so far are kept: start the job again"
_VERDICT = re.compile(r"^\W*verdict\W*(a|b|tie)\W*$", flags=re.IGNORECASE | re.MULTILINE)
_CODE = re.compile(r"[\w.-]{1,60}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to compare.

    Attributes:
        kind: `prompts` or `mt_bench`.
        prompt_id: identifies the question.
        instruction: what the user asked for.
        policy: the policy's answer.
        initial: the initial policy's answer.
    """

    kind: str
    prompt_id: str
    instruction: str
    policy: str
    initial: str


def dialogues(
    questions: Sequence[mt_bench.Question], policy: Sequence[mt_bench.Answer], initial: Sequence[mt_bench.Answer]
) -> list[Comparison]:
    """Dialogues of MT-Bench that both have answered, each as one comparison."""
    said = [{answer.question_id: answer.choices[0].turns for answer in answers} for answers in (policy, initial)]
    return [
        Comparison(
            "mt_bench",
            str(question.question_id),
            question.turns[0],
            *(_dialogue(question.turns, answers[question.question_id]) for answers in said),
        )
        for question in questions
        if all(question.question_id in answers for answers in said)
    ]


def _dialogue(asked: Sequence[str], answers: Sequence[str]) -> str:
    """Answers, with the user's turns between them."""
    text = answers[0]
    for question, answer in zip(asked[1:], answers[1:], strict=False):
        text += f"\n\n## The user then\n\n{question}\n\n## The assistant then\n\n{answer}"
    return text


def request_text(template: str, pair: Comparison, *, policy_first: bool) -> str:
    """The question to the judge about two answers, in one of the two orders."""
    first, second = (pair.policy, pair.initial) if policy_first else (pair.initial, pair.policy)
    return templates.fill(template, UserInstruction=pair.instruction, OutputA=first, OutputB=second)


def read_verdict(text: str) -> Verdict | None:
    """The verdict at the end of an answer; None if it has none."""
    found = _VERDICT.findall(text)
    verdicts: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}
    return verdicts[found[-1].lower()] if found else None


def preferred(verdict: Verdict | None, *, policy_first: bool) -> str | None:
    """Whose answer a verdict prefers: `policy`, `initial`, `tie` or None."""
    if verdict is None or verdict == "tie":
        return verdict
    return "policy" if (verdict == "A") == policy_first else "initial"


class Refused(Exception):
    """The endpoint refuses one request, but may answer others.

    Attributes:
        reason: the error's code, or the status: one word.
        advice: what to do if it refuses all requests.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


class Endpoint:
    """The endpoint. Several threads may use it at once.

    Args:
        settings: its section of the configuration.

    Raises:
        UserError: if the environment does not hold the key.
    """

    def __init__(self, settings: JudgeEndpoint) -> None:
        self.settings = settings
        self.address = f"{settings.url}/chat/completions"
        headers = {"Authorization": f"Bearer {read_key(settings.key_variable)}"} if settings.key_variable else {}
        limits = httpx2.Limits(max_connections=settings.max_requests)
        self.client = httpx2.Client(timeout=settings.timeout, headers=headers, limits=limits)
        self._lock = threading.Lock()
        self._not_before = 0.0  # a rate limit holds for all threads

    def ask(self, text: str) -> str:
        """The model's answer to one message.

        Raises:
            Refused: if the endpoint refuses this request.
            UserError: if it refuses every request, or cannot be reached in any attempt.
        """
        body = {**self.settings.options, "model": self.settings.model, "messages": [{"role": "user", "content": text}]}
        for attempt in range(self.settings.retries + 1):
            time.sleep(max(0.0, self._not_before - time.monotonic()))
            wait, what = min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1), ""  # noqa: S311 (no secret)
            is_there = False
            try:
                response = self.client.post(self.address, json=body)
            except httpx2.TransportError as error:
                kind = type(error).__name__
                what = f"could not be reached, or did not answer within {self.settings.timeout:g} s ({kind})"
            else:
                if response.status_code == httpx2.codes.OK:
                    if _is_filtered(response):  # even if there is text: the answer is incomplete
                        raise Refused(FILTERED, f"{self.address} filters its answers; use another judge")
                    if (answer := _content(response)) is not None:
                        return answer
                    is_there, what = True, "answered with something that is not a chat completion"
                elif response.status_code in AGAIN:
                    what = f"answered {response.status_code}{_in_brackets(_code(response))}"
                    if (asked := _retry_after(response)) is not None:
                        wait = asked
                        with self._lock:
                            self._not_before = max(self._not_before, time.monotonic() + asked)
                elif response.status_code in REFUSED:
                    raise Refused(_code(response) or str(response.status_code), self._refusal(response))
                else:
                    raise UserError(self._refusal(response))
            if attempt < self.settings.retries:
                log.warning("the endpoint %s; trying again in %.1f s", what, wait)
                time.sleep(wait)
        if is_there:
            raise Refused("no_completion", f"{self.address} {what}: check that it is an OpenAI-compatible endpoint")
        raise UserError(
            f"{self.address} {what}, {self.settings.retries + 1} times in a row: check the server or your quota, or "
            f"change evaluation.judge_endpoint.max_requests, timeout or retries; {_KEPT}"
        )

    def _refusal(self, response: httpx2.Response) -> str:
        """Advice for a status that retries will not change."""
        status = response.status_code
        key = self.settings.key_variable
        advice = {
            401: f"check the key in the environment variable {key}"
            if key
            else "name its key's environment variable in evaluation.judge_endpoint.key_variable",
            403: f"the key in {key} may not use this model"
            if key
            else "name its key's environment variable in evaluation.judge_endpoint.key_variable",
            404: "check evaluation.judge_endpoint.url and evaluation.judge_endpoint.model",
            413: "the texts are too long for it; use a judge with a longer context",
        }.get(status, "check evaluation.judge_endpoint.options, and that the model accepts texts of this length")
        return f"{self.address} answered {status}{_in_brackets(_code(response))}: {advice}; {_KEPT}"


def read_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        UserError: if there is none, or it cannot be a key. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the environment variable {variable} (evaluation.judge_endpoint.key_variable) is "
            + ("not set or empty" if not key else "not a key: it has blanks or characters that a header cannot hold")
        )
    return key


def _content(response: httpx2.Response) -> str | None:
    """The text of a chat completion; None if the body is something else."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def _code(response: httpx2.Response) -> str:
    """The code of an error, if the body has one and it is a single word. The message may repeat the request."""
    try:
        error: Any = response.json()["error"]
        code = str(error.get("code") or error.get("type") or "")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return code if _CODE.fullmatch(code) else ""


def _in_brackets(code: str) -> str:
    return f" ({code})" if code else ""


def _is_filtered(response: httpx2.Response) -> bool:
    """Whether a filter has cut a chat completion, or the model refuses in a separate field."""
    try:
        choice = response.json()["choices"][0]
        return choice.get("finish_reason") == FILTERED or bool(choice["message"].get("refusal"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait; None if it does not ask."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
