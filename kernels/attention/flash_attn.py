"""Padded self-attention through flash-attn: over the tokens that are there, so that padding costs nothing."""

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from ..common import flash_attn_varlen
from ..common.flash_attn_varlen import NEEDS, attend
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request

library: ModuleType


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    reasons = flash_attn_varlen.against(request, request.dims["d"])
    if "maps" in request.options:
        reasons.append(
            Reason(
                "attention maps are wanted, and flash-attn never forms them",
                "use kernel 'torch' or 'reference' (kernel: {attention: torch}), or ask for no maps: only_single: true "
                "where they are the pair features of a language model",
            )
        )
    return reasons


def run(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"] | None,
    mask: Bool[Tensor, "b n"] | None = None,
    keep: Bool[Tensor, "b h n n"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b n h d"]:
    """Attend; dropout and maps are refused by `supports`."""
    assert v is not None and keep is None and not dropout
    return attend(library, q, k, v, mask, scale=q.shape[-1] ** -0.5)


def load() -> KernelFunction:
    global library
    library = flash_attn_varlen.library()
    return run


register(
    operation="attention",
    name="flash_attn",
    needs=NEEDS,
    supports=supports,
    load=load,
    # Its backward pass adds up dq in whatever order the blocks come.
    deterministic=False,
)
