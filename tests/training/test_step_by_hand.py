"""The step against its formulas: token mean, accumulation, dropout's keys, AdamW's arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build
from llava_sp_jax.training import optimizer, setup, state, step
from llava_sp_jax.training.state import TrainState
from tests.conftest import ConfigMaker
from tests.distributed.meshes import batches
from tests.training.test_optimizer import AdamW

ROWS, STEPS = 8, 3
Batch = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  """Gradients that are clipped, an eps that matters, decay; half of the adapters' input dropped."""
  return tiny_config(
    "finetune",
    "none",
    model={"lora": {"dropout": 0.5}},
    train={"batch_size": ROWS, "steps": 6},
    optimizer={"weight_decay": 0.1, "clip_norm": 0.05, "eps": 1e-4, "warmup_ratio": 0.2},
  )


def without_dropout(config: config_lib.Config) -> config_lib.Config:
  lora = dataclasses.replace(config.model.lora, dropout=0.0)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


@pytest.fixture(scope="module")
def made(config: config_lib.Config) -> list[Batch]:
  """Batches whose rows learn from very different numbers of tokens."""
  rows, result = batches(config), []
  for _ in range(STEPS):
    batch = next(rows)
    for row in range(1, ROWS, 2):  # every other row learns its first answers only
      learned = np.flatnonzero(batch["weights"][row])
      batch["weights"][row, learned[4 + row :]] = 0
    result.append(batch)
  tokens = [result[0]["weights"][i::4].sum() for i in range(4)]
  assert len(set(tokens)) == 4, "with equal counts a mean of means would be right as well"
  return result


@pytest.fixture(scope="module")
def begun(config: config_lib.Config) -> TrainState:
  """Adapters that do something, so that dropout and their scale show."""
  params = jax.jit(lambda: build.initialize(config.model, jax.random.key(0)))()
  trainable, frozen = state.split(params, config)
  noise = np.random.default_rng(0)
  trainable = {
    p: x + 0.1 * noise.normal(size=x.shape).astype(np.float32) if p.endswith("lora_b") else x
    for p, x in trainable.items()
  }
  tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
  return state.start(trainable, frozen, tx)


@pytest.fixture(scope="module")
def oracle(config: config_lib.Config) -> Any:
  """trainable, frozen, batch -> (loss, gradients): the mean over learned tokens, in one formula."""
  module = build.model(config.model)

  def loss(trainable: Any, frozen: Any, batch: Any) -> Any:
    variables = {"params": state.join(trainable, frozen)}
    hidden = module.apply(
      variables, *(batch[k] for k in ("tokens", "positions", "segments", "images", "slots"))
    )
    logits = module.apply(variables, hidden, method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["weights"]).sum() / batch["weights"].sum()

  return jax.jit(jax.value_and_grad(loss))


def gradients(config: config_lib.Config, accumulate: int) -> Any:
  train = dataclasses.replace(config.train, accumulate=accumulate)
  return jax.jit(functools.partial(step.gradients, build.model(config.model), train))


def close(ours: Any, theirs: Any, rtol: float = 2e-5) -> None:
  """Each gradient to a share of its largest value."""
  assert ours.keys() == theirs.keys()
  for path in ours:
    scale = float(np.abs(theirs[path]).max())
    np.testing.assert_allclose(ours[path], theirs[path], atol=rtol * scale + 1e-9, err_msg=path)


def test_micro_batches_have_the_gradient_of_the_token_mean(
  config: config_lib.Config, made: list[Batch], begun: TrainState, oracle: Any
) -> None:
  """Four micro-batches of unequal token counts; also what is reported of them."""
  batch = made[0]
  loss, wanted = oracle(begun.trainable, begun.frozen, batch)
  sums, found = gradients(without_dropout(config), 4)(begun, batch, jax.random.key(0))
  close(found, wanted)
  assert float(sums["count"]) == batch["weights"].sum()
  assert float(sums["loss"] / sums["count"]) == pytest.approx(float(loss), rel=1e-5)


def test_steps_are_the_oracle_s_gradients_through_adamw(
  config: config_lib.Config, made: list[Batch], begun: TrainState, oracle: Any
) -> None:
  """Parameters after each of some steps, through the package's own compiled step."""
  config = without_dropout(config)
  tx = optimizer.build(config.optimizer, config.train.steps, list(begun.trainable))
  run = setup.compile_step(build.model(config.model), tx, config, None)
  hand = AdamW(config.optimizer, config.train.steps, dict(begun.trainable))
  current = jax.tree.map(jnp.array, begun)  # the step donates what it gets
  for number, batch in enumerate(made, 1):
    before = {p: np.asarray(x) for p, x in current.trainable.items()}
    loss, grads = oracle(before, begun.frozen, batch)
    norm = float(np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values())))
    assert norm > 2 * config.optimizer.clip_norm
    wanted = hand.update(before, grads)
    current, metrics = run(current, batch, jax.random.key(0))
    assert int(current.step) == number
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)  # before it is clipped
    for path, x in current.trainable.items():
      moved = np.abs(wanted[path] - before[path]).max()
      np.testing.assert_allclose(x, wanted[path], atol=2e-3 * moved + 1e-7, err_msg=path)


SIZE = 4000


def masks(module: Any, trainable: Any, frozen: Any, part: Any, chunk: int, rngs: Any = None) -> Any:
  """In place of `step.loss_sums`: a loss whose gradient is a mask drawn with the key it gets."""
  drawn = jax.random.uniform(rngs["dropout"], (SIZE,)) - 0.5
  return {"loss": (drawn * trainable["projector/x"]).sum(), "count": part["weights"].sum()}


def drawn(config: config_lib.Config, begun: TrainState, count: int, number: int, key: int) -> Any:
  """The sum of the masks of `count` micro-batches in step `number`."""
  stub = begun.replace(trainable={"projector/x": jnp.ones(SIZE)}, step=jnp.int32(number))
  batch = {"weights": np.full((count, 1), 1 / count, np.float32)}  # one learned token in all
  _, grads = gradients(config, count)(stub, batch, jax.random.key(key))
  return np.asarray(grads["projector/x"])


def test_every_micro_batch_has_a_key_of_its_own(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch, begun: TrainState
) -> None:
  """Sums of masks vary as those of independent draws; of one draw four times they would by 16 / 12."""
  monkeypatch.setattr(step, "loss_sums", masks)
  assert np.var(drawn(config, begun, 4, 0, 0)) == pytest.approx(4 / 12, rel=0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_every_step_and_every_run_has_keys_of_its_own(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch, begun: TrainState, count: int
) -> None:
  monkeypatch.setattr(step, "loss_sums", masks)
  first = drawn(config, begun, count, 0, 0)
  np.testing.assert_array_equal(drawn(config, begun, count, 0, 0), first)
  for number, key in ((1, 0), (2, 0), (0, 1)):
    other = drawn(config, begun, count, number, key)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_a_key_makes_dropout_and_none_makes_none(
  config: config_lib.Config, made: list[Batch], begun: TrainState
) -> None:
  """What the step and validation hand on to the model."""
  module, batch = build.model(config.model), made[0]

  @jax.jit
  def loss(batch: Any, rngs: Any) -> Any:
    return step.loss_sums(module, begun.trainable, begun.frozen, batch, 64, rngs)["loss"]

  @jax.jit
  def validated(batch: Any) -> Any:
    params = state.join(begun.trainable, begun.frozen)
    return step.loss_and_counts(module, params, batch, 64)[1]["loss"]

  one, other = (float(loss(batch, {"dropout": jax.random.key(k)})) for k in (0, 1))
  calm = float(validated(batch))
  assert min(abs(one - calm), abs(other - calm), abs(one - other)) > 1e-3
  assert float(validated({**batch})) == calm
