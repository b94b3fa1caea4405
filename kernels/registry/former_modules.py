"""Modules of kernels under the names that they had, for what was pickled then: a report holds their functions.

They are entries of `sys.modules` and no files: a file `torch.py` would become the `torch` of its folder's `__init__`.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from ...configs.presets import OPERATIONS, pytorch_kernel


class _FormerModule(ModuleType):
    """A module that gives another one's attributes, which is imported when the first is asked for."""

    def __init__(self, name: str, home: str) -> None:
        super().__init__(name, f"Former name of `{home}`.")
        self._home = home

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what walks through sys.modules shall import nothing
            raise AttributeError(name)
        return getattr(importlib.import_module(self._home), name)


def add_former_modules() -> None:
    """Make `kernels.<operation>.torch` importable by its full name."""
    package = __name__.rsplit(".", 2)[0]
    for operation in (*OPERATIONS, "edge_transition_attention", "triangle_attention_update"):
        name = f"{package}.{operation}.torch"
        sys.modules.setdefault(name, _FormerModule(name, f"{package}.{operation}.{pytorch_kernel(operation)}"))
