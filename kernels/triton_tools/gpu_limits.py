"""What GPUs allow a Triton kernel, by compute capability: data only, so that a choice for an H100 is made anywhere."""

from collections.abc import Mapping

import torch

from ..registry.types import Reason, Request

#: Bytes that a thread block may ask for, by compute capability: from it on, up to the next.
SHARED_MEMORY: Mapping[tuple[int, int], int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (12, 0): 101_376,
}

#: What AMD's chips, which have no compute capability, give a block.
AMD_SHARED_MEMORY = 65_536

#: The oldest compute capability that our Triton kernels are written for: the first with bfloat16.
OLDEST = (8, 0)


def shared_memory(capability: tuple[int, int] | None) -> int:
    """Bytes that a thread block of such a chip may ask for; None is AMD's."""
    if capability is None:
        return AMD_SHARED_MEMORY
    return next((size for first, size in reversed([*SHARED_MEMORY.items()]) if capability >= first), 0)


def reasons_against_chip(request: Request) -> list[Reason]:
    """What every Triton kernel of ours says against devices that it cannot run on."""
    if request.device != "cuda":
        return [Reason(f"it runs on NVIDIA and AMD GPUs, not on {request.device}")]
    if request.capability is not None and request.capability < OLDEST:
        chip = ".".join(map(str, request.capability))
        return [Reason(f"it wants compute capability 8.0 or more, and this is {chip}")]
    return []


def reasons_against_type(request: Request) -> list[Reason]:
    """The same of types."""
    if request.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return []
    word = str(request.dtype).removeprefix("torch.")
    return [Reason(f"it computes in float32, bfloat16 and float16, not in {word}", "cast the tensors")]
