#!/usr/bin/env bash
# Runs on every worker of a pod: installs, starts training once, follows it, and exits with its code.
#
#   bash scripts/on_worker.sh [--setup COMMAND] -- --config FILE[:OPTIONS] --workdir DIR ...
#   bash scripts/on_worker.sh --stop     saves and stops the training of this worker
#
# Training outlives the connection: it writes train.log in this repository, and the same command
# follows it again. launch_tpu_vm.sh and launch_queued_resource.sh call this script over ssh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

running() { [ -f train.pid ] && kill -0 "$(cat train.pid)" 2> /dev/null; }

setup=
case "${1:-}" in
  --stop)
    running || { echo "nothing to stop" >&2; exit 1; }
    pkill -TERM -P "$(cat train.pid)"
    exit ;;
  --setup) setup=$2; shift 2 ;;
esac
[ "${1:-}" = -- ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
shift

if ! running; then
  [ -z "$setup" ] || bash -c "$setup"
  state=$(cat setup.py pyproject.toml constraints.txt | cksum)
  if [ "$(cat .venv/installed-tpu 2> /dev/null)" != "$state" ]; then  # images have Python 3.10
    PATH=$HOME/.local/bin:$PATH
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --quiet --allow-existing --python 3.11 .venv
    uv pip install --quiet --python .venv -e '.[tpu,gcs]' -c constraints.txt
    echo "$state" > .venv/installed-tpu
  fi
  rm -f train.code
  # A session of its own: it outlives the connection, and the shell around it writes the code.
  # shellcheck disable=SC2016
  setsid bash -c '"$@"; echo $? > train.code' - .venv/bin/llava-sp train "$@" \
    >> train.log 2>&1 < /dev/null &
  echo $! > train.pid
fi
tail -n 20 -F --pid="$(cat train.pid)" train.log 2> /dev/null || true
[ -f train.code ] || { echo "the training was killed; see train.log" >&2; exit 1; }
exit "$(cat train.code)"
