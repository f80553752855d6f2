"""How good judge and reward models are, beside their training."""


rule evaluate_judge:
    input:
        preferences=artifact("preferences"),
        home=at_home("judge_evaluation"),
    output:
        directory("<results>/{home}evaluation/judge"),
    log:
        "<logs>/{home}evaluate_judge.log",
    benchmark:
        "<benchmarks>/{home}evaluate_judge.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        evaluation=setting("evaluation"),
    shell:
        f"python {SCRIPTS}/evaluate_judge.py"
        " --preferences {input.preferences:q} --output {output:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"


rule clean_evaluation_pairs:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).evaluation.pairs),
        home=at_home("evaluation_pairs"),
    output:
        table="<results>/{home}evaluation/pairs.parquet",
        manifest="<results>/{home}evaluation/pairs.manifest.json",
    log:
        "<logs>/{home}clean_evaluation_pairs.log",
    benchmark:
        "<benchmarks>/{home}clean_evaluation_pairs.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        evaluation=setting("evaluation"),
    shell:
        f"python {SCRIPTS}/clean_evaluation_pairs.py"
        " --output {output.table:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"


rule evaluate_reward_model:
    input:
        reward_model=artifact("reward_model"),
        records=artifact("reward_data"),
        pairs=evaluation_pairs,
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).reward_model.template,
        model=lambda wildcards: base_model(run_name(wildcards)),
        home=at_home("reward_evaluation"),
    output:
        directory("<results>/{home}evaluation/reward_model"),
    log:
        "<logs>/{home}evaluate_reward_model.log",
    benchmark:
        "<benchmarks>/{home}evaluate_reward_model.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        batch_size=8,
        free=free_settings("model"),
    params:
        pairs=lambda wildcards, input: f"--pairs {shlex.quote(input.pairs)}" if input.pairs else "",
        model=setting("model", without=("adapter", "adapter_revision")),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="trained",
        settings=setting("reward_model", without=("init", "save_steps")),
        dimensions=lambda wildcards: json.dumps(run_settings(wildcards).aggregation.dimensions),
        evaluation=setting("evaluation"),
    shell:
        f"{LAUNCH}/evaluate_reward_model.py"
        " --reward-model {input.reward_model:q} --records {input.records:q} {params.pairs} --output {output:q}"
        " --principles {input.principles:q} --model {params.model:q} --tokenizer {params.tokenizer:q}"
        " --scoring {params.scoring:q} --{params.stage} {params.settings:q} --dimensions {params.dimensions:q}"
        " {resources.free}"
        " --evaluation {params.evaluation:q} --batch-size {resources.batch_size:q} > {log:q} 2>&1"


# The same of the model of pre-training, which knows no principles.
use rule evaluate_reward_model as evaluate_pmp with:
    input:
        reward_model=artifact("pmp"),
        records=artifact("pmp_data"),
        pairs=evaluation_pairs,
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).pmp.template,
        model=lambda wildcards: base_model(run_name(wildcards)),
        home=at_home("pmp_evaluation"),
    output:
        directory("<results>/{home}evaluation/pmp"),
    log:
        "<logs>/{home}evaluate_pmp.log",
    benchmark:
        "<benchmarks>/{home}evaluate_pmp.tsv"
    params:
        pairs=lambda wildcards, input: f"--pairs {shlex.quote(input.pairs)}" if input.pairs else "",
        model=setting("model", without=("adapter", "adapter_revision")),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="pmp",
        settings=setting("pmp"),
        dimensions="[]",
        evaluation=setting("evaluation"),
