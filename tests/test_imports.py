"""Starting in the middle: artifacts from elsewhere replace the stages before them, through Snakemake."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from pydantic import ValidationError

from import_authors import Arguments
from salmon import configuration, models, plan, reward_model, verification
from salmon.config import Lora
from salmon.errors import UserError
from tests import small_run
from tests.authors_world import (
    DIMENSIONS,
    prompts,
    publish_adapter,
    publish_preferences,
    publish_records,
    publish_responses,
    publish_reward_model,
    write_principles,
)
from tests.damaged_models import make_adapter, randomised, settings
from tests.running import merge
from tests.test_workflow import elsewhere, jobs, snakemake

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "model"


def test_from_the_published_reward_model_to_ppo_of_ones_own_policy(tmp_path: Path) -> None:
    """The worked example: PPO and what it needs, and no stage before it."""
    missing = snakemake("-n", "--configfile", "examples/authors.yaml", *elsewhere(tmp_path))
    assert missing.returncode != 0
    assert "model.adapter: ./my_policy does not exist" in missing.stdout + missing.stderr
    adapter = tmp_path / "policy"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    run = snakemake(
        "-n", "--configfile", "examples/authors.yaml", *elsewhere(tmp_path), f"model={{adapter: {adapter}}}"
    )
    assert run.returncode == 0, run.stderr
    assert "train the same policy" not in run.stdout + run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert counts == dict.fromkeys(("check_model", "clean_rl_prompts", "import_authors", "train_policy", "all"), 1)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files that a dry run only looks for."""
    found = {name: str(tmp_path / f"{name}.json") for name in ("one", "two", "judged", "records")}
    for path in found.values():
        Path(path).write_text("{}")
    return found


def test_each_stage_can_be_brought_in(tmp_path: Path, files: dict[str, str]) -> None:
    """In separate runs: what one makes and another brings in are two artifacts, and what two bring in is one.

    Responses with judgements are cut where the release's judge cut them, so they differ from those judged here.
    """
    sampling, judge = {"paths": [files["one"], files["two"]]}, {"path": files["judged"]}
    runs = {
        "asked": {"sampling": sampling},
        "judged": {"sampling": sampling, "judge": judge},
        "recorded": {"aggregation": {"path": files["records"]}},
        "theirs": {"reward_model": {"path": "owner/theirs"}},
        "theirs_too": {"reward_model": {"path": "owner/theirs"}, "ppo": {"seed": 1}},
    }
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"runs": runs}))
    options = (*elsewhere(tmp_path / "results"), "--configfile", str(overlay))
    folders = {name: f"{tmp_path}/results/runs/{name}/models/reward_model" for name in runs}
    run = snakemake("-n", *list(folders.values())[:4], *options)
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert counts.pop("check_model") == 2
    assert counts == {
        **{"import_responses": 4, "judge_preferences": 8, "gather_preferences": 1, "aggregate_preferences": 2},
        **{"import_preferences": 1, "import_records": 1, "import_authors": 1},
        **{"clean_pmp_data": 1, "train_pmp": 1, "train_reward_model": 3},
    }
    run = snakemake("-n", folders["theirs_too"], *options)
    assert "the reward_model of the run theirs_too is " in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": {"path": "{judged}"}}, "judge.path: .* set sampling.paths"),
        (
            {"sampling": {"paths": ["{one}", "{one}"]}},
            "sampling.paths: the two responses must be in two different files",
        ),
        ({"sampling": {"paths": ["{one}", "/nowhere/two.json"]}}, "sampling.paths: /nowhere/two.json does not exist"),
        ({"sampling": {"paths": ["{one}", "owner/two"]}}, "sampling.paths.1: owner/two is not a local file; download"),
        ({"judge": {"path": "owner/judged"}}, "judge.path: owner/judged is not a local file"),
        ({"aggregation": {"path": "owner/records"}}, "aggregation.path: owner/records is not a local file"),
        ({"aggregation": {"path": "/nowhere/records.json"}}, "aggregation.path: /nowhere/records.json does not exist"),
        ({"reward_model": {"path": "./nowhere"}}, "reward_model.path: ./nowhere does not exist"),
        (
            {"reward_model": {"revision": "abc"}},
            "reward_model.revision: only a reward_model.path on the hub has a revision",
        ),
        (
            {"judge": {"model": {"base": "a/b", "adapter": "sft"}}},
            "judge.model.adapter: `sft` is only for model.adapter",
        ),
        ({"model": {"adapter": "sft", "adapter_revision": "abc"}}, "model.adapter_revision: the adapter `sft` is made"),
    ],
)
def test_what_cannot_be_brought_in_ends_before_any_job(files: dict[str, str], changes: Any, said: str) -> None:
    text = json.dumps(changes)
    for name, path in files.items():
        text = text.replace(f"{{{name}}}", path)
    raw = merge(yaml.safe_load((ROOT / "config.yaml").read_text()), json.loads(text))
    with pytest.raises(UserError, match=said):
        configuration.load(raw, ROOT)


def test_a_stage_that_is_not_run_limits_nothing(tmp_path: Path) -> None:
    """A base model with a short context: with a ready reward model, only the lengths of RL count."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 600}))
    changes = {"model": {"base": str(tmp_path)}, "reward_model": {"path": "owner/theirs"}}
    changes["ppo"] = {
        "query_length": 100,
        "response_length": 400,
        "reward_response_length": 300,
        "reward_max_length": 590,
    }
    raw = merge(yaml.safe_load((ROOT / "config.yaml").read_text()), changes)
    configuration.load(raw, ROOT)
    with pytest.raises(UserError, match=r"judge\.max_length: 1536 tokens") as refused:
        configuration.load(merge(raw, {"reward_model": {"path": None}}), ROOT)
    assert "ppo." not in str(refused.value)


def test_runs_that_train_the_same_policy_are_named(tmp_path: Path) -> None:
    """An ablation of a stage that is not run would look like one without effect."""
    overlay = tmp_path / "overlay.yaml"
    runs = {"mean": {"aggregation": {"agreement": "mean"}}, "warm": {"ppo": {"temperature": 1.0}}}
    overlay.write_text(yaml.safe_dump({"reward_model": {"path": "owner/theirs"}, "runs": runs}))
    run = snakemake("-n", "policies", *elsewhere(tmp_path), "--configfile", str(overlay))
    assert run.returncode == 0, run.stderr
    said = next(line for line in (run.stdout + run.stderr).splitlines() if "train the same policy" in line)
    assert "mean as default" in said
    assert "no_pmp as default" in said
    assert "warm" not in said


def test_prompts_that_were_brought_in_are_not_asked_again(tmp_path: Path, files: dict[str, str]) -> None:
    """The prompts that the evaluation leaves out are in the tables that were brought in."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    for changes, table in (
        ({}, "prompts/oasst1.parquet"),
        ({"sampling": {"paths": [files["one"], files["two"]]}}, "responses/response0.parquet"),
        ({"aggregation": {"path": files["records"]}}, "reward_data/principle_preferences.parquet"),
        ({"reward_model": {"path": "owner/theirs"}}, None),
    ):
        runs = {name: None for name in raw["runs"] if name != "default"}
        known = plan.Plan(configuration.load(merge(raw, {**changes, "runs": runs}), ROOT))
        tables = [table] * (table is not None) + ["prompts/rl.parquet"]
        pmp_data = ["results/reward_data/pmp.parquet"] * ("reward_model" not in changes)
        assert known.trained() == {
            "trained": [f"results/{name}" for name in tables],
            "sft_data": [],
            "pmp_data": pmp_data,
        }


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["{one}", "{one}"], "the two responses must be in two different files"),
        (["{one}", "owner/two"], "owner/two is not a local file"),
        (["{one}"], "Field required"),
    ],
)
def test_the_script_refuses_what_the_configuration_refuses(files: dict[str, str], named: list[str], said: str) -> None:
    """So it cannot import the same response twice."""
    options = {"what": "responses", "output": "x.parquet", "index": 0}
    assert Arguments.model_validate(options | {"responses": [files["one"], files["two"]]}).responses
    paths = json.dumps([path.format(**files) for path in named])
    with pytest.raises(ValidationError, match=said):
        Arguments.model_validate(options | {"responses": paths})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the authors have published, for the demo's base model, and the results made from it."""
    folder = tmp_path_factory.mktemp("published")
    model = settings(BASE)
    randomised(models.new_reward_model(model, Lora(r=4), "cpu", 0)).save_pretrained(str(folder / "standard"))
    publish_reward_model(folder / "standard", folder / "salmon-rm")
    make_adapter(BASE, folder / "policy")
    publish_adapter(folder / "policy", folder / "dromedary-2")
    asked = prompts(40)
    responses = publish_responses(folder, asked)
    rl = [
        {"instruction": text, "input": "", "output": "", "length_bonus": 1.0, "question_type": 0} for text, _ in asked
    ]
    (folder / "prompts.json").write_text(json.dumps(rl))
    pairs = [
        {"instruction": "q", "input": "", "output_1": "a", "output_2": str(n), "preference": 1 + n % 2}
        for n in range(20)
    ]
    (folder / "pmp.json").write_text(json.dumps(pairs))
    publish_records(folder, asked)
    raw = small_run.configuration(folder)
    raw["model"]["adapter"] = str(folder / "dromedary-2")
    raw["sampling"]["paths"] = [str(file) for file in responses]
    raw["judge"] |= {"path": str(publish_preferences(folder, responses))}
    raw["judge"]["principles"] = str(write_principles(folder / "principles.json"))
    raw["aggregation"] = {"dimensions": list(DIMENSIONS), "passes": 2}
    raw["pmp_data"]["sources"] = {
        "shp": None,
        "hh_rlhf": None,
        "authors": {"format": "pairs", "path": str(folder / "pmp.json")},
    }
    sources = dict.fromkeys(raw["rl_prompts"]["sources"]) | {
        "authors": {"format": "prompts", "path": str(folder / "prompts.json")}
    }
    raw["rl_prompts"]["sources"] = sources
    raw["reward_model"]["path"] = str(folder / "salmon-rm")
    raw["ppo"] |= {"max_steps": 1, "rollout_batch_size": 8, "minibatch_size": 8, "response_length": 16}
    raw["runs"] |= dict.fromkeys(("concise", "comprehensive", "methodical", "control"))
    raw["runs"]["records"] = {"aggregation": {"path": str(folder / "salmon_rm_data.json")}}
    raw["targets"] = ["policy", "reward_data", "pmp_data"]
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    run = small_run.snakemake(
        "all",
        f"{folder}/results/runs/records/reward_data/principle_preferences.parquet",
        *("--configfile", str(folder / "config.yaml")),
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return folder


def test_a_run_of_what_the_authors_have_published(published: Path) -> None:
    """Through Snakemake, to a policy; nothing is sampled, judged or trained before it."""
    results = published / "results"
    model = settings(BASE)
    texts = [[5, 6, 7, 8], [9, 4, 30, 31]]
    ours, theirs = (
        reward_model.score(models.load_reward_model(model, folder, "cpu", trainable=False), texts, 2, "cpu")
        for folder in (results / "models" / "reward_model", published / "standard")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (results / "runs" / "default" / "policy" / "adapter_model.safetensors").is_file()
    rows = {
        "responses/response0.parquet": 40,
        "preferences/preferences.parquet": 33 * 3,
        "runs/records/reward_data/principle_preferences.parquet": 80,
        "reward_data/pmp.parquet": 20,
        "prompts/rl.parquet": 40,
    }
    for name, number in rows.items():
        assert pl.read_parquet(results / name).height == number, name
    # Only what the release's judge read.
    assert not pl.read_parquet(results / "responses" / "response0.parquet")["response"].str.contains("###").any()
    assert not (results / "models" / "pmp").exists()
    assert not (results / "prompts" / "oasst1.parquet").exists()
    again = small_run.snakemake("all", "--configfile", str(published / "config.yaml"), "-n")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_what_was_brought_in_is_verified(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intact at first; stale where a file, or what it has to match, has changed."""
    monkeypatch.chdir(ROOT)
    own = yaml.safe_load((published / "config.yaml").read_text())
    raw = merge(yaml.safe_load((ROOT / "config.yaml").read_text()), own)

    def stale(**changes: Any) -> set[str]:
        found = verification.verify(configuration.load(merge(raw, changes), ROOT)).findings
        return {Path(one.path).relative_to(published / "results").as_posix() for one in found if one.kind == "stale"}

    assert stale() == set()
    records = "runs/records/reward_data/principle_preferences.parquet"
    responses = {"responses/response0.parquet", "responses/response1.parquet"}
    exchanged = {"paths": raw["sampling"]["paths"][::-1]}
    assert stale(sampling=exchanged) == {*responses, "preferences/preferences.parquet"}
    assert stale(sampling={"temperature": 0.5}) == set()
    head = published / "salmon-rm" / "adapter_model" / "reward_head"
    kept = {file: file.read_bytes() for file in (head, published / "salmon_rm_data.json")}
    for file, artifact in zip(kept, ("models/reward_model", records), strict=True):
        file.write_bytes(kept[file] + b" ")
        assert stale() == {artifact}
        file.write_bytes(kept[file])
