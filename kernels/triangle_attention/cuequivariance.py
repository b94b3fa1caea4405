"""Triangle attention through cuEquivariance: rows before heads, a float32 bias with an axis for rows, True = keep."""

from types import ModuleType

from jaxtyping import Bool, Float
from torch import Tensor

from ..common.cuequivariance_limits import ATTENTION_THRESHOLDS, NEEDS, against_attention, check_backward
from ..dtypes import any_requires_grad
from ..hardware.machine import imported
from ..registry import register
from ..registry.types import KernelFunction

library: ModuleType


def run(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
) -> Float[Tensor, "b h n m d"]:
    """Translate, attend, translate back."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(library, q, k, v, bias, mask).transpose(1, 2)


def attend(
    library: ModuleType,
    q: Float[Tensor, "b n h i d"],
    k: Float[Tensor, "b n h j d"],
    v: Float[Tensor, "b n h j d"],
    bias: Float[Tensor, "b h i j"],
    mask: Bool[Tensor, "b n j"] | None,
) -> Float[Tensor, "b n h i d"]:
    """Call the library's triangle attention; a row without keys gets zeros and passes no gradient."""
    check_backward(q.dtype, any_requires_grad(q, k, v, bias))
    keys, empty = None, None
    if mask is not None:
        # What the library makes of a row without keys is not said: it gets one with all of them, and loses it again.
        empty = ~mask.any(-1, keepdim=True)
        keys = (mask | empty)[:, :, None, None, :]
    # Its kernels cast the bias to float32; cast here, its gradient comes back in the type that it left in.
    out: Tensor = library.triangle_attention(
        q, k, v, bias.float()[:, None], mask=keys, scale=q.shape[-1] ** -0.5, return_aux=False
    )
    return out if empty is None else out.masked_fill(empty[:, :, None, None], 0.0)


def load() -> KernelFunction:
    global library
    library = imported("cuequivariance_torch", having="triangle_attention")
    return run


register(
    operation="triangle_attention",
    name="cuequivariance",
    needs=NEEDS,
    supports=against_attention,
    load=load,
    # It does not say how it sums the bias's gradient.
    deterministic=False,
    thresholds=ATTENTION_THRESHOLDS,
)
