"""SALMON: self-alignment with principle-following reward models (arXiv 2310.05910).

`snakemake -n` shows what would be done, `snakemake --profile profiles/slurm` does all of it, and a target below
or any file of the results builds just that and what it is made from.
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


# Snakemake has taken over what jobs have finished, and deletes nothing of it any more.
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


# Which results are not what the configuration says; fails where something is stale. It makes nothing, and so always runs.
rule verify:
    log:
        "<logs>/verify.log",
    localrule: True
    conda:
        "envs/data.yaml"
    shell:
        f'python {SCRIPTS}/verify.py --configuration "${VARIABLE}"' " 2>&1 | tee {log:q}"


# What the runs will cost with the hardware of the profile. It makes nothing, either.
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
