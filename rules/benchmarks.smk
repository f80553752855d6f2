"""What policies reach in benchmarks of others."""


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
        policy_prompt=setting("policy_prompt"),
        evaluation=setting("evaluation", only=provenance.TASKS),
    shell:
        f"python {SCRIPTS}/evaluate_tasks.py"
        " {params.policy} --output {output:q} --model {params.model:q} {resources.free}"
        " --policy-prompt {params.policy_prompt:q} --evaluation {params.evaluation:q}"
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
