"""A variant of one's own in all commands: python examples/variant.py train --config ... --workdir ..."""

import sys

from llava_sp_jax import cli
from llava_sp_jax.convert import tables
from llava_sp_jax.models.projector import VARIANTS, Variant

# Four central crops that attend to the detail of the grid: parts that the package has.
VARIANTS["cropping_4"] = Variant(views=("crop",), parts=4, detail_kernels=(16,), out_bias=True)
# Its tensors in torch are named as those of `cropping`, for convert and export.
tables.PROJECTORS["cropping_4"] = tables.PROJECTORS["cropping"]

if __name__ == "__main__":
  sys.exit(cli.main(sys.argv[1:]))
