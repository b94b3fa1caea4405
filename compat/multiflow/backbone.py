"""Deprecated alias of `foldkernels.compat.multiflow.structures.backbone`."""

import warnings

from .structures.backbone import *  # noqa: F403

warnings.warn(
    "foldkernels.compat.multiflow.backbone is now foldkernels.compat.multiflow.structures.backbone",
    DeprecationWarning,
    stacklevel=2,
)
