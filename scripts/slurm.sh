#!/bin/bash
# A stage on a SLURM cluster:  sbatch scripts/slurm.sh configs/sft.yaml [section.field=value ...]
#
# One task per GPU and no launcher: SIGTERM then reaches the processes that save, and nothing kills them after 30 s as
# torchrun and deepspeed do. 60 s more notice than log.grace_seconds (120 by default). A run that was stopped before
# its end, or ended by SIGALRM when that time was over (142), is queued again and continues; an error is not.
#SBATCH --job-name=aurora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

config=${1:?usage: sbatch scripts/slurm.sh CONFIG [section.field=value ...]}
shift
source scripts/setup.sh
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
log=$(mktemp)
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python train_ds.py --config "$@"' bash "$config" "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [ "$status" -eq 142 ] || grep -q "stopped by SIGTERM after step" "$log"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
