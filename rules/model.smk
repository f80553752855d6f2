"""The check of the model, which proves what the stages rely on before any of them runs."""


rule check_model:
    input:
        files=checked_files,
        home=at_home("check_{part}"),
    output:
        directory("<results>/{home}check_model/{part}"),
    log:
        "<logs>/{home}check_model/{part}.log",
    benchmark:
        "<benchmarks>/{home}check_model/{part}.tsv"
    wildcard_constraints:
        home=HOME,
        part="sampling|judging|training|rl",
    priority: 100  # a model must be refused before the first long job
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        device="auto",
        free=lambda wildcards: free(**checked_sections(run_name(wildcards))[wildcards.part]),
    params:
        parts=lambda wildcards: json.dumps([wildcards.part]),
        sections=lambda wildcards: [
            word
            for name, section in checked_sections(run_name(wildcards))[wildcards.part].items()
            for word in (f"--{name.replace('_', '-')}", deciding(section))
        ],
    shell:
        f"python {SCRIPTS}/check_model.py"
        " --output {output:q} --parts {params.parts:q} {params.sections:q}"
        " {resources.free}"
        " --device {resources.device:q} > {log:q} 2>&1"
