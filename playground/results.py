"""What a folder of results holds for the playground: policies, reward models and the judge, as their manifests say."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from salmon import principles, shipped
from salmon.border import read_json
from salmon.config import Model, PolicyPrompt, Ppo, RewardTraining, Scored, Scoring
from salmon.errors import UserError, describe_errors
from salmon.principles import JudgedPrinciple, WeightedPrinciple

INITIAL = "initial policy"
PRINCIPLES = "prompts/principles/judge.json"
"""Principles that are offered where the results do not say which ones the judge had."""
END = 10  # the end is the last of this many parts of the steps
CURVES = ("score", "kl_sequence", "response_tokens")

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, trained or initial.

    Attributes:
        name: of the run, or `INITIAL`.
        folder: of its adapter; None for an initial policy.
        model: the initial policy.
        principles: the principles that were shown to the reward model in RL.
        steps: metrics of each step of PPO, in order.
    """

    name: str
    folder: Path | None
    model: Model
    prompt: PolicyPrompt
    ppo: Ppo
    principles: list[WeightedPrinciple]
    steps: list[Mapping[str, float]]

    def curve(self, key: str) -> tuple[float, float] | None:
        """A metric at the first step, and its mean over the last tenth of the steps."""
        values = [step[key] for step in self.steps if step.get(key) is not None]
        return (values[0], fmean(values[-max(1, len(values) // END) :])) if values else None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A reward model, and how its texts are made."""

    name: str
    folder: Path
    model: Model
    scoring: Scoring
    settings: RewardTraining


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """How the judge was asked."""

    model: Model
    form: Scored
    template: Path
    max_length: int


@dataclass(frozen=True, slots=True)
class Results:
    """All of it, of one base model.

    Attributes:
        policies: initial ones first.
        left_out: why something in the folder is not offered, a sentence for each.
    """

    policies: list[Policy]
    scorers: list[Scorer]
    judge: JudgeSettings | None
    principles: list[JudgedPrinciple]
    left_out: list[str]


def read(folder: Path, principles_file: Path | None = None) -> Results:
    """Find what the playground offers.

    Args:
        folder: of results, such as results/demo.
        principles_file: JSON list of dimension, definition, negative_definition; without it, that of the judge.

    Raises:
        UserError: where the folder holds no reward model, or a manifest cannot be read.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: `make demo` makes results/demo; name your results with --results"
        )
    scorers = [_scorer(path, folder) for path in sorted(folder.glob("**/models/*/manifest.json")) if _has_head(path)]
    trained = [_policy(path) for path in sorted(folder.glob("runs/*/policy/manifest.json"))]
    if not scorers:
        raise UserError(
            f"{folder} holds no reward model (models/reward_model): build one first, such as with `snakemake --profile "
            "… reward_model`"
        )
    judgements = sorted(folder.glob("**/preferences/preferences.manifest.json"))
    judge = _judge(judgements[0]) if judgements else None
    if not trained:
        raise UserError(
            f"{folder} holds no policy (runs/…/policy): build one first, such as with `snakemake --profile … policy`"
        )
    base = trained[0].model
    policies = [*_initial(trained), *trained]
    offered: list[Policy | Scorer] = [*policies, *scorers]
    left_out = [
        f"{one.name} is not offered: its base model is {one.model.base}, and that of {trained[0].name} is {base.base}"
        for one in offered
        if not _same_base(one.model, base)
    ]
    if judge and not _same_base(judge.model, base):
        left_out.append(f"the judge is not offered: its base model is {judge.model.base}")
        judge = None
    file = principles_file or (_principles(judgements[0]) if judgements else locate(PRINCIPLES))
    return Results(
        policies=[one for one in policies if _same_base(one.model, base)],
        scorers=[one for one in scorers if _same_base(one.model, base)],
        judge=judge,
        principles=principles.read_judged(file),
        left_out=left_out,
    )


def locate(path: str) -> Path:
    """A file that a manifest names: from the working directory, or from the checkout."""
    return next((one for one in (Path(path), shipped.CHECKOUT / path) if one.exists()), Path(path))


def _initial(trained: list[Policy]) -> Iterator[Policy]:
    """The policies that the trained ones began as, each once."""
    known: list[Model] = []
    for one in trained:
        if one.model not in known:
            name = INITIAL if not known else f"{INITIAL} of {one.name}"
            known.append(one.model)
            yield Policy(name, None, one.model, one.prompt, one.ppo, [], [])


def _policy(manifest: Path) -> Policy:
    settings = _settings(manifest)
    ppo = _section(Ppo, settings["ppo"], manifest)
    metrics = manifest.with_name("metrics.jsonl")
    prompt = _section(PolicyPrompt, settings["policy_prompt"], manifest)
    return Policy(
        name=manifest.parent.parent.name,
        folder=manifest.parent,
        model=_model(settings, manifest),
        prompt=prompt if prompt.is_chat else prompt.model_copy(update={"template": str(locate(prompt.template))}),
        ppo=ppo,
        principles=principles.read_weighted(locate(ppo.principles)) if ppo.principles_per_rollout else [],
        steps=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
    )


def _scorer(manifest: Path, root: Path) -> Scorer:
    settings = _settings(manifest)
    training = settings.get("reward_model") or settings["pmp"]
    names = manifest.parent.relative_to(root).parts
    return Scorer(
        name=" ".join([names[-1], *(f"of {run}" for run in names[1:2] if names[0] == "runs")]),
        folder=manifest.parent,
        model=_model(settings, manifest).without_adapter(),
        scoring=_section(Scoring, settings["scoring"], manifest),
        settings=_section(RewardTraining, {**training, "template": str(locate(training["template"]))}, manifest),
    )


def _judge(manifest: Path) -> JudgeSettings | None:
    settings = _settings(manifest)
    if "template" not in settings:  # judgements of others
        return None
    form = {"format": settings["format"], "template_variables": settings["template_variables"]}
    return JudgeSettings(
        model=_model(settings, manifest),
        form=_section(Scored, form, manifest),
        template=locate(settings["template"]),
        max_length=settings["max_length"],
    )


def _principles(manifest: Path) -> Path:
    return locate(_settings(manifest).get("principles", PRINCIPLES))


def _has_head(manifest: Path) -> bool:
    return bool({"reward_model", "pmp"} & _settings(manifest).keys())


def _settings(manifest: Path) -> dict[str, Any]:
    found = read_json(manifest, "manifest", "build the artifact again").get("settings")
    if not isinstance(found, dict):
        raise UserError(f"{manifest} has no settings; build the artifact again")
    return found


def _model(settings: Mapping[str, Any], manifest: Path) -> Model:
    """The section `model`, with local folders where they are found from here."""
    model = _section(Model, settings["model"], manifest)
    names = {"base": str(locate(model.base)), "adapter": model.adapter and str(locate(model.adapter))}
    return model.model_copy(update=names)


def _section(kind: type[S], raw: Mapping[str, Any], manifest: Path) -> S:
    try:
        return kind.model_validate({key: value for key, value in raw.items() if key in kind.model_fields})
    except ValidationError as error:
        raise UserError(describe_errors(error, kind, f"{manifest}, which another version may have written,")) from None


def _same_base(one: Model, other: Model) -> bool:
    return (one.base, one.revision, one.quantization) == (other.base, other.revision, other.quantization)
