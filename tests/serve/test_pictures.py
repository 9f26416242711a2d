"""Pictures of a request: what is read, and what is refused before it is decoded."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import tracemalloc

import pytest

from llava_sp_jax.serve import pictures
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT, Limits
from tests.serve.pictures import SVG, data_url, encoded, png_of

SMALL = dataclasses.replace(DEFAULT, picture_bytes=4096, picture_pixels=64 * 64)


def refusal(url: str, limits: Limits = SMALL) -> ApiError:
  with pytest.raises(ApiError) as caught:
    asyncio.run(pictures.read([(url, "messages[0].content[0].image_url.url")], limits))
  assert 400 <= caught.value.status < 500
  assert caught.value.param == "messages[0].content[0].image_url.url"
  return caught.value


@pytest.mark.parametrize("kind", [name for _, name in pictures.SIGNATURES])
def test_formats_that_clients_send(kind: str) -> None:
  content = encoded(kind)
  for url in (
    data_url(content, f"image/{kind.lower()}"),
    data_url(content, "IMAGE/PNG;name=a.png").replace("data", "DATA"),  # the content decides
    base64.b64encode(content).decode(),
  ):
    assert asyncio.run(pictures.read([(url, "x")], SMALL)) == (content,)


def test_pictures_keep_their_order() -> None:
  contents = [encoded(size=(n, 1)) for n in range(1, 6)]
  urls = [(data_url(content), "x") for content in contents]
  assert asyncio.run(pictures.read(urls, SMALL)) == tuple(contents)


def test_base64_of_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pictures, "SLICE", 8)
  content = encoded()
  assert pictures.inline(data_url(content), "x", SMALL) == content
  half = base64.b64encode(content[:4]).decode()  # ends with '==' at the end of a slice
  assert refusal(f"data:image/png;base64,{half}{half}").code == "invalid_base64"


GOOD = base64.b64encode(encoded()).decode()
REFUSED = {
  # name: (URL, code, part of the message)
  "nothing": ("", "invalid_image", "empty"),
  "empty data": ("data:image/png;base64,", "invalid_image", "empty"),
  "a line break": (GOOD[:8] + "\n" + GOOD[8:], "invalid_base64", "no line breaks"),
  "spaces": (f"data:image/png;base64, {GOOD}", "invalid_base64", "is not base64"),
  "URL-safe letters": (f"data:image/png;base64,{'-_' * 8}", "invalid_base64", "A-Z a-z 0-9"),
  "no padding": ("data:image/png;base64,QUJDRA", "invalid_base64", "adding"),
  "padding inside": (f"data:image/png;base64,QQ=={GOOD}", "invalid_base64", "before the end"),
  "too much padding": (f"data:image/png;base64,{GOOD}====", "invalid_base64", "before the end"),
  "letters of other scripts": ("Ａ" * 64, "invalid_base64", "is not base64"),
  "a percent sign": (f"data:image/png;base64,%2B{GOOD}", "invalid_base64", "is not base64"),
  "data that is text": ("data:image/svg+xml,<svg/>", "invalid_image_url", "without base64"),
  "data without a comma": ("data:image/png;base64", "invalid_image_url", "without base64"),
  "many parameters": (f"data:image/png{';a=b' * 99};base64,{GOOD}", "invalid_image_url", "without"),
  "a page": (data_url(encoded(), "text/html"), "invalid_image", "media type is 'text/html'"),
  "SVG": (data_url(SVG, "image/svg+xml"), "invalid_image", "SVG"),
  "SVG that is called PNG": (data_url(SVG), "invalid_image", "SVG"),
  "text": (data_url(b"no picture at all"), "invalid_image", "PNG, JPEG, GIF, WEBP"),
  "a TIFF": (data_url(encoded("TIFF"), "image/tiff"), "invalid_image", "known formats"),
  "the start of a PNG": (data_url(encoded()[:12]), "invalid_image", "cannot be decoded"),
  "a PNG of 65,535 x 65,535": (data_url(png_of(65535, 65535)), "invalid_image", "pixels"),
  "a PNG of 2^31 x 1": (data_url(png_of((1 << 31) - 1, 1)), "invalid_image", ""),
  "a PNG of 0 x 0": (data_url(png_of(0, 0)), "invalid_image", ""),
  "a bomb": (data_url(png_of(1000, 1000, bytes(3_001_000))), "image_too_large", "64x64"),
  "a long strip": (data_url(png_of(65, 1)), "image_too_large", "65x1"),
  "many bytes": (data_url(encoded() + bytes(4096)), "image_too_large", "4,096"),
  "a file": ("file:///etc/passwd", "invalid_image_url", "'file'"),
  "FTP": ("ftp://example.com/a.png", "invalid_image_url", "'ftp'"),
  "gopher": ("gopher://127.0.0.1:25/_x", "invalid_image_url", "'gopher'"),
  "JavaScript": ("javascript:alert(1)", "invalid_image_url", "'javascript'"),
  "a URL, where none are fetched": (
    "https://example.com/a.png", "image_url_refused", "fetches no pictures by URL; send it inline"),
}  # fmt: skip


@pytest.mark.parametrize(("url", "code", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_pictures(url: str, code: str, says: str) -> None:
  error = refusal(url)
  assert (error.code, says in str(error)) == (code, True), error


def test_too_many_pictures_are_refused_before_any_is_decoded() -> None:
  with pytest.raises(ApiError, match="17 pictures; at most 16") as caught:
    asyncio.run(pictures.read([("not base64!", "x")] * 17, DEFAULT))
  assert caught.value.code == "too_many"


def test_all_pictures_together() -> None:
  content = encoded()
  limits = dataclasses.replace(SMALL, all_picture_bytes=3 * len(content) - 1)
  urls = [(data_url(content), f"picture {i}") for i in range(4)]
  assert len(asyncio.run(pictures.read(urls[:2], limits))) == 2
  with pytest.raises(ApiError, match="fewer or smaller") as caught:
    asyncio.run(pictures.read(urls, limits))
  assert (caught.value.code, caught.value.param) == ("image_too_large", "picture 2")


def test_a_picture_that_is_too_large_costs_no_memory() -> None:
  url = "data:image/png;base64," + "A" * (32 << 20)
  tracemalloc.start()
  assert refusal(url, DEFAULT).code == "image_too_large"
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1 << 20
