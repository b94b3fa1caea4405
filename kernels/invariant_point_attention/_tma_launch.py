"""Runs invariant point attention's Triton kernel with tensor descriptors. Imported by `_launch` only.

A descriptor is made here, on the host, beside the arguments of each launch: it needs no memory on the GPU, and nothing
that outlives the launch.
"""

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..triton_tools._language import INTERPRETED
from ._operands import LOG2E, power, up
from ._rows import NEVER
from ._tiles import Plan, halves_width, width
from ._tma_triton import forward_kernel

if TYPE_CHECKING:
    from ._launch import Call

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton before 3.4, or after it was renamed: pointers will do
    TensorDescriptor = None

#: What the copy engine wants of addresses and strides, in bytes, and what its strides stay under.
_ALIGNED, _FARTHEST = 16, 2**40
#: Elements of 16 bits of which a row of keys or values is a multiple, for that.
_ROW = 8


def strides_of(x: Tensor) -> list[int]:
    """Strides as a descriptor takes them: an axis of one, whose stride means nothing, gets that of a dense tensor."""
    strides = [*x.stride()]
    dense = 1
    for axis in reversed(range(x.dim())):
        if x.shape[axis] == 1:
            strides[axis] = dense
        dense = strides[axis] * x.shape[axis]
    return strides


def describable(z: Tensor) -> bool:
    """Whether the copy engine can read z: by its sizes and strides and where it stands, never by what it holds.

    Outer axes may not lie closer than inner ones, nor at no distance, as those of an expanded or a transposed tensor
    do: the driver's manual draws no such tensor.
    """
    if TensorDescriptor is None or z.dim() == 0 or 0 in z.shape or z.data_ptr() % _ALIGNED:
        return False
    strides, size = strides_of(z), z.element_size()
    apart = all(outer >= inner > 0 for outer, inner in itertools.pairwise(strides))
    outer = [stride * size for stride in strides[:-1]]
    return (
        strides[-1] == 1
        and apart
        and all(stride % _ALIGNED == 0 and stride < _FARTHEST for stride in outer)
        and all(length < 2**31 for length in z.shape)
    )


def described(x: Tensor, block: list[int]) -> Any:
    """A descriptor of x, of which tiles are read."""
    return TensorDescriptor(x, [*x.shape], strides_of(x), block)


class Operands(NamedTuple):
    """Queries, keys and values as the kernel reads them.

    Attributes:
        queries: [b, h, n, 3, width]: points beside one half of the scalars, points beside the other half, and what
            rounding left of the points.
        scale: What logits are multiplied by, a query [b, h, n].
        keys: [2 b, h, padded, columns]: points beside one half of the scalars, then, of the next b, what rounding left
            of the points beside the other half.
        values: [b, h, padded, columns].
    """

    queries: Tensor
    scale: Tensor
    keys: Tensor
    values: Tensor


def operands(call: "Call") -> Operands:
    """Lay them out.

    Points keep two terms of float16, since their logits are differences of large numbers; scalars one, which is no
    worse than what z, of 16 bits itself, adds to the same logits.
    """
    points, scalars = call.points, call.d - 1 - call.points
    half = -(-scalars // 2)
    used = points + half
    q = call.q[..., :-1] * call.key_scale()
    scale = power(q, -1)
    q, k = q / scale, call.k / call.key_scale()
    queries = q.new_zeros(call.b, call.h, call.n, 3, halves_width(call.d - 1, points), dtype=torch.float16)
    keys = q.new_zeros(2, call.b, call.h, call.padded, up(used, _ROW), dtype=torch.float16)
    queries[..., :2, :points] = q[..., None, scalars:]
    queries[..., 2, :points] = q[..., scalars:] - queries[..., 0, :points].float()
    keys[0, :, :, : call.n, :points] = k[..., scalars:]
    keys[1, :, :, : call.n, :points] = k[..., scalars:] - keys[0, :, :, : call.n, :points].float()
    for term, these in enumerate((slice(0, half), slice(half, scalars))):
        size = these.stop - these.start
        queries[..., term, points : points + size] = q[..., these]
        keys[term, :, :, : call.n, points : points + size] = k[..., these]
    values = q.new_zeros(call.b, call.h, call.padded, up(call.dv, _ROW), dtype=torch.float16)
    values[:, :, : call.n, : call.dv] = call.v / call.value_scale()
    return Operands(queries, (scale[..., 0] * LOG2E).contiguous(), keys.flatten(0, 1), values)


def forward(call: "Call", plan: Plan, weight: Tensor, pairs: Tensor, lses: Tensor) -> Tensor:
    """Launch the forward pass.

    Args:
        call: What is computed.
        plan: How.
        weight: The bias weight, [cz, heads of a tile].
        pairs: To be written, [parts, b, n, h, cz].
        lses: To be written, [parts, b, h, n].

    Returns:
        The means of the values over each part, [parts, b, h, n, columns].
    """
    parts, each = call.parts(plan)
    given = operands(call)
    heads, z_columns, v_columns = call.head_width(plan), width(call.cz), given.values.shape[-1]
    columns = given.queries.shape[-1]
    outs = lses.new_empty(*lses.shape, v_columns)
    masked = call.pair_mask is not None
    with torch.cuda.device(call.q.device) if call.q.is_cuda else nullcontext():
        forward_kernel[(parts * call.b * -(-call.n // plan.queries),)](
            described(call.z, [1, plan.queries, plan.keys, z_columns]),
            described(given.keys, [1, heads, plan.keys, columns]),
            described(given.values, [1, heads, plan.keys, width(v_columns)]),
            weight, given.queries, given.scale, call.key_bias(), call.mask, call.there, outs, pairs, lses,
            *(call.mask.stride() if masked else (0, 0, 0)),
            call.b, call.n, call.padded, each,
            H=call.h, HW=heads, CZ=call.cz, CZW=z_columns,
            PW=columns, DV=v_columns, DVW=width(v_columns),
            I=plan.queries, J=plan.keys, NEVER=NEVER,
            MASKED=masked, INTERPRETED=INTERPRETED,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return outs
