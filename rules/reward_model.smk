"""The reward model: pre-trained on public preferences (PMP), then trained to follow principles."""


rule clean_pmp_data:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).pmp_data.sources),
        home=at_home("pmp_data"),
    output:
        table="<results>/{home}reward_data/pmp.parquet",
        manifest="<results>/{home}reward_data/pmp.manifest.json",
    log:
        "<logs>/{home}clean_pmp_data.log",
    benchmark:
        "<benchmarks>/{home}clean_pmp_data.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        pmp_data=setting("pmp_data"),
    shell:
        f"python {SCRIPTS}/clean_pmp_data.py" " --output {output.table:q} --pmp-data {params.pmp_data:q} > {log:q} 2>&1"


rule train_reward_model:
    input:
        records=artifact("reward_data"),
        init=pmp_model,
        template=lambda wildcards: run_settings(wildcards).reward_model.template,
        model=lambda wildcards: base_model(run_name(wildcards)),
        checked=artifact("check_training"),
        home=at_home("reward_model"),
    output:
        directory("<results>/{home}models/reward_model"),
    log:
        "<logs>/{home}train_reward_model.log",
    benchmark:
        "<benchmarks>/{home}train_reward_model.tsv"
    wildcard_constraints:
        home=made("reward_model"),
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        tokens_per_pass=4096,
        gradient_checkpointing="auto",
        deepspeed="null",
        free=free_settings("model", "reward_model"),
    params:
        init=lambda wildcards, input: f"--init {shlex.quote(input.init)}" if input.init else "",
        model=setting("model", without=("adapter", "adapter_revision")),
        lora=setting("lora"),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="reward-model",
        settings=setting("reward_model", without=("init", "path", "revision")),
    shell:
        f"{LAUNCH}/train_reward_model.py"
        " --records {input.records:q} {params.init} --output {output:q} --model {params.model:q}"
        " --tokenizer {params.tokenizer:q} --lora {params.lora:q} --scoring {params.scoring:q} --{params.stage} {params.settings:q}"
        " {resources.free}"
        " --tokens-per-pass {resources.tokens_per_pass:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q} > {log:q} 2>&1"


# The same training on other data, starting from the base model.
use rule train_reward_model as train_pmp with:
    input:
        records=artifact("pmp_data"),
        init=[],
        template=lambda wildcards: run_settings(wildcards).pmp.template,
        model=lambda wildcards: base_model(run_name(wildcards)),
        checked=artifact("check_training"),
        home=at_home("pmp"),
    output:
        directory("<results>/{home}models/pmp"),
    log:
        "<logs>/{home}train_pmp.log",
    benchmark:
        "<benchmarks>/{home}train_pmp.tsv"
    wildcard_constraints:
        home=HOME,
    resources:
        nodes=1,
        ranks=1,
        tokens_per_pass=4096,
        gradient_checkpointing="auto",
        deepspeed="null",
        free=free_settings("model", "pmp"),
    params:
        init="",
        model=setting("model", without=("adapter", "adapter_revision")),
        lora=setting("lora"),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="pmp",
        settings=setting("pmp"),
