"""The whole configuration: its sections, its runs, its targets, and the files that it names.

Only the Snakefile loads a whole configuration; a script receives the sections it needs (`config`).
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
"""Value of `model.adapter` for the adapter that `train_sft` makes; `plan.Plan` replaces it by the adapter's path."""
SEED_STEP = 1000  # larger than the distance between two seeds of one configuration, so that no draw is repeated
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
"""Name of an artifact -> its path below the results folder or a run's folder."""

SOURCES = (
    ("sft_data", "sources"),
    ("prompts", "sources"),
    ("pmp_data", "sources"),
    ("rl_prompts", "sources"),
    ("evaluation", "pairs"),
    ("evaluation", "judge_pairs"),
    ("evaluation", "prompts"),
)
"""Sections and their keys that map names to data sets."""


@dataclass(frozen=True)
class Target:
    """A name for artifacts on the command line.

    Attributes:
        artifact: path below the results folder; with `{run}`, one path per run.
        meaning: description for documents: the rule that makes it, and what it is.
        names: names in `ARTIFACTS`, if the target stands for several artifacts of every run that has them.
    """

    artifact: str
    meaning: str
    names: tuple[str, ...] = ()


TARGETS = {
    "sft_data": Target(ARTIFACTS["sft_data"], "`clean_sft_data`, instructions with answers"),
    "sft": Target(ARTIFACTS["sft"], "`train_sft`, the initial policy if `model.adapter` is `sft`"),
    "prompts": Target(ARTIFACTS["prompts"], "`clean_prompts`, from OASST1"),
    "response0": Target(ARTIFACTS["response0"], "`sample_responses`, one answer per prompt, split into shards"),
    "response1": Target(ARTIFACTS["response1"], "the same with a different seed"),
    "preferences": Target(
        ARTIFACTS["preferences"],
        "`judge_preferences`, both orders of each pair under each principle, split into shards",
    ),
    "reward_data": Target(ARTIFACTS["reward_data"], "`aggregate_preferences`, principles drawn and negated at random"),
    "pmp_data": Target(ARTIFACTS["pmp_data"], "`clean_pmp_data`, from SHP and HH-RLHF"),
    "pmp": Target(ARTIFACTS["pmp"], "`train_pmp`, the reward model before it learns to follow principles"),
    "reward_model": Target(ARTIFACTS["reward_model"], "`train_reward_model`, starting from `pmp`"),
    "rl_prompts": Target(
        ARTIFACTS["rl_prompts"], "`clean_rl_prompts`, from ShareGPT, Dolly, OASST1, OpenOrca and MATH"
    ),
    "policy": Target("runs/default/policy", "`train_policy`, PPO"),
    "policies": Target("runs/{run}/policy", "`train_policy`, for every run in `config.yaml`"),
    "evaluation": Target(
        "evaluation/*",
        "`evaluate_judge`, `evaluate_reward_model`, `evaluate_policies` and the benchmarks, for all runs",
        (
            *("judge_evaluation", "pmp_evaluation", "reward_evaluation", "policy_evaluation"),
            *("initial_task_evaluation", "task_evaluation", "initial_mt_bench", "mt_bench", "verdicts"),
        ),
    ),
    "report": Target(
        "report/*",
        "`draw_*`, figures and tables of the results of the other targets in `config.yaml`",
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
    "demo_policy": Target("demo_policy", "`train_demo_policy`, the demo's initial policy, trained again"),
}
"""Names for Snakemake's command line and for `targets`."""


class Config(Section):
    """All sections of `config.yaml`."""

    pathvars: PathVars = Field(PathVars(), description="output folders")
    targets: list[Annotated[str, OneOf(TARGETS)]] = Field(
        ["policy"], min_length=1, description="targets that are built if none is named"
    )
    seed: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description=f"number of the repetition; {SEED_STEP} times this is added to every seed in the sections",
    )
    model: Model = Field(description="the initial policy")
    policy_prompt: PolicyPrompt = Field(description="how an instruction becomes a prompt")
    sft_data: SftData = Field(description="training data of the initial policy, if `model.adapter` is `sft`")
    sft: Sft = Field(description="training of the initial policy, if `model.adapter` is `sft`")
    prompts: Prompts = Field(description="prompts for the synthetic preferences")
    sampling: Sampling = Field(description="sampling of response0 and response1")
    judge: Judge = Field(description="the judging of the responses")
    aggregation: Aggregation = Field(description="how judgements become reward-model records")
    pmp_data: PmpData = Field(description="human preferences for pre-training")
    lora: Lora = Field(description="adapters of all trained models")
    scoring: Scoring = Field(Scoring(), description="how the reward model reads its texts, in all stages")
    pmp: RewardTraining = Field(description="pre-training of the reward model")
    reward_model: RewardModel = Field(description="the reward model's principle-following stage")
    rl_prompts: RlPrompts = Field(description="prompts for the RL stage")
    ppo: Ppo = Field(description="RL")
    evaluation: Evaluation = Field(Evaluation(), description="measurements of judges, reward models and policies")
    report: Report = Field(Report(), description="contents of the report")
    plan: Assumptions = Field(Assumptions(), description="assumptions of `snakemake plan`, which change no result")
    runs: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], dict[RunSection, dict[str, Any]]] = Field(
        {"default": {}}, description="policies, as name -> the settings that differ from the sections above"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_and_remove(cls, raw: Any) -> Any:
        """Fill in `<results>`, and remove entries that a configuration on top of another one sets to null."""
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
            raise ValueError("there must be a run `default: {}`; set its values in the sections above")
        return runs


def load(raw: dict[str, Any], root: Path, checkout: Path = shipped.CHECKOUT) -> dict[str, Config]:
    """Validate a raw configuration and, as far as possible before any job, the files that it names.

    Args:
        raw: the merged configuration, as Snakemake holds it.
        root: folder that relative paths start from.
        checkout: the workflow's checkout, which has the files that come with it (`shipped.find`).

    Returns:
        The configuration of every run (see `resolve_runs`).

    Raises:
        UserError: with one line per finding: key, value, and what is allowed.
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
    opponents = config.evaluation.opponents(runs)
    for other in dict.fromkeys(opponents):
        if other not in runs:
            lines.append(
                f"evaluation.against: there is no run {other}; the runs are {', '.join(runs)}, and `all`, which is not "
                "in a list, stands for each pair of runs"
            )
    if opponents and not config.evaluation.prompts:
        lines.append("evaluation.against compares answers to evaluation.prompts, which names none; set both or neither")
    if lines:
        raise UserError(describe(lines, NAME))
    return runs


def _nulls(raw: Any) -> Any:
    """The same with null for the string `null`, which is how Snakemake reads `--config section={key: null}`."""
    if isinstance(raw, Mapping):
        return {key: _nulls(value) for key, value in raw.items()}
    return None if raw == "null" else raw


def resolve_runs(config: Config) -> dict[str, Config]:
    """The configuration of every run: the sections with the run's changes. `default` comes first.

    `seed` is added to the seeds of the sections.

    Raises:
        UserError: with one line per finding, as in `load`.
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
    """Findings about a run with a different base model that would keep settings of the default run's model."""
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
                    f"runs.{name}.{key}.base: differs from the default run's model, but would keep that model's {part} "
                    f"{kept}; set runs.{name}.{key}.{part}, to null if there is none"
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
    """The section that a type contains, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := section_in(part))), None)


def needs_engine_base(config: "Config", *sections: str) -> bool:
    """Whether an engine samples in a run but cannot read its weights, in the given sections or in any."""
    engines = {getattr(config, section).engine for section in sections or ("sampling", "ppo", "evaluation")}
    return "vllm" in engines and config.model.quantization == "nf4"


def texts_of(ppo: Ppo) -> PpoTexts:
    """The part of the section that `check_model` reads, so that no other change reruns it."""
    return PpoTexts.model_validate(ppo.model_dump(include=set(PpoTexts.model_fields)))


def _shift_seeds(config: Config) -> Config:
    """Add `SEED_STEP` times `seed` to every seed of the sections."""
    step = SEED_STEP * config.seed
    raw = config.model_dump(mode="json")
    for section in raw.values():
        if isinstance(section, dict) and "seed" in section:
            section["seed"] += step
    raw["sampling"]["seeds"] = [seed + step for seed in raw["sampling"]["seeds"]]
    return Config.model_validate(raw)


def _fill_results(raw: Any, results: str) -> Any:
    """Replace `<results>` by the results folder in all strings of the configuration."""
    if isinstance(raw, dict):
        return {key: _fill_results(value, results) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_fill_results(value, results) for value in raw]
    return raw.replace("<results>", results) if isinstance(raw, str) else raw


def merge(base: dict[str, Any], changes: dict[Any, Any]) -> dict[str, Any]:
    """Merge mappings key by key, to any depth; everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Read configuration files, each on top of those before it."""
    whole: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read as YAML: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{file} is not a mapping of sections; write `section: {{key: value}}` in it")
        whole = merge(whole, found)
    return whole


def check_templates(config: Config, root: Path) -> list[str]:
    """Findings about the configuration's templates: missing files and missing slots."""
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
            unfilled = ", ".join(f"{{{slot}}}" for slot in extra)
            lines.append(f"{key}: {path} has slots that nothing fills: {unfilled}; remove them")
    return lines


def check_chats(config: Config, root: Path) -> list[str]:
    """Findings about templates that cannot be split into the turns of a chat."""
    formats = [("judge.format", config.judge.format, [config.judge.template])]
    scored = [config.pmp.template, config.reward_model.template, config.ppo.template]
    formats.append(("scoring.format", config.scoring.format, scored))
    findings = []
    for key, chosen, files in formats:
        for path in files if chosen == "chat" else ():
            try:
                text = templates.read(root / path)
            except UserError:  # reported by `check_templates`
                continue
            try:
                templates.turns(text)
            except UserError as error:
                findings.append(f"{key}: template {path} cannot become a chat: {error}")
    return findings


def check_principles(config: Config, root: Path) -> list[str]:
    """Findings about the configuration's principles: missing files, unknown names, too few to draw from."""
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
                f"only {drawable} principles with a weight above 0"
            )
    except UserError as error:
        lines.append(f"ppo.principles: {error}")
    return lines


def check_paths(config: Config, root: Path) -> list[str]:
    """Findings about local files and folders in the configuration that do not exist.

    Files below the results folder are made by the workflow and are not checked.
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
    """Findings about imported artifacts that need another import or do not fit other settings."""
    findings = []
    if config.judge.path and not config.sampling.paths:
        findings.append(
            "judge.path: a preference file numbers the pairs of two response files; set sampling.paths to those files, "
            "output 1 first"
        )
    if config.judge.model and config.judge.model.adapter == SFT:
        findings.append(
            "judge.model.adapter: `sft` is only for model.adapter; set judge.model to null to judge with the initial "
            "policy and its adapter"
        )
    if config.model.adapter == SFT and config.model.adapter_revision:
        findings.append("model.adapter_revision: the adapter `sft` is made here and has no revision; set it to null")
    ready = config.reward_model
    if ready.revision and (ready.path is None or is_local(ready.path)):
        findings.append("reward_model.revision: only a reward_model.path on the hub has a revision; set it to null")
    return findings


def check_lengths(config: Config, root: Path) -> list[str]:
    """Findings about lengths beyond what a model can read, for models that are local or in the hub's cache.

    For other models, each job checks for itself. Jobs also check the preamble of prompts, which sampling.max_length
    does not include, because counting its tokens needs a tokenizer.
    """
    judge = config.judge.model or config.model
    ppo = config.ppo
    # An imported artifact replaces the stages before it.
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
            f"{key}: {length} tokens, but {model.base} reads at most {limit}"
            for key, length in lengths.items()
            if limit is not None and length > limit and not brought.get(key)
        ]
    return findings
