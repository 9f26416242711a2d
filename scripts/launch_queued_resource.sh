#!/usr/bin/env bash
# Waits for a Cloud TPU pod slice and trains on it: a queued resource, requested again after every
# preemption.
#
#   bash scripts/launch_queued_resource.sh --name NAME --zone ZONE --type v5litepod-16 \
#     --version v2-alpha-tpuv5-lite --create-flag --spot \
#     --config configs/finetune_lora.py:size=7b --workdir /mnt/share/runs/finetune
#
# The options are those of launch_tpu_vm.sh; --create-flag goes to `gcloud compute tpus
# queued-resources create` (--spot, --valid-until-duration=6h, --reserved, --project=P). Google creates
# the slice when there is capacity, which may take hours or days. This command waits; you can stop it and
# give it again. When the run is complete, delete its resource:
#
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/pod.sh
source scripts/pod_train.sh

queue=(gcloud compute tpus queued-resources)
describe() { run "${queue[@]}" describe "$name" "--zone=$zone" "--format=value(state.state)"; }
create() {
  run "${queue[@]}" create "$name" "--node-id=$name" "--zone=$zone" "--accelerator-type=$type" \
    "--runtime-version=$version" "${create_flags[@]}"
}
delete() { run "${queue[@]}" delete "$name" "--zone=$zone" --force --quiet; }

read_options "$@"
train_until_complete
