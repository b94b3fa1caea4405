"""Multiflow: its checkpoints, its model, its sampling, its training. `from foldkernels.compat import multiflow`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.files import read_checkpoint, write_safetensors
    from .checkpoint.loading import load
    from .config.sections import ModelConfig
    from .flow.interpolant import Interpolant
    from .model import FlowModel
    from .patching import patch
    from .runs.rank import Worker
    from .runs.sampling import run_sampling
    from .structures.reading import read_structure
    from .training import corrupt_batch, losses, self_condition

# Loaded when asked for: reading a checkpoint needs none of what sampling needs.
_HOMES = {
    "FlowModel": "model",
    "Interpolant": "flow.interpolant",
    "ModelConfig": "config.sections",
    "Worker": "runs.rank",
    "corrupt_batch": "training",
    "load": "checkpoint.loading",
    "losses": "training",
    "patch": "patching",
    "read_checkpoint": "checkpoint.files",
    "read_structure": "structures.reading",
    "run_sampling": "runs.sampling",
    "self_condition": "training",
    "write_safetensors": "checkpoint.files",
}

__all__ = [
    "FlowModel",
    "Interpolant",
    "ModelConfig",
    "Worker",
    "corrupt_batch",
    "load",
    "losses",
    "patch",
    "read_checkpoint",
    "read_structure",
    "run_sampling",
    "self_condition",
    "write_safetensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
