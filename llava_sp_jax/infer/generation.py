"""Defines the settings of generation, which every score must state; imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MOST = 1 << 20  # the largest number of tokens or beams
MOST_STOP_IDS = 128  # `stop_ids` of a request; the arrays of a row have places for so many
MOST_BIASES = 1024  # entries of `logit_bias`, likewise
MOST_LOG_PROBABILITIES = 20  # likeliest tokens that are reported at each place of an answer
# Settings that every record states. The others are stated where they differ from their defaults, so
# that records without them stay comparable.
ALWAYS = ("max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "stop", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """Holds the settings of generation.

  It is greedy unless `temperature` > 0 (sampling) or `num_beams` > 1 (beam search). The settings
  are applied in this order: `logit_bias`, `repetition_penalty`, `presence_penalty` and
  `frequency_penalty`, `min_new_tokens`, then for samples `temperature`, `top_k`, `top_p`, `min_p`.

  Raises: ValueError for an impossible setting; the message names it and the possible values.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0  # 0: all tokens may be drawn
  top_p: float = 1.0  # 1: all tokens may be drawn
  num_beams: int = 1
  stop: tuple[str, ...] = ()  # an answer also ends before the first of these strings
  seed: int = 0  # of sampling
  min_p: float = 0.0  # tokens below this share of the likeliest one's probability are not drawn
  min_new_tokens: int = 0  # no token ends an answer before it has so many
  presence_penalty: float = 0.0  # taken from the logit of each token that the answer has
  frequency_penalty: float = 0.0  # likewise, once for each time that the answer has it
  repetition_penalty: float = 1.0  # divides logits of tokens of prompt and answer, if above 0
  logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
  stop_ids: tuple[int, ...] = ()  # ids that end an answer beside those of the template
  ignore_eos: bool = False  # those of the template do not end an answer
  log_probabilities: int | None = None  # of the chosen tokens, and of so many likeliest ones

  def __post_init__(self) -> None:
    biases = [bias for _, bias in self.logit_bias]
    ids = [*self.stop_ids, *(token for token, _ in self.logit_bias)]
    sampled = self.temperature > 0 or self.min_p > 0 or self.edits
    logged = self.log_probabilities if self.log_probabilities is not None else 0
    bounds = (
      ("max_new_tokens", 1 <= self.max_new_tokens <= MOST, f"from 1 to {MOST}"),
      ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
      ("top_k", 0 <= self.top_k <= MOST, f"0 (all) or more, at most {MOST}"),
      ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
      ("num_beams", 1 <= self.num_beams <= MOST, f"from 1 to {MOST}"),
      ("num_beams", self.num_beams == 1 or self.temperature == 0, "1 where temperature > 0"),
      ("num_beams", self.num_beams == 1 or not sampled, "1 with settings that change logits"),
      ("num_beams", self.num_beams == 1 or not (ids or self.ignore_eos), "1 with other stop ids"),
      ("num_beams", self.num_beams == 1 or self.log_probabilities is None, "1 for log_probabilities"),
      ("stop", all(self.stop), "texts that are not empty"),
      ("seed", -1 << 63 <= self.seed < 1 << 63, "an integer of 64 bits"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
      ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
      ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
      ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
      ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
      ("logit_bias", all(map(math.isfinite, biases)), "finite numbers"),
      ("logit_bias", len(biases) <= MOST_BIASES, f"at most {MOST_BIASES} tokens"),
      ("stop_ids", len(self.stop_ids) <= MOST_STOP_IDS, f"at most {MOST_STOP_IDS} ids"),
      ("stop_ids or logit_bias", all(0 <= i < 1 << 31 for i in ids), "ids of tokens"),
      ("log_probabilities", 0 <= logged <= MOST_LOG_PROBABILITIES, f"0 to {MOST_LOG_PROBABILITIES}"),
    )  # fmt: skip
    for name, holds, expected in bounds:
      if not holds:
        raise ValueError(f"{name}: expected {expected}, found {getattr(self, name, ids)!r}")

  @classmethod
  def of(cls, values: Mapping[str, Any]) -> Generation:
    """Makes settings from values by name, in which lists stand for tuples as in JSON.

    Raises: ValueError for an impossible setting; TypeError for an unknown name.
    """

    def held(value: Any) -> Any:
      return tuple(map(held, value)) if isinstance(value, list | tuple) else value

    return cls(**{name: held(value) for name, value in values.items()})

  @property
  def edits(self) -> bool:
    """Returns whether logits are changed before a token is chosen."""
    return bool(
      self.logit_bias
      or self.min_new_tokens
      or self.presence_penalty
      or self.frequency_penalty
      or self.repetition_penalty != 1
    )

  def stated(self) -> dict[str, Any]:
    """Returns the settings by name, for records: all of ALWAYS, others if not the default."""
    values = dataclasses.asdict(self)
    return {k: v for k, v in values.items() if k in ALWAYS or v != getattr(DEFAULT, k)}


DEFAULT = Generation()
