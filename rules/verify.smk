"""Which results are what the configuration says."""


# It makes nothing, and fails where something is stale.
rule verify:
    log:
        "<logs>/verify.log",
    benchmark:
        "<benchmarks>/verify.tsv"
    localrule: True
    conda:
        "../envs/data.yaml"
    shell:
        f"python {SCRIPTS}/verify.py" ' --configuration "$SALMON_CONFIGURATION" 2>&1 | tee {log:q}'
