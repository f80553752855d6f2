"""The demo's world: stand-ins for the public data sets, and a small initial policy. Used by `profiles/demo`."""


rule make_demo_data:
    output:
        directory("<results>/data"),
    log:
        "<logs>/make_demo_data.log",
    benchmark:
        "<benchmarks>/make_demo_data.tsv"
    conda:
        "../envs/data.yaml"
    shell:
        "python demo/make_demo_data.py --output {output:q} > {log:q} 2>&1"
