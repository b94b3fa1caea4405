"""Deprecated alias of `foldkernels.errors`."""

import warnings

from ..errors import *  # noqa: F403

warnings.warn(
    "foldkernels.compat.errors is now foldkernels.errors",
    DeprecationWarning,
    stacklevel=2,
)
