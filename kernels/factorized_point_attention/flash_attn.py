"""Factorised point attention through flash-attn, on lifted queries, keys and values, over the residues that are there.

As FlashIPA computes it (Liu et al. 2025), but for the lifting, which is precise unless the caller asks for the plain
one. flash-attn wants one width for queries, keys and values, of at most 256.
"""

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..common import flash_attn_varlen
from ..common.flash_attn_varlen import MAX_HEAD, NEEDS, attend
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ._lifting import lift, query_width, split_values, value_width

library: ModuleType


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    reasons = flash_attn_varlen.against(request, 0)
    dims, precise = request.dims, "plain_lifting" not in request.options
    ranks = {name: dims["r"] if f"{name}_factors" in request.options else 0 for name in ("bias", "pair")}
    of_query = query_width(dims["c"], dims["p"], ranks["bias"], precise=precise, narrow=True)
    of_value = value_width(dims["c"], dims["pv"], ranks["pair"], dims["cp"])
    if max(of_query, of_value) > MAX_HEAD:
        sizes = f"c={dims['c']} p={dims['p']} pv={dims['pv']} r={dims['r']} cp={dims['cp']}"
        reasons.append(
            Reason(
                f"{sizes} make lifted queries of {of_query} and values of {of_value} columns; "
                f"flash-attn takes {MAX_HEAD} at most",
                "use kernel 'torch' or 'triton', which have no such limit",
            )
        )
    return reasons


def run(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    bias_factors: tuple[Float[Tensor, "b n h r"], Float[Tensor, "b n h r"]] | None,
    pair_factors: tuple[Float[Tensor, "b n r cp"], Float[Tensor, "b n r cp"]] | None,
    mask: Bool[Tensor, "b n"] | None,
    precise: bool,
    inner: torch.dtype,
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cp"] | None]:
    """Lift, attend within each item's residues, and take the values apart again."""
    lifted = lift(
        q, k, v, q_points, k_points, v_points, point_weights, bias_factors, pair_factors, mask, precise, inner
    )
    width = max(lifted.q.shape[-1], lifted.v.shape[-1])
    wide_q, wide_k, wide_v = (F.pad(x, (0, width - x.shape[-1])) for x in (lifted.q, lifted.k, lifted.v))
    out = attend(library, wide_q, wide_k, wide_v, mask, scale=1.0)[..., : lifted.v.shape[-1]]
    return split_values(out, lifted.centre, v, v_points, pair_factors, mask)


def load() -> KernelFunction:
    global library
    library = flash_attn_varlen.library()
    return run


register(
    operation="factorized_point_attention",
    name="flash_attn",
    needs=NEEDS,
    supports=supports,
    load=load,
    # Its backward pass adds up dq in whatever order the blocks come.
    deterministic=False,
)
