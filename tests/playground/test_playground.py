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
import urllib.request
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
from tests.browser import check_quiet, chromium, needs_chromium

ROOT = Path(__file__).parents[2]
DEMO = Path(os.environ.get("PLAYGROUND_RESULTS", ROOT / "results" / "demo"))
PICTURES = os.environ.get("PLAYGROUND_PICTURES")  # folder for screenshots
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
    assert found.notes == []
    assert len(found.principles) == len(json.loads((ROOT / "demo/principles/judge.json").read_text()))


def test_answers_are_those_of_the_policy_alone(bench: Workbench, instruction: str) -> None:
    for name in (INITIAL, "concise"):
        policy = bench.policies[name]
        # Earlier computations make no difference.
        bench.rewards(bench.scorers["reward_model"], instruction, ANSWERS, [["The output is short."]])
        bench.judge(instruction, *ANSWERS, bench.results.principles[:1])
        assert not any(module.training for module in bench.lm.modules())
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
        texts, _ = bench.reward_texts(scorer, instruction, ANSWERS, shown)
        alone = [reward_model.score(model, [text], 1, "cpu").item() for text in texts]
        rewards, cut = bench.rewards(scorer, instruction, ANSWERS, shown)
        assert cut == set()
        assert [reward for row in rewards for reward in row] == pytest.approx(alone, abs=1e-5)
        assert len(set(alone)) == len(alone)
        assert bench.reads_principles(scorer) == (name != "pmp")
        assert bench.rewards(scorer, instruction, [ANSWERS[0], 99 * ANSWERS[1]], shown)[1] == {1}


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
    verdicts, cut = bench.judge(instruction, *ANSWERS, found.principles)
    assert not cut
    assert alone is not None
    assert [one.dimension for one in verdicts] == [one.dimension for one in found.principles]
    assert [(one.s12, one.s21) for one in verdicts] == [pytest.approx(pair, abs=1e-4) for pair in alone]
    for one, other in (verdict.prompts for verdict in verdicts):
        assert one.index(ANSWERS[0]) < one.index(ANSWERS[1])
        assert other.index(ANSWERS[1]) < other.index(ANSWERS[0])


def change(manifest: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(manifest.read_text())
    edit(raw)
    manifest.write_text(json.dumps(raw))


def move_inputs(raw: dict[str, Any]) -> None:
    """Names that exist nowhere: the demo's may also exist in the working directory."""
    raw["inputs"] = {name.replace("results/", "elsewhere/"): value for name, value in raw["inputs"].items()}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*make demo"):
        results.read(tmp_path / "none")
    with pytest.raises(UserError, match="holds no usable policy"):
        results.read(tmp_path)
    for name in ("concise", "control"):
        shutil.copytree(DEMO / "runs" / name, tmp_path / "runs" / name)
        change(tmp_path / "runs" / name / "policy/manifest.json", move_inputs)
    with pytest.raises(UserError, match="holds no usable reward model"):
        results.read(tmp_path)
    shutil.copytree(DEMO / "models", tmp_path / "models")
    shutil.copytree(DEMO / "models" / "pmp", tmp_path / "models" / ".pmp.host-1.tmp")  # left over from a killed job
    found = results.read(tmp_path)  # without a judge
    assert [one.name for one in found.policies] == [INITIAL, "concise", "control"]
    assert [one.name for one in found.scorers] == ["pmp", "reward_model"]
    assert (found.judge, found.notes) == (None, [])
    with pytest.raises(UserError, match="there is no run other; the runs are concise, control"):
        results.read(tmp_path, run="other")


def test_what_does_not_fit_is_left_out_with_a_reason(tmp_path: Path) -> None:
    for part in ("models", "runs"):
        shutil.copytree(DEMO / part, tmp_path / part)
    change(tmp_path / "models/pmp/manifest.json", lambda raw: raw["settings"]["model"].update(base="other/model"))
    change(tmp_path / "runs/concise/policy/manifest.json", lambda raw: raw["settings"].pop("policy_prompt"))
    change(
        tmp_path / "runs/control/policy/manifest.json", lambda raw: raw["settings"]["model"].update(dtype="bfloat16")
    )
    missing = {"principles": "my/none.json"}
    change(tmp_path / "runs/default/policy/manifest.json", lambda raw: raw["settings"]["ppo"].update(missing))
    name = "demo/templates/reward_model.txt"
    change(tmp_path / "models/reward_model/manifest.json", lambda raw: raw["inputs"].update({name: "0"}))
    found = results.read(tmp_path)
    assert [one.name for one in found.scorers] == ["reward_model"]
    runs = {folder.parent.name for folder in DEMO.glob("runs/*/policy")}
    assert {one.name for one in found.policies} == {INITIAL, *runs} - {"concise", "control"}
    for said in (
        r"pmp is not offered: its base model is other/model",
        r"concise is not offered: its manifest has no 'policy_prompt'",
        r"control is not offered: its base model is .*bfloat16.*--run",
        r"the list of principles of default is not offered: .*my/none.json",
        rf"{name} has changed since reward_model was made",
    ):
        assert any(re.search(said, note) for note in found.notes), said


def test_a_reward_model_from_elsewhere_is_read_as_rl_reads_it(tmp_path: Path) -> None:
    """As with `reward_model.path`: its manifest does not say how its texts are made, or it is outside the results."""
    shutil.copytree(DEMO / "runs" / "concise", tmp_path / "results" / "runs" / "concise")
    shutil.copytree(DEMO / "models" / "reward_model", tmp_path / "mine")

    def by_path(raw: dict[str, Any]) -> None:
        raw["inputs"] = {name: known for name, known in raw["inputs"].items() if not name.endswith("reward_model")}
        raw["inputs"]["mine"] = "0"

    change(tmp_path / "results/runs/concise/policy/manifest.json", by_path)
    imported = {"settings": {"reward_model": {"path": "x", "revision": None}, "model": {"base": "demo/model"}}}
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps(imported))
    found = results.read(tmp_path / "results")
    [scorer], ppo = found.scorers, found.policies[1].ppo
    assert scorer.folder == tmp_path / "mine"
    assert str(scorer.template) == ppo.template
    assert (scorer.max_length, scorer.query_length) == (ppo.reward_max_length, ppo.reward_query_length)


# ---- In a browser


def say(text: str) -> None:
    """Print for whoever runs the tests with `-s`."""
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
    proxy = os.environ | {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # as on clusters
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file, stdout=file, env=proxy)
    try:
        while "open http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - began < 180, log.read_text()
            time.sleep(0.1)
        say(f"\nthe playground started in {time.monotonic() - began:.1f} s\n")
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)  # while an answer is being sampled: see the last lines of the test
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text()


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def until(holds: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """What a function returns, as soon as that is truthy."""
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
        """The rewards of the policies' answers, in the row with this name."""
        script = """return [...document.querySelectorAll('#scores td[data-shown]')].filter(
            cell => cell.dataset.shown === arguments[0]).map(cell => [cell.dataset.policy, cell.textContent])"""
        return {name: float(text) for name, text in self.browser.execute_script(script, shown)}

    def toast(self) -> str | None:
        """The error that is shown, if there is one."""
        text: str | None = self.browser.execute_script(
            "return document.querySelector('[data-testid=toast-body]')?.textContent"
        )
        return text

    def picture(self, name: str) -> None:
        if PICTURES:
            time.sleep(1)
            self.browser.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


@needs_chromium
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

    # Tick a principle: rewards appear. Negate it: the shortest and the longest answer swap places.
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

    # Without the principle, its negation does not count; ticked again, not negated, it scores as before.
    screen.tick("principles", "Concise")
    until(lambda: not screen.rewards("Concise, negated"), "no principle")
    screen.tick("negated", "Concise")
    screen.tick("principles", "Concise")
    until(lambda: screen.rewards("Concise"), "rewards as before")
    assert screen.toast() is None

    # The same sentence as one's own principle gives the same rewards.
    sentence = next(one.definition for one in found.principles if one.dimension == "Concise")
    screen.type("#own textarea, #own input", sentence)
    own = until(lambda: screen.rewards("my own principle"), "rewards of one's own principle")
    assert own == screen.rewards("Concise") == plain
    assert set(screen.rewards("all of these together")) == set(names)

    # An answer that is edited is scored as it stands.
    screen.type("#answer-0 textarea", "No.")
    until(lambda: screen.rewards("Concise").get(names[0]) not in (None, plain[names[0]]), "rewards of an edited answer")

    screen.type("#own-name textarea, #own-name input", "brief")
    screen.press("#judge")
    for dimension in ("Concise", "brief"):
        verdict = until(lambda name=dimension: screen.all(f"[data-verdict='{name}']"), "a verdict")[0].text
        assert verdict in (names[0], names[-1], "the orders disagree")
    prompts = "return [...document.querySelectorAll('#verdicts pre')].map(one => one.textContent)"
    assert sum(f"more {name}" in text for text in browser.execute_script(prompts) for name in ("Concise", "brief")) == 4

    screen.press("#texts button, button.label-wrap")
    screen.press("#show-texts")
    texts = "return document.querySelector('#texts textarea')?.value"
    shown = until(lambda: browser.execute_script(texts), "the texts that models read")
    assert instruction in shown
    assert sentence in shown

    # A second question after rewards and verdicts is answered, too; the same seed gives the same answers.
    screen.press("#ask")
    until(lambda: screen.answers() == answers, "the same answers")
    assert screen.toast() is None

    # An error is shown as a sentence.
    screen.type("#instruction textarea", "why " * 400)
    screen.press("#ask")
    said = until(screen.toast, "an error")
    assert re.search(r"The prompt has \d+ tokens, .* \(ppo\.query_length\): shorten the instruction", said), said
    screen.picture("playground_error")

    assert json.loads(urllib.request.urlopen(f"{address}/config").read())["run_history"] is False
    check_quiet(browser, address, "data:", "blob:")

    # The fixture ends the server in the middle of this.
    screen.type("#instruction textarea", instruction)
    screen.press("#ask")
    until(lambda: any(screen.answers()), "a first word")
