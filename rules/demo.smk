"""The demo's world: stand-ins for the public data sets, and its small initial policy. Used by `profiles/demo`."""


rule make_demo_data:
    output:
        multiext(
            "<results>/data/",
            "oasst1.jsonl",
            "shp.jsonl",
            "hh_rlhf.jsonl",
            "openorca.parquet",
            "sharegpt.json",
            "sharegpt_90k.json",
            "dolly.jsonl",
            "math.jsonl",
            "held_out.jsonl",
            "manifest.json",
        ),
    log:
        "<logs>/make_demo_data.log",
    benchmark:
        "<benchmarks>/make_demo_data.tsv"
    conda:
        "../envs/data.yaml"
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python demo/make_demo_data.py --output {params.folder:q} > {log:q} 2>&1"


# A policy for the demo. The one that is shipped, demo/model, was trained by an earlier recipe of this script, so that the
# demo starts at once; this rule makes another one, and nothing depends on it.
rule train_demo_policy:
    output:
        directory("<results>/demo_policy"),
    log:
        "<logs>/train_demo_policy.log",
    benchmark:
        "<benchmarks>/train_demo_policy.tsv"
    conda:
        "../envs/model.yaml"
    threads: 8
    shell:
        "python demo/train_demo_policy.py --output {output:q} --threads {threads} > {log:q} 2>&1"
