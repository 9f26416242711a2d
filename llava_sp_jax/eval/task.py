"""What a benchmark is: items with a question, an image and a truth, and a rule for scoring text."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Item:
  id: str
  question: str
  image: Path | None
  truth: str
  kind: str  # category for the report


class Task(Protocol):
  """One benchmark; each is one file in `eval/tasks/`."""

  name: str
  protocol: str

  def items(self) -> list[Item]: ...
  def right(self, item: Item, text: str) -> bool: ...
  def data_hash(self) -> str: ...


def file_hash(path: Path) -> str:
  """sha256 of a file, shortened."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def accuracy_by_kind(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """{kind: {accuracy, items}} over prediction records, "all" first."""
  groups: dict[str, list[bool]] = {"all": []}
  for record in records:
    groups["all"].append(record["right"])
    groups.setdefault(record["kind"], []).append(record["right"])
  return {
    k: {"accuracy": sum(v) / len(v) if v else 0.0, "items": len(v)} for k, v in groups.items()
  }
