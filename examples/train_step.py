"""Runs train steps on your own mesh: python examples/train_step.py configs/x.py:OPTIONS"""

import itertools
import sys

import jax

import llava_sp_jax as llava
from llava_sp_jax import recipes
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.models import build
from llava_sp_jax.training import setup


def main(config: llava.Config, fsdp: int = 1, steps: int = 2) -> list[float]:
  shape, auto = (jax.device_count() // fsdp, fsdp, 1), jax.sharding.AxisType.Auto
  mesh = jax.make_mesh(shape, mesh_lib.AXES, axis_types=(auto,) * 3)
  tokenizer, tile = Tokenizer(config.data.tokenizer), anyres.Tile(*build.tile_shape(config.model))
  size, seed = config.train.batch_size, config.train.seed
  losses = []
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)  # parameters and moments, placed
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    batches = pipeline.make(config.data, tokenizer, tile, size, seed)
    for batch in itertools.islice(batches, steps):
      batch.pop(pipeline.SAMPLES)  # indices of the samples, for the host
      state, metrics = step(state, mesh_lib.put_batch(batch, mesh), jax.random.key(seed))
      losses.append(float(metrics["loss"]))
  return losses


if __name__ == "__main__":
  print(main(recipes.load(sys.argv[1])))
