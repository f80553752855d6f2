"""Prompts that policies are measured by, in the table of those of step 1: none that was trained on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from salmon import artifacts, checked, prompts, provenance, script
from salmon.config import Evaluation, Prompts
from salmon.tables import PREFERENCE_RECORDS, PROMPTS, RESPONSES
from salmon.text import join_instruction


class Arguments(script.Arguments):
    """Options of the command line."""

    output: Path = Field(description="prompts (parquet); the manifest is written beside them")
    evaluation: Evaluation = Field(description="section of the configuration")
    trained: script.JsonList[Path] = Field(
        description="tables (parquet) of prompts, responses or records whose instructions are left out"
    )


def texts(path: Path) -> Iterable[tuple[str, str]]:
    """Instruction and input of the rows of a table."""
    kind = checked.kind_of(path, (PROMPTS, RESPONSES, PREFERENCE_RECORDS))
    rows = checked.read(path, kind, (*kind.key, "instruction", "input")).select("instruction", "input")
    return rows.collect().iter_rows()


def main(arguments: Arguments) -> None:
    """Read the sources, leave out what was trained on, write the table."""
    trained = {join_instruction(*row) for path in arguments.trained for row in texts(path)}

    def reject(texts: Sequence[str]) -> list[str | None]:
        return ["trained on" if text in trained else None for text in texts]

    settings = Prompts(sources=arguments.evaluation.prompts, seed=arguments.evaluation.seed)
    table, counts = prompts.collect_prompts(settings, reject)
    origin = provenance.clean_evaluation_prompts(arguments.trained, evaluation=arguments.evaluation)
    artifacts.write_table(table, arguments.output, PROMPTS, origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
