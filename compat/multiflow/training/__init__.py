"""Training of Multiflow's model: the noise, the losses, and Lightning around them.

`corrupt_batch`, `self_condition` and `losses` are functions on tensors, for a training loop of your own. `train`, and
the `TrainingModule` in it, need pytorch-lightning (`pip install 'foldkernels[train]'`), which is imported when they are
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ....errors import BadInput

if TYPE_CHECKING:
    from ..flow.corruption import corrupt_batch
    from ..flow.self_conditioning import self_condition
    from ._lightning_module import TrainingModule
    from ._running import TrainingRun, train
    from .objective import LossNotFinite, losses

_INSTALL = "pip install 'foldkernels[train]'"
_HOMES = {
    "LossNotFinite": "....errors",
    "corrupt_batch": "..flow.corruption",
    "losses": ".objective",
    "self_condition": "..flow.self_conditioning",
    "train": "._running",
    "TrainingModule": "._lightning_module",
    "TrainingRun": "._running",
}

__all__ = [
    "LossNotFinite",
    "TrainingModule",
    "TrainingRun",
    "corrupt_batch",
    "losses",
    "self_condition",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("pytorch_lightning", "lightning_fabric"):
            raise
        raise BadInput("training needs pytorch-lightning, which is not installed", _INSTALL) from error
