"""Settings of the golden tokenizer under which the original's ids were read."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = {
  "legacy_false": {"legacy": False},
  "legacy_true": {"legacy": True},
  "no_bos_chatml": {
    "legacy": False,
    "add_bos_token": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
  },
}

TEXT_OF_ALL_KINDS = "the cat sat\non a mat</s> é漢🙂"
