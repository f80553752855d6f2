"""Principles: the sentences that judge and reward model follow, and how RL draws them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from salmon.border import read_json
from salmon.config import Ppo
from salmon.errors import UserError, describe_errors

ADVICE = "a file of principles is a JSON list in UTF-8, like those in prompts/principles"
HEAVIEST = 1e9  # with a wider range of weights, the probability of a principle would be rounded to 0


class _Principle(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    dimension: str = Field(min_length=1)
    definition: str = Field(min_length=1)


class JudgedPrinciple(_Principle):
    """A principle for judging and reward-model data, and its opposite."""

    negative_definition: str = Field(min_length=1)


class WeightedPrinciple(_Principle):
    """A principle for RL, drawn in proportion to its weight; without weights, all are equally likely."""

    weight: float = Field(1.0, ge=0, le=HEAVIEST)

    @field_validator("weight")
    @classmethod
    def _not_lost_in_the_sum(cls, weight: float) -> float:
        if 0 < weight < 1 / HEAVIEST:
            raise ValueError(f"a weight must be 0 or at least {1 / HEAVIEST:.0e}")
        return weight


def _read(path: str | Path, kind: Any) -> Any:
    """Read a JSON list of principles in the authors' format. Refuses duplicates."""
    raw = read_json(path, "principles", ADVICE)
    try:
        principles = TypeAdapter(list[kind]).validate_python(raw)
    except ValidationError as error:
        raise UserError(describe_errors(error, list[kind], f"principles {path}")) from None
    names = [principle.dimension for principle in principles]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"principles {path} define {', '.join(twice)} twice")
    if not names:
        raise UserError(f"principles {path} are an empty list")
    return principles


def read_judged(path: str | Path) -> list[JudgedPrinciple]:
    """Principles `{dimension, definition, negative_definition}`, in the order of the file."""
    principles: list[JudgedPrinciple] = _read(path, JudgedPrinciple)
    return principles


def to_measure(judged: str | Path, dimensions: Sequence[str], rl: Sequence[str | Path]) -> dict[tuple[str, bool], str]:
    """The sentences by which answers are scored: the reward model's own, plain and negated, followed by RL's.

    If RL and the reward model word a principle equally, it appears once. A sentence of RL is named after its principle
    plus ` (RL)`, and the file's name if files word it differently.

    Args:
        judged: file with the principles that the reward model was trained with.
        dimensions: the names of these principles.
        rl: files with the principles that policies are trained by.

    Returns:
        (Name, whether it is the negation) -> sentence.
    """
    known = {one.dimension: one for one in read_judged(judged)}
    if unknown := [name for name in dimensions if name not in known]:
        raise UserError(
            f"{judged} does not define the principle {unknown[0]}, which the settings name; name the file that does"
        )
    found = {
        (name, negated): known[name].negative_definition if negated else known[name].definition
        for name in dimensions
        for negated in (False, True)
    }
    for file in rl:
        for one in read_weighted(file):
            if one.definition not in found.values():
                name = f"{one.dimension} (RL)"
                for more in (Path(file).stem, str(file)):
                    name = name if (name, False) not in found else f"{one.dimension} (RL, {more})"
                found[name, False] = one.definition
    return found


def read_weighted(path: str | Path) -> list[WeightedPrinciple]:
    """Principles `{dimension, definition, weight}`, in file order; either all or none have a weight.

    Without weights they are drawn uniformly, whatever the question type.
    """
    principles: list[WeightedPrinciple] = _read(path, WeightedPrinciple)
    without = [principle.dimension for principle in principles if "weight" not in principle.model_fields_set]
    if without and len(without) < len(principles):
        raise UserError(
            f"principles {path}: {without[0]} has no weight, but others have; give a weight to all or to none"
        )
    return principles


def draw_principles(
    principles: Sequence[WeightedPrinciple], question_type: str, settings: Ppo, rng: np.random.Generator
) -> list[WeightedPrinciple]:
    """Draw the principles of one rollout, without replacement, in proportion to their weights.

    A principle whose name contains a word that is boosted for the question type weighs `settings.boost` more, if
    principles have weights (paper section 3.4; reference step 3).

    Args:
        rng: the rollout's generator, so the draw does not depend on ranks or order.
    """
    if settings.principles_per_rollout == 0:
        return []
    weighted = any("weight" in principle.model_fields_set for principle in principles)
    words = settings.boosted_words.get(question_type, []) if weighted else []  # type: ignore[call-overload]
    weights = np.array(
        [
            principle.weight + settings.boost * any(word.lower() in principle.dimension.lower() for word in words)
            for principle in principles
        ]
    )
    chosen = rng.choice(len(principles), size=settings.principles_per_rollout, replace=False, p=weights / weights.sum())
    return [principles[index] for index in chosen]
