"""The paper's stage 2: llava-sp train --config configs/finetune.py:init=runs/pretrain --workdir runs/finetune

Options after the colon, separated by commas: init=<stage 1's run folder>, row=none|pooling|cropping
(as in stage 1), data=<folder with llava_v1_5_mix665k.json and the image folders that it names:
coco, gqa, ocr_vqa, textvqa, vg>, checkpoints=<folder with vicuna-7b-v1.5/ and
clip-vit-large-patch14-336/>.

Instructions train LoRA adapters on the decoder's seven linear layers; patch MLP and spatial tokens
learn at a rate of their own. Model sizes are the defaults of llava_sp_jax/config.py.
"""

from ml_collections import ConfigDict

from llava_sp_jax.config import parse_arg

SAMPLES, BATCH = 665_298, 128  # the original reaches 128 as 8 GPUs x 4 rows x 4 accumulated


def get_config(arg: str = "") -> ConfigDict:
  arg = parse_arg(
    arg, row="cropping", init="runs/pretrain", data="data/llava_finetune", checkpoints="checkpoints"
  )
  # A run of stage 1 knows its own base; without one, the projector starts at random.
  base = {
    "language_model": f"{arg.checkpoints}/vicuna-7b-v1.5",
    "vision_tower": f"{arg.checkpoints}/clip-vit-large-patch14-336",
  }
  return ConfigDict({
    "name": f"llava-sp-7b-{arg.row}-finetune",
    "model": {"projector": {"row": arg.row},
              "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05}},
    "data": {"path": f"{arg.data}/llava_v1_5_mix665k.json", "image_folder": arg.data,
             "tokenizer": f"{arg.checkpoints}/vicuna-7b-v1.5", "template": "v1"},
    "optimizer": {"stage": "finetune", "learning_rate": 2e-4, "projector_learning_rate": 2e-5},
    "train": {"steps": SAMPLES // BATCH, "batch_size": BATCH},
    "init": {"checkpoint": arg.init} if arg.init else base,
  })  # fmt: skip
