#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: creates or reuses it, installs, and runs on all its workers.
#
#   bash scripts/launch_tpu_vm.sh --name NAME --zone ZONE --type v5litepod-16 \
#     --version v2-alpha-tpuv5-lite --config configs/finetune_lora.py:size=7b \
#     --workdir /mnt/share/runs/finetune [-- --config.train.save_every=200]
#
# --dry-run            prints every command and runs none
# --setup COMMAND      runs on each worker before training, e.g. to mount the folder with the runs;
#                      it may run more than once
# --create-flag FLAG   goes to `gcloud ... create`, may be repeated: --spot, --project=P, --network=N
#
# The committed state of this repository runs, with the recipe of --config if that is not committed: such
# as the one that `llava-sp plan --search 12 --write FILE.py` writes for a slice. After a preemption the
# pod is created again and the run resumes from its last checkpoint, so --workdir must be
# gs://BUCKET/FOLDER, or a folder that outlives the pod and that all workers see. Keep this terminal open
# (tmux), or give the same command again: it finds a running
# training and follows its log. Arguments after -- go to llava-sp train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/pod.sh
source scripts/pod_train.sh

describe() { run gcloud compute tpus tpu-vm describe "$name" "--zone=$zone" "--format=value(state)"; }
create() {
  run gcloud compute tpus tpu-vm create "$name" "--zone=$zone" "--accelerator-type=$type" \
    "--version=$version" "${create_flags[@]}"
}
delete() { run gcloud compute tpus tpu-vm delete "$name" "--zone=$zone" --quiet; }

read_options "$@"
train_until_complete
