"""Lists the keys of the settings files that `--format huggingface` writes and transformers saves."""

from __future__ import annotations

from llava_sp_jax.convert.key_tables import PRETRAINED
from llava_sp_jax.convert.keys import (
  FLAG,
  GROUP,
  SIZE,
  TEXT,
  Table,
  choice,
  honored,
  idle,
  listing,
  maybe,
  real,
  rows,
  whole,
)

_ASPECT = choice("pad", "square", "anyres")
_MERGE = choice("flat", "spatial", "spatial_unpad")
_PAIRS = listing(listing(SIZE, 2, 2), 0)
_NAMES = listing(TEXT, 0)
_SIDES = listing(SIZE, 0)
CONFIG: Table = {  # config.json
  **PRETRAINED,
  "text_config": honored(GROUP, "the decoder: its own table"),
  "vision_config": honored(GROUP, "the tower: its own table"),
  "projector": honored(GROUP, "the projector's variant: a table of its own"),
  "num_spatial_tokens": honored(whole(0, 1 << 20), "of a tile; compared with the variant's"),
  "image_newline": honored(FLAG, "whether a token ends rows of patches; compared with the tensors"),
  "image_aspect_ratio": honored(_ASPECT, "how a picture becomes square, or tiles"),
  "image_grid_pinpoints": honored(_PAIRS, "canvases of anyres, (height, width)"),
  "patch_merge_type": honored(_MERGE, "order of the tokens of an image"),
  "vision_feature_layer": honored(whole(-1, -1), "the layer that is read, with which the tower ends"),
  "conversation_template": honored(TEXT, "the conversation template"),
  "base_dtype": honored(choice("float32", "bfloat16", "float16"), "of the base in training"),
  "tokenizer_model_max_length": honored(whole(8, 1 << 24), "tokens of a row in training"),
  "image_token_id": idle("an image's places are not marked by a token here"),
  "tie_word_embeddings": honored(maybe(FLAG), "ties the output layer, as the text_config's does"),
}  # fmt: skip
PROJECTOR: Table = {  # projector, in config.json
  "variant": honored(TEXT, "the projector's variant"),
  "scales": honored(_SIDES, "sides of its views"),
  **rows(honored(_NAMES, "compared with the variant's"), "views"),
  **rows(honored(TEXT, "compared with the variant's"), "extractor", "detail_merge"),
  **rows(honored(_SIDES, "compared with the variant's"), "detail_kernels", "detail_sizes",
    "detail_values"),
  **rows(honored(whole(0, 1 << 20), "compared with the variant's"), "detail_field",
    "detail_stride"),
  **rows(honored(FLAG, "compared with the variant's"), "out_bias", "detail_as_tokens"),
  "token_width": idle("the shapes of the tensors say it"),
}  # fmt: skip
PROCESSOR: Table = {  # processor_config.json
  "image_processor": honored(GROUP, "the picture's settings: their own table"),
  "patch_size": honored(SIZE, "compared with the tower's"),
  "num_spatial_tokens": honored(whole(0, 1 << 20), "compared with config.json"),
  "patch_merge_type": honored(_MERGE, "compared with config.json"),
  "image_token": idle("an image's places are not marked by a token here"),
  "chat_template": idle("templates are rows of data.conversation"),
  **rows(idle("of another program"), "processor_class", "auto_map", "transformers_version"),
}  # fmt: skip
IMAGES: Table = {  # image_processor, in processor_config.json
  "size": honored(GROUP, "pixels of a side; compared with the tower's"),
  "image_aspect_ratio": honored(_ASPECT, "compared with config.json"),
  "image_grid_pinpoints": honored(_PAIRS, "compared with config.json"),
  "image_fit": honored(choice("crop", "stretch"), "how a picture becomes square"),
  "resample": honored(whole(0, 5), "how pixels are interpolated, in PIL's numbers"),
  "image_mean": honored(listing(real(-10, 10), 3, 3), "subtracted"),
  "image_std": honored(listing(real(1e-6, 100), 3, 3), "divided by"),
  **rows(idle("of another program"), "image_processor_type", "auto_map", "processor_class",
    "_processor_class", "transformers_version"),
}  # fmt: skip
