"""The data that policies and reward models are measured on: nothing that any stage trains on, and all rows counted."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import clean_evaluation_pairs
import clean_evaluation_prompts
import clean_pmp_data
from salmon import configuration, plan, verification
from salmon.artifacts import manifest_path
from salmon.config import Evaluation, PmpData, PolicyPrompt, TaskPrompt
from salmon.errors import UserError
from salmon.formats import Comparison
from salmon.preference_data import record
from salmon.tables import PMP_RECORDS, RL_PROMPTS, SFT_EXAMPLES
from tests.running import merge, write_rows
from tests.test_workflow import elsewhere, snakemake

ROOT = Path(__file__).parents[1]


def trained(folder: Path) -> dict[str, list[Path]]:
    """A prompt of RL, two SFT examples of one prompt, a post and a dialogue of PMP."""
    prompt = {"source": "s", "input": ""}
    rl = [
        {**prompt, "prompt_id": "p", "instruction": "Name a  river.", "question_type": "general", "length_bonus": 0.0}
    ]
    learnt = {**prompt, "prompt_id": "p", "instruction": "Name a lake.", "is_whole": True}
    sft = [{**learnt, "example_id": name, "output": name} for name in "ab"]
    queries = ("Why is it warm?", "Human: Who are you?\n\nAssistant: Me.\n\nHuman: Why?")
    pmp = [record("s", Comparison(query, "Yes.", "No."), 0) for query in queries]
    return {
        "trained": [write_rows(folder / "rl.parquet", RL_PROMPTS, rl, {"s: kept": 1})],
        "sft_data": [write_rows(folder / "sft.parquet", SFT_EXAMPLES, sft, {"s: kept": 2})],
        "pmp_data": [write_rows(folder / "pmp.parquet", PMP_RECORDS, pmp, {"s: kept": 2})],
    }


def counts_of(table: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(manifest_path(table).read_text())["counts"]
    return found


def test_no_prompt_of_a_training_is_asked(tmp_path: Path) -> None:
    """Prompts of RL, SFT and PMP are left out, even if case or white space differ, or if a dialogue begins with one."""
    asked = ["name a river. ", "Name a\nlake.", "WHY is it warm?", "Who are  you?", "Why?", "Name a mountain."]
    own = [{"instruction": text, "input": ""} for text in asked]
    (tmp_path / "own.json").write_text(json.dumps(own))
    evaluation = Evaluation(prompts={"own": {"format": "prompts", "path": str(tmp_path / "own.json")}})
    output = tmp_path / "prompts.parquet"
    given = {"output": output, "evaluation": evaluation, **trained(tmp_path)}
    clean_evaluation_prompts.main(clean_evaluation_prompts.Arguments(**given))
    assert pl.read_parquet(output)["instruction"].to_list() == ["Why?", "Name a mountain."]
    assert counts_of(output) == {
        "own: rows": 6,
        "own: kept": 2,
        "own: trained on": 1,
        "own: trained on by SFT": 1,
        "own: trained on by PMP": 2,
    }
    inputs = json.loads(manifest_path(output).read_text())["inputs"]
    assert {Path(name).name for name in inputs} == {"own.json", "rl.parquet", "sft.parquet", "pmp.parquet"}


def test_no_pair_of_pmp_measures_a_reward_model(tmp_path: Path) -> None:
    """They are left out before the draw under a limit, so the limit is still reached."""
    pair = {"input": "", "output_1": "a", "output_2": "b", "preference": 1}
    rows = [{**pair, "instruction": text} for text in ("why is it\twarm?", "Why is it cold?", "Why is it dry?")]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    source = {"format": "pairs", "path": str(tmp_path / "own.json"), "limit": 2}
    output = tmp_path / "pairs.parquet"
    given = {"output": output, "evaluation": Evaluation(pairs={"own": source})}
    pmp_data = trained(tmp_path)["pmp_data"]
    clean_evaluation_pairs.main(clean_evaluation_pairs.Arguments(**given, pmp_data=pmp_data))
    assert set(pl.read_parquet(output)["instruction"]) == {"Why is it cold?", "Why is it dry?"}
    assert counts_of(output) == {"own: rows": 3, "own: kept": 2, "own: trained on by PMP": 1}


def test_no_dialogue_of_pmp_measures_a_reward_model_at_another_depth(tmp_path: Path) -> None:
    """The deeper query quotes the answer that was preferred in the shallower one."""
    first, second = "\n\nHuman: Why is it warm?", "\n\nAssistant: The sun.\n\nHuman: And at night?"
    rows = [
        {"chosen": f"{first}\n\nAssistant: The sun.", "rejected": f"{first}\n\nAssistant: No idea."},
        {"chosen": f"{first}{second}\n\nAssistant: The sea.", "rejected": f"{first}{second}\n\nAssistant: No."},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    ]

    def records_of(name: str, some: list[dict[str, str]]) -> pl.DataFrame:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        source = {"format": "hh_rlhf", "path": str(tmp_path / f"{name}.jsonl")}
        pmp = PmpData.model_validate({"sources": {"hh": source}})
        clean_pmp_data.main(clean_pmp_data.Arguments(output=tmp_path / f"{name}.parquet", pmp_data=pmp))
        return pl.read_parquet(tmp_path / f"{name}.parquet").sort(pl.col("instruction").str.len_chars())

    short, *dialogue = records_of("all", rows)["prompt_id"]
    assert dialogue[0] == dialogue[1] != short

    records_of("shallow", rows[:1])
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    evaluation = Evaluation(pairs={"own": {"format": "hh_rlhf", "path": str(tmp_path / "own.jsonl")}})
    output = tmp_path / "pairs.parquet"
    given = {"output": output, "evaluation": evaluation, "pmp_data": [tmp_path / "shallow.parquet"]}
    clean_evaluation_pairs.main(clean_evaluation_pairs.Arguments(**given))
    assert counts_of(output) == {"own: rows": 2, "own: kept": 1, "own: trained on by PMP": 1}


def test_what_all_runs_train_on_is_left_out() -> None:
    """SFT data of the runs that train an adapter, PMP data of those that start from PMP."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    runs: dict[str, Any] = {name: None for name in raw["runs"] if name != "default"}
    runs |= {"sft": {"model": {"adapter": "sft"}}, "pmp": {"pmp_data": {"seed": 7}}}
    runs |= {"bare": {"reward_model": {"init": "base"}, "pmp_data": {"seed": 8}}}
    known = plan.Plan(configuration.load(merge(raw, {"runs": runs}), ROOT))
    found = known.trained()
    assert found["sft_data"] == [known.path("sft", "sft_data")]
    assert found["pmp_data"] == [known.path(run, "pmp_data") for run in ("default", "pmp")]
    for name in ("evaluation_prompts", "evaluation_pairs"):
        assert set(found["pmp_data"]) < {one.name for one in known.origin("default", name).inputs}


def test_short_answers_are_judged_where_they_are_measured(tmp_path: Path) -> None:
    """Otherwise, only the long answers of a concise policy would count; rules and plan agree."""
    run = snakemake("-n", "-p", "evaluation", *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    smallest: dict[str, set[int]] = {}
    for line in (run.stdout + run.stderr).splitlines():
        if "/judge_preferences.py" in line:
            words = shlex.split(line)
            given = dict(itertools.pairwise(words))
            table = given["--output"].removeprefix(f"{tmp_path}/").partition("/")[0]
            smallest.setdefault(table, set()).add(json.loads(given["--judge"])["min_characters"])
    assert smallest == {"preferences": {16}, "runs": {0}, "evaluation": {0}}
    known = plan.Plan(configuration.load(yaml.safe_load((ROOT / "config.yaml").read_text()), ROOT))
    for name, least in (("preferences", 16), ("answer_judgements", 0), ("judged_pairs", 0)):
        assert known.origin("default", name).settings["min_characters"] == least


def test_a_task_is_asked_again_only_where_it_is_asked_otherwise() -> None:
    """Settings of the policy's prompt that matter only to answers rerun no benchmark."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    chat: dict[str, Any] = {"policy_prompt": {"template": "chat", "template_variables": {"a": 1}}}
    prompts: dict[str, Any] = {
        "stop": {"policy_prompt": {"stop": ["END"]}},
        "marker": {"policy_prompt": {"assistant_marker": "### Me"}},
        "thinking": {"policy_prompt": {"thinking": ["<a>", "</a>"]}},
        "chat": chat,
    }
    runs: dict[str, Any] = {name: None for name in raw["runs"] if name != "default"} | prompts
    known = plan.Plan(configuration.load(merge(raw, {"runs": runs}), ROOT))
    owners = {run: known.owner(run, "initial_task_evaluation") for run in prompts}
    assert owners == {"stop": "default", "marker": "default", "thinking": "thinking", "chat": "chat"}
    prompt = PolicyPrompt(**chat["policy_prompt"])
    assert TaskPrompt.of(prompt, "text") == TaskPrompt.of(PolicyPrompt(template="a.txt"), "policy")
    assert TaskPrompt.of(prompt, "chat") == TaskPrompt.of(prompt, "policy")


def test_every_initial_policy_has_a_name_of_its_own_in_mt_bench() -> None:
    """FastChat's judges tell models apart by their names; what two runs start from has one name."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    runs: dict[str, Any] = {name: None for name in raw["runs"] if name != "default"}
    other = {"model": {"adapter": "owner/other"}}
    runs |= {"one": other, "two": other, "same": {"ppo": {"seed": 7}}, "third": {"policy_prompt": {"stop": ["END"]}}}
    known = plan.Plan(configuration.load(merge(raw, {"runs": runs}), ROOT))
    names = {run: known.initial_name(run) for run in ("default", "one", "two", "same", "third")}
    assert names == {
        **{"default": "initial", "one": "initial-one", "two": "initial-one", "same": "initial"},
        "third": "initial-third",
    }
    for run, name in names.items():
        assert known.initial_name(known.owner(run, "initial_mt_bench")) == name
        assert known.origin(run, "initial_mt_bench").settings["name"] == name


@pytest.mark.parametrize(
    ("against", "compared"),
    [
        ("harmless", {("default", "harmless"), ("honest", "harmless")}),
        (["harmless", "honest"], {("default", "harmless"), ("honest", "harmless"), ("default", "honest")}),
        ("all", {("default", "harmless"), ("default", "honest"), ("harmless", "honest")}),
    ],
)
def test_runs_are_judged_against_others_where_that_is_asked_for(
    against: str | list[str], compared: set[tuple[str, str]], tmp_path: Path
) -> None:
    """No run is judged against itself, and no pair twice."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    runs: dict[str, Any] = {name: None for name in raw["runs"] if name not in ("default", "honest", "harmless")}
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"runs": runs, "evaluation": {"against": against}}))
    asked = snakemake("-n", "-p", "evaluation", "--configfile", str(overlay), *elsewhere(tmp_path))
    assert asked.returncode == 0, asked.stderr
    lines = [shlex.split(line) for line in (asked.stdout + asked.stderr).splitlines() if "evaluation/against/" in line]
    pairs = set()
    for words in lines:
        if "workflow_scripts/judge_preferences.py" in words:
            given = dict(itertools.pairwise(words))
            pairs.add(tuple(given[f"--response{place}"].removeprefix(f"{tmp_path}/runs/") for place in (0, 1)))
            assert json.loads(given["--judge"])["min_characters"] == 0
    answers = "evaluation/answers.parquet"
    assert pairs == {tuple(f"{run}/{answers}" for run in pair) for pair in compared}
    with pytest.raises(UserError, match=r"evaluation\.against: there is no run nobody; the runs are default, "):
        configuration.load(merge(raw, {"evaluation": {"against": ["default", "nobody"]}}), ROOT)
    given = {"evaluation": {"against": against}, "runs": runs, "targets": ["evaluation", "report"]}
    resolved = configuration.load(merge(raw, given), ROOT)
    known = plan.Plan(resolved)
    assert known.versus().keys() == compared
    needed = {one.name for one in known.origin("default", "policy_evaluation").inputs}
    assert {*known.versus().values()} <= needed
    assert needed <= known.ancestry(known.target_paths("evaluation"))
    drawn = {row["run"]: row["path"] for row in known.counted() if row["name"] == "run_judgements"}
    assert drawn == {f"{run} against {other}": path for (run, other), path in known.versus().items()}
    inventory = verification.inventory(resolved)
    order = [*inventory]
    for (run, other), path in known.versus().items():
        one, answered = inventory[path], [known.path(compared_run, "answers") for compared_run in (run, other)]
        assert (one.rule, one.checked) == ("judge_runs", known.path(run, "check_judging"))
        assert one.origin is not None
        assert [given.name for given in one.origin.inputs][:2] == answered
        assert order.index(path) < order.index(known.path(run, "policy_evaluation"))
    nothing = dict.fromkeys(raw["evaluation"]["prompts"])
    with pytest.raises(
        UserError, match=r"evaluation\.against compares answers to evaluation\.prompts, which names none"
    ):
        configuration.load(merge(raw, {"evaluation": {"against": against, "prompts": nothing}, "runs": runs}), ROOT)
    itself = f"{tmp_path}/runs/honest/evaluation/against/honest.parquet"
    refused = snakemake("-n", itself, "--configfile", str(overlay), *elsewhere(tmp_path))
    assert refused.returncode != 0
    assert "the judge does not compare honest with honest; by evaluation.against, it compares" in refused.stdout
