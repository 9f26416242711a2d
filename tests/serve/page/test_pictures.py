"""Pictures on the page: how they come, what is sent, and the views drawn over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.serve import protocol
from tests.serve.page.conftest import Opener, page_config
from tests.serve.page.scripted import Server, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
  with serving(page_config()) as found:
    yield found


@pytest.fixture
def server(shared: Server) -> Server:
  shared.asked.clear()
  return shared


def picture(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> Path:
  """Left half red, right half blue."""
  image = Image.new("RGB", size, (255, 0, 0))
  image.paste((0, 0, 255), (size[0] // 2, 0, size[0], size[1]))
  image.save(path, **options)
  return path


def sent(form: protocol.ChatRequest) -> list[bytes]:
  """The pictures of all messages, decoded."""
  parts = [part for m in form.messages if not isinstance(m.content, str) for part in m.content]
  urls = [part.image_url.url for part in parts if isinstance(part, protocol.ImagePart)]
  return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_a_chosen_picture_is_sent_as_it_is(
  open_page: Opener, server: Server, tmp_path: Path
) -> None:
  file = picture(tmp_path / "a.png")
  opened = open_page(server)
  opened.attach(file)
  opened.ask("what is it?")
  assert sent(server.last) == [file.read_bytes()]
  assert opened.page.locator("#attached li").count() == 0
  opened.ask("and now?")
  assert sent(server.last) == [file.read_bytes()], "the picture stays in the conversation"
  first, second = (m.content for m in server.last.messages if isinstance(m, protocol.UserMessage))
  assert [type(part).__name__ for part in first] == ["ImagePart", "TextPart"]
  assert [type(part).__name__ for part in second] == ["TextPart"]


def test_several_pictures_of_which_one_goes(
  open_page: Opener, server: Server, tmp_path: Path
) -> None:
  files = [picture(tmp_path / f"{i}.png", (10 + i, 10)) for i in range(3)]
  opened = open_page(server)
  opened.attach(*files)
  opened.page.get_by_role("button", name="Remove picture 2, 1.png").click()
  opened.ask("same?")
  assert sent(server.last) == [files[0].read_bytes(), files[2].read_bytes()]


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(
  open_page: Opener, server: Server, tmp_path: Path, kind: str
) -> None:
  file = picture(tmp_path / "a.png")
  opened = open_page(server)
  opened.page.evaluate(
    """([kind, bytes]) => {
      const data = new DataTransfer();
      const content = Uint8Array.from(atob(bytes), (each) => each.charCodeAt(0));
      data.items.add(new File([content], "a.png", {type: "image/png"}));
      const fire = (name) => document.body.dispatchEvent(kind === "paste"
        ? new ClipboardEvent(name, {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true}));
      if (kind === "drop") {
        fire("dragover");
        if (!document.body.matches(".dropping")) throw Error("it does not say where to drop");
      }
      fire(kind);
    }""",
    [kind, base64.b64encode(file.read_bytes()).decode()],
  )
  opened.page.locator("#attached li").wait_for()
  assert not opened.page.evaluate("document.body.matches('.dropping')")
  opened.ask("")
  assert sent(server.last) == [file.read_bytes()], "a question may be a picture alone"


def test_what_is_no_picture_is_said(open_page: Opener, server: Server, tmp_path: Path) -> None:
  (tmp_path / "notes.txt").write_text("no picture")
  opened = open_page(server)
  opened.page.locator("#files").set_input_files(str(tmp_path / "notes.txt"))
  notice = opened.page.locator("#notice")
  notice.wait_for()
  assert notice.inner_text() == "notes.txt is no picture that this browser reads."
  assert opened.page.locator("#send").is_disabled()


def test_a_picture_that_a_camera_turned_is_sent_upright(
  open_page: Opener, server: Server, tmp_path: Path
) -> None:
  """Browsers turn it as Exif says, and the server does not."""
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  file = picture(tmp_path / "a.jpg", (40, 20), exif=exif)
  opened = open_page(server)
  opened.attach(file)
  opened.ask("what?")
  (content,) = sent(server.last)
  with Image.open(io.BytesIO(content)) as image:
    assert (image.size, image.format) == ((20, 40), "PNG")
    upper, lower = image.convert("RGB").getpixel((10, 5)), image.convert("RGB").getpixel((10, 35))
  assert upper[0] > 200 > 60 > upper[2], "red is above"
  assert lower[2] > 200 > 60 > lower[0]


def test_a_format_that_the_server_lacks_is_drawn_anew(
  open_page: Opener, server: Server, tmp_path: Path
) -> None:
  opened = open_page(server)
  opened.attach(picture(tmp_path / "a.bmp"))
  opened.ask("what?")
  (content,) = sent(server.last)
  with Image.open(io.BytesIO(content)) as image:
    assert (image.size, image.format) == ((40, 20), "PNG")
    assert image.convert("RGB").getpixel((5, 5)) == (255, 0, 0)


def test_a_huge_picture_is_made_smaller(open_page: Opener, server: Server, tmp_path: Path) -> None:
  opened = open_page(server)
  opened.attach(picture(tmp_path / "a.png", (8000, 100)))
  opened.ask("what?")
  with Image.open(io.BytesIO(sent(server.last)[0])) as image:
    assert image.size == (4096, 52)


def test_an_example_fills_the_question(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.page.get_by_role("button", name="Nested squares").click()
  opened.page.locator("#attached li").wait_for()
  assert (
    opened.page.locator("#question").input_value() == "Which color is the square in the middle?"
  )
  opened.page.keyboard.press("Enter")
  opened.page.locator(".turn .text", has_text="disk").wait_for()
  with Image.open(io.BytesIO(sent(server.last)[0])) as image:
    assert image.convert("RGB").getpixel((168, 168)) == (239, 71, 111)


PIXEL = """([x, y]) => {
  const canvas = document.getElementById("picture");
  const at = (place) => Math.floor(place * canvas.width);
  return [...canvas.getContext("2d").getImageData(at(x), at(y), 1, 1).data].slice(0, 3);
}"""


def test_the_views_are_drawn_over_the_picture(
  open_page: Opener, server: Server, tmp_path: Path
) -> None:
  opened = open_page(server)
  page = opened.page
  opened.attach(picture(tmp_path / "a.png"))
  page.locator("#views canvas#picture").wait_for()
  assert page.locator("#overlay g path").count() == 6, "all crops, one in the other"
  mean = [122, 116, 104]
  assert page.evaluate(PIXEL, [0.5, 0.1]) == mean, "padded to a square"
  assert page.evaluate(PIXEL, [0.1, 0.5]) == [255, 0, 0]
  page.locator("#tokens label", has_text="crop 4").click()
  assert page.locator("#overlay g path").get_attribute("d") == "M10 10h4v4h-4z"
  assert page.locator("#caption").inner_text() == ("Token 1 of 6: 4×4 patches, 3% of the square.")
  page.keyboard.press("ArrowRight")
  assert "Token 2 of 6: 8×8 patches" in page.locator("#caption").inner_text()
  about = page.locator("#about").inner_text()
  assert about.startswith("582 tokens: 6 spatial, 576 of patches.")
  assert "windows of 16×16" in about


def test_averages_are_drawn_as_their_colors(open_page: Opener, tmp_path: Path) -> None:
  """A column of pixels for each column of patches: the first three are red, the others blue."""
  image = Image.new("RGB", (24, 24), (0, 0, 255))
  image.paste((255, 0, 0), (0, 0, 3, 24))
  image.save(tmp_path / "a.png")
  with serving(page_config("pooling")) as server:
    opened = open_page(server)
    opened.attach(tmp_path / "a.png")
    opened.page.locator("#tokens label", has_text="pool 4").click()
    assert opened.page.locator("#caption").inner_text() == (
      "Token 1 of 6: 4×4 averages over 6×6 patches each, the whole square."
    )
    red, green, blue = opened.page.evaluate(PIXEL, [0.1, 0.3])
    assert abs(red - 127) < 12 > abs(blue - 127), "half of the six columns are red"
    assert green == 0
    assert opened.page.evaluate(PIXEL, [0.4, 0.3]) == [0, 0, 255]
    opened.page.locator("#tokens label", has_text="pool 24").click()
    assert opened.page.evaluate(PIXEL, [0.03, 0.3]) == [255, 0, 0], "nothing is averaged"


@pytest.mark.parametrize("aspect", ["pad", "square", "anyres"])
def test_the_square_is_that_of_the_model(open_page: Opener, tmp_path: Path, aspect: str) -> None:
  """Of a wide picture: padded above, cut at the sides, or squashed."""
  expected = {"pad": [122, 116, 104], "square": [255, 0, 0], "anyres": [255, 0, 0]}
  with serving(page_config(aspect=aspect)) as server:
    opened = open_page(server)
    file = tmp_path / "a.png"
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 255, 0), (0, 0, 90, 100))  # the left 30%, which a crop loses
    image.save(file)
    opened.attach(file)
    opened.page.locator("canvas#picture").wait_for()
    assert opened.page.evaluate(PIXEL, [0.6, 0.1]) == expected[aspect]
    left = opened.page.evaluate(PIXEL, [0.1, 0.5])
    assert left == ([255, 0, 0] if aspect == "square" else [0, 255, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_drawn(open_page: Opener, tmp_path: Path, variant: str) -> None:
  with serving(page_config(variant)) as server:
    opened = open_page(server)
    opened.attach(picture(tmp_path / "a.png"))
    opened.page.locator("canvas#picture").wait_for()
    labels = opened.page.locator("#tokens label")
    for i in range(labels.count()):
      labels.nth(i).click()
      caption = opened.page.locator("#caption").inner_text()
      assert caption.endswith("."), "every choice is explained"
    assert "576 of patches" in opened.page.locator("#about").inner_text()
