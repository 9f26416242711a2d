"""A kernel that is wrong on a chip is noticed before a run learns from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import attention
from llava_sp_jax.training import kernel_check, preflight
from tests.conftest import ConfigMaker

WIDE = {"language_model": {"head_dim": 128}, "attention": "flash", "dtype": "bfloat16"}


@pytest.fixture
def config(tiny_config: ConfigMaker) -> Any:
  return tiny_config(model=WIDE, data={"row_length": 256, "packing": "first_fit"})


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
  right = attention.IMPLEMENTATIONS["flash"]

  def run(case: Any, q: Any, k: Any, v: Any, *others: Any) -> Any:
    return right.run(case, *change(q, k, v), *others)

  wrong = dataclasses.replace(right, run=run)
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "flash", wrong)


def test_a_kernel_that_is_right_passes(config: Any) -> None:
  assert kernel_check.problems(config, Tokenizer(config.data.tokenizer)) == []


@pytest.mark.parametrize(
  ("change", "what"),
  [
    (lambda q, k, v: (q, k, v.at[:, 100].set(0)), "output by"),
    (lambda q, k, v: (q, jnp.roll(k, 1, axis=1), v), "gradient of queries by"),
    (lambda q, k, v: (q, k * jnp.nan, v), "output by nan"),
  ],
)
def test_one_that_is_wrong_ends_the_run_before_it_begins(
  config: Any, monkeypatch: pytest.MonkeyPatch, change: Any, what: str
) -> None:
  spoil(monkeypatch, change)
  with pytest.raises(preflight.PreflightError, match=what) as error:
    preflight.check_config(config, Tokenizer(config.data.tokenizer))
  assert "flash computes other values on cpu" in str(error.value)
  assert "--config.model.attention=xla" in str(error.value)


def test_others_are_not_compared(tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(kernel_check, "_results", lambda *_: pytest.fail("it was compared"))
  config = tiny_config()
  assert kernel_check.problems(config, Tokenizer(config.data.tokenizer)) == []
