#!/bin/bash
# A run on a Cloud TPU slice of several hosts (TPU VMs): train/launch/tpu_vm.sh start|logs|stop
# The hosts know each other from the TPU's metadata. Set up once, on all of them: the repository in CODE with its .venv
# (pip install -e '.[train,tpu]'), and the bucket, which needs its hierarchical namespace, mounted on /bucket:
#   gcsfuse --implicit-dirs BUCKET /bucket
set -euo pipefail
TPU=my-tpu
ZONE=us-east5-a
CODE=openpi_like                         # below the home directory
RUN=/bucket/runs/my_run
TRAIN="configs/finetune_pi0_widowx.py run_dir=$RUN mesh.data=1 mesh.fsdp=-1"

on() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker="$1" --command "$2"; }

case "${1:-}" in
  start)  # also goes on where a run was stopped or lost
    on all "cd $CODE && { nohup .venv/bin/python train/train.py $TRAIN > train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
    ;;
  logs)   # the first host's; --worker=all shows those of all
    on 0 "tail -f $CODE/train.log"
    ;;
  stop)   # one is enough: all save at the same step
    on 0 "kill -TERM \$(cat $CODE/train.pid)"
    ;;
  *)
    sed -n 2,5p "$0"
    exit 2
    ;;
esac
