"""Make reward-model records from the judge's preferences: draw principles, negate some, apply the rules.

See `salmon/aggregation.py`, and section 3.2 of the paper.
"""

import logging
from pathlib import Path

from pydantic import Field

from salmon import aggregation, artifacts, principles, provenance, script
from salmon.config import Aggregation, Marker
from salmon.tables import PRINCIPLE_RECORDS

log = logging.getLogger("salmon.aggregate_preferences")


class Arguments(script.Arguments):
    """Make reward-model records from the judge's preferences."""

    preferences: Path = Field(description="judgements (parquet): both orders' scores per pair and principle")
    response0: Path = Field(description="responses of the first sampling (parquet)")
    response1: Path = Field(description="responses of the second sampling (parquet)")
    principles: Path = Field(description="JSON list of dimension, definition, negative_definition")
    output: Path = Field(description="reward-model records (parquet); its manifest is written next to it")
    aggregation: Aggregation = Field(description="section of the configuration")
    turn_markers: script.JsonList[Marker] = Field(
        ["\n### User\n"], description="JSON list; responses are cut at the first of these texts"
    )


def main(arguments: Arguments) -> None:
    """Read, aggregate, write the table and its manifest."""
    with artifacts.scratch(arguments.output) as folder:
        table, counts = aggregation.aggregate(
            arguments.preferences,
            arguments.response0,
            arguments.response1,
            principles=principles.read_judged(arguments.principles),
            settings=arguments.aggregation,
            turn_markers=arguments.turn_markers,
            folder=folder,
        )
        origin = provenance.aggregate_preferences(
            arguments.preferences,
            arguments.response0,
            arguments.response1,
            arguments.principles,
            aggregation=arguments.aggregation,
            turn_markers=arguments.turn_markers,
        )
        manifest = origin.manifest(origin.identify(), counts)
        artifacts.write_table(table, arguments.output, PRINCIPLE_RECORDS, manifest)
    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))


if __name__ == "__main__":
    script.run(main, Arguments)
