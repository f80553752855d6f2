"""Warnings about what Snakemake does not notice itself, such as results that it has no record of."""

import zlib

from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.persistence.file import FilePersistence


def has_no_record():
    """A function of a path: whether the artifact exists, but Snakemake has no record of how it was made.

    Such results were moved, or built from another checkout. For them, a changed setting would rerun nothing.
    """
    records = FilePersistence(nolock=True)

    def check(path):
        named = {"data": f"{path}/manifest.json"}.get(Path(path).name, path)
        return Path(path).exists() and records.metadata(IOFile(named)) is None

    return check


def warn_of_stale_results():
    """Before the first job, list stale results that Snakemake has no record of. Reads manifests only if necessary."""
    unknown = has_no_record()
    paths = {path for target in TARGETS for path in PLAN.target_paths(target)}
    paths |= {PLAN.path(run, name) for run in RUNS for name in plan.NAMES} | {*PLAN.versus().values()}
    if not any(map(unknown, paths)):
        return
    from salmon import verification

    try:
        found = verification.verify(RUNS, unknown)
    except UserError as error:
        logger.warning(f"results that Snakemake has no record of cannot be verified: {error}")
        return
    lines = [str(finding) for finding in found.findings if finding.kind in ("stale", "follows")]
    if lines:
        lines += [
            "Snakemake has no record of how these were made and will not rebuild them on its own. `snakemake verify`",
            "checks all results; `python workflow_scripts/verify.py --forcerun` prints the options that rebuild them.",
        ]
        logger.warning("\n".join(lines))


# The whole configuration for `verify`. As part of the command, it would be printed whenever something is stale. The
# variable's name depends on the contents, since a workflow with two modules has two configurations.
CONFIGURATION = json.dumps(whole_configuration(), default=str)
VARIABLE = f"SALMON_CONFIGURATION_{zlib.crc32(CONFIGURATION.encode()):x}"
os.environ.update({VARIABLE: CONFIGURATION})


def warn_of_equal_policies():
    """Warn of runs whose settings change nothing about their policies: they look like an ablation without effect."""
    if equal := PLAN.trained_twice():
        named = ", ".join(f"{run} as {other}" for run, other in equal.items())
        logger.warning(
            f"runs that train the same policy again: {named}. Their own settings change no result, or belong to a "
            "stage that an import replaces (reward_model.path, aggregation.path, …); set such a run to null"
        )


def warn_of_lost_resources():
    """Warn that Snakemake does not merge the command line's resources with the profile's."""
    named = [name for name in ("--set-resources", "--profile") if any(word.startswith(name) for word in sys.argv)]
    if len(named) == 2:
        logger.warning(
            "--set-resources on the command line replaces all resources that the profile sets, so other rules lose "
            "their GPUs and batch sizes; set resources in a copy of the profile's folder instead"
        )


if workflow.is_main_process:
    warn_of_lost_resources()
if workflow.is_main_process and not any(word.endswith("verify") for word in sys.argv):
    warn_of_stale_results()
    warn_of_equal_policies()
