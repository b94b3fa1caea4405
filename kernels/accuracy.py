"""Deprecated alias of `foldkernels.kernels.testing.accuracy`."""

import warnings

from .testing.accuracy import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.accuracy is now foldkernels.kernels.testing.accuracy",
    DeprecationWarning,
    stacklevel=2,
)
