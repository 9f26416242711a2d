"""Computes LLaVA-SP in torch: image tokens, and the decoder that reads them in a prompt.

The tower and the decoder are transformers' own (CLIP or SigLIP; LLaMA, Mistral or Qwen2), with their
attention backends.

Shape letters:  B tiles . G grid side . C tower width . D decoder width . N tokens of an image
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_llava_sp import LlavaSPConfig, token_order
from .projector_llava_sp import Attention, Kernel, LlavaSPProjector, Register, Transformer


class LlavaSPPreTrainedModel(PreTrainedModel):
  """Holds what both models below tell transformers about themselves."""

  config_class = LlavaSPConfig
  base_model_prefix = "model"
  input_modalities = ["image", "text"]  # noqa: RUF012
  supports_gradient_checkpointing = True
  _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
  _supports_attention_backend = True
  _supports_flash_attn = True
  _supports_flex_attn = True
  _supports_sdpa = True

  @torch.no_grad()
  def _init_weights(self, module: nn.Module) -> None:
    super()._init_weights(module)
    if isinstance(module, Kernel):
      init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as a convolution of torch
    elif isinstance(module, Register):
      init.normal_(module.token, std=1 / math.sqrt(3))
    elif isinstance(module, Transformer):
      init.zeros_(module.query)
    elif isinstance(module, Attention):
      init.xavier_uniform_(module.in_proj)
    elif isinstance(module, LlavaSPProjector) and hasattr(module, "image_newline"):
      init.normal_(module.image_newline, std=1 / math.sqrt(len(module.image_newline)))


class LlavaSPModel(LlavaSPPreTrainedModel):
  """Holds the tower, the projector and the decoder without its output layer."""

  def __init__(self, config: LlavaSPConfig):
    super().__init__(config)
    self.vision_tower = AutoModel.from_config(config.vision_config)
    self.multi_modal_projector = LlavaSPProjector(config)
    self.language_model = AutoModel.from_config(config.text_config)
    self.post_init()

  def get_image_features(
    self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
  ) -> BaseModelOutputWithPooling:
    """Computes the tokens of images, in the order in which the decoder reads them.

    Args:
      pixel_values: [images, 3, H, W] for one tile each, or [images, tiles, 3, H, W]; tiles that an
        image does not have are padding.
      image_sizes: [images, 2], (height, width) of each image; only anyres needs it.

    Returns: an output whose `pooler_output` is a list with the tokens [N, D] of each image.
    """
    if pixel_values.ndim == 4:
      pixel_values = pixel_values[:, None]
    orders = self._orders(len(pixel_values), image_sizes)
    tiles = torch.cat([x[:count] for x, (_, count) in zip(pixel_values, orders, strict=True)])
    tokens = self.multi_modal_projector(self._features(tiles))
    newline = getattr(self.multi_modal_projector, "image_newline", None)
    features = []
    counts = [count for _, count in orders]
    for (order, _), part in zip(orders, tokens.split(counts), strict=True):
      rows = part.flatten(0, 1)
      if newline is not None:
        rows = torch.cat([rows, newline[None].to(rows.dtype)])
      features.append(rows[torch.as_tensor(order, device=rows.device)])
    pooled: Any = features
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)

  def _orders(self, images: int, sizes: Tensor | None) -> list[tuple[Any, int]]:
    config, tower = self.config, self.config.vision_config
    anyres = config.image_aspect_ratio == "anyres"
    if anyres and sizes is None:
      raise ValueError("tiles (anyres) need image_sizes, as the processor returns them")
    known = sizes.tolist() if anyres and sizes is not None else [(1, 1)] * images
    return [
      token_order(
        (int(height), int(width)),
        tower.image_size,
        tower.image_size // tower.patch_size,
        config.num_spatial_tokens,
        config.image_grid_pinpoints if anyres else (),
        config.patch_merge_type,
      )
      for height, width in known
    ]

  def _features(self, tiles: Tensor) -> Tensor:
    """Returns the patch features of the tower's last layer. [B, 3, H, W] -> [B, G*G, C]."""
    side = self.config.vision_config.image_size // self.config.vision_config.patch_size
    dtype = next(self.vision_tower.parameters()).dtype
    states = self.vision_tower(tiles.to(dtype), output_hidden_states=True).hidden_states[-1]
    return states[:, states.shape[1] - side * side :]  # without a class token

  def forward(
    self,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
  ) -> Any:
    """Returns what the decoder returns; image tokens replace the embeddings of `image_token_id`.

    Args:
      input_ids: [rows, T]; or else `inputs_embeds`.
      pixel_values, image_sizes: as of `get_image_features`, the images of all rows in their order.
      attention_mask, position_ids, past_key_values, inputs_embeds, kwargs: as of the decoder.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("expected either input_ids or inputs_embeds")
    if inputs_embeds is None:
      inputs_embeds = self.get_input_embeddings()(input_ids)
    if pixel_values is not None:
      if input_ids is None:
        raise ValueError("pixel_values need input_ids, which say where image tokens go")
      features: Any = self.get_image_features(pixel_values, image_sizes).pooler_output
      found = torch.cat(features)
      places = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
      if int(places[..., 0].sum()) != len(found):
        raise ValueError(
          f"the prompts have {int(places[..., 0].sum())} places for image tokens, but the images "
          f"have {len(found)} tokens"
        )
      inputs_embeds = inputs_embeds.masked_scatter(places, found.to(inputs_embeds))
    return self.language_model(
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      **kwargs,
    )


class LlavaSPForConditionalGeneration(LlavaSPPreTrainedModel, GenerationMixin):
  """Answers questions about images: `LlavaSPModel` and the output layer."""

  _tied_weights_keys = {  # noqa: RUF012
    "lm_head.weight": "model.language_model.embed_tokens.weight"
  }

  def __init__(self, config: LlavaSPConfig):
    super().__init__(config)
    self.model = LlavaSPModel(config)
    text = config.text_config
    self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    self.post_init()

  def get_image_features(
    self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
  ) -> BaseModelOutputWithPooling:
    """Computes the tokens of images, as `LlavaSPModel.get_image_features` describes."""
    return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

  def forward(
    self,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
  ) -> CausalLMOutputWithPast:
    """Returns logits [rows, T, V], and the loss if there are `labels` (-100 is not counted)."""
    kwargs["return_dict"] = True
    outputs = self.model(
      input_ids=input_ids,
      pixel_values=pixel_values,
      image_sizes=image_sizes,
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      **kwargs,
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(outputs.last_hidden_state[:, kept])
    loss = None
    if labels is not None:
      vocabulary = self.config.text_config.vocab_size
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
    return CausalLMOutputWithPast(
      loss=loss,
      logits=logits,
      past_key_values=outputs.past_key_values,
      hidden_states=outputs.hidden_states,
      attentions=outputs.attentions,
    )
