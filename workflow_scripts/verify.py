"""Say which results are not what the configuration says: `snakemake verify`.

Compares every artifact's manifest with the configuration, the inputs, the table's rows and the code's commit, also
where Snakemake has forgotten why something was built. See `salmon/verification.py`.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from salmon import configuration, script, shipped, verification
from salmon.errors import UserError


class Arguments(script.Arguments):
    """Say which results are not what the configuration says. By hand, from the folder that paths start from."""

    configfile: script.JsonList[Path] = Field([], description="JSON list: files that are read over config.yaml")
    configuration: dict[str, Any] | None = Field(
        None, description="the whole configuration, as Snakemake holds it; without it, config.yaml and configfile"
    )
    forcerun: CliImplicitFlag[bool] = Field(
        False, description="print only the options for Snakemake that rebuild what is stale"
    )


def main(arguments: Arguments) -> None:
    """Verify, and print what was found."""
    raw = (
        arguments.configuration
        if arguments.configuration is not None
        else configuration.read([shipped.CHECKOUT / "config.yaml", *arguments.configfile])
    )
    report = verification.verify(configuration.load(raw, Path.cwd()))
    if arguments.forcerun:
        sys.stdout.write("".join(f"{word}\n" for word in ["--forcerun", *report.forcerun] if report.stale))
        return
    sys.stdout.write("".join(f"{finding}\n" for finding in report.findings))
    sys.stdout.write(f"whole: {report.whole} artifacts\n")
    sys.stdout.flush()
    if report.stale:
        raise UserError(f"{len(report.stale)} artifacts are stale; --forcerun prints what makes Snakemake rebuild them")


if __name__ == "__main__":
    script.run(main, Arguments)
