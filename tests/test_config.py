"""The whole configuration is validated before any job, with errors that a person can act on."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from snakemake.cli import parse_config

from salmon.config import Ppo, Sampling, is_local
from salmon.configuration import check_paths, load, merge
from salmon.errors import UserError
from tests.keys import is_key

ROOT = Path(__file__).parents[1]


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config.yaml").read_text())


def set_key(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(raw)
    *parents, last = key.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[last] = value
    return changed


def test_the_papers_limits_and_markers(raw: dict[str, Any]) -> None:
    """They equal those in the notes on the reference; what each limit counts is tested where it is used."""
    sampling, rl_prompts, ppo = raw["sampling"], raw["rl_prompts"], raw["ppo"]
    assert sampling["max_length"] == 768
    assert (rl_prompts["min_tokens"], rl_prompts["max_tokens"]) == (2, 256)
    assert (ppo["query_length"], ppo["response_length"], ppo["warmup_steps"]) == (256, 1024, 5)
    assert ppo["cut_markers"] == Ppo(template="t", principles="p").cut_markers == ["\nNote", "\nUpdate", "\nComment"]


def test_the_papers_configuration_is_valid(raw: dict[str, Any]) -> None:
    config = load(raw, ROOT)["default"]
    assert config.model.base == "meta-llama/Llama-2-70b-hf"
    assert config.ppo.rollout_batch_size == 576


def test_the_file_shows_every_key_and_no_other(raw: dict[str, Any]) -> None:
    def compare(model: BaseModel, shown: dict[str, Any], where: str) -> None:
        fields = set(type(model).model_fields)
        assert set(shown) == fields, f"{where}: {set(shown) ^ fields}"
        for name in fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                compare(value, shown[name], f"{where}.{name}")
            elif isinstance(value, dict):
                for key, item in value.items():
                    if isinstance(item, BaseModel):
                        compare(item, shown[name][key], f"{where}.{name}.{key}")

    compare(load(raw, ROOT)["default"], raw, "config")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ppo.temprature", 0.7, ["ppo.temprature", "unknown key"]),
        ("tempo", {}, ["tempo", "unknown key"]),
        ("sampling.temperature", "warm", ["sampling.temperature", "'warm'", "number"]),
        ("sampling.temperature", -1, ["sampling.temperature", "-1", "greater than or equal to 0"]),
        ("sampling.seeds", [42, 42], ["sampling.seeds", "different seeds"]),
        ("model.quantization", "int3", ["model.quantization", "'int3'", "'nf4'", "'none'"]),
        ("ppo.kl_estimator", "k2", ["ppo.kl_estimator", "'k2'", "'k1'", "'k3'"]),
        ("aggregation.negation_probability", 1.5, ["aggregation.negation_probability", "1.5"]),
        ("ppo.minibatch_size", 100, ["ppo.rollout_batch_size: 576", "multiple of ppo.minibatch_size 100"]),
        ("aggregation.dimensions", ["Concise", "Brave"], ["aggregation.dimensions", "Brave", "judge.json", "Creative"]),
        ("ppo.principles_per_rollout", 20, ["ppo.principles_per_rollout", "20", "14"]),
        ("judge.template", "prompts/templates/policy.txt", ["judge.template", "{OutputA}", "{Definition}"]),
        ("pmp.template", "prompts/templates/reward_model.txt", ["pmp.template", "{Dimensions}", "nothing fills"]),
        ("reward_model.template", "nowhere.txt", ["reward_model.template", "nowhere.txt", "No such file"]),
        ("judge.principles", "nowhere.json", ["judge.principles", "nowhere.json"]),
        ("model.base", "./models/mine", ["model.base", "./models/mine", "does not exist"]),
        ("prompts.sources.oasst1.path", "data/oasst1.parquet", ["prompts.sources.oasst1.path", "does not exist"]),
        ("prompts.sources", {}, ["prompts.sources", "at least 1"]),
        ("sampling.max_length", True, ["sampling.max_length", "true and false"]),
        ("prompts.sources.oasst1.format", "shp", ["prompts.sources.oasst1.format", "'shp'", "'oasst1'"]),
        ("pmp_data.sources.shp.format", "dolly", ["pmp_data.sources.shp.format", "'dolly'", "'hh_rlhf'"]),
        ("prompts.sources.oasst1.path", [], ["prompts.sources.oasst1.path", "at least 1"]),
        ("prompts.sources.oasst1.path", 5, ["prompts.sources.oasst1.path: ", "valid string", "valid list"]),
        ("prompts.sources.oasst1.path", ["a/b", 5], ["prompts.sources.oasst1.path: ", "string (got 5)"]),
        ("prompts.sources.oasst1", "a/b", ["prompts.sources.oasst1: ", "'a/b'"]),
        ("pathvars.result", "x", ["pathvars.result", "unknown key"]),
        ("pathvars.logs", "a{b}*", ["pathvars.logs: ", "'*' '{' '}' cannot be part of this path"]),
        ("pmp.learning_rate", float("inf"), ["pmp.learning_rate", "finite"]),
        ("pmp.max_length", 100, ["pmp.max_length: 100", "no room", "pmp.query_length 256", "pmp.response_length 640"]),
        ("ppo.reward_max_length", 800, ["ppo.reward_max_length: 800", "no room", "ppo.reward_response_length 768"]),
        ("rl_prompts.length_bonus", {"general": 1.0}, ["rl_prompts.length_bonus: ", "reasoning, red_teaming"]),
        ("rl_prompts.length_bonus.hard", 1.0, ["rl_prompts.length_bonus.hard: unknown key", "'red_teaming'"]),
        ("rl_prompts.min_tokens", 300, ["rl_prompts.min_tokens: 300", "rl_prompts.max_tokens 256"]),
        ("runs.my run", {}, ["runs.my run: not a valid name"]),
        ("runs.default", {"ppo": {}}, ["runs: there must be a run `default: {}`"]),
        ("rl_prompts.sources.math.question_type", "hard", ["question_type", "'hard'", "'reasoning'"]),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(raw: dict[str, Any], key: str, value: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(set_key(raw, key, value), ROOT)
    check_lines(str(error.value), said)


def check_lines(message: str, said: list[str]) -> None:
    """Every line names an existing key once, or says that there is no such key; no line shows a whole section."""
    for words in said:
        assert words in message
    heading, *lines = message.splitlines()
    assert heading == "the configuration is not valid:"
    keys = [line.strip().partition(": ")[::2] for line in lines]
    assert all(is_key(key) or wrong.startswith(("unknown key", "not a valid name")) for key, wrong in keys), message
    assert len({key for key, _ in keys}) == len(keys)
    assert "(got {" not in message


def test_all_findings_are_reported_at_once(raw: dict[str, Any]) -> None:
    wrong = set_key(set_key(raw, "judge.shards", 0), "ppo.gamma", 2)
    with pytest.raises(UserError) as error:
        load(wrong, ROOT)
    assert "judge.shards" in str(error.value)
    assert "ppo.gamma" in str(error.value)


def test_missing_sections_are_named(raw: dict[str, Any]) -> None:
    del raw["judge"]
    with pytest.raises(UserError, match="judge: required"):
        load(raw, ROOT)


def test_principles_and_templates_in_the_authors_formats_work(raw: dict[str, Any], tmp_path: Path) -> None:
    principles = tmp_path / "principles.json"
    names = raw["aggregation"]["dimensions"]
    principles.write_text(
        json.dumps([{"dimension": n, "definition": "Do.", "negative_definition": "Do not."} for n in names])
    )
    judge = tmp_path / "judge.txt"
    judge.write_text("{UserInstruction}|{OutputA}|{OutputB}|{Dimension}: {Definition}|the more {Dimension} is Output (")
    changed = set_key(set_key(raw, "judge.principles", str(principles)), "judge.template", str(judge))
    assert load(changed, ROOT)["default"].judge.template == str(judge)


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("OpenAssistant/oasst1", False),
        ("gpt2", False),
        ("./gpt2", True),
        ("/data/x", True),
        ("~/models/llama", True),
        ("data/raw/oasst1", True),
        ("data/oasst1.parquet", True),
        ("data/oasst1.jsonl.gz", True),
    ],
)
def test_local_paths_are_told_from_hub_ids(path: str, local: bool) -> None:
    assert is_local(path) is local


def test_what_the_workflow_makes_need_not_exist(raw: dict[str, Any]) -> None:
    config = load(raw, ROOT)["default"]
    made = config.model_copy(update={"model": config.model.model_copy(update={"base": "results/models/mine"})})
    assert check_paths(made, ROOT) == []


def test_a_run_is_the_configuration_with_what_it_sets_differently(raw: dict[str, Any]) -> None:
    runs = load(raw, ROOT)
    assert next(iter(runs)) == "default"
    assert runs["sum_of_principles"].aggregation.decision == "sum"
    assert runs["sum_of_principles"].aggregation.passes == runs["default"].aggregation.passes
    assert runs["no_pmp"].reward_model.init == "base"
    assert runs["harmless"].ppo.learning_rate == runs["default"].ppo.learning_rate


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ppo": {"temprature": 1}}, ["runs.mine.ppo.temprature: unknown key"]),
        ({"ppo": {"principles": "nowhere.json"}}, ["runs.mine.ppo.principles: ", "nowhere.json"]),
        ({"ppo": {"minibatch_size": 100}}, ["runs.mine.ppo.rollout_batch_size: 576", "ppo.minibatch_size 100"]),
        ({"rl_prompts": {"sources": {"a": {"path": 5}}}}, ["runs.mine.rl_prompts.sources.a.path: "]),
        ({"judge": {"min_characters": -1}}, ["runs.mine.judge.min_characters: "]),
        ({"targets": ["pmp"]}, ["runs.mine.targets: unknown key", "'aggregation'", "'ppo'"]),
    ],
)
def test_errors_of_a_run_name_it(raw: dict[str, Any], changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(set_key(raw, "runs.mine", changes), ROOT)
    check_lines(str(error.value), said)


def test_a_run_with_another_base_model_does_not_keep_the_adapter_of_the_first(raw: dict[str, Any]) -> None:
    changed = set_key(set_key(raw, "model.adapter", "a/b"), "model.revision", "0123abc")
    with pytest.raises(UserError) as error:
        load(set_key(changed, "runs.mine", {"model": {"base": "c/d", "revision": None}}), ROOT)
    check_lines(
        str(error.value), ["runs.mine.model.base: differs from the default", "set runs.mine.model.adapter, to null"]
    )
    run = load(set_key(changed, "runs.mine", {"model": {"base": "c/d", "revision": None, "adapter": None}}), ROOT)
    assert run["mine"].model.adapter is None


@pytest.mark.parametrize(("name", "possible"), [("lr-1e-5", True), ("a", True), ("-a", False), ("a/b", False)])
def test_names_of_runs(raw: dict[str, Any], name: str, possible: bool) -> None:
    changed = {**raw, "runs": {"default": {}, name: {}}}
    if possible:
        assert name in load(changed, ROOT)
    else:
        with pytest.raises(UserError, match="not a valid name"):
            load(changed, ROOT)


def test_errors_of_all_runs_are_reported_at_once(raw: dict[str, Any]) -> None:
    changed = set_key(set_key(raw, "runs.mine", {"ppo": {"gamma": 2}}), "runs.other", {"ppo": {"lam": 2}})
    with pytest.raises(UserError, match=r"runs\.mine\.ppo\.gamma: .*\n  runs\.other\.ppo\.lam: "):
        load(changed, ROOT)


def test_null_removes_a_source_and_a_run(raw: dict[str, Any]) -> None:
    changed = set_key(set_key(raw, "rl_prompts.sources.math", None), "runs.harmless", None)
    config = load(changed, ROOT)["default"]
    assert "math" not in config.rl_prompts.sources
    assert "harmless" not in load(changed, ROOT)


def test_null_on_the_command_line(raw: dict[str, Any]) -> None:
    """There, Snakemake reads everything in a section as text."""
    words = ["runs={harmless: null}", "ppo={max_steps: null, value_clip: 0.3}"]
    changes = parse_config(words)
    assert changes["ppo"]["max_steps"] == "null"
    raw["ppo"]["max_steps"] = 7
    runs = load(merge(raw, changes), ROOT)
    assert "harmless" not in runs
    assert runs["default"].ppo.max_steps is None
    assert runs["default"].ppo.value_clip == 0.3


def test_the_harmless_run_has_red_teaming_questions(raw: dict[str, Any]) -> None:
    runs = load(raw, ROOT)
    types = {name: {s.question_type for s in run.rl_prompts.sources.values()} for name, run in runs.items()}
    assert "red_teaming" in types["harmless"]
    assert types["default"] == {"general", "reasoning"}


def test_another_seed_moves_every_seed_of_every_run(raw: dict[str, Any]) -> None:
    changed = set_key(raw, "runs.mine", {"ppo": {"seed": 7}})
    before, after = load(changed, ROOT), load(set_key(changed, "seed", 2), ROOT)
    assert after["mine"].ppo.seed == 2007
    for name in before:
        one, other = before[name].model_dump(), after[name].model_dump()
        for section in one:
            if isinstance(one[section], dict) and "seed" in one[section]:
                assert other[section].pop("seed") == one[section].pop("seed") + 2000, section
        assert other["sampling"].pop("seeds") == tuple(seed + 2000 for seed in one["sampling"].pop("seeds"))
        assert (one.pop("seed"), other.pop("seed")) == (0, 2)
        assert one == other


def test_the_results_folder_is_filled_in(raw: dict[str, Any]) -> None:
    changed = set_key(
        set_key(raw, "pathvars.results", "elsewhere"), "prompts.sources.oasst1.path", "<results>/a/b.json"
    )
    config = load(changed, ROOT)["default"]
    assert config.prompts.sources["oasst1"].path == "elsewhere/a/b.json"
    assert config.pathvars.logs == "elsewhere/logs"
    assert load(set_key(changed, "pathvars.results", "elsewhere/"), ROOT)["default"] == config
    del changed["pathvars"]
    assert load(changed, ROOT)["default"].prompts.sources["oasst1"].path == "results/a/b.json"


def test_targets_are_those_of_the_list(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"targets\.0: must be one of 'sft_data', 'sft', 'prompts'"):
        load(set_key(raw, "targets", ["polices"]), ROOT)


@pytest.mark.parametrize(
    ("temperature", "is_right"), [(0.0, True), (0.01, True), (2.0, True), (0.005, False), (2.5, False)]
)
def test_an_engine_samples_at_the_temperature_that_is_set(temperature: float, is_right: bool) -> None:
    """By itself, vLLM would raise a low one."""
    assert Sampling(temperature=temperature).temperature == temperature
    with nullcontext() if is_right else pytest.raises(ValidationError, match="with the engine vllm"):
        Sampling(temperature=temperature, engine="vllm")
