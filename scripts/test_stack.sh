#!/usr/bin/env bash
# Runs the tests with today's JAX and flax, in a separate environment of Python 3.13 or 3.12.
#
#   bash scripts/test_stack.sh                        the default suite; arguments go to pytest
#   bash scripts/test_stack.sh --short                a real job alone: two steps of each stage on
#                                                     8 simulated devices, a resume, an evaluation
#   bash scripts/test_stack.sh --python FILE ...      with this Python (3.12 or newer)
#
# Without --python, the script looks for python3.13 and python3.12 on PATH, then in pyenv. If there is
# none, it tests nothing and exits with code 77. Comparisons with torch are skipped: it has no CPU build
# for these Pythons.
set -euo pipefail
short=false python=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --short) short=true; shift ;;
    --python)
      [ $# -gt 1 ] || { echo "--python needs a value; see --help" >&2; exit 2; }
      python=$2; shift 2 ;;
    *) break ;;
  esac
done

# Finds Python 3.12 or newer that can create environments (some names that pyenv puts on PATH fail).
usable() { "$1" -c 'import sys, ssl, venv, ensurepip; assert sys.version_info >= (3, 12)'; }

if [ -n "$python" ]; then
  usable "$python" || { echo "$python: expected Python 3.12 or newer with venv" >&2; exit 2; }
else
  for candidate in python3.13 python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1{3,2}.*/bin/python
  do
    if usable "$candidate" 2> /dev/null; then python=$candidate; break; fi
  done
  [ -n "$python" ] || { echo "skipped: no Python 3.12 or 3.13 here; give --python FILE"; exit 77; }
fi

PYTHON=$python
VENV=.cache/stack-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
mkdir -p .cache
prepare_environment test,report,gguf,xlsx
python=$VENV/bin/python
"$python" -c 'import flax, jax, sys
print("Python %d.%d, jax %s, flax %s" % (*sys.version_info[:2], jax.__version__, flax.__version__))'

if ! "$short"; then
  unset XLA_FLAGS
  exec "$python" -m pytest --numprocesses 2 --dist loadfile --durations 20 -rs "$@"
fi

# Runs a user's commands on a model that compiles quickly.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export JAX_PLATFORMS=cpu XLA_FLAGS="$XLA_FLAGS --xla_force_host_platform_device_count=8"
data=$folder/data finetune=$folder/finetune
small=(--config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2 --config.train.log_every=1
  --config.train.batch_size=8 --config.model.tower.layers=1 --config.model.scan_unroll=1)

llava_sp() { printf '\n$ llava-sp %s\n' "$*"; "$python" -m llava_sp_jax "$@"; }
steps() {  # prints the steps that a run has logged
  [ -f "$1/metrics.jsonl" ] || return 0
  "$python" -c 'import json, sys
rows = map(json.loads, open(sys.argv[1]))
print(*(row["step"] for row in rows if "loss" in row))' "$1/metrics.jsonl"
}
expect() { [ "$2" = "$3" ] || { echo "$1: expected $3, found $2" >&2; exit 1; }; }

"$python" scripts/prepare_easy_vqa.py --out "$data"
llava_sp train --config "easy_vqa:stage=pretrain,data=$data" --workdir "$folder/pretrain" \
  --config.train.steps=2 "${small[@]}"
expect "steps of stage 1" "$(steps "$folder/pretrain")" "1 2"

# Stops stage 2 after two steps, and resumes it with the same command.
stage_2=(train --config "easy_vqa:stage=finetune,init=$folder/pretrain,data=$data"
  --workdir "$finetune" --config.train.steps=60 "${small[@]}")
llava_sp "${stage_2[@]}" &
until [[ "$(steps "$finetune")" == "1 2"* ]] || ! kill -0 $!; do sleep 1; done
pkill -TERM -P $! || true  # the command in the background shell
code=0; wait $! || code=$?
expect "code of a run that was asked to stop" "$code" 75
llava_sp "${stage_2[@]}"
expect "steps of stage 2" "$(steps "$finetune")" "$(seq -s " " 60)"

llava_sp eval --checkpoint "$finetune" --data "$data" --limit 16 --out "$folder/eval"
asked=$(wc -l < "$folder/eval/predictions.jsonl")
expect "answers" "$asked" 16
echo "passed: two stages, a resume and an evaluation on 8 simulated devices"
