"""Deprecated alias of `foldkernels.kernels.testing.cases.builders`."""

import warnings

from ..testing.cases.builders import *  # noqa: F403

warnings.warn(
    "foldkernels.kernels.examples.builders is now foldkernels.kernels.testing.cases.builders",
    DeprecationWarning,
    stacklevel=2,
)
