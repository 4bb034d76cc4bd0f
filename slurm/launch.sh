# What the batch scripts share; they read this file in the repository's root. `launch MODULE ARGUMENT...` runs one
# launcher per node, with a process for every GPU that SLURM granted, and leaves srun's exit code in `code`.

# What modules and environments run may use variables that are not set, and commands that fail.
set +eu
source slurm/site.sh
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
set -eu

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

# On one node port 0 lets Accelerate take a free one. Several nodes are told one that is free on the first, which is
# where this runs.
port=0
if ((nodes > 1)); then
    port=$(python3 -c 'import socket; free = socket.socket(); free.bind(("", 0)); print(free.getsockname()[1])')
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$((cpus > processes ? cpus / processes : 1))

# The launcher gives its processes 30 seconds to save, unless told otherwise; SLURM may give them more.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# Logs of each process, beside the job's own, and what the run says of its end.
folder=$PWD/slurm-$SLURM_JOB_ID
mkdir -p "$folder"

# On each node. In training a request to stop is for the processes that train: they save and end, and then the
# launcher does.
node='
    if [[ -n ${SURGVQA_EXIT_FILE:-} ]]; then trap "" USR1 TERM; fi
    # A new folder that only this user can write: what is compiled there is run.
    scratch=${SURGVQA_SCRATCH:-${TMPDIR:-/tmp}}
    mkdir -p "$scratch" && TMPDIR=$(mktemp -d "$scratch/surgvqa-$SLURM_JOB_ID-$SLURM_NODEID.XXXXXX") || exit
    export TMPDIR
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[\${rank}] " # each line of the log says whose it is
    export TRITON_CACHE_DIR=$TMPDIR/triton TORCHINDUCTOR_CACHE_DIR=$TMPDIR/inductor
    accelerate launch --machine_rank "$SLURM_NODEID" "$@"
    code=$?
    rm -rf "$TMPDIR"
    exit "$code"
'

# A node that is done early must not have the others killed while they save: they get two minutes. srun runs beside
# this shell, which else would hear of signals only afterwards.
launch() {
    srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=120 bash -c "$node" - \
        --config_file accelerate_configs/multinode.yaml \
        --num_machines "$nodes" --num_processes $((nodes * processes)) \
        --main_process_ip "$first" --main_process_port "$port" \
        --log_dir "$folder" --tee 3 \
        -m "$@" &
    local srun=$!
    while true; do
        wait "$srun" && code=0 || code=$?
        kill -0 "$srun" 2>/dev/null || break # else it was a signal that ended the wait
    done
}
