"""The library behind the workflow's scripts: SALMON (arXiv 2310.05910), with no knowledge of Snakemake."""

import gc
import logging

# On every import on a CPU it recommends a kernel from the hub. CPU runs here neither need nor fetch one.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# While the libraries are imported, the garbage collector scans the same long-lived objects again and again. With this,
# and with the `freeze` of `script.run`, which resets it, `train_policy.py --help` takes 4.8 s instead of 6.3.
COLLECTOR = gc.get_threshold()
gc.set_threshold(100_000, 50, 100)
