"""What all kernels of cuEquivariance ask for: NVIDIA's library, called through `cuequivariance_torch` 0.13.

Facts are from its documentation and release notes; nothing of `cuequivariance_ops`, which is proprietary, is in here.
"""

import torch

from ..hardware import tf32
from ..registry.types import Reason, Request

NEEDS = ("cuequivariance-torch>=0.13",)

#: Up to this many keys it runs plain PyTorch inside; up to twice as many where heads are narrower than 32.
FALLBACK = 100
ATTENTION_THRESHOLDS = (FALLBACK + 1, 2 * FALLBACK + 1)

_16_BIT = (torch.bfloat16, torch.float16)


def against_device(request: Request) -> list[Reason]:
    """What speaks against the device and the floating type."""
    reasons = []
    if request.device != "cuda":
        reasons.append(
            Reason(f"cuEquivariance runs on NVIDIA GPUs, the tensors are on {request.device}", "use kernel 'torch'")
        )
    elif request.capability is None:
        reasons.append(Reason("cuEquivariance runs on NVIDIA GPUs, and this is none of theirs", "use kernel 'torch'"))
    if request.dtype not in (*_16_BIT, torch.float32):
        name = str(request.dtype).removeprefix("torch.")
        reasons.append(Reason(f"cuEquivariance has no kernels for {name}", "use float32, or kernel 'torch'"))
    return reasons


def against_attention(request: Request) -> list[Reason]:
    """Every reason against cuEquivariance's triangle attention, whichever operation it serves."""
    reasons = against_device(request)
    m, d = request.dims["m"], request.dims["d"]
    shortest = ATTENTION_THRESHOLDS[d < 32]
    if m < shortest:
        reasons.append(
            Reason(
                f"cuEquivariance itself runs plain PyTorch up to {shortest - 1} tokens (d = {d})", "use kernel 'torch'"
            )
        )
    if request.dtype in _16_BIT and (d > 128 or d % 8):
        reasons.append(Reason(f"head size {d} is not a multiple of 8 up to 128", "use kernel 'torch'"))
    if request.dtype is torch.float32 and (d > 32 or d % 4):
        reasons.append(
            Reason(
                f"head size {d} is not a multiple of 4 up to 32, as float32 wants", "use bfloat16, or kernel 'torch'"
            )
        )
    if request.dtype is torch.float32 and request.grad and request.precision == "float32":
        reasons.append(
            Reason("its float32 backward pass computes in tf32", "set precision: tf32, or use kernel 'torch'")
        )
    if request.capability is not None and request.capability[0] == 10:
        reasons.append(
            Reason(
                "on compute capability 10 it rounds the bias to 16 bits, wants lengths that are multiples of 8, and "
                "falls back inside under a mask",
                "use kernel 'torch'",
            )
        )
    return reasons


def check_backward(dtype: torch.dtype, grad: bool) -> None:
    """Refuse what its attention would round without being asked.

    Args:
        dtype: The type of the queries.
        grad: Whether a backward pass may follow.

    Raises:
        RuntimeError: It would compute in tf32, which PyTorch forbids.
    """
    if grad and dtype is torch.float32 and not tf32.allowed():
        raise RuntimeError(
            "cuEquivariance's float32 backward pass of attention computes in tf32, which PyTorch forbids here: set "
            "precision: tf32, or torch.backends.cuda.matmul.allow_tf32 = True, or use bfloat16 or kernel 'torch'"
        )
