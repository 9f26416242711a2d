#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: applies a JobSet, which starts the run again after a
# preemption, until it is complete.
#
#   bash scripts/launch_gke.sh --name llava --image REGION-docker.pkg.dev/P/R/llava-sp-jax:1 \
#     --accelerator tpu-v5-lite-podslice --topology 4x4 --claim share \
#     --config configs/finetune_lora.py:size=7b --workdir /mnt/share/runs/finetune [-- --config.train.keep=3]
#
# --dry-run            prints the manifest, applies nothing
# --claim NAME         the PersistentVolumeClaim (ReadWriteMany) that outlives the pods
# --mount FOLDER       where it is in the pods (/mnt/share); --workdir lies in it
# --chips-per-host N   chips of a node (4): 8 for ct5lp-hightpu-8t and ct6e-standard-8t
# --slices N           slices of that topology (1)
# --restarts N         starts again after so many errors (3); preemptions do not count
# --grace SECONDS      from SIGTERM to SIGKILL, to save (120); a spot node gives less
# --spot               nodes that can be preempted
#
# scripts/container/Dockerfile makes the image. The cluster, of the present kubectl context, needs JobSet
# (jobset.sigs.k8s.io) and node pools with these labels: --accelerator tpu-v4-podslice,
# tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu7x. Arguments after -- go to llava-sp train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2034 # used in gke.sh
name='' image='' accelerator='' topology='' claim='' config='' workdir='' mount=/mnt/share
chips_per_host=4 slices=1 restarts=3 grace=120 spot='' dry_run=false train_flags=() missing=()
fail() { echo "launch_gke.sh: $*; see --help" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --spot) spot='cloud.google.com/gke-spot: "true"'; shift; continue ;;
    --) shift; train_flags=("$@"); break ;;
    --name | --image | --accelerator | --topology | --claim | --config | --workdir) ;;
    --mount | --chips-per-host | --slices | --restarts | --grace) ;;
    *) fail "unknown option $1" ;;
  esac
  [ $# -gt 1 ] || fail "$1 needs a value"; option=${1#--}
  printf -v "${option//-/_}" %s "$2"; shift 2
done
for option in name image accelerator topology claim config workdir; do
  [ -n "${!option}" ] || missing+=("--$option")
done
[ ${#missing[@]} -eq 0 ] || fail "missing ${missing[*]}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name: expected a-z, 0-9 and -, found $name"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology: expected 4x4 or 2x2x4, found $topology"
[[ "$chips_per_host $slices $grace " =~ ^([1-9][0-9]*\ ){3}$ && $restarts =~ ^[0-9]+$ ]] ||
  fail "chips, slices, grace, restarts: expected numbers, found $chips_per_host $slices $grace $restarts"
[ -f "${config%%:*}" ] || fail "--config: no file ${config%%:*} in $PWD"
[[ $workdir == "$mount"/* ]] || fail "--workdir: $workdir is not in $mount, where the claim is"
source scripts/gke.sh
