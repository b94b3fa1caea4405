"""Checks of what goes into the pair layers: a wrong shape is named before it becomes an error deep in a kernel."""

from jaxtyping import Float, Shaped
from torch import Tensor


def check_square(
    layer: str, z: Float[Tensor, "*b n n c_z"], c_z: int, mask: Shaped[Tensor, "*b n n"] | None = None
) -> None:
    """Raise ValueError, naming the layer, where z is no square of c_z channels or the mask does not fit it."""
    shape = tuple(z.shape)
    if len(shape) < 3 or shape[-2] != shape[-3] or shape[-1] != c_z:
        raise ValueError(f"{layer}: z has shape {shape}; it must be [..., n, n, {c_z}]")
    if mask is not None and tuple(mask.shape) != shape[:-1]:
        raise ValueError(
            f"{layer}: the mask has shape {tuple(mask.shape)}; with z {shape} it must be {shape[:-1]}, one entry for "
            "each pair (from a mask over residues: mask[:, :, None] * mask[:, None, :])"
        )


def head_size(layer: str, width: int, heads: int) -> int:
    """The channels of a head.

    Raises:
        ValueError: The heads do not share the width; the message names widths and heads that would do.
    """
    if heads < 1 or width % heads:
        fitting = [h for h in range(1, width + 1) if width % h == 0]
        nearest = sorted(sorted(fitting, key=lambda h: abs(h - heads))[:3])
        raise ValueError(
            f"{layer}: {heads} heads cannot share a width of {width}; "
            f"give it {', '.join(map(str, nearest[:-1])) or '1'} or {nearest[-1]} heads, or a width that is a multiple"
        )
    return width // heads
