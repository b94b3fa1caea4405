"""How the tensors of a case lie in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

#: `plain` is one item without masks; every other is three items, each masked in its own way. See `stored`.
VARIANTS = ("plain", "masked", "transposed", "spread", "expanded")


def stored(value: Tensor, variant: str, batched: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor to hold in memory, and the view of it that has the values of `value`.

    `transposed` swaps two axes in memory, `spread` leaves a gap after each number, `expanded` repeats the first item of
    a batch without holding it more than once (not of masks and indices, which stay different for each item).
    """
    if variant == "expanded" and batched and value.is_floating_point():
        return value[:1].clone(), lambda held: held.expand(value.shape)
    if variant == "transposed" and value.ndim > 1:
        axes = (0, 1) if value.ndim == 2 else (1, 2)
        return value.transpose(*axes).contiguous(), lambda held: held.transpose(*axes)
    if variant == "spread":
        return torch.stack([value, torch.ones_like(value)], -1), lambda held: held[..., 0]
    return value.clone(), lambda held: held
