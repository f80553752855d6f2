"""The initial policy, if `model.adapter` is `sft`: the base model, trained on instructions with answers."""


rule clean_sft_data:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).sft_data.sources),
        home=at_home("sft_data"),
    output:
        table="<results>/{home}sft/examples.parquet",
        manifest="<results>/{home}sft/examples.manifest.json",
    log:
        "<logs>/{home}clean_sft_data.log",
    benchmark:
        "<benchmarks>/{home}clean_sft_data.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        sft_data=setting("sft_data"),
    shell:
        f"python {SCRIPTS}/clean_sft_data.py" " --output {output.table:q} --sft-data {params.sft_data:q} > {log:q} 2>&1"


rule train_sft:
    input:
        examples=artifact("sft_data"),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        model=lambda wildcards: files_of(run_settings(wildcards).model.base),
        checked=artifact("check_training"),
        home=at_home("sft"),
    output:
        directory("<results>/{home}models/sft"),
    log:
        "<logs>/{home}train_sft.log",
    benchmark:
        "<benchmarks>/{home}train_sft.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        tokens_per_pass=4096,
        gradient_checkpointing="auto",
        deepspeed="null",
        free=free_settings("model", "sft"),
    params:
        model=setting("model", without=("adapter", "adapter_revision")),
        lora=setting("lora"),
        policy_prompt=setting("policy_prompt"),
        sft=setting("sft"),
    shell:
        f"{LAUNCH}/train_sft.py"
        " --examples {input.examples:q} --output {output:q} --model {params.model:q} --lora {params.lora:q}"
        " --policy-prompt {params.policy_prompt:q} --sft {params.sft:q}"
        " {resources.free}"
        " --tokens-per-pass {resources.tokens_per_pass:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q} > {log:q} 2>&1"
