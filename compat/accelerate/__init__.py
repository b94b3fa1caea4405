"""`accelerate`: other projects' models, with this package's kernels, without porting them."""

from __future__ import annotations

from .engine import VerificationFailed, accelerate, recognise, restore
from .recognition import Adapter, Declined, Example, Recognised
from .report import AccelerateReport, Entry, Miss
from .verification import Proof

__all__ = [
    "AccelerateReport",
    "Adapter",
    "Declined",
    "Entry",
    "Example",
    "Miss",
    "Proof",
    "Recognised",
    "VerificationFailed",
    "accelerate",
    "recognise",
    "restore",
]
