"""Synthetic preferences: two responses per prompt, the initial policy's judgements, reward-model data."""


rule sample_responses:
    input:
        prompts=rules.clean_prompts.output.table,
        model=initial_policy(),
        template=settings.policy_prompt.files,
        checked="<results>/check_model/sampling",
        shard=shard_of("responses", "sampling.shards", settings.sampling.shards),
    output:
        table="<results>/responses/response{index}.shards/{shard}.parquet",
        manifest="<results>/responses/response{index}.shards/{shard}.manifest.json",
    log:
        "<logs>/sample_responses/response{index}.{shard}.log",
    benchmark:
        "<benchmarks>/sample_responses/response{index}.{shard}.tsv"
    wildcard_constraints:
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
        free=free(model=settings.model, sampling=settings.sampling),
    params:
        model=deciding(settings.model),
        sampling=deciding(settings.sampling),
        shards=settings.sampling.shards,  # decides which rows are in a shard
        policy_prompt=deciding(settings.policy_prompt),
    shell:
        f"{LAUNCH}/sample_responses.py"
        " --prompts {input.prompts:q} --output {output.table:q} --index {wildcards.index} --shard {wildcards.shard}"
        " {resources.free}"
        " --model {params.model:q} --sampling {params.sampling:q} --policy-prompt {params.policy_prompt:q}"
        " --batch-size {resources.batch_size:q} --tensor-parallel {resources.tensor_parallel:q} > {log:q} 2>&1"


rule judge_preferences:
    input:
        response0="<results>/responses/response0.parquet",
        response1="<results>/responses/response1.parquet",
        principles=settings.judge.principles,
        template=settings.judge.template,
        model=judge_model(),
        checked="<results>/check_model/judging",
        shard=shard_of("judgements", "judge.shards", settings.judge.shards),
    output:
        table="<results>/preferences/preferences.shards/{shard}.parquet",
        manifest="<results>/preferences/preferences.shards/{shard}.manifest.json",
    log:
        "<logs>/judge_preferences/{shard}.log",
    benchmark:
        "<benchmarks>/judge_preferences/{shard}.tsv"
    wildcard_constraints:
        shard=r"\d+",
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        nodes=1,
        ranks=1,
        batch_size=4,
        tensor_parallel="false",
        free=free(model=JUDGE_MODEL, judge=settings.judge.model_copy(update={"model": None})),
    params:
        model=deciding(JUDGE_MODEL),
        judge=deciding(settings.judge, without={"model"}),
        shards=settings.judge.shards,  # decides which rows are in a shard
    shell:
        f"{LAUNCH}/judge_preferences.py"
        " --response0 {input.response0:q} --response1 {input.response1:q} --principles {input.principles:q}"
        " {resources.free}"
        " --output {output.table:q} --shard {wildcards.shard} --model {params.model:q} --judge {params.judge:q}"
        " --batch-size {resources.batch_size:q} --tensor-parallel {resources.tensor_parallel:q} > {log:q} 2>&1"


rule gather_responses:
    input:
        expand("<results>/responses/response{{index}}.shards/{shard}.parquet", shard=range(settings.sampling.shards)),
    output:
        table="<results>/responses/response{index}.parquet",
        manifest="<results>/responses/response{index}.manifest.json",
    log:
        "<logs>/gather_responses/{index}.log",
    benchmark:
        "<benchmarks>/gather_responses/{index}.tsv"
    wildcard_constraints:
        index="[01]",
    conda:
        "../envs/data.yaml"
    params:
        shards=lambda wildcards, input: json.dumps(list(input)),
    shell:
        f"python {SCRIPTS}/gather_shards.py" " --shards {params.shards:q} --output {output.table:q} > {log:q} 2>&1"


# The same, of the other scattered table.
use rule gather_responses as gather_preferences with:
    input:
        expand("<results>/preferences/preferences.shards/{shard}.parquet", shard=range(settings.judge.shards)),
    output:
        table="<results>/preferences/preferences.parquet",
        manifest="<results>/preferences/preferences.manifest.json",
    log:
        "<logs>/gather_preferences.log",
    benchmark:
        "<benchmarks>/gather_preferences.tsv"


rule aggregate_preferences:
    input:
        preferences="<results>/preferences/preferences.parquet",
        response0="<results>/responses/response0.parquet",
        response1="<results>/responses/response1.parquet",
        principles=settings.judge.principles,
        home=at_home("reward_data"),
    output:
        table="<results>/{home}reward_data/principle_preferences.parquet",
        manifest="<results>/{home}reward_data/principle_preferences.manifest.json",
    log:
        "<logs>/{home}aggregate_preferences.log",
    benchmark:
        "<benchmarks>/{home}aggregate_preferences.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/data.yaml"
    params:
        aggregation=lambda wildcards: deciding(run_settings(wildcards).aggregation),
        turn_markers=json.dumps(settings.judge.turn_markers),
    shell:
        f"python {SCRIPTS}/aggregate_preferences.py"
        " --preferences {input.preferences:q} --response0 {input.response0:q} --response1 {input.response1:q}"
        " --principles {input.principles:q} --output {output.table:q} --aggregation {params.aggregation:q}"
        " --turn-markers {params.turn_markers:q} > {log:q} 2>&1"
