#!/usr/bin/env bash
# Runs the demo: easy-VQA -> stage 1 -> stage 2 -> evaluation -> report.
#
#   bash scripts/demo.sh                       writes runs/easy_vqa/pooling-0/report/report.md
#   bash scripts/demo.sh --variant cropping    another variant: none, pooling, cropping, ...
#   bash scripts/demo.sh --help                all options
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in
  *" --help "* | *" -h "*) exec python3 scripts/run_easy_vqa.py --help ;;  # needs no environment
esac
prepare_environment report,gguf
exec "$VENV/bin/python" scripts/run_easy_vqa.py "$@"
