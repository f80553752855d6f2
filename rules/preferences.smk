"""Synthetic preferences: two responses per prompt, the initial policy's judgements, and data for the reward model."""


rule sample_responses:
    input:
        prompts=artifact("prompts"),
        model=lambda wildcards: initial_policy(run_name(wildcards)),
        template=lambda wildcards: run_settings(wildcards).policy_prompt.files,
        checked=artifact("check_sampling"),
        shard=shard_of("responses", "sampling.shards"),
        home=at_home("response{index}"),
        engine_base=engine_base("sampling"),
    output:
        table="<results>/{home}responses/response{index}.shards/{shard}.parquet",
        manifest="<results>/{home}responses/response{index}.shards/{shard}.manifest.json",
    log:
        "<logs>/{home}sample_responses/response{index}.{shard}.log",
    benchmark:
        "<benchmarks>/{home}sample_responses/response{index}.{shard}.tsv"
    wildcard_constraints:
        home=made("response0"),
        index="[01]",
        shard=r"\d+",
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        batch_size=32,
        tensor_parallel="false",
        engine="--engine.memory 0.9",  # how vLLM runs, if it samples (docs/engines.md)
        free=free_settings("model", "sampling"),
    params:
        model=setting("model"),
        sampling=setting("sampling", without=("paths",)),
        engine_base=engine_base_option,
        shards=lambda wildcards: run_settings(wildcards).sampling.shards,  # decides which rows are in a shard
        policy_prompt=setting("policy_prompt"),
    shell:
        f"{LAUNCH}/sample_responses.py"
        " --prompts {input.prompts:q} --output {output.table:q} --index {wildcards.index} --shard {wildcards.shard}"
        " {resources.free}"
        " --model {params.model:q} --sampling {params.sampling:q} --policy-prompt {params.policy_prompt:q}"
        " --batch-size {resources.batch_size:q} --tensor-parallel {resources.tensor_parallel:q}"
        " {resources.engine} {params.engine_base} > {log:q} 2>&1"


rule judge_preferences:
    input:
        response0=artifact("response0"),
        response1=artifact("response1"),
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        template=lambda wildcards: run_settings(wildcards).judge.template,
        model=lambda wildcards: judge_model(run_name(wildcards)),
        checked=artifact("check_judging"),
        shard=shard_of("judgements", "judge.shards"),
        home=at_home("preferences"),
    output:
        table="<results>/{home}preferences/preferences.shards/{shard}.parquet",
        manifest="<results>/{home}preferences/preferences.shards/{shard}.manifest.json",
    log:
        "<logs>/{home}judge_preferences/{shard}.log",
    benchmark:
        "<benchmarks>/{home}judge_preferences/{shard}.tsv"
    wildcard_constraints:
        home=made("preferences"),
        shard=r"\d+",
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        batch_size=4,
        tensor_parallel="false",
        free=lambda wildcards: judge_free(run_name(wildcards)),
    params:
        model=lambda wildcards: judge_settings(run_name(wildcards)),
        judge=setting("judge", without=("model", "path")),
        shards=lambda wildcards: run_settings(wildcards).judge.shards,  # decides which rows are in a shard
        shard=lambda wildcards: wildcards.shard,
    shell:
        f"{LAUNCH}/judge_preferences.py"
        " --response0 {input.response0:q} --response1 {input.response1:q} --principles {input.principles:q}"
        " {resources.free}"
        " --output {output.table:q} --shard {params.shard} --model {params.model:q} --judge {params.judge:q}"
        " --batch-size {resources.batch_size:q} --tensor-parallel {resources.tensor_parallel:q} > {log:q} 2>&1"


rule gather_responses:
    input:
        shards=shards_of("{home}responses/response{index}", "sampling"),
        home=at_home("response{index}"),
    output:
        table="<results>/{home}responses/response{index}.parquet",
        manifest="<results>/{home}responses/response{index}.manifest.json",
    log:
        "<logs>/{home}gather_responses/{index}.log",
    benchmark:
        "<benchmarks>/{home}gather_responses/{index}.tsv"
    wildcard_constraints:
        home=made("response0"),
        index="[01]",
    conda:
        "../envs/data.yaml"
    params:
        shards=lambda wildcards, input: json.dumps(list(input.shards)),
    shell:
        f"python {SCRIPTS}/gather_shards.py" " --shards {params.shards:q} --output {output.table:q} > {log:q} 2>&1"


# The same for the other table that is made in shards.
use rule gather_responses as gather_preferences with:
    input:
        shards=shards_of("{home}preferences/preferences", "judge"),
        home=at_home("preferences"),
    output:
        table="<results>/{home}preferences/preferences.parquet",
        manifest="<results>/{home}preferences/preferences.manifest.json",
    log:
        "<logs>/{home}gather_preferences.log",
    benchmark:
        "<benchmarks>/{home}gather_preferences.tsv"
    wildcard_constraints:
        home=made("preferences"),


rule aggregate_preferences:
    input:
        preferences=artifact("preferences"),
        response0=artifact("response0"),
        response1=artifact("response1"),
        principles=lambda wildcards: run_settings(wildcards).judge.principles,
        home=at_home("reward_data"),
    output:
        table="<results>/{home}reward_data/principle_preferences.parquet",
        manifest="<results>/{home}reward_data/principle_preferences.manifest.json",
    log:
        "<logs>/{home}aggregate_preferences.log",
    benchmark:
        "<benchmarks>/{home}aggregate_preferences.tsv"
    wildcard_constraints:
        home=made("reward_data"),
    conda:
        "../envs/data.yaml"
    params:
        aggregation=setting("aggregation", without=("path",)),
        turn_markers=lambda wildcards: json.dumps(run_settings(wildcards).judge.turn_markers),
    shell:
        f"python {SCRIPTS}/aggregate_preferences.py"
        " --preferences {input.preferences:q} --response0 {input.response0:q} --response1 {input.response1:q}"
        " --principles {input.principles:q} --output {output.table:q} --aggregation {params.aggregation:q}"
        " --turn-markers {params.turn_markers:q} > {log:q} 2>&1"
