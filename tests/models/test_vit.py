"""Both kinds of vision tower against transformers' own, with images that patches do not fill."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax.convert import tables
from llava_sp_jax.models.vit import TOWER_VARIANTS, VisionTransformer, patchify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZE, PATCH, WIDTH, LAYERS, HEADS, MLP = 23, 4, 16, 3, 2, 24  # a 5x5 grid; 3 pixels are left over


def reference(variant: str) -> Any:
  """A random tower with every weight far from its default."""
  config = transformers.CONFIG_MAPPING[f"{variant}_vision_model"](
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    image_size=SIZE,
    patch_size=PATCH,
    attn_implementation="eager",
  )
  torch.manual_seed(0)
  model = transformers.AutoModel.from_config(config).eval()
  with torch.no_grad():
    for tensor in model.parameters():
      tensor += 0.2 * torch.randn(tensor.shape)
  return model


def params(model: Any, variant: str, layers: int) -> dict[str, Any]:
  tree: dict[str, Any] = {"layers": {}}
  stacks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for name, tensor in model.state_dict().items():
    name = name if name.startswith("vision_model.") else f"vision_model.{name}"
    if tables.ignored(name):
      continue
    match = tables.match(name, tables.TOWERS[variant])
    assert match, name
    keys = tuple(match.path.split("/")[1:])
    stacks.setdefault(keys, {})[match.layer or 0] = match.layout.to_jax(tensor.numpy())
  for keys, parts in stacks.items():
    place = tree
    for key in keys[:-1]:
      place = place.setdefault(key, {})
    stacked = keys[0] == "layers"
    place[keys[-1]] = np.stack([parts[i] for i in range(layers)]) if stacked else parts[0]
  return tree


@pytest.mark.parametrize("select", [-2, -3])
@pytest.mark.parametrize("variant", TOWER_VARIANTS)
def test_features_equal_those_of_transformers(variant: str, select: int) -> None:
  model = reference(variant)
  images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
  with torch.no_grad():
    out = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
  wanted = out.hidden_states[select].numpy()
  wanted = wanted[:, 1:] if TOWER_VARIANTS[variant].class_token else wanted
  tower = VisionTransformer(variant, SIZE, PATCH, WIDTH, LAYERS, HEADS, MLP, select_layer=select)
  tree = params(model, variant, LAYERS + 1 + select)
  found = jax.jit(tower.apply)({"params": tree}, images)
  assert found.shape == (2, 5, 5, WIDTH)
  np.testing.assert_allclose(
    found.reshape(2, 25, WIDTH), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
  )


def test_every_variant_has_a_table_of_names() -> None:
  assert set(tables.TOWERS) == set(TOWER_VARIANTS)


def test_patchify_drops_the_remainder() -> None:
  images = np.arange(2 * 7 * 7 * 3, dtype=np.float32).reshape(2, 7, 7, 3)
  patches = np.asarray(patchify(images, 3, 2))
  np.testing.assert_array_equal(patches[1, 1], images[1, 0:3, 3:6].reshape(-1))
  np.testing.assert_array_equal(patches[0, 2], images[0, 3:6, 0:3].reshape(-1))
