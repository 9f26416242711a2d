#!/usr/bin/env bash
# Creates the environment and runs format, lint, types and tests. Arguments go to pytest.
#
#   bash scripts/test.sh              the default suite: 15 minutes on two cores
#   bash scripts/test.sh --guards     the slow tests that hold a promise of README or docs: 25 minutes
#   bash scripts/test.sh -m slow      the other slow ones: the same promises in more cases
#
# --guards must be the first argument. It also installs the TPU compiler, tensorboardX and wandb
# (0.8 GB), and skips format, lint and types.
set -euo pipefail
guards=false
[ "${1:-}" != --guards ] || { guards=true; shift; }
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
extras=test,report,gguf,xlsx
"$guards" && extras+=,guards
prepare_environment "$extras"
unset XLA_FLAGS
# A test file stays in one process, so its tests share fixtures. The longest files start first.
bin="${VENV:-.venv}/bin"
tests=("$bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
       --durations 20 -rs)
"$guards" && exec "${tests[@]}" -m "guard and not slow" "$@"
VENV="${VENV:-.venv}" bash scripts/lint.sh
exec "${tests[@]}" "$@"
