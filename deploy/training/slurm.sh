#!/bin/bash
# One model trained on four machines of eight GPUs, a process for each GPU: sbatch deploy/training/slurm.sh
# Two minutes before the time is up (or when it is pre-empted), Slurm sends SIGTERM: the state is saved, vitreous exits
# with 143, and the job goes back into the queue, where the same command goes on from the checkpoint.
# Each process must see all GPUs of its machine (so no --gpus-per-task): jax gives it the one of its number there.
#SBATCH --job-name=vitreous
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Since Slurm 22.05, srun gives each process one core unless it is told again.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
srun --kill-on-bad-exit=1 vitreous train "$DATA" --out "$RUN" \
  --coordinator auto --parallel data --epochs 90 --checkpoint-every 10m --no-report
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
