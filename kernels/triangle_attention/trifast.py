"""Triangle attention through trifast (MIT, Triton): our layout and scale; its mask is True where a key is left out."""

from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..hardware.machine import imported
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request

library: ModuleType


def supports(request: Request) -> list[Reason]:
    """Every reason against `request`."""
    d = request.dims["d"]
    reasons = []
    if request.device != "cuda":
        reasons.append(Reason(f"trifast runs on CUDA, the tensors are on {request.device}", "use kernel 'torch'"))
    if d < 16 or d & (d - 1):
        reasons.append(Reason(f"head size {d} is not a power of two of at least 16", "use kernel 'torch'"))
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(request.dtype).removeprefix("torch.")
        reasons.append(Reason(f"trifast has no kernels for {name}", "use float32, or kernel 'torch'"))
    if "rectangular" in request.options:
        reasons.append(Reason("the pair tensor is not square", "use kernel 'torch'"))
    return reasons


def run(
    q: Float[Tensor, "b h n m d"],
    k: Float[Tensor, "b h n m d"],
    v: Float[Tensor, "b h n m d"],
    bias: Float[Tensor, "b h m m"],
    mask: Bool[Tensor, "b n m"] | None = None,
) -> Float[Tensor, "b h n m d"]:
    """Turn the mask round, attend."""
    b, _, n, m, _ = q.shape
    if mask is None:
        nothing = torch.zeros(b, n, m, dtype=torch.bool, device=q.device)
        attended: Tensor = library.triangle_attention(q, k, v, bias, nothing)
        return attended
    # It spreads a row without keys over the padded length: such a row gets all keys, and loses the result again.
    empty = ~mask.any(-1, keepdim=True)
    out: Tensor = library.triangle_attention(q, k, v, bias, ~(mask | empty))
    return out.masked_fill(empty[:, None, :, :, None], 0.0)


def load() -> KernelFunction:
    global library
    # Its import asks for the GPU, and may raise anything.
    library = imported("trifast", having="triangle_attention")
    return run


register(
    operation="triangle_attention",
    name="trifast",
    needs=("trifast>=0.1.13",),
    supports=supports,
    load=load,
    # It tunes itself on first use, and block sizes change the order of sums.
    deterministic=False,
)
