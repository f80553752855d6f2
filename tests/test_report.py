"""The report: its tables equal the results, computed again the slow way; and it opens in a browser, offline."""

import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from salmon import configuration, figures, pages, plan
from salmon.artifacts import manifest_path
from tests.browser import check_quiet, chromium, needs_chromium
from tests.running import merge
from tests.small_run import MINE, snakemake

ROOT = Path(__file__).parents[1]
PRINCIPLES = [
    *("Concise", "Ethical", "Specific", "Educational and Engaging", "Methodical", "Multilingual", "Creative"),
    *("Honest and Accurate", "Comprehensive", "Natural Language Understanding", "Dramatic"),
]
RUNS = [
    *("default", "harmless", "honest", "non_evasive", "no_pmp", "no_length_bonus", "sum_of_principles", "control"),
]


class Reader(HTMLParser):
    """The tables of a page: rows of texts, and of the numbers behind them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.keys: list[list[list[float | None]]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
            self.keys.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.keys[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            key = dict(attrs).get("data-key")
            self.keys[-1][-1].append(None if key is None else float(key))
        self.inside = tag in ("th", "td", "button", "small") or (self.inside and tag != "table")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


def shown(small_run: Path, part: str) -> Reader:
    return Reader((small_run / "results" / "report" / part / "table.html").read_text())


def read(small_run: Path, file: str) -> Any:
    return json.loads((small_run / "results" / file).read_text())


def cell(one: dict[str, Any], digits: int = 2) -> str:
    """A number with its interval, as a table shows it."""
    if one["value"] is None:
        return ""
    value = f"{one['value']:.{digits}f}"
    return value if one["low"] is None else f"{value} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"


def cells(page: Reader, table: int) -> list[list[str]]:
    """The rows of a table without its header, as texts."""
    return [[text.strip() for text in row] for row in page.tables[table][1:]]


# ---- Tables, on the small run


def test_the_funnel_adds_up_to_the_manifests_and_to_the_rows_of_the_tables(small_run: Path) -> None:
    results = small_run / "results"
    (rows,) = shown(small_run, "funnel").tables
    columns, *rows = rows
    found = {(row[0], row[1]): dict(zip(columns[3:], row[3:], strict=True)) for row in rows}
    assert len(found) == len(rows)
    checked = 0
    for name, title in figures.TITLES.items():
        if name == "run_judgements":  # only for several runs, and here is one
            continue
        path = results / ("runs/default" if name in plan.OWN else "") / configuration.ARTIFACTS[name]
        counts, table = json.loads(manifest_path(path).read_text())["counts"], pl.read_parquet(path)
        mine = {source: numbers for (stage, source), numbers in found.items() if stage == title}
        for numbers in mine.values():
            came, kept, left_out = (int(numbers[what].replace(",", "")) for what in ("rows", "kept", "left out"))
            reasons = [
                int(reason.rsplit(" ", 1)[1].replace(",", "")) for reason in numbers["why"].split(", ") if reason
            ]
            assert came == kept + left_out == kept + sum(reasons)
        for source, numbers in mine.items():
            for reason in filter(None, numbers["why"].split(", ")):
                said, number = reason.rsplit(" ", 1)
                names = [f"{source}: {said}", said, said.replace(" ", "_"), f"skipped_{said.replace(' ', '_')}"]
                names += [f"pairs_{said.replace(' ', '_')}"]
                assert int(number.replace(",", "")) in [counts[key] for key in names if key in counts], reason
        kept = {source: int(numbers["kept"].replace(",", "")) for source, numbers in mine.items()}
        came = {source: int(numbers["rows"].replace(",", "")) for source, numbers in mine.items()}
        if "source" in table.columns and len(mine) > 1:
            assert kept == dict(table["source"].value_counts().iter_rows())
            assert came == {source: counts[f"{source}: rows"] for source in mine}
            assert {f"{source}: kept": number for source, number in kept.items()}.items() <= counts.items()
        elif name in figures.JUDGED:
            assert (came, kept) == ({"": counts["pairs"]}, {"": table["prompt_id"].n_unique()})
        elif name == "reward_data":
            judged = pl.read_parquet(results / "preferences" / "preferences.parquet")["prompt_id"].n_unique()
            assert kept == {"pairs": judged, "draws of principles": table.height}
            assert came == {"pairs": counts["pairs"], "draws of principles": 2 * judged}  # passes
        elif name.startswith("response"):
            assert (came, kept) == ({"": table.height}, {"": (table["finish_reason"] != "prompt_too_long").sum()})
        elif name.endswith("answers"):
            assert (came, kept) == ({"": counts["prompts"]}, {"": table.height})
        else:
            assert [*kept.values()] == [table.height]
        checked += len(mine)
    assert checked == len(rows)


def test_the_tables_show_what_was_measured(small_run: Path) -> None:
    judge, page = read(small_run, "evaluation/judge/judge.json"), shown(small_run, "judge")
    for (name, *_), row in zip(page.tables[0][1:], page.keys[0][1:], strict=True):
        measured = judge["principles"][name]
        order = ("agree", "first", "bias", "margin", "zeros")
        assert row[1:] == [measured["agree"]["number"], *(measured[what]["value"] for what in order)]
    assert [row[1:] for row in page.keys[1][1:]] == judge["correlation"]
    for (source, name, *_), row in zip(page.tables[2][1:], page.keys[2][1:], strict=True):
        right = judge["labelled"][source][name]
        assert row[2:] == [right[what]["value"] for what in ("agree", "right", "mean_right")]
    assert len(page.tables[2]) == 1 + sum(map(len, judge["labelled"].values()))
    for folder in ("pmp", "reward_model"):
        found, page = read(small_run, f"evaluation/{folder}/reward_model.json"), shown(small_run, folder)
        held_out = found["held_out"]
        for (name, *_), row in zip(page.tables[0][1:-1], page.keys[0][1:-1], strict=True):
            ways = [held_out["deciding"][name][way]["value"] for way in ("plain", "negated", "turned")]
            assert row[1:5] == [*ways, held_out["flips"][name]["value"]]
            errors = held_out["deciding"][name]["calibration_error"]
            assert row[6:9] == [errors[way] for way in ("plain", "negated", "turned")]
        assert page.keys[0][-1][1] == held_out["accuracy"]["value"]
        for name, *texts in cells(page, 0)[:-1]:
            ways = [held_out["deciding"][name][way] for way in ("plain", "negated", "turned")]
            assert texts[:4] == [cell(one) for one in (*ways, held_out["flips"][name])]
            error = held_out["deciding"][name]["calibration"]["error"]
            assert texts[4] == ("" if error is None else f"{error:.2f}")
        for way, *texts in cells(page, 1):
            sources = found["people"]["all" if way == "all principles" else way]
            assert texts == [cell(sources[name]) for name in sorted(sources)]
        people = dict(zip((row[0] for row in page.tables[1][1:]), page.keys[1][1:], strict=True))
        for way, sources in found["people"].items():
            expected = [sources[name]["value"] for name in sorted(sources)]
            assert people["all principles" if way == "all" else way][1:] == expected
        assert ("held_out_of_pmp" in found) == (folder == "reward_model")
        if before := found.get("held_out_of_pmp"):
            assert cells(page, 2) == [[source, str(one["number"]), cell(one)] for source, one in before.items()]
        trained = read(small_run, f"models/{folder}/metrics.json")
        assert page.keys[-2][1][1] in (trained["evaluation"]["accuracy"], trained["evaluation"]["loss"])
        assert [row[1:4] for row in page.keys[-1][1:]] == [
            [entry[what] for what in ("step", "loss", "grad_norm")]
            for entry in (trained["training"][0], trained["training"][-1])
        ]
    found, page = read(small_run, "evaluation/policies/policies.json"), shown(small_run, "policies")
    for (name, *_), row in zip(page.tables[0][1:], page.keys[0][1:], strict=True):
        assert row[1:] == [one["value"] for one in found["behaviour"][name].values()]
    wins = found["wins"]["default"]
    for (label, *_), row in zip(page.tables[1][1:], page.keys[1][1:], strict=True):
        name, _, negated = label.partition(", ")
        assert row[1:] == [wins[name][negated or "plain"]["default"][plan.INITIAL]["value"]]
    for label, *texts in cells(page, 1):
        name, _, negated = label.partition(", ")
        assert texts == [cell(wins[name][negated or "plain"]["default"][plan.INITIAL])]
    assert len(page.tables[1]) == 1 + sum(map(len, wins.values()))
    for label, *texts in cells(page, 2):
        name, _, negated = label.partition(", ")
        means = found["scores"]["default"][name][negated or "plain"]
        assert texts == [cell(means[policy]) for policy in (plan.INITIAL, "default")]
    assert len(page.tables[2]) == len(page.tables[1])
    for name, *texts in cells(page, 3):
        assert texts == [cell(found["judge"][name]["default"][plan.INITIAL])]
    for name, *texts in cells(page, 0):
        assert texts == [cell(one) for one in found["behaviour"][name].values()]
    for (name, *_), row in zip(page.tables[3][1:], page.keys[3][1:], strict=True):
        assert row[1:] == [found["judge"][name]["default"][plan.INITIAL]["value"]]
    page = shown(small_run, "tasks")
    folders = ("evaluation/initial_tasks", "runs/default/evaluation/tasks")
    asked = [read(small_run, f"{folder}/tasks.json") for folder in folders]
    assert page.tables[0][0] == ["task", "metric", plan.INITIAL, "default"]
    for (task, metric, *_), row in zip(page.tables[0][1:], page.keys[0][1:], strict=True):
        assert row[2:] == [one[task][metric]["value"] for one in asked]
    for task, metric, *texts in cells(page, 0):
        assert texts == [cell(one[task][metric], 3) for one in asked]
    assert len(page.tables[0]) == 1 + sum(map(len, asked[0].values()))


def test_the_table_of_ppo_again_the_slow_way(small_run: Path) -> None:
    lines = (small_run / "results/runs/default/policy/metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    page = shown(small_run, "training")
    row = dict(zip(page.tables[0][0], page.keys[0][1], strict=True))
    assert row["steps"] == len(entries)
    for key, title in figures.CURVES.items():
        assert row[f"{title}, first step"] == entries[0][key]
        assert row[f"{title}, end"] == entries[-1][key]  # with so few, the last tenth is the last one
    for key, label in figures.SECONDS.items():
        assert row[f"seconds of {label}"] == pytest.approx(sum(entry[key] for entry in entries))
    many = figures.training({"a": [{"step": step, "score": float(step)} for step in range(1, 31)]})
    ends = dict(zip(many.tables[0].columns, many.tables[0].rows[0], strict=True))
    assert ends["Reward model's score, end"] == pytest.approx((28 + 29 + 30) / 3)
    assert ends["Entropy per token, end"] is None


def test_samples_are_of_ones_own_prompts_only(small_run: Path) -> None:
    """The public data set among the sources of the evaluation is answered but not shown."""
    (table,) = shown(small_run, "samples").tables
    assert table[0] == ["prompt", plan.INITIAL, "default"]
    assert {row[0] for row in table[1:]} == set(MINE)
    results = small_run / "results"
    for place, path in ((1, "evaluation/initial_answers.parquet"), (2, "runs/default/evaluation/answers.parquet")):
        answers = dict(pl.read_parquet(results / path).select("instruction", "response").iter_rows())
        assert len(answers) > len(MINE)
        assert [row[place] for row in table[1:]] == [answers[row[0]] for row in table[1:]]


def test_texts_are_no_markup() -> None:
    hostile = '<script>alert("x")</script>&amp;'
    page = figures.samples([hostile], {hostile: [hostile]}).page()
    assert Reader(page).tables == [[["prompt", hostile], [hostile, hostile]]]
    assert page.count("<script>") == 1
    assert "alert(&quot;" in page
    long = figures.samples(["p"], {"a": ["x" * 5000]}).tables[0].rows[0][1]
    assert isinstance(long, str)
    assert len(long) == figures.LONGEST


def test_cells_are_written_for_people_and_sorted_by_their_numbers() -> None:
    one = {"value": 0.123456, "low": 0.1, "high": 0.2, "number": 1234}
    bare = {"value": 2.0, "low": None, "high": None, "number": 1}
    table = pages.Table("", ["a", "b", "c", "d"], [["x|y", one, 12345, bare], ["z", figures.NOTHING, 1.5, None]])
    found = Reader(pages.page("T", [table]))
    assert found.tables[0][1:] == [["x|y", "0.12 (0.10 to 0.20)", "12,345", "2.00 "], ["z", "", "1.50", ""]]
    assert found.keys[0][1:] == [[None, 0.123456, 12345.0, 2.0], [None, None, 1.5, None]]


# ---- Pictures


def many(principles: Sequence[str] = PRINCIPLES, runs: Sequence[str] = RUNS) -> dict[str, figures.Part]:
    """Every part of the report, with eleven principles and eight runs."""
    chance = random.Random(0)

    def estimate(middle: float = 0.5) -> dict[str, float | int | None]:
        value = middle + chance.uniform(-0.3, 0.3)
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "number": 50}

    bins = [{"expected": x / 10, "observed": chance.random(), "number": 5 * x} for x in range(1, 10)]
    calibration = {"bins": bins, "error": 0.1}
    names = ["initial policy", "initial policy of no_pmp", *runs]
    before = {run: names[run == "no_pmp"] for run in runs}
    judge = {
        "principles": {p: {w: estimate() for w in ("agree", "first", "bias", "margin", "zeros")} for p in principles},
        "correlation": [[None if one == other else 0.5 for one in principles] for other in principles],
        "labelled": {
            source: {p: {what: estimate() for what in ("agree", "right", "mean_right")} for p in principles[:3]}
            for source in ("hh_rlhf_helpful", "hh_rlhf_harmless")
        },
    }
    deciding = {
        p: {w: estimate() for w in ("plain", "negated", "turned")}
        | {"calibration": calibration, "calibration_error": {"plain": 0.1, "negated": 0.2, "turned": None}}
        for p in principles
    }
    reward = {
        "held_out": {
            "accuracy": estimate(),
            "calibration": calibration,
            "deciding": deciding,
            "flips": {p: estimate() for p in principles},
        },
        "people": {way: {"hh": estimate(), "hhh": estimate()} for way in ("all", *principles)},
    }
    entries = [
        {"step": step, "value_error": 1.0 / step, "finished": 0.9, "seconds_sampling": 9.0}
        | dict.fromkeys(("score", "kl_sequence", "response_tokens", "entropy"), math.sin(step))
        for step in range(1, 40)
    ]
    ways = ("plain", "negated")
    policies = {
        "names": names,
        "initial": before,
        "behaviour": {n: {what: estimate() for what in (*figures.BEHAVIOUR, "tokens")} for n in names},
        "scores": {m: {p: {w: {n: estimate() for n in names} for w in ways} for p in principles} for m in ("a", "b")},
        "wins": {
            m: {p: {w: {n: {o: estimate() for o in names if o != n} for n in names} for w in ways} for p in principles}
            for m in ("a", "b")
        },
        "judge": {p: {run: {other: estimate()} for run, other in before.items()} for p in principles},
        "endpoint": {
            run: {other: {"prompts": {what: estimate() for what in ("won", "agree", "first")}}}
            for run, other in before.items()
        },
    }
    metric = {"value": 0.4, "stderr": 0.05, "low": 0.3, "high": 0.5, "number": 100}
    asked = {
        f"task_{place}": {
            "acc": metric,
            "perplexity": {**metric, "value": 9.0, "stderr": None, "low": None, "high": None},
        }
        for place in range(8)
    }
    step = {"step": 1, "loss": 0.7, "grad_norm": 1.0, "learning_rate": 1e-5}
    counts = {f"{run}: {what}": 9 for run in runs for what in ("kept", "duplicate", "over the limit", *principles)}
    return {
        "funnel": figures.funnel([one for run in runs for one in figures.steps("rl_prompts", run, counts)]),
        "judge": figures.judge(judge),
        "reward_model": figures.reward_model("Reward model", reward),
        "sft": figures.model_training("SFT", {"training": [step], "evaluation": {"loss": 0.6, "number": 8}}),
        "training": figures.training(dict.fromkeys(runs, entries)),
        "policies": figures.policies(policies),
        "tasks": figures.tasks(dict.fromkeys(names, asked)),
    }


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    files: dict[str, list[bytes]] = defaultdict(list)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        for part in many(PRINCIPLES[:2], RUNS[:2]).values():
            part.write(folder)
            for file in folder.iterdir():
                files[file.name].append(file.read_bytes())
            shutil.rmtree(folder)
            folder.mkdir()
    assert {name for name in files if name.endswith(".svg")} == {
        *("funnel.svg", "judge.svg", "correlation.svg", "accuracy.svg", "people.svg", "training.svg"),
        *("behaviour.svg", "principles_a.svg", "principles_b.svg", "tasks.svg"),
    }
    for name, contents in files.items():
        half = len(contents) // 2
        assert contents[:half] == contents[half:], name


def overlap(boxes: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over each other by more than a pixel."""
    return [
        (one, other)
        for place, (one, box) in enumerate(boxes)
        for other, also in boxes[place + 1 :]
        if min(box.x1, also.x1) - max(box.x0, also.x0) > 1 and min(box.y1, also.y1) - max(box.y0, also.y0) > 1
    ]


def ticks(axis: Axis) -> list[Text]:
    """The labels that are drawn: those within the limits."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_no_label_is_drawn_over_another(subtests: pytest.Subtests) -> None:
    """Rows, titles, numbers in the cells and legends; rotated names stand side by side though their boxes overlap."""
    for name, part in many().items():
        for picture, drawn in part.pictures.items():
            with subtests.test(f"{name}/{picture}"):
                canvas = FigureCanvasAgg(drawn)
                canvas.draw()
                renderer = canvas.get_renderer()
                texts = [text for legend in drawn.legends for text in legend.get_texts()]
                for axes in drawn.axes:
                    if axes.get_visible():
                        texts += [axes._left_title, axes.xaxis.label, *axes.texts]
                        texts += ticks(axes.yaxis)
                        texts += [label for label in ticks(axes.xaxis) if not label.get_rotation()]
                boxes = [
                    (text.get_text(), text.get_window_extent(renderer))
                    for text in texts
                    if text.get_text() and text.get_visible()
                ]
                assert overlap(boxes) == []
                width, height = canvas.get_width_height()
                for text, box in boxes:
                    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1, text


# ---- What is drawn


def drawn(changes: dict[str, Any]) -> dict[str, list[str]]:
    """Part of the report -> the runs that have one of their own."""
    raw = merge(yaml.safe_load((ROOT / "config.yaml").read_text()), changes)
    known = plan.Plan(configuration.load(raw, ROOT))
    found: dict[str, list[str]] = {}
    for name in plan.DRAWN:
        owners = [run for run in known.runs if known.owner(run, name) == run and known.has(run, name)]
        if owners:
            found[name] = owners
    assert known.target_paths("report") == [known.path(run, name) for name in found for run in found[name]]  # type: ignore[arg-type]
    return found


OF_ONE = {"funnel": ["default"], "judge_figures": ["default"], "pmp_figures": ["default"]}
OF_ONE |= {"reward_figures": ["default"], "training_figures": ["default"]}
MODELS = ["default", "no_pmp", "sum_of_principles"]
MEASURED = OF_ONE | {"reward_figures": MODELS, "policy_figures": ["default"], "task_figures": ["default"]}
# Nothing by which a policy is measured.
NO_POLICY = {"prompts": {"oasst1": None}, "tasks": [], "mt_bench": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"targets": ["policy", "report"]}, OF_ONE),
        ({"targets": ["policies", "report"]}, OF_ONE | {"reward_figures": MODELS}),
        ({"targets": ["policies", "evaluation", "report"]}, MEASURED),
        ({"targets": ["report"]}, MEASURED),
        ({"targets": ["report"], "report": {"samples": True}}, MEASURED | {"samples": ["default"]}),
        ({"targets": ["prompts", "report"]}, {"funnel": ["default"]}),
        ({"targets": ["sft", "report"]}, {"funnel": ["default"], "sft_figures": ["default"]}),
        (
            {"targets": ["evaluation", "report"], "evaluation": NO_POLICY, "runs": None},
            {key: OF_ONE[key] for key in OF_ONE if key != "training_figures"},
        ),
        # What was made elsewhere has no funnel, and was not trained here.
        (
            {"targets": ["policy", "report"], "reward_model": {"path": "someone/reward-model"}},
            {"funnel": ["default"], "training_figures": ["default"]},
        ),
        # But it is measured on people's pairs.
        (
            {"targets": ["evaluation", "report"], "evaluation": NO_POLICY, "runs": None}
            | {"reward_model": {"path": "someone/reward-model"}},
            {"funnel": ["default"], "reward_figures": ["default"]},
        ),
    ],
    ids=lambda value: "+".join(map(str, value.get("targets", ()))) if isinstance(value, dict) else "",
)
def test_only_what_the_targets_make_is_drawn(changes: dict[str, Any], expected: dict[str, list[str]]) -> None:
    if changes.pop("runs", {}) is None:
        runs = yaml.safe_load((ROOT / "config.yaml").read_text())["runs"]
        changes["runs"] = {name: None for name in runs if name != "default"}
    assert drawn(changes) == expected


# ---- In a browser

PICTURE = """
const done = arguments[1], uri = results[arguments[0]].data_uri;
app.setView({content: "img", contentPath: uri, resultPath: arguments[0]});
const look = () => {
  const image = [...document.querySelectorAll("#app img")].find(one => one.src === uri);
  if (image && image.complete) done(image.naturalWidth); else setTimeout(look, 20);
};
look();
"""


@needs_chromium
def test_the_report_opens_in_a_browser(small_run: Path, tmp_path: Path) -> None:
    """No error in its console, every picture and page is there, and nothing is requested from the network."""
    from selenium.webdriver.common.by import By

    file = tmp_path / "report.html"
    run = snakemake("--configfile", str(small_run / "config.yaml"), "--report", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Missing metadata" not in run.stdout + run.stderr
    with chromium() as browser:
        browser.set_script_timeout(60)
        browser.get(file.as_uri())
        found = browser.execute_script("return Object.entries(results).map(([path, one]) => [path, one.mime_type])")
        assert {path for path, _ in found} == {
            str(path) for path in (small_run / "results" / "report").rglob("*") if path.suffix in (".svg", ".html")
        }
        for path, kind in found:
            if kind == "image/svg+xml":
                assert browser.execute_async_script(PICTURE, path) > 300, path
                continue
            show = 'app.setView({content: "html", contentPath: results[arguments[0]].data_uri})'
            browser.execute_script(show, path)
            browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
            until = time.monotonic() + 60
            while not browser.find_elements(By.TAG_NAME, "td") and time.monotonic() < until:
                time.sleep(0.02)
            assert browser.find_elements(By.TAG_NAME, "td"), path
            if path.endswith("training/table.html"):
                heads = browser.find_elements(By.CSS_SELECTOR, "th button")
                heads[1].click()
                assert browser.find_elements(By.CSS_SELECTOR, "th[data-sorted]")
            browser.switch_to.default_content()
        browser.execute_script('app.setView({content: "stats"})')
        check_quiet(browser, "file:", "data:", "blob:")
