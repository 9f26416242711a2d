"""Runs llama-cpp-python on exported files: logits, and greedy answers of pictures and embeddings."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

llama_cpp: Any = pytest.importorskip(
  "llama_cpp", reason="compares with llama-cpp-python: pip install llama-cpp-python"
)


F32 = 0  # a type of ggml


@contextlib.contextmanager
def opened(folder: Path, **more: Any) -> Iterator[Any]:
  """An image is one batch; keys and values are float32, as in the engine."""
  sizes = {"n_ctx": 1024, "n_batch": 1024, "n_threads": 1, "type_k": F32, "type_v": F32}
  llm = llama_cpp.Llama(str(folder / "model.gguf"), verbose=False, **sizes, **more)
  try:
    yield llm
  finally:
    llm.close()


def ids_of(llm: Any, text: str, first: bool) -> list[int]:
  """`first` says that the text begins a prompt."""
  return list(llm.tokenize(text.encode(), add_bos=first, special=True))


def feed(llm: Any, tokens: np.ndarray) -> None:
  """Gives the decoder image tokens [N, D] behind what it has read."""
  count, width = tokens.shape
  batch = llama_cpp.llama_batch_init(count, width, 1)
  values = np.ascontiguousarray(tokens, np.float32)
  ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
  batch.n_tokens = count
  for i in range(count):
    batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = llm.n_tokens + i, 1, 0
    batch.logits[i] = False
  failed = llama_cpp.llama_decode(llm.ctx, batch)
  llama_cpp.llama_batch_free(batch)
  assert not failed
  llm.n_tokens += count


def answer(llm: Any, head: str, tokens: np.ndarray, tail: str, new: int) -> tuple[int, ...]:
  """Greedy ids after text, image tokens [N, D], and text."""
  llm.reset()
  llm._ctx.kv_cache_clear()
  llm.eval(ids_of(llm, head, True))
  feed(llm, tokens)
  llm.eval(ids_of(llm, tail, False))
  made: list[int] = []
  while len(made) < new:
    token = llm.sample(temp=0.0, repeat_penalty=1.0)
    if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
      break
    made.append(token)
    llm.eval([token])
  return tuple(made)


@llama_cpp.llama_log_callback
def _nothing(level: int, text: bytes, data: Any) -> None:
  """What llama.cpp says of each picture is left out."""


def with_pictures(llm: Any, file: Path) -> Any:
  """Makes `llm` encode pictures with a file; returns what must live as long as it."""
  from llama_cpp import mtmd_cpp
  from llama_cpp.llama_chat_format import Llava15ChatHandler

  mtmd_cpp.mtmd_log_set(_nothing, None)
  mtmd_cpp.mtmd_helper_log_set(_nothing, None)

  class Handler(Llava15ChatHandler):  # type: ignore[misc]
    DEFAULT_SYSTEM_MESSAGE = None

  handler = Handler(str(file), verbose=False)
  template = llm.metadata["tokenizer.chat_template"]
  handler.CHAT_FORMAT = template.removeprefix("{{ bos_token }}")  # the handler adds the token
  llm.chat_handler = handler
  return handler


def encoded(llm: Any, handler: Any, image: Image.Image) -> np.ndarray:
  """Tokens [N, D] of a picture, as llama.cpp makes them."""
  from llama_cpp import mtmd_cpp

  handler._init_mtmd_context(llm)
  pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
  data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
  bitmap = mtmd_cpp.mtmd_bitmap_init(image.width, image.height, data)
  marker = mtmd_cpp.mtmd_default_marker()
  text = mtmd_cpp.mtmd_input_text()
  text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
  chunks = mtmd_cpp.mtmd_input_chunks_init()
  bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
  assert not mtmd_cpp.mtmd_tokenize(handler.mtmd_ctx, chunks, ctypes.byref(text), bitmaps, 1)
  chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, 0)
  assert not mtmd_cpp.mtmd_encode_chunk(handler.mtmd_ctx, chunk)
  shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llm.n_embd()
  found = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(handler.mtmd_ctx), shape).copy()
  mtmd_cpp.mtmd_input_chunks_free(chunks)
  mtmd_cpp.mtmd_bitmap_free(bitmap)
  return found


def said(llm: Any, url: str, question: str, new: int) -> str:
  """A greedy answer to a question about the picture at `url`."""
  content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": question},
  ]
  found = llm.create_chat_completion(
    [{"role": "user", "content": content}], temperature=0.0, repeat_penalty=1.0, max_tokens=new
  )
  result: str = found["choices"][0]["message"]["content"]
  return result
