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


rule all:
    default_target: True
    input:
        rules.train_policy.output,


rule prompts:
    input:
        rules.clean_prompts.output,


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
        rules.aggregate_preferences.output,


rule pmp_data:
    input:
        rules.clean_pmp_data.output,


rule pmp:
    input:
        rules.train_pmp.output,


rule reward_model:
    input:
        rules.train_reward_model.output,


rule rl_prompts:
    input:
        rules.clean_rl_prompts.output,


rule policy:
    input:
        rules.train_policy.output,
