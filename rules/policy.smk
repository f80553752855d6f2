"""RL: one policy per run, trained against a reward model under the run's principles."""


rule train_policy:
    input:
        prompts=artifact("rl_prompts"),
        reward_model=artifact("reward_model"),
        principles=lambda wildcards: run_settings(wildcards).ppo.principles,
        templates=lambda wildcards: [
            run_settings(wildcards).ppo.template,
            *run_settings(wildcards).policy_prompt.files,
        ],
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        checked=artifact("check_rl"),
        engine_base=engine_base("ppo"),
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
        tokens_per_pass=2048,  # with gradients, including padding
        tokens_per_forward_pass=8192,
        gradient_checkpointing="auto",
        deepspeed="null",
        engine="--engine.memory 0.4",  # how vLLM runs, if it samples (docs/engines.md)
        free=free_settings("model", "ppo"),
    params:
        model=setting("model"),
        lora=setting("lora"),
        policy_prompt=setting("policy_prompt"),
        ppo=setting("ppo"),
        scoring=setting("scoring"),
        engine_base=engine_base_option,
    shell:
        f"{LAUNCH}/train_policy.py"
        " --prompts {input.prompts:q} --reward-model {input.reward_model:q} --output {output:q}"
        " {resources.free}"
        " --model {params.model:q} --lora {params.lora:q} --policy-prompt {params.policy_prompt:q}"
        " --ppo {params.ppo:q} --scoring {params.scoring:q} --sampling-batch-size {resources.sampling_batch_size:q}"
        " --tokens-per-pass {resources.tokens_per_pass:q}"
        " --tokens-per-forward-pass {resources.tokens_per_forward_pass:q}"
        " --gradient-checkpointing {resources.gradient_checkpointing:q} --deepspeed {resources.deepspeed:q}"
        " {resources.engine} {params.engine_base} > {log:q} 2>&1"
