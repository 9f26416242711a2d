"""Counts the FLOPs of a training step by formula, independent of the compiled program.

A kernel of N parameters costs 2N FLOPs per token in the forward pass, 2N for the gradient of its
input and 2N for its own gradient. So it costs 6N when it is trainable, 4N when it is frozen and
gradients pass through it, and 2N in a frozen tower. Rematerialized work and padding do not count,
as in the usual definition of MFU (Chowdhery et al. 2022, appendix B). Norms, rotary positions and
softmax are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS, Variant
from llava_sp_jax.models.spatial import DETAIL_STRIDE, EXTRACTORS, VIEWS, detail_size

FORWARD, BACKWARD_INPUT, BACKWARD_KERNEL = 2, 2, 2  # per parameter and token


@dataclasses.dataclass(frozen=True)
class Costs:
  """Holds the FLOPs of a training step for each unit of a batch."""

  position: float  # of the decoder that holds a token, of text or of an image
  pair: float  # (query, key) that attention may see
  image: float  # one tile: tower and projector

  def step(self, positions: float, pairs: float, images: float) -> float:
    """Returns the FLOPs of a batch with so many positions, (query, key) pairs and tiles."""
    return self.position * positions + self.pair * pairs + self.image * images


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Holds the counts of one image that determine how often a kernel of the projector is used."""

  patches: int
  spatial: int
  variant: Variant
  views: tuple[int, ...]
  field: int

  def detail(self, kernel: int) -> int:  # positions of a strided convolution
    return ((self.field - detail_size(kernel, self.field)) // DETAIL_STRIDE + 1) ** 2


# (regex, uses of the kernel per image, whether it reads the tower's features directly); the first
# match wins. A kernel that reads a frozen tower's features has no gradient of its input. The
# kernels of views are in `spatial.EXTRACTORS`.
_Uses = Callable[[_Sizes, re.Match[str]], float]
PROJECTOR: tuple[tuple[str, _Uses, bool], ...] = (
  (r"projector/fc1/kernel", lambda s, m: s.patches, True),
  (r"projector/fc2/kernel", lambda s, m: s.patches, False),
  (r"projector/out/kernel", lambda s, m: s.spatial, False),
  (r"projector/detail_(\d+)/conv/kernel", lambda s, m: s.detail(int(m[1])), True),
  (r"projector/detail_(\d+)/query/kernel", lambda s, m: s.spatial, False),
  (r"projector/detail_(\d+)/(key|value)/kernel", lambda s, m: s.detail(int(m[1])), False),
)
# Parameters that no matmul reads.
NO_MATMUL = r".*(bias|scale|embed|token|query|image_newline)$"


def costs(config: config_lib.ModelConfig, trainable: Callable[[str], bool]) -> Costs:
  """Returns the FLOPs of a training step of a model, for each unit of a batch.

  `trainable` maps a parameter's path to whether it is trained.

  Raises: KeyError for a parameter whose use is not known.
  """
  config = build.unquantized(config)  # codes are multiplied as floats
  shapes = {
    path: leaf.shape for path, leaf in flatten_dict(build.abstract(config), sep="/").items()
  }
  return Costs(
    position=sum(_decoder(path, shape, trainable(path)) for path, shape in shapes.items())
    + _tied_head(config, trainable),
    # scores and weighted values, 2 FLOPs each per channel; both operands of both need gradients
    pair=12.0
    * config.language_model.layers
    * config.language_model.heads
    * config.language_model.head_dim,
    image=_image(config, shapes, trainable),
  )


def _decoder(path: str, shape: tuple[int, ...], trainable: bool) -> float:
  if not path.startswith("language_model/") or re.match(NO_MATMUL, path) or "embed" in path:
    return 0.0
  if not re.search(r"/(kernel|lora_[ab])$", path):
    raise KeyError(f"FLOPs of parameter {path!r} are not known")
  return _size(shape) * (FORWARD + BACKWARD_INPUT + BACKWARD_KERNEL * trainable)


def _tied_head(config: config_lib.ModelConfig, trainable: Callable[[str], bool]) -> float:
  text = config.language_model
  if not text.tie_embeddings:
    return 0.0
  embedding = trainable("language_model/token_embed/embedding")
  return text.vocab_size * text.width * (FORWARD + BACKWARD_INPUT + BACKWARD_KERNEL * embedding)


def _image(
  config: config_lib.ModelConfig,
  shapes: dict[str, tuple[int, ...]],
  trainable: Callable[[str], bool],
) -> float:
  patches = build.patch_grid(config) ** 2
  variant, sizes = VARIANTS[config.projector.variant], build.view_sizes(config)
  field = variant.detail_field(build.patch_grid(config), config.projector.scales)
  counts = _Sizes(patches, build.image_token_count(config) - patches, variant, sizes, field)
  tower_trainable = any(trainable(path) for path in shapes if path.startswith("vision_tower/"))
  positions = patches + ("vision_tower/class_embed" in shapes)
  total = 0.0
  for path, shape in shapes.items():
    if path.startswith("language_model/") or re.match(NO_MATMUL, path):
      continue
    if path.startswith("vision_tower/"):
      first = "patch_embed" in path
      uses: float = patches if first else positions
      passes_on = tower_trainable and not first
    else:
      uses, reads_tower = _uses(path, counts)
      passes_on = tower_trainable or not reads_tower
    each = FORWARD + BACKWARD_INPUT * passes_on + BACKWARD_KERNEL * trainable(path)
    total += _size(shape) * uses * each
  attention = 4.0 * build.tower_layers(config) * config.tower.width * positions**2
  return total + attention * (3 if tower_trainable else 1)


def _uses(path: str, sizes: _Sizes) -> tuple[float, bool]:
  """Returns how often an image uses a projector's kernel, and whether that reads the tower."""
  for pattern, uses, reads_tower in PROJECTOR:
    if match := re.fullmatch(pattern, path):
      return uses(sizes, match), reads_tower
  for view in sizes.variant.views:
    if match := re.fullmatch(rf"projector/{re.escape(view)}_(\d+)/(.*)", path):
      positions = VIEWS[view].positions(sizes.views[int(match[1])])
      for pattern, of_positions, reads_tower in EXTRACTORS[sizes.variant.extractor].uses:
        if re.fullmatch(pattern, match[2]):
          return of_positions(positions), reads_tower
  raise KeyError(f"FLOPs of parameter {path!r} are not known")


def _size(shape: tuple[int, ...]) -> int:
  total = 1
  for side in shape:
    total *= side
  return total
