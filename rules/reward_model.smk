"""The reward model: pre-trained on public preferences (PMP), then trained to follow principles."""


rule clean_pmp_data:
    input:
        source_files(settings.pmp_data.sources),
    output:
        table="<results>/reward_data/pmp.parquet",
        manifest="<results>/reward_data/pmp.manifest.json",
    log:
        "<logs>/clean_pmp_data.log",
    benchmark:
        "<benchmarks>/clean_pmp_data.tsv"
    conda:
        "../envs/data.yaml"
    params:
        pmp_data=deciding(settings.pmp_data),
    shell:
        f"python {SCRIPTS}/clean_pmp_data.py" " --output {output.table:q} --pmp-data {params.pmp_data:q} > {log:q} 2>&1"


rule train_reward_model:
    input:
        records=reward_data,
        init=pmp_model,
        template=lambda wildcards: run_settings(wildcards).reward_model.template,
        model=files_of(settings.model.base),
        tokenizer=files_of(own_tokenizer(), tokenizer_files),
        checked="<results>/check_model/training",
        home=at_home("reward_model"),
    output:
        directory("<results>/{home}models/reward_model"),
    log:
        "<logs>/{home}train_reward_model.log",
    benchmark:
        "<benchmarks>/{home}train_reward_model.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        micro_batch_size=4,
        gradient_checkpointing="true",
        deepspeed="null",
        free=lambda wildcards: free(model=settings.model, reward_model=run_settings(wildcards).reward_model),
    params:
        init=lambda wildcards, input: f"--init {shlex.quote(input.init)}" if input.init else "",
        model=deciding(settings.model, without=("adapter", "adapter_revision")),
        lora=deciding(settings.lora),
        tokenizer=TOKENIZER,
        scoring=deciding(settings.scoring),
        stage="reward-model",
        settings=lambda wildcards: deciding(run_settings(wildcards).reward_model, without={"init"}),
    shell:
        f"{LAUNCH}/train_reward_model.py"
        " --records {input.records:q} {params.init} --output {output:q} --model {params.model:q}"
        " --tokenizer {params.tokenizer:q} --lora {params.lora:q} --scoring {params.scoring:q} --{params.stage} {params.settings:q}"
        " {resources.free}"
        " --micro-batch-size {resources.micro_batch_size:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q} > {log:q} 2>&1"


# The same training with other data, starting from the base model.
use rule train_reward_model as train_pmp with:
    input:
        records=rules.clean_pmp_data.output.table,
        init=[],
        template=lambda wildcards: run_settings(wildcards).pmp.template,
        model=files_of(settings.model.base),
        tokenizer=files_of(own_tokenizer(), tokenizer_files),
        checked="<results>/check_model/training",
        home=at_home("pmp"),
    output:
        directory("<results>/{home}models/pmp"),
    log:
        "<logs>/{home}train_pmp.log",
    benchmark:
        "<benchmarks>/{home}train_pmp.tsv"
    resources:
        nodes=1,
        ranks=1,
        micro_batch_size=4,
        gradient_checkpointing="true",
        deepspeed="null",
        free=lambda wildcards: free(model=settings.model, pmp=run_settings(wildcards).pmp),
    params:
        init="",
        model=deciding(settings.model, without=("adapter", "adapter_revision")),
        lora=deciding(settings.lora),
        tokenizer=TOKENIZER,
        scoring=deciding(settings.scoring),
        stage="pmp",
        settings=lambda wildcards: deciding(run_settings(wildcards).pmp),
