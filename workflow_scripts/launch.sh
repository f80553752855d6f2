#!/usr/bin/env bash
# Start a script on every rank: launch.sh NODES RANKS THREADS SCRIPT [ARGUMENT ...]
#   NODES    machines; more than one needs SLURM
#   RANKS    processes on each: one per GPU (on a CPU: any number, over gloo)
#   THREADS  CPU threads for all ranks of a machine together (in a SLURM job: the job's CPUs)
# The failure of any rank ends all of them, with a status other than 0.
#
# In a SLURM job, srun starts the ranks; elsewhere torchrun does. SLURM sends its signals (before the time limit, at a
# preemption) only to processes that slurmstepd has started: a torchrun in between would receive them instead of the
# ranks. Also, srun ends a job on several nodes at the first failure, without waiting for a timeout.
set -euo pipefail

if [[ $1 == --rank ]]; then # srun has started this process: one rank of a step
    ranks=$3
    head=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    # The address by which SLURM itself reaches the node; its name need not resolve.
    MASTER_ADDR=$(scontrol --oneliner show node "$head" | sed -E 's/.* NodeAddr=([^ ]+).*/\1/')
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # two jobs may share a node
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks
    threads=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # of the job, not the number that Snakemake has set
    shift 4
else
    nodes=$1 ranks=$2 threads=$3
    if [[ -n ${SLURM_JOB_ID-} && -z ${SLURM_STEP_ID-} ]]; then # in a job, but not yet in one of its steps
        exec srun --nodes="$nodes" --ntasks=$((nodes * ranks)) --ntasks-per-node="$ranks" --overlap --cpu-bind=none \
            --mpi=none --kill-on-bad-exit=1 --wait=0 bash "$0" --rank "$@"
    fi
    if ((nodes > 1)); then
        echo "$0: $nodes nodes need SLURM (mpi: srun, see profiles/slurm); without it, set nodes to 1" >&2
        exit 2
    fi
    shift 3
fi

export OMP_NUM_THREADS=$((threads > ranks ? threads / ranks : 1))
export MKL_NUM_THREADS=$OMP_NUM_THREADS
# Waiting threads spin only for a moment: with the usual 300,000 rounds, one more busy process on the machine slows down
# the training of small models on a CPU up to a hundred times; with this number alone, it is as fast as without it.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
export TOKENIZERS_PARALLELISM=false

# One process needs no torchrun, except for DeepSpeed, which always needs a process group.
if [[ -n ${RANK-} ]] || { ((ranks == 1)) && [[ $* != *--deepspeed\ *.json* ]]; }; then
    exec python "$@"
fi
exec torchrun --standalone --nproc-per-node "$ranks" "$@"
