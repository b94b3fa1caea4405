"""Turning and shifting a protein: what an operation on points must not notice, and what must go with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases.case import Case
from .cases.random_inputs import Draws

#: Nanometres along each axis.
_SHIFT = 2.0


@dataclass(frozen=True)
class Motion:
    """A rotation [3, 3] and a shift [3] in float64, and the case whose coordinates have made it."""

    rotation: Tensor
    shift: Tensor
    case: Case


def moved(case: Case, dtype: torch.dtype, seed: int = 0) -> Motion:
    """Turn and shift a case's coordinates.

    They are rounded to what `dtype` holds them in before they move: what was rounded away is no error of a kernel.

    Args:
        case: A case with coordinates.
        dtype: The precision that it will run at.
        seed: Of the motion.
    """
    r = Draws(seed)
    if case.whole_motions:
        rotation = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        shift = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    else:
        rotation, shift = _rotation(r), r.normal(3, scale=_SHIFT)
    held = torch.promote_types(dtype, torch.float32)
    values = dict(case.values)
    for name in case.coordinates:
        value = values[name]
        assert value is not None
        values[name] = value.to(held).double() @ rotation.T + shift
    return Motion(rotation, shift, replace(case, values=values))


def move(case: Case, outputs: Sequence[Tensor], motion: Motion) -> tuple[Tensor, ...]:
    """What the outputs of `case` are after the motion: points go with it, rows that take no part stay zero."""
    found = list(outputs)
    for i in case.moved_outputs:
        there = found[i]
        rotation, shift = motion.rotation.to(there), motion.shift.to(there)
        out = there @ rotation.T + shift
        gone = case.gone_outputs[i] if i < len(case.gone_outputs) else None
        if gone is not None:
            out[gone.to(out.device)] = 0.0
        found[i] = out
    return tuple(found)


def _rotation(r: Draws) -> Tensor:
    """A random rotation, from a quaternion."""
    w, x, y, z = torch.nn.functional.normalize(r.normal(4), dim=0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row) for row in rows])
