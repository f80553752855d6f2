"""The playground on the results of `make demo`: it computes what the stages compute, and a browser shows it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from playground import results
from playground.results import INITIAL
from playground.workbench import Workbench
from salmon import encoding, judging, models, reward_model
from salmon.errors import UserError
from salmon.sampling import TransformersSampler
from salmon.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
DEMO = Path(os.environ.get("PLAYGROUND_RESULTS", ROOT / "results" / "demo"))
PICTURES = os.environ.get("PLAYGROUND_PICTURES")  # folder for screenshots
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ANSWERS = ["It is small. It is red.", "First, it is small. Second, it is red, and so it is a thing that one can see."]


@pytest.fixture(scope="module")
def found() -> results.Results:
    return results.read(DEMO)


@pytest.fixture(scope="module")
def bench(found: results.Results) -> Workbench:
    return Workbench(found, torch.device("cpu"))


@pytest.fixture(scope="module")
def instruction() -> str:
    first: str = pl.read_parquet(DEMO / "prompts" / "rl.parquet")["instruction"][0]
    return first


def test_everything_of_the_demo_is_found(found: results.Results) -> None:
    runs = {folder.parent.name for folder in DEMO.glob("runs/*/policy")}
    assert {one.name for one in found.policies} == {INITIAL, *runs}
    assert {one.name for one in found.scorers} == {"pmp", "reward_model"}
    assert found.judge is not None
    assert found.left_out == []
    assert len(found.principles) == len(json.loads((ROOT / "demo/principles/judge.json").read_text()))


def test_answers_are_those_of_the_policy_alone(bench: Workbench, instruction: str) -> None:
    for name in (INITIAL, "concise"):
        policy = bench.policies[name]
        *parts, last = bench.answers(policy, instruction, temperature=0.7, seed=5, max_tokens=60)
        model = models.load_policy(policy.model, policy.folder, "cpu")
        sampler = TransformersSampler(load_tokenizer(policy.model), "cpu", batch_size=1, model=model)
        [alone] = sampler.sample(
            [bench.prompt(policy, instruction)], [5], max_new_tokens=[60], temperature=0.7, stop=policy.prompt.stop
        )
        assert last == alone.text != ""
        assert parts
        assert all(last.startswith(part.rstrip()[:10]) for part in parts)


def test_rewards_are_those_of_the_reward_model_alone(bench: Workbench, instruction: str) -> None:
    for name in ("reward_model", "pmp"):
        scorer = bench.scorers[name]
        shown = [["The output is short."], ["The output is long.", "The output is rude."]] if name != "pmp" else [[]]
        model = models.load_reward_model(scorer.model, scorer.folder, "cpu", trainable=False)
        texts = bench.reward_texts(scorer, instruction, ANSWERS, shown)
        alone = [reward_model.score(model, [text], 1, "cpu").item() for text in texts]
        rewards = bench.rewards(scorer, instruction, ANSWERS, shown)
        assert [reward for row in rewards for reward in row] == pytest.approx(alone, abs=1e-5)
        assert len(set(alone)) == len(alone)
        assert bench.reads_principles(scorer) == (name != "pmp")


def test_verdicts_are_those_of_the_judge_alone(bench: Workbench, found: results.Results, instruction: str) -> None:
    settings = found.judge
    assert settings is not None
    tokenizer = load_tokenizer(settings.model)
    judge = judging.Judge(
        models.load_judge(settings.model, "cpu"),
        tokenizer,
        template=encoding.read_template(tokenizer, settings.template, settings.form, "judge.format"),
        principles=found.principles,
        max_length=settings.max_length,
        device="cpu",
    )
    [alone] = judge.judge([judging.Pair("here", instruction, *ANSWERS)])
    verdicts, prompts = bench.judge(instruction, *ANSWERS, found.principles)
    assert alone is not None
    assert [one.dimension for one in verdicts] == [one.dimension for one in found.principles]
    assert [(one.s12, one.s21) for one in verdicts] == [pytest.approx(pair, abs=1e-4) for pair in alone]
    for one, other in prompts:
        assert one.index(ANSWERS[0]) < one.index(ANSWERS[1])
        assert other.index(ANSWERS[1]) < other.index(ANSWERS[0])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*make demo"):
        results.read(tmp_path / "none")
    with pytest.raises(UserError, match="holds no reward model"):
        results.read(tmp_path)
    shutil.copytree(DEMO / "models", tmp_path / "models")
    with pytest.raises(UserError, match="holds no policy"):
        results.read(tmp_path)
    shutil.copytree(DEMO / "runs" / "concise", tmp_path / "runs" / "concise")
    found = results.read(tmp_path)  # without a judge
    assert [one.name for one in found.policies] == [INITIAL, "concise"]
    assert found.judge is None
    manifest = tmp_path / "models" / "pmp" / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["settings"]["model"]["base"] = "other/model"
    manifest.write_text(json.dumps(raw))
    found = results.read(tmp_path)
    assert [one.name for one in found.scorers] == ["reward_model"]
    assert "other/model" in found.left_out[0]


# ---- In a browser


def say(text: str) -> None:
    """Something for whoever runs the tests with `-s`."""
    sys.stderr.write(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running playground."""
    port = free_port()
    log = tmp_path_factory.mktemp("playground") / "log"
    began = time.monotonic()
    command = [sys.executable, "playground/app.py", "--results", str(DEMO), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file, stdout=file)
    try:
        while "open http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - began < 180, log.read_text()
            time.sleep(0.1)
        say(f"\nthe playground started in {time.monotonic() - began:.1f} s\n")
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 1, 130, -signal.SIGINT)
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def browser() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1600"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # there is no other machine
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


def until(holds: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """What a function returns, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


class Screen:
    """The page as a person sees it."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return until(lambda: self.all(selector), selector)[0]

    def type(self, selector: str, text: str) -> None:
        box = self.one(selector)
        box.clear()
        box.send_keys(text)

    def press(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].click()", self.one(selector))

    def tick(self, group: str, label: str) -> None:
        boxes = f"#{group} label"
        box = until(lambda: [one for one in self.all(boxes) if one.text.strip() == label], f"{group}: {label}")[0]
        box.find_element("css selector", "input").click()

    def answers(self) -> list[str]:
        script = "return [...document.querySelectorAll('[id^=answer-] textarea')].map(one => one.value)"
        found: list[str] = self.browser.execute_script(script)
        return found

    def rewards(self, shown: str) -> dict[str, float]:
        """The rewards of the policies' answers, in the row of what is shown."""
        script = """return [...document.querySelectorAll('#scores td[data-shown]')].filter(
            cell => cell.dataset.shown === arguments[0]).map(cell => [cell.dataset.policy, cell.textContent])"""
        return {name: float(text) for name, text in self.browser.execute_script(script, shown)}

    def picture(self, name: str) -> None:
        if PICTURES:
            time.sleep(1)
            self.browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def test_principles_steer_the_score_in_a_browser(
    browser: Any, address: str, found: results.Results, instruction: str
) -> None:
    screen = Screen(browser)
    began = time.monotonic()
    browser.get(address)
    screen.type("#instruction textarea", instruction)
    screen.press("#ask")
    until(lambda: any(screen.answers()), "a first word")
    first = time.monotonic() - began
    names = [one.name for one in found.policies]
    until(lambda: all(screen.answers()), "answers")
    screen.one("#scores p")

    def settled() -> list[str] | None:
        before = screen.answers()
        time.sleep(2)
        return before if screen.answers() == before else None

    answers = until(settled, "whole answers")
    say(f"from opening the page to the first word: {first:.1f} s\n")
    assert len(answers) == len(names)

    # Tick a principle: rewards. Negate it: the order of the shortest and the longest answer turns.
    screen.tick("principles", "Concise")
    plain = until(lambda: screen.rewards("Concise"), "rewards")
    assert set(plain) == set(names)
    screen.picture("playground_plain")
    screen.tick("negated", "Concise")
    negated = until(lambda: screen.rewards("Concise, negated"), "rewards of the negation")
    screen.picture("playground_negated")
    lengths = {name: len(answer) for name, answer in zip(names, answers, strict=True)}
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    assert plain[short] > plain[long]
    assert negated[short] < negated[long]

    # The same sentence in one's own words is the same principle.
    screen.tick("negated", "Concise")
    until(lambda: screen.rewards("Concise"), "rewards as before")
    sentence = next(one.definition for one in found.principles if one.dimension == "Concise")
    screen.type("#own textarea, #own input", sentence)
    own = until(lambda: screen.rewards("my own principle"), "rewards of one's own principle")
    assert own == screen.rewards("Concise") == plain
    assert set(screen.rewards("all of these together")) == set(names)

    # An answer that is edited is scored as it stands.
    screen.type("#answer-0 textarea", "No.")
    until(lambda: screen.rewards("Concise").get(names[0]) not in (None, plain[names[0]]), "rewards of an edited answer")

    screen.press("#judge")
    verdict = until(lambda: screen.all("[data-verdict='Concise']"), "a verdict")[0].text
    assert verdict in (names[0], names[-1], "the orders disagree")

    screen.press("#texts button, button.label-wrap")
    screen.press("#show-texts")
    texts = "return document.querySelector('#texts textarea')?.value"
    shown = until(lambda: browser.execute_script(texts), "the texts that models read")
    assert instruction in shown
    assert sentence in shown

    # An error is a sentence.
    screen.type("#instruction textarea", "why " * 400)
    screen.press("#ask")
    toast = "return document.querySelector('[data-testid=toast-body]')?.textContent"
    said = until(lambda: browser.execute_script(toast), "an error")
    assert re.search(r"The prompt has \d+ tokens, .* \(ppo\.query_length\): shorten the instruction", said), said
    screen.picture("playground_error")

    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"}
    assert asked
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []
