"""A folder of structures, and settings to read it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings with a cache and a loader of the test's own."""

    def make(**changes: Any) -> dict[str, Any]:
        small = {"filter": {"min_num_res": 2}, "loader": {"num_workers": 0}, "cache": str(tmp_path / "cache")}
        return {**small, **changes}

    return make
