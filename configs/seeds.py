"""Any whole number as a seed: generators take those from 0 to 2**63 - 1."""

from __future__ import annotations

import hashlib

_END = 2**63


def generator_seed(seed: int) -> int:
    """Give a seed that every generator takes: the number itself from 0 to 2**63 - 2, else one that follows from it.

    Args:
        seed: Any whole number.
    """
    if 0 <= seed < _END - 1:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") % (_END - 1)
