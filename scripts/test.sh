#!/usr/bin/env bash
# Makes the environment and passes the tests: format, lint, types, tests. Arguments go to pytest.
#
#   bash scripts/test.sh              the default suite
#   bash scripts/test.sh -m slow      the slow ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test,report,gguf,xlsx
unset XLA_FLAGS
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# A file of tests stays in one process: what its tests share is made once.
.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --durations 20 "$@"
