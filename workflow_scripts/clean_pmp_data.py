"""Human preferences for pre-training the reward model (SALMON step 2, PMP): SHP and HH-RLHF, shuffled.

Writes one row per pair, in the columns of the reward-model records; the columns for principles are empty.
"""

import logging
from collections import Counter
from pathlib import Path

import polars as pl
from pydantic import Field

from salmon import artifacts, preference_data, provenance, script
from salmon.config import PmpData
from salmon.errors import UserError
from salmon.tables import PMP_RECORDS

log = logging.getLogger(__name__)


class Arguments(script.Arguments):
    """Write human preferences for pre-training the reward model."""

    output: Path = Field(description="PMP records (parquet); their manifest is written next to them")
    pmp_data: PmpData = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, output = arguments.pmp_data, arguments.output
    counts: Counter[str] = Counter()
    with artifacts.scratch(output) as folder:
        records = preference_data.comparison_records(settings.sources, settings.min_score_ratio, settings.seed, counts)
        files = preference_data.shuffle(records, settings.seed, folder, counts)
        log.info("%s", ", ".join(f"{what}: {number}" for what, number in counts.items()))
        if not any(counts[f"{name}: kept"] for name in settings.sources):
            raise UserError("no pair is left from any source; check pmp_data.sources and pmp_data.min_score_ratio")
        origin = provenance.clean_pmp_data(settings)
        manifest = origin.manifest(origin.identify(), counts)
        artifacts.write_table(pl.scan_parquet(files), output, PMP_RECORDS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
