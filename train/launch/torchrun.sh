#!/bin/bash
# A run under whatever starts PyTorch jobs: the same command on each node, which sets the variables that torchrun sets.
#   MASTER_ADDR=node0 MASTER_PORT=29500 NODES=4 NODE=0 train/launch/torchrun.sh     and so on, up to NODE=3
# Starters that set WORLD_SIZE and RANK themselves (Kubeflow's PyTorchJob, SageMaker, ...) need the last line alone.
# With torchrun itself (one process per node; its agent holds MASTER_PORT, the trainer takes the next one):
#   torchrun --nnodes 4 --node-rank 0 --nproc-per-node 1 --master-addr node0 --master-port 29500 train/train.py ...
set -euo pipefail
CODE=/shared/openpi_like                 # with its .venv
RUN=/shared/runs/my_run                  # on a file system that all nodes share
TRAIN=(configs/finetune_pi0_widowx.py "run_dir=$RUN" mesh.data=1 mesh.fsdp=-1)
: "${MASTER_ADDR:?}" "${MASTER_PORT:?}"
export MASTER_ADDR MASTER_PORT WORLD_SIZE="${WORLD_SIZE:-$NODES}" RANK="${RANK:-$NODE}"

# logs: each node's own output; progress is that of RANK=0. stop: SIGTERM to one of them, all save and end with 143.
# go on: the same command on all nodes, with another NODES if you like.
cd "$CODE"
exec .venv/bin/python train/train.py "${TRAIN[@]}"
