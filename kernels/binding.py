"""Deprecated alias of `foldkernels.kernels.registry.binding`."""

import warnings

from .registry.binding import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.binding is now foldkernels.kernels.registry.binding",
    DeprecationWarning,
    stacklevel=2,
)
