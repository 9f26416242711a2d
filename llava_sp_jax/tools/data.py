"""llava-sp data: packs a data set into a few large files that training reads fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_sp_jax import console, folders
from llava_sp_jax.progress import Progress
from llava_sp_jax.tools import arguments

EXAMPLES = """example:
  llava-sp data pack llava_v1_5_mix665k.json packed/mix665k --image-folder /mnt/share/images
  llava-sp train --config configs/finetune_lora.py --config.data.path=packed/mix665k ..
"""
MB = 1 << 20


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp data",
    description="Prepares data sets for training; llava-sp data pack --help says how.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = result.add_subparsers(dest="command", required=True, metavar="pack")
  pack = commands.add_parser(
    "pack",
    help="write samples and images as shards of ArrayRecord",
    description="Writes the samples of IN with their images and image sizes to shards in OUT, which "
    "data.path may name in place of IN. Training on OUT has the same batches, and opens no image "
    "to measure it. The content of image files is not changed. Samples that cannot be used keep "
    "their places, and are listed in OUT/quarantine.jsonl.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  pack.add_argument("data", metavar="IN", help="a data set in any format that training reads")
  pack.add_argument("out", metavar="OUT", type=Path, help="new folder")
  pack.add_argument(
    "--image-folder", default="", metavar="DIR", help="image names start from it (default: IN's)"
  )
  pack.add_argument("--source", default="auto", help="format of IN (default: as the path is)")
  pack.add_argument("--shard-mb", default="512", metavar="N", help="size of a shard (default: 512)")
  pack.add_argument("--threads", default="8", metavar="N", help="that read images (default: 8)")
  return result


def main(argv: list[str]) -> None:
  """Packs a data set, with a line of progress every few seconds."""
  options = parser().parse_args(argv)
  shard = arguments.whole("shard-mb", options.shard_mb, 1) * MB
  threads = arguments.whole("threads", options.threads, 1)
  from llava_sp_jax.data import pack, sources

  folders.check(options.out, "")  # before anything is read
  images = options.image_folder or str(Path(options.data).parent)
  data = sources.open_path(options.data, images, lambda image: image, options.source, "IN")
  progress = Progress(len(data), "samples", stream=sys.stderr)

  def show(counts: pack.Counts) -> None:
    progress.at(counts.samples, f"{counts.bad:,} cannot be used" * bool(counts.bad))

  made = pack.write(data, options.out, options.data, shard, threads, show)
  console.say(
    f"{options.out}: {made.samples:,} samples, {made.images:,} images, {made.bytes / 1e9:.2f} GB in "
    f"{progress.seconds:,.0f} s; {made.bad:,} samples cannot be used"
    + f" ({options.out / pack.QUARANTINE})"
    * bool(made.bad)
  )
