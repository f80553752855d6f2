"""The artifacts of a configuration: what decides each, and where it is, which runs share that have it in common."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Literal, get_args

from salmon import provenance
from salmon.config import Model
from salmon.configuration import ARTIFACTS, Config, texts_of
from salmon.identity import tokenizer_model
from salmon.provenance import Origin

Name = Literal[
    "check_sampling",
    "check_judging",
    "check_training",
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
]
"""An artifact of a run, in the order in which they are built."""
NAMES: tuple[Name, ...] = get_args(Name)
SCATTERED: frozenset[Name] = frozenset({"response0", "response1", "preferences"})
"""Tables that are made in shards."""
CHECKED: dict[Name, Name] = {
    "response0": "check_sampling",
    "response1": "check_sampling",
    "preferences": "check_judging",
    "pmp": "check_training",
    "reward_model": "check_training",
    "policy": "check_rl",
}
"""What comes after a part of `check_model` -> that part."""


class Plan:
    """The artifacts of all runs.

    Args:
        runs: as `configuration.load` has them.
    """

    def __init__(self, runs: Mapping[str, Config]) -> None:
        self.runs = runs
        self.origin = cache(self._origin)
        self.owner = cache(self._owner)
        self._what_decides = cache(self._deciding)

    def path(self, run: str, name: Name) -> str:
        """Where a run's artifact is."""
        return f"{self.runs[run].pathvars.results}/{self.home(run, name)}{ARTIFACTS[name]}"

    def home(self, run: str, name: Name) -> str:
        """The part of the path between the results' folder and the artifact's own: the folder of its owner.

        Returns:
            Empty for the default run, `runs/NAME/` for another.
        """
        owner = self.owner(run, name)
        return f"runs/{owner}/" if name == "policy" or owner != "default" else ""

    def _owner(self, run: str, name: Name) -> str:
        """The first run whose artifact is decided by the same; every policy is its run's own."""
        if name == "policy":
            return run
        mine = self._what_decides(run, name)
        return next(other for other in self.runs if self._what_decides(other, name) == mine)

    def _deciding(self, run: str, name: Name) -> tuple[object, ...]:
        origin = self.origin(run, name)
        return origin.values(), origin.inputs

    def _origin(self, run: str, name: Name) -> Origin:
        """What decides a run's artifact; of responses and judgements, what decides the whole table."""
        config = self.runs[run]
        model, tokenizer = config.model, tokenizer_model(config.model)
        if is_imported(config, name):
            return _imported(config, name)
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
                    tokenizer=tokenizer,
                    ppo=texts_of(config.ppo),
                )
            case "prompts":
                origin = provenance.clean_prompts(config.prompts)
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
            case "pmp_data":
                origin = provenance.clean_pmp_data(config.pmp_data)
            case "pmp" | "reward_model":
                init = name == "reward_model" and config.reward_model.init == "pmp"
                origin = provenance.train_reward_model(
                    self.path(run, "pmp_data" if name == "pmp" else "reward_data"),
                    self.path(run, "pmp") if init else None,
                    stage=name,
                    settings=config.pmp if name == "pmp" else config.reward_model,
                    model=model.without_adapter(),
                    tokenizer=tokenizer,
                    lora=config.lora,
                    scoring=config.scoring,
                )
            case "rl_prompts":
                origin = provenance.clean_rl_prompts(config.rl_prompts, tokenizer)
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
        return origin

    def shard(self, run: str, table: Name, shard: int) -> Origin:
        """What decides one shard of a run's table, which is one of `SCATTERED`."""
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


def is_imported(config: Config, name: Name) -> bool:
    """Whether the configuration names an artifact that was made elsewhere."""
    paths: dict[Name, object] = {
        "response0": config.sampling.paths,
        "response1": config.sampling.paths,
        "preferences": config.judge.path,
        "reward_data": config.aggregation.path,
        "reward_model": config.reward_model.path,
    }
    return bool(paths.get(name))


def _imported(config: Config, name: Name) -> Origin:
    """What decides an artifact that was made elsewhere."""
    responses, principles = config.sampling.paths or (), config.judge.principles
    if name in ("response0", "response1"):
        return provenance.import_responses(responses, int(name == "response1"))
    if name == "preferences":
        return provenance.import_preferences(config.judge.path or "", responses, principles)
    if name == "reward_data":
        return provenance.import_records(config.aggregation.path or "", principles)
    ready = config.reward_model
    return provenance.import_reward_model(ready.path or "", ready.revision, config.model)


def judge_model(config: Config) -> Model:
    """The model that judges."""
    return config.judge.model or config.model
