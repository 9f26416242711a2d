"""Fine-tunes a foreign checkpoint on your data: python examples/finetune.py CHECKPOINT DATA IMAGES OUT [...]

Writes OUT/start, OUT/run and OUT/merged. Other arguments go to `llava-sp train`.
"""

import sys
from collections.abc import Sequence

from llava_sp_jax import cli


def main(argv: Sequence[str]) -> int:
  checkpoint, data, images, out, *more = argv
  recipe = f"finetune:init={out}/start,data={data},images={images},epochs=1"
  commands = (
    ["convert", checkpoint, f"{out}/start"],
    ["check", f"--config={recipe}"],  # exits here if samples would be lost
    ["train", f"--config={recipe}", f"--workdir={out}/run", *more],
    ["merge", f"{out}/run", f"{out}/merged"],  # adapters folded in; OUT/merged stands alone
  )
  return next((code for command in commands if (code := cli.main(command))), 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
