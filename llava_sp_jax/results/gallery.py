"""Chooses the answers that a page shows, and makes thumbnails of their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sp_jax.data import decode
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.results.predictions import Record

SIDE = 168  # pixels of the longer side of a thumbnail
QUALITY = 72


def is_right(record: Record) -> bool | None:
  """Returns whether an answer has the full score; None if it has no score of its own."""
  score = record["verdict"].get("score")
  return None if score is None else score == 1


def spread(records: Sequence[Record], count: int) -> list[Record]:
  """Returns up to `count` records, evenly spaced over all of them, each about a different image."""
  by_image: dict[str, list[Record]] = {}
  for record in records:
    by_image.setdefault(" ".join(record["images"]) or record["id"], []).append(record)
  pool = [rows[i % len(rows)] for i, rows in enumerate(by_image.values())]  # first, second, ..
  return pool[:: max(1, len(pool) // max(1, count))][:count]


def mixed(records: Sequence[Record], count: int) -> list[Record]:
  """Returns up to `count` records in their order, of which at most a quarter are wrong answers.

  Treats answers without a score like right ones.
  """
  wrong = spread([r for r in records if is_right(r) is False], count // 4)
  right = spread([r for r in records if is_right(r) is not False], count - len(wrong))
  chosen = {r["id"] for r in (*wrong, *right)}
  return [r for r in records if r["id"] in chosen]


def thumbnail(picture: Path | bytes | str) -> str | None:
  """Returns a JPEG thumbnail of an image as a `data:` URI; None if the image cannot be read."""
  try:
    file = io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture)
    small: Any = decode.read(file, "")
  except SampleError:
    return None
  small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  out = io.BytesIO()
  small.save(out, "JPEG", quality=QUALITY)
  return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
