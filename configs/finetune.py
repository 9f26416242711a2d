"""Fine-tuning on your data from a checkpoint: llava-sp train --config configs/finetune.py:init=CKPT,data=FILE --workdir runs/mine

Options after the colon, separated by commas: init=<a finished run, or a folder of `llava-sp convert`>,
data=<samples, in any format of docs/data.md>, images=<folder of the image names; default: that of data>,
epochs=1, batch=16 (rows of a step), row_length=2048 (tokens of a row), rank=128 (of new adapters, if
the checkpoint has none; 0: trains the whole decoder), rate=<peak learning rate; default: 2e-4 for
adapters, 2e-5 for the whole decoder>, template=<default: the checkpoint's>, quantize=<nf4, int8, ..: of
the frozen decoder; default: the checkpoint's>, seed=0.

Takes sizes, projector, tokenizer, template and image preparation from the checkpoint. Continues to
train adapters that the checkpoint has. Trains the projector at 2e-5, as the paper's stage 2 does.
"""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.data import sources

# Fields of `config.data` that the checkpoint was trained with.
READ = ("template", "turns", "image_aspect", "image_fit", "image_resample", "grid_pinpoints",
        "patch_merge", "image_mean", "image_std", "images_per_row")  # fmt: skip
RATES = {"finetune": 2e-4, "finetune_full": 2e-5}
CAPTIONS = ("plain", "v0_plain")  # templates of stage 1, which have no questions


def get_config(arg: str = "") -> ConfigDict:
  arg = config_lib.parse_arg(
    arg,
    init="",
    data="",
    images="",
    epochs=1.0,
    batch=16,
    row_length=2048,
    rank=128,
    rate=0.0,
    template="",
    quantize="",
    seed=0,
  )
  missing = [name for name in ("init", "data") if not getattr(arg, name)]
  if missing:
    raise config_lib.ConfigError(
      f"no {' and no '.join(f'{name}=' for name in missing)} after the ':'; expected "
      "configs/finetune.py:init=CKPT,data=FILE"
    )
  if arg.epochs <= 0 or arg.batch < 1 or arg.rank < 0:
    raise config_lib.ConfigError(
      f"expected epochs above 0, batch at least 1, rank at least 0; found {arg.epochs:g}, "
      f"{arg.batch}, {arg.rank}"
    )
  base = runs.read_config(arg.init)
  samples = len(sources.open_path(arg.data, "", lambda image: image))
  lora = base.model.lora
  if not lora.rank:
    lora = dataclasses.replace(lora, rank=arg.rank, alpha=2.0 * arg.rank or lora.alpha)
  template = arg.template or base.data.template
  if template in CAPTIONS:
    raise config_lib.ConfigError(
      f"{arg.init} was trained on captions (template {template!r}), which know no questions; give "
      "template=v1 or another"
    )
  stage = "finetune" if lora.rank else "finetune_full"
  data = {name: getattr(base.data, name) for name in READ}
  tokenizer = Path(arg.init) / "tokenizer"
  model = dataclasses.replace(base.model, lora=lora, quantize=arg.quantize or base.model.quantize)
  return ConfigDict(
    {
      "name": f"finetune-{Path(arg.data).stem}",
      "model": dataclasses.asdict(model),
      "data": {
        **data,
        "template": template,
        "path": arg.data,
        "row_length": arg.row_length,
        "image_folder": arg.images or str(Path(arg.data).parent),
        "tokenizer": str(tokenizer) if tokenizer.is_dir() else base.data.tokenizer,
      },
      "optimizer": {
        "stage": stage,
        "learning_rate": arg.rate or RATES[stage],
        "projector_learning_rate": 2e-5,
      },
      "train": {
        "steps": math.ceil(arg.epochs * samples / arg.batch),
        "batch_size": arg.batch,
        "seed": arg.seed,
      },
      "init": {"checkpoint": arg.init},
    }
  )
