"""The demo's world: stand-ins for the public data sets, and a small initial policy. `profiles/demo` uses them."""


rule make_demo_data:
    output:
        multiext("<results>/data/", *DEMO_DATA, "manifest.json"),
    log:
        "<logs>/make_demo_data.log",
    benchmark:
        "<benchmarks>/make_demo_data.tsv"
    conda:
        "../envs/data.yaml"
    params:
        folder=subpath(output[0], parent=True),
        seed=settings.seed,
    shell:
        f"python {DEMO}/make_demo_data.py" " --output {params.folder:q} --seed {params.seed} > {log:q} 2>&1"


# The demo's initial policy. demo/model was made by this script with its default settings and two threads, so the demo
# starts at once; nothing depends on this rule.
rule train_demo_policy:
    output:
        directory("<results>/demo_policy"),
    log:
        "<logs>/train_demo_policy.log",
    benchmark:
        "<benchmarks>/train_demo_policy.tsv"
    conda:
        "../envs/model.yaml"
    threads: 2
    shell:
        f"python {DEMO}/train_demo_policy.py" " --output {output:q} --threads {threads} > {log:q} 2>&1"


rule evaluate_demo:
    input:
        model=initial_policy("default"),
        reward_model=artifact("reward_model"),
        pmp=pmp_model,
        policies=expand("<results>/runs/{run}/policy", run=RUNS),
        templates=[settings.judge.template, settings.reward_model.template, *settings.policy_prompt.files],
        principles=settings.judge.principles,
        world=demo_world,
    output:
        pictures_and_tables("<results>/demo_evaluation", "demo", "9. The demo, by its oracles", of_run=False),
    log:
        "<logs>/evaluate_demo.log",
    benchmark:
        "<benchmarks>/evaluate_demo.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        free=free(model=settings.model, judge=settings.judge, ppo=settings.ppo, reward_settings=settings.reward_model),
    params:
        model=deciding(settings.model),
        policy_prompt=deciding(settings.policy_prompt),
        judge=deciding(settings.judge),
        aggregation=deciding(settings.aggregation),
        ppo=deciding(settings.ppo),
        reward_settings=deciding(settings.reward_model),
        scoring=deciding(settings.scoring),
        pmp=lambda wildcards, input: input.pmp or "null",
        policies=lambda wildcards, input: json.dumps(input.policies),
        seed=settings.seed,
    shell:
        f"python {DEMO}/evaluate_demo.py"
        " --output {output:q} --model {params.model:q}"
        " --policy-prompt {params.policy_prompt:q} --judge {params.judge:q} --aggregation {params.aggregation:q}"
        " --ppo {params.ppo:q} --reward-settings {params.reward_settings:q} --reward-model {input.reward_model:q}"
        " --scoring {params.scoring:q} --pmp {params.pmp:q}"
        " {resources.free}"
        " --policies {params.policies:q} --seed {params.seed} --threads {threads} > {log:q} 2>&1"
