"""FlashIPA under its own names, without flash-attn and without CUDA. `from foldkernels.compat import flash_ipa`.

In a script written for FlashIPA, `flash_ipa` becomes `foldkernels.compat.flash_ipa` in its imports. docs/flash-ipa.md
says what is the same and what is not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edge_embedder import EdgeEmbedder, EdgeEmbedderConfig
    from .factorizer import LinearFactorizer
    from .ipa import BackboneUpdate, EdgeTransition, InvariantPointAttention, IPAConfig, StructureModuleTransition
    from .linear import Linear
    from .model import Model, ModelConfig
    from .rigid import Rigid, Rotation, create_rigid
    from .utils import ANG_TO_NM_SCALE, NM_TO_ANG_SCALE, check_config_ipa

# Loaded when asked for, so that importing the package costs next to nothing.
_HOMES = {
    "ANG_TO_NM_SCALE": "utils",
    "BackboneUpdate": "ipa",
    "EdgeEmbedder": "edge_embedder",
    "EdgeEmbedderConfig": "edge_embedder",
    "EdgeTransition": "ipa",
    "IPAConfig": "ipa",
    "InvariantPointAttention": "ipa",
    "Linear": "linear",
    "LinearFactorizer": "factorizer",
    "Model": "model",
    "ModelConfig": "model",
    "NM_TO_ANG_SCALE": "utils",
    "Rigid": "rigid",
    "Rotation": "rigid",
    "StructureModuleTransition": "ipa",
    "check_config_ipa": "utils",
    "create_rigid": "rigid",
}

__all__ = [
    "ANG_TO_NM_SCALE",
    "NM_TO_ANG_SCALE",
    "BackboneUpdate",
    "EdgeEmbedder",
    "EdgeEmbedderConfig",
    "EdgeTransition",
    "IPAConfig",
    "InvariantPointAttention",
    "Linear",
    "LinearFactorizer",
    "Model",
    "ModelConfig",
    "Rigid",
    "Rotation",
    "StructureModuleTransition",
    "check_config_ipa",
    "create_rigid",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
