"""The model that an engine samples from, if it cannot read the base model's weights."""


rule dequantize_base:
    input:
        model=lambda wildcards: files_of(run_settings(wildcards).model.base),
        home=at_home("engine_base"),
    output:
        directory("<results>/{home}models/engine_base"),
    log:
        "<logs>/{home}dequantize_base.log",
    benchmark:
        "<benchmarks>/{home}dequantize_base.tsv"
    wildcard_constraints:
        home=HOME,
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        free=free_settings("model"),
    params:
        model=setting("model", without=("adapter", "adapter_revision")),
    shell:
        f"python {SCRIPTS}/dequantize_base.py"
        " --output {output:q} --model {params.model:q} {resources.free} > {log:q} 2>&1"
