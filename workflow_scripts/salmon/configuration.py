"""The whole of a configuration: its sections together, its runs, its targets, and all that it points to.

Only the Snakefile loads one; a script receives the sections it needs (`config`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from salmon import principles, shipped, templates
from salmon.assumptions import Assumptions
from salmon.config import (
    Aggregation,
    Evaluation,
    Judge,
    Lora,
    Model,
    OneOf,
    PathVars,
    PmpData,
    PolicyPrompt,
    Ppo,
    PpoTexts,
    Prompts,
    Report,
    RewardModel,
    RewardTraining,
    RlPrompts,
    Sampling,
    Scoring,
    Section,
    Sft,
    SftData,
    is_local,
)
from salmon.errors import UserError, describe, describe_errors, findings
from salmon.identity import context_limit, read_config

SFT = "sft"
"""As `model.adapter`, stands for the adapter that `train_sft` makes; `plan.Plan` knows where that is."""
SEED_STEP = 1000  # larger than the distance of two seeds in one configuration, so that no draw comes twice
NAME = "the configuration"  # in messages
RunSection = Literal[
    "model",
    "policy_prompt",
    "sft_data",
    "sft",
    "prompts",
    "sampling",
    "judge",
    "aggregation",
    "pmp_data",
    "lora",
    "scoring",
    "pmp",
    "reward_model",
    "rl_prompts",
    "ppo",
]
ARTIFACTS = {
    "engine_base": "models/engine_base",
    "sft_data": "sft/examples.parquet",
    "sft": "models/sft",
    "check_sampling": "check_model/sampling",
    "check_judging": "check_model/judging",
    "check_training": "check_model/training",
    "check_rl": "check_model/rl",
    "prompts": "prompts/oasst1.parquet",
    "response0": "responses/response0.parquet",
    "response1": "responses/response1.parquet",
    "preferences": "preferences/preferences.parquet",
    "reward_data": "reward_data/principle_preferences.parquet",
    "pmp_data": "reward_data/pmp.parquet",
    "pmp": "models/pmp",
    "reward_model": "models/reward_model",
    "rl_prompts": "prompts/rl.parquet",
    "policy": "policy",
    "evaluation_prompts": "evaluation/prompts.parquet",
    "initial_answers": "evaluation/initial_answers.parquet",
    "initial_scores": "evaluation/initial_scores.parquet",
    "answers": "evaluation/answers.parquet",
    "answer_scores": "evaluation/scores.parquet",
    "answer_judgements": "evaluation/judgements.parquet",
    "run_judgements": "evaluation/run_judgements.parquet",
    "policy_evaluation": "evaluation/policies",
    "preferred_outputs": "evaluation/judge_pairs/preferred.parquet",
    "other_outputs": "evaluation/judge_pairs/other.parquet",
    "judged_pairs": "evaluation/judge_pairs/judgements.parquet",
    "judge_evaluation": "evaluation/judge",
    "evaluation_pairs": "evaluation/pairs.parquet",
    "pmp_evaluation": "evaluation/pmp",
    "reward_evaluation": "evaluation/reward_model",
    "initial_task_evaluation": "evaluation/initial_tasks",
    "task_evaluation": "evaluation/tasks",
    "initial_mt_bench": "evaluation/initial_mt_bench",
    "mt_bench": "evaluation/mt_bench",
    "verdicts": "evaluation/verdicts.parquet",
    "funnel": "report/funnel",
    "sft_figures": "report/sft",
    "judge_figures": "report/judge",
    "pmp_figures": "report/pmp",
    "reward_figures": "report/reward_model",
    "training_figures": "report/training",
    "policy_figures": "report/policies",
    "task_figures": "report/tasks",
    "samples": "report/samples",
}
"""Name of an artifact -> its path below the results' folder, or that of a run."""

SOURCES = (
    ("sft_data", "sources"),
    ("prompts", "sources"),
    ("pmp_data", "sources"),
    ("rl_prompts", "sources"),
    ("evaluation", "pairs"),
    ("evaluation", "judge_pairs"),
    ("evaluation", "prompts"),
)
"""Sections, and their keys for data sets by name."""


@dataclass(frozen=True)
class Target:
    """A name that people type for artifacts.

    Attributes:
        artifact: path below the results; with `{run}`, of every run.
        meaning: what it is and how it is made, for documents.
        names: of `ARTIFACTS`, where it is several, of every run that has them.
    """

    artifact: str
    meaning: str
    names: tuple[str, ...] = ()


TARGETS = {
    "sft_data": Target(ARTIFACTS["sft_data"], "`clean_sft_data`, instructions with answers"),
    "sft": Target(ARTIFACTS["sft"], "`train_sft`, the initial policy where `model.adapter` is `sft`"),
    "prompts": Target(ARTIFACTS["prompts"], "`clean_prompts`, from OASST1"),
    "response0": Target(ARTIFACTS["response0"], "`sample_responses`, one answer per prompt, scattered over shards"),
    "response1": Target(ARTIFACTS["response1"], "the same with another seed"),
    "preferences": Target(
        ARTIFACTS["preferences"],
        "`judge_preferences`, both orders of each pair under each principle, scattered over shards",
    ),
    "reward_data": Target(ARTIFACTS["reward_data"], "`aggregate_preferences`, principles drawn and negated at random"),
    "pmp_data": Target(ARTIFACTS["pmp_data"], "`clean_pmp_data`, from SHP and HH-RLHF"),
    "pmp": Target(ARTIFACTS["pmp"], "`train_pmp`, the reward model before it knows principles"),
    "reward_model": Target(ARTIFACTS["reward_model"], "`train_reward_model`, starting from `pmp`"),
    "rl_prompts": Target(
        ARTIFACTS["rl_prompts"], "`clean_rl_prompts`, from ShareGPT, Dolly, OASST1, OpenOrca and MATH"
    ),
    "policy": Target("runs/default/policy", "`train_policy`, PPO"),
    "policies": Target("runs/{run}/policy", "every run in `config.yaml`, sharing what they have in common"),
    "evaluation": Target(
        "evaluation/*",
        "`evaluate_judge`, `evaluate_reward_model`, `evaluate_policies` and the benchmarks, of all runs",
        (
            *("judge_evaluation", "pmp_evaluation", "reward_evaluation", "policy_evaluation"),
            *("initial_task_evaluation", "task_evaluation", "initial_mt_bench", "mt_bench", "verdicts"),
        ),
    ),
    "report": Target(
        "report/*",
        "the rules `draw_*`: pictures and tables of what the other targets in `config.yaml` make",
        (
            "funnel",
            "sft_figures",
            "judge_figures",
            "pmp_figures",
            "reward_figures",
            "training_figures",
            "policy_figures",
            "task_figures",
            "samples",
        ),
    ),
    "demo_evaluation": Target("demo_evaluation", "`evaluate_demo`, the demo's measurements against its oracles"),
    "demo_policy": Target("demo_policy", "`train_demo_policy`, the demo's initial policy trained anew"),
}
"""What can be named on the command line of Snakemake and in `targets`."""


class Config(Section):
    """The whole of `config.yaml`."""

    pathvars: PathVars = Field(PathVars(), description="where things go")
    targets: list[Annotated[str, OneOf(TARGETS)]] = Field(
        ["policy"], min_length=1, description="what is built where no target is named"
    )
    seed: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description=f"number of the repetition: {SEED_STEP} times this is added to every seed of the sections",
    )
    model: Model = Field(description="the initial policy")
    policy_prompt: PolicyPrompt = Field(description="how an instruction becomes a prompt")
    sft_data: SftData = Field(description="what the initial policy is trained on, where `model.adapter` is `sft`")
    sft: Sft = Field(description="that training")
    prompts: Prompts = Field(description="prompts of the synthetic preferences")
    sampling: Sampling = Field(description="response0 and response1")
    judge: Judge = Field(description="the judging of the responses")
    aggregation: Aggregation = Field(description="judgements to reward-model records")
    pmp_data: PmpData = Field(description="human preferences for pre-training")
    lora: Lora = Field(description="every adapter that is trained")
    scoring: Scoring = Field(Scoring(), description="how the reward model reads its texts, in all stages")
    pmp: RewardTraining = Field(description="pre-training of the reward model")
    reward_model: RewardModel = Field(description="the reward model's principle-following stage")
    rl_prompts: RlPrompts = Field(description="prompts of the RL stage")
    ppo: Ppo = Field(description="RL")
    evaluation: Evaluation = Field(Evaluation(), description="what is measured of judge and reward models")
    report: Report = Field(Report(), description="what the report shows")
    plan: Assumptions = Field(Assumptions(), description="what `snakemake plan` assumes; it changes no result")
    runs: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], dict[RunSection, dict[str, Any]]] = Field(
        {"default": {}}, description="policies: name -> the settings that differ from the sections above"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_and_remove(cls, raw: Any) -> Any:
        """Fill in `<results>`; what a configuration that is read over another one sets to null is removed."""
        if not isinstance(raw, dict):
            return raw
        pathvars = raw.get("pathvars")
        results = pathvars.get("results") if isinstance(pathvars, dict) else None
        results = results if results and isinstance(results, str) else PathVars().results
        raw = _fill_results(raw, str(PurePosixPath(results)))
        for name, key in SOURCES:
            section = raw.get(name)
            if isinstance(section, dict) and isinstance(section.get(key), dict):
                raw[name] = {**section, key: {k: v for k, v in section[key].items() if v is not None}}
        if isinstance(raw.get("runs"), dict):
            raw["runs"] = {key: value for key, value in raw["runs"].items() if value is not None}
        return raw

    @field_validator("runs")
    @classmethod
    def _default_is_plain(cls, runs: dict[str, Any]) -> dict[str, Any]:
        if runs.get("default") != {}:
            raise ValueError("there must be a run `default: {}`; what it should do is set in the sections above")
        return runs


def load(raw: dict[str, Any], root: Path, checkout: Path = shipped.CHECKOUT) -> dict[str, Config]:
    """Validate a raw configuration and everything it points to that can be checked before any job.

    Args:
        raw: the merged configuration, as Snakemake holds it.
        root: folder that relative paths start from.
        checkout: of the workflow, where files that come with it are found (`shipped.find`).

    Returns:
        The configuration of every run (see `resolve_runs`).

    Raises:
        UserError: with one line for every finding: key, value, what is allowed.
    """
    try:
        config = Config.model_validate(shipped.find(_nulls(raw), root, checkout))
    except ValidationError as error:
        raise UserError(describe_errors(error, Config, NAME)) from None
    lines: list[str] = []
    runs = resolve_runs(config)
    for name, run in runs.items():
        prefix = "" if name == "default" else f"runs.{name}."
        for check in (check_templates, check_chats, check_principles, check_paths, check_imports, check_lengths):
            lines += [f"{prefix}{line}" for line in check(run, root) if line not in lines]
    if config.evaluation.against not in (None, *runs):
        lines.append(f"evaluation.against: there is no run {config.evaluation.against}; the runs are {', '.join(runs)}")
    if lines:
        raise UserError(describe(lines, NAME))
    return runs


def _nulls(raw: Any) -> Any:
    """The same, with null for the text `null`, as which Snakemake reads it in `--config section={key: null}`."""
    if isinstance(raw, Mapping):
        return {key: _nulls(value) for key, value in raw.items()}
    return None if raw == "null" else raw


def resolve_runs(config: Config) -> dict[str, Config]:
    """The configuration of every run: the sections, with what the run sets differently. `default` comes first.

    `seed` is worked into the seeds of the sections.

    Raises:
        UserError: with one line for every finding, as `load` does.
    """
    resolved: dict[str, Config] = {"default": config}
    lines: list[str] = []
    for name, changes in config.runs.items():
        lines += _left_over(config, name, changes)
        raw = merge(config.model_dump(mode="json"), changes)
        try:
            resolved[name] = _shift_seeds(Config.model_validate(raw))
        except ValidationError as error:
            prefix = "" if name == "default" else f"runs.{name}."
            lines += [f"{prefix}{line}" for line in findings(error, Config) if line not in lines]
    if lines:
        raise UserError(describe(lines, NAME))
    return resolved


def _left_over(config: Config, name: str, changes: Mapping[RunSection, Any]) -> Iterator[str]:
    """Findings about a run with another base model that would keep what belongs to the default run's."""
    judge = changes.get("judge") or {}
    for key, default, model in (
        ("model", config.model, changes.get("model")),
        ("judge.model", config.judge.model, judge.get("model") if isinstance(judge, dict) else None),
    ):
        if not (default and isinstance(model, dict) and model.get("base", default.base) != default.base):
            continue
        for part in ("revision", "adapter", "adapter_revision"):
            kept = getattr(default, part)
            if kept not in (None, SFT) and part not in model:
                yield (
                    f"runs.{name}.{key}.base: another model than the default run's, but would keep its {part} {kept}; "
                    f"set runs.{name}.{key}.{part}, to null if it has none"
                )


def field_of(key: str) -> FieldInfo | None:
    """The field behind a key of the configuration, such as `a.b.c`; None if there is no such key."""
    model: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    names = key.split(".")
    while names:
        if model is None:
            return None
        name = names.pop(0)
        field = model.model_fields.get(name)
        if field is None:
            return None
        model = section_in(field.annotation)
        if model is not None and field.annotation is not model and get_origin(field.annotation) is dict and names:
            names.pop(0)  # the name of an entry
    return field


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a type holds, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := section_in(part))), None)


def needs_engine_base(config: "Config", *sections: str) -> bool:
    """Whether an engine samples in a run whose weights it does not read: in one of some sections, or in any."""
    engines = {getattr(config, section).engine for section in sections or ("sampling", "ppo", "evaluation")}
    return "vllm" in engines and config.model.quantization == "nf4"


def texts_of(ppo: Ppo) -> PpoTexts:
    """The part of the section that `check_model` reads, so that it runs again for no other change."""
    return PpoTexts.model_validate(ppo.model_dump(include=set(PpoTexts.model_fields)))


def _shift_seeds(config: Config) -> Config:
    """Add to every seed of the sections what `seed` says."""
    step = SEED_STEP * config.seed
    raw = config.model_dump(mode="json")
    for section in raw.values():
        if isinstance(section, dict) and "seed" in section:
            section["seed"] += step
    raw["sampling"]["seeds"] = [seed + step for seed in raw["sampling"]["seeds"]]
    return Config.model_validate(raw)


def _fill_results(raw: Any, results: str) -> Any:
    """Put the results' folder where a text of the configuration has `<results>`."""
    if isinstance(raw, dict):
        return {key: _fill_results(value, results) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_fill_results(value, results) for value in raw]
    return raw.replace("<results>", results) if isinstance(raw, str) else raw


def merge(base: dict[str, Any], changes: dict[Any, Any]) -> dict[str, Any]:
    """Mappings key by key, to any depth; everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Configuration files, each read over those before it."""
    whole: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as YAML: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{file} is not a mapping of sections, as a configuration is")
        whole = merge(whole, found)
    return whole


def check_templates(config: Config, root: Path) -> list[str]:
    """Findings about the templates a configuration names: missing files, missing slots."""
    wanted = [
        ("judge.template", config.judge.template, templates.JUDGE_SLOTS),
        ("pmp.template", config.pmp.template, templates.PMP_SLOTS),
        ("reward_model.template", config.reward_model.template, templates.REWARD_SLOTS),
        ("ppo.template", config.ppo.template, templates.REWARD_SLOTS),
        *(("policy_prompt.template", file, ()) for file in config.policy_prompt.files),
        *(
            [("evaluation.judge_endpoint.template", endpoint.template, templates.ENDPOINT_SLOTS)]
            if (endpoint := config.evaluation.judge_endpoint)
            else []
        ),
    ]
    lines = []
    for key, path, needed in wanted:
        try:
            slots = templates.slots(templates.read(root / path))
        except UserError as error:
            lines.append(f"{key}: {error}")
            continue
        if missing := [f"{{{slot}}}" for slot in needed if slot not in slots]:
            lines.append(
                f"{key}: {path} has no slot {', '.join(missing)}; it needs all of "
                + ", ".join(f"{{{slot}}}" for slot in needed)
            )
        if extra := sorted(slots - set(needed)):
            lines.append(f"{key}: {path} has slots not filled here: " + ", ".join(f"{{{slot}}}" for slot in extra))
    return lines


def check_chats(config: Config, root: Path) -> list[str]:
    """Findings about templates that should become chats and have no turns."""
    formats = [("judge.format", config.judge.format, [config.judge.template])]
    scored = [config.pmp.template, config.reward_model.template, config.ppo.template]
    formats.append(("scoring.format", config.scoring.format, scored))
    findings = []
    for key, chosen, files in formats:
        for path in files if chosen == "chat" else ():
            try:
                text = templates.read(root / path)
            except UserError:  # which `check_templates` finds
                continue
            try:
                templates.turns(text)
            except UserError as error:
                findings.append(f"{key}: template {path} cannot be a chat: {error}")
    return findings


def check_principles(config: Config, root: Path) -> list[str]:
    """Findings about the principles a configuration names: missing files, unknown names, too few to draw."""
    lines = []
    try:
        known = [principle.dimension for principle in principles.read_judged(root / config.judge.principles)]
        unknown = [name for name in config.aggregation.dimensions if name not in known]
        if unknown:
            lines.append(
                f"aggregation.dimensions: {', '.join(unknown)} not in {config.judge.principles}, which defines "
                + ", ".join(known)
            )
        for source, pairs in config.evaluation.judge_pairs.items():
            if unknown := [name for name in pairs.principles or () if name not in known]:
                lines.append(
                    f"evaluation.judge_pairs.{source}.principles: {', '.join(unknown)} not in "
                    f"{config.judge.principles}, which defines {', '.join(known)}"
                )
    except UserError as error:
        lines.append(f"judge.principles: {error}")
    try:
        drawable = sum(principle.weight > 0 for principle in principles.read_weighted(root / config.ppo.principles))
        if drawable < config.ppo.principles_per_rollout:
            lines.append(
                f"ppo.principles_per_rollout: {config.ppo.principles_per_rollout}, but {config.ppo.principles} has "
                f"{drawable} principles with a weight above 0"
            )
    except UserError as error:
        lines.append(f"ppo.principles: {error}")
    return lines


def check_paths(config: Config, root: Path) -> list[str]:
    """Findings about local files and folders that the configuration names and that do not exist.

    Files below the results are made by the workflow and are not looked for.
    """
    results = config.pathvars.results
    named = [("model.base", config.model.base), ("model.adapter", config.model.adapter)]
    if judge := config.judge.model:
        named += [("judge.model.base", judge.base), ("judge.model.adapter", judge.adapter)]
    named += [("sampling.paths", path) for path in config.sampling.paths or ()]
    named += [("judge.path", config.judge.path), ("aggregation.path", config.aggregation.path)]
    named += [("reward_model.path", config.reward_model.path)]
    named += [(f"evaluation.tasks_data.{name}", path) for name, path in config.evaluation.tasks_data.items()]
    named += [(f"evaluation.{key}", getattr(config.evaluation, key)) for key in ("tasks_folder", "mt_bench")]
    for section, key in SOURCES:
        for name, source in getattr(getattr(config, section), key).items():
            named += [(f"{section}.{key}.{name}.path", path) for path in source.paths]
    return [
        f"{key}: {path} does not exist (local file or folder; a hub id has the form owner/name)"
        for key, path in named
        if path
        and path != SFT
        and is_local(path)
        and not path.startswith(f"{results}/")
        and not (root / Path(path).expanduser()).exists()
    ]


def check_imports(config: Config, root: Path) -> list[str]:
    """Findings about what was made elsewhere and needs something else of there."""
    findings = []
    if config.judge.path and not config.sampling.paths:
        findings.append(
            "judge.path: a preference file numbers the pairs of two response files; set sampling.paths to those, first "
            "the one that was output 1"
        )
    if config.judge.model and config.judge.model.adapter == SFT:
        findings.append(
            "judge.model.adapter: `sft` is for model.adapter; with judge.model null, the initial policy judges, its "
            "adapter included"
        )
    if config.model.adapter == SFT and config.model.adapter_revision:
        findings.append("model.adapter_revision: the adapter `sft` is made here and has none; set it to null")
    ready = config.reward_model
    if ready.revision and (ready.path is None or is_local(ready.path)):
        findings.append("reward_model.revision: only a reward_model.path on the hub has one; set it to null")
    return findings


def check_lengths(config: Config, root: Path) -> list[str]:
    """Findings about settings of more tokens than a model reads, local or in the hub's cache.

    Of a model that is not there yet, each job looks for itself; and so for the preamble of prompts, which is not in
    sampling.max_length: counting its tokens takes a tokenizer.
    """
    judge = config.judge.model or config.model
    ppo = config.ppo
    # What is brought in takes the place of what comes before it.
    brought = {
        "reward_model.max_length": config.reward_model.path,
        "pmp.max_length": config.reward_model.path,
        "judge.max_length": config.reward_model.path or config.aggregation.path or config.judge.path,
        "sampling.max_length": config.reward_model.path or config.aggregation.path or config.sampling.paths,
    }
    findings = []
    for model, lengths in (
        (judge, {"judge.max_length": config.judge.max_length}),
        (
            config.model,
            {
                **({"sft.max_length": config.sft.max_length} if config.model.adapter == SFT else {}),
                "sampling.max_length": config.sampling.max_length,
                "pmp.max_length": config.pmp.max_length,
                "reward_model.max_length": config.reward_model.max_length,
                "ppo.reward_max_length": ppo.reward_max_length,
                "ppo.query_length + ppo.response_length": ppo.query_length + ppo.response_length,
            },
        ),
    ):
        limit = context_limit(read_config(model, root))
        findings += [
            f"{key}: {length} tokens, but {model.base} reads {limit} at most"
            for key, length in lengths.items()
            if limit is not None and length > limit and not brought.get(key)
        ]
    return findings
