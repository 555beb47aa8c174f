#!/bin/bash
# A run on machines that can be reached with ssh: train/launch/by_hand.sh
# The first of HOSTS is where the others connect to. CODE has the repository and its .venv, at the same place everywhere.
set -euo pipefail
HOSTS=(10.0.0.1 10.0.0.2)
PORT=1234                                # free on the first host, and open to the others
CODE=/shared/openpi_like
RUN=/shared/runs/my_run                  # on a file system that all of them share
TRAIN=(configs/finetune_pi0_widowx.py "run_dir=$RUN" mesh.data=1 mesh.fsdp=-1)

for i in "${!HOSTS[@]}"; do
  place=("hosts.coordinator=${HOSTS[0]}:$PORT" "hosts.count=${#HOSTS[@]}" "hosts.rank=$i")
  # In the background: the end of an ssh session would end the program with it.
  ssh "${HOSTS[$i]}" "mkdir -p $RUN && cd $CODE && { nohup .venv/bin/python train/train.py ${TRAIN[*]} ${place[*]} \
    > $RUN/host$i.log 2>&1 < /dev/null & echo \$! > $RUN/host$i.pid; }"
done

cat <<TEXT
logs:     tail -f $RUN/host*.log
stop:     ssh ${HOSTS[0]} 'kill -TERM \$(cat $RUN/host0.pid)'     saves on all hosts and ends them
go on:    this script again, with more or fewer HOSTS if you like
TEXT
