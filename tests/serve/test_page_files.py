"""The files of the page: small, strict, of one origin; and what they are told of each variant."""

from __future__ import annotations

import importlib.resources
import json
import re
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data.anyres import ASPECTS
from llava_sp_jax.data.image import FITS
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.spatial import pooling_matrix
from llava_sp_jax.serve import page, views

MOST = 60_000  # bytes of all files
FOLDER = importlib.resources.files("llava_sp_jax.serve") / "page"


def config(variant: str = "cropping", **data: Any) -> config_lib.Config:
  return config_lib.Config(
    model=config_lib.ModelConfig(projector=config_lib.ProjectorConfig(variant=variant)),
    data=config_lib.DataConfig(**data),
  )


@pytest.fixture(scope="module")
def client() -> TestClient:
  return TestClient(Starlette(routes=page.routes("tiny", config("none"))))


def content(name: str) -> str:
  return (FOLDER / name).read_text()


def test_the_files_are_small_and_all_served() -> None:
  files = {file.name: file.read_bytes() for file in FOLDER.iterdir()}
  assert set(files) == set(page.FILES)
  assert sum(map(len, files.values())) <= MOST


@pytest.mark.parametrize("name", page.FILES)
def test_every_file_has_the_policy(client: TestClient, name: str) -> None:
  path, kind = page.FILES[name]
  found = client.get(path)
  assert (found.status_code, found.headers["content-type"]) == (200, kind)
  assert found.content == (FOLDER / name).read_bytes()
  policy = dict(rule.split(" ", 1) for rule in found.headers["content-security-policy"].split("; "))
  assert policy["default-src"] == "'none'"
  assert not re.search(r"unsafe|https?:|\*|data:", " ".join(policy.values()))
  assert {"'self'"} == {policy[rule] for rule in ("script-src", "style-src", "connect-src")}
  assert found.headers["x-content-type-options"] == "nosniff"
  assert found.headers["referrer-policy"] == "no-referrer"


def test_a_known_file_is_not_sent_again(client: TestClient) -> None:
  tag = client.get("/").headers["etag"]
  for known in (tag, f'"x", W/{tag}'):
    again = client.get("/", headers={"if-none-match": known})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
  assert client.get("/", headers={"if-none-match": '"x"'}).status_code == 200


def test_no_file_names_another_server() -> None:
  for name in page.FILES:
    text = content(name).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|\bwss?:|[\"'(]//", text), name


def test_nothing_is_inline_and_no_text_becomes_markup() -> None:
  markup = content("index.html")
  assert re.findall(r"<script([^>]*)>(.*?)</script>", markup, re.DOTALL) == [
    (' type="module" src="page/page.js"', "")
  ]
  assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", markup)
  for name in page.FILES:
    if name.endswith(".js"):
      assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", content(name)
      )


def test_all_paths_are_relative_and_exist() -> None:
  """So the page also works below the root path of a proxy."""
  served = {path.removeprefix("/") for path, _ in page.FILES.values()} | {page.MODEL[1:]}
  markup = content("index.html")
  assert set(re.findall(r'(?:href|src)="([^"#]+)"', markup)) <= served
  fetched = {p for name in page.FILES for p in re.findall(r'fetch\("([^"]+)"', content(name))}
  assert fetched == {"v1/chat/completions", "page/model.json", "health"}
  for name in page.FILES:
    for other in re.findall(r'from "\./([^"]+)"', content(name)):
      assert other in page.FILES


def test_the_scripts_use_what_the_page_has() -> None:
  """Elements that scripts look up by id, and texts of fields of the model."""
  markup = content("index.html")
  known = set(re.findall(r'id="([^"]+)"', markup))
  asked = {i for name in page.FILES for i in re.findall(r'byId\("([^"]+)"\)', content(name))}
  assert asked <= known
  labels = set(
    re.findall(r'(?:for|aria-controls|aria-labelledby|aria-describedby)="([^"]+)"', markup)
  )
  assert labels <= known


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_of_every_variant_is_described(variant: str) -> None:
  found = views.describe("m", config(variant))
  assert (found.variant, found.grid, found.image_size) == (variant, 24, 336)
  assert len(found.views) + 24 * 24 == found.tokens
  assert all(view.says for view in found.views)
  for i, view in enumerate(found.views, 1):
    assert view.says.startswith(f"Token {i} of {len(found.views)}: ")
    bins = [*view.rows, *view.columns]
    assert all(0 <= first < after <= 24 for first, after in bins)
    assert len(view.rows) == len(view.columns)


def test_crops_are_squares_in_the_middle() -> None:
  found = views.describe("m", config("cropping")).views
  assert [(view.kind, view.size) for view in found] == [
    ("crop", size) for size in (4, 8, 12, 16, 20, 24)
  ]
  for view in found:
    first = 12 - view.size // 2
    assert view.rows == view.columns == tuple((i, i + 1) for i in range(first, first + view.size))


def test_pools_average_the_bins_of_their_matrix() -> None:
  found = views.describe("m", config("pooling")).views
  assert [view.size for view in found] == [4, 8, 12, 16, 20, 24]
  for view in found:
    matrix = pooling_matrix(24, view.size)
    expected = [(int(np.flatnonzero(row)[0]), int(np.flatnonzero(row)[-1]) + 1) for row in matrix]
    assert list(view.rows) == list(view.columns) == expected


def test_other_kinds_of_tokens() -> None:
  register = views.describe("m", config("register")).views
  assert {(view.kind, view.rows, view.columns) for view in register} == {("register", (), ())}
  assert "sees no part" in register[0].says
  both = views.describe("m", config("both")).views
  assert [view.kind for view in both] == ["crop"] * 6 + ["pool"] * 6
  windows = views.describe("m", config("detail_only")).views
  assert len(windows) == 49
  assert windows[1].rows[0] == (0, 1), "row by row"
  assert windows[1].columns == tuple((i, i + 1) for i in range(2, 14))
  assert windows[48].rows == windows[48].columns == tuple((i, i + 1) for i in range(12, 24))


def test_how_a_picture_becomes_a_square_is_a_table() -> None:
  assert set(views.RESIZES) == {(aspect, fit) for aspect in ASPECTS for fit in FITS}
  for (aspect, fit), name in views.RESIZES.items():
    found = views.describe("m", config(image_aspect=aspect, image_fit=fit))
    assert found.resize == name
    assert ("Tiles" in found.says["model"]) == (aspect == "anyres")
  script = content("views.js")
  assert set(re.findall(r"^  (\w+): \(w, h\)", script, re.MULTILINE)) == set(views.RESIZES.values())


def test_the_model_is_told_as_json(client: TestClient) -> None:
  found = client.get(page.MODEL)
  assert found.headers["content-type"] == "application/json"
  told = json.loads(found.content)
  assert told == {
    "model": "tiny",
    "variant": "none",
    "grid": 24,
    "image_size": 336,
    "tokens": 576,
    "views": [],
    "resize": "pad",
    "pad_color": [122, 116, 104],
    "says": told["says"],
  }
  assert told["says"]["model"] == "576 tokens: 0 spatial, 576 of patches."


def test_a_model_that_cannot_be_is_refused() -> None:
  wrong = config_lib.ModelConfig(projector=config_lib.ProjectorConfig(scales=(4, 25)))
  with pytest.raises(ConfigError, match="scales"):
    page.routes("m", config_lib.Config(model=wrong))
