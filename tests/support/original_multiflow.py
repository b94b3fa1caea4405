"""The original Multiflow, where a checkout of it is at hand: FOLDKERNELS_MULTIFLOW names the folder.

What it imports and a training module does not need (Biopython, ESM, wandb and others) is stood in for where it is not
installed. `torch_scatter`'s two functions, which the corruption calls, are written out.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

VARIABLE = "FOLDKERNELS_MULTIFLOW"
_PACKAGES = (
    "torch_scatter Bio Bio.PDB Bio.PDB.Chain Bio.SVDSuperimposer tree pandas tqdm wandb biotite biotite.sequence "
    "biotite.sequence.io biotite.sequence.io.fasta mdtraj esm GPUtil tmtools ml_collections deepspeed "
    "attn_core_inplace_cuda sklearn sklearn.preprocessing sklearn.linear_model"
).split()


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (), {})
        setattr(self, name, found)
        return found


def original(monkeypatch: pytest.MonkeyPatch, module: str) -> Any:
    """A module of the original's, or a skip that says what is missing."""
    folder = os.environ.get(VARIABLE, "")
    if not (Path(folder) / "multiflow" / "models" / "flow_module.py").is_file():
        pytest.skip(f"needs a checkout of the original Multiflow: {VARIABLE}={folder or 'is not set'}")
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            stand_in = _StandIn(name)
            stand_in.__path__ = []  # type: ignore[attr-defined]
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            monkeypatch.setitem(sys.modules, name, stand_in)
            parent, _, leaf = name.rpartition(".")
            if parent:
                monkeypatch.setattr(sys.modules[parent], leaf, stand_in, raising=False)
    monkeypatch.setattr(sys.modules["tree"], "map_structure", _map_structure, raising=False)
    monkeypatch.setattr(sys.modules["torch_scatter"], "scatter", _scatter, raising=False)
    monkeypatch.setattr(sys.modules["torch_scatter"], "scatter_add", _scatter, raising=False)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(module)


def _map_structure(function: Any, *trees: Any) -> Any:
    first = trees[0]
    if isinstance(first, dict):
        return {key: _map_structure(function, *(each[key] for each in trees)) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_map_structure(function, *each) for each in zip(*trees, strict=True))
    return function(*trees)


def _scatter(values: torch.Tensor, index: torch.Tensor, dim: int = 0, reduce: str = "sum") -> torch.Tensor:
    shape = (int(index.max()) + 1, *values.shape[1:])
    places = index.reshape(-1, *(1,) * (values.ndim - 1)).expand_as(values)
    return torch.zeros(shape, dtype=values.dtype).scatter_reduce(0, places, values, reduce, include_self=False)
