"""Write the measurements of a run of this example into README.md, between its two marks: numbers, date and hardware.

The judge is also compared with programs, where a program can tell which of two answers a principle prefers.
"""

import datetime
import json
import logging
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import Field

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow_scripts")]

from salmon import artifacts, evaluation, intervals, language, script  # noqa: E402
from salmon.errors import UserError  # noqa: E402

log = logging.getLogger("salmon.write_readme")

BEGIN, END = "<!-- Written by write_readme.py -->", "<!-- End of what write_readme.py writes -->"
TIMES = (
    "Minutes per rule, summed over its jobs, which ran in parallel where possible. Of a killed job only the last\n"
    "attempt counts; of PPO, each step of the policy counts once."
)
CLEAR = 1.25  # an answer with this many times the words of the other is clearly longer
ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s", re.M)
CONTROL = "control"  # the run without principles
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class Arguments(script.Arguments):
    """Write the measurements of a run of this example into its README."""

    results: Path = Field(Path("results/smollm2"), description="folder of the results, with an evaluation")
    output: Path = Field(Path(__file__).with_name("README.md"), description="file that has the two marks")


def main(arguments: Arguments) -> None:
    """Collect the numbers and write them between the marks."""
    text = arguments.output.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(
            f"{arguments.output} needs one line {BEGIN} and one line {END}; the text between them is replaced"
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with artifacts.atomic(arguments.output) as new:
        new.write_text(f"{before}{BEGIN}\n\n{numbers(arguments.results)}\n{END}{after}", encoding="utf-8")
    log.info("wrote %s", arguments.output)


def numbers(results: Path) -> str:
    """All tables, in Markdown."""
    parts = [made_by(results), "### Time", TIMES, markdown(times(results))]
    judge = read(results / "evaluation/judge/judge.json")
    parts += ["### The judge", markdown(judge_table(judge, results)), markdown(labelled_table(judge))]
    parts += [longer_is_better(results)]
    parts += ["### The reward model", markdown(reward_table(results))]
    policies = read(results / "evaluation/policies/policies.json")
    parts += ["### The policies", markdown(behaviour_table(policies, results))]
    parts += ["Share of answers that score higher than the initial policy's, by the reward model:"]
    parts += [markdown(wins(policies))]
    parts += ["Share of answers that score higher than the control run's, by the reward model:"]
    parts += [markdown(wins(policies, CONTROL))]
    parts += [f"All shares are of {policies['behaviour'][policies['names'][0]]['words']['number']} answers."]
    parts += ["Share of answers that the judge prefers to the initial policy's:", markdown(judge_wins(policies))]
    if policies.get("versus"):
        parts += [
            "Share of answers that the judge prefers to the control run's:",
            markdown(judge_wins(policies, CONTROL)),
        ]
    if benchmarks := tasks_table(results, policies["names"]):
        parts += ["### Benchmarks", markdown(benchmarks)]
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; build it first: `make example`") from None


def markdown(table: Table) -> str:
    """A table in Markdown."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(one: Mapping[str, Any] | None, kind: str = "{:.2f}") -> str:
    """A number with its interval."""
    if one is None or one["value"] is None:
        return ""
    if one["low"] is None:
        return kind.format(one["value"])
    return f"{kind} ({kind} to {kind})".format(one["value"], one["low"], one["high"])


def counted(one: Mapping[str, Any]) -> str:
    """The same with the number of rows."""
    return f"{shown(one)} of {one['number']}" if one["number"] else ""


def made_by(results: Path) -> str:
    """Date, hardware and commit of the run."""
    manifest = read(results / "evaluation/policies/manifest.json")
    day = datetime.datetime.fromisoformat(manifest["created"]).date().isoformat()
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = named[0].partition(": ")[2] if named else platform.processor()
    commit = (manifest["git_commit"] or "unknown")[:7]
    dtype = read(results / "evaluation/initial_answers.manifest.json")["settings"]["model"]["dtype"]
    device = f"with {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "without a GPU"
    return textwrap.fill(
        f"Measured on {day}, on {os.cpu_count()} cores ({processor}) {device}, in {dtype}, at commit {commit}. "
        f"Brackets contain {intervals.LEVEL:.0%} intervals (by prompt); `of` precedes the number of rows.",
        120,
    )


def times(results: Path) -> Table:
    """Minutes of each rule, summed over its jobs: each job's last attempt, and of PPO each step of the policy."""
    spent: dict[str, list[float]] = {}
    for file in sorted((results / "benchmarks").rglob("*.tsv")):
        inner = file.relative_to(results / "benchmarks").parts
        names = [part for part in inner if part not in ("runs", *runs_of(results))]
        rule = names[0].removesuffix(".tsv")
        seconds = pl.read_csv(file, separator="\t")["s"][0]
        if rule == "train_policy":  # a kill may have cut it in two
            lines = (results / "runs" / inner[1] / "policy" / "metrics.jsonl").read_text().splitlines()
            steps = (value for line in lines for name, value in json.loads(line).items() if name.startswith("seconds_"))
            seconds = max(seconds, sum(steps))
        spent.setdefault(rule, []).append(seconds / 60)
    rows = [[name, str(len(each)), f"{sum(each):.1f}"] for name, each in spent.items()]
    rows.append(["all", str(sum(map(len, spent.values()))), f"{sum(map(sum, spent.values())):.0f}"])
    return ["rule", "jobs", "minutes"], rows


def runs_of(results: Path) -> list[str]:
    """Names of the runs."""
    return sorted(path.name for path in (results / "runs").iterdir())


# ---- The judge


def words(text: str) -> int:
    """Number of words."""
    return len(text.split())


def items(text: str) -> int:
    """Number of items of lists."""
    return len(ITEM.findall(text))


def shorter(asked: str, first: str, second: str) -> int:
    """1 where the first is clearly shorter, -1 where the second is, else 0."""
    one, other = words(first), words(second)
    return 0 if max(one, other) < CLEAR * min(one, other) else 1 if one < other else -1


def longer(asked: str, first: str, second: str) -> int:
    """1 where the first is clearly longer, -1 where the second is, else 0."""
    return -shorter(asked, first, second)


def more_orderly(asked: str, first: str, second: str) -> int:
    """1 where only the first has a list of steps or points, -1 where only the second has one, else 0."""
    one, other = items(first) >= 3, items(second) >= 3
    return int(one) - int(other)


def same_language(asked: str, first: str, second: str) -> int:
    """1 where only the first is in the language of the question, -1 where only the second is, else 0."""
    wanted, one, other = language.detect([asked, first, second])
    return (one == wanted) - (other == wanted) if wanted and one and other else 0


PROGRAMS: dict[str, tuple[str, Callable[[str, str, str], int]]] = {
    "Concise": ("fewer words", shorter),
    "Comprehensive": ("more words", longer),
    "Methodical": ("a list that the other lacks", more_orderly),
    "Multilingual": ("the language of the question", same_language),
}
"""Principle -> what its program looks at, and the program: 1 prefers the first answer, -1 the second, 0 neither."""


def judge_table(judge: Mapping[str, Any], results: Path) -> Table:
    """Per principle: agreement of the orders, bias, and, where a program can tell, how often the judge is right."""
    columns = [
        "principle",
        "both orders agree",
        "position bias",
        "program",
        "right where the orders agree",
        "right by the mean",
    ]
    pairs = pl.read_parquet(results / "preferences/preferences.parquet")
    for index in (0, 1):
        responses = pl.read_parquet(results / f"responses/response{index}.parquet")
        asked = ["instruction"] if index == 0 else []
        responses = responses.select("prompt_id", *asked, pl.col("response").alias(f"response{index}"))
        pairs = pairs.drop(asked, strict=False).join(responses, on="prompt_id", how="left")
    rows = []
    for name, measured in judge["principles"].items():
        row = [name, shown(measured["agree"]), shown(measured["bias"])]
        what, program = PROGRAMS.get(name, ("", None))
        rows.append([*row, what, *(of_program(pairs.filter(dimension=name), program) if program else [""] * 2)])
    return columns, rows


def of_program(pairs: pl.DataFrame, program: Callable[[str, str, str], int]) -> list[str]:
    """How often the judge is right about pairs with a clear difference: where its orders agree, and by their mean."""
    texts = pairs.select("instruction", "response0", "response1").iter_rows()
    sign = np.asarray([program(*row) for row in texts], dtype=float)
    s12, s21 = (pairs[name].to_numpy() * sign for name in ("s12", "s21"))
    known, groups = sign != 0, pairs["prompt_id"].to_list()
    agreed = np.where(known & (s12 * s21 > 0), s12 > 0, np.nan)
    mean = np.where(known, evaluation.correct(s12 + s21), np.nan)
    measured = [intervals.share(values, groups, 0) for values in (agreed, mean)]
    return [counted(one) for one in measured]


def labelled_table(judge: Mapping[str, Any]) -> Table:
    """The judge compared with people."""
    rows = [
        [source, name, counted(one["agree"]), shown(one["right"]), shown(one["mean_right"])]
        for source, principles in judge.get("labelled", {}).items()
        for name, one in principles.items()
    ]
    return [
        "people's pairs",
        "principle",
        "both orders agree",
        "right (one half where they disagree)",
        "right by the mean",
    ], rows


def longer_is_better(results: Path) -> str:
    """How often people prefer the longer output, among their pairs that the judge has read."""
    folder = results / "evaluation/judge_pairs"
    read = pl.read_parquet(folder / "judgements.parquet", columns=["prompt_id"])
    pairs = pl.read_parquet(folder / "preferred.parquet", columns=["prompt_id", "response"])
    others = pl.read_parquet(folder / "other.parquet", columns=["prompt_id", "response"]).rename({"response": "other"})
    pairs = pairs.join(others, on="prompt_id").join(read, on="prompt_id", how="semi")
    more = [words(one) - words(other) for one, other in pairs.select("response", "other").iter_rows()]
    right = evaluation.correct(more)
    return textwrap.fill(
        f"Of these {len(pairs)} pairs, people prefer the answer with more words in {right.mean():.2f} (equal lengths "
        "count one half).",
        120,
    )


# ---- Reward models and policies


def reward_table(results: Path) -> Table:
    """Held-out records and people's pairs, after each training."""
    stages = {stage: read(results / f"evaluation/{stage}/reward_model.json") for stage in ("pmp", "reward_model")}
    rows = [
        [
            "records held out of its training",
            *(counted(found["held_out"]["accuracy"]) for found in stages.values()),
        ]
    ]
    after = stages["reward_model"].get("held_out_of_pmp", {})
    rows += [[f"people, {source}, held out of PMP", "", counted(one)] for source, one in after.items()]
    people = {stage: found["people"]["all"] for stage, found in stages.items()}
    rows += [[f"people, {source}", *(counted(found[source]) for found in people.values())] for source in people["pmp"]]
    held = stages["reward_model"]["held_out"]
    for name, ways in held["deciding"].items():
        labels = {"plain": "plain", "negated": "negated", "turned": "reversed"}
        rows += [[f"{name} decided, {labels[way]}", "", counted(ways[way])] for way in labels]
    rows += [[f"{name} reversed: changes its mind", "", counted(one)] for name, one in held["flips"].items()]
    return ["measure", "after PMP", "after the judge's records"], rows


def behaviour_table(policies: Mapping[str, Any], results: Path) -> Table:
    """Behaviour of the policies."""
    columns = ["policy", "words", "has a list", "ends by itself", "KL", "distinct pairs of words"]
    rows = []
    for name in policies["names"]:
        found = policies["behaviour"][name]
        path = "initial_answers" if name not in runs_of(results) else f"../runs/{name}/evaluation/answers"
        answers = pl.read_parquet(results / "evaluation" / f"{path}.parquet")
        lists = intervals.share([items(text) >= 3 for text in answers["response"]], answers["prompt_id"].to_list(), 0)
        row = [shown(found["words"], "{:.0f}"), shown(lists), shown(found["finished"]), shown(found["kl"])]
        rows.append([name, *row, shown(found["distinct_2"])])
    return columns, rows


def wins(policies: Mapping[str, Any], against: str | None = None) -> Table:
    """Principles x runs by the reward model: against the initial policy, or against one of the runs."""
    initial, *runs = policies["names"]
    runs = [run for run in runs if run != against]
    rows = [
        [name + ", negated" * (way == "negated"), *(shown(ways[way][run].get(against or initial)) for run in runs)]
        for model in policies["wins"].values()
        for name, ways in model.items()
        for way in sorted(ways, reverse=True)  # plain, then negated
    ]
    return ["principle", *runs], rows


def judge_wins(policies: Mapping[str, Any], against: str | None = None) -> Table:
    """Principles x runs by the judge: against the initial policy, or against one of the runs."""
    initial, *runs = policies["names"]
    runs = [run for run in runs if run != against]
    found = policies["versus" if against else "judge"]
    return ["principle", *runs], [
        [name, *(shown(of_runs.get(run, {}).get(against or initial)) for run in runs)]
        for name, of_runs in found.items()
    ]


def tasks_table(results: Path, names: Sequence[str]) -> Table | None:
    """Benchmarks of all policies, if there are any."""
    files = [results / "evaluation/initial_tasks/tasks.json"]
    files += [results / f"runs/{name}/evaluation/tasks/tasks.json" for name in names[1:]]
    if not files[0].exists():
        return None
    found = [read(file) for file in files]
    rows = [
        [f"{task}, {metric}", str(one["number"]), *(shown(each[task][metric]) for each in found)]
        for task, metrics in found[0].items()
        for metric, one in metrics.items()
    ]
    return ["task", "items", *names], rows


if __name__ == "__main__":
    script.run(main, Arguments)
