"""Whatever conversion reads can be asked, without a copy of it: the same parameters, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax.checkpoints import opening, runs
from llava_sp_jax.convert import export, formats
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.infer import pretrained


def test_a_folder_of_the_original_s_layout(run_folder: Path, tmp_path: Path) -> None:
  export.export(opening.open_any(run_folder, formats.Options()), "llava", tmp_path / "llava")
  ours = pretrained.from_any(run_folder, dtype="float32")
  theirs = pretrained.from_any(tmp_path / "llava", dtype="float32")
  one, two = (flatten_dict(loaded.params, sep="/") for loaded in (ours, theirs))
  assert one.keys() == two.keys()
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, two[path], err_msg=path)
  assert theirs.fingerprint
  assert theirs.tokenizer.fingerprint() == ours.tokenizer.fingerprint()
  assert (ours.step, theirs.step) == (2, 0)


def test_a_run_whose_config_has_former_names_of_keys(run_folder: Path, tmp_path: Path) -> None:
  run = shutil.copytree(run_folder, tmp_path / "run")
  values = json.loads((run / runs.CONFIG_FILE).read_text())
  projector = values["model"]["projector"]
  projector["row"] = projector.pop("variant")
  (run / runs.CONFIG_FILE).write_text(json.dumps(values))
  ours, theirs = (pretrained.from_run(folder) for folder in (run_folder, run))
  assert theirs.config == ours.config
  one, two = (flatten_dict(loaded.params, sep="/") for loaded in (ours, theirs))
  assert one.keys() == two.keys()


def test_a_part_of_a_model_is_refused(run_folder: Path, tmp_path: Path) -> None:
  export.export(opening.open_any(run_folder, formats.Options()), "language_model", tmp_path / "llm")
  with pytest.raises(
    FormatError, match="no vision_tower, projector in it; a whole model is needed"
  ):
    pretrained.from_any(tmp_path / "llm")
