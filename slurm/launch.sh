# What the batch scripts share; they read this file in the repository's root. `launch MODULE ARGUMENT...` becomes an
# srun of one launcher per node, with a process for every GPU that SLURM granted.

source slurm/site.sh
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# An array's jobs differ by the number that stands for %a.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the number alone may mean the whole array
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
fi

nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
processes=$((gpus > 0 ? gpus : 1))
if ((gpus == 0)); then
    echo "This job has no GPU: one process per node, on the CPU."
    export ACCELERATE_USE_CPU=true
elif ! nvidia-smi --list-gpus &>/dev/null; then
    echo "SLURM granted gpu:$gpus but nvidia-smi finds none: processes per node on the CPU: $gpus."
    export ACCELERATE_USE_CPU=true
fi

# On one node port 0 lets Accelerate take a free one. Several nodes need one known to all and not another job's.
port=$((nodes > 1 ? 10000 + SLURM_JOB_ID % 20000 : 0))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$((cpus > processes ? cpus / processes : 1))

# Logs of each process, beside the job's own, and what the run says of its end.
folder=$PWD/slurm-$SLURM_JOB_ID
mkdir -p "$folder"

# On each node. In training a request to stop is for the processes that train: they save and end, and then the
# launcher does.
node='
    if [[ -n ${SURGVQA_EXIT_FILE:-} ]]; then trap "" USR1 TERM; fi
    export TMPDIR=${SURGVQA_SCRATCH:-${TMPDIR:-/tmp}}/surgvqa-$SLURM_JOB_ID-$SLURM_NODEID
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[\${rank}] " # each line of the log says whose it is
    export TRITON_CACHE_DIR=$TMPDIR/triton TORCHINDUCTOR_CACHE_DIR=$TMPDIR/inductor
    mkdir -p "$TMPDIR"
    accelerate launch --machine_rank "$SLURM_NODEID" "$@"
    code=$?
    rm -rf "$TMPDIR"
    exit "$code"
'

# A node that is done early must not have the others killed while they save: they get two minutes.
launch() {
    exec srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=120 bash -c "$node" - \
        --config_file accelerate_configs/multinode.yaml \
        --num_machines "$nodes" --num_processes $((nodes * processes)) \
        --main_process_ip "$first" --main_process_port "$port" \
        --log_dir "$folder" --tee 3 \
        -m "$@"
}
