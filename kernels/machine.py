"""Deprecated alias of `foldkernels.kernels.hardware.machine`."""

import warnings

from .hardware.machine import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.machine is now foldkernels.kernels.hardware.machine",
    DeprecationWarning,
    stacklevel=2,
)
