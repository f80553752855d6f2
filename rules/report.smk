"""Figures and tables of every stage for Snakemake's report, from the results of the configuration's targets only."""


report: "captions/workflow.rst"


rule draw_funnel:
    input:
        tables=drawn("funnel"),
        home=at_home("funnel"),
    output:
        pictures_and_tables("<results>/{home}report/funnel", "funnel", "1. Data", of_run=False),
    log:
        "<logs>/{home}draw_funnel.log",
    benchmark:
        "<benchmarks>/{home}draw_funnel.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        tables=json.dumps(PLAN.counted()),
    shell:
        f"python {SCRIPTS}/draw_funnel.py" " --tables {params.tables:q} --output {output:q} > {log:q} 2>&1"


rule draw_judge:
    input:
        unpack(drawn_parts("judge_figures")),
        home=at_home("judge_figures"),
    output:
        pictures_and_tables("<results>/{home}report/judge", "judge", "3. Judge"),
    log:
        "<logs>/{home}draw_judge.log",
    benchmark:
        "<benchmarks>/{home}draw_judge.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        shown=shown_option,
        evaluation=setting("evaluation", only=("seed",)),
    shell:
        f"python {SCRIPTS}/draw_judge.py"
        " {params.shown} --output {output:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"


rule draw_reward_model:
    input:
        unpack(drawn_parts("reward_figures")),
        home=at_home("reward_figures"),
    output:
        pictures_and_tables("<results>/{home}report/reward_model", "reward_model", "5. Reward model"),
    log:
        "<logs>/{home}draw_reward_model.log",
    benchmark:
        "<benchmarks>/{home}draw_reward_model.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        title="Reward model",
        shown=shown_option,
    shell:
        f"python {SCRIPTS}/draw_reward_model.py"
        " {params.shown} --title {params.title:q} --output {output:q} > {log:q} 2>&1"


use rule draw_reward_model as draw_pmp with:
    input:
        unpack(drawn_parts("pmp_figures")),
        home=at_home("pmp_figures"),
    output:
        pictures_and_tables("<results>/{home}report/pmp", "pmp", "4. Reward model, PMP"),
    log:
        "<logs>/{home}draw_pmp.log",
    benchmark:
        "<benchmarks>/{home}draw_pmp.tsv"
    params:
        title="Reward model before it learns principles (PMP)",
        shown=shown_option,


use rule draw_reward_model as draw_sft with:
    input:
        unpack(drawn_parts("sft_figures")),
        home=at_home("sft_figures"),
    output:
        pictures_and_tables("<results>/{home}report/sft", "sft", "2. Initial policy"),
    log:
        "<logs>/{home}draw_sft.log",
    benchmark:
        "<benchmarks>/{home}draw_sft.tsv"
    params:
        title="Initial policy (SFT)",
        shown=shown_option,


rule draw_training:
    input:
        policies=drawn("training_figures"),
        home=at_home("training_figures"),
    output:
        pictures_and_tables("<results>/{home}report/training", "training", "6. PPO", of_run=False),
    log:
        "<logs>/{home}draw_training.log",
    benchmark:
        "<benchmarks>/{home}draw_training.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        runs=json.dumps(PLAN.trainings()),
    shell:
        f"python {SCRIPTS}/draw_training.py" " --runs {params.runs:q} --output {output:q} > {log:q} 2>&1"


rule draw_policies:
    input:
        evaluation=artifact("policy_evaluation"),
        home=at_home("policy_figures"),
    output:
        pictures_and_tables("<results>/{home}report/policies", "policies", "7. Policies", of_run=False),
    log:
        "<logs>/{home}draw_policies.log",
    benchmark:
        "<benchmarks>/{home}draw_policies.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    shell:
        f"python {SCRIPTS}/draw_policies.py" " --evaluation {input.evaluation:q} --output {output:q} > {log:q} 2>&1"


rule draw_tasks:
    input:
        measured=drawn("task_figures"),
        home=at_home("task_figures"),
    output:
        pictures_and_tables("<results>/{home}report/tasks", "tasks", "7. Policies, benchmarks", of_run=False),
    log:
        "<logs>/{home}draw_tasks.log",
    benchmark:
        "<benchmarks>/{home}draw_tasks.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        policies=json.dumps(PLAN.asked()),
    shell:
        f"python {SCRIPTS}/draw_tasks.py" " --policies {params.policies:q} --output {output:q} > {log:q} 2>&1"


rule draw_samples:
    input:
        answers=drawn("samples"),
        home=at_home("samples"),
    output:
        pictures_and_tables("<results>/{home}report/samples", "samples", "8. Samples of answers", of_run=False),
    log:
        "<logs>/{home}draw_samples.log",
    benchmark:
        "<benchmarks>/{home}draw_samples.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        policies=json.dumps(PLAN.sampled()),
        sources=json.dumps(PLAN.shown_sources()),
    shell:
        f"python {SCRIPTS}/draw_samples.py"
        " --policies {params.policies:q} --sources {params.sources:q} --output {output:q} > {log:q} 2>&1"
