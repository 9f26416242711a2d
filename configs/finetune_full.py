"""Full fine-tuning: llava-sp train --config configs/finetune_full.py:size=7b --workdir runs/full

Options after the colon, separated by commas: size=7b|13b (Vicuna v1.5), variant=<one of
models.projector.VARIANTS> (as in stage 1), init=<run folder of stage 1> (default: runs/pretrain; empty:
a random projector), data=<folder with llava_v1_5_mix665k.json and the image folders that it names:
coco, gqa, ocr_vqa, textvqa, vg>, checkpoints=<folder with vicuna-7b-v1.5/ or vicuna-13b-v1.5/, and
clip-vit-large-patch14-336/> (the tokenizer is always read from there, weights only if init is empty).

Trains the whole decoder and the projector at LLaVA-1.5's learning rate (its `finetune.sh`); the tower
is frozen. The paper has no such run. Master copies and moments take 12 bytes for each trainable
parameter.
"""

from ml_collections import ConfigDict

from llava_sp_jax import recipes
from llava_sp_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
  return ConfigDict(
    recipes.llava(
      parse_arg(arg, **recipes.STAGE_2),
      "finetune-full",
      recipes.INSTRUCTIONS,
      {"stage": "finetune_full", "learning_rate": 2e-5, "projector_learning_rate": 2e-5},
    )
  )
