"""The triangle multiplicative update through cuEquivariance: the same packed weights, and a mask of 1 = keep."""

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from ..common.cuequivariance_limits import FALLBACK, NEEDS, against_device
from ..hardware.machine import imported
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from . import Direction, Weights

library: ModuleType


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    reasons = against_device(request)
    n = request.dims["n"]
    if n <= FALLBACK:
        reasons.append(
            Reason(f"cuEquivariance itself runs plain PyTorch up to {FALLBACK} tokens", "use kernel 'torch'")
        )
    for name, what in (("cz", "the pair tensor"), ("c", "the product")):
        if request.dims[name] % 32:
            reasons.append(
                Reason(f"{what} has {request.dims[name]} channels, not a multiple of 32", "use kernel 'torch'")
            )
    return reasons


def run(
    z: Float[Tensor, "b n n cz"],
    mask: Bool[Tensor, "b n n"] | None,
    weights: Weights,
    direction: Direction,
    eps: float = 1e-5,
) -> Float[Tensor, "b n n cz"]:
    """Cast the weights and the mask, call."""
    # Its fastest kernels want data and weights of one type. A weight that is left out would be drawn at random, but
    # for the projections' biases: without them it has none.
    w = weights.to(z.dtype)
    out: Tensor = library.triangle_multiplicative_update(
        z,
        direction=direction,
        mask=None if mask is None else mask.to(z.dtype),
        norm_in_weight=w.norm_in_weight,
        norm_in_bias=w.norm_in_bias,
        p_in_weight=w.p_in,
        p_in_bias=w.p_in_bias,
        g_in_weight=w.g_in,
        g_in_bias=w.g_in_bias,
        norm_out_weight=w.norm_out_weight,
        norm_out_bias=w.norm_out_bias,
        p_out_weight=w.p_out,
        p_out_bias=w.p_out_bias,
        g_out_weight=w.g_out,
        g_out_bias=w.g_out_bias,
        eps=eps,
    )
    return out


def load() -> KernelFunction:
    global library
    library = imported("cuequivariance_torch", having="triangle_multiplicative_update")
    # Asked for in its documentation, before a compiled graph meets the kernel.
    prepare = getattr(imported("cuequivariance_ops_torch"), "init_triton_cache", None)
    if prepare is not None:
        prepare()
    return run


register(
    operation="triangle_multiplication",
    name="cuequivariance",
    needs=NEEDS,
    supports=supports,
    load=load,
    # It picks a kernel by shape and by what was tuned on the machine.
    deterministic=False,
    thresholds=(FALLBACK + 1,),
)
