"""How many rows of an embedding a tokenizer needs."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from llava_sp_jax.data.tokenizer import Tokenizer


def test_gaps_between_ids_count(tmp_path: Path) -> None:
  """Some leave ids free in front of what was added: the last one is chosen as any other."""
  vocabulary = {"a": 0, "b": 1, "<unk>": 2, "</s>": 9}
  fast = Fast(WordLevel(vocabulary, unk_token="<unk>"))
  made = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")
  made.save_pretrained(tmp_path)
  tokenizer = Tokenizer(tmp_path)
  assert (len(made), len(tokenizer)) == (4, 10)
