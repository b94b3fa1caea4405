"""Deprecated alias of `foldkernels.kernels.testing.cases.case`."""

import warnings

from ..testing.cases.case import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.examples.case is now foldkernels.kernels.testing.cases.case",
    DeprecationWarning,
    stacklevel=2,
)
