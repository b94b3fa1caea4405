"""Deprecated alias of `foldkernels.kernels.registry.types`."""

import warnings

from .registry.types import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.requests is now foldkernels.kernels.registry.types",
    DeprecationWarning,
    stacklevel=2,
)
