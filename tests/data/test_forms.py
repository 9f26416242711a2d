"""Each form of a sample that is read, and each that costs the sample, with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from llava_sp_jax.data import forms
from llava_sp_jax.data.failure import REASON, SampleError
from llava_sp_jax.data.forms import Dialogue

ASK, REPLY = {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}
TALK = [ASK, REPLY]
CHAT = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]
TURNS = [("<image>\nwhat?", "red")]
BARE = [{"from": "human", "value": "what?"}, REPLY]
ONE = {"image": "a.png"}


READ: dict[str, tuple[dict[str, Any], Dialogue]] = {
  "llava": ({"conversations": TALK, **ONE}, Dialogue(TURNS, ("a.png",))),
  "text alone": ({"conversations": BARE}, Dialogue([("what?", "red")])),
  "several": ({"conversations": TALK, "image": ["a", "b"]}, Dialogue(TURNS, ("a", "b"))),
  "images": ({"conversations": TALK, "images": ["a", "b"]}, Dialogue(TURNS, ("a", "b"))),
  "images, one": ({"conversations": TALK, "images": "a"}, Dialogue(TURNS, ("a",))),
  "said twice": ({"conversations": TALK, "image": "a", "images": ["a"]}, Dialogue(TURNS, ("a",))),
  "messages": ({"messages": CHAT, "images": ["a"]}, Dialogue(TURNS, ("a",))),
  "roles in conversations": ({"conversations": CHAT, **ONE}, Dialogue(TURNS, ("a.png",))),
  "nothing in a key": (
    {"conversations": BARE, "image": None, "images": [], "video": "", "system": "", "messages": []},
    Dialogue([("what?", "red")]),
  ),
  "system": ({"conversations": BARE, "system": "Be terse."}, Dialogue([("what?", "red")], (), "Be terse.")),
  "system turn": (
    {"conversations": [{"from": "system", "value": "Be terse."}, *BARE]},
    Dialogue([("what?", "red")], (), "Be terse."),
  ),
  "system twice": (
    {"messages": [{"role": "system", "content": "X"}, *CHAT], "system": "X", **ONE},
    Dialogue(TURNS, ("a.png",), "X"),
  ),
  "greeting": ({"conversations": [REPLY, *BARE]}, Dialogue([("what?", "red")])),
  "open": ({"conversations": [*BARE, BARE[0]]}, Dialogue([("what?", "red"), ("what?", None)])),
  "parts": (
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                  CHAT[1]], "images": ["a"]},
    Dialogue(TURNS, ("a",)),
  ),
  "parts that name images": (
    {"messages": [{"role": "user", "content": [
      {"type": "text", "text": "see"}, {"type": "image", "image": "a"},
      {"type": "image", "image": "b"}]}, CHAT[1]]},
    Dialogue([("see\n<image>\n<image>", "red")], ("a", "b")),
  ),
  "where a picture is from": (
    {"conversations": TALK, **ONE, "image_url": "http://x/a.png", "image_id": 3, "video_frames": 0},
    Dialogue(TURNS, ("a.png",)),
  ),
  "replies that are all learned": (
    {"conversations": [{**BARE[0], "loss": False}, {**REPLY, "loss": True, "weight": 1.0}],
     "loss_mask": [0, 1], "loss": 2.5, "weight": 0.5},
    Dialogue([("what?", "red")]),
  ),
  "a sample called like a file": ({"conversations": BARE, "id": "a.png"}, Dialogue([("what?", "red")])),
  "a text that refers to pictures": (
    {"conversations": [{"from": "human", "value": "<image>\nis <image1> red?"}, REPLY], **ONE},
    Dialogue([("<image>\nis <image1> red?", "red")], ("a.png",)),
  ),
  "a text about a tag": (
    {"conversations": [{"from": "human", "value": "what is <img src='a.png'> in HTML?"}, REPLY]},
    Dialogue([("what is <img src='a.png'> in HTML?", "red")]),
  ),
  "a turn said twice": (
    {"conversations": [{**BARE[0], "role": "user", "content": "what?"}, REPLY]},
    Dialogue([("what?", "red")]),
  ),
  "a text about marks": (
    {"conversations": [{"from": "human", "value": "what does <video> mean in HTML?"}, REPLY]},
    Dialogue([("what does <video> mean in HTML?", "red")]),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str) -> None:
  sample, wanted = READ[name]
  assert forms.read(sample) == wanted


VIDEO = {"conversations": [{"from": "human", "value": "<video>\nwhat happens?"}, REPLY]}
LOST: dict[str, tuple[Any, str]] = {
  "no dictionary": ("x", "expected a dictionary, found 'x'"),
  "a line that is none": (SampleError("line 3 is not JSON"), "line 3 is not JSON"),
  "no dialogue": ({"prompt": "x"}, "`conversations` must be a list .* found keys 'prompt'"),
  "an empty one": ({"messages": []}, "must be a list .* at least one turn"),
  "one that is a text": ({"messages": "hello"}, "`messages` must be a list .* found .*'hello'"),
  "two dialogues": ({"conversations": TALK, "messages": BARE}, "both `conversations` and `messages`"),
  "two images": ({"conversations": TALK, "image": "a", "images": ["b"]}, "both `image` and `images`"),
  "images twice": (
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}, CHAT[1]],
     "images": ["b"]}, "in the turns and beside them"),
  "video": ({**VIDEO, "video": "v.mp4"}, "`video` 'v.mp4' is not read; images are read from image"),
  "video beside an image": ({"conversations": TALK, **ONE, "videos": ["v.mp4"]}, "`videos` .*not read"),
  "audio": ({"conversations": BARE, "audio": {"path": "x.wav"}}, "`audio` .*is not read"),
  "image under another key": ({"conversations": BARE, "image_path": "a.png"}, "`image_path` 'a.png' is"),
  "another one": ({"conversations": BARE, "img": "a.png"}, "`img` 'a.png' is not read"),
  "a further image": ({"conversations": TALK, **ONE, "image_2": "b.png"}, "`image_2` 'b.png' is not read"),
  "numbered images": ({"conversations": BARE, "image1": "a.png", "image2": "b.png"}, "`image1` 'a.png' is"),
  "a file under any key": ({"conversations": BARE, "screenshot": "shots/1.PNG"}, "`screenshot` .*is not"),
  "files under any key": ({"conversations": BARE, "media": ["a.mp4"]}, r"`media` \['a.mp4'\] is not read"),
  "bytes under any key": ({"conversations": BARE, "jpg": b"\xff\xd8"}, "`jpg` .*is not read"),
  "a dictionary of a file": (
    {"conversations": BARE, "visual": {"bytes": None, "path": "a.webp"}}, "`visual` .*is not read"),
  "a data URI under any key": ({"conversations": BARE, "x": "data:image/png;base64,AA"}, "`x` .*is not"),
  "a medium's mark": (VIDEO, "turn 0: <video> is not read"),
  "a medium's mark behind an image": (
    {"conversations": [{"from": "human", "value": "<image>\n<video>\nwhat?"}, REPLY], **ONE},
    "turn 0: <image> <video> is not read"),
  "a turn of two speakers": (
    {"conversations": [{"from": "human", "role": "assistant", "value": "what?"}, REPLY]},
    "turn 0: {'from': 'human', 'role': 'assistant'} are two speakers; expected one"),
  "a mark behind": (
    {"conversations": [{"from": "human", "value": "listen\n<audio>"}, REPLY]}, "<audio> is not read"),
  "a book": (
    {"conversations": [*BARE, BARE[0], {"from": "gpt", "value": "ab " * (1 << 19)}]},
    "a dialogue of 1,572,877 characters; at most 1,048,576 are read"),
  "a numbered mark": (
    {"conversations": [{"from": "human", "value": "<video_1>\nwhat?"}, REPLY]}, "<video_1> is not read"),
  "a file in the text, as Qwen-VL has it": (
    {"conversations": [{"from": "user", "value": "Picture 1: <img>a.jpeg</img>\nwhat?"}, REPLY]},
    "'<img>a.jpeg</img>' in a question is not read; expected <image>, and its file in `image`"),
  "marks of images that are not there": (
    {"conversations": [{"from": "human", "value": "is <image1> like <image2>?"}, REPLY]},
    "'<image1>' in a question is not read"),
  "another's mark": (
    {"conversations": [{"from": "human", "value": "see <ImageHere>what?"}, REPLY]}, "'<ImageHere>' in"),
  "a token of Qwen2-VL": (
    {"messages": [{"role": "user", "content": "<|vision_start|><|image_pad|>what?"}, CHAT[1]]},
    r"'<\|vision_start\|>' in a question"),
  "a reply that is not learned": (
    {"messages": [CHAT[0], {**CHAT[1], "loss": False}], **ONE}, "turn 1: `loss` False is not read"),
  "a reply with a weight": (
    {"messages": [CHAT[0], {**CHAT[1], "weight": 0}], **ONE}, "`weight` 0 is not read; all replies"),
  "a mask over the turns": (
    {"conversations": [*BARE, *BARE], "loss_mask": [0, 0, 0, 1]}, "turn 1: `loss_mask` 0 is not read"),
  "two texts in a turn": (
    {"conversations": [BARE[0], {**REPLY, "content": "blue"}]},
    "turn 1: both `value` and `content` are given"),
  "an image in a part of text": (
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?", "image": "a.png"}]},
                  CHAT[1]]}, "turn 0: `image` is not read in a part of type text"),
  "media within a turn": (
    {"conversations": [{**BARE[0], "image": "a.png"}, REPLY]}, "turn 0: `image` is not read within"),
  "parts of another kind": (
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}, CHAT[1]]},
    "turn 0: expected parts of type text, image, found"),
  "no text": ({"messages": [{"role": "user", "content": None}]}, "turn 0: expected a text or a list"),
  "another role": ({"messages": [{"role": "tool", "content": "x"}]}, "one of human, user, .*'tool'"),
  "system late": (
    {"conversations": [*BARE, {"from": "system", "value": "x"}]}, "turn 2: expected a text from 'human'"),
  "only system": ({"conversations": [{"from": "system", "value": "x"}]}, "no turn from 'human'"),
  "two systems": (
    {"conversations": [{"from": "system", "value": "x"}, *BARE], "system": "y"}, "two system texts"),
  "system that is none": ({"conversations": BARE, "system": ["x"]}, "`system` must be a text"),
  "half a pair": (
    {"conversations": [BARE[0], {"from": "gpt", "value": "red \ud83d car"}]},
    r"turn 1: half of a surrogate pair, '\\ud83d', at 4"),
  "half a pair in the system text": (
    {"conversations": BARE, "system": "\ud83d"}, "`system`: half of a surrogate pair"),
  "base64": (
    {"conversations": TALK, "image": "iVBORw0KGgo" * 1000}, "found 11,000 characters .* base64 to files"),
  "a data URI": ({"conversations": TALK, "image": "data:image/png;base64,AA"}, "must be a file name"),
  "an image that is none": ({"conversations": TALK, "image": {"path": "a"}}, "must be a file name or"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_costs_the_sample(name: str) -> None:
  sample, message = LOST[name]
  with pytest.raises(SampleError, match=message) as raised:
    forms.read(sample)
  assert len(str(raised.value)) <= REASON


def test_a_reason_is_one_line_that_can_be_printed() -> None:
  error = SampleError(f"image {'a' * 500}\n\ud83d\x00: no such file")
  assert len(str(error)) == REASON
  assert str(error).endswith("aaa \\ud83d\\x00: no such file")
  assert str(error).startswith("image aaa")
  assert " ... " in str(error)
  str(error).encode()
  long = SampleError("x" * (1 << 20) + "y")
  assert (len(str(long)), str(long)[-1]) == (REASON, "y")
