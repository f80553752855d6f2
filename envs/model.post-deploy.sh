#!/usr/bin/env bash
# Snakemake runs this in the new conda environment: DeepSpeed's set-up imports torch, so it comes last.
set -euo pipefail
DS_BUILD_OPS=0 python -m pip install --no-build-isolation deepspeed==0.19.8
