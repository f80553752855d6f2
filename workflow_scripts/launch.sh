#!/usr/bin/env bash
# Start a script on one process a GPU: launch.sh RANKS THREADS SCRIPT [ARGUMENT ...]
#   RANKS    processes on this machine: 1, or the number of GPUs (on a CPU: any, over gloo)
#   THREADS  CPU threads of all of them together
# The failure of any rank ends all of them, with a status other than 0.
set -euo pipefail

ranks=$1 threads=$2
shift 2
export OMP_NUM_THREADS=$((threads > ranks ? threads / ranks : 1))
# Threads that wait spin for only a moment: with the usual 300,000 rounds, one more busy process on the machine makes
# training of small models on a CPU up to a hundred times slower; with this number alone it is as fast as before.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
export TOKENIZERS_PARALLELISM=false

# One process needs no torchrun, except for DeepSpeed, which wants a process group in any case.
if ((ranks == 1)) && [[ $* != *--deepspeed\ *.json* ]]; then
    exec python "$@"
fi
exec torchrun --standalone --nproc-per-node "$ranks" "$@"
