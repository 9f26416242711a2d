"""Broadcasts the requests of process 0, because processes that share a mesh must compute the same.

Only process 0 needs the image files. It broadcasts their bytes, so that no process can ask another
question, or fail alone, because of its own disk.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.experimental import multihost_utils
from PIL import Image

from llava_sp_jax.data import decode
from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.requests import ImageFile, Request

AT_ONCE = 16  # requests of one broadcast


def broadcast_requests(requests: Iterable[Request]) -> Iterator[Request]:
  """Yields the requests of process 0 in every process; `requests` of others are not read.

  A broadcast is a collective, so all processes must advance the iterator at the same points.
  """
  mine = iter(requests)
  while True:
    some = list(itertools.islice(mine, AT_ONCE)) if jax.process_index() == 0 else []
    found = _broadcast([_packed(request) for request in some])
    if not found:
      return
    yield from map(_request, found)


def _broadcast(what: list[Any]) -> list[Any]:
  """Returns the value of process 0 in every process."""
  data = np.frombuffer(serialization.msgpack_serialize(what), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  room = 1 << (size - 1).bit_length()  # few sizes, because each one is a compiled program
  data = np.resize(data, room) if jax.process_index() == 0 else np.zeros(room, np.uint8)
  sent = np.asarray(multihost_utils.broadcast_one_to_all(data))
  result: list[Any] = serialization.msgpack_restore(sent[:size].tobytes())
  return result


def _packed(request: Request) -> dict[str, Any]:
  images = [_bytes(picture) for picture in request.images]
  return {
    "question": request.question,
    "system": request.system,
    "number": request.number,
    "history": [list(turn) for turn in request.history],
    "generation": json.dumps(dataclasses.asdict(request.generation)) if request.generation else "",
    "images": [{"is": i} if isinstance(i, bytes) else {"error": str(i)} for i in images],
  }


def _request(packed: dict[str, Any]) -> Request:
  images = tuple(i["is"] if "is" in i else SampleError(i["error"]) for i in packed["images"])
  history = tuple((question, answer) for question, answer in packed["history"])
  generation = Generation.of(json.loads(packed["generation"])) if packed["generation"] else None
  return Request(
    packed["question"], images, packed["system"], packed["number"], history, generation
  )


def _bytes(picture: ImageFile) -> bytes | SampleError:
  """Returns the bytes of an image file, or the error that prevents reading it."""

  def found() -> bytes:
    if isinstance(picture, str | Path):
      return decode.read_bytes(picture)
    if isinstance(picture, Image.Image):
      file = io.BytesIO()
      picture.save(file, "PNG")
      return file.getvalue()
    if isinstance(picture, SampleError):
      raise picture
    return picture

  return attempt(found)
