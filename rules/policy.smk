"""RL: one policy per run, trained against a reward model, the principles chosen here."""


rule train_policy:
    input:
        prompts=rl_prompts_of,
        reward_model=reward_model_of,
        principles=lambda wildcards: run_settings(wildcards).ppo.principles,
        templates=lambda wildcards: [run_settings(wildcards).ppo.template, *settings.policy_prompt.files],
        model=initial_policy(),
        checked="<results>/check_model/rl",
    output:
        directory("<results>/runs/{run}/policy"),
    log:
        "<logs>/runs/{run}/train_policy.log",
    benchmark:
        "<benchmarks>/runs/{run}/train_policy.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        sampling_batch_size=32,
        micro_batch_size=4,
        gradient_checkpointing="true",
        deepspeed="null",
        free=lambda wildcards: free(model=settings.model, ppo=run_settings(wildcards).ppo),
    params:
        model=deciding(settings.model),
        lora=deciding(settings.lora),
        policy_prompt=deciding(settings.policy_prompt),
        ppo=lambda wildcards: deciding(run_settings(wildcards).ppo),
        scoring=deciding(settings.scoring),
    shell:
        f"{LAUNCH}/train_policy.py"
        " --prompts {input.prompts:q} --reward-model {input.reward_model:q} --output {output:q}"
        " {resources.free}"
        " --model {params.model:q} --lora {params.lora:q} --policy-prompt {params.policy_prompt:q}"
        " --ppo {params.ppo:q} --scoring {params.scoring:q} --sampling-batch-size {resources.sampling_batch_size:q}"
        " --micro-batch-size {resources.micro_batch_size:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q} > {log:q} 2>&1"
