"""Writes LLaVA for transformers: a folder for AutoProcessor and LlavaForConditionalGeneration.

Its tokenizer has `<image>`, and its embedding a row for it. Its processor makes the same pixels,
and its generation settings give the same tokens and the same end of an answer as the engine.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import settings_out, tables, torch_write
from llava_sp_jax.convert.formats import copy_tokenizer
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.conversation import IMAGE, Template
from llava_sp_jax.data.example import IMAGE_ID
from llava_sp_jax.data.tokenizer import SETTINGS_FILE, Tokenizer
from llava_sp_jax.models import build

_ROWS = ("model.embed_tokens.weight", "lm_head.weight")  # tensors with a row for each id


def refuse(model: Loaded) -> None:
  """Checks that transformers' LlavaForConditionalGeneration can represent a model.

  Raises: FormatError for a model with spatial tokens, with several tiles for an image (anyres), or
    with a newline token.
  """
  config, data = model.config.model, model.config.data
  if build.image_token_count(config) > build.patch_grid(config) ** 2:
    raise FormatError(
      f"--format llava_hf: transformers has no spatial tokens (variant {config.projector.variant}); export 'llava' "
      "for the original code, or 'language_model' for the decoder alone"
    )
  if data.image_aspect == "anyres" or config.image_newline:
    raise FormatError("--format llava_hf: tiles (anyres) are not written; export 'llava'")


def write(model: Loaded, out: Path, tower: list[Tensor], projector: list[Tensor]) -> None:
  """Writes tensors, settings and tokenizer of a model without adapters to the folder `out`.

  `tower` and `projector` are their tensors, under the names of `tables` and `projector_names`.
  """
  config = model.config
  rows = config.model.language_model.vocab_size
  tokens = _Tokens.of(model.tokenizer, config.data.template, rows, out)
  tensors = []
  for tensor in to_tensors(model.part("language_model"), tables.LLAMA):
    if tensor.name in _ROWS and tokens.new:
      tensor = _with_row(tensor, tokens.image)
    tensors.append(tensor.renamed(f"language_model.{tensor.name}"))
  tensors += [t.renamed(f"vision_tower.{t.name}") for t in tower]
  for tensor in projector:
    layer = {"0": "linear_1", "2": "linear_2"}[tensor.name.split(".")[2]]
    kind = tensor.name.rsplit(".", 1)[1]
    tensors.append(tensor.renamed(f"multi_modal_projector.{layer}.{kind}"))
  torch_write.save_safetensors(tensors, out)
  for name, values in _settings(config, tokens, max(rows, tokens.image + 1)).items():
    (out / name).write_text(json.dumps(values, indent=2) + "\n")
  if template := chat_template(conversation.TEMPLATES[config.data.template]):
    (out / "chat_template.jinja").write_text(template)


@dataclasses.dataclass(frozen=True)
class _Tokens:
  """Holds the ids that transformers needs.

  `new` says that the image token was not in the tokenizer before.
  """

  image: int
  new: bool
  stops: tuple[int, ...] = ()
  bos: int | None = None
  pad: int | None = None
  padded: tuple[int, ...] = ()  # padding rows of the embedding, which no token has

  @classmethod
  def of(cls, folder: Path | None, template: str, rows: int, out: Path) -> _Tokens:
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
    theirs.chat_template = None  # `write` writes it as a file
    image = theirs.convert_tokens_to_ids(IMAGE)
    _read_alike(ours, theirs, image, conversation.TEMPLATES[template], folder)
    theirs.save_pretrained(out)
    settings = json.loads((out / SETTINGS_FILE).read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes rebuild tokenizer.json
    (out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return cls(image, new, stops, ours.bos_id, theirs.pad_token_id, tuple(range(len(theirs), rows)))


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


def _with_row(tensor: Tensor, row: int) -> Tensor:
  """Returns the tensor [V, D] with the mean of its rows as `row`, appended or replaced.

  The mean of all logits is never the largest, so the token of that row is never chosen.
  """

  def read() -> np.ndarray:
    values = tensor.array()
    mean = values.astype(np.float32).mean(0, keepdims=True).astype(values.dtype)
    return np.concatenate([values[:row], mean, values[row + 1 :]])

  shape = (max(tensor.shape[0], row + 1), *tensor.shape[1:])
  return dataclasses.replace(tensor, shape=shape, array=read)


def _settings(config: config_lib.Config, tokens: _Tokens, rows: int) -> dict[str, Any]:
  """Returns the JSON files beside the tensors, by name."""
  model, data = config.model, config.data
  clip = model.tower.variant == "clip"
  language_model = dataclasses.replace(model.language_model, vocab_size=rows)
  strategy = "default" if clip else "full"
  ends = list(tokens.stops)
  ids = {"bos_token_id": tokens.bos, "eos_token_id": ends or None, "pad_token_id": tokens.pad}
  text = settings_out.language_model_json(language_model, model.frozen_dtype)
  whole = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {**text, **ids, "eos_token_id": ends[0] if ends else None},
    "vision_config": settings_out.tower_json(model.tower, build.tower_layers(model)),
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": strategy,
    "image_seq_length": build.image_token_count(model),
    "image_token_index": tokens.image,
    "torch_dtype": model.frozen_dtype,
    "tie_word_embeddings": language_model.tie_embeddings,
  }
  processor = {
    "processor_class": "LlavaProcessor",
    "patch_size": model.tower.patch_size,
    "vision_feature_select_strategy": strategy,
    "image_token": IMAGE,
    "num_additional_image_tokens": int(clip),
  }
  generation = {**ids, "do_sample": False, "suppress_tokens": [tokens.image, *tokens.padded]}
  pixels = settings_out.processor_json(data, model.tower.image_size)
  if data.image_aspect == "pad":
    crop = pixels.get("do_center_crop", False)  # no effect on a square
    pixels |= {
      "image_processor_type": "LlavaImageProcessor",
      "do_pad": True,
      "do_center_crop": crop,
    }
  pixels["processor_class"] = "LlavaProcessor"
  return {
    "config.json": whole,
    "processor_config.json": processor,
    "preprocessor_config.json": pixels,
    "generation_config.json": generation,
  }


_CHAT = """\
{{{{ {system} }}}}{{% for message in messages %}}\
{{% set text = namespace(images='', said='') %}}\
{{% if message['content'] is string %}}{{% set text.said = message['content'] %}}{{% else %}}\
{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}\
{{% set text.images = text.images + {image} %}}{{% elif part['type'] == 'text' %}}\
{{% set text.said = text.said + part['text'] %}}{{% endif %}}{{% endfor %}}{{% endif %}}\
{{% if message['role'] == 'user' %}}\
{{{{ ({first} if loop.first else {before}) + text.images + text.said + {after} }}}}\
{{% elif message['role'] == 'assistant' %}}{{{{ {answer} + text.said + {end} }}}}{{% endif %}}\
{{% endfor %}}"""


def chat_template(template: Template) -> str:
  """Returns a conversation template as Jinja, for transformers' `apply_chat_template`.

  Returns "" for a template without turns.
  """
  if template.image_only:
    return ""
  first = template.before if template.first is None else template.first
  values = {
    "system": template.system,
    "first": first,
    "before": template.before,
    "after": template.after,
    "answer": template.answer,
    "end": template.end,
    "image": f"{template.image}\n",
  }
  return _CHAT.format(**{name: json.dumps(text) for name, text in values.items()})
