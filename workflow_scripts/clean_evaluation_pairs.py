"""Pairs of human preferences for the evaluation of reward models.

Use the test split of a data set. Pairs with a query that PMP trains on are left out.
"""

import logging
from collections import Counter
from pathlib import Path

import polars as pl
from pydantic import Field

from salmon import artifacts, checked, preference_data, provenance, script
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import EVALUATION_PAIRS, PMP_RECORDS
from salmon.text import fold

log = logging.getLogger(__name__)


class Arguments(script.Arguments):
    """Write pairs of human preferences for the evaluation of reward models."""

    output: Path = Field(description="pairs (parquet); their manifest is written next to them")
    evaluation: Evaluation = Field(description="section of the configuration")
    pmp_data: script.JsonList[Path] = Field([], description="PMP records (parquet) whose dialogues are left out")


def queries(path: Path) -> list[str]:
    """The distinct queries of PMP records."""
    return checked.read(path, PMP_RECORDS, ("record_id", "instruction")).collect()["instruction"].unique().to_list()


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, counts = arguments.evaluation, Counter[str]()
    with artifacts.scratch(arguments.output) as folder:
        trained = {fold(preference_data.opening(query)) for path in arguments.pmp_data for query in queries(path)}
        records = preference_data.comparison_records(
            settings.pairs, settings.min_score_ratio, settings.seed, counts, trained
        )
        files = preference_data.shuffle(records, settings.seed, folder, counts, EVALUATION_PAIRS)
        log.info("%s", ", ".join(f"{what}: {number}" for what, number in counts.items()))
        if empty := [name for name in settings.pairs if not counts[f"{name}: kept"]]:
            raise UserError(
                f"no pair is left from {', '.join(empty)}; check evaluation.pairs: pairs that are also in "
                "pmp_data.sources are left out"
            )
        origin = provenance.clean_evaluation_pairs(arguments.pmp_data, evaluation=settings)
        manifest = origin.manifest(origin.identify(), counts)
        artifacts.write_table(pl.scan_parquet(files), arguments.output, EVALUATION_PAIRS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
