"""Meshes over slices and torus orders of processes, without the machines; what cannot divide."""

from __future__ import annotations

import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.config import MeshConfig as Sizes
from llava_sp_jax.distributed import mesh as mesh_lib


def machines(slices: int, processes: int, devices: int, torus: bool = True) -> list[Any]:
  """Fakes: in each of `slices`, `processes` with `devices`."""
  fakes = []
  for index in range(slices * processes * devices):
    fake = types.SimpleNamespace(
      id=index, process_index=index // devices, platform="cpu", device_kind="fake"
    )
    if torus:
      fake.slice_index = index // (processes * devices)
    fakes.append(fake)
  return fakes


@pytest.mark.parametrize("torus", [True, False])
@pytest.mark.parametrize("sizes", [(2, 4, 2), (4, 2, 2), (4, 4, 1)])
def test_only_data_crosses_slices(sizes: tuple[int, int, int], torus: bool) -> None:
  """By the devices' own slices, or by groups of processes where devices know of none."""
  devices = machines(2, 2, 4, torus)
  placed = mesh_lib.hybrid(sizes, 2, devices)
  assert placed.shape == sizes
  assert {d.id for d in placed.flat} == set(range(16))
  half = sizes[0] // 2
  for index, part in enumerate((placed[:half], placed[half:])):
    assert {d.id // 8 for d in part.flat} == {index}


def test_slices_are_found_or_asked_for() -> None:
  three = machines(3, 1, 4)
  assert mesh_lib.slice_count(Sizes(), three) == 3
  assert mesh_lib.slice_count(Sizes(slices=3), three) == 3
  with pytest.raises(ConfigError, match=r"mesh.slices: 2, but the 12 devices are in 3 slices"):
    mesh_lib.slice_count(Sizes(slices=2), three)
  plain = machines(1, 4, 2, torus=False)
  assert mesh_lib.slice_count(Sizes(), plain) == 1
  assert mesh_lib.slice_count(Sizes(slices=2), plain) == 2


def test_what_slices_cannot_do_is_named() -> None:
  with pytest.raises(ConfigError, match=r"mesh.data: 3 cannot be divided over 2 slices"):
    mesh_lib.hybrid((3, 2, 1), 2, machines(2, 1, 3))
  with pytest.raises(ConfigError, match="1 processes with 8 devices cannot be grouped into 2"):
    mesh_lib.create(Sizes(data=2, slices=2))


@pytest.mark.parametrize(
  ("batch", "accumulate", "message"),
  [
    (12, 1, r"12 rows .* data\*fsdp = 1\*8 = 8 devices of 1 processes; give a multiple of 8$"),
    (24, 2, "24 rows .* in train.accumulate = 2 micro-batches; give a multiple of 16$"),
    (0, 1, "0 rows cannot be divided"),
    (16, 0, "in train.accumulate = 0 micro-batches$"),
  ],
)
def test_a_batch_that_cannot_divide(batch: int, accumulate: int, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    mesh_lib.create(Sizes(), batch, accumulate)
  assert mesh_lib.create(Sizes(), 16, 2).shape["fsdp"] == 8


def fake_mesh(owners: Any) -> Any:
  """A mesh [data, fsdp, tensor] whose devices belong to these processes."""
  owners = np.asarray(owners)
  devices = np.empty(owners.shape, object)
  for place, owner in np.ndenumerate(owners):
    devices[place] = types.SimpleNamespace(process_index=owner)
  return types.SimpleNamespace(
    devices=devices, shape=dict(zip(mesh_lib.AXES, owners.shape, strict=True))
  )


@pytest.mark.parametrize(
  "owners",
  [
    [[[0], [0], [1], [1]]],
    [[[0], [1], [1], [0]]],  # a torus: processes do not hold neighbours
    [[[0, 1], [0, 1]], [[2, 3], [2, 3]]],  # tensor crosses processes
    [[[0, 0], [0, 1]], [[1, 2], [2, 2]]],  # and oddly
  ],
)
def test_each_row_is_made_where_it_is_held_and_owned_once(owners: Any) -> None:
  mesh, batch = fake_mesh(owners), 8
  size = batch // (len(owners) * len(owners[0]))
  held = np.repeat(np.asarray(owners).reshape(batch // size, -1), size, axis=0)
  owned = []
  for process in range(np.max(owners) + 1):
    rows, mine = mesh_lib.rows(mesh, batch, process)
    assert list(rows) == [r for r in range(batch) if process in held[r]]
    owned += list(rows[mine])
  assert sorted(owned) == list(range(batch))


def test_rows_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
  """The path of several processes, for one that holds all."""
  devices = np.array(jax.devices())[[3, 0, 7, 1, 5, 2, 6, 4]].reshape(2, 2, 2)
  mesh = Mesh(devices, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)
  batch = {"x": np.arange(24.0).reshape(8, 3), "y": np.arange(8)}
  plain = mesh_lib.put_batch(batch, mesh)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for placed in (plain, mesh_lib.put_batch(batch, mesh)):
    for name, array in placed.items():
      np.testing.assert_array_equal(np.asarray(array), batch[name])
      assert array.addressable_shards[0].data.shape[0] == 2


@pytest.mark.parametrize(
  ("owners", "process", "held"),
  [([[[0], [0], [1], [1]]], 1, [4, 5, 6, 7]), ([[[0], [1], [1], [0]]], 0, [0, 1, 6, 7])],
)
def test_each_host_puts_its_own_rows(
  monkeypatch: pytest.MonkeyPatch, owners: Any, process: int, held: list[int]
) -> None:
  """What its devices ask for by their places in the whole batch, wherever they lie in its part."""
  asked: dict[tuple[int, ...], Any] = {}
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  monkeypatch.setattr(mesh_lib, "NamedSharding", lambda *_: None)
  monkeypatch.setattr(
    jax, "make_array_from_callback", lambda shape, _, part: asked.setdefault(shape, part)
  )
  mesh_lib.put_batch({"x": np.asarray(held) * 10}, fake_mesh(owners))
  (shape, part), *_ = asked.items()
  assert shape == (8,)
  for start in held[::2]:
    assert part((slice(start, start + 2),)).tolist() == [start * 10, start * 10 + 10]


@pytest.mark.parametrize(
  ("text", "sizes"), [("1,1,2", (1, 1, 2)), ("-1,1,4", (2, 1, 4)), ("2,2,1", (2, 2, 1))]
)
def test_a_mesh_of_a_command_takes_the_first_devices(text: str, sizes: tuple[int, ...]) -> None:
  mesh = mesh_lib.local(text)
  assert mesh is not None
  assert tuple(mesh.shape.values()) == sizes
  assert set(mesh.devices.flat) == set(jax.devices()[: np.prod(sizes)])
  assert mesh_lib.local("") is None


@pytest.mark.parametrize("text", ["2", "1,1,a", "0,1,1", "3,1,-1", "4,4,4", "-1,-1,1"])
def test_a_mesh_that_cannot_be_is_refused(text: str) -> None:
  with pytest.raises(config_lib.ConfigError, match="mesh"):
    mesh_lib.local(text)
