"""The library behind the workflow's scripts: SALMON (arXiv 2310.05910), with no knowledge of Snakemake."""

import logging

# On every import on a CPU it advises a kernel from the hub; our CPU runs neither need nor fetch one.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
