"""Folds adapters into the kernels that they adapt."""

from __future__ import annotations

import dataclasses

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert.leaves import Index, Leaf, Leaves, rounded
from llava_sp_jax.convert.loaded import Loaded, is_adapter
from llava_sp_jax.convert.torch_io import FormatError


@dataclasses.dataclass(frozen=True)
class Folded(Leaf):
  """Computes `kernel + scale * A B` in float32 when it is read; rounds it to the kernel's dtype."""

  kernel: Leaf
  lora_a: Leaf
  lora_b: Leaf
  scale: float

  def read(self, index: Index | None = None) -> np.ndarray:
    index = index or (slice(None),) * len(self.shape)
    layers, rows, columns = index
    whole = slice(None)
    kernel = np.array(self.kernel.read(index))  # a copy, because the leaf may own the array
    a = self.lora_a.read((layers, rows, whole)).astype(np.float32)
    b = self.lora_b.read((layers, whole, columns)).astype(np.float32)
    for i in range(len(kernel)):  # layer by layer, because the product is as large as the kernel
      with np.errstate(over="ignore", invalid="ignore"):
        sum_ = kernel[i].astype(np.float32) + self.scale * (a[i] @ b[i])
      if not np.isfinite(sum_).all():
        raise FormatError(f"{self.path}: its adapter at scale {self.scale:g} is too large to fold")
      kernel[i] = rounded(sum_, self.dtype, self.path)
    return kernel


def fold(model: Loaded) -> Loaded:
  """Returns the checkpoint with its LoRA adapters added to the weights that they adapt.

  The result has no adapters, and its config has rank 0. Values are computed when they are read.
  """
  lora = model.config.model.lora
  if not lora.rank:
    return model
  leaves: Leaves = {}
  for path, leaf in model.leaves.items():
    stem = path.rsplit("/", 1)[0]
    if is_adapter(path):
      continue
    a, b = (model.leaves.get(f"{stem}/lora_{letter}") for letter in "ab")
    if path.endswith("/kernel") and a and b:
      leaf = Folded(path, leaf.shape, leaf.dtype, leaf, a, b, lora.alpha / lora.rank)
    leaves[path] = leaf
  plain = dataclasses.replace(model.config.model, lora=config_lib.LoraConfig(rank=0))
  return dataclasses.replace(
    model, leaves=leaves, config=dataclasses.replace(model.config, model=plain)
  )
