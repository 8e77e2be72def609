# Sourced by the jobs of this folder, with DATA and their arguments: train, and requeue a job that was
# asked to stop.
shift
[ -x "$ROOT/.venv/bin/python" ] && PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
export PYTHON=${PYTHON:-python3} ROOT

# What torchrun would set; each task adds its own number. --gpus-per-node (not -per-task), because
# each task picks the GPU of its LOCAL_RANK among all of the node.
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${NODES%%$'\n'*}  # the first of them
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS
export GROUP_WORLD_SIZE=$SLURM_JOB_NUM_NODES

trap : TERM USR1  # the training processes answer these; this script waits for them
status=0
# -j counts loader workers per node: here one for each core.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
    exec "$PYTHON" "$ROOT/main_moco.py" "$@"
' main_moco -a resnet50 \
    --epochs 200 --batch-size 256 --lr 0.03 --aug-plus --mlp --cos \
    --moco-align-w 3 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 3 \
    -j $((SLURM_CPUS_PER_TASK * SLURM_NTASKS / SLURM_JOB_NUM_NODES)) \
    --save-dir "${OUT:-results/imagenet_align_uniform}" --resume auto --save-minutes 30 --timeout-minutes 10 \
    "$@" "$DATA" || status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
