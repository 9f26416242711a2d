"""Configs of this package with the sizes of published runs: decoder, rows, mesh, recomputation."""

from __future__ import annotations

from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import topologies
from llava_sp_jax.plan.calibration import Run

DECODERS: dict[str, dict[str, int]] = {
  "16B": {"width": 4096, "heads": 64, "kv_heads": 64, "mlp_width": 28672, "layers": 32},
  "32B": {"width": 8192, "heads": 64, "kv_heads": 64, "mlp_width": 28672, "layers": 32},
  "Llama 3.1 8B": {
    "width": 4096,
    "heads": 32,
    "kv_heads": 8,
    "mlp_width": 14336,
    "layers": 32,
    "vocab_size": 128256,
  },
  "Llama 2 70B": {"width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672, "layers": 80},
}
# Chip -> what a layer keeps for its backward pass, where that is not nothing.
KEPT = {"v5p": "attention"}
TOWER = {"image_size": 28, "width": 128, "layers": 2, "heads": 2, "mlp_width": 256}


def config(run: Run) -> config_lib.Config:
  """The config whose step is predicted for a published run."""
  topology = topologies.topology(run.slice_name)
  sizes: dict[str, Any] = {
    "vocab_size": 32000,
    "head_dim": 128,
    "max_positions": run.length,
    **DECODERS[run.decoder],
  }
  return config_lib.from_dict(
    {
      "name": "published",
      "model": {
        "tower": TOWER,
        "projector": {"variant": "none"},
        "language_model": sizes,
        "lora": {"rank": 0},
        "remat": KEPT.get(topology.chip_name, "full"),
      },
      "data": {"row_length": run.length},
      "optimizer": {"stage": "finetune_full"},
      "train": {"batch_size": run.rows * topology.chips},
      "mesh": {"fsdp": topology.chips},
    }
  )
