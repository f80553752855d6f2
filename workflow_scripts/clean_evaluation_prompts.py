"""Prompts for the evaluation of policies, in the table format of step 1, without any that were trained on.

Texts that differ only in case or white space count as equal.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from salmon import artifacts, checked, formats, preference_data, prompts, provenance, script
from salmon.config import Evaluation, Prompts
from salmon.tables import PMP_RECORDS, PREFERENCE_RECORDS, PROMPTS, RESPONSES, SFT_EXAMPLES, Table
from salmon.text import fold, join_instruction


class Arguments(script.Arguments):
    """Write prompts for the evaluation of policies, without any that were trained on."""

    output: Path = Field(description="prompts (parquet); their manifest is written next to them")
    evaluation: Evaluation = Field(description="section of the configuration")
    trained: script.JsonList[Path] = Field(
        description="tables (parquet) of prompts, responses or records whose instructions are left out"
    )
    sft_data: script.JsonList[Path] = Field([], description="SFT examples (parquet) whose instructions are left out")
    pmp_data: script.JsonList[Path] = Field([], description="PMP records (parquet) whose queries are left out")


def texts(path: Path, kind: Table) -> Iterator[str]:
    """The instructions in the rows of a table; for a dialogue, also its beginning."""
    rows = checked.read(path, kind, (*kind.key, "instruction", "input")).select("instruction", "input").unique()
    for instruction, extra in rows.collect().iter_rows():
        yield join_instruction(instruction, extra)
        if kind is PMP_RECORDS and (turn := formats.first_turn(f"\n\n{instruction}")):
            yield turn


def main(arguments: Arguments) -> None:
    """Read the sources, leave out the prompts that were trained on, write the table."""
    trained: dict[str, str] = {}  # folded text -> reason for leaving it out; the first one counts
    for reason, paths, kinds in (
        ("trained on", arguments.trained, (PROMPTS, RESPONSES, PREFERENCE_RECORDS)),
        ("trained on by SFT", arguments.sft_data, (SFT_EXAMPLES,)),
        (preference_data.TRAINED, arguments.pmp_data, (PMP_RECORDS,)),
    ):
        for path in paths:
            for text in texts(path, checked.kind_of(path, kinds)):
                trained.setdefault(fold(text), reason)

    def reject(texts: Sequence[str]) -> list[str | None]:
        return [trained.get(fold(text)) for text in texts]

    settings = Prompts(sources=arguments.evaluation.prompts, seed=arguments.evaluation.seed)
    table, counts = prompts.collect_prompts(settings, reject)
    origin = provenance.clean_evaluation_prompts(
        [*arguments.trained, *arguments.sft_data, *arguments.pmp_data], evaluation=arguments.evaluation
    )
    artifacts.write_table(table, arguments.output, PROMPTS, origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
