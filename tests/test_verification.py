"""What `snakemake verify` finds on a small run of the whole DAG, with each key of the configuration changed in turn."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import polars as pl
import pytest
import yaml
from pydantic import BaseModel

from salmon import artifacts, configuration, provenance, verification
from salmon.config import FREE
from salmon.configuration import Config, field_of, section_in
from salmon.formats import EXAMPLE_FORMATS, PAIR_FORMATS, PROMPT_FORMATS
from tests import forks
from tests.running import merge

ROOT = Path(__file__).parents[1]
POLICY = "runs/default/policy"
KINDS = ("stale", "follows")
ALL = {
    "check_model/sampling",
    "check_model/judging",
    "check_model/training",
    "check_model/rl",
    "sft/examples.parquet",
    "models/sft",
    "prompts/oasst1.parquet",
    *(f"responses/response{index}.shards/{shard}.parquet" for index in (0, 1) for shard in (0, 1)),
    "responses/response0.parquet",
    "responses/response1.parquet",
    *(f"preferences/preferences.shards/{shard}.parquet" for shard in (0, 1)),
    "preferences/preferences.parquet",
    "reward_data/principle_preferences.parquet",
    "reward_data/pmp.parquet",
    "models/pmp",
    "models/reward_model",
    "prompts/rl.parquet",
    POLICY,
    "evaluation/prompts.parquet",
    "evaluation/initial_answers.parquet",
    "evaluation/initial_scores.parquet",
    "runs/default/evaluation/answers.parquet",
    "runs/default/evaluation/scores.parquet",
    "runs/default/evaluation/judgements.parquet",
    "evaluation/policies",
    *(f"evaluation/judge_pairs/{table}.parquet" for table in ("preferred", "other", "judgements")),
    "evaluation/judge",
    "evaluation/pairs.parquet",
    "evaluation/pmp",
    "evaluation/reward_model",
    "evaluation/initial_tasks",
    "runs/default/evaluation/tasks",
    "evaluation/initial_mt_bench",
    "runs/default/evaluation/mt_bench",
}

REPORT = {
    f"report/{part}"
    for part in ("funnel", "sft", "judge", "pmp", "reward_model", "training", "policies", "tasks", "samples")
}
"""The parts of the report, which have a test of their own."""


def named(*words: str) -> set[str]:
    """The artifacts with one of these words in their paths."""
    return {path for path in ALL if any(word in path for word in words)}


SAMPLED, JUDGED, TRAINED = named("responses/"), named("preferences/"), named("models/", POLICY)
SFT = named("sft")
RL = named(POLICY, "check_model/rl")
ANSWERED, SCORED, COMPARED = named("answers.parquet"), named("scores.parquet"), named("judgements.parquet")
PMP_MEASURED, MODEL_MEASURED = {"evaluation/pmp"}, {"evaluation/reward_model"}
MEASURED = PMP_MEASURED | MODEL_MEASURED
TASKED, DIALOGUES = named("tasks"), named("mt_bench")
PROMPTED = SAMPLED | RL | named("check_model/sampling", "models/sft") | ANSWERED | DIALOGUES
WITHOUT_MODEL = {"evaluation/prompts.parquet", "evaluation/pairs.parquet", "evaluation/judge", "evaluation/policies"}
HELD_OUT = {"evaluation/prompts.parquet", "evaluation/pairs.parquet"}
LABELLED = {"evaluation/judge_pairs/preferred.parquet", "evaluation/judge_pairs/other.parquet"}
WITHOUT_MODEL |= LABELLED
TEXTS, SPLIT = ("template", "max_length", "query_length", "response_length"), ("eval_examples", "seed")
# Key, or the beginning of several -> what a change makes stale by itself. The longest match counts; what changes no
# result is not here.
STALE = {
    "targets": set(),
    "pathvars": set(),
    "seed": ALL - named("check_model", "preferences/") - SCORED - COMPARED - TASKED,
    "model": ALL - named("reward_data/", "examples", "oasst1", "rl.parquet") - WITHOUT_MODEL,
    "model.base": ALL - named("reward_data/", "examples", "oasst1") - WITHOUT_MODEL,
    "model.revision": ALL - named("reward_data/", "examples", "oasst1") - WITHOUT_MODEL,
    "model.trust_remote_code": ALL - named("reward_data/", "examples", "oasst1") - WITHOUT_MODEL,
    # It may have a tokenizer.
    "model.adapter": ALL - named("reward_data/", "oasst1", "check_model/training") - SFT - WITHOUT_MODEL,
    "model.adapter_revision": SAMPLED
    | JUDGED
    | RL
    | named("check_model/sampling", "check_model/judging")
    | ANSWERED
    | COMPARED
    | TASKED
    | DIALOGUES,
    "policy_prompt": PROMPTED,
    "policy_prompt.thinking": PROMPTED | TASKED,
    "policy_prompt.template_variables": PROMPTED | TASKED,
    "sft_data": named("examples"),
    "sft": named("models/sft"),
    "prompts": named("oasst1"),
    "sampling": SAMPLED | named("check_model/sampling"),
    "sampling.seeds": SAMPLED,
    "sampling.paths": {"responses/response0.parquet", "responses/response1.parquet"} | {"evaluation/prompts.parquet"},
    "judge.path": {"preferences/preferences.parquet", "responses/response0.parquet", "responses/response1.parquet"},
    "judge": JUDGED | named("check_model/judging") | COMPARED,
    "judge.min_characters": JUDGED | named("check_model/judging"),
    "judge.turn_markers": JUDGED | named("check_model/judging", "principle_preferences") | COMPARED,
    "judge.principles": JUDGED | named("check_model/judging", "principle_preferences") | COMPARED | SCORED | MEASURED,
    "aggregation": named("principle_preferences"),
    "aggregation.dimensions": named("principle_preferences") | SCORED | MODEL_MEASURED,
    "aggregation.agreement": named("principle_preferences") | MODEL_MEASURED,
    "aggregation.path": named("principle_preferences") | {"evaluation/prompts.parquet"},
    "pmp_data": named("pmp.parquet"),
    "lora": TRAINED | RL | named("check_model/training"),
    "scoring": TRAINED - SFT | RL | named("check_model/training") | SCORED | MEASURED,
    "pmp": named("models/pmp"),
    **{f"pmp.{key}": named("models/pmp") | PMP_MEASURED for key in TEXTS},
    **{f"pmp.{key}": named("models/pmp") | PMP_MEASURED | MODEL_MEASURED for key in SPLIT},
    "reward_model": named("models/reward_model"),
    "reward_model.path": named("models/reward_model") | HELD_OUT | MODEL_MEASURED,
    "reward_model.init": named("models/reward_model") | HELD_OUT | MODEL_MEASURED,
    **{f"reward_model.{key}": named("models/reward_model") | MODEL_MEASURED | SCORED for key in TEXTS},
    **{f"reward_model.{key}": named("models/reward_model") | MODEL_MEASURED for key in SPLIT},
    "rl_prompts": named("rl.parquet"),
    "ppo": named(POLICY),
    "ppo.principles": named(POLICY) | SCORED,  # answers are scored by them, too
    "ppo.template": RL,
    "ppo.temperature": named(POLICY) | ANSWERED,
    "ppo.query_length": RL | ANSWERED,
    "ppo.response_length": RL | ANSWERED,
    "ppo.reward_query_length": RL,
    "ppo.reward_response_length": RL,
    "ppo.reward_max_length": RL,
    "evaluation.prompts": {"evaluation/prompts.parquet"},
    "evaluation.against": set(),  # there is only one run
    "evaluation.pairs": {"evaluation/pairs.parquet"},
    "evaluation.judge_pairs": LABELLED,
    "evaluation.judge_pairs.*.principles": {"evaluation/judge"},
    "evaluation.min_score_ratio": {"evaluation/pairs.parquet"} | LABELLED,
    "evaluation.engine": ANSWERED | DIALOGUES,
    "evaluation.seed": WITHOUT_MODEL | ANSWERED | MEASURED | DIALOGUES,
    "evaluation.mt_bench": DIALOGUES,
    "evaluation.judge_endpoint": set(),  # which the small run lacks
    "evaluation.mt_bench_tokens": DIALOGUES,
    **{f"evaluation.{key}": TASKED for key in ("tasks_format", *provenance.TASKS)},
    "report": set(),
    "plan": set(),
}


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be changed, with their configuration."""
    shutil.copytree(small_run / "results", tmp_path / "results")
    shutil.copy(small_run / "config.yaml", tmp_path)
    return tmp_path


@cache
def read(file: Path) -> dict[str, Any]:
    """A configuration on top of the repository's, read once; nothing changes it."""
    return configuration.read([ROOT / "config.yaml", file])


@cache
def before(folder: Path, base: str) -> set[tuple[str, str]]:
    """What is stale with these changes (as JSON), before a test makes another."""
    return look(load(folder, **json.loads(base)))


def load(folder: Path, results: Path | None = None, **changes: Any) -> dict[str, Config]:
    """The configuration of the small run, for results that may be elsewhere."""
    raw = read(folder / "config.yaml")
    places = {"pathvars": {"results": str(results or folder / "results")}}
    return configuration.load(merge(merge(raw, places), changes), ROOT)


def look(runs: dict[str, Config], kind: str = "stale") -> set[tuple[str, str]]:
    """The findings of one kind: paths below the results, and why."""
    root = Path(runs["default"].pathvars.results)
    found = [one for one in verification.verify(runs).findings if one.kind == kind]
    texts = {(Path(one.path).relative_to(root).as_posix(), one.text) for one in found}
    return {(path, text) for path, text in texts if path not in REPORT}


def paths(found: set[tuple[str, str]]) -> set[str]:
    return {path for path, _ in found}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_nothing_of_a_whole_run_is_stale(small_run: Path) -> None:
    report = verification.verify(load(small_run))
    assert [one for one in report.findings if one.kind != "note"] == []
    assert report.whole == len(ALL | REPORT)


@pytest.mark.parametrize(
    ("changes", "stale", "follows"),
    [
        ({"targets": ["policy", "report"]}, {"funnel", "reward_model", "pmp", "judge"}, set()),
        ({"report": {"samples": True}}, {"samples"}, set()),
        ({"aggregation": {"passes": 3}}, set(), {"funnel", "reward_model", "training", "policies", "tasks", "samples"}),
        ({"ppo": {"clip": 0.1}}, set(), {"funnel", "training", "policies", "tasks", "samples"}),
    ],
    ids=["targets", "samples", "aggregation", "ppo"],
)
def test_the_report_is_stale_where_it_would_show_something_else(
    small_run: Path, changes: dict[str, Any], stale: set[str], follows: set[str]
) -> None:
    found = verification.verify(load(small_run, **changes)).findings
    parts = {
        kind: {Path(one.path).name for one in found if "/report/" in one.path and one.kind == kind} for kind in KINDS
    }
    assert parts == {"stale": stale, "follows": follows}


# ---- Every key


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of values, with their fields; an entry of a mapping of sections is called *."""
    for name, field in model.model_fields.items():
        below = section_in(field.annotation)
        if below is None:
            yield f"{prefix}{name}", field
        else:
            entry = ".*" if get_origin(field.annotation) is dict else ""
            yield from fields(below, f"{prefix}{name}{entry}.")


KEYS = {key: field for key, field in fields(Config) if key != "runs"}
# Values that the rules below would not find.
VALUES: dict[str, Any] = {
    "pathvars.results": None,  # other results
    "targets": ["prompts"],
    "model.base": "HuggingFaceTB/SmolLM2-135M",
    "sampling.paths": ["README.md", "CHANGELOG.md"],  # tables are local files
    "judge.path": "README.md",
    "aggregation.path": "README.md",
    "sampling.seeds": [7, 8],
    "aggregation.dimensions": ["Concise"],
    "policy_prompt.thinking": ["<t>", "</t>"],
    "judge.model.base": "HuggingFaceTB/SmolLM2-135M",
    "judge.max_length": 500,
    "ppo.rollout_batch_size": 32,
    "ppo.minibatch_size": 4,
    "policy_prompt.template_variables": {"answer": "short"},
    "judge.template_variables": {"answer": "short"},
    "scoring.template_variables": {"answer": "short"},
    "ppo.boosted_words": {"reasoning": ["logic"]},
    "rl_prompts.length_bonus": {"general": 0.5},
    "rl_prompts.min_tokens": 3,
    "evaluation.against": "all",
    **{f"plan.{key}": [0.25, 0.75] for key in ("arithmetic", "bandwidth", "launch", "step", "interconnect", "useful")},
    "plan.rows": {"prompts": 5},
    "evaluation.tasks_format": "chat",
    "evaluation.tasks_data": {"hhh": str(ROOT / "tests" / "data" / "truthfulqa")},
    "evaluation.judge_pairs.*.principles": ["Concise"],
}
CHAT = {"policy_prompt": {"template": "chat"}, "judge": {"format": "chat"}, "scoring": {"format": "chat"}}


def other(key: str, old: Any, folder: Path) -> Any:
    """Another value that the key may have; for a file, a copy with other contents."""
    if key in VALUES:
        return VALUES[key]
    annotation = str(KEYS[key].annotation)
    if isinstance(old, bool):
        return not old
    if choices := next((get_args(part) for part in (KEYS[key].annotation, *get_args(KEYS[key].annotation))), ()):
        strings = [choice for choice in choices if isinstance(choice, str) and choice != old]
        if strings:
            return strings[0]
    if isinstance(old, int):
        return old + 1
    if isinstance(old, float):
        return 0.375 if 0 <= old <= 1 else old * 1.25
    if isinstance(old, list):
        return [*old, "other"]
    if isinstance(old, str) and Path(old).is_file() and Path(old).suffix in (".txt", ".json"):
        text = Path(old).read_text()
        (folder / Path(old).name).write_text(f"Other.\n{text}" if old.endswith(".txt") else f"{text}\n")
        return str(folder / Path(old).name)
    if isinstance(old, str) and Path(old).exists():
        return "owner/other"
    if isinstance(old, str):
        if key.endswith(".format"):
            section = key.removesuffix(".*.format")
            known = {
                "pmp_data.sources": PAIR_FORMATS,
                "sft_data.sources": EXAMPLE_FORMATS,
                "evaluation.pairs": PAIR_FORMATS,
                "evaluation.judge_pairs": PAIR_FORMATS,
            }.get(section, PROMPT_FORMATS)
            return next(name for name in known if name != old)
        return f"{old}other"
    return 5 if "int" in annotation else "owner/other"


def leaves(key: str, raw: dict[str, Any]) -> Iterator[tuple[list[str], Any]]:
    """The places of a key in a configuration (in a mapping, only its first entry), with their values."""
    parts: list[tuple[list[str], Any]] = [([], raw)]
    for name in key.split("."):
        parts = [
            ([*path, step], part[step])
            for path, part in parts
            if part is not None
            for step in (list(part)[:1] if name == "*" else [name])
        ]
    yield from parts


@pytest.mark.parametrize("key", [key for key in KEYS if key != "pathvars.results"])
def test_a_changed_key_makes_stale_what_depends_on_it(small_run: Path, tmp_path: Path, key: str) -> None:
    """Nothing else becomes stale."""
    section = key.partition(".")[0]
    raw = load(small_run)["default"].model_dump(mode="json", exclude={"runs"})
    base: dict[str, Any] = {}  # what the key requires
    if key.startswith("judge.model."):
        base = {"judge": {"model": raw["model"]}}
    if key == "judge.path":
        base = {"sampling": {"paths": VALUES["sampling.paths"]}}
    if key == "reward_model.revision":
        base = {"reward_model": {"path": "owner/other"}}
    if key.endswith("template_variables"):
        base = {section: CHAT[section]}
    if key.startswith("plan.gpu."):
        base = {"plan": {"gpu": {"memory": 24, "tflops": 70, "bandwidth": 600}}}
    expected = STALE[max((begin for begin in STALE if f"{key}.".startswith(f"{begin}.")), key=len)]
    if FREE in KEYS[key].metadata:
        expected = set()
    for path, old in list(leaves(key, merge(raw, base))):
        new = other(key, old, tmp_path)
        assert new != old
        changes: Any = new
        for name in reversed(path):
            changes = {name: changes}
        found = look(load(small_run, **merge(base, changes))) - before(small_run, json.dumps(base))
        assert paths(found) == expected, (path, new, found)


def test_every_key_has_an_expectation() -> None:
    """A new section must be added above."""
    assert set(Config.model_fields) - {"runs"} <= {key.split(".")[0] for key in STALE}
    for key, field in KEYS.items():
        assert field_of(key.replace("*", "name")) is field


# ---- Files


def rewrite_table(path: Path, change: pl.Expr) -> None:
    pl.read_parquet(path).with_columns(change).write_parquet(path)


def test_a_table_with_other_contents(copy: Path) -> None:
    """Its consumers hashed another one; the table itself has the rows that it should have."""
    rewrite_table(copy / "results" / "prompts" / "rl.parquet", pl.col("length_bonus") + 1)
    runs = load(copy)
    reason = f"inputs changed ({copy}/results/prompts/rl.parquet)"
    assert look(runs) == {(POLICY, reason), ("evaluation/prompts.parquet", reason)}
    rewrite_table(copy / "results" / "prompts" / "oasst1.parquet", pl.col("source") + "x")
    shards = {f"responses/response{index}.shards/{shard}.parquet" for index in (0, 1) for shard in (0, 1)}
    gathered = {f"responses/response{index}.parquet" for index in (0, 1)}
    assert paths(look(runs)) == {POLICY, "evaluation/prompts.parquet"} | shards | gathered
    follows = {"reward_data/principle_preferences.parquet", "models/reward_model"}
    follows |= ANSWERED | SCORED | COMPARED | {"evaluation/policies", "evaluation/judge", "evaluation/reward_model"}
    follows |= {"runs/default/evaluation/tasks", "runs/default/evaluation/mt_bench"}
    assert paths(look(runs, "follows")) == JUDGED | follows - named("judge_pairs")


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "prompts/rl.parquet",
            lambda path: pl.read_parquet(path)[1:].write_parquet(path),
            "rows, but its manifest counts",
        ),
        ("prompts/rl.parquet", damage, "prompts/rl.parquet cannot be read"),
        ("prompts/rl.manifest.json", damage, "rl.manifest.json cannot be read as a manifest"),
        (
            "prompts/rl.manifest.json",
            lambda path: path.write_text("[]"),
            "rl.manifest.json cannot be read as a manifest",
        ),
        ("prompts/rl.manifest.json", Path.unlink, "has no manifest"),
        ("models/pmp/manifest.json", Path.unlink, "has no manifest"),
        ("models/pmp/adapter_model.safetensors", damage, "inputs changed"),
    ],
)
def test_a_damaged_file_is_noticed(copy: Path, file: str, change: Any, said: str) -> None:
    change(copy / "results" / file)
    texts = [text for _, text in look(load(copy))]
    assert any(said in text for text in texts), texts


def test_every_table_is_held_against_its_rows(copy: Path) -> None:
    tables = [path for path in ALL if path.endswith(".parquet")]
    for path in tables:
        whole = pl.read_parquet(copy / "results" / path)
        pl.concat([whole, whole[:1]]).write_parquet(copy / "results" / path)
    found = look(load(copy))
    assert {path for path, text in found if "rows, but its manifest counts" in text} == set(tables)


def test_an_edited_principle_and_a_moved_template(copy: Path) -> None:
    """Contents count, not names."""
    moved = copy / "elsewhere.json"
    shutil.copy(ROOT / "demo" / "principles" / "rl.json", moved)
    runs = load(copy, ppo={"principles": str(moved)})
    assert look(runs) == set()
    moved.write_text(moved.read_text().replace("1", "2", 1))
    assert paths(look(runs)) == {POLICY} | SCORED


def test_a_policy_whose_run_has_another_reward_model_by_now(copy: Path) -> None:
    """The new reward model is not built yet; the one that trained the policy still exists, but not for this run."""
    shutil.copytree(copy / "results/runs/default/policy", copy / "results/runs/other/policy")
    assert paths(look(load(copy, runs={"default": {}, "other": {}}))) == {"evaluation/policies"}  # it has one more run
    found = look(load(copy, runs={"default": {}, "other": {"aggregation": {"agreement": "mean"}}}))
    assert {path for path, text in found if "inputs changed" in text} == {"runs/other/policy"}


def test_manifests_from_before_responses_were_cut(copy: Path) -> None:
    """A new key whose default is not what was done before it existed."""
    file = copy / "results/runs/default/policy/manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["settings"]["ppo"]["cut_markers"]
    file.write_text(json.dumps(manifest))
    assert any(path == POLICY and "ppo.cut_markers not set -> " in text for path, text in look(load(copy)))
    assert look(load(copy, ppo={"cut_markers": []})) == set()


def test_results_that_were_moved(small_run: Path, copy: Path) -> None:
    """Moved results, and the inputs that moved with them, are recognised under their new paths."""
    assert look(load(copy)) == set()
    assert verification.verify(load(copy)).whole == len(ALL | REPORT)
    rewrite_table(copy / "results" / "responses" / "response0.parquet", pl.col("response") + "x")
    assert {"reward_data/principle_preferences.parquet", *named("preferences.shards")} <= paths(look(load(copy)))


def test_shards(copy: Path) -> None:
    """Neither their number nor whether they are kept makes a whole table stale; a changed shard does."""
    other = {"sampling": {"shards": 3}, "judge": {"shards": 1}}
    assert look(load(copy, **other)) == set()
    rewrite_table(copy / "results" / "responses" / "response0.shards" / "1.parquet", pl.col("response") + "x")
    assert paths(look(load(copy))) == {"responses/response0.parquet"}
    for folder in (copy / "results").rglob("*.shards"):
        shutil.rmtree(folder)
    assert look(load(copy)) == set()
    rewrite_table(copy / "results" / "prompts" / "oasst1.parquet", pl.col("source") + "x")
    stale = {"responses/response0.parquet", "responses/response1.parquet", "evaluation/prompts.parquet"}
    assert paths(look(load(copy))) == stale


def test_shards_of_a_table_that_is_not_there_yet(copy: Path) -> None:
    (copy / "results" / "responses" / "response0.parquet").unlink()
    found = look(load(copy, sampling={"shards": 3}))
    assert found == {(f"responses/response0.shards/{shard}.parquet", "shards 2 -> 3") for shard in (0, 1)}


def test_manifests_of_earlier_versions(copy: Path) -> None:
    """Without the judge's model, the inputs of the shards, what the check reads, and keys that are new since then."""
    for path in sorted((copy / "results").rglob("*manifest.json")):
        manifest = json.loads(path.read_text())
        settings, inputs = manifest["settings"], manifest["inputs"]
        if "min_characters" in settings:
            settings["model"] = None
        if path.with_name(path.name.replace(".manifest.json", ".shards")).is_dir():
            manifest["inputs"] = {name: what for name, what in inputs.items() if ".shards/" in name}
        if "check_model" in path.parts:
            manifest["inputs"] = {name: what for name, what in inputs.items() if name == "demo/model"}
        if "boost" in settings.get("ppo", {}):
            del settings["ppo"]["boost"], settings["scoring"]
        path.write_text(json.dumps(manifest))
    assert look(load(copy)) == set()
    assert look(load(copy, ppo={"boost": 3.0})) == {(POLICY, "ppo.boost not set -> 3.0")}
    assert "models/pmp" in paths(look(load(copy, model={"dtype": "bfloat16"})))


def test_missing(copy: Path) -> None:
    """Only what the targets need is missing; what exists is compared with its manifest in any case."""
    shutil.rmtree(copy / "results" / "models" / "pmp")
    (copy / "results" / "prompts" / "rl.parquet").unlink()
    runs = load(copy)
    assert paths(look(runs, "missing")) == {"models/pmp", "prompts/rl.parquet"}
    assert look(runs) == look(runs, "follows") == set()
    assert look(load(copy, targets=["reward_model"]), "missing") == {("models/pmp", "")}


# ---- As people call it


def test_the_script(small_run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump({"ppo": {"kl_coefficient": 0.5}, "pmp": {"save_steps": 7}}))

    def run(*arguments: str, files: list[Path]) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, ROOT / "workflow_scripts" / "verify.py"]
        line += ["--configfile", json.dumps([str(small_run / "config.yaml"), *map(str, files)]), *arguments]
        return forks.run(line)

    whole = run(files=[])
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.splitlines()[-1] == f"whole: {len(ALL | REPORT)} artifacts"
    stale = run(files=[changed])
    policy = small_run / "results" / POLICY
    assert stale.returncode == 1
    assert f"stale: {policy}: ppo.kl_coefficient 0.01 -> 0.5\n" in stale.stdout
    follows = named("runs/default/evaluation", "evaluation/policies")
    follows |= {f"report/{part}" for part in ("funnel", "training", "policies", "tasks", "samples")}
    assert stale.stdout.splitlines()[-1] == f"whole: {len(ALL | REPORT) - 1 - len(follows)} artifacts"
    assert run("--forcerun", files=[changed]).stdout.split() == ["--forcerun", str(policy)]
    assert run("--forcerun", files=[]).stdout == ""


def test_the_commit_is_a_note(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "results" / "models" / "pmp" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"git_commit": "0123456789abcdef-dirty"}))
    monkeypatch.setattr(artifacts, "git_commit", lambda: "fedcba9876543210")
    notes = [str(one) for one in verification.verify(load(copy)).findings if one.kind == "note"]
    line = f"note: {copy}/results/models/pmp: made by commit 0123456789-dirty, but the checkout is at fedcba9876"
    assert line in notes
    assert look(load(copy)) == set()


def test_other_weights_under_the_same_name(copy: Path) -> None:
    """All that reads them is stale; RL's prompts need only the tokenizer."""
    base = copy / "base"
    shutil.copytree(ROOT / "demo" / "model", base)
    runs = load(copy, model={"base": str(base)})
    assert look(runs) == set()
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert paths(look(runs)) == ALL - named("reward_data/", "examples", "oasst1", "rl.parquet") - WITHOUT_MODEL
