"""Results of the policies in public benchmarks."""


rule evaluate_tasks:
    input:
        policy=artifact("policy"),
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        tasks=provenance.task_files(settings.evaluation),
        data=list(settings.evaluation.tasks_data.values()),
        home=at_home("task_evaluation"),
    output:
        directory("<results>/{home}evaluation/tasks"),
    log:
        "<logs>/{home}evaluate_tasks.log",
    benchmark:
        "<benchmarks>/{home}evaluate_tasks.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/evaluation.yaml"
    threads: 8
    resources:
        batch_size=16,
        free=free_settings("model"),
    params:
        policy=lambda wildcards, input: f"--policy {shlex.quote(input.policy)}" if input.policy else "",
        model=setting("model"),
        prompt=task_prompt,
        evaluation=setting("evaluation", only=provenance.TASKS),
    shell:
        f"python {SCRIPTS}/evaluate_tasks.py"
        " {params.policy} --output {output:q} --model {params.model:q} {resources.free}"
        " --prompt {params.prompt:q} --evaluation {params.evaluation:q}"
        " --batch-size {resources.batch_size:q} > {log:q} 2>&1"


use rule evaluate_tasks as evaluate_initial_tasks with:
    input:
        policy=[],
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        tasks=provenance.task_files(settings.evaluation),
        data=list(settings.evaluation.tasks_data.values()),
        home=at_home("initial_task_evaluation"),
    output:
        directory("<results>/{home}evaluation/initial_tasks"),
    log:
        "<logs>/{home}evaluate_initial_tasks.log",
    benchmark:
        "<benchmarks>/{home}evaluate_initial_tasks.tsv"


rule answer_mt_bench:
    input:
        policy=artifact("policy"),
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        questions=local_files([settings.evaluation.mt_bench]),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        home=at_home("mt_bench"),
        engine_base=engine_base("evaluation"),
    output:
        directory("<results>/{home}evaluation/mt_bench"),
    log:
        "<logs>/{home}answer_mt_bench.log",
    benchmark:
        "<benchmarks>/{home}answer_mt_bench.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        batch_size=32,
        engine="--engine.memory 0.9",
        free=free_settings("model"),
    params:
        policy=lambda wildcards, input: f"--policy {shlex.quote(input.policy)}" if input.policy else "",
        name=lambda wildcards: run_name(wildcards),
        model=setting("model"),
        policy_prompt=setting("policy_prompt"),
        evaluation=setting("evaluation", only=provenance.MT_BENCH),
        engine_base=engine_base_option,
    shell:
        f"python {SCRIPTS}/answer_mt_bench.py"
        " {params.policy} --name {params.name:q} --output {output:q} --model {params.model:q} {resources.free}"
        " --policy-prompt {params.policy_prompt:q} --evaluation {params.evaluation:q}"
        " --batch-size {resources.batch_size:q} {resources.engine} {params.engine_base} > {log:q} 2>&1"


use rule answer_mt_bench as answer_initial_mt_bench with:
    input:
        policy=[],
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        questions=local_files([settings.evaluation.mt_bench]),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        home=at_home("initial_mt_bench"),
        engine_base=engine_base("evaluation"),
    output:
        directory("<results>/{home}evaluation/initial_mt_bench"),
    log:
        "<logs>/{home}answer_initial_mt_bench.log",
    benchmark:
        "<benchmarks>/{home}answer_initial_mt_bench.tsv"
    params:
        policy="",
        name=lambda wildcards: PLAN.initial_name(run_name(wildcards)),
        model=setting("model"),
        policy_prompt=setting("policy_prompt"),
        evaluation=setting("evaluation", only=provenance.MT_BENCH),
        engine_base=engine_base_option,


# This rule waits for another machine and needs a network and the user's environment, so it does not run on a cluster.
rule judge_by_endpoint:
    input:
        unpack(lambda wildcards: {name: in_results(path) for name, path in PLAN.judged(run_name(wildcards)).items()}),
        questions=local_files([settings.evaluation.mt_bench]),
        template=settings.evaluation.judge_endpoint.template if settings.evaluation.judge_endpoint else [],
        home=at_home("verdicts"),
    output:
        table="<results>/{home}evaluation/verdicts.parquet",
        manifest="<results>/{home}evaluation/verdicts.manifest.json",
    log:
        "<logs>/{home}judge_by_endpoint.log",
    benchmark:
        "<benchmarks>/{home}judge_by_endpoint.tsv"
    wildcard_constraints:
        home=HOME,
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        free=free_settings("evaluation"),
    params:
        judged=lambda wildcards, input: " ".join(
            f"--{name.replace('_', '-')} {shlex.quote(input[name])}" for name in PLAN.judged(run_name(wildcards))
        ),
        evaluation=setting("evaluation", only=provenance.ENDPOINT),
    shell:
        f"python {SCRIPTS}/judge_by_endpoint.py"
        " {params.judged} --output {output.table:q} --evaluation {params.evaluation:q} {resources.free}"
        " > {log:q} 2>&1"
