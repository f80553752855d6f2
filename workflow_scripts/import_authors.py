"""Import results of the authors' release as our artifacts: a reward model, responses, judgements or records.

See `salmon/published.py` and `salmon/authors.py` for the layouts. A reward model may also be one of ours. If the
configuration names such files (`reward_model.path`, `sampling.paths`, `judge.path`, `aggregation.path`), the workflow
starts from them.
"""

import logging
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import NoDecode

from salmon import artifacts, authors, principles, provenance, script
from salmon.config import Marker, Model, ResponseFiles
from salmon.tables import JUDGEMENTS, PRINCIPLE_RECORDS, RESPONSES

log = logging.getLogger("salmon.import_authors")
NEEDED = {
    "reward_model": ("path", "model"),
    "responses": ("responses", "index"),
    "preferences": ("path", "responses", "principles"),
    "records": ("path", "principles"),
}


class Arguments(script.Arguments):
    """Import a reward model, responses, judgements or records of the authors' release."""

    what: Literal["reward_model", "responses", "preferences", "records"] = Field(
        description="kind of artifact: `preferences` are judgements of single principles, `records` are made from them"
    )
    output: Path = Field(description="folder of the reward model, or table (parquet); with a manifest")
    path: str | None = Field(None, description="reward model (hub id or folder), preference file, or records")
    revision: str | None = Field(None, description="commit, tag or branch of the reward model on the hub")
    responses: Annotated[ResponseFiles, NoDecode, script.JSON] | None = Field(
        None, description="JSON list of the two response files; the first is output 1 of the judging"
    )
    index: int | None = Field(None, ge=0, le=1, description="which of the two response files becomes a table")
    cut_at: Marker | None = Field(
        None, description="text at which a response ends; `###` if judgements of the responses are also imported"
    )
    principles: Path | None = Field(None, description="JSON list of dimension, definition, negative_definition")
    model: Model | None = Field(None, description="section of the configuration: the reward model's base")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := [f"--{name}" for name in NEEDED[self.what] if getattr(self, name) is None]:
            raise ValueError(f"--what {self.what} needs {', '.join(missing)}")
        return self


def main(arguments: Arguments) -> None:
    """Read it, check that it fits, write it with its manifest."""
    counts = import_reward_model(arguments) if arguments.what == "reward_model" else import_table(arguments)
    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))


def import_reward_model(arguments: Arguments) -> dict[str, int]:
    """Write the standard folder of a reward model."""
    from salmon import published  # needs torch; tables do not

    assert arguments.path
    assert arguments.model
    config, weights, counts = published.read_reward_model(arguments.path, arguments.revision, arguments.model)
    origin = provenance.import_reward_model(arguments.path, arguments.revision, arguments.model)
    manifest = origin.manifest(origin.identify(), counts)
    with artifacts.atomic(arguments.output) as folder:
        published.save_reward_model(config, weights, folder)
        artifacts.write_json(artifacts.manifest_path(folder), manifest)
    return counts


def import_table(arguments: Arguments) -> dict[str, int]:
    """Write the table of responses, judgements or records."""
    path, files = arguments.path or "", arguments.responses or ()
    if arguments.what == "responses":
        index = arguments.index or 0
        origin, kind = provenance.import_responses(files, index, arguments.cut_at), RESPONSES
        table, counts = authors.responses(authors.read_pairs(files, "sampling.paths"), index, arguments.cut_at)
    else:
        assert arguments.principles
        named = principles.read_judged(arguments.principles)
        if arguments.what == "preferences":
            origin, kind = provenance.import_preferences(path, files, arguments.principles), JUDGEMENTS
            pairs = authors.read_pairs(files, "sampling.paths")
            table, counts = authors.judgements(path, pairs, named, "judge.path")
        else:
            origin, kind = provenance.import_records(path, arguments.principles), PRINCIPLE_RECORDS
            table, counts = authors.records(path, named, "aggregation.path")
    artifacts.write_table(table, arguments.output, kind, origin.manifest(origin.identify(), counts))
    return counts


if __name__ == "__main__":
    script.run(main, Arguments)
