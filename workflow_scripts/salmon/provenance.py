"""What decides an artifact: its settings and inputs, for manifests, for fingerprints, and to find stale artifacts.

There is one function per rule. The script that makes an artifact and `verification`, which compares its manifest with
the configuration, call the same function, so they cannot differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from salmon import artifacts, shipped, sources
from salmon.config import (
    FREE,
    Aggregation,
    Evaluation,
    Judge,
    Lora,
    Model,
    PmpData,
    PolicyPrompt,
    Ppo,
    PpoTexts,
    Prompts,
    RewardModel,
    RewardTraining,
    RlPrompts,
    Sampling,
    Scoring,
    Sft,
    SftData,
    Source,
    TaskPrompt,
    is_local,
)
from salmon.configuration import field_of
from salmon.identity import identify, identify_tokenizer
from salmon.shards import OF_ONE_SHARD


@dataclass(frozen=True)
class Input:
    """One input of an artifact: a file or folder, a model, its tokenizer, or a data set.

    Attributes:
        name: path or hub id.
        kind: kind of input, which decides how it is identified.
        revision: revision on the hub.
    """

    name: str
    kind: Literal["file", "model", "tokenizer", "source"]
    revision: str | None = None

    def identity(self) -> str:
        """The hash of a local input, or the revision of an input on the hub.

        Raises:
            UserError: if it does not exist or is damaged.
        """
        if self.kind == "file":
            return artifacts.hash_path(Path(self.name))
        if self.kind == "source":
            source = Source(format="", path=self.name, revision=self.revision)
            return sources.identify_sources({"": source})[self.name]
        model = Model(base=self.name, revision=self.revision)
        return (identify if self.kind == "model" else identify_tokenizer)(model)[self.name]


@dataclass(frozen=True)
class Origin:
    """What decides an artifact.

    Attributes:
        settings: settings as in the manifest: sections of the configuration, and single values.
        inputs: inputs that the artifact is made from; if two have the same name, the last one counts.
        keys: name in `settings` -> key of the configuration, if they differ.
        unrecorded: names of settings and inputs that manifests of earlier versions lack.
    """

    settings: Mapping[str, Any]
    inputs: Sequence[Input] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    unrecorded: frozenset[str] = frozenset()

    def identify(self) -> dict[str, str]:
        """Name -> identity of the inputs.

        Raises:
            UserError: if one does not exist or is damaged.
        """
        return {one.name: one.identity() for one in {one.name: one for one in self.inputs}.values()}

    def values(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Key of the configuration -> value, for all settings that change the result.

        Args:
            settings: settings of another artifact of this kind, from its manifest; None for this artifact's.
        """
        plain = artifacts.plain(self.settings if settings is None else settings)
        named = {self.keys.get(name, name): value for name, value in plain.items() if name in self.settings}
        return {key: value for key, value in _leaves(named) if not is_free(key)}

    def fingerprint(self, identities: Mapping[str, str], packages: Mapping[str, str] | None = None) -> str:
        """A fingerprint that is equal exactly if a run may resume another one; see `artifacts.fingerprint`.

        Args:
            identities: identities of the inputs.
            packages: name and version of an engine outside this environment.
        """
        return artifacts.fingerprint(self.values() | ({"packages": packages} if packages else {}), identities)

    def manifest(
        self, identities: Mapping[str, str], counts: Mapping[str, int], packages: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The manifest of the artifact; see `artifacts.manifest` and `fingerprint`."""
        made = artifacts.manifest(self.settings, identities, counts)
        return made | {"packages": made["packages"] | dict(packages or {})}


def is_free(key: str) -> bool:
    """Whether a key of the configuration changes no result (`config.FREE`)."""
    found = field_of(key)
    return found is not None and FREE in found.metadata


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key -> value of nested mappings; a list is one value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _files(*paths: Path | str | None) -> list[Input]:
    return [Input(str(path), "file") for path in paths if path]


def _model(model: Model, kind: Literal["model", "tokenizer"] = "model") -> list[Input]:
    named = [Input(model.base, kind, model.revision)]
    return [*named, Input(model.adapter, kind, model.adapter_revision)] if model.adapter else named


def _sources(named: Mapping[str, Source]) -> list[Input]:
    return [Input(path, "source", source.revision) for source in named.values() for path in source.paths]


def _alone(section: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Keys for settings of a section that are single values in a manifest."""
    return {name: f"{section}.{name}" for name in settings}


def clean_prompts(prompts: Prompts) -> Origin:
    """Prompts for the synthetic preferences."""
    return Origin({"prompts": prompts}, _sources(prompts.sources))


def clean_rl_prompts(rl_prompts: RlPrompts, tokenizer: Model) -> Origin:
    """Prompts for RL."""
    inputs = _sources(rl_prompts.sources) + _model(tokenizer, "tokenizer")
    return Origin({"rl_prompts": rl_prompts, "model": tokenizer}, inputs)


def clean_pmp_data(pmp_data: PmpData) -> Origin:
    """Records for PMP."""
    return Origin({"pmp_data": pmp_data}, _sources(pmp_data.sources))


def dequantize_base(model: Model) -> Origin:
    """The base model that an engine serves: the 4-bit weights, dequantized."""
    return Origin({"model": model}, _model(model))


def clean_sft_data(sft_data: SftData) -> Origin:
    """Examples for training the initial policy."""
    return Origin({"sft_data": sft_data}, _sources(sft_data.sources))


def train_sft(examples: Path | str, *, model: Model, lora: Lora, policy_prompt: PolicyPrompt, sft: Sft) -> Origin:
    """The initial policy; `model` comes without its adapter."""
    return Origin(
        {"model": model, "lora": lora, "policy_prompt": policy_prompt, "sft": sft},
        _files(examples, *policy_prompt.files) + _model(model),
    )


def sample_responses(
    prompts: Path | str, index: int, shard: int, *, model: Model, sampling: Sampling, policy_prompt: PolicyPrompt
) -> Origin:
    """One shard of the responses, which does not depend on the settings of the other response."""
    alone = sampling.model_dump(exclude={"paths", "seeds", "shards"})
    return Origin(
        {
            "model": model,
            "policy_prompt": policy_prompt,
            **alone,
            "seed": sampling.seeds[index],
            "shard": shard,
            "shards": sampling.shards,
        },
        _files(prompts, *policy_prompt.files) + _model(model),
        keys=_alone("sampling", alone) | {"seed": f"sampling.seeds.{index}"},
    )


def judge_preferences(
    response0: Path | str, response1: Path | str, principles: Path | str, shard: int, *, model: Model, judge: Judge
) -> Origin:
    """One shard of the judgements, by a model that may differ from `judge.model`."""
    alone = judge.model_dump(exclude={"path", "model", "shards"})
    return Origin(
        {"model": model, **alone, "shard": shard, "shards": judge.shards},
        _files(response0, response1, principles, judge.template) + _model(model),
        keys=_alone("judge", alone),
        unrecorded=frozenset({"model"}),
    )


def gather_shards(shard: Origin) -> Origin:
    """The table of all shards, given what decides one shard."""
    settings = {name: value for name, value in shard.settings.items() if name not in OF_ONE_SHARD}
    names = frozenset(one.name for one in shard.inputs)
    return replace(shard, settings=settings, unrecorded=shard.unrecorded | names)


def aggregate_preferences(
    preferences: Path | str,
    response0: Path | str,
    response1: Path | str,
    principles: Path | str,
    *,
    aggregation: Aggregation,
    turn_markers: Sequence[str],
) -> Origin:
    """Records for the reward model."""
    return Origin(
        # The variance is not a setting: version 0.1.0 used the variance of the means.
        {"aggregation": aggregation, "turn_markers": list(turn_markers), "variance": "of both orders pooled"},
        _files(preferences, response0, response1, principles),
        keys=_alone("judge", {"turn_markers": None}),
    )


def train_reward_model(
    records: Path | str,
    init: Path | str | None,
    *,
    stage: Literal["pmp", "reward_model"],
    settings: RewardTraining,
    model: Model,
    tokenizer: Model,
    lora: Lora,
    scoring: Scoring,
) -> Origin:
    """A reward model of either stage; the model that it starts from is an input, whatever `reward_model.init` says."""
    if isinstance(settings, RewardModel):
        settings = RewardTraining.model_validate(settings.model_dump(exclude={"path", "revision", "init"}))
    return Origin(
        {"model": model, "lora": lora, "scoring": scoring, stage: settings},
        _files(records, settings.template, init) + _model(tokenizer, "tokenizer") + _model(model),
    )


def import_responses(paths: Sequence[str], index: int, cut_at: str | None) -> Origin:
    """Imported responses; the two files must match."""
    settings = {"paths": list(paths), "index": index, "cut_at": cut_at}
    return Origin(settings, _files(*paths), keys=_alone("sampling", {"paths": None}))


def import_preferences(path: str, paths: Sequence[str], principles: Path | str) -> Origin:
    """Imported judgements of imported responses."""
    keys = _alone("judge", {"path": None}) | _alone("sampling", {"paths": None})
    return Origin({"path": path, "paths": list(paths)}, _files(path, *paths, principles), keys=keys)


def import_records(path: str, principles: Path | str) -> Origin:
    """Imported records for the reward model."""
    return Origin({"path": path}, _files(path, principles), keys=_alone("aggregation", {"path": None}))


def import_reward_model(path: str, revision: str | None, model: Model) -> Origin:
    """An imported reward model, which must fit the base model's layers."""
    base = [f"{model.base}/config.json"] if is_local(model.base) else []
    return Origin(
        {"reward_model": {"path": path, "revision": revision}, "model": base_of(model).model_dump(exclude_unset=True)},
        [Input(path, "model", revision), *_files(*base)],
    )


def base_of(model: Model) -> Model:
    """The part of a model that an imported reward model is checked against, namely its base model."""
    return Model.model_validate(model.model_dump(include={"base", "revision", "trust_remote_code"}))


def train_policy(
    prompts: Path | str,
    reward_model: Path | str,
    *,
    model: Model,
    lora: Lora,
    policy_prompt: PolicyPrompt,
    ppo: Ppo,
    scoring: Scoring,
) -> Origin:
    """A policy."""
    return Origin(
        {
            "model": model,
            "lora": lora,
            "policy_prompt": policy_prompt,
            "ppo": ppo,
            "scoring": scoring,
            "warm-up": "from 0",  # not a setting: version 0.1.0 counted from 1
        },
        _files(prompts, reward_model, ppo.principles, ppo.template, *policy_prompt.files) + _model(model),
    )


def check_model(
    parts: Sequence[str],
    *,
    model: Model,
    policy_prompt: PolicyPrompt,
    sampling: Sampling,
    judge: Judge,
    lora: Lora,
    scoring: Scoring,
    tokenizer: Model | None,
    ppo: PpoTexts | None,
) -> Origin:
    """A report on a model; each part of the check reads exactly what the stages after it read."""
    settings: dict[str, Any] = {"model": model}
    inputs = _model(model)
    if "sampling" in parts:
        settings |= {"policy_prompt": policy_prompt, "sampling": sampling.model_dump(exclude={"seeds", "paths"})}
        inputs += _files(*policy_prompt.files)
    if "judging" in parts:
        settings |= {"judge": judge.model_copy(update={"path": None})}
        inputs += _files(judge.template, judge.principles) + (_model(judge.model) if judge.model else [])
    if "training" in parts:
        settings |= {"lora": lora, "scoring": scoring}
        # The tokenizer comes first: the model may have the same name, and its weights must count.
        inputs = (_model(tokenizer, "tokenizer") if tokenizer else []) + inputs
    if "rl" in parts:
        settings |= {"policy_prompt": policy_prompt, "lora": lora, "scoring": scoring}
        inputs += _files(*policy_prompt.files)
        if ppo:
            settings["ppo"] = ppo
            inputs += _files(ppo.template)
    keys = {"model": "judge.model"} if judge.model and [*parts] == ["judging"] else {}
    return Origin(settings, inputs, keys, unrecorded=frozenset(one.name for one in inputs))


def clean_judge_pairs(evaluation: Evaluation, which: str) -> Origin:
    """One side of the pairs that the judge is tested on."""
    settings = evaluation.model_dump(include={"judge_pairs", "min_score_ratio", "seed"})
    for source in settings["judge_pairs"].values():
        del source["principles"]  # principles are chosen only when the judgements are counted
    return Origin({**settings, "which": which}, _sources(evaluation.judge_pairs), keys=_alone("evaluation", settings))


def evaluate_judge(
    preferences: Path | str, judged: Path | str | None, labelled: Path | str | None, *, evaluation: Evaluation
) -> Origin:
    """Measurements of the judge from its judgements, and from human preferences if there are any."""
    about = {name: source.principles for name, source in evaluation.judge_pairs.items()} if judged else {}
    return Origin(
        {"seed": evaluation.seed, "about": about},
        _files(preferences, judged, labelled),
        keys={"seed": "evaluation.seed", "about": "evaluation.judge_pairs"},
    )


def clean_evaluation_pairs(pmp_data: Sequence[Path | str], *, evaluation: Evaluation) -> Origin:
    """Pairs to test reward models on, none of them from `pmp_data`."""
    settings = evaluation.model_dump(include={"pairs", "min_score_ratio", "seed"})
    return Origin(settings, _sources(evaluation.pairs) + _files(*pmp_data), keys=_alone("evaluation", settings))


def evaluate_reward_model(
    reward_model: Path | str,
    records: Path | str | None,
    pairs: Path | str | None,
    principles: Path | str,
    preferences: Path | str | None = None,
    pmp_data: Path | str | None = None,
    *,
    stage: Literal["pmp", "reward_model"],
    settings: RewardTraining,
    pmp: RewardTraining | None = None,
    dimensions: Sequence[str],
    model: Model,
    tokenizer: Model,
    scoring: Scoring,
    evaluation: Evaluation,
) -> Origin:
    """Measurements of a reward model, with the training settings that decide the held-out records and their texts."""
    read, split = ["template", "max_length", "query_length", "response_length"], ["eval_examples", "seed"]
    read += split if records else []
    alone = {f"{stage}_{name}": getattr(settings, name) for name in read}
    of_pmp = {f"pmp_{name}": getattr(pmp, name) for name in split} if pmp else {}
    return Origin(
        {
            "model": model,
            "scoring": scoring,
            "dimensions": list(dimensions),
            "seed": evaluation.seed,
            **alone,
            **of_pmp,
        },
        _files(reward_model, records, preferences, pmp_data, pairs, principles, settings.template)
        + _model(tokenizer, "tokenizer")
        + _model(model),
        keys={
            "dimensions": "aggregation.dimensions",
            "seed": "evaluation.seed",
            **{name: f"{stage}.{name.removeprefix(f'{stage}_')}" for name in alone},
            **{name: name.replace("_", ".", 1) for name in of_pmp},
        },
    )


def clean_evaluation_prompts(trained: Sequence[Path | str], *, evaluation: Evaluation) -> Origin:
    """Prompts on which policies are measured."""
    settings = {"prompts": evaluation.prompts, "seed": evaluation.seed}
    return Origin(settings, _sources(evaluation.prompts) + _files(*trained), keys=_alone("evaluation", settings))


def sample_answers(
    prompts: Path | str,
    policy: Path | str | None,
    *,
    model: Model,
    policy_prompt: PolicyPrompt,
    ppo: Ppo,
    evaluation: Evaluation,
) -> Origin:
    """Answers of a policy; None stands for the initial policy."""
    read = {name: getattr(ppo, name) for name in ("temperature", "query_length", "response_length")}
    return Origin(
        {"model": model, "policy_prompt": policy_prompt, **read, "seed": evaluation.seed, "engine": evaluation.engine},
        _files(prompts, policy, *policy_prompt.files) + _model(model),
        keys=_alone("ppo", read) | _alone("evaluation", {"seed": None, "engine": None}),
    )


def score_answers(answers: Path | str, scorers: Sequence[Mapping[str, Any]]) -> Origin:
    """Scores of answers; each scorer has the fields of `score_answers.Scorer`."""
    inputs = _files(answers)
    plain = {}
    for scorer in scorers:
        settings: RewardModel = scorer["settings"]
        inputs += _files(scorer["folder"], scorer["principles"], *scorer["rl_principles"], settings.template)
        inputs += _model(scorer["tokenizer"], "tokenizer") + _model(scorer["model"])
        read = ("template", "max_length", "query_length", "response_length")
        sections = {"model": scorer["model"].deciding(), "scoring": scorer["scoring"].deciding()}
        texts = {name: getattr(settings, name) for name in read}
        plain[scorer["name"]] = {"dimensions": list(scorer["dimensions"]), **sections, **texts}
    return Origin({"scorers": plain}, inputs)


def policy_tables(policy: Mapping[str, Any]) -> list[Path | str | None]:
    """The tables that a policy is compared by; None for those that it lacks. Fields: `evaluate_policies.Policy`."""
    of_one = [policy.get(name) for name in ("answers", "scores", "judgements", "verdicts")]
    return [*of_one, *policy.get("versus", {}).values()]


def evaluate_policies(policies: Sequence[Mapping[str, Any]], *, evaluation: Evaluation) -> Origin:
    """The comparison of all policies; each has the fields of `evaluate_policies.Policy`."""
    files = [table for policy in policies for table in policy_tables(policy)]
    settings: dict[str, Any] = {"compared": {policy["name"]: policy["initial"] for policy in policies}}
    settings |= {"seed": evaluation.seed}
    if against := {policy["name"]: [*policy["versus"]] for policy in policies if policy.get("versus")}:
        settings["against"] = against
    return Origin(settings, _files(*files), keys={"seed": "evaluation.seed"})


TASKS = ("tasks", "tasks_limit", "tasks_data", "tasks_folder")
"""Keys of `evaluation` that `evaluate_tasks` reads; the format is in `TaskPrompt`."""


def task_files(evaluation: Evaluation) -> list[str]:
    """The files of tasks that are not part of lm-eval: our own and the user's."""
    folders = [shipped.TASKS, *([Path(evaluation.tasks_folder)] if evaluation.tasks_folder else [])]
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if "__pycache__" not in file.parts)


def evaluate_tasks(policy: Path | str | None, *, model: Model, prompt: TaskPrompt, evaluation: Evaluation) -> Origin:
    """A policy's results in lm-eval's tasks; None stands for the initial policy."""
    read = {name: getattr(evaluation, name) for name in TASKS}
    files = _files(policy, *task_files(evaluation), *evaluation.tasks_data.values())
    return Origin(
        {"model": model, "prompt": prompt, **read},
        files + _model(model),
        keys=_alone("evaluation", read) | {"prompt": "policy_prompt"},
    )


MT_BENCH = ("mt_bench", "mt_bench_tokens", "seed", "engine")
"""Keys of `evaluation` that `answer_mt_bench` reads."""


def answer_mt_bench(
    policy: Path | str | None, name: str, *, model: Model, policy_prompt: PolicyPrompt, evaluation: Evaluation
) -> Origin:
    """Answers of a policy to MT-Bench; None stands for the initial policy."""
    read = {key: getattr(evaluation, key) for key in MT_BENCH}
    return Origin(
        {"model": model, "policy_prompt": policy_prompt, **read, "name": name},
        _files(policy, evaluation.mt_bench, *policy_prompt.files) + _model(model),
        keys=_alone("evaluation", read),
    )


ENDPOINT = ("judge_endpoint", "mt_bench")
"""Keys of `evaluation` that `judge_by_endpoint` reads."""


def judge_by_endpoint(
    answers: Path | str | None = None,
    initial_answers: Path | str | None = None,
    mt_bench: Path | str | None = None,
    initial_mt_bench: Path | str | None = None,
    *,
    evaluation: Evaluation,
) -> Origin:
    """Verdicts of a model behind an endpoint, which compares a policy's answers with the initial policy's."""
    endpoint = evaluation.judge_endpoint
    questions = evaluation.mt_bench if mt_bench else None
    files = _files(answers, initial_answers, mt_bench, initial_mt_bench, questions)
    return Origin(
        {"judge_endpoint": endpoint},
        files + _files(endpoint.template if endpoint else None),
        keys=_alone("evaluation", {"judge_endpoint": None}),
    )


def draw_funnel(tables: Sequence[Mapping[str, Any]]) -> Origin:
    """Counts of rows; each table has the fields of `draw_funnel.Counted`."""
    counted = [f"{table['name']} of {table['run']}" for table in tables]
    return Origin({"counted": counted}, _files(*(table["path"] for table in tables)))


def draw_judge(measured: Path | str | None, preferences: Path | str | None, *, evaluation: Evaluation) -> Origin:
    """Figures of the judge, from its measurements or else from its judgements."""
    settings = {} if measured else {"seed": evaluation.seed}
    return Origin(settings, _files(measured, preferences), keys={"seed": "evaluation.seed"})


def draw_reward_model(model: Path | str | None, measured: Path | str | None) -> Origin:
    """Figures of a training and of the measurements of its model."""
    return Origin({}, _files(model, measured))


def draw_training(runs: Sequence[Mapping[str, Any]]) -> Origin:
    """Curves of PPO; each run has the fields of `draw_training.Run`."""
    return Origin({"drawn": [run["name"] for run in runs]}, _files(*(run["policy"] for run in runs)))


def draw_policies(evaluation: Path | str) -> Origin:
    """Figures of the policies."""
    return Origin({}, _files(evaluation))


def draw_tasks(policies: Sequence[Mapping[str, Any]]) -> Origin:
    """Benchmarks; each policy has the fields of `draw_tasks.Policy`."""
    return Origin({"drawn": [one["name"] for one in policies]}, _files(*(one["measured"] for one in policies)))


def draw_samples(policies: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> Origin:
    """Answers side by side; each policy has the fields of `draw_samples.Policy`."""
    shown = {"drawn": [policy["name"] for policy in policies], "shown_sources": list(sources)}
    return Origin(shown, _files(*(policy["answers"] for policy in policies)))


def evaluate_demo(
    reward_model: Path | str | None,
    pmp: Path | str | None,
    policies: Sequence[Path | str],
    *,
    settings: Mapping[str, Any],
) -> Origin:
    """The demo's measurements; settings that are single values are its own."""
    model: Model = settings["model"]
    return Origin(
        settings, _model(model) + _files(reward_model, pmp, *policies), keys={"reward_settings": "reward_model"}
    )
