"""Check artifacts against the configuration: compare manifests with settings, inputs, rows and the code's commit.

Snakemake loses the record of why an artifact was built when results are moved, shared with another checkout, or
separated from their `.snakemake` folder. Manifests stay with the results.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from salmon import artifacts, configuration, provenance, tables
from salmon.checked import Manifest, rows_counted
from salmon.config import is_local
from salmon.configuration import TARGETS, Config, field_of
from salmon.errors import UserError
from salmon.plan import CHECKED, NAMES, SCATTERED, Name, Plan, is_imported
from salmon.provenance import Input, Origin
from salmon.shards import OF_ONE_SHARD
from salmon.shipped import short_name

HASH = re.compile(r"[0-9a-f]{64}")
RULES: dict[Name, str] = {
    "engine_base": "dequantize_base",
    "sft_data": "clean_sft_data",
    "sft": "train_sft",
    "check_sampling": "check_model",
    "check_judging": "check_model",
    "check_training": "check_model",
    "check_rl": "check_model",
    "prompts": "clean_prompts",
    "response0": "gather_responses",
    "response1": "gather_responses",
    "preferences": "gather_preferences",
    "reward_data": "aggregate_preferences",
    "pmp_data": "clean_pmp_data",
    "pmp": "train_pmp",
    "reward_model": "train_reward_model",
    "rl_prompts": "clean_rl_prompts",
    "policy": "train_policy",
    "evaluation_prompts": "clean_evaluation_prompts",
    "initial_answers": "sample_initial_answers",
    "initial_scores": "score_initial_answers",
    "answers": "sample_answers",
    "answer_scores": "score_answers",
    "answer_judgements": "judge_answers",
    "policy_evaluation": "evaluate_policies",
    "preferred_outputs": "clean_judge_pairs",
    "other_outputs": "clean_judge_pairs",
    "judged_pairs": "judge_pairs",
    "judge_evaluation": "evaluate_judge",
    "evaluation_pairs": "clean_evaluation_pairs",
    "pmp_evaluation": "evaluate_pmp",
    "reward_evaluation": "evaluate_reward_model",
    "initial_task_evaluation": "evaluate_initial_tasks",
    "task_evaluation": "evaluate_tasks",
    "initial_mt_bench": "answer_initial_mt_bench",
    "mt_bench": "answer_mt_bench",
    "verdicts": "judge_by_endpoint",
    "funnel": "draw_funnel",
    "sft_figures": "draw_sft",
    "judge_figures": "draw_judge",
    "pmp_figures": "draw_pmp",
    "reward_figures": "draw_reward_model",
    "training_figures": "draw_training",
    "policy_figures": "draw_policies",
    "task_figures": "draw_tasks",
    "samples": "draw_samples",
}
"""Artifact -> the rule that makes it."""
IMPORTS: dict[Name, str] = {
    "response0": "import_responses",
    "response1": "import_responses",
    "preferences": "import_preferences",
    "reward_data": "import_records",
    "reward_model": "import_authors",
}
"""Imported artifact -> the rule that imports it."""
NOT_SET = object()


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a rule makes.

    Attributes:
        path: path of the artifact.
        rule: rule that makes it.
        origin: what decides it; None if that is not in the configuration.
        whole: for a shard, the table that it is part of.
        checked: the part of `check_model` that must pass before it or before its shards.
    """

    path: str
    rule: str
    origin: Origin | None
    whole: str | None = None
    checked: str | None = None

    @property
    def manifest(self) -> Path:
        """Path of its manifest."""
        return artifacts.manifest_path(Path(self.path))


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: `stale`: differs from the configuration; `follows`: made from something stale; `missing`: needed by the
            targets but not built; `note`: for information.
        path: path of the artifact.
        text: what is wrong; empty if the kind says it.
    """

    kind: Literal["stale", "follows", "missing", "note"]
    path: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}" + (f": {self.text}" if self.text else "")


@dataclass
class Report:
    """All findings, in the order in which artifacts are built."""

    findings: list[Finding] = field(default_factory=list)
    stale: list[Artifact] = field(default_factory=list)
    whole: int = 0

    @property
    def forcerun(self) -> list[str]:
        """Artifacts and rules for Snakemake's --forcerun; Snakemake itself finds what depends on them."""
        # All files of the demo's data come from one job.
        return [one.rule if one.rule == "make_demo_data" else one.path for one in self.stale]


def inventory(runs: Mapping[str, Config]) -> dict[str, Artifact]:
    """All artifacts of a configuration by path, each after the artifacts that it is made from.

    Args:
        runs: runs as `configuration.load` returns them.
    """
    return {one.path: one for one in _inventory(runs)}


def _inventory(runs: Mapping[str, Config]) -> Iterator[Artifact]:
    plan = Plan(runs)
    runs, config = plan.runs, plan.runs["default"]
    results = config.pathvars.results
    made = {path for run in runs.values() for path in _source_paths(run) if path.startswith(f"{results}/data/")}
    if made:
        yield Artifact(f"{results}/data", "make_demo_data", Origin({"seed": config.seed}))
    bases = {model.base for run in runs.values() for model in (run.model, run.judge.model) if model}
    if f"{results}/demo_policy" in bases or "demo_policy" in config.targets:
        yield Artifact(f"{results}/demo_policy", "train_demo_policy", None)
    for name in NAMES:
        checked = CHECKED.get(name)
        for run in runs:
            if plan.owner(run, name) != run or not plan.has(run, name):
                continue
            path, origin = plan.path(run, name), plan.origin(run, name)
            if is_imported(runs[run], name):
                yield Artifact(path, IMPORTS[name], origin)
                continue
            one = Artifact(path, RULES[name], origin, checked=plan.path(run, checked) if checked else None)
            if name in SCATTERED:
                shards = [*_shards(one, partial(plan.shard, run, name))]
                parts = tuple(Input(shard.path, "file") for shard in shards)
                yield from shards
                one = replace(one, origin=replace(origin, inputs=(*origin.inputs, *parts)))
            yield one
        if name == "answer_judgements":
            for (run, other), path in plan.versus().items():
                checked_judge = plan.path(run, "check_judging")
                yield Artifact(path, "judge_runs", plan.versus_origin(run, other), checked=checked_judge)
    evaluation = provenance.evaluate_demo(
        plan.path("default", "reward_model"),
        plan.path("default", "pmp") if config.reward_model.init == "pmp" else None,
        [plan.path(run, "policy") for run in runs],
        settings={
            "model": config.model,
            "policy_prompt": config.policy_prompt,
            "judge": config.judge,
            "aggregation": config.aggregation,
            "ppo": config.ppo,
            "reward_settings": config.reward_model,
            "scoring": config.scoring,
            "seed": config.seed,
        },
    )
    yield Artifact(f"{results}/{TARGETS['demo_evaluation'].artifact}", "evaluate_demo", evaluation)


def _shards(table: Artifact, origin: Callable[[int], Origin]) -> Iterator[Artifact]:
    """The shards of a table that exist."""
    folder = Path(table.path).with_suffix(".shards")
    rule = "judge_preferences" if table.rule == "gather_preferences" else "sample_responses"
    for number in sorted(int(file.stem) for file in folder.glob("*.parquet") if file.stem.isdigit()):
        yield Artifact(f"{folder}/{number}.parquet", rule, origin(number), whole=table.path)


def _source_paths(config: Config) -> Iterator[str]:
    for section, key in configuration.SOURCES:
        for source in getattr(getattr(config, section), key).values():
            yield from source.paths


def verify(runs: Mapping[str, Config], only: Callable[[str], bool] = lambda path: True) -> Report:
    """Compare every existing artifact with the configuration.

    Args:
        runs: runs as `configuration.load` returns them.
        only: whether to check the artifact with a given path.
    """
    known = inventory(runs)
    made_from = {path: _made_from(artifact, known) for path, artifact in known.items()}
    wanted = _wanted(runs, known, made_from)
    report, verifier = Report(), _Verifier(known)
    behind: dict[str, str] = {}  # artifact that is stale or follows -> the first stale artifact before it
    commits: dict[str, list[str]] = defaultdict(list)
    for path, artifact in known.items():
        if not only(path):
            continue
        if not Path(path).exists():
            if path in wanted:
                report.findings.append(Finding("missing", path))
            continue
        reasons, commit = verifier.look(artifact)
        before = next((behind[one] for one in made_from[path] if one in behind), None)
        if reasons:
            report.findings += [Finding("stale", path, reason) for reason in reasons]
            report.stale.append(artifact)
            behind[path] = path
        elif before:
            report.findings.append(Finding("follows", path, before))
            behind[path] = before
        else:
            report.whole += 1
        if commit:
            commits[commit].append(path)
    here = artifacts.git_commit()
    for commit, paths in commits.items():
        if here and commit != here:
            shown = paths[0] if len(paths) == 1 else f"{len(paths)} artifacts ({paths[0]}, …)"
            report.findings.append(
                Finding("note", shown, f"made by commit {_short(commit)}, but the checkout is at {_short(here)}")
            )
    return report


def _made_from(artifact: Artifact, known: Mapping[str, Artifact]) -> list[str]:
    """The artifacts that an artifact is made from: an input is such an artifact or a file in one."""
    names = [one.name for one in artifact.origin.inputs] if artifact.origin else []
    return [path for name in names for path in (name, str(Path(name).parent)) if path in known]


def _wanted(runs: Mapping[str, Config], known: Mapping[str, Artifact], made_from: Mapping[str, list[str]]) -> set[str]:
    """Paths that the configuration's targets need; shards only if their table does not exist."""
    left = [path for target in runs["default"].targets for path in Plan(runs).target_paths(target)]
    wanted: set[str] = set()
    while left:
        path = left.pop()
        if path not in wanted:
            wanted.add(path)
            checked = known[path].checked
            left += [*made_from[path], *([checked] if checked else [])]
    return wanted


class _Verifier:
    """Checks artifacts and hashes each input once.

    Args:
        known: paths of all artifacts of the configuration.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.known = [short_name(path) for path in known]
        self.identities: dict[Input, str | None] = {}

    def look(self, artifact: Artifact) -> tuple[list[str], str | None]:
        """The reasons why an artifact is stale, and the commit that made it."""
        try:
            manifest = _read(artifact.manifest)
            reasons = [*self._differences(artifact, manifest), *_rows(artifact, manifest["counts"])]
        except UserError as error:
            return [str(error)], None
        return reasons, manifest.get("git_commit")

    def _differences(self, artifact: Artifact, manifest: Mapping[str, Any]) -> Iterator[str]:
        origin = artifact.origin
        if origin is None:
            return
        recorded: dict[str, str] = dict(manifest["inputs"])
        inputs = {short_name(one.name): one for one in origin.inputs}  # by their names in manifests
        named: set[str] = set()  # in settings that have changed
        old, new = origin.values(manifest["settings"]), origin.values()
        for key in {**new, **old}:
            if key in OF_ONE_SHARD and artifact.whole and Path(artifact.whole).exists():
                continue  # the table exists and does not depend on it
            then, now = old.get(key, NOT_SET), new.get(key, NOT_SET)
            if then == now or (then is NOT_SET and (_is_default(key, now) or _unrecorded(key, origin))):
                continue
            if now is NOT_SET and then is None:  # now a section is there instead
                continue
            if self._same_files(then, now, recorded, inputs):
                continue
            named |= {name for value in (then, now) for name in _names(value)}
            yield f"{key} {_shown(then)} -> {_shown(now)}"
        changed = [name for name in self._changed(artifact, recorded, inputs, origin) if name not in named]
        if changed:
            yield f"inputs changed ({', '.join(changed)})"

    def _same_files(self, then: Any, now: Any, recorded: Mapping[str, str], inputs: Mapping[str, Input]) -> bool:
        """Whether two settings name files with the same contents, which have only been moved."""
        old, new = list(_names(then)), list(_names(now))
        return len(old) == len(new) > 0 and all(
            one == other
            or (
                one in recorded
                and other in inputs
                and HASH.fullmatch(recorded[one]) is not None
                and recorded[one] == self._identity(inputs[other])
            )
            for one, other in zip(old, new, strict=True)
        )

    def _changed(
        self, artifact: Artifact, recorded: dict[str, str], inputs: Mapping[str, Input], origin: Origin
    ) -> Iterator[str]:
        """Names of inputs that differ from the recorded ones; inputs that no longer exist cannot be compared."""
        folder = Path(artifact.path).with_suffix(".shards")
        left = dict(recorded)
        elsewhere: list[Input] = []
        for name, one in inputs.items():
            if name not in left:
                elsewhere.append(one)
            elif self._identity(one) not in (left.pop(name), None):
                yield name
        for one in elsewhere:  # recorded under other names, if the results have been moved
            identity = self._identity(one)
            same = (name for name in left if left[name] == identity and HASH.fullmatch(left[name]))
            tail = Path(one.name).parts[-2:]
            moved = next(same, None) or next((name for name in left if Path(name).parts[-2:] == tail), None)
            if moved is None:
                in_folder = Path(one.name).parent == folder
                if identity is not None and one.name not in origin.unrecorded and not in_folder:
                    yield one.name
            elif left.pop(moved) != identity and (identity is not None or self._is_another(moved, one.name)):
                yield one.name
        yield from (name for name in left if Path(name).parent.name != folder.name)

    def _is_another(self, recorded: str, name: str) -> bool:
        """Whether a recorded name fits another artifact of the configuration better than a missing one.

        If so, the missing artifact is not the recorded one at a new place. It is a run's own artifact, which changed
        settings require.
        """
        return any(_shared_end(recorded, path) > _shared_end(recorded, name) for path in self.known)

    def _identity(self, one: Input) -> str | None:
        """Identity of an input; None if it does not exist."""
        if one not in self.identities:
            there = Path(one.name).expanduser().exists() or not is_local(one.name)
            self.identities[one] = one.identity() if there else None
        return self.identities[one]


def _shared_end(one: str, other: str) -> int:
    """Number of parts that two paths have in common at their ends."""
    pairs = zip(reversed(Path(one).parts), reversed(Path(other).parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _read(path: Path) -> dict[str, Any]:
    """A manifest.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        Manifest.model_validate(found)
    except FileNotFoundError:
        raise UserError("has no manifest") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read as a manifest ({type(error).__name__})") from None
    return dict(found)


def _rows(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[str]:
    """Report a table whose number of rows differs from its manifest."""
    path = Path(artifact.path)
    if path.suffix == ".parquet":
        rows, counted = tables.number_of_rows(path), set(rows_counted(counts).values())
        if counted != {rows}:
            yield f"{rows} rows, but its manifest counts {', '.join(map(str, counted)) or 'none'}"


FORMER: dict[str, Any] = {"ppo.cut_markers": [], "cut_at": None}
"""Settings whose default differs from the behaviour before they existed -> the value for that behaviour."""


def _is_default(key: str, value: Any) -> bool:
    """Whether a setting that an older manifest lacks has the value that keeps the earlier behaviour."""
    if key in FORMER:
        return bool(FORMER[key] == value)
    found = field_of(key)
    return found is not None and not found.is_required() and _plain(found.default) == value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _unrecorded(key: str, origin: Origin) -> bool:
    """Whether a setting is one that older manifests lack."""
    names = [origin.keys.get(name, name) for name in origin.unrecorded]
    return any(key.startswith(f"{name}.") for name in names)


def _short(commit: str) -> str:
    """A short commit hash, with its `-dirty` if it has one."""
    name, _, dirty = commit.partition("-")
    return f"{name[:10]}-{dirty}" if dirty else name[:10]


def _names(value: Any) -> Iterator[str]:
    """Strings in a setting, which may name files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))


def _shown(value: Any) -> str:
    """A value in one line."""
    text = "not set" if value is NOT_SET else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text) if "\n" in text else text if len(text) <= 80 else f"{text[:77]}..."
