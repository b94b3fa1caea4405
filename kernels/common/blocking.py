"""How the streamed PyTorch kernels cut the pair representation into blocks of query rows."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from ..hardware import machine

# A block's intermediates should stay in a core's cache on a CPU; on a GPU they should fill the device, and no more.
_PAIRS_PER_THREAD = {torch.float64: 1024, torch.float32: 2048}
_PAIRS_PER_THREAD_16_BIT = 4096
_PAIRS_PER_GPU_BLOCK = 1 << 16
# Weights' gradients are products over a block's pairs. Over 32767 or more, an M1 or M2 adds what stands behind the
# factors in memory (pytorch/pytorch 195163, up to torch 2.13).
_PAIRS_PER_MPS_BLOCK = 1 << 14


def row_blocks(z: Tensor) -> Iterator[tuple[int, slice]]:
    """Cut [b, n, m, c] into blocks of rows: the batch item and the rows of each block, in order."""
    b, n, m, _ = z.shape
    rows = max(1, pairs_per_block(z) // max(m, 1))
    for item in range(b):
        for block in slices(n, rows):
            yield item, block


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut `length` into slices of `size`; the last may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def pairs_per_block(z: Tensor) -> int:
    """How many pairs of z, with a hundred or so numbers each, make a block."""
    if z.device.type != "cpu":
        return _PAIRS_PER_MPS_BLOCK if z.device.type == "mps" else _PAIRS_PER_GPU_BLOCK
    return _PAIRS_PER_THREAD.get(block_dtype(z), _PAIRS_PER_THREAD_16_BIT) * torch.get_num_threads()


def block_dtype(z: Tensor) -> torch.dtype:
    """The type in which a block of z is multiplied: z's own, or float32 where 16-bit products are not faster.

    They are not on an Apple GPU, where both run at about one rate, and where 16 bits have had more faults than float32.
    """
    if z.dtype in (torch.bfloat16, torch.float16):
        device = z.device.type
        if device == "mps" or (device == "cpu" and not machine.fast_bfloat16()):
            return torch.float32
    return z.dtype


def attended_dtype(z: Tensor) -> torch.dtype:
    """The type in which a block of z meets attention weights: float32 at least, but for 16 bits on CUDA.

    What it adds to the logits is never rounded, and a CPU's 16-bit products are: of a few heads they gain nothing, or
    cost more than the same in float32.
    """
    return block_dtype(z) if z.is_cuda else torch.promote_types(z.dtype, torch.float32)


class Scratch:
    """Memory that every block of a pass uses again.

    A block's intermediates are a few megabytes. Asked for anew, glibc gives them back to the kernel in between, and on
    a CPU the page faults then cost as much as the products.

    Args:
        like: For the device.
        dtype: The type in which blocks are multiplied.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._device, self._dtype = like.device, dtype
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor to write to. It holds what was last written under `name`, until that is taken again.

        Args:
            name: Each name has a type of its own: `dtype`, or that of the blocks.
            *shape: As many numbers as are needed.
            dtype: Another type than that of the blocks.
        """
        count = prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < count:
            held = self._held[name] = torch.empty(count, device=self._device, dtype=dtype or self._dtype)
        return held[:count].view(shape)


def norm_dtype(z: Tensor) -> torch.dtype:
    """The type of a LayerNorm's weights beside a block of z: on a CPU that decides its statistics' type as well."""
    dtype = block_dtype(z)
    return torch.promote_types(dtype, torch.float32) if z.device.type == "cpu" else dtype
