"""FlashIPA's factoriser of a dense pair representation."""

from __future__ import annotations

from ...modules.edge_factors import LinearFactorizer

__all__ = ["LinearFactorizer"]
