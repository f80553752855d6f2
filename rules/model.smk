"""The model: what all stages rely on is proven before any of them runs."""


rule check_model:
    input:
        model=initial_policy(),
        judge=judge_model(),
        templates=[
            settings.judge.template,
            settings.pmp.template,
            settings.reward_model.template,
            settings.ppo.template,
            *settings.policy_prompt.files,
        ],
        principles=settings.judge.principles,
    output:
        directory("<results>/check_model"),
    log:
        "<logs>/check_model.log",
    benchmark:
        "<benchmarks>/check_model.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        device="auto",
    params:
        model=settings.model.model_dump_json(),
        policy_prompt=settings.policy_prompt.model_dump_json(),
        sampling=settings.sampling.model_dump_json(),
        judge=settings.judge.model_dump_json(),
        lora=settings.lora.model_dump_json(),
        pmp=settings.pmp.model_dump_json(),
        reward_model=settings.reward_model.model_dump_json(),
        ppo=settings.ppo.model_dump_json(),
        scoring=settings.scoring.model_dump_json(),
    shell:
        "python workflow_scripts/check_model.py"
        " --output {output:q} --model {params.model:q} --policy-prompt {params.policy_prompt:q}"
        " --sampling {params.sampling:q} --judge {params.judge:q} --lora {params.lora:q} --pmp {params.pmp:q}"
        " --reward-model {params.reward_model:q} --ppo {params.ppo:q} --scoring {params.scoring:q} --device {resources.device} > {log:q} 2>&1"
