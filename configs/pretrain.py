"""The paper's stage 1: llava-sp train --config configs/pretrain.py --workdir runs/pretrain

Options after the colon, separated by commas: row=none|pooling|cropping, data=<folder with
blip_laion_cc_sbu_558k.json and images/>, checkpoints=<folder with vicuna-7b-v1.5/ and
clip-vit-large-patch14-336/>, init=<a run whose projector is the start> (default: random).

Captions of one image train the patch MLP and the spatial tokens; tower and decoder stay frozen.
Model sizes are the defaults of llava_sp_jax/config.py: Vicuna-7B and CLIP ViT-L/14 at 336 pixels.
"""

from ml_collections import ConfigDict

from llava_sp_jax.config import parse_arg

SAMPLES, BATCH = 558_128, 256  # the original reaches 256 as 8 GPUs x 16 rows x 2 accumulated


def get_config(arg: str = "") -> ConfigDict:
  arg = parse_arg(
    arg, row="cropping", init="", data="data/llava_pretrain", checkpoints="checkpoints"
  )
  base = {
    "language_model": f"{arg.checkpoints}/vicuna-7b-v1.5",
    "vision_tower": f"{arg.checkpoints}/clip-vit-large-patch14-336",
  }
  return ConfigDict({
    "name": f"llava-sp-7b-{arg.row}-pretrain",
    "model": {"projector": {"row": arg.row}},
    "data": {"path": f"{arg.data}/blip_laion_cc_sbu_558k.json", "image_folder": f"{arg.data}/images",
             "tokenizer": f"{arg.checkpoints}/vicuna-7b-v1.5", "template": "plain"},
    # The projector is all that learns, so its rate is the only one in use.
    "optimizer": {"stage": "pretrain", "learning_rate": 1e-3, "projector_learning_rate": 1e-3},
    "train": {"steps": SAMPLES // BATCH, "batch_size": BATCH},
    "init": {"checkpoint": arg.init} if arg.init else base,
  })  # fmt: skip
