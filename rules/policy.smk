"""RL: the policy trained against the reward model, the principles chosen here."""


rule train_policy:
    input:
        prompts=rules.clean_rl_prompts.output.table,
        reward_model=rules.train_reward_model.output,
        principles=settings.ppo.principles,
        templates=[settings.ppo.template, *policy_template()],
        model=initial_policy(),
    output:
        directory("<results>/models/policy"),
    log:
        "<logs>/train_policy.log",
    benchmark:
        "<benchmarks>/train_policy.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        ranks=1,
        sampling_batch_size=32,
        micro_batch_size=4,
        gradient_checkpointing="true",
    params:
        model=settings.model.model_dump_json(),
        lora=settings.lora.model_dump_json(),
        policy_prompt=settings.policy_prompt.model_dump_json(),
        ppo=settings.ppo.model_dump_json(),
    shell:
        "bash workflow_scripts/launch.sh {resources.ranks} {threads} workflow_scripts/train_policy.py"
        " --prompts {input.prompts:q} --reward-model {input.reward_model:q} --output {output:q}"
        " --model {params.model:q} --lora {params.lora:q} --policy-prompt {params.policy_prompt:q}"
        " --ppo {params.ppo:q} --sampling-batch-size {resources.sampling_batch_size}"
        " --micro-batch-size {resources.micro_batch_size}"
        " --gradient-checkpointing {resources.gradient_checkpointing} > {log:q} 2>&1"
