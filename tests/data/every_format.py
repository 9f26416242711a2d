"""The same samples in every format: pictures of several sizes, and samples that cannot be used."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import pack, sources
from tests.conftest import ConfigMaker, dialogue
from tests.data.mixed import COUNT, mixed_config

BROKEN, GONE, SILENT = COUNT, COUNT + 1, COUNT + 2  # indices of samples that cannot be used
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])


def write_json(tiny_config: ConfigMaker, folder: Path, **changes: Any) -> config_lib.Config:
  """The samples of `mixed`, one with a picture that cannot be decoded, one without its file, one
  without turns."""
  config = mixed_config(tiny_config, folder, **changes)
  path = Path(config.data.path)
  samples = json.loads(path.read_text())
  whole = (folder / "1.png").read_bytes()
  (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
  for name in ("broken", "gone"):
    talk = dialogue(3)
    talk[1]["value"] = "é ☃"
    samples.append({"id": name, "image": f"{name}.png", "conversations": talk})
  path.write_text(json.dumps([*samples, {"id": "silent", "image": "0.png"}], ensure_ascii=False))
  return config


def _lines(samples: list[dict[str, Any]], images: Path, out: Path) -> Path:
  path = out / "x.jsonl"
  path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
  return path


def _packed(samples: list[dict[str, Any]], images: Path, out: Path) -> Path:
  source = sources.open_path(str(images / "train.json"), str(images), lambda image: image)
  pack.write(source, out / "packed", "train.json", shard_bytes=4000, threads=2)
  return out / "packed"


def table(samples: list[dict[str, Any]], images: Path) -> pa.Table:
  """The samples as `datasets` stores them: a list of structs of bytes and path."""

  def held(name: str) -> dict[str, Any]:
    file = images / name
    return {"bytes": file.read_bytes() if file.is_file() else None, "path": name}

  columns: dict[str, list[Any]] = {"id": [], "images": [], "conversations": []}
  for sample in samples:
    names = sample.get("image", [])
    columns["id"].append(sample["id"])
    columns["images"].append([held(n) for n in ([names] if isinstance(names, str) else names)])
    columns["conversations"].append(sample.get("conversations"))
  kinds = {"id": pa.string(), "images": pa.list_(PICTURE), "conversations": pa.list_(TURN)}
  return pa.table({k: pa.array(columns[k], kind) for k, kind in kinds.items()})


def _parquet(samples: list[dict[str, Any]], images: Path, out: Path) -> Path:
  for number, (start, end) in enumerate(((0, 7), (7, len(samples)))):
    file = out / f"train-{number:05d}-of-00002.parquet"
    pyarrow.parquet.write_table(table(samples[start:end], images), file, row_group_size=3)
  pyarrow.parquet.write_table(table(samples[:2], images), out / "test-00000-of-00001.parquet")
  return out


def _arrow(samples: list[dict[str, Any]], images: Path, out: Path) -> Path:
  names = []
  for number, (start, end) in enumerate(((0, 10), (10, len(samples)))):
    names.append({"filename": f"data-{number:05d}-of-00002.arrow"})
    rows = table(samples[start:end], images)
    with pa.ipc.new_stream(str(out / names[-1]["filename"]), rows.schema) as stream:
      stream.write_table(rows, max_chunksize=4)
  (out / "state.json").write_text(json.dumps({"_data_files": names, "_format_type": None}))
  (out / "dataset_info.json").write_text("{}")
  return out


def _tars(samples: list[dict[str, Any]], images: Path, out: Path) -> Path:
  for number, (start, end) in enumerate(((0, 9), (9, len(samples)))):
    with tarfile.open(out / f"{number:05d}.tar", "w") as tar:
      for index, sample in enumerate(samples[start:end], start):
        names = sample.get("image", [])
        held = [images / n for n in ([names] if isinstance(names, str) else names)]
        parts = {f"{i}.png": file.read_bytes() for i, file in enumerate(held) if file.is_file()}
        for extension, content in {"json": json.dumps(sample).encode(), **parts}.items():
          about = tarfile.TarInfo(f"a/{index:06d}.{extension}")
          about.size = len(content)
          tar.addfile(about, io.BytesIO(content))
  return out


# Row of `sources.SOURCES` -> writes the samples of a folder in this format; returns its data.path.
WRITERS: dict[str, Callable[[list[dict[str, Any]], Path, Path], Path]] = {
  "llava_json": _lines,
  "packed": _packed,
  "parquet": _parquet,
  "arrow": _arrow,
  "webdataset": _tars,
}


def rewritten(data: config_lib.DataConfig, kind: str, out: Path) -> config_lib.DataConfig:
  """The settings for the same samples in another format, written to `out`."""
  out.mkdir()
  samples = json.loads(Path(data.path).read_text())
  path = WRITERS[kind](samples, Path(data.image_folder), out)
  return dataclasses.replace(data, path=str(path))
