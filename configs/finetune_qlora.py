"""Stage 2 on a quantized base: llava-sp train --config configs/finetune_qlora.py:size=7b --workdir runs/qlora

Options after the colon, separated by commas: kernels=nf4|int8 (of the decoder's frozen kernels),
size=7b|13b (Vicuna v1.5), variant=<one of models.projector.VARIANTS> (as in stage 1), init=<run folder of
stage 1> (default: runs/pretrain; empty: a random projector), data=<folder with
llava_v1_5_mix665k.json and the image folders that it names: coco, gqa, ocr_vqa, textvqa, vg>,
checkpoints=<folder with vicuna-7b-v1.5/ or vicuna-13b-v1.5/, and clip-vit-large-patch14-336/>
(the tokenizer is always read from there, weights only if init is empty).

Learning rates and adapters are those of finetune_lora.py. The paper has no such run.
"""

from ml_collections import ConfigDict

from llava_sp_jax import recipes
from llava_sp_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
  arg = parse_arg(arg, kernels="nf4", **recipes.STAGE_2)
  return ConfigDict(
    recipes.llava(
      arg,
      f"finetune-qlora-{arg.kernels}",
      recipes.INSTRUCTIONS,
      {"stage": "finetune", "learning_rate": 2e-4, "projector_learning_rate": 2e-5},
      {"lora": recipes.LORA, "quantize": arg.kernels},
    )
  )
