#!/usr/bin/env bash
# Trains on GPUs under SLURM with one process for each GPU. The job requeues itself after its time limit
# and after a preemption, until the run is complete.
#
#   bash scripts/launch_slurm.sh --nodes 2 --gpus-per-node 8 --time 24:00:00 \
#     --config configs/finetune_lora.py:size=7b --workdir runs/finetune [-- --config.train.keep=3]
#
# --dry-run            prints the commands and the job's script, submits nothing
# --name NAME          name of the job (llava-sp)
# --cpus N             CPUs for each GPU (8)
# --grace SECONDS      signals training to save this long before the time limit (300)
# --setup COMMAND      runs in the job's script before training, e.g. 'module load cuda'
# --sbatch-flag FLAG   goes to sbatch, may be repeated: --partition=P, --account=A, --qos=Q
#
# This repository and --workdir must be on a disk that all nodes see. Create .venv there with
# `pip install -e '.[cuda]' -c constraints.txt`. Arguments after -- go to llava-sp train.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nodes='' gpus_per_node='' time='' config='' workdir='' name=llava-sp cpus=8 grace=300 setup=':'
dry_run=false flags=() train_flags=() missing=()
fail() { echo "launch_slurm.sh: $*; see --help" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --) shift; train_flags=("$@"); break ;;
    --nodes | --gpus-per-node | --time | --config | --workdir | --name | --cpus | --grace | --setup) ;;
    --sbatch-flag) ;;
    *) fail "unknown option $1" ;;
  esac
  [ $# -gt 1 ] || fail "$1 needs a value"; option=${1#--}
  if [ "$1" = --sbatch-flag ]; then flags+=("$2"); else printf -v "${option//-/_}" %s "$2"; fi
  shift 2
done
for option in nodes gpus_per_node time config workdir; do
  [ -n "${!option}" ] || missing+=("--${option//_/-}")
done
[ ${#missing[@]} -eq 0 ] || fail "missing ${missing[*]}"
numbers="$nodes $gpus_per_node $cpus $grace "
[[ $numbers =~ ^([1-9][0-9]*\ ){4}$ ]] || fail "nodes, GPUs, CPUs, grace: expected 1 or more, found $numbers"
[ -f "${config%%:*}" ] || fail "--config: no file ${config%%:*} in $PWD"

printf -v train ' %q' .venv/bin/llava-sp train --config "$config" --workdir "$workdir" "${train_flags[@]}"
command=(sbatch "--job-name=$name" "--nodes=$nodes" "--gpus-per-node=$gpus_per_node"
  "--ntasks-per-node=$gpus_per_node" "--cpus-per-task=$cpus" "--time=$time" "--signal=TERM@$grace"
  --requeue --open-mode=append "--output=$workdir/slurm-%j.log" "${flags[@]}")
script="#!/usr/bin/env bash
$setup
srun --kill-on-bad-exit=1 --gpu-bind=none$train
code=\$?
if [ \"\$code\" -eq 75 ]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi  # saved before the end
exit \"\$code\""
printf '$'; printf ' %q' "${command[@]}"; printf ' <<EOF\n%s\nEOF\n' "$script"
if "$dry_run"; then exit 0; fi
[ -x .venv/bin/llava-sp ] || fail "no .venv/bin/llava-sp in $PWD"
command -v sbatch > /dev/null || fail "sbatch: not found; run this on a login node of the cluster"
mkdir -p "$workdir"
"${command[@]}" <<< "$script"
