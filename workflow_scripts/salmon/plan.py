"""The artifacts of a configuration: what decides each, where each is, and which runs share it."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, get_args

from salmon import provenance
from salmon.authors import JUDGED_UP_TO
from salmon.config import Judge, Model, Section, TaskPrompt, is_local
from salmon.configuration import ARTIFACTS, SFT, TARGETS, Config, needs_engine_base, texts_of
from salmon.identity import tokenizer_model
from salmon.provenance import Origin

Name = Literal[
    "engine_base",
    "check_training",
    "sft_data",
    "sft",
    "check_sampling",
    "check_judging",
    "check_rl",
    "prompts",
    "response0",
    "response1",
    "preferences",
    "reward_data",
    "pmp_data",
    "pmp",
    "reward_model",
    "rl_prompts",
    "policy",
    "evaluation_prompts",
    "initial_answers",
    "initial_scores",
    "answers",
    "answer_scores",
    "answer_judgements",
    "initial_mt_bench",
    "mt_bench",
    "verdicts",
    "policy_evaluation",
    "preferred_outputs",
    "other_outputs",
    "judged_pairs",
    "judge_evaluation",
    "evaluation_pairs",
    "pmp_evaluation",
    "reward_evaluation",
    "initial_task_evaluation",
    "task_evaluation",
    "funnel",
    "sft_figures",
    "judge_figures",
    "pmp_figures",
    "reward_figures",
    "training_figures",
    "policy_figures",
    "task_figures",
    "samples",
]
"""An artifact of a run, in the order in which they are built."""
VERSUS = "runs/{run}/evaluation/against/{other}.parquet"
"""Judgements of two runs' answers, below the results folder: the only artifact of two runs."""
NAMES: tuple[Name, ...] = get_args(Name)
ON_GPUS: dict[Name, str] = {
    "sft": "train_sft",
    "response0": "sample_responses",
    "response1": "sample_responses",
    "preferences": "judge_preferences",
    "pmp": "train_pmp",
    "reward_model": "train_reward_model",
    "policy": "train_policy",
}
"""Artifact that `price` covers -> the rule that makes it."""
SCATTERED: frozenset[Name] = frozenset({"response0", "response1", "preferences"})
"""Tables that are made in shards."""
CHECKED: dict[Name, Name] = {
    "sft": "check_training",
    "response0": "check_sampling",
    "response1": "check_sampling",
    "preferences": "check_judging",
    "judged_pairs": "check_judging",
    "answer_judgements": "check_judging",
    "pmp": "check_training",
    "reward_model": "check_training",
    "policy": "check_rl",
}
"""Artifact -> the part of `check_model` that must pass before it."""
OF_ANSWERS: frozenset[Name] = frozenset({"answers", "answer_scores", "answer_judgements"})
OWN: frozenset[Name] = frozenset({"policy", "task_evaluation", "mt_bench", "verdicts", *OF_ANSWERS})
"""Artifacts that runs never share."""
OF_POLICIES: frozenset[Name] = frozenset(
    {"evaluation_prompts", "initial_answers", "initial_scores", "policy_evaluation", *OF_ANSWERS}
)
"""Artifacts that exist if policies are measured."""
OF_JUDGED_PAIRS: frozenset[Name] = frozenset({"preferred_outputs", "other_outputs", "judged_pairs"})
"""Artifacts that exist if the judge is tested on human preferences."""
OF_TASKS: frozenset[Name] = frozenset({"initial_task_evaluation", "task_evaluation"})
"""Artifacts that exist if the configuration names lm-eval tasks."""
OF_MT_BENCH: frozenset[Name] = frozenset({"initial_mt_bench", "mt_bench"})
"""Artifacts that exist if the configuration names MT-Bench's questions."""
COUNTED: tuple[Name, ...] = (
    *("sft_data", "prompts", "response0", "response1", "preferences", "reward_data", "pmp_data", "rl_prompts"),
    *("evaluation_prompts", "evaluation_pairs", "initial_answers", "answers"),
    *("judged_pairs", "answer_judgements"),
)
"""Tables whose manifests count the rows kept and dropped on the way from raw data to records."""
DRAWN: dict[Name, tuple[Name, ...]] = {
    "funnel": COUNTED,
    "sft_figures": ("sft",),
    "judge_figures": ("judge_evaluation", "preferences"),  # shows the first that exists; only the first has human pairs
    "pmp_figures": ("pmp", "pmp_evaluation"),
    "reward_figures": ("reward_model", "reward_evaluation"),
    "training_figures": ("policy",),
    "policy_figures": ("policy_evaluation",),
    "task_figures": ("initial_task_evaluation", "task_evaluation"),
    "samples": ("initial_answers", "answers"),
}
"""Part of the report -> the artifacts that it shows, if they exist."""
OF_ALL_RUNS: frozenset[Name] = frozenset({"funnel", "training_figures", "policy_figures", "task_figures", "samples"})
"""Parts of the report that show all runs together."""

INITIAL = "initial policy"
"""Name of the policy that runs start from, in comparisons; further initial policies are named after their runs."""


class Plan:
    """The artifacts of all runs.

    Args:
        runs: runs as `configuration.load` returns them.

    Attributes:
        runs: the same runs; a `model.adapter` of `sft` is replaced by the path of the adapter that `train_sft` makes.
    """

    def __init__(self, runs: Mapping[str, Config]) -> None:
        self.origin = cache(self._origin)
        self.owner = cache(self._owner)
        self._what_decides = cache(self._deciding)
        self.wanted = cache(self._wanted)
        self.runs = dict(runs)
        self._made: Collection[str] = ()
        # These paths can be computed first, because the adapter does not decide itself.
        places = {run: self.path(run, "sft") for run in runs}
        for run, config in runs.items():
            if config.model.adapter == SFT:
                model = config.model.model_copy(update={"adapter": places[run]})
                self.runs[run] = config.model_copy(update={"model": model})
        self._made = {*places.values(), *(self.path(run, "policy") for run in runs)}

    def path(self, run: str, name: Name) -> str:
        """The path of a run's artifact."""
        return f"{self.runs[run].pathvars.results}/{self.home(run, name)}{ARTIFACTS[name]}"

    def tokenizer(self, run: str) -> Model:
        """The part of a run's model that its tokenizer depends on; adapters made by rules have no tokenizer.

        This does not depend on whether such adapters exist already: what decides an artifact must not change while
        others are built.
        """
        model = self.runs[run].model
        return tokenizer_model(model.without_adapter() if model.adapter in self._made else model)

    def home(self, run: str, name: Name) -> str:
        """The folder of an artifact's owner, which is the path between the results folder and the artifact.

        Returns:
            Empty for the default run, `runs/NAME/` for other runs.
        """
        owner = self.owner(run, name)
        return f"runs/{owner}/" if name in OWN or owner != "default" else ""

    def has(self, run: str, name: Name) -> bool:
        """Whether a run has an artifact."""
        config = self.runs[run]
        if name in DRAWN:
            needed = {"samples": bool(self.shown_sources()), "pmp_figures": self.pre_trains(run)}
            return needed.get(name, True) and bool(self.drawn(run, name))
        evaluation = config.evaluation
        if name in OF_JUDGED_PAIRS:
            return bool(evaluation.judge_pairs) and self.has(run, "judge_evaluation")
        for names, asked in (
            ({"engine_base"}, needs_engine_base(config)),
            ({"evaluation_pairs"}, evaluation.pairs),
            (OF_POLICIES, evaluation.prompts),
            (OF_TASKS, evaluation.tasks),
            (OF_MT_BENCH, evaluation.mt_bench),
            ({"verdicts"}, evaluation.judge_endpoint and (evaluation.prompts or evaluation.mt_bench)),
        ):
            if name in names:
                return bool(asked)
        # Artifacts from which an imported artifact was made do not exist here.
        ready = config.reward_model.path is not None
        if name == "judge_evaluation":
            return not ready and config.aggregation.path is None
        # A reward model is measured on what its trainings held out, and on people's pairs.
        after_pmp = self.measuring(run, "pmp_data") is not None or bool(evaluation.pairs)
        if name == "pmp_evaluation":
            return self.pre_trains(run) and after_pmp
        return name != "reward_evaluation" or after_pmp or (not ready and config.reward_model.eval_examples > 0)

    def pre_trains(self, run: str) -> bool:
        """Whether a run's reward model is pre-trained on people's preferences (PMP)."""
        reward_model = self.runs[run].reward_model
        return reward_model.path is None and reward_model.init == "pmp"

    def target_paths(self, target: str) -> list[str]:
        """The artifacts of a target (`configuration.TARGETS`), over all runs."""
        one, results = TARGETS[target], self.runs["default"].pathvars.results
        if one.names:
            names = [name for name in NAMES if name in one.names]
            paths = [self.path(run, name) for name in names for run in self.runs if self.has(run, name)]
        else:
            paths = [f"{results}/{one.artifact.format(run=run)}" for run in self.runs]
        return list(dict.fromkeys(paths))

    def versus(self) -> dict[tuple[str, str], str]:
        """The judge's comparisons of two runs' answers (`evaluation.against`).

        Returns:
            Run and the run that it is compared with -> path of the judgements. No two runs are compared twice.
        """
        found: dict[tuple[str, str], str] = {}
        for other in self.runs["default"].evaluation.opponents(self.runs):
            for run in self.runs:
                if self.has(run, "answers") and run != other and (other, run) not in found:
                    found[run, other] = f"{self.runs[run].pathvars.results}/{VERSUS.format(run=run, other=other)}"
        return found

    def versus_origin(self, run: str, other: str) -> Origin:
        """What decides the judgements of two runs' answers; the first run's judge compares them."""
        return self._judged(run, self.path(run, "answers"), self.path(other, "answers"))

    def drawn(self, run: str, name: Name) -> list[tuple[str, str, str]]:
        """The artifacts that a part of the report shows, each with the first run that has it and its path.

        Only artifacts of the configuration's other targets are shown: the report builds no results.
        """
        found: dict[str, tuple[str, str, str]] = {}
        for one in DRAWN[name]:
            for other in self.runs if name in OF_ALL_RUNS else [run]:
                path, first = self.path(other, one), self.owner(other, one)
                if self.has(other, one) and not is_imported(self.runs[first], one) and path in self.wanted():
                    found.setdefault(path, (one, first, path))
        if name == "funnel":
            for (one_run, other), path in self.versus().items():
                if path in self.wanted():
                    found[path] = ("run_judgements", f"{one_run} against {other}", path)
        return [*found.values()][: 1 if name == "judge_figures" else None]

    def shown_sources(self) -> list[str]:
        """Sources of evaluation prompts whose texts the report may show."""
        config = self.runs["default"]
        world = f"{config.pathvars.results}/data/"
        return [
            name
            for name, source in config.evaluation.prompts.items()
            if config.report.samples
            or (source.format == "prompts" and all(map(is_local, source.paths)))
            or all(path.startswith(world) for path in source.paths)
        ]

    def sampled(self) -> list[dict[str, str | None]]:
        """The policies whose answers are shown, with the fields of `draw_samples.Policy`."""
        made = {path for _, _, path in self.drawn("default", "samples")}
        return [{key: one[key] for key in ("name", "answers")} for one in self.compared() if one["answers"] in made]

    def counted(self) -> list[dict[str, str]]:
        """The tables whose rows are shown, with the fields of `draw_funnel.Counted`."""
        return [{"name": one, "run": run, "path": path} for one, run, path in self.drawn("default", "funnel")]

    def trainings(self) -> list[dict[str, str]]:
        """The policies whose training is shown, with the fields of `draw_training.Run`."""
        return [{"name": run, "policy": path} for _, run, path in self.drawn("default", "training_figures")]

    def asked(self) -> list[dict[str, str]]:
        """The policies whose benchmarks are shown, with the fields of `draw_tasks.Policy`."""
        found: list[dict[str, str]] = []
        for one, run, path in self.drawn("default", "task_figures"):
            initial = f"{INITIAL} of {run}" if found else INITIAL
            found.append({"name": run if one == "task_evaluation" else initial, "measured": path})
        return found

    def _wanted(self) -> frozenset[str]:
        """All artifacts that the targets need, without the report; for the report alone, of policies and evaluation."""
        targets = [target for target in self.runs["default"].targets if target != "report"]
        return self.ancestry(
            path for target in targets or ("policies", "evaluation") for path in self.target_paths(target)
        )

    def ancestry(self, paths: Iterable[str]) -> frozenset[str]:
        """These artifacts and all those that they are made from, without data and the report."""
        left = [*paths]
        names = [name for name in NAMES if name not in DRAWN]
        known = {
            self.path(run, name): partial(self.origin, run, name)
            for name in names
            for run in self.runs
            if self.has(run, name)
        }
        known |= {path: partial(self.versus_origin, *pair) for pair, path in self.versus().items()}
        found: set[str] = set()
        while left:
            path = left.pop()
            if path in found:
                continue
            found.add(path)
            if path in known:
                left += [one.name for one in known[path]().inputs]
            elif path == f"{self.runs['default'].pathvars.results}/{TARGETS['demo_evaluation'].artifact}":
                left += [self.path("default", "reward_model"), *(self.path(run, "policy") for run in self.runs)]
        return frozenset(found & known.keys())

    def _owner(self, run: str, name: Name) -> str:
        """The first run whose artifact is decided by the same values; runs never share those in `OWN`."""
        if name in OWN:
            return run
        mine = self._what_decides(run, name)
        return next(other for other in self.runs if self._what_decides(other, name) == mine)

    def _deciding(self, run: str, name: Name) -> tuple[object, ...]:
        # Keys are ignored: a judge that is spelled out in the configuration may equal the initial policy.
        origin = replace(self.origin(run, name), keys={})
        return origin.values(), origin.inputs

    def _origin(self, run: str, name: Name) -> Origin:
        """What decides a run's artifact; for responses and judgements, what decides the whole table."""
        config = self.runs[run]
        model = config.model
        if is_imported(config, name):
            return _imported(config, name)
        of_one_section: dict[Name, tuple[Callable[[Any], Origin], Section]] = {
            "engine_base": (provenance.dequantize_base, model.without_adapter()),
            "sft_data": (provenance.clean_sft_data, config.sft_data),
            "prompts": (provenance.clean_prompts, config.prompts),
            "pmp_data": (provenance.clean_pmp_data, config.pmp_data),
        }
        if name in of_one_section:
            decide, section = of_one_section[name]
            return decide(section)
        match name:
            case "check_sampling" | "check_judging" | "check_training" | "check_rl":
                part = name.removeprefix("check_")
                origin = provenance.check_model(
                    [part],
                    model={"judging": judge_model(config), "training": model.without_adapter()}.get(part, model),
                    policy_prompt=config.policy_prompt,
                    sampling=config.sampling,
                    judge=config.judge,
                    lora=config.lora,
                    scoring=config.scoring,
                    tokenizer=self.tokenizer(run),
                    ppo=texts_of(config.ppo),
                )
            case "sft":
                origin = provenance.train_sft(
                    self.path(run, "sft_data"),
                    model=model.without_adapter(),
                    lora=config.lora,
                    policy_prompt=config.policy_prompt,
                    sft=config.sft,
                )
            case "response0" | "response1" | "preferences":
                origin = provenance.gather_shards(self.shard(run, name, 0))
            case "reward_data":
                origin = provenance.aggregate_preferences(
                    self.path(run, "preferences"),
                    self.path(run, "response0"),
                    self.path(run, "response1"),
                    config.judge.principles,
                    aggregation=config.aggregation,
                    turn_markers=config.judge.turn_markers,
                )
            case "pmp" | "reward_model":
                init = name == "reward_model" and config.reward_model.init == "pmp"
                origin = provenance.train_reward_model(
                    self.path(run, "pmp_data" if name == "pmp" else "reward_data"),
                    self.path(run, "pmp") if init else None,
                    stage=name,
                    settings=config.pmp if name == "pmp" else config.reward_model,
                    model=model.without_adapter(),
                    tokenizer=self.tokenizer(run),
                    lora=config.lora,
                    scoring=config.scoring,
                )
            case "rl_prompts":
                origin = provenance.clean_rl_prompts(config.rl_prompts, self.tokenizer(run))
            case "policy":
                origin = provenance.train_policy(
                    self.path(run, "rl_prompts"),
                    self.path(run, "reward_model"),
                    model=model,
                    lora=config.lora,
                    policy_prompt=config.policy_prompt,
                    ppo=config.ppo,
                    scoring=config.scoring,
                )
            case _:
                origin = self._evaluated(run, name)
        return origin

    def _evaluated(self, run: str, name: Name) -> Origin:
        """The same for measurements of judges and reward models after training."""
        config = self.runs[run]
        model = config.model
        match name:
            case "preferred_outputs" | "other_outputs":
                which: Literal["preferred", "other"] = "preferred" if name == "preferred_outputs" else "other"
                origin = provenance.clean_judge_pairs(config.evaluation, which)
            case "judge_evaluation":
                has_pairs = self.has(run, "judged_pairs")
                origin = provenance.evaluate_judge(
                    self.path(run, "preferences"),
                    self.path(run, "judged_pairs") if has_pairs else None,
                    self.path(run, "preferred_outputs") if has_pairs else None,
                    evaluation=config.evaluation,
                )
            case "evaluation_pairs":
                origin = provenance.clean_evaluation_pairs(self.trained()["pmp_data"], evaluation=config.evaluation)
            case "pmp_evaluation" | "reward_evaluation":
                pre_trained = name == "pmp_evaluation"
                origin = provenance.evaluate_reward_model(
                    self.path(run, "pmp" if pre_trained else "reward_model"),
                    self.path(run, "pmp_data") if pre_trained else self.measuring(run, "reward_data"),
                    self.path(run, "evaluation_pairs") if config.evaluation.pairs else None,
                    config.judge.principles,
                    None if pre_trained else self.measuring(run, "preferences"),
                    None if pre_trained else self.measuring(run, "pmp_data"),
                    stage="pmp" if pre_trained else "reward_model",
                    settings=config.pmp if pre_trained else config.reward_model,
                    pmp=config.pmp if not pre_trained and self.measuring(run, "pmp_data") else None,
                    dimensions=[] if pre_trained else config.aggregation.dimensions,
                    model=model.without_adapter(),
                    tokenizer=self.tokenizer(run),
                    scoring=config.scoring,
                    evaluation=config.evaluation,
                )
            case _:
                origin = self._compared(run, name)
        return origin

    def _compared(self, run: str, name: Name) -> Origin:
        """The same for policies, and for judged pairs, which are judged like the policies' answers."""
        config = self.runs[run]
        model = config.model
        match name:
            case "evaluation_prompts":
                trained = [path for paths in self.trained().values() for path in paths]
                origin = provenance.clean_evaluation_prompts(trained, evaluation=config.evaluation)
            case "initial_answers" | "answers":
                origin = provenance.sample_answers(
                    self.path(run, "evaluation_prompts"),
                    self.path(run, "policy") if name == "answers" else None,
                    model=model,
                    policy_prompt=config.policy_prompt,
                    ppo=config.ppo,
                    evaluation=config.evaluation,
                )
            case "initial_scores" | "answer_scores":
                answers = self.path(run, "answers" if name == "answer_scores" else "initial_answers")
                origin = provenance.score_answers(answers, self.scorers())
            case "answer_judgements":
                origin = self._judged(run, self.path(run, "answers"), self.path(run, "initial_answers"))
            case "judged_pairs":
                origin = self._judged(run, self.path(run, "preferred_outputs"), self.path(run, "other_outputs"))
            case "policy_evaluation":
                origin = provenance.evaluate_policies(self.compared(), evaluation=config.evaluation)
            case "initial_task_evaluation" | "task_evaluation":
                origin = provenance.evaluate_tasks(
                    self.path(run, "policy") if name == "task_evaluation" else None,
                    model=model,
                    prompt=TaskPrompt.of(config.policy_prompt, config.evaluation.tasks_format),
                    evaluation=config.evaluation,
                )
            case "verdicts":
                origin = provenance.judge_by_endpoint(**self.judged(run), evaluation=config.evaluation)
            case "initial_mt_bench":
                origin = self._initial_mt_bench(run, self.initial_name(run))
            case "mt_bench":
                origin = provenance.answer_mt_bench(
                    self.path(run, "policy"),
                    run,
                    model=model,
                    policy_prompt=config.policy_prompt,
                    evaluation=config.evaluation,
                )
            case _:
                origin = self._shown(run, name)
        return origin

    def _judged(self, run: str, ours: str, theirs: str) -> Origin:
        """What decides the judgements of two tables of answers by a run's judge, which leaves out no short answer."""
        config = self.runs[run]
        return provenance.judge_preferences(
            ours, theirs, config.judge.principles, 0, model=judge_model(config), judge=measuring_judge(config)
        )

    def initial_name(self, run: str) -> str:
        """The name of a run's initial policy in MT-Bench, whose judges tell models apart by name.

        Returns:
            `initial`, or `initial-NAME` for a further initial policy, with the name of the first run that has it.
        """
        origins = {other: self._initial_mt_bench(other, "initial") for other in self.runs}
        decided = {other: (origin.values(), origin.inputs) for other, origin in origins.items()}
        first = next(other for other in self.runs if decided[other] == decided[run])
        return "initial" if first == next(iter(self.runs)) else f"initial-{first}"

    def _initial_mt_bench(self, run: str, name: str) -> Origin:
        config = self.runs[run]
        return provenance.answer_mt_bench(
            None, name, model=config.model, policy_prompt=config.policy_prompt, evaluation=config.evaluation
        )

    def _shown(self, run: str, name: Name) -> Origin:
        """The same for a part of the report."""
        match name:
            case "funnel":
                return provenance.draw_funnel(self.counted())
            case "training_figures":
                return provenance.draw_training(self.trainings())
            case "task_figures":
                return provenance.draw_tasks(self.asked())
            case "samples":
                return provenance.draw_samples(self.sampled(), self.shown_sources())
            case _:
                return self._shown_of_one(run, name)

    def _shown_of_one(self, run: str, name: Name) -> Origin:
        """The same for a part that shows the output of one rule for one run."""
        paths = {one: path for one, _, path in self.drawn(run, name)}
        first, *more = (paths.get(one) for one in DRAWN[name])
        match name:
            case "judge_figures":
                return provenance.draw_judge(first, paths.get("preferences"), evaluation=self.runs[run].evaluation)
            case "policy_figures":
                return provenance.draw_policies(first or "")
            case _:
                return provenance.draw_reward_model(first, *(more or (None,)))

    def trained(self) -> dict[str, list[str]]:
        """Tables with all prompts that a stage of any run trains on, because all policies answer the same prompts.

        The prompts of imported artifacts are in the imported files; those of an imported reward model or of an existing
        adapter are unknown.

        Returns:
            Option of `clean_evaluation_prompts` -> paths.
        """
        found: dict[str, list[str]] = {"trained": [], "sft_data": [], "pmp_data": []}
        for run, config in self.runs.items():
            if prompted := _prompted(config):
                found["trained"].append(self.path(run, prompted))
            found["trained"].append(self.path(run, "rl_prompts"))
            if config.model.adapter == self.path(run, "sft"):
                found["sft_data"].append(self.path(run, "sft_data"))
            if self.has(run, "pmp_evaluation"):
                found["pmp_data"].append(self.path(run, "pmp_data"))
        return {option: list(dict.fromkeys(paths)) for option, paths in found.items()}

    def trained_twice(self) -> dict[str, str]:
        """Run -> an earlier run whose policy is decided by the same values, so both policies will be equal."""
        runs = list(self.runs)
        decided = [self._what_decides(run, "policy") for run in runs]
        firsts = {run: runs[decided.index(own)] for run, own in zip(runs, decided, strict=True)}
        return {run: first for run, first in firsts.items() if first != run}

    def scorers(self) -> list[dict[str, Any]]:
        """All reward models of the runs, with the fields of `score_answers.Scorer`."""
        found = []
        trained_by = [config.ppo.principles for config in self.runs.values() if config.ppo.principles_per_rollout]
        for run, config in self.runs.items():
            if self.owner(run, "reward_model") == run:
                found.append(
                    {
                        "name": run,
                        "folder": self.path(run, "reward_model"),
                        "principles": config.judge.principles,
                        "dimensions": config.aggregation.dimensions,
                        "rl_principles": list(dict.fromkeys(trained_by)),
                        "model": config.model.without_adapter(),
                        "tokenizer": self.tokenizer(run),
                        "scoring": config.scoring,
                        "settings": config.reward_model,
                    }
                )
        return found

    def compared(self) -> list[dict[str, Any]]:
        """The policies that are measured, initial policies first, with the fields of `evaluate_policies.Policy`."""
        initial: dict[str, str] = {}  # run that has an initial policy's answers -> name of that policy
        trained: list[dict[str, Any]] = []
        for run in self.runs:
            if not self.has(run, "answers"):
                continue
            owner = self.owner(run, "initial_answers")
            name = initial.setdefault(owner, f"{INITIAL} of {owner}" if initial else INITIAL)
            trained.append(
                {
                    "name": run,
                    "answers": self.path(run, "answers"),
                    "scores": self.path(run, "answer_scores"),
                    "judgements": self.path(run, "answer_judgements"),
                    "initial": name,
                    **({"verdicts": self.path(run, "verdicts")} if self.has(run, "verdicts") else {}),
                    "versus": {other: path for (one, other), path in self.versus().items() if one == run},
                }
            )
        before: list[dict[str, Any]] = [
            {
                "name": name,
                "answers": self.path(run, "initial_answers"),
                "scores": self.path(run, "initial_scores"),
                "judgements": None,
                "initial": None,
            }
            for run, name in initial.items()
        ]
        return before + trained

    def judged(self, run: str) -> dict[str, str]:
        """The texts that a model behind an endpoint compares, with the fields of `judge_by_endpoint.Arguments`."""
        names: tuple[Name, ...] = ("answers", "initial_answers", "mt_bench", "initial_mt_bench")
        return {name: self.path(run, name) for name in names if self.has(run, name)}

    def measuring(self, run: str, name: Literal["reward_data", "preferences", "pmp_data"]) -> str | None:
        """The data of a run's reward model that are used to measure it, if they are known.

        Judgements are needed only if records are also made from pairs whose two orders disagree; the pairs of its
        pre-training, only if some were held out.
        """
        config = self.runs[run]
        if config.reward_model.path:
            return None
        needed = {
            "preferences": config.aggregation.path is None and config.aggregation.agreement != "both_orders",
            "pmp_data": self.pre_trains(run) and config.pmp.eval_examples > 0,
        }
        return self.path(run, name) if needed.get(name, True) else None

    def shard(self, run: str, table: Name, shard: int) -> Origin:
        """What decides one shard of a run's table, one of `SCATTERED`."""
        config = self.runs[run]
        if table == "preferences":
            origin = provenance.judge_preferences(
                self.path(run, "response0"),
                self.path(run, "response1"),
                config.judge.principles,
                shard,
                model=judge_model(config),
                judge=config.judge,
            )
            return replace(origin, keys={**origin.keys, "model": "judge.model"}) if config.judge.model else origin
        return provenance.sample_responses(
            self.path(run, "prompts"),
            int(table == "response1"),
            shard,
            model=config.model,
            sampling=config.sampling,
            policy_prompt=config.policy_prompt,
        )


def _prompted(config: Config) -> Name | None:
    """The artifact that has the prompts of a run's synthetic preferences, if there is one."""
    if config.reward_model.path:
        return None
    if config.aggregation.path:
        return "reward_data"
    return "response0" if config.sampling.paths else "prompts"


def is_imported(config: Config, name: Name) -> bool:
    """Whether the configuration imports an artifact."""
    paths: dict[Name, object] = {
        "response0": config.sampling.paths,
        "response1": config.sampling.paths,
        "preferences": config.judge.path,
        "reward_data": config.aggregation.path,
        "reward_model": config.reward_model.path,
    }
    return bool(paths.get(name))


def _imported(config: Config, name: Name) -> Origin:
    """What decides an imported artifact."""
    responses, principles = config.sampling.paths or (), config.judge.principles
    if name in ("response0", "response1"):
        return provenance.import_responses(responses, int(name == "response1"), import_cut(config))
    if name == "preferences":
        return provenance.import_preferences(config.judge.path or "", responses, principles)
    if name == "reward_data":
        return provenance.import_records(config.aggregation.path or "", principles)
    ready = config.reward_model
    return provenance.import_reward_model(ready.path or "", ready.revision, config.model)


def import_cut(config: Config) -> str | None:
    """Where imported responses end: imported judgements refer to the part of a response that was judged."""
    return JUDGED_UP_TO if config.judge.path else None


def measuring_judge(config: Config) -> Judge:
    """The judge for measurements. No answer is too short, or only a concise policy's long answers would count."""
    return config.judge.model_copy(update={"shards": 1, "min_characters": 0})


def judge_model(config: Config) -> Model:
    """The model that judges."""
    return config.judge.model or config.model
