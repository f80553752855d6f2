#!/usr/bin/env bash
# Start a script on every rank: launch.sh NODES RANKS THREADS SCRIPT [ARGUMENT ...]
#   NODES    machines; more than one needs SLURM
#   RANKS    processes on each: one a GPU (on a CPU: any number, over gloo)
#   THREADS  CPU threads that a machine's ranks have together (in a SLURM job: the CPUs it was given)
# The failure of any rank ends all of them, with a status other than 0.
#
# Inside a SLURM job srun starts the ranks; elsewhere torchrun does. SLURM's own signals (before the time limit, at a
# preemption) go to the processes that slurmstepd has started and to no others, so that an agent of torchrun in
# between would take them for itself; and srun ends a job of many nodes at the first failure without a timeout.
set -euo pipefail

if [[ $1 == --rank ]]; then # srun has started this process: one rank of a step
    ranks=$3
    head=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    # The address by which SLURM itself reaches the node; its name need not resolve.
    MASTER_ADDR=$(scontrol --oneliner show node "$head" | sed -E 's/.* NodeAddr=([^ ]+).*/\1/')
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # two jobs may share a node
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks
    threads=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # of the job, not what Snakemake took for the threads
    shift 4
else
    nodes=$1 ranks=$2 threads=$3
    if [[ -n ${SLURM_JOB_ID-} && -z ${SLURM_STEP_ID-} ]]; then # in a job, and not in a step of it yet
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
# Threads that wait spin for only a moment: with the usual 300,000 rounds, one more busy process on the machine makes
# training of small models on a CPU up to a hundred times slower; with this number alone it is as fast as before.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
export TOKENIZERS_PARALLELISM=false

# One process needs no torchrun, except for DeepSpeed, which wants a process group in any case.
if [[ -n ${RANK-} ]] || { ((ranks == 1)) && [[ $* != *--deepspeed\ *.json* ]]; }; then
    exec python "$@"
fi
exec torchrun --standalone --nproc-per-node "$ranks" "$@"
