"""The code's structure: layers, interfaces and single places; for each, a test fails when it is bypassed."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
import yte
from pydantic import BaseModel

from docs import write_reference
from salmon import authors, configuration, vllm_server
from salmon.config import RewardTraining, Training
from salmon.configuration import TARGETS, Config
from salmon.formats import EXAMPLE_FORMATS, PAIR_FORMATS, PROMPT_FORMATS
from salmon.tables import TABLES
from tests.running import environment

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "workflow_scripts"
RULES = "".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
BLOCKS = re.split(r"^(?=rule |use rule )", RULES, flags=re.M)[1:]


# ---- Layers


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{folder / 'workflow_scripts'}{os.pathsep}{folder}"}
    line = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        (None, "", ""),
        ("salmon/text.py", "from salmon import ppo", "salmon.text -> salmon.ppo"),
        ("salmon/config.py", "from salmon.principles import read_judged", "salmon.config -> salmon.principles"),
        ("salmon/artifacts.py", "import snakemake", "salmon.artifacts -> snakemake"),
        ("salmon/ppo.py", "import train_policy", "salmon.ppo -> train_policy"),
        ("salmon/sampling.py", "import salmon.shared_base", "salmon.sampling -> salmon.shared_base"),
        ("salmon/newcomer.py", "x = 1", "newcomer"),
    ],
)
def test_an_import_that_points_upwards_fails_lint(tmp_path: Path, file: str | None, line: str, named: str) -> None:
    for name in ("workflow_scripts/salmon", "demo", "playground"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("model", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file:
        with (tmp_path / "workflow_scripts" / file).open("a") as stream:
            stream.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert (done.returncode == 0) == (file is None), done.stdout
    assert named in done.stdout


def test_the_contract_of_the_library_names_every_script() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (library,) = (contract for contract in contracts if contract["id"] == "library")
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    assert set(library["forbidden_modules"]) == {"snakemake", "demo", "playground", *scripts}


def imported(path: Path) -> Iterator[str]:
    """What a file imports: modules, and names from modules as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_sampler_knows_the_loop_behind_it() -> None:
    """Importing `generate` would bypass the sampler, and no other engine would be used."""
    users = {
        path.name
        for folder in (SCRIPTS, ROOT / "demo")
        for path in folder.rglob("*.py")
        for name in imported(path)
        if name in ("salmon.generation", "salmon.generation.generate")
    }
    assert users == {"sampling.py"}


# ---- One place for each thing


@pytest.mark.parametrize("page", write_reference.PAGES)
def test_what_documents_repeat_is_what_the_code_says(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == write_reference.PAGES[page](), "run `make docs-reference`"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration, with its field."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if (below := write_reference.section_in(field.annotation)) is not None:
            yield from sections(below, f"{prefix}{name}.")


def test_every_key_is_described() -> None:
    assert [key for key, field in sections(Config) if not field.description] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_option_of_a_script_is_described(name: str) -> None:
    options = importlib.import_module(name).Arguments.model_fields
    assert [option for option, field in options.items() if not field.description] == []


@pytest.mark.parametrize("file", ["config.yaml", "demo/config.yaml", "tests/real/config.yaml"])
def test_configurations_fit_the_schema_that_they_name(file: str) -> None:
    text = (ROOT / file).read_text()
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named
    schema = json.loads(((ROOT / file).parent / named[1]).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(text), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"ppo": {"clipp": 0.2}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"prompts": {"sources": {"mine": {"format": "parquet"}}}}, schema)
    jsonschema.validate({"runs": {"mine": {"ppo": {"clip": 0.1}}, "other": None}}, schema)
    for changes in ({"ppo": {"clipp": 0.2}}, {"targets": []}, {"rl_prompts": {"sources": {"mine": {"limit": 0}}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"runs": {"mine": changes}}, schema)


def test_tables_and_targets_name_the_same_files() -> None:
    artifacts = {target.artifact for target in TARGETS.values() if target.artifact.endswith(".parquet")}
    artifacts |= {
        path
        for name, path in configuration.ARTIFACTS.items()
        if name.endswith(("answers", "scores", "verdicts", "evaluation_pairs"))
    }
    files = {table.files for table in TABLES if "*" not in table.files}  # * marks what two tables share
    found = set()
    for name in files:
        begin, *middle = re.split("[{}]", name)
        found |= {begin + one + middle[1] for one in middle[0].split(",")} if middle else {begin}
    assert found == artifacts


def test_the_lists_of_targets_are_one() -> None:
    """A rule with a target's name would define it a second time; what a target names, a rule makes."""
    rules = {match[1] for block in BLOCKS if (match := re.match(r"(?:use rule \w+ as|rule) (\w+)", block))}
    assert rules.isdisjoint(TARGETS)
    made = re.findall(r'"<results>/(?:\{home\})?([^"]+)"', RULES)
    for target in TARGETS.values():
        assert all(configuration.ARTIFACTS[name] in made for name in target.names)
        if target.names:
            continue
        pattern = target.artifact.replace("runs/default/", "runs/{run}/").replace("response0", "response{index}")
        assert pattern.replace("response1", "response{index}") in made, target


# ---- A rule that needs a GPU


def rules_with_a_model(blocks: list[str]) -> set[str]:
    """Rules whose environment is the model's, and those that are derived from such a rule and keep its environment."""
    headings = [re.match(r"(?:use rule (\w+) as|rule) (\w+)", block) for block in blocks]
    with_model: set[str] = set()
    before = None
    while before != with_model:  # a rule may be derived from one that comes later, in another file
        before = set(with_model)
        for heading, block in zip(headings, blocks, strict=True):
            assert heading
            if re.search(r"envs/(model|evaluation)\.yaml", block) or (
                heading[1] in with_model and "conda:" not in block
            ):
                with_model.add(heading[2])
    return with_model


def set_resources(profile: str) -> dict[str, dict[str, Any]]:
    """The resources of every rule, as Snakemake reads them from the profile."""
    with (ROOT / "profiles" / profile / "profile.yaml").open() as stream:
        rendered = yte.process_yaml(stream, require_use_yte=True)
    resources: dict[str, dict[str, Any]] = rendered["set-resources"]
    return resources


def test_rules_with_a_model_are_found_in_any_order() -> None:
    blocks = ["use rule b as c with:\n", "use rule a as b with:\n", "rule a:\n conda: envs/model.yaml\n", "rule d:\n"]
    assert rules_with_a_model(blocks) == {"a", "b", "c"}
    assert rules_with_a_model([*blocks, "use rule a as e with:\n    conda: envs/data.yaml\n"]) == {"a", "b", "c"}


# `import_authors` compares names and shapes, and computes nothing.
@pytest.mark.parametrize("rule", sorted(rules_with_a_model(BLOCKS) - {"import_authors"}))
def test_every_rule_with_a_model_has_its_gpus_in_the_profiles(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would silently run on a CPU partition, or share a GPU with other jobs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SALMON_SITE", raising=False)
    assert set_resources("local").get(rule, {}).get("gpu", 0) >= 1, "profiles/local/profile.yaml, set-resources"
    site = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
    asked = set_resources("slurm").get(rule, {})
    assert asked.get("slurm_partition") == repr(site["gpu_partition"]), "profiles/slurm/profile.yaml, set-resources"
    assert re.fullmatch(rf"'{site['gres']}:[1-9]\d*'", asked.get("gres", "")), (
        "profiles/slurm/profile.yaml, set-resources"
    )


# ---- Errors name what the user can set

# Keys of a model's file and of DeepSpeed's, and names of files.
OTHERS_KEYS = {"score.weight", "zero_optimization.stage", "config.json", "tokenizer.json", "models.md", "evaluation.md"}


def texts(node: ast.AST) -> Iterator[str]:
    """The texts in an expression, with a § where a value is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "§" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


TREES = {path.name: ast.parse(path.read_text()) for path in sorted(SCRIPTS.rglob("*.py"))}
NODES = [(file, node) for file, tree in TREES.items() for node in ast.walk(tree)]


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def arguments_named(*names: str) -> Iterator[tuple[str, str]]:
    """Every text that is passed to a function of ours as a parameter with one of these names, and the caller's file."""
    places = {
        node.name: place
        for _, node in NODES
        if isinstance(node, ast.FunctionDef)
        for place, parameter in enumerate(node.args.args)
        if parameter.arg in names
    }
    for file, node in NODES:
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg in names]
            given += node.args[places.get(name_of(node), len(node.args)) :][:1]
            for value in given:
                if isinstance(value, ast.Constant | ast.JoinedStr):
                    yield from ((file, text) for text in texts(value))


def error_texts() -> Iterator[tuple[str, str]]:
    """Every text in a `UserError` and every key that is passed on to be named in one, with its file."""
    for file, node in NODES:
        if isinstance(node, ast.Call) and name_of(node) == "UserError":
            yield from ((file, text) for text in texts(node))
    yield from arguments_named("key")


STAGES = [name for name, field in Config.model_fields.items() if issubclass(field.annotation or int, Training)]
REWARD_STAGES = [name for name in STAGES if issubclass(Config.model_fields[name].annotation or int, RewardTraining)]
KEYS = {key for key, _ in sections(Config)} | OTHERS_KEYS
# What `reward_text_tokens` puts before names of settings: the beginnings of their keys.
BEGINNINGS = {text.replace("§", stage) for _, text in arguments_named("keys") for stage in REWARD_STAGES}


AUTHORS_ROWS = (authors.ResponseRow, authors.PreferenceRow, authors.RecordRow)


def unknown_names(text: str, stages: list[str] = REWARD_STAGES) -> list[str]:
    """Names in the text of an error that a user cannot set: not keys, columns, rules, or options of the profile."""
    columns = {name for table in TABLES for name in table.columns}
    columns |= {
        name
        for each in (*PROMPT_FORMATS.values(), *EXAMPLE_FORMATS.values(), *PAIR_FORMATS.values())
        for name in each.row.__annotations__
    }
    columns |= {name for row in AUTHORS_ROWS for name in row.__annotations__}
    resources = {name for block in BLOCKS for name in re.findall(r"\{resources\.(\w+)(?::q)?\}", block)}
    site = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
    source = {key.rsplit(".", 1)[1] for key in KEYS if key.startswith("prompts.sources.")}
    files = {"site.yaml"}
    engine = {f"--engine.{name.replace('_', '-')}" for name in vllm_server.Hardware.model_fields}
    text = re.sub(r"--engine\.[\w-]+", lambda found: "" if found[0] in engine else found[0], text)
    rules = set(re.findall(r"^rule (\w+):", RULES, flags=re.M))
    dotted = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b(?!\()", text)
    wrong = [word for word in dotted if word not in KEYS | files]
    wrong += [
        f"§.{name}" for name in re.findall(r"§\.([a-z_]+)", text) if not all(f"{s}.{name}" in KEYS for s in stages)
    ]
    joined = re.findall(r"§([a-z]+_[a-z_]+)", text)
    wrong += [f"§{name}" for name in joined if not all(begin + name in KEYS for begin in BEGINNINGS)]
    single = re.findall(r"(?<![\w.§{])[a-z]+(?:_[a-z]+)+\b(?![.\w])", text)
    return wrong + [name for name in single if name not in columns | resources | source | set(site) | rules]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("ppo.clip is §, tokens_per_pass §; see column s12 of prompt_id", []),
        ("ppo.clipp is §", ["ppo.clipp"]),
        ("lower settings.batch_size", ["settings.batch_size"]),
        ("§.batch_size is not a multiple of §.init", ["§.init"]),  # which pmp lacks
        ("raise §max_length or §batch_size", ["§batch_size"]),  # ppo.reward_batch_size
        ("raise batch_sizes", ["batch_sizes"]),
    ],
)
def test_the_names_in_an_error_are_found(text: str, unknown: list[str]) -> None:
    assert STAGES == ["sft", "pmp", "reward_model"]
    assert {"pmp.", "reward_model.", "ppo.reward_"} == BEGINNINGS
    assert unknown_names(text) == unknown


def test_errors_name_keys_of_the_configuration_or_options_of_the_profile() -> None:
    named = list(error_texts())
    passed_on = "policy_prompt.template's preamble + sampling.max_length"
    assert {("train_reward_model.py", "§.max_length"), ("sample_responses.py", passed_on)} <= set(named)
    stages = {"training.py": STAGES}  # the others are about reward models
    found = [(file, name) for file, text in named for name in unknown_names(text, stages.get(file, REWARD_STAGES))]
    assert found == []


def test_the_settings_of_reward_texts_are_those_of_their_sections() -> None:
    """All their sections have the same settings: errors name them by the section that was given."""
    for name in ("max_length", "query_length", "response_length"):
        assert {f"{begin}{name}" for begin in BEGINNINGS} <= KEYS


DRAWN = ("funnel", "judge", "reward_model", "training", "policies", "tasks", "samples")


def test_data_rules_and_the_snakefile_do_without_torch() -> None:
    """The data rules' environment has no torch, and importing it takes a second or two."""
    modules = ["clean_prompts", "clean_sft_data", "clean_pmp_data", "aggregate_preferences", "gather_shards", "verify"]
    modules += ["import_authors", "evaluate_judge", "evaluate_policies", "judge_by_endpoint"]
    modules += [f"draw_{part}" for part in DRAWN]
    modules += ["salmon.work", "salmon.configuration", "salmon.identity", "salmon.tokenizers"]
    program = "import sys\nsys.modules['torch'] = None\n" + "".join(f"import {name}\n" for name in modules)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
