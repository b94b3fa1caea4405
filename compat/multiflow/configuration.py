"""Deprecated alias of `foldkernels.compat.multiflow.config.sections`."""

import warnings

from .config.sections import *  # noqa: F403

warnings.warn(
    "foldkernels.compat.multiflow.configuration is now foldkernels.compat.multiflow.config.sections",
    DeprecationWarning,
    stacklevel=2,
)
