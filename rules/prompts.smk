"""Prompts for the synthetic preferences and for RL."""


rule clean_prompts:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).prompts.sources),
        home=at_home("prompts"),
    output:
        table="<results>/{home}prompts/oasst1.parquet",
        manifest="<results>/{home}prompts/oasst1.manifest.json",
    log:
        "<logs>/{home}clean_prompts.log",
    benchmark:
        "<benchmarks>/{home}clean_prompts.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        prompts=setting("prompts"),
    shell:
        f"python {SCRIPTS}/clean_prompts.py" " --output {output.table:q} --prompts {params.prompts:q} > {log:q} 2>&1"


rule clean_rl_prompts:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).rl_prompts.sources),
        tokenizer=lambda wildcards: tokenizer(run_name(wildcards)),
        home=at_home("rl_prompts"),
    output:
        table="<results>/{home}prompts/rl.parquet",
        manifest="<results>/{home}prompts/rl.manifest.json",
    log:
        "<logs>/{home}clean_rl_prompts.log",
    benchmark:
        "<benchmarks>/{home}clean_rl_prompts.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        rl_prompts=setting("rl_prompts"),
        model=lambda wildcards: tokenizer_settings(run_name(wildcards)),
    shell:
        f"python {SCRIPTS}/clean_rl_prompts.py"
        " --output {output.table:q} --rl-prompts {params.rl_prompts:q} --model {params.model:q} > {log:q} 2>&1"
