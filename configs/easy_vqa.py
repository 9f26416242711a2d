"""Small LLaVA-SP from scratch on easy-VQA: llava-sp train --config configs/easy_vqa.py:stage=pretrain --workdir runs/pretrain

Options after the colon, separated by commas: variant=none|pooling|cropping or any other variant of the
projector, scales=2+4+8 (sizes of its views in patches; empty: the variant's default),
stage=pretrain|finetune, init=<run folder of stage 1> (finetune), data=<folder of
scripts/prepare_easy_vqa.py>, seed=0, scale=1 (multiplies the steps of both stages).

Uses no pretrained weights: stage 1 also trains the small tower and decoder (in the paper they are
CLIP and Vicuna, and frozen). Stage 2 is the paper's: LoRA on the decoder's seven linear layers, and
the projector at its own learning rate.
"""

from ml_collections import ConfigDict

from llava_sp_jax.config import ConfigError, ModelConfig, from_dict, lookup, parse_arg

TOWER = {"variant": "clip", "image_size": 64, "patch_size": 8, "width": 96, "layers": 3,
         "heads": 2, "mlp_width": 384, "select_layer": -1,
         # Position embeddings as large as patch embeddings: the model learns shapes much earlier.
         "initializer_range": 0.5}  # fmt: skip
TURNS = 8  # questions about an image in one row
BATCH = 8  # rows; their activations fit into the caches of a CPU core


def get_config(arg: str = "") -> ConfigDict:
  arg = parse_arg(
    arg,
    variant="pooling",
    scales="",
    stage="pretrain",
    init="",
    data="data/easy_vqa",
    seed=0,
    scale=1.0,
  )
  projector = {"variant": arg.variant, "token_width": 64, "scales": sizes(arg.scales)}
  image_tokens = tokens_of_an_image(projector)
  stages = {
    "pretrain": {
      "data": {
        "path": f"{arg.data}/captions.json",
        "template": "plain",
        "row_length": image_tokens + 30,
      },
      # With small batches the model learns colors at once, but shapes only at a low learning rate.
      "optimizer": {
        "stage": "pretrain_all",
        "learning_rate": 5e-4,
        "projector_learning_rate": 7e-4,
        "warmup_ratio": 0.05,
      },
      "train": {"steps": int(7000 * arg.scale), "batch_size": BATCH},
      "lora": {"rank": 0},
    },
    "finetune": {
      "data": {
        "path": f"{arg.data}/train.json",
        "template": "v1",
        "turns": "branch",
        "turns_per_row": TURNS,
        "row_length": image_tokens + 32 + 15 * TURNS,
      },
      "optimizer": {"stage": "finetune", "learning_rate": 2e-3, "projector_learning_rate": 1e-3},
      "train": {"steps": int(1500 * arg.scale), "batch_size": BATCH},
      "lora": {"rank": 32, "alpha": 64.0, "dropout": 0.0},
    },
  }
  stage = lookup("stage", arg.stage, stages)
  return ConfigDict(
    {
      "name": f"easy_vqa-{arg.variant}-{arg.stage}",
      "model": {
        "tower": TOWER,
        "language_model": {
          "vocab_size": 512,
          "width": 96,
          "layers": 2,
          "heads": 4,
          "kv_heads": 4,
          "head_dim": 24,
          "mlp_width": 256,
          "initializer_range": 0.1,
        },
        "projector": projector,
        "lora": stage["lora"],
        "dtype": "float32",
        "frozen_dtype": "float32",
        "scan_unroll": 8,
        "remat": "none",
      },
      "data": {
        "image_folder": f"{arg.data}/images",
        "tokenizer": f"{arg.data}/tokenizer",
        "augment": "mirror_shift",
        **stage["data"],
      },
      "optimizer": {"b2": 0.98, **stage["optimizer"]},
      "train": {"seed": arg.seed, "log_every": 100, "save_every": 1000, **stage["train"]},
      "init": {"checkpoint": arg.init},
    }
  )


def sizes(text: str) -> list[int]:
  """Parses `2+4+8` into numbers. Raises: ConfigError."""
  if not text.replace("+", "").isdigit() and text:
    raise ConfigError(f"option scales: expected sizes such as 2+4+8, found {text!r}")
  return [int(size) for size in text.split("+") if size]


def tokens_of_an_image(projector: dict) -> int:
  """Spatial tokens and patches. Raises: ConfigError for a variant or sizes that do not exist."""
  from llava_sp_jax.models import build

  return build.image_token_count(from_dict({"tower": TOWER, "projector": projector}, ModelConfig))
