"""Pairs with a human preference, as two tables of responses, to compare the judge with people.

One table has the preferred outputs, the other one the rest; a pair has the same `prompt_id` in both.
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from salmon import artifacts, preference_data, provenance, script
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import IMPORTED, RESPONSES

log = logging.getLogger("salmon.clean_judge_pairs")


class Arguments(script.Arguments):
    """Write one side of the pairs that people compared, as a table of responses."""

    output: Path = Field(description="responses (parquet); their manifest is written next to them")
    which: Literal["preferred", "other"] = Field(description="which output of each pair")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, counts = arguments.evaluation, Counter[str]()
    rows = responses(settings, arguments.which, counts)
    if empty := [name for name in settings.judge_pairs if not counts[f"{name}: kept"]]:
        raise UserError(f"no pair is left from {', '.join(empty)}; check evaluation.judge_pairs")
    counts["rows"] = len(rows)
    log.info("%s", ", ".join(f"{what}: {number}" for what, number in counts.items()))
    table = pl.DataFrame(rows, schema=RESPONSES.schema).sort("prompt_id")
    origin = provenance.clean_judge_pairs(settings, arguments.which)
    artifacts.write_table(table, arguments.output, RESPONSES, origin.manifest(origin.identify(), counts))


def responses(settings: Evaluation, which: Literal["preferred", "other"], counts: Counter[str]) -> list[dict[str, Any]]:
    """Rows of the table, each pair once; counts them (`NAME: kept`) and the omitted ones, by source and reason."""
    pairs, rows = settings.judge_pairs, dict[str, dict[str, Any]]()
    for record in preference_data.comparison_records(pairs, settings.min_score_ratio, settings.seed, counts):
        name, source = record["record_id"], record["source"]
        counts[f"{source}: {'duplicate' if name in rows else 'kept'}"] += 1
        place = record["preference"] if which == "preferred" else 3 - record["preference"]
        rows[name] = {
            "prompt_id": name,
            "source": source,
            "instruction": record["instruction"],
            "input": record["input"],
            "response": record[f"output_{place}"],
            "finish_reason": IMPORTED,
            "prompt_tokens": None,
            "response_tokens": None,
        }
    return list(rows.values())


if __name__ == "__main__":
    script.run(main, Arguments)
