"""The initial policy, where `model.adapter` is `sft`: the base model, trained on instructions with answers."""


rule clean_sft_data:
    input:
        source_files(settings.sft_data.sources),
    output:
        table="<results>/sft/examples.parquet",
        manifest="<results>/sft/examples.manifest.json",
    log:
        "<logs>/clean_sft_data.log",
    benchmark:
        "<benchmarks>/clean_sft_data.tsv"
    conda:
        "../envs/data.yaml"
    params:
        sft_data=deciding(settings.sft_data),
    shell:
        f"python {SCRIPTS}/clean_sft_data.py" " --output {output.table:q} --sft-data {params.sft_data:q} > {log:q} 2>&1"


rule train_sft:
    input:
        examples=rules.clean_sft_data.output.table,
        template=settings.policy_prompt.files,
        model=files_of(settings.model.base),
        checked="<results>/check_model/training",
    output:
        directory("<results>/models/sft"),
    log:
        "<logs>/train_sft.log",
    benchmark:
        "<benchmarks>/train_sft.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        micro_batch_size=4,
        gradient_checkpointing="true",
        deepspeed="null",
        free=free(model=settings.model, sft=settings.sft),
    params:
        model=deciding(settings.model, without=("adapter", "adapter_revision")),
        lora=deciding(settings.lora),
        policy_prompt=deciding(settings.policy_prompt),
        sft=deciding(settings.sft),
    shell:
        f"{LAUNCH}/train_sft.py"
        " --examples {input.examples:q} --output {output:q} --model {params.model:q} --lora {params.lora:q}"
        " --policy-prompt {params.policy_prompt:q} --sft {params.sft:q}"
        " {resources.free}"
        " --micro-batch-size {resources.micro_batch_size:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q} > {log:q} 2>&1"
