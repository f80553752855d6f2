"""Draw the way from raw data to records: the numbers of kept and omitted rows in the manifests of all tables."""

import logging
from pathlib import Path

from pydantic import BaseModel, Field

from salmon import artifacts, checked, figures, provenance, script

log = logging.getLogger("salmon.draw_funnel")


class Counted(BaseModel):
    """A table whose manifest counts rows."""

    name: str = Field(description="the artifact's name")
    run: str = Field(description="the first run that has it")
    path: Path = Field(description="path of the table (parquet)")


class Arguments(script.Arguments):
    """Draw the way from raw data to records."""

    tables: script.JsonList[Counted] = Field(
        min_length=1, description="JSON list of tables, in the order of the stages"
    )
    output: Path = Field(description="folder to write: funnel.svg, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the manifests, draw, write the folder."""
    found: list[figures.Step] = []
    for table in arguments.tables:
        found += figures.steps(table.name, table.run, checked.read_manifest(table.path).counts)
    origin = provenance.draw_funnel([table.model_dump() for table in arguments.tables])
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.funnel(found).write(folder)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), {"steps": len(found)}))
    log.info("%d steps", len(found))


if __name__ == "__main__":
    script.run(main, Arguments)
