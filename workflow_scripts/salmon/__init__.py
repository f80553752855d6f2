"""The library behind the workflow's scripts: SALMON (arXiv 2310.05910), with no knowledge of Snakemake."""
