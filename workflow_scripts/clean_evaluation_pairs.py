"""Pairs of people's preferences that reward models are measured by, in the table of those that PMP trains on.

Reads nothing that a training reads: name the test split of a data set.
"""

import logging
from collections import Counter
from pathlib import Path

import polars as pl
from pydantic import Field

from salmon import artifacts, preference_data, provenance, script
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import PMP_RECORDS

log = logging.getLogger(__name__)


class Arguments(script.Arguments):
    """Options of the command line."""

    output: Path = Field(description="pairs (parquet), as PMP records; the manifest is written beside them")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, counts = arguments.evaluation, Counter[str]()
    with artifacts.scratch(arguments.output) as folder:
        records = preference_data.comparison_records(settings.pairs, settings.min_score_ratio, settings.seed, counts)
        files = preference_data.shuffle(records, settings.seed, folder, counts)
        log.info("%s", ", ".join(f"{what}: {number}" for what, number in counts.items()))
        if empty := [name for name in settings.pairs if not counts[f"{name}: kept"]]:
            raise UserError(f"no pair is left of {', '.join(empty)}; check evaluation.pairs")
        origin = provenance.clean_evaluation_pairs(settings)
        manifest = origin.manifest(origin.identify(), counts)
        artifacts.write_table(pl.scan_parquet(files), arguments.output, PMP_RECORDS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
