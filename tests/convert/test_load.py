"""What does not fit a model is an error that names every problem at once."""

from __future__ import annotations

import numpy as np
import pytest

from llava_sp_jax.convert import load, tables
from llava_sp_jax.convert.torch_io import FormatError

NORM = "model.layers.{}.input_layernorm.weight"


def test_layers_are_stacked_in_order() -> None:
  tensors = {NORM.format(i): np.full(2, i, np.float32) for i in (10, 2, *range(2), *range(3, 10))}
  found = load.translate(tensors, tables.LLAMA, "x")
  stacked = found["language_model/layers/attn_norm/scale"]
  np.testing.assert_array_equal(stacked[:, 0], np.arange(11))


def test_all_unknown_names_and_gaps_are_listed() -> None:
  tensors = {NORM.format(0): np.zeros(2), NORM.format(3): np.zeros(2),
             "model.extra": np.zeros((4, 5)), "other.weight": np.zeros(1)}  # fmt: skip
  with pytest.raises(FormatError) as error:
    load.translate(tensors, tables.LLAMA, "folder")
  text = str(error.value)
  assert text.startswith("folder does not fit the model:")
  assert "unexpected tensor model.extra (4, 5)" in text
  assert "unexpected tensor other.weight (1,)" in text
  assert "attn_norm/scale: layers [1, 2] are missing" in text


def test_missing_unexpected_and_misshaped_are_listed_together() -> None:
  expected = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros((2, 2))}
  found = {"a": np.zeros(2), "c": np.zeros((2, 3)), "d": np.zeros(1)}
  with pytest.raises(FormatError) as error:
    load.check(found, expected, "x")
  assert str(error.value).splitlines()[1:] == [
    "  missing b (3,)", "  unexpected d (1,)", "  c: expected shape (2, 2), found (2, 3)",
  ]  # fmt: skip
  assert load.check(expected, expected, "x") is expected


@pytest.mark.parametrize(
  ("key", "value"),
  [("rope_scaling", {"type": "linear"}), ("attention_bias", True), ("hidden_act", "gelu")],
)
def test_what_the_decoder_does_not_do_is_refused(key: str, value: object) -> None:
  sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 16, "rms_norm_eps": 1e-5}  # fmt: skip
  assert load.llama_config(sizes).head_dim == 4
  assert load.llama_config({**sizes, "num_key_value_heads": 1}).kv_heads == 1
  with pytest.raises(FormatError, match=rf"config.json: {key}=.* is not supported"):
    load.llama_config({**sizes, key: value})
