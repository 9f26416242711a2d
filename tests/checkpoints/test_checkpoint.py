"""Checkpoints of a run: which are kept, which is opened, what is said of damage; keys that may change."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import manager, on_disk, runs
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import loop
from tests.checkpoints.config_keys import another, changed, keys
from tests.conftest import ConfigMaker

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
  """`keep` of them, and one more while it is written: what docs/pods.md sizes the disk by."""
  checkpoints = manager.Checkpoints(tmp_path, keep)
  for step in range(1, 6):
    checkpoints.save(step, {"a": jnp.full(3, step)}, {"b": jnp.zeros(2)}, {"step": step})
    assert len(list((tmp_path / "checkpoints").iterdir())) <= keep + 1
  checkpoints.close()
  assert on_disk.steps(tmp_path) == list(range(6 - keep, 6))


def test_a_step_that_orbax_skips_is_an_error(tmp_path: Path) -> None:
  """As where another process has saved a later one there."""
  with manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, {"a": jnp.zeros(3)}, {"b": jnp.zeros(2)}, {})
    checkpoints.save(5, {"a": jnp.zeros(3)}, {"b": jnp.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="step 4 was not saved, as step 5 is there"):
      checkpoints.save(4, {"a": jnp.zeros(3)}, {"b": jnp.zeros(2)}, {})


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
  with pytest.raises(CheckpointError, match=r"not a run folder \(no config.json\)"):
    runs.read_config(tmp_path)


def test_a_run_without_a_checkpoint_is_named(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  runs.write_config(tmp_path, tiny_config())
  with pytest.raises(CheckpointError, match=r"no checkpoint yet .*; train it first"):
    runs.saved(tmp_path)


def test_a_config_survives_the_folder(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  runs.write_config(tmp_path, tiny_config())
  assert runs.read_config(tmp_path) == tiny_config()
  assert not list(tmp_path.glob("*.part"))


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  config = tiny_config(model={"language_model": {"vocab_size": 64}})
  with pytest.raises(ValueError, match=r"data.tokenizer: \d+ tokens, but .*vocab_size is 64"):
    loop.train(config, tmp_path / "run")


# What may be given otherwise when a run goes on; everything else decides its numbers or its files.
MAY_CHANGE = {
  "config.train.log_every",
  "config.train.save_every",
  "config.train.keep",
  "config.train.local_folder",
  "config.train.local_every",
  "config.train.sinks",
  "config.train.peak_tflops",
  "config.train.preflight",
  "config.train.validate_every",
  "config.train.validate_batches",
  "config.train.max_nonfinite",
  "config.train.peer_seconds",
  "config.train.stall_seconds",
  "config.data.threads",
  "config.data.source",  # what is read is compared, not where and how it is kept
  "config.data.path",
  "config.data.mixture",  # its sources are compared one by one
  "config.data.image_folder",
  "config.data.processes",
  "config.data.validation_path",
  "config.mesh.data",
  "config.mesh.fsdp",
  "config.mesh.tensor",
  "config.mesh.base",
  "config.mesh.slices",
  "config.evaluate.every",
  "config.evaluate.task",
  "config.evaluate.data",
  "config.evaluate.limit",
  "config.evaluate.batch_size",
}


@pytest.mark.parametrize("key", [key for key, _ in keys(config_lib.Config())])
def test_every_key_is_refused_when_a_run_goes_on_unless_it_is_listed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
  config = config_lib.Config()
  runs.write_config(tmp_path, config)
  old = dict(keys(config))[key]
  other = changed(config, key.removeprefix("config."), another(old))
  runs.check_config(tmp_path, other)  # nothing was trained yet
  monkeypatch.setattr(runs, "steps", lambda folder: [3])
  runs.check_config(tmp_path, config)
  if key in MAY_CHANGE:
    runs.check_config(tmp_path, other)
    return
  with pytest.raises(CheckpointError) as error:
    runs.check_config(tmp_path, other)
  (line,) = (x.strip() for x in str(error.value).splitlines() if x.startswith("  "))
  assert line == f"{key}: {another(old)!r} here, {old!r} there"


def test_the_list_names_keys_that_there_are() -> None:
  assert {key for key, _ in keys(config_lib.Config())} >= MAY_CHANGE


def test_parameters_come_back_from_the_newest_of_several(tmp_path: Path) -> None:
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  made = manager.Checkpoints(tmp_path, keep=3)
  assert made.latest is None
  for step in (1, 2, 4):
    params = {"a/x": jax.device_put(jnp.full(3, float(step)), place)}
    made.save(step, params, {"m": params["a/x"] + 1}, {"told": step})
  made.close()
  made = manager.Checkpoints(tmp_path, keep=3)
  assert made.latest == 4
  like = jax.device_put(jnp.zeros(3), place)
  number, params, moments, about = made.restore({"a/x": like}, {"m": like})
  assert (number, about) == (4, {"told": 4, "step": 4})
  np.testing.assert_array_equal(params["a/x"], np.full(3, 4.0))
  np.testing.assert_array_equal(moments["m"], np.full(3, 5.0))
  made.close()
  assert on_disk.steps(tmp_path) == [1, 2, 4]
  runs.write_config(tmp_path, config_lib.Config())
  assert runs.saved(tmp_path) == (
    tmp_path / "checkpoints" / "4" / "params",
    {"told": 4, "step": 4},
    4,
  )


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_found_wherever_it_changes_a_value(tmp_path: Path, flips: int) -> None:
  """Anywhere in the files of a step; some bytes say nothing."""
  draw = random.Random(0)
  params = {f"a/{i}": jnp.asarray(RNG.normal(size=(40, 30)).astype("float32")) for i in range(3)}
  moments = {"m": {k: 2 * v for k, v in params.items()}, "count": jnp.int32(3)}
  with manager.Checkpoints(tmp_path) as made:
    made.save(3, params, moments, {})
  place = tmp_path / "checkpoints/3"
  files = [p for item in ("params", "optimizer") for p in (place / item).rglob("*") if p.is_file()]
  found = 0
  for _ in range(flips):
    file = draw.choices(files, [p.stat().st_size for p in files])[0]
    before = file.read_bytes()
    bit = draw.randrange(8 * len(before))
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)
    said = ""
    with manager.Checkpoints(tmp_path) as made:
      try:
        _, ours, theirs, _ = made.restore(params, moments)
      except CheckpointError as error:
        said = str(error)
    file.write_bytes(before)
    if said:
      found += 1
      assert str(place) in said
      assert len(said.splitlines()) == 1
    else:
      jax.tree.map(np.testing.assert_array_equal, (ours, theirs), (params, moments))
  assert found > flips // 2


def test_a_newer_step_that_cannot_be_read_is_told_and_an_older_one_opened(
  tmp_path: Path, tiny_config: ConfigMaker, capsys: pytest.CaptureFixture
) -> None:
  runs.write_config(tmp_path, tiny_config())
  with manager.Checkpoints(tmp_path, keep=3) as made:
    for step in (1, 2):
      made.save(step, {"a": jnp.full(3, step)}, {"b": jnp.zeros(2)}, {"step": step})
  (tmp_path / "checkpoints/7").mkdir()

  def accept(place: Path, about: dict) -> None:
    if about["step"] == 2:
      raise CheckpointError("not this one")

  assert on_disk.damaged(tmp_path) == {7: "it has no params, about"}
  assert runs.saved(tmp_path, accept)[1:] == ({"step": 1}, 1)
  said = capsys.readouterr().err
  assert "WARNING" in said
  assert "step 2 cannot be used: not this one; step 7 cannot be used: it has no params" in said
  assert "step 1 is used instead" in said
  (tmp_path / "checkpoints/1/about/metadata").write_text("[]")
  with pytest.raises(CheckpointError, match=r"no checkpoint can be used: step 1 .* \[\]"):
    runs.saved(tmp_path, accept)


def failing(error: Exception) -> Callable[[], None]:
  def fail() -> None:
    raise error

  return fail


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (ValueError("long\n\nand more"), "x: not read (long)"),
    (KeyError(), "x: not read (KeyError)"),
    (OSError(28, "No space left on device"), "x: not read ([Errno 28] No space left on device); free "
     "some space and give the same command again"),
  ],
)  # fmt: skip
def test_whatever_a_library_raises_is_one_line_with_its_traceback_as_a_note(
  error: Exception, line: str
) -> None:
  with pytest.raises(CheckpointError) as raised:
    manager.as_checkpoint_error("x: not read", failing(error))
  assert str(raised.value) == line
  assert "in fail" in raised.value.__notes__[0]
  for other in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")):
    with pytest.raises(type(other)):
      manager.as_checkpoint_error("x: not read", failing(other))
