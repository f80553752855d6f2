"""The quality of judge, reward models and policies, measured after their training."""


rule evaluate_judge:
    input:
        unpack(labelled_pairs),
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
        labelled=lambda wildcards, input: options(
            judged=input.get("judged_pairs"), labelled=input.get("preferred_outputs")
        ),
        evaluation=setting("evaluation", only=("seed", "judge_pairs")),
    shell:
        f"python {SCRIPTS}/evaluate_judge.py"
        " --preferences {input.preferences:q} {params.labelled:q} --output {output:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"


# Outputs that people prefer, and the other ones, as responses for the judge to compare.
rule clean_judge_pairs:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).evaluation.judge_pairs),
        home=at_home("{which}_outputs"),
    output:
        table="<results>/{home}evaluation/judge_pairs/{which}.parquet",
        manifest="<results>/{home}evaluation/judge_pairs/{which}.manifest.json",
    log:
        "<logs>/{home}clean_judge_pairs/{which}.log",
    benchmark:
        "<benchmarks>/{home}clean_judge_pairs/{which}.tsv"
    wildcard_constraints:
        home=HOME,
        which="preferred|other",
    conda:
        "../envs/data.yaml"
    params:
        evaluation=setting("evaluation", only=("judge_pairs", "min_score_ratio", "seed")),
    shell:
        f"python {SCRIPTS}/clean_judge_pairs.py"
        " --output {output.table:q} --which {wildcards.which:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"


use rule judge_preferences as judge_pairs with:
    input:
        response0=artifact("preferred_outputs"),
        response1=artifact("other_outputs"),
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).judge.template,
        model=lambda wildcards: judge_model(run_name(wildcards)),
        checked=artifact("check_judging"),
        home=at_home("judged_pairs"),
    output:
        table="<results>/{home}evaluation/judge_pairs/judgements.parquet",
        manifest="<results>/{home}evaluation/judge_pairs/judgements.manifest.json",
    log:
        "<logs>/{home}judge_pairs.log",
    benchmark:
        "<benchmarks>/{home}judge_pairs.tsv"
    wildcard_constraints:
        home=HOME,
    resources:
        nodes=1,
        ranks=1,
        batch_size=4,
        tensor_parallel="false",
        free=lambda wildcards: judge_free(run_name(wildcards), shards=1),
    params:
        model=lambda wildcards: judge_settings(run_name(wildcards)),
        judge=measuring_judge,
        shards=1,
        shard=0,


rule clean_evaluation_pairs:
    input:
        sources=lambda wildcards: source_files(run_settings(wildcards).evaluation.pairs),
        pmp_data=[in_results(path) for path in PLAN.trained()["pmp_data"]],
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
        evaluation=setting("evaluation", only=("pairs", "min_score_ratio", "seed")),
        pmp_data=lambda wildcards, input: json.dumps(list(input.pmp_data)),
    shell:
        f"python {SCRIPTS}/clean_evaluation_pairs.py"
        " --output {output.table:q} --evaluation {params.evaluation:q} --pmp-data {params.pmp_data:q} > {log:q} 2>&1"


rule evaluate_reward_model:
    input:
        reward_model=artifact("reward_model"),
        records=lambda wildcards: measuring(wildcards, "reward_data"),
        preferences=lambda wildcards: measuring(wildcards, "preferences"),
        pmp_data=lambda wildcards: measuring(wildcards, "pmp_data"),
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
        measuring=measuring_options,
        model=setting("model", without=("adapter", "adapter_revision")),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="trained",
        settings=setting("reward_model", without=("init", "save_steps")),
        dimensions=lambda wildcards: json.dumps(run_settings(wildcards).aggregation.dimensions),
        evaluation=setting("evaluation", only=("seed",)),
    shell:
        f"{LAUNCH}/evaluate_reward_model.py"
        " --reward-model {input.reward_model:q} {params.measuring:q} --output {output:q}"
        " --principles {input.principles:q} --model {params.model:q} --tokenizer {params.tokenizer:q}"
        " --scoring {params.scoring:q} --{params.stage} {params.settings:q} --dimensions {params.dimensions:q}"
        " {resources.free}"
        " --evaluation {params.evaluation:q} --batch-size {resources.batch_size:q} > {log:q} 2>&1"


# The same for the pre-trained model, which has not learned principles.
use rule evaluate_reward_model as evaluate_pmp with:
    input:
        reward_model=artifact("pmp"),
        records=artifact("pmp_data"),
        preferences=[],
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
        measuring=measuring_options,
        model=setting("model", without=("adapter", "adapter_revision")),
        tokenizer=lambda wildcards: tokenizer_settings(run_name(wildcards)),
        scoring=setting("scoring"),
        stage="pmp",
        settings=setting("pmp"),
        dimensions="[]",
        evaluation=setting("evaluation", only=("seed",)),


rule clean_evaluation_prompts:
    input:
        unpack(trained_tables),
        sources=source_files(settings.evaluation.prompts),
        home=at_home("evaluation_prompts"),
    output:
        table="<results>/{home}evaluation/prompts.parquet",
        manifest="<results>/{home}evaluation/prompts.manifest.json",
    log:
        "<logs>/{home}clean_evaluation_prompts.log",
    benchmark:
        "<benchmarks>/{home}clean_evaluation_prompts.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        evaluation=setting("evaluation", only=("prompts", "seed")),
        trained=lambda wildcards, input: options(
            **{option.replace("_", "-"): json.dumps(list(input[option])) for option in PLAN.trained()}
        ),
    shell:
        f"python {SCRIPTS}/clean_evaluation_prompts.py"
        " --output {output.table:q} --evaluation {params.evaluation:q} {params.trained:q} > {log:q} 2>&1"


rule sample_answers:
    input:
        prompts=artifact("evaluation_prompts"),
        policy=artifact("policy"),
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        home=at_home("answers"),
        engine_base=engine_base("evaluation"),
    output:
        table="<results>/{home}evaluation/answers.parquet",
        manifest="<results>/{home}evaluation/answers.manifest.json",
    log:
        "<logs>/{home}sample_answers.log",
    benchmark:
        "<benchmarks>/{home}sample_answers.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        batch_size=32,
        engine="--engine.memory 0.9",
        free=free_settings("model", "ppo"),
    params:
        policy=lambda wildcards, input: f"--policy {shlex.quote(input.policy)}" if input.policy else "",
        model=setting("model"),
        policy_prompt=setting("policy_prompt"),
        ppo=setting("ppo"),
        evaluation=setting("evaluation", only=("seed", "engine")),
        engine_base=engine_base_option,
    shell:
        f"python {SCRIPTS}/sample_answers.py"
        " --prompts {input.prompts:q} {params.policy} --output {output.table:q} --model {params.model:q}"
        " {resources.free}"
        " --policy-prompt {params.policy_prompt:q} --ppo {params.ppo:q} --evaluation {params.evaluation:q}"
        " --batch-size {resources.batch_size:q} {resources.engine} {params.engine_base} > {log:q} 2>&1"


use rule sample_answers as sample_initial_answers with:
    input:
        prompts=artifact("evaluation_prompts"),
        policy=[],
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        home=at_home("initial_answers"),
        engine_base=engine_base("evaluation"),
    output:
        table="<results>/{home}evaluation/initial_answers.parquet",
        manifest="<results>/{home}evaluation/initial_answers.manifest.json",
    log:
        "<logs>/{home}sample_initial_answers.log",
    benchmark:
        "<benchmarks>/{home}sample_initial_answers.tsv"


rule score_answers:
    input:
        unpack(scorers_input),
        answers=artifact("answers"),
        home=at_home("answer_scores"),
    output:
        table="<results>/{home}evaluation/scores.parquet",
        manifest="<results>/{home}evaluation/scores.manifest.json",
    log:
        "<logs>/{home}score_answers.log",
    benchmark:
        "<benchmarks>/{home}score_answers.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        batch_size=8,
    params:
        scorers=scorers_settings(),
    shell:
        f"{LAUNCH}/score_answers.py"
        " --answers {input.answers:q} --output {output.table:q} --scorers {params.scorers:q}"
        " --batch-size {resources.batch_size:q} > {log:q} 2>&1"


use rule score_answers as score_initial_answers with:
    input:
        unpack(scorers_input),
        answers=artifact("initial_answers"),
        home=at_home("initial_scores"),
    output:
        table="<results>/{home}evaluation/initial_scores.parquet",
        manifest="<results>/{home}evaluation/initial_scores.manifest.json",
    log:
        "<logs>/{home}score_initial_answers.log",
    benchmark:
        "<benchmarks>/{home}score_initial_answers.tsv"


# The judge compares the run's answers (output 1) with its initial policy's (output 2).
use rule judge_preferences as judge_answers with:
    input:
        response0=artifact("answers"),
        response1=artifact("initial_answers"),
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).judge.template,
        model=lambda wildcards: judge_model(run_name(wildcards)),
        checked=artifact("check_judging"),
        home=at_home("answer_judgements"),
    output:
        table="<results>/{home}evaluation/judgements.parquet",
        manifest="<results>/{home}evaluation/judgements.manifest.json",
    log:
        "<logs>/{home}judge_answers.log",
    benchmark:
        "<benchmarks>/{home}judge_answers.tsv"
    wildcard_constraints:
        home=HOME,
    resources:
        nodes=1,
        ranks=1,
        batch_size=4,
        tensor_parallel="false",
        free=lambda wildcards: judge_free(run_name(wildcards), shards=1),
    params:
        model=lambda wildcards: judge_settings(run_name(wildcards)),
        judge=measuring_judge,
        shards=1,
        shard=0,


# The same for another run (`evaluation.against`), whose answers are output 2. The prompts of two runs differ if one of
# them drops prompts that the other does not find too long.
use rule judge_answers as judge_runs with:
    input:
        response0=artifact("answers"),
        response1=opponents_answers,
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).judge.template,
        model=lambda wildcards: judge_model(run_name(wildcards)),
        checked=artifact("check_judging"),
        home=at_home("answers"),
    output:
        table="<results>/{home}evaluation/against/{other}.parquet",
        manifest="<results>/{home}evaluation/against/{other}.manifest.json",
    log:
        "<logs>/{home}judge_runs/{other}.log",
    benchmark:
        "<benchmarks>/{home}judge_runs/{other}.tsv"
    wildcard_constraints:
        home="runs/[^/]+/",
        other="[^/]+",
    resources:
        nodes=1,
        ranks=1,
        batch_size=4,
        tensor_parallel="false",
        free=lambda wildcards: f"{judge_free(run_name(wildcards), shards=1)} --common true",


rule evaluate_policies:
    input:
        tables=[in_results(table) for policy in PLAN.compared() for table in provenance.policy_tables(policy) if table],
        home=at_home("policy_evaluation"),
    output:
        directory("<results>/{home}evaluation/policies"),
    log:
        "<logs>/{home}evaluate_policies.log",
    benchmark:
        "<benchmarks>/{home}evaluate_policies.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        policies=json.dumps(PLAN.compared()),
        evaluation=setting("evaluation", only=("seed",)),
    shell:
        f"python {SCRIPTS}/evaluate_policies.py"
        " --policies {params.policies:q} --output {output:q} --evaluation {params.evaluation:q} > {log:q} 2>&1"
