"""What a folder of results holds for the playground: policies, reward models and the judge, as their manifests say."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from salmon import artifacts, principles, shipped
from salmon.border import read_json
from salmon.config import Model, PolicyPrompt, Ppo, Scored
from salmon.errors import UserError, describe_errors
from salmon.principles import JudgedPrinciple, WeightedPrinciple

INITIAL = "initial policy"
PRINCIPLES = "prompts/principles/judge.json"
"""Principles that are offered if the results do not say which ones the judge had."""
END = 10  # of so many parts of the steps, the last one is the end

S = TypeVar("S", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, trained or initial.

    Attributes:
        name: name of the run, or `INITIAL`.
        folder: folder of its adapter; None for an initial policy.
        model: the initial policy.
        reward_model: folder of the reward model that it was trained with, if it was found.
        scoring: how that reward model reads its texts.
        principles: the principles that were shown to the reward model in RL.
        steps: metrics of each step of PPO, in order.
    """

    name: str
    folder: Path | None
    model: Model
    prompt: PolicyPrompt
    ppo: Ppo
    reward_model: Path | None = None
    scoring: Scored = field(default_factory=Scored)
    principles: list[WeightedPrinciple] = field(default_factory=list)
    steps: list[Mapping[str, float]] = field(default_factory=list)

    @property
    def adapter(self) -> tuple[str, str | None] | None:
        """Folder or hub id of its adapter, and the revision."""
        if self.folder:
            return str(self.folder), None
        return (self.model.adapter, self.model.adapter_revision) if self.model.adapter else None

    def curve(self, key: str) -> tuple[float, float] | None:
        """A metric at the first step, and its mean over the last tenth of the steps."""
        values = [step[key] for step in self.steps if step.get(key) is not None]
        return (values[0], fmean(values[-max(1, len(values) // END) :])) if values else None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A reward model, and how its texts are made.

    Attributes:
        tokenizer: the model whose tokenizer is used.
        max_length: in tokens; likewise `query_length` and `response_length`.
    """

    name: str
    folder: Path
    model: Model
    tokenizer: Model
    scoring: Scored
    template: Path
    max_length: int
    query_length: int
    response_length: int


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """How the judge was asked."""

    model: Model
    form: Scored
    template: Path
    max_length: int
    turn_markers: list[str]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that is offered, on one base model.

    Attributes:
        policies: initial ones first.
        notes: what is not offered and why, and what has changed since; a sentence for each.
    """

    policies: list[Policy]
    scorers: list[Scorer]
    judge: JudgeSettings | None
    principles: list[JudgedPrinciple]
    notes: list[str]


def read(folder: Path, principles_file: Path | None = None, run: str | None = None) -> Results:
    """Find what the playground offers.

    Args:
        folder: results, such as results/demo.
        principles_file: JSON list of dimension, definition, negative_definition; without it, that of the judge.
        run: run whose base model is used; without it, the base model with most policies.

    Raises:
        UserError: if the folder holds no policy or no reward model.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: `make demo` makes results/demo; name your results with --results"
        )
    return _Reader(folder).read(principles_file, run)


class _Reader:
    """Reads manifests, and collects what is wrong with them."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.notes: list[str] = []

    def read(self, principles_file: Path | None, run: str | None) -> Results:
        found = (self._try(path.parent.parent.name, self._policy, path) for path in self._manifests("runs/*/policy"))
        trained = [one for one in found if one]
        if not trained:
            raise self._nothing("policy", "runs/…/policy")
        if run and run not in {one.name for one in trained}:
            raise UserError(f"there is no run {run}; the runs are {', '.join(one.name for one in trained)}")
        scorers = [*self._scorers(trained)]
        if not scorers:
            raise self._nothing("reward_model", "models/reward_model")
        policies = [*_initial(trained), *trained]

        def worth(key: tuple[object, ...]) -> tuple[bool, bool, int]:
            of_run = any(one.name == run and _base(one.model) == key for one in trained)
            return of_run, any(_base(one.model) == key for one in scorers), sum(_base(p.model) == key for p in policies)

        base = max((_base(one.model) for one in trained), key=worth)
        judgements = next(iter(self._manifests("**/preferences", "preferences.manifest.json")), None)
        judge = self._try("the judge", self._judge, judgements, trained[0]) if judgements else None
        named = [(one.name, one.model) for one in policies] + [(one.name, one.model) for one in scorers]
        for name, model in [*named, *([("the judge", judge.model)] if judge else [])]:
            if _base(model) != base:
                self.notes.append(
                    f"{name} is not offered: its base model is {model.base} ({model.quantization}, {model.dtype}), and "
                    f"the page has {base[0]} ({base[2]}, {base[3]}); start it with --run to choose"
                )
        scorers = [one for one in scorers if _base(one.model) == base]
        if not scorers:
            raise UserError(
                f"{self.root} holds no reward model on {base[0]}, the base model of {run or 'its policies'}"
            )
        return Results(
            policies=[one for one in policies if _base(one.model) == base],
            scorers=scorers,
            judge=judge if judge and _base(judge.model) == base else None,
            principles=principles.read_judged(principles_file or self._judged_principles(judgements)),
            notes=self.notes,
        )

    def locate(self, name: str) -> Path:
        """A file or folder that a manifest names.

        A relative name starts from the directory in which Snakemake ran. The results may have moved since, so it is
        looked for in the results, in the folders above them, in the working directory, and in the checkout.
        """
        parts = Path(name).parts
        inside = (
            self.root.joinpath(*parts[place:]) for place in range(len(parts)) if parts[place] in ("models", "runs")
        )
        above = (parent / name for parent in self.root.parents)
        places = (*inside, *above, Path(name), shipped.CHECKOUT / name)
        return next((place.resolve() for place in places if place.exists()), Path(name))

    def _manifests(self, folders: str, name: str = "manifest.json") -> list[Path]:
        found = (folder / name for folder in sorted(self.root.glob(folders)) if not folder.name.startswith("."))
        return [path for path in found if path.is_file()]

    def _try(self, name: str, function: Callable[..., T], *arguments: Any) -> T | None:
        """What a function reads; if it cannot, a note says why."""
        try:
            return function(*arguments)
        except KeyError as error:
            why = f"its manifest has no {error}; it is of another version"
        except (UserError, ValueError) as error:
            why = str(error)
        self.notes.append(f"{name} is not offered: {why}")
        return None

    def _nothing(self, target: str, where: str) -> UserError:
        why = "".join(f"; {note}" for note in self.notes)
        return UserError(
            f"{self.root} holds no usable {target.replace('_', ' ')} ({where}){why}. Build one first, such as with "
            f"`snakemake {target} --profile …`"
        )

    def _unchanged(self, manifest: Mapping[str, Any], name: str, what: str) -> Path:
        """A file that a manifest names, with a note if it has changed since."""
        path, known = self.locate(name), manifest.get("inputs", {}).get(name)
        if known and path.is_file() and artifacts.hash_path(path) != known:
            self.notes.append(f"{name} has changed since {what} was made: the page uses it as it is now")
        return path

    def _policy(self, path: Path) -> Policy:
        manifest = _read(path)
        settings, name = manifest["settings"], path.parent.parent.name
        ppo = _section(Ppo, settings["ppo"], path)
        prompt = _section(PolicyPrompt, settings["policy_prompt"], path)
        if not prompt.is_chat:
            prompt = prompt.model_copy(update={"template": str(self._unchanged(manifest, prompt.template, name))})
        shown: list[WeightedPrinciple] | None = []
        if ppo.principles_per_rollout:
            file = self._unchanged(manifest, ppo.principles, name)
            shown = self._try(f"the list of principles of {name}", principles.read_weighted, file)
        names = [one for one in manifest.get("inputs", {}) if one not in (settings["model"]["base"],
                 settings["model"].get("adapter"))]  # fmt: skip
        reward_models = [one for one in map(self.locate, names) if (one / "adapter_config.json").is_file()]
        metrics = path.with_name("metrics.jsonl")
        return Policy(
            name=name,
            folder=path.parent,
            model=self._model(settings, path),
            prompt=prompt,
            ppo=ppo.model_copy(update={"template": str(self.locate(ppo.template))}),
            reward_model=reward_models[0] if reward_models else None,
            scoring=_section(Scored, settings.get("scoring", {}), path),
            principles=shown or [],
            steps=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        )

    def _scorers(self, policies: list[Policy]) -> Iterator[Scorer]:
        """The reward models in the results, and those elsewhere that the policies were trained with."""
        folders = [path.parent for path in self._manifests("models/*") + self._manifests("runs/*/models/*")]
        folders = [
            folder for folder in folders if {"reward_model", "pmp"} & _read(folder / "manifest.json")["settings"].keys()
        ]
        folders += [one.reward_model for one in policies if one.reward_model]
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            by = next((one for one in policies if one.reward_model and one.reward_model.resolve() == folder), None)
            if found := self._try(str(folder), self._scorer, folder, by, policies[0]):
                yield found

    def _scorer(self, folder: Path, by: Policy | None, first: Policy) -> Scorer:
        """A reward model; `by` is a policy that was trained with it, if there is one."""
        path = folder / "manifest.json"
        manifest = _read(path) if path.is_file() else {"settings": {}}
        settings = manifest["settings"]
        training = settings.get("reward_model") or settings.get("pmp") or {}
        name = self._name(folder)
        tokenizer = (by or first).model
        if "template" in training:
            return Scorer(
                name=name,
                folder=folder,
                model=self._model(settings, path).without_adapter(),
                tokenizer=tokenizer,
                scoring=_section(Scored, settings.get("scoring", {}), path),
                template=self._unchanged(manifest, training["template"], name),
                max_length=training["max_length"],
                query_length=training["query_length"],
                response_length=training["response_length"],
            )
        if by is None:
            raise UserError("it was imported, and no policy in the results says how its texts are made")
        return Scorer(
            name=name,
            folder=folder,
            model=by.model.without_adapter(),
            tokenizer=tokenizer,
            scoring=by.scoring,
            template=Path(by.ppo.template),
            max_length=by.ppo.reward_max_length,
            query_length=by.ppo.reward_query_length,
            response_length=by.ppo.reward_response_length,
        )

    def _name(self, folder: Path) -> str:
        if not folder.is_relative_to(self.root):
            return str(folder)
        parts = folder.relative_to(self.root).parts
        return f"{parts[-1]} of {parts[1]}" if parts[0] == "runs" else parts[-1]

    def _judge(self, path: Path, first: Policy) -> JudgeSettings | None:
        manifest = _read(path)
        settings = manifest["settings"]
        if "template" not in settings:
            raise UserError("the judgements were imported, and do not say how the judge was asked")
        return JudgeSettings(
            model=self._model(settings, path) if "model" in settings else first.model,
            form=_section(Scored, settings, path),
            template=self._unchanged(manifest, settings["template"], "the judgements"),
            max_length=settings["max_length"],
            turn_markers=settings.get("turn_markers", []),
        )

    def _judged_principles(self, judgements: Path | None) -> Path:
        manifest = _read(judgements) if judgements else {"settings": {}}
        name = manifest["settings"].get("principles", PRINCIPLES)
        return self._unchanged(manifest, name, "the judgements")

    def _model(self, settings: Mapping[str, Any], path: Path) -> Model:
        """The section `model`, with local folders where they are found now."""
        model = _section(Model, settings["model"], path)
        names = {"base": str(self.locate(model.base)), "adapter": model.adapter and str(self.locate(model.adapter))}
        return model.model_copy(update=names)


def _initial(trained: list[Policy]) -> Iterator[Policy]:
    """The policies that the trained ones began as, each once."""
    known: list[Model] = []
    for one in trained:
        if one.model not in known:
            name = INITIAL if not known else f"{INITIAL} of {one.name}"
            known.append(one.model)
            yield Policy(name, None, one.model, one.prompt, one.ppo)


def _read(manifest: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(manifest, "manifest", "build the artifact again")
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise UserError(f"{manifest} has no settings; build the artifact again")
    return found


def _section(kind: type[S], raw: Mapping[str, Any], manifest: Path) -> S:
    try:
        return kind.model_validate({key: value for key, value in raw.items() if key in kind.model_fields})
    except ValidationError as error:
        raise UserError(describe_errors(error, kind, str(manifest))) from None


def _base(model: Model) -> tuple[str, str | None, str, str]:
    """What models must have in common to share one base in memory."""
    return model.base, model.revision, model.quantization, model.dtype
