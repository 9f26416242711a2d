"""The original's golden cases, loaded as a user would load them, and rows of their samples."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import formats, projector_names, tables
from llava_sp_jax.data import anyres, decode, example
from llava_sp_jax.models import build

KEPT = Path(__file__).parents[1] / "golden"
GOLDEN = Path(os.environ.get("LLAVA_SP_GOLDEN", KEPT))


@dataclasses.dataclass(frozen=True)
class Spec:
  """Where a case's checkpoint and numbers are; `variant` only where the checkpoint cannot tell it."""

  checkpoint: str
  expected: str
  variant: str = ""
  prefix: str = "single/"  # of the names of single's numbers


def _adapters(name: str, variant: str = "") -> Spec:
  return Spec(f"{name}/llava-lora", f"{name}/expected.npz", variant)


SPECS = {
  **{name: _adapters(name) for name in (
    "cropping", "pooling", "baseline", "cropping_no_dfi", "pooling_dfi", "tokens3", "tokens12",
    "conv224", "multiscale_dfi", "pooling_multiscale_dfi", "single24", "dfi_only", "anyres",
    "siglip", "siglip27",
  )},
  # The transformer's two rows have the same tensors.
  "tfm336": _adapters("tfm336", "cropping_transformer"),
  "tfm336_pool": _adapters("tfm336_pool", "pooling_transformer"),
  "cropping_stage1": Spec("cropping/stage1", "cropping/stage1/expected.npz", prefix=""),
  "pooling_merged": Spec("pooling/merged-llava", "pooling/expected.npz"),
}  # fmt: skip


def cases_of(golden: Path) -> dict[str, Spec]:
  """The cases whose checkpoint and numbers a folder holds."""
  return {
    name: spec
    for name, spec in SPECS.items()
    if (golden / spec.expected).is_file() and (golden / spec.checkpoint).is_dir()
  }


CASES = cases_of(GOLDEN)
TRAINED = tuple(n for n in CASES if (GOLDEN / n / "grads.npz").is_file())


class Case:
  """One golden case, loaded as a user would load it, in float32."""

  def __init__(self, name: str):
    self.name, self.spec = name, CASES[name]
    self.expected = np.load(GOLDEN / self.spec.expected)
    self.inputs = json.loads((GOLDEN / "inputs.json").read_text())
    options = formats.Options(variant=self.spec.variant)
    self.source = formats.open_checkpoint(GOLDEN / self.spec.checkpoint, options)
    self.model = dataclasses.replace(
      self.source.config.model, dtype="float32", frozen_dtype="float32", remat="none"
    )
    flat = {p: leaf.read().astype(np.float32) for p, leaf in self.source.leaves.items()}
    self.params = unflatten_dict(flat, sep="/")
    self.module = build.model(self.model)
    self.variables = {"params": self.params}
    self.reader = self.reader_of(self.source.config.data)
    self.spatial = self.reader.tile.spatial

  def reader_of(self, data: config_lib.DataConfig) -> anyres.Reader:
    return anyres.Reader(data, anyres.Tile(*build.tile_shape(self.model)))

  @functools.cache  # noqa: B019 - a case lives as long as its test
  def picture(self, name: str) -> anyres.Picture:
    return self.reader(decode.read(GOLDEN / "images" / f"{name}.png"))

  def batch(self, samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Right-padded rows of the given samples, as the original's collator makes them."""
    pictures = [[self.picture(name) for name in s["images"]] for s in samples]
    plans = [[p.plan for p in row] for row in pictures]
    room = max(1, *(sum(p.tiles for p in row) for row in plans), 0)
    lengths = [
      len(s["input_ids"]) + sum(len(p.slots) - 1 for p in row)
      for s, row in zip(samples, plans, strict=True)
    ]
    rows = []
    for i, sample in enumerate(samples):
      runs = example.from_labels(sample["input_ids"], sample["labels"])
      row = example.layout(runs, plans[i], max(lengths), room).arrays()
      side = self.model.tower.image_size
      row["images"] = np.zeros((room, side, side, 3), np.float32)
      tiles = [tile for picture in pictures[i] for tile in picture.tiles]
      row["images"][: len(tiles)] = tiles or 0
      rows.append(row)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

  def parts(self) -> dict[str, list[dict[str, Any]]]:
    parts = {"single": [self.inputs["single"]], "batch": self.inputs["batch"]["rows"]}
    if self.name == "anyres":  # other images under the same texts
      named = self.inputs["anyres"]
      parts = {
        "single": [{**parts["single"][0], "images": named["single"]}],
        "batch": [{**s, "images": n} for s, n in zip(parts["batch"], named["batch"], strict=True)],
      }
    return parts

  def torch_arrays(
    self, flat: dict[str, Any], names: list[str]
  ) -> Iterator[tuple[str, np.ndarray]]:
    """Our arrays under the original's names and in its layout."""
    scales = build.view_sizes(self.model)
    rows = tables.LORA + projector_names.projector(
      self.model.projector.variant, self.model.tower.width, scales
    )
    for name in names:
      plain = name.replace(".default.", ".")
      if ".lora_" not in plain:
        plain = plain.removeprefix("base_model.model.")
      match = tables.match(plain, rows)
      assert match, name
      array = np.asarray(flat[match.path])
      yield name, match.layout.to_torch(array if match.layer is None else array[match.layer])


def training_config(case: Case, lr: float, projector_lr: float) -> config_lib.Config:
  return config_lib.Config(
    model=case.model,
    optimizer=config_lib.OptimizerConfig(
      stage="finetune", learning_rate=lr, projector_learning_rate=projector_lr
    ),
    train=config_lib.TrainConfig(steps=20, batch_size=2, loss_chunk=500),
  )


def learning_names(z: Any) -> list[str]:
  """All trained tensors but the two key biases of the detail interaction (norm and linear).

  They shift every key alike, which softmax does not see: their gradient is zero in theory and
  rounding noise in both implementations, and Adam makes full steps of that noise.
  """
  return [n for n in z["names"] if not re.search(r"key_projector\.[01]\.bias", n)]


def probe(x: np.ndarray, count: int) -> np.ndarray:
  """The golden files' sample of a tensor (its README): seeded by the tensor's size."""
  flat = np.ascontiguousarray(x).reshape(-1)
  return flat[np.random.default_rng(flat.size).integers(0, flat.size, count)]


@functools.cache
def case(name: str) -> Case:
  return Case(name)
