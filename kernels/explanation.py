"""Deprecated alias of `foldkernels.kernels.registry.explanation`."""

import warnings

from .registry.explanation import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.explanation is now foldkernels.kernels.registry.explanation",
    DeprecationWarning,
    stacklevel=2,
)
