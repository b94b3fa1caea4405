"""One adapter a file: the file defines `ADAPTER`, and is found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recognition import Adapter


@cache
def adapters() -> dict[str, Adapter]:
    """Every adapter, by the name of its file."""
    files = sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").ADAPTER for name in files}
