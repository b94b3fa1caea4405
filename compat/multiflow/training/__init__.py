"""Training of Multiflow's model: the noise, the losses, and Lightning around them.

`corrupt_batch`, `self_condition` and `losses` are functions on tensors, for a training loop of your own. `train`, and
the `TrainingModule` in it, need pytorch-lightning (`pip install 'foldkernels[train]'`), which is imported when they are
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corruption import corrupt_batch
    from .objective import LossNotFinite, losses
    from .self_conditioning import self_condition

_HOMES = {
    "LossNotFinite": "objective",
    "corrupt_batch": "corruption",
    "losses": "objective",
    "self_condition": "self_conditioning",
}

__all__ = ["LossNotFinite", "corrupt_batch", "losses", "self_condition"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
