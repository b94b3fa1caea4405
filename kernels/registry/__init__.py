"""Registry of operations and kernels: registration, choice, dispatch, binding and explanation.

What users and the rest of the package import stands here; `binding` and `explanation` are imported by their own names.
"""

from ...errors import KernelFallbackWarning, KernelUnavailable
from ..hardware import machine
from .choice import decide, precision, reasons_against, settings_of, token
from .dispatch import common_kernel, function_for, record_kernels, require
from .registration import (
    ENTRY_POINT_GROUP,
    broken_plugins,
    kernels,
    leave_out_plugins,
    length_class,
    operations,
    register,
    register_operation,
    thresholds,
)
from .types import Decision, Dims, Kernel, Operation, Reason, Request, serves_everything

__all__ = [
    "ENTRY_POINT_GROUP",
    "Decision",
    "Dims",
    "Kernel",
    "KernelFallbackWarning",
    "KernelUnavailable",
    "Operation",
    "Reason",
    "Request",
    "broken_plugins",
    "common_kernel",
    "decide",
    "function_for",
    "kernels",
    "leave_out_plugins",
    "length_class",
    "machine",
    "operations",
    "precision",
    "reasons_against",
    "record_kernels",
    "register",
    "register_operation",
    "require",
    "serves_everything",
    "settings_of",
    "thresholds",
    "token",
]
