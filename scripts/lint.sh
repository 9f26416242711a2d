#!/usr/bin/env bash
# Checks format, lint, types, and that pytest can import every test; all, or those that are named.
# The tools are those of the environment.
#
#   bash scripts/lint.sh                  all four
#   bash scripts/lint.sh format lint      some: format, lint, types, imports
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="${VENV:-.venv}/bin"
[ -x "$bin/ruff" ] || { echo "no $bin/ruff: bash scripts/test.sh makes the environment" >&2; exit 2; }
[ $# -gt 0 ] || set -- format lint types imports
for check in "$@"; do
  case "$check" in
    format) "$bin/ruff" format --check . ;;
    lint) "$bin/ruff" check . ;;
    types) "$bin/mypy" ;;
    imports)  # of all tests, guards and slow ones too; prints only what fails
      collected=$("$bin/python" -m pytest --collect-only -qq -o addopts= 2>&1) || {
        tail -n 40 <<< "$collected"
        exit 1
      }
      echo "every test can be imported"
      ;;
    *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
  esac
done
