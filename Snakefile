"""SALMON: self-alignment with principle-following reward models (arXiv 2310.05910).

`snakemake -n` shows the jobs that would run, and `snakemake --profile profiles/slurm` runs all of them. A target below,
or the path of any result, builds only that and what it depends on.
"""

from snakemake.utils import min_version

min_version("9.19")


include: "rules/common.smk"
include: "rules/inputs.smk"
include: "rules/model.smk"
include: "rules/engine.smk"
include: "rules/sft.smk"
include: "rules/prompts.smk"
include: "rules/preferences.smk"
include: "rules/reward_model.smk"
include: "rules/policy.smk"
include: "rules/evaluation.smk"
include: "rules/benchmarks.smk"
include: "rules/report.smk"
include: "rules/imports.smk"
include: "rules/demo.smk"
include: "rules/records.smk"


# By now Snakemake has recorded the finished outputs and will not delete them any more.
onsuccess:
    work.sweep(Path(settings.pathvars.results))


onerror:
    work.sweep(Path(settings.pathvars.results))


for target in TARGETS:

    rule:
        name:
            target
        input:
            target_files(target),
        localrule: True


rule all:
    default_target: True
    input:
        [target_files(target) for target in settings.targets],
    localrule: True


# Reports results that differ from the configuration, and fails if one is stale. It has no output, so it always runs.
rule verify:
    log:
        "<logs>/verify.log",
    localrule: True
    conda:
        "envs/data.yaml"
    shell:
        f'python {SCRIPTS}/verify.py --configuration "${VARIABLE}"' " 2>&1 | tee {log:q}"


# Estimates the cost of the runs on the profile's hardware. It has no output either.
rule plan:
    log:
        "<logs>/plan.log",
    localrule: True
    conda:
        "envs/model.yaml"
    params:
        resources=lambda wildcards: json.dumps({name: hardware(name) for name in sorted({*plan.ON_GPUS.values()})}),
    shell:
        f'python {SCRIPTS}/plan.py --configuration "${VARIABLE}"' " --resources {params.resources:q} 2>&1 | tee {log:q}"
