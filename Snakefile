"""SALMON: self-alignment with principle-following reward models (arXiv 2310.05910).

`snakemake -n` shows what would be done, `snakemake --profile profiles/slurm` does all of it, and a target below
or any file of the results builds just that and what it is made from.
"""

from snakemake.utils import min_version

min_version("9.19")


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/prompts.smk"
include: "rules/preferences.smk"
include: "rules/reward_model.smk"
include: "rules/policy.smk"
include: "rules/demo.smk"


localrules:
    all,
    prompts,
    response0,
    response1,
    preferences,
    reward_data,
    pmp_data,
    pmp,
    reward_model,
    rl_prompts,
    policy,
    policies,
    demo_policy,
    evaluation,


rule prompts:
    input:
        "<results>/prompts/oasst1.parquet",


rule response0:
    input:
        "<results>/responses/response0.parquet",


rule response1:
    input:
        "<results>/responses/response1.parquet",


rule preferences:
    input:
        "<results>/preferences/preferences.parquet",


rule reward_data:
    input:
        "<results>/reward_data/principle_preferences.parquet",


rule pmp_data:
    input:
        "<results>/reward_data/pmp.parquet",


rule pmp:
    input:
        "<results>/models/pmp",


rule reward_model:
    input:
        "<results>/models/reward_model",


rule rl_prompts:
    input:
        "<results>/prompts/rl.parquet",


rule policy:
    input:
        "<results>/runs/default/policy",


rule policies:
    input:
        expand("<results>/runs/{run}/policy", run=RUNS),


rule demo_policy:
    input:
        "<results>/demo_policy",


rule evaluation:
    input:
        "<results>/evaluation",


rule all:
    default_target: True
    input:
        [getattr(rules, target).input for target in settings.targets],
