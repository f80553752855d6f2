"""Imported artifacts, which replace the stages before them: reward models, and tables of the authors' release."""


rule import_authors:
    input:
        files=lambda wildcards: files_of(run_settings(wildcards).reward_model.path),
        model=lambda wildcards: files_of(run_settings(wildcards).model.base, config_file),
        home=at_home("reward_model"),
    output:
        artifact=directory("<results>/{home}models/reward_model"),
    log:
        "<logs>/{home}import_authors.log",
    benchmark:
        "<benchmarks>/{home}import_authors.tsv"
    wildcard_constraints:
        home=imported("reward_model"),
    priority: 100  # a model must be refused before the first long job
    conda:
        "../envs/model.yaml"
    params:
        what="reward_model",
        options=lambda wildcards: [
            *("--path", run_settings(wildcards).reward_model.path),
            *options(revision=run_settings(wildcards).reward_model.revision),
            *("--model", base_settings(run_name(wildcards))),
        ],
    shell:
        f"python {SCRIPTS}/import_authors.py"
        " --what {params.what} --output {output.artifact:q} {params.options:q} > {log:q} 2>&1"


# The same for tables. The order of `sampling.paths` says which file is response0 and which is response1.
use rule import_authors as import_responses with:
    input:
        files=lambda wildcards: run_settings(wildcards).sampling.paths,
        home=at_home("response{index}"),
    output:
        artifact="<results>/{home}responses/response{index}.parquet",
        manifest="<results>/{home}responses/response{index}.manifest.json",
    log:
        "<logs>/{home}import_responses/{index}.log",
    benchmark:
        "<benchmarks>/{home}import_responses/{index}.tsv"
    wildcard_constraints:
        home=imported("response0"),
        index="[01]",
    conda:
        "../envs/data.yaml"
    params:
        what="responses",
        options=lambda wildcards: [
            *(*response_files(wildcards), "--index", wildcards.index),
            *options(**{"cut-at": plan.import_cut(run_settings(wildcards))}),
        ],


use rule import_authors as import_preferences with:
    input:
        files=lambda wildcards: [
            run_settings(wildcards).judge.path,
            *run_settings(wildcards).sampling.paths,
            run_settings(wildcards).judge.principles,
        ],
        home=at_home("preferences"),
    output:
        artifact="<results>/{home}preferences/preferences.parquet",
        manifest="<results>/{home}preferences/preferences.manifest.json",
    log:
        "<logs>/{home}import_preferences.log",
    benchmark:
        "<benchmarks>/{home}import_preferences.tsv"
    wildcard_constraints:
        home=imported("preferences"),
    conda:
        "../envs/data.yaml"
    params:
        what="preferences",
        options=lambda wildcards: [
            *("--path", run_settings(wildcards).judge.path, *response_files(wildcards)),
            *("--principles", run_settings(wildcards).judge.principles),
        ],


use rule import_authors as import_records with:
    input:
        files=lambda wildcards: [
            run_settings(wildcards).aggregation.path,
            run_settings(wildcards).judge.principles,
        ],
        home=at_home("reward_data"),
    output:
        artifact="<results>/{home}reward_data/principle_preferences.parquet",
        manifest="<results>/{home}reward_data/principle_preferences.manifest.json",
    log:
        "<logs>/{home}import_records.log",
    benchmark:
        "<benchmarks>/{home}import_records.tsv"
    wildcard_constraints:
        home=imported("reward_data"),
    conda:
        "../envs/data.yaml"
    params:
        what="records",
        options=lambda wildcards: [
            *("--path", run_settings(wildcards).aggregation.path),
            *("--principles", run_settings(wildcards).judge.principles),
        ],
