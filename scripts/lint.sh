#!/usr/bin/env bash
# Checks format, lint and types with the tools of the environment; all, or those that are named.
#
#   bash scripts/lint.sh                  all three
#   bash scripts/lint.sh format lint      some: format, lint, types
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="${VENV:-.venv}/bin"
[ -x "$bin/ruff" ] || { echo "no $bin/ruff: bash scripts/test.sh makes the environment" >&2; exit 2; }
[ $# -gt 0 ] || set -- format lint types
for check in "$@"; do
  case "$check" in
    format) "$bin/ruff" format --check . ;;
    lint) "$bin/ruff" check . ;;
    types) "$bin/mypy" ;;
    *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
  esac
done
