"""What Snakemake does not know of results that are already there: it has a record only of what was built in this folder."""

import zlib

from snakemake.io import IOFile
from snakemake.logging import logger
from snakemake.persistence.file import FilePersistence


def has_no_record():
    """Whether an artifact is there of which Snakemake does not know what it was made of, as a function of its path.

    Such results were moved, or built from another checkout: a changed setting would rerun nothing.
    """
    records = FilePersistence(nolock=True)

    def check(path):
        named = {"data": f"{path}/manifest.json"}.get(Path(path).name, path)
        return Path(path).exists() and records.metadata(IOFile(named)) is None

    return check


def warn_of_stale_results():
    """Name what is stale where Snakemake cannot know, before the first job. Looks at manifests only where it has to."""
    unknown = has_no_record()
    paths = {path for target in TARGETS for path in PLAN.target_paths(target)}
    paths |= {PLAN.path(run, name) for run in RUNS for name in plan.NAMES}
    if not any(map(unknown, paths)):
        return
    from salmon import verification

    try:
        found = verification.verify(RUNS, unknown)
    except UserError as error:
        logger.warning(f"results without a record of Snakemake's cannot be verified: {error}")
        return
    lines = [str(finding) for finding in found.findings if finding.kind in ("stale", "follows")]
    if lines:
        lines += [
            "Snakemake has no record of how these were made, and will not rebuild them by itself; `snakemake verify`",
            "looks at all results, and `python workflow_scripts/verify.py --forcerun` prints what makes it rebuild them.",
        ]
        logger.warning("\n".join(lines))


# The whole configuration for `verify`: in its command, it would be printed where something is stale. Under a name of its
# own, since two modules of one workflow have two.
CONFIGURATION = json.dumps(whole_configuration(), default=str)
VARIABLE = f"SALMON_CONFIGURATION_{zlib.crc32(CONFIGURATION.encode()):x}"
os.environ.update({VARIABLE: CONFIGURATION})


def warn_of_equal_policies():
    """Name runs whose settings differ in nothing that their policies are made of: they look like an ablation without effect."""
    if equal := PLAN.trained_twice():
        named = ", ".join(f"{run} as {other}" for run, other in equal.items())
        logger.warning(
            f"runs that train the same policy again: {named}. What they set differently changes no result, or belongs to a "
            "stage that was made elsewhere (reward_model.path, aggregation.path, …); set such a run to null"
        )


def warn_of_lost_resources():
    """Say that Snakemake does not merge the command line's resources with a profile's."""
    named = [name for name in ("--set-resources", "--profile") if any(word.startswith(name) for word in sys.argv)]
    if len(named) == 2:
        logger.warning(
            "--set-resources of the command line takes the place of all that the profile sets: other rules lose their "
            "GPUs and batch sizes. Set them in a copy of the profile's folder instead."
        )


if workflow.is_main_process:
    warn_of_lost_resources()
if workflow.is_main_process and not any(word.endswith("verify") for word in sys.argv):
    warn_of_stale_results()
    warn_of_equal_policies()
