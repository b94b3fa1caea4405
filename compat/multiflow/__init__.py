"""Multiflow: its checkpoints, its model, its sampling, its training. `from foldkernels.compat import multiflow`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import read_checkpoint, write_safetensors
    from .configuration import ModelConfig
    from .interpolant import Interpolant
    from .loading import load
    from .model import FlowModel
    from .patching import patch
    from .sampling import run_sampling
    from .training import corrupt_batch, losses, self_condition
    from .worker import Worker

# Loaded when asked for: reading a checkpoint needs none of what sampling needs.
_HOMES = {
    "FlowModel": "model",
    "Interpolant": "interpolant",
    "ModelConfig": "configuration",
    "Worker": "worker",
    "corrupt_batch": "training",
    "load": "loading",
    "losses": "training",
    "patch": "patching",
    "read_checkpoint": "checkpoint",
    "run_sampling": "sampling",
    "self_condition": "training",
    "write_safetensors": "checkpoint",
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
    "run_sampling",
    "self_condition",
    "write_safetensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
