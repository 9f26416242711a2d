#!/usr/bin/env bash
# Trains on a real language model: SmolLM2-135M from its GGUF -> both stages -> evaluation -> report.
#
#   bash scripts/easy_vqa_smollm2.sh                 writes runs/smollm2/pooling-0/report/report.md
#   bash scripts/easy_vqa_smollm2.sh --scale 4       four times the steps of both stages
#   bash scripts/easy_vqa_smollm2.sh --variant cropping another variant: none, pooling, cropping
#   bash scripts/easy_vqa_smollm2.sh --tower-steps 0 stage 1 trains the tower as well
#
# There is no pretrained vision tower here. So the tower is first trained with the small decoder of
# configs/easy_vqa.py on the captions (--tower-steps 4000). Then it is frozen as in the paper, and stage
# 1 trains the projector alone. With --tower-steps 0, stage 1 trains a random tower as well.
#
# Other options: --seed 0, --limit 500 (test questions to answer; 0 is all 9,673), --runs FOLDER,
# --data FOLDER, --publish OUT (copies the report to OUT/ and its figures with their stamp to
# OUT.json). The same command resumes a killed job.
set -euo pipefail
variant=pooling seed=0 scale=1 limit=500 runs=runs/smollm2 data=data/easy_vqa tower_steps=4000 publish=
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
while [ $# -gt 0 ]; do
  [ "$1" != --row ] || set -- --variant "${@:2}" # its former name
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --variant | --seed | --scale | --limit | --runs | --data | --publish)
      [ $# -gt 1 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    --tower-steps)
      [ $# -gt 1 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
      tower_steps=$2; shift 2 ;;
    *) echo "unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
[[ $tower_steps =~ ^[0-9]{1,9}$ ]] ||
  { echo "--tower-steps: expected a whole number, found ${tower_steps@Q}; see --help" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment report,gguf

python=$VENV/bin/python
config=configs/easy_vqa_smollm2.py
tokenizer=$data/tokenizer_smollm2
base=$runs/$variant-$seed
options="variant=$variant,seed=$seed,scale=$scale,data=$data,tokenizer=$tokenizer"

# Prints a command and runs `llava-sp ...`.
llava_sp() { printf '\n$ llava-sp %s\n' "$*"; "$python" -m llava_sp_jax.cli "$@"; }

"$python" scripts/prepare_easy_vqa.py --out "$data"
if [ ! -f "$tokenizer/tokenizer_config.json" ]; then
  gguf=$("$python" -c "import runpy; print(runpy.run_path('$config')['gguf_path']())")
  llava_sp tokenizer "$gguf" "$tokenizer"
fi
tower=
if [ "$tower_steps" -gt 0 ]; then
  tower=$base/tower
  llava_sp train --config="configs/easy_vqa.py:stage=pretrain,variant=none,seed=$seed,data=$data" \
    --workdir="$tower" --config.train.steps="$tower_steps" --config.data.row_length=66 \
    --config.model.tower.image_size=48 --config.model.tower.patch_size=8 \
    --config.model.tower.width=96 --config.model.tower.layers=3 --config.model.tower.heads=2 \
    --config.model.tower.mlp_width=384
fi
llava_sp train --config="$config:stage=pretrain,tower=$tower,$options" --workdir="$base/pretrain"
llava_sp train --config="$config:stage=finetune,init=$base/pretrain,$options" \
  --workdir="$base/finetune"
llava_sp eval --checkpoint="$base/finetune" --data="$data" --out="$base/eval" --limit="$limit"
llava_sp report --runs "$base/pretrain" "$base/finetune" --scores="$base/eval" \
  --out="$base/report"
if [ -n "$publish" ]; then
  cp -r "$base/report/." "$publish"
  "$python" -c 'import json, sys; from pathlib import Path; from llava_sp_jax import provenance
provenance.write(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), command=sys.argv[3])' \
    "$publish" "$base/report/scores.json" \
    "bash scripts/easy_vqa_smollm2.sh --variant $variant --seed $seed --scale $scale --limit $limit"
fi
