#!/usr/bin/env bash
# Trains on TPU slices of a cluster of XPK (github.com/AI-Hypercomputer/xpk): creates a workload, which
# starts the run again after a preemption or an error.
#
#   bash scripts/launch_xpk.sh --name llava --cluster CLUSTER --type v5litepod-16 \
#     --image REGION-docker.pkg.dev/P/R/llava-sp-jax:1 --config configs/finetune_lora.py:size=7b \
#     --workdir gs://BUCKET/runs/finetune --create-flag --project=P [-- --config.train.keep=3]
#
# --dry-run            prints the command, creates nothing
# --slices N           slices of that type (1)
# --restarts N         starts again at most so often (50); XPK counts preemptions, too
# --grace SECONDS      from SIGTERM to SIGKILL, to save (120); a spot node gives less
# --create-flag FLAG   more flags of `xpk workload create` (--project=P, --zone=Z, --priority=high,
#                      --storage=S for a disk that XPK has attached to the cluster)
#
# scripts/container/Dockerfile makes the image. Arguments after -- go to llava-sp train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/pod.sh

cluster='' image='' slices=1 restarts=50 grace=120 missing=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --) shift; train_flags=("$@"); break ;;
    --name | --cluster | --type | --image | --config | --workdir) ;;
    --slices | --restarts | --grace | --create-flag) ;;
    *) fail "unknown option $1" ;;
  esac
  [ $# -gt 1 ] || fail "$1 needs a value"
  if [ "$1" = --create-flag ]; then create_flags+=("$2"); else printf -v "${1#--}" %s "$2"; fi
  shift 2
done
for option in name cluster type image config workdir; do
  [ -n "${!option}" ] || missing+=("--$option")
done
[ ${#missing[@]} -eq 0 ] || fail "missing ${missing[*]}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name: expected a-z, 0-9 and -, found $name"
[[ "$slices $grace " =~ ^([1-9][0-9]*\ ){2}$ && $restarts =~ ^[0-9]+$ ]] ||
  fail "slices, grace, restarts: expected numbers, found $slices $grace $restarts"
[ -f "${config%%:*}" ] || fail "--config: no file ${config%%:*} in $PWD"
[[ $workdir == /* || $workdir == gs://* ]] ||
  fail "--workdir: $workdir is neither a full path (of a storage) nor gs://..."
"$dry_run" || command -v xpk > /dev/null || fail "xpk: not found (pip install xpk)"

# exec, so that llava-sp gets the SIGTERM that XPK passes on. Without the exit codes, XPK takes an error,
# and the code of a run that was asked to stop, for the end of the workload.
run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --num-slices="$slices" --docker-image="$image" --max-restarts="$restarts" \
  --restart-on-exit-codes=1,75 --termination-grace-period-seconds="$grace" "${create_flags[@]}" \
  --command="exec llava-sp$(words train --config "$config" --workdir "$workdir" "${train_flags[@]}")"
echo "stop it (it saves): xpk workload delete --workload=$name --cluster=$cluster"
