"""Tests of the server: skipped without the extra `serve`."""

from __future__ import annotations

import importlib.util

NEEDS = ("aiohttp", "msgspec", "prometheus_client", "starlette", "uvicorn")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
