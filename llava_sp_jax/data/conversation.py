"""Turns a dialogue into pieces of text by a conversation template, each supervised or context.

Replies and their end marks are supervised; all other text is context. Supervision is decided turn
by turn, and never by searching the finished prompt. This avoids two faults of the original: it
drops samples with "tokenization mismatch" (a separator inside a reply, most dialogues of the mpt
and chatml templates), and its labels for v0 are off by some tokens.
Source: `llava/conversation.py`, `preprocess*` in `llava/train/train.py` of the original code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from llava_sp_jax.data.failure import SampleError

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Template:
  """Holds the text around the turns of a dialogue.

  A dialogue is written as `system`, and for each turn `before`, question, `after`, `answer`, reply,
  `end`. `with_system` builds the same template with a different system text; it is None for a
  template without a system text.
  """

  system: str
  before: str
  after: str
  answer: str
  end: str
  first: str | None = None  # replaces `before` at the first question
  unanswered: str | None = None  # replaces `after` in training, for a question without a reply
  image: str = IMAGE  # the text that stands for an image
  image_only: bool = False  # whether a question is reduced to its images
  empty_reply: bool = False  # whether an empty reply is written and supervised, or left out
  training: Template | None = None  # the template of training, if the original trains another text
  with_system: Callable[[str], Template] | None = dataclasses.field(default=None, compare=False)


# The separator styles of the original; the arguments are what its templates vary.


def single(system: str, example: str = "", image: str = IMAGE) -> Template:
  """Closes every turn with `###`; training uses another text than prompts, as in the original.

  `example` is a dialogue that follows the system text in prompts. `image` stands for an image.
  """
  trained = Template(
    f"{system}\n\n### ",
    "Human: ",
    "\n### Assistant:",
    " ",
    "\n### ",
    unanswered="\n### ",
    image=image,
    empty_reply=True,
  )
  return Template(
    f"{system}###{example}",
    "Human: ",
    "###Assistant:",
    " ",
    "###",
    image=image,
    training=trained,
    with_system=functools.partial(single, example=example, image=image),
  )


def two(system: str, image: str = IMAGE) -> Template:
  """Closes a question with a space and a reply with `</s>`; `image` stands for an image."""
  return Template(
    f"{system} ",
    "USER: ",
    " ASSISTANT:",
    " ",
    "</s>",
    unanswered=" ",
    image=image,
    with_system=functools.partial(two, image=image),
  )


def chatml(system: str, gap: str = "") -> Template:
  """Closes every turn with `<|im_end|>` and `gap`."""
  end = f"<|im_end|>{gap}"
  return Template(
    f"<|im_start|>system\n{system}{end}",
    "<|im_start|>user\n",
    f"{end}<|im_start|>assistant\n",
    "",
    end,
    unanswered=end,
    with_system=functools.partial(chatml, gap=gap),
  )


def llama_2(system: str, start: str) -> Template:
  """Puts `[INST]` marks around each question, and the system text into the first question.

  `start` stands in front of each mark but the first.
  """
  first = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
  return Template(
    "",
    f"{start}[INST] ",
    " [/INST]",
    " ",
    " </s>",
    first=first,
    with_system=functools.partial(llama_2, start=start),
  )


def plain() -> Template:
  """Writes images and their caption alone.

  The original prompts with a question as well, though it trains without one.
  """
  return Template("", "", "", "", "\n", image_only=True, empty_reply=True)


_CHAT = (
  "A chat between a curious {0} and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_TAGGED = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant is able to understand the visual content that the user provides, and assist the "
  "user with a variety of tasks using natural language."
  "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_TAG = f"<Image>{IMAGE}</Image>"
_EXAMPLE = (
  "Human: What are the key differences between renewable and non-renewable energy sources?###"
  "Assistant: Renewable energy sources are those that can be replenished naturally in a relatively "
  "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
  "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
  "such as coal, oil, and natural gas. "
  "Here are some key differences between renewable and non-renewable energy sources:\n"
  "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
  "energy sources are finite and will eventually run out.\n"
  "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
  "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
  "and other negative effects.\n"
  "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
  "have lower operational costs than non-renewable sources.\n"
  "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
  "locations than non-renewable sources.\n"
  "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
  "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
  "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
  "non-renewable sources are not, and their depletion can lead to economic and social "
  "instability.\n###"
)
_LLAMA_2 = (
  "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
  "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
  "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
  "and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, "
  "explain why instead of answering something not correct. If you don't know the answer to a "
  "question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
  "You are a helpful language and vision assistant. You are able to understand the visual content "
  "that the user provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
  "A conversation between a user and an LLM-based AI assistant. "
  "The assistant gives helpful and honest answers."
)
_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# The original trains `v0` with the text of `v1`; here every row trains and prompts with its own.
TEMPLATES = {
  "default": single(_CHAT.format("human"), _EXAMPLE),
  "v0": single(_CHAT.format("human"), _EXAMPLE),
  "llava_v0": single(_CHAT.format("human")),
  "v0_mmtag": single(_TAGGED, image=_TAG),
  "v1": two(_CHAT.format("user")),
  "vicuna_v1": two(_CHAT.format("user")),
  "llava_v1": two(_CHAT.format("human")),
  "v1_mmtag": two(_TAGGED, image=_TAG),
  "llama_2": llama_2(_LLAMA_2, "<s>"),
  "llava_llama_2": llama_2(_LLAVA_LLAMA_2, "<s>"),
  "mistral_instruct": llama_2("", ""),
  "mpt": chatml(_MPT),
  "chatml_direct": chatml("Answer the questions."),
  "mistral_direct": chatml("Answer the questions."),
  "smollm2": chatml(_SMOLLM2, gap="\n"),
  "plain": plain(),
  "v0_plain": plain(),
}


@dataclasses.dataclass(frozen=True)
class TextPiece:
  """Holds consecutive text that is wholly supervised or wholly context."""

  text: str
  supervised: bool
  branch: int  # 0 is the trunk, which every branch sees
  end: int = 0  # characters of the end mark of a reply, which are the last of `text`


Turns = list[tuple[str, str | None]]  # (question, reply); the reply of an open question is None


def saying(template: Template, system: str | None) -> Template:
  """Returns the template with `system` as its system text; None keeps its own.

  Raises: SampleError for a template without a system text.
  """
  if system is None:
    return template
  if template.with_system is None:
    raise SampleError(f"the template has no place for a system text, found {system[:80]!r}")
  return template.with_system(system)


def image_first(question: str, image: str = IMAGE) -> str:
  """Returns a question with its image marks written as `image`.

  Moves a single image to the front, on a line of its own, as in the original. Leaves several images
  where the text puts them, as in LLaVA-NeXT; the original keeps only one of their marks, so its
  text no longer matches the images of the sample.
  """
  if question.count(IMAGE) == 1:
    return f"{image}\n{question.replace(IMAGE, '').strip()}".strip()
  return question.replace(IMAGE, image)


def write(turns: Turns, template: Template, open_end: str | None = None) -> list[TextPiece]:
  """Returns the pieces of a dialogue, with the questions unchanged.

  `open_end` replaces the template's `after` behind a question without a reply (None: `after`).
  Treats an empty reply as none unless the template has `empty_reply`.
  """
  pieces = [TextPiece(template.system, False, 0)]
  for i, (question, reply) in enumerate(turns):
    after = template.after if reply is not None or open_end is None else open_end
    pieces.append(TextPiece(_before(template, i) + question + after, False, 0))
    pieces += _reply(reply, template, 0)
  return pieces


def chain(turns: Turns, template: Template) -> list[TextPiece]:
  """Returns the pieces of a dialogue to train on, in which every turn sees the turns before it.

  Takes the template's text of training if that differs.
  """
  text = template.training or template
  asked = [(_asked(question, text), reply) for question, reply in turns]
  return write(asked, text, text.unanswered)


def branch(turns: Turns, template: Template) -> list[TextPiece]:
  """Returns the pieces of a dialogue to train on, in which turns do not see each other.

  Every turn is a branch that sees the system text and the image, as if it were a sample of its own;
  the image is read once.

  Raises: SampleError unless there is exactly one image, in the first turn.
  """
  text = template.training or template
  first, *others = (question for question, _ in turns)
  if first.count(IMAGE) != 1 or any(IMAGE in q for q in others):
    raise SampleError("branched turns need exactly one <image>, in the first turn")
  pieces: list[TextPiece] = []
  for i, (question, reply) in enumerate(turns):
    asked = _before(text, 0) + _asked(IMAGE + question.replace(IMAGE, ""), text) + text.after
    head, _, tail = asked.partition(IMAGE)
    pieces += [] if i else [TextPiece(text.system + head + IMAGE, False, 0)]
    pieces.append(TextPiece(tail, False, i + 1))
    pieces += _reply(reply, text, i + 1)
  return pieces


def prompt(
  question: str, template: Template, images: int = 0, history: Sequence[tuple[str, str]] = ()
) -> list[TextPiece]:
  """Returns the pieces of one question that is to be answered, after the turns before it.

  `history` are those turns, (question, answer). Puts `images` image marks in front of the first
  question if no question has any. Keeps leading and trailing spaces of a question that follows
  `<image>` and a newline, though training strips them: the original's `model_vqa*.py` write the
  image mark, a newline and the unchanged question.
  """
  turns: Turns = [*history, (question, None)]
  if not any(IMAGE in question for question, _ in turns):
    turns[0] = (f"{IMAGE}\n" * images + turns[0][0], turns[0][1])
  return write([(_prompted(question, template), reply) for question, reply in turns], template)


def _prompted(question: str, template: Template) -> str:
  leading = f"{IMAGE}\n"
  if question.startswith(leading) and question.count(IMAGE) == 1 and not template.image_only:
    return f"{template.image}\n{question.removeprefix(leading)}"
  return _asked(question, template)


def _before(template: Template, turn: int) -> str:
  return template.before if turn or template.first is None else template.first


def _asked(question: str, template: Template) -> str:
  count = question.count(IMAGE)
  return template.image * count if template.image_only else image_first(question, template.image)


def _reply(reply: str | None, template: Template, segment: int) -> list[TextPiece]:
  written = reply is not None and (reply or template.empty_reply)
  text = f"{template.answer}{reply}{template.end}"
  return [TextPiece(text, True, segment, len(template.end))] if written else []


TURNS = {"chain": chain, "branch": branch}
