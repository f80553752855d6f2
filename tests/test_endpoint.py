"""A judge behind an endpoint: a real, local server that is slow, limits rates, fails and talks nonsense."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

import judge_by_endpoint
from salmon import endpoint, mt_bench, templates
from salmon.config import Evaluation, JudgeEndpoint
from salmon.errors import UserError
from salmon.tables import ANSWERS, VERDICTS
from tests import forks
from tests.running import command, kill_at_first_part, write_rows

ROOT = Path(__file__).parents[1]
TEMPLATE = str(ROOT / "prompts" / "templates" / "endpoint.txt")
SECRET, VARIABLE = "sk-very-secret", "SALMON_TEST_KEY"
PROMPTS = [f"{number:020d}" for number in range(6)]


class Server(ThreadingHTTPServer):
    """Prefers the longer answer; keeps what it was asked.

    Attributes:
        replies: its replies to the next requests, before it judges: a status, headers and a body each.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, dict[str, str], bytes]] = []
        self.judge: Callable[[str, str], str] = lambda a, b: (
            "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
        )
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.times.append(time.monotonic())
        self.server.keys.append(self.headers["Authorization"])
        time.sleep(self.server.delay)
        if self.server.replies:
            status, headers, content = self.server.replies.pop(0)
        else:
            status, headers = 200, {}
            text = body["messages"][0]["content"]
            first, second = (text.partition(f"assistant {name}\n\n")[2].partition("\n\n# ")[0] for name in "AB")
            verdict = f"They differ.\n\n**Verdict: {self.server.judge(first, second)}**\n"
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": verdict}}]}).encode()
            self.server.asked.append(body)
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client was killed
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)


def write_answers(path: Path, texts: list[str]) -> Path:
    prompt = {"source": "s", "instruction": "secret instruction", "input": "", "finish_reason": "eos", "kl": 0.0}
    prompt |= {"prompt_tokens": 1, "response_tokens": 1}
    rows = [{**prompt, "prompt_id": key, "response": text} for key, text in zip(PROMPTS, texts, strict=False)]
    return write_rows(path, ANSWERS, rows, {"answers": len(rows)})


def arguments(folder: Path, server: Server, mt_bench: str | None = None, **more: Any) -> dict[str, Any]:
    """The policy's answers are longer twice, equal once, shorter three times."""
    judge = {"url": server.url, "model": "judge-1", "key_variable": VARIABLE, "template": TEMPLATE, **more}
    return {
        "answers": write_answers(folder / "answers.parquet", ["longer text"] * 2 + ["same"] + ["a"] * 3),
        "initial_answers": write_answers(folder / "initial_answers.parquet", ["text"] * 2 + ["same"] + ["text"] * 3),
        "output": folder / "verdicts.parquet",
        "evaluation": Evaluation(judge_endpoint=JudgeEndpoint(**judge), mt_bench=mt_bench),
    }


def run(given: dict[str, Any]) -> pl.DataFrame:
    judge_by_endpoint.main(judge_by_endpoint.Arguments(**given))
    return pl.read_parquet(given["output"])


WINS = ["policy", "policy", "tie", "initial", "initial", "initial"]


def test_both_orders_are_judged(tmp_path: Path, server: Server) -> None:
    found = run(arguments(tmp_path, server))
    assert found.schema == VERDICTS.schema
    assert found.rows() == sorted(
        ("prompts", key, first, win, None) for key, win in zip(PROMPTS, WINS, strict=True) for first in (False, True)
    )
    assert len(server.asked) == 10  # none about equal answers
    assert {body["model"] for body in server.asked} == {"judge-1"}
    assert [(body["temperature"], body["max_tokens"]) for body in server.asked] == [(0, 1024)] * 10
    assert set(server.keys) == {f"Bearer {SECRET}"}
    manifest = (tmp_path / "verdicts.manifest.json").read_text()
    assert json.loads(manifest)["counts"] == {**{"comparisons": 12, "unreadable": 0, "refused": 0, "verdicts": 12}}
    assert VARIABLE in manifest
    assert SECRET not in manifest


def test_a_judge_that_goes_by_position_is_seen(tmp_path: Path, server: Server) -> None:
    server.judge = lambda a, b: "A"
    found = run(arguments(tmp_path, server)).filter(pl.col("prompt_id") != PROMPTS[2])
    assert set(found.select("policy_first", "preferred").rows()) == {(True, "policy"), (False, "initial")}


def test_dialogues_of_mt_bench_are_judged_whole(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"question_id": 81, "category": "math", "turns": ["First?", "Second?"]}]
    (tmp_path / "question.jsonl").write_text(json.dumps(rows[0]))
    questions = mt_bench.read_questions(tmp_path / "question.jsonl")
    for name, answers in (("mine", ["one", "two, and more"]), ("initial", ["one", "two"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(mt_bench.answer_lines(questions, [answers], name))
        (tmp_path / name / "manifest.json").write_text("{}")
    given = arguments(tmp_path, server, mt_bench=str(tmp_path / "question.jsonl"))
    given |= {"answers": None, "initial_answers": None}
    found = run({**given, "mt_bench": tmp_path / "mine", "initial_mt_bench": tmp_path / "initial"})
    assert found.rows() == [("mt_bench", "81", first, "policy", None) for first in (False, True)]
    assert "mt_bench: the policy's answer is preferred in a share of 1.00 (0.21 to 1.00) of 1" in caplog.text
    text = next(body["messages"][0]["content"] for body in server.asked)
    parts = ["First?", "assistant A", "one", "Second?", "two", "assistant B", "one", "Second?", "two"]
    places = [text.index(parts[0])]
    for part in parts[1:]:
        places.append(text.index(part, places[-1] + 1))


OVERLOADED: tuple[int, dict[str, str], bytes] = (503, {}, b"")


@pytest.mark.parametrize(
    ("reply", "waits"),
    [
        ((429, {"Retry-After": "1.3"}, b'{"error": {"code": "rate_limit_exceeded"}}'), 1.3),
        (OVERLOADED, 0.4),
        ((500, {}, b"secret"), 0.4),
        ((200, {}, b"secret, and no JSON"), 0.4),
        ((200, {}, b'{"choices": []}'), 0.4),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), 0.4),
    ],
)
def test_what_may_pass_is_asked_again(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, reply: Any, waits: float
) -> None:
    """It waits as long as the server asks; no text of an answer is in the log."""
    server.replies = [reply]
    found = run(arguments(tmp_path, server, max_requests=1))
    assert found.height == 12
    assert len(server.times) == 11
    assert server.times[1] - server.times[0] >= waits
    assert "again in" in caplog.text
    assert "secret" not in caplog.text


def test_a_rate_limit_holds_for_all_requests(server: Server) -> None:
    judge = endpoint.Endpoint(JudgeEndpoint(url=server.url, model="m", template=TEMPLATE, max_requests=4))
    server.replies = [(429, {"Retry-After": "1.5"}, b"")]
    threads = [threading.Thread(target=judge.ask, args=("x",)) for _ in range(4)]
    threads[0].start()
    time.sleep(0.7)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(server.times[1:]) - server.times[0] >= 1.5


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "invalid_api_key", f"401 .invalid_api_key.: check the key in the environment variable {VARIABLE}"),
        (403, "", f"403: the key in {VARIABLE} may not use this model"),
        (404, "model_not_found", "404 .model_not_found.: check evaluation.judge_endpoint.url"),
        (400, "secret instruction", "400: check evaluation.judge_endpoint.options"),
        (503, "overloaded", "503 .overloaded., 2 times in a row: check the server or your quota"),
        (429, "insufficient_quota", "429 .insufficient_quota., 2 times in a row"),
    ],
)
def test_a_refusal_says_what_to_do(tmp_path: Path, server: Server, status: int, code: str, said: str) -> None:
    """The message shows neither the key nor a text; what was judged is kept."""
    body = json.dumps({"error": {"message": f"secret instruction, {SECRET}", "code": code}}).encode()
    given = arguments(tmp_path, server, max_requests=1, retries=1)
    server.judge = lambda a, b: server.replies.extend([(status, {}, body)] * 2) or "tie"  # from the second request on
    with pytest.raises(UserError, match=said) as caught:
        run(given)
    assert "start the job again" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "verdicts.parquet").exists()
    server.replies.clear()
    server.judge = lambda a, b: "tie"
    run(given)
    assert len(server.asked) == 10
    assert len({json.dumps(body) for body in server.asked}) == 4  # two orders of two kinds of pairs


def test_nobody_is_there(tmp_path: Path, server: Server) -> None:
    given = arguments(tmp_path, server, retries=0, timeout=0.2)
    server.delay = 1.0
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s \(ReadTimeout\), 1 times"):
        run(given)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel"])
def test_a_key_that_is_none_is_refused_unshown(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(UserError, match=VARIABLE) as caught:
        run(arguments(tmp_path, server))
    assert not key or key not in str(caught.value)
    assert server.times == []


def test_an_answer_without_a_verdict_counts_as_none(tmp_path: Path, server: Server) -> None:
    verdicts = iter(["?", "A", "B"])
    server.judge = lambda a, b: next(verdicts, "tie")
    found = run(arguments(tmp_path, server, max_requests=1))
    assert found["preferred"].null_count() == 1
    assert found.filter(pl.col("preferred").is_null())["reason"].to_list() == ["unreadable"]
    assert json.loads((tmp_path / "verdicts.manifest.json").read_text())["counts"]["unreadable"] == 1


def test_a_judge_that_names_hardly_a_verdict_is_told(tmp_path: Path, server: Server) -> None:
    """One pair of equal answers is a tie without a request, and a single readable verdict is not enough."""
    verdicts = iter(["A"])
    server.judge = lambda a, b: next(verdicts, "I prefer A")
    with pytest.raises(UserError, match=r"9 of 10 answers of .* have no line such as `Verdict: A`"):
        run(arguments(tmp_path, server, max_requests=1))
    assert not (tmp_path / "verdicts.parquet").exists()


FILTER = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((400, {}, b'{"error": {"code": "content_filter", "message": "secret instruction"}}'), "content_filter"),
        ((200, {}, json.dumps(FILTER).encode()), "content_filter"),
        ((200, {}, json.dumps(FILTER).replace("null", '""').encode()), "content_filter"),
        ((200, {}, json.dumps(FILTER).replace("null", '"Verdict: A"').encode()), "content_filter"),
        ((400, {}, b'{"error": {"code": "context_length_exceeded"}}'), "context_length_exceeded"),
        ((413, {}, b"secret instruction"), "413"),
        ((200, {}, b"secret instruction"), "no_completion"),
    ],
)
def test_one_refusal_does_not_end_the_job(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, reply: Any, reason: str
) -> None:
    """It is counted in table, manifest and log; a job that asks for the rest asks for it again."""
    caplog.set_level("INFO")
    server.replies = [reply]
    found = run(arguments(tmp_path, server, max_requests=1, retries=0))
    assert found.height == 12
    assert found.filter(pl.col("preferred").is_null()).rows() == [("prompts", PROMPTS[0], True, None, reason)]
    counts = json.loads((tmp_path / "verdicts.manifest.json").read_text())["counts"]
    assert counts == {"comparisons": 12, "unreadable": 0, "refused": 1, f"refused: {reason}": 1, "verdicts": 12}
    assert f"refused: {reason} 1" in caplog.text
    assert "secret" not in caplog.text


def test_so_many_may_be_refused_as_the_configuration_says(tmp_path: Path, server: Server) -> None:
    server.replies = [(400, {}, b"")] * 5
    with pytest.raises(UserError, match=r"4 comparisons were refused so far, .*max_refused.*endpoint.options"):
        run(arguments(tmp_path, server, max_requests=1, max_refused=0.25))
    asked = len(server.times)
    server.replies = [(400, {}, b"")] * 5  # and equal answers are not sent
    found = run(arguments(tmp_path, server, max_requests=1, max_refused=0.5))
    assert asked < 12
    assert found["reason"].to_list().count("400") == 5


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "A"),
        ("Reasons.\n\nVerdict: B\n", "B"),
        ("**Verdict: tie**", "tie"),
        ("Verdict: A\nOn reflection:\nverdict: b.", "B"),
        ("My verdict: A is better", None),
        ("Verdict: C", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert endpoint.read_verdict(text) == verdict


def test_a_killed_job_asks_for_the_rest_only(tmp_path: Path, server: Server) -> None:
    """The same table; only verdicts under way are paid for twice; no key in the command line or the log."""
    server.delay = 0.05
    given = arguments(tmp_path, server, max_requests=2)
    line = command(judge_by_endpoint, given)
    assert SECRET not in " ".join(line)
    kept = kill_at_first_part(line, given["output"])
    time.sleep(0.3)
    before = len(server.times)
    assert 0 < before < 10
    done = forks.run(line)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr
    assert "secret" not in done.stderr
    assert "comparisons remain" in done.stderr
    assert len(server.times) - before <= 12 - kept
    assert len(server.times) <= 10 + 2  # two were under way
    expected = [
        ("prompts", key, first, win, None) for key, win in zip(PROMPTS, WINS, strict=True) for first in (False, True)
    ]
    assert pl.read_parquet(given["output"]).rows() == sorted(expected)


def test_the_template_has_the_slots_and_asks_for_the_verdict() -> None:
    text = templates.read(TEMPLATE)
    assert templates.slots(text) == set(templates.ENDPOINT_SLOTS)
    assert all(f'"Verdict: {verdict}"' in text for verdict in ("A", "B", "tie"))
    pair = endpoint.Comparison("prompts", "id", "{OutputA}", "{OutputB}", "x")
    asked = endpoint.request_text(text, pair, policy_first=True)
    assert asked.count("{OutputA}") == asked.count("{OutputB}") == 1  # texts are not templates


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host/v1", "https://user:pw-secret@host/v1", "https://host/v1?key=pw-secret", "http://"],
)
def test_an_address_with_a_key_in_it_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        JudgeEndpoint(url=url, model="m")


def test_the_rule_passes_it_all_on(small_run: Path, server: Server) -> None:
    """From the configuration to the table, for every answer of the small run's policy."""
    table = small_run / "results" / "runs" / "default" / "evaluation" / "verdicts.parquet"
    changes = {"judge_endpoint": {"url": server.url, "model": "judge-1", "key_variable": VARIABLE, "timeout": 60}}
    line = ["--profile", "profiles/demo", "--nolock", "--printshellcmds", str(table)]
    line += ["--configfile", str(small_run / "config.yaml"), "--config", f"evaluation={json.dumps(changes)}"]
    try:
        done = forks.snakemake(line)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        assert SECRET not in said
        found = pl.read_parquet(table)
        answers = pl.read_parquet(table.with_name("answers.parquet"))
        assert found.height == 2 * (len(answers) + 1)  # and a dialogue of MT-Bench
        assert set(server.keys) == {f"Bearer {SECRET}"}
        assert Counter(said.splitlines())["localrule judge_by_endpoint:"] == 1
    finally:
        for file in (table, table.with_suffix(".manifest.json")):
            file.unlink(missing_ok=True)


logging.getLogger("httpx2").setLevel(logging.WARNING)  # as script.run does
