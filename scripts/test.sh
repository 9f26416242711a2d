#!/usr/bin/env bash
# Creates the environment and runs format, lint, types, imports of tests, and tests. Arguments go to pytest.
#
#   bash scripts/test.sh              the default suite: 15 minutes on two cores
#   bash scripts/test.sh models       the tests of a room (a folder of tests/); may be several: data models
#   bash scripts/test.sh models -k projector -x       with options of pytest
#   bash scripts/test.sh --guards     the slow tests that hold a promise of README or docs: 25 minutes
#   bash scripts/test.sh -m slow      the other slow ones: the same promises in more cases
#
# --guards must be the first argument. It also installs the TPU compiler, tensorboardX, wandb, schemathesis and
# sphinx (0.8 GB). --guards and rooms skip all checks but the tests.
set -euo pipefail
guards=false
[ "${1:-}" != --guards ] || { guards=true; shift; }
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests" && pwd)
rooms=()
while [[ "${1:-}" =~ ^[a-z_]+$ ]]; do
  if [ ! -f "$folder/$1/__init__.py" ]; then
    known=$(cd "$folder" && printf '%s\n' */__init__.py | sed 's|/.*||' | paste -sd ' ')
    echo "scripts/test.sh: no room '$1'; known: ${known// /, }" >&2
    exit 2
  fi
  rooms+=("tests/$1")
  shift
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
extras=test,report,gguf,xlsx
"$guards" && extras+=,guards
prepare_environment "$extras"
unset XLA_FLAGS
# A test file stays in one process, so its tests share fixtures. The longest files start first.
bin="${VENV:-.venv}/bin"
tests=("$bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
       --durations 40 -rs ${rooms[@]+"${rooms[@]}"})
"$guards" && exec "${tests[@]}" -m "guard and not slow" "$@"
[ ${#rooms[@]} -gt 0 ] || VENV="${VENV:-.venv}" bash scripts/lint.sh
exec "${tests[@]}" "$@"
