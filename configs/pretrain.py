"""The paper's stage 1: llava-sp train --config configs/pretrain.py:size=7b --workdir runs/pretrain

Options after the colon, separated by commas: size=7b|13b (Vicuna v1.5), variant=<one of
models.projector.VARIANTS>, data=<folder with blip_laion_cc_sbu_558k.json and images/>,
checkpoints=<folder with vicuna-7b-v1.5/ or vicuna-13b-v1.5/, and clip-vit-large-patch14-336/>,
init=<a run whose projector is trained on> (default: random).

Trains the patch MLP and the spatial tokens with captions of one image; tower and decoder are frozen.
"""

from ml_collections import ConfigDict

from llava_sp_jax import recipes
from llava_sp_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
  return ConfigDict(
    recipes.llava(
      parse_arg(arg, **recipes.STAGE_1),
      "pretrain",
      recipes.CAPTIONS,
      # Only the projector is trained, so no other rate is used.
      {"stage": "pretrain", "learning_rate": 1e-3, "projector_learning_rate": 1e-3},
    )
  )
