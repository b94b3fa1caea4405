"""Structure files: what is read of PDB and mmCIF, and how samples are written."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .reading import Backbone, read_structure
    from .writing import write_fasta, write_mmcif, write_pdb

# Loaded when asked for: residue types alone need no torch.
_HOMES = {
    "Backbone": "reading",
    "read_structure": "reading",
    "write_fasta": "writing",
    "write_mmcif": "writing",
    "write_pdb": "writing",
}

__all__ = ["Backbone", "read_structure", "write_fasta", "write_mmcif", "write_pdb"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
