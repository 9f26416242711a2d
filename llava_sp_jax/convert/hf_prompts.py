"""Prepares tokenizers and chat templates of exports, with which transformers reads as training does.

An export's tokenizer has `<image>`, and its embedding has a row for it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.places import copy_tokenizer
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.conversation import IMAGE, Template
from llava_sp_jax.data.example import IMAGE_ID
from llava_sp_jax.data.tokenizer import SETTINGS_FILE, Tokenizer

ROWS = ("model.embed_tokens.weight", "lm_head.weight")  # tensors with a row for each id


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Holds the ids that transformers needs.

  `new` says that the image token was not in the tokenizer before.
  """

  image: int
  new: bool
  stops: tuple[int, ...] = ()
  bos: int | None = None
  pad: int | None = None
  padded: tuple[int, ...] = ()  # padding rows of the embedding, which no token has
  start: str = ""  # the begin-of-sequence token, where a chat template may begin with its text

  @classmethod
  def of(cls, folder: Path | None, template: str, rows: int, out: Path) -> Tokens:
    """Writes the tokenizer with `<image>` in it, and returns its ids.

    Without a tokenizer, the image token gets the row after the last one.
    """
    if folder is None:
      return cls(rows, True)
    from transformers import AddedToken, AutoTokenizer  # slow to import

    with tempfile.TemporaryDirectory() as place:  # AutoTokenizer also reads a config.json beside
      copy_tokenizer(folder, Path(place))
      ours = Tokenizer(place)
      stops = ours.stop_ids(conversation.TEMPLATES[template].end)
      theirs: Any = AutoTokenizer.from_pretrained(place, padding_side="left")
    new = IMAGE not in theirs.get_vocab()
    if new:
      theirs.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if theirs.pad_token is None:
      theirs.pad_token = theirs.unk_token or theirs.eos_token
    theirs.chat_template = None  # exports write it as a file
    image = theirs.convert_tokens_to_ids(IMAGE)
    _read_alike(ours, theirs, image, conversation.TEMPLATES[template], folder)
    theirs.save_pretrained(out)
    settings = json.loads((out / SETTINGS_FILE).read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes rebuild tokenizer.json
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    padded = tuple(range(len(theirs), rows))
    start = _start(theirs, conversation.TEMPLATES[template])
    return cls(image, new, stops, ours.bos_id, theirs.pad_token_id, padded, start)


def _start(theirs: Any, template: Template) -> str:
  """Returns the text of the begin-of-sequence token if a prompt may begin with it; "" otherwise.

  Servers tokenize the text of a chat template without adding special tokens. So the text has the
  token, if the ids are the same then.
  """
  start = theirs.bos_token or ""
  text = f"{template.system}{template.first or template.before}{IMAGE}\nWhat is it?{template.after}"
  whole = theirs(text).input_ids
  written = theirs(start + text, add_special_tokens=False).input_ids
  return start if start and whole == written else ""


def _read_alike(ours: Tokenizer, theirs: Any, image: int, template: Template, folder: Path) -> None:
  """Changes the tokenizer so that transformers reads prompts as training does.

  Training tokenizes the text after an image as a new text.

  Raises: FormatError when no change achieves that.
  """
  before = template.system + (template.first or template.before)
  one = f"{before}{IMAGE}\nWhat is it?{template.after}"
  two = f"{one}{template.answer}it is{template.end}{template.before}And?{template.after}"

  def agrees(text: str) -> bool:
    runs = reading.tokenize([conversation.TextPiece(text, False, 0)], ours)
    wanted = [image if i == IMAGE_ID else i for run in runs for i in run.ids]
    return wanted == list(theirs(text).input_ids)

  inner = theirs.backend_tokenizer
  normalizer, splitter = inner.normalizer, inner.pre_tokenizer
  for texts in ((one, two), (one,)):
    for change in _BLANKS:
      change(inner)
      if all(map(agrees, texts)):
        return
      inner.normalizer, inner.pre_tokenizer = normalizer, splitter
  raise FormatError(
    f"{folder}: transformers reads a prompt of this tokenizer as other ids than training did, so "
    "its answers would differ; export 'llava' for the original code, or 'language_model'"
  )


def _blank_behind_images(inner: Any) -> None:
  from tokenizers import Regex, normalizers

  line = normalizers.Replace(Regex(r"\A\n"), " \n")
  inner.normalizer = normalizers.Sequence([line, *([inner.normalizer] if inner.normalizer else [])])


def _blank_in_front_of_every_text(inner: Any) -> None:
  from tokenizers import pre_tokenizers

  if isinstance(inner.pre_tokenizer, pre_tokenizers.Metaspace):
    inner.pre_tokenizer.prepend_scheme = "always"


# Changes that add blanks which sentencepiece adds, but transformers does not.
_BLANKS: tuple[Callable[[Any], None], ...] = (
  lambda inner: None,
  _blank_behind_images,
  _blank_in_front_of_every_text,
)


def with_row(tensor: Tensor, row: int) -> Tensor:
  """Returns the tensor [V, D] with the mean of its rows as `row`, appended or replaced.

  The mean of all logits is never the largest, so the token of that row is never chosen.
  """

  def read() -> np.ndarray:
    values = tensor.array()
    mean = values.astype(np.float32).mean(0, keepdims=True).astype(values.dtype)
    return np.concatenate([values[:row], mean, values[row + 1 :]])

  shape = (max(tensor.shape[0], row + 1), *tensor.shape[1:])
  return dataclasses.replace(tensor, shape=shape, array=read)


def generation(tokens: Tokens) -> Json:
  """Returns the `generation_config.json`: greedy, with the ends of the engine, never `<image>`."""
  return {
    "bos_token_id": tokens.bos,
    "eos_token_id": list(tokens.stops) or None,
    "pad_token_id": tokens.pad,
    "do_sample": False,
    "suppress_tokens": [tokens.image, *tokens.padded],
  }


def with_rows(tensors: list[Tensor], tokens: Tokens) -> list[Tensor]:
  """Returns the decoder's tensors with a row for `<image>`, where the tokenizer had none."""
  return [
    with_row(tensor, tokens.image) if tensor.name in ROWS and tokens.new else tensor
    for tensor in tensors
  ]


_CHAT = """\
{{{{ {system} }}}}{{% for message in messages %}}\
{{% set text = namespace(images='', said='') %}}\
{{% if message['content'] is string %}}{{% set text.said = message['content'] %}}{{% else %}}\
{{% for part in message['content'] %}}{{% if {pictures}{{% elif part['type'] == 'text' %}}\
{{% set text.said = text.said + part['text'] %}}{{% endif %}}{{% endfor %}}{{% endif %}}\
{{% if message['role'] == 'user' %}}\
{{{{ ({first} if loop.first else {before}) + text.images + text.said + {after} }}}}\
{{% elif message['role'] == 'assistant' %}}{{{{ {answer} + text.said + {end} }}}}{{% endif %}}\
{{% endfor %}}"""


_URL = "(part['image_url'] if part['image_url'] is string else part['image_url']['url'])"
# What stands for a picture in the parts of a message, by their type: transformers' own, and those of
# llama.cpp's server and of llama-cpp-python, which replace the text by a picture.
TRANSFORMERS = {"image": json.dumps(IMAGE)}
LLAMA_CPP = {"media_marker": "part['text']", "image_url": _URL}


def chat_template(
  template: Template, start: str = "", pictures: Mapping[str, str] = TRANSFORMERS
) -> str:
  """Returns a conversation template as Jinja, for transformers' `apply_chat_template`.

  Args:
    template: the template; one without turns gives "".
    start: what a conversation begins with.
    pictures: expressions for a picture, by the type of a part.
  """
  if template.image_only:
    return ""
  first = template.before if template.first is None else template.first
  values = {
    "system": start + template.system,
    "first": first,
    "before": template.before,
    "after": template.after,
    "answer": template.answer,
    "end": template.end,
  }
  ahead, behind = (json.dumps(text) for text in f"{template.image}\n".split(IMAGE))
  branches = "{% elif ".join(
    f"part['type'] == '{kind}' %}}{{% set text.images = text.images + {ahead} + {what} + {behind} %}}"
    for kind, what in pictures.items()
  )
  said = {name: json.dumps(text) for name, text in values.items()}
  return _CHAT.format(pictures=branches, **said)
