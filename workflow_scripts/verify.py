"""List the results that do not match the configuration: `snakemake verify`.

Compares every artifact's manifest with the configuration, the inputs, the table's rows and the code's commit, even if
Snakemake no longer knows why something was built. See `salmon/verification.py`.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from salmon import configuration, script, shipped, verification
from salmon.errors import UserError


class Arguments(script.Arguments):
    """List the results that do not match the configuration. By hand, start it in the folder to which paths refer."""

    configfile: script.JsonList[Path] = Field([], description="JSON list: files that override config.yaml")
    configuration: dict[str, Any] | None = Field(
        None, description="the complete configuration, from Snakemake; without it, config.yaml and configfile"
    )
    forcerun: CliImplicitFlag[bool] = Field(
        False, description="print only the Snakemake options that rebuild stale artifacts"
    )


def main(arguments: Arguments) -> None:
    """Verify, and print the findings."""
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
        raise UserError(f"{len(report.stale)} artifacts are stale; --forcerun prints the options to rebuild them")


if __name__ == "__main__":
    script.run(main, Arguments)
