#!/bin/bash
# A run on GPU nodes under Slurm, one process per node with all its GPUs: sbatch train/launch/slurm.sh
#SBATCH --job-name=my_run
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180                # to the processes, so long before the time is up: they save and end
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.log
set -uo pipefail
CODE=/shared/openpi_like                 # with its .venv
RUN=/shared/runs/$SLURM_JOB_NAME         # on a file system that all nodes share
TRAIN=(configs/finetune_pi0_widowx.py "run_dir=$RUN" mesh.data=1 mesh.fsdp=-1)

cd "$CODE" || exit 2
# The coordinator's port follows from the job's number; JAX_COORDINATOR_PORT sets another.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --label .venv/bin/python train/train.py "${TRAIN[@]}"
code=$?
# 143: stopped by SIGTERM and saved, as at the end of the time. Other errors end the job, as they would come again;
# nodes that fail or are taken away requeue it by themselves.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
# logs:  tail -f my_run.log         stop for good:  scancel --signal=TERM JOB, and scancel JOB when it is pending again
