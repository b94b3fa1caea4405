"""The streamed core of factorised point attention, as custom operators: nothing is held for a pair of residues.

A loop over blocks would make Dynamo compile one graph per length, so both directions are opaque operators. The backward
computes the attention again instead of keeping it.
"""

import torch
from torch import Tensor

from ..common.blocking import Scratch
from ..common.double_backward import no_double_backward
from ..dtypes import without_autocast
from ..hardware.tf32 import as_remembered, remembering
from ._heads import Gradients, Heads, Inputs, head_groups


@torch.library.custom_op("foldkernels::factorized_streamed", mutates_args=())
def factorized_streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    weights: Tensor,
    b1: Tensor,
    b2: Tensor,
    z2: Tensor,
    centre: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attended scalars [b, n, h, c], points [b, n, h, 3pv] from `centre`, and factors [b, n, h, r cp]; see `Inputs`."""
    x = Inputs(q, k, v, q_points, k_points, v_points, weights, b1, b2, z2, centre, mask)
    b, n, h, _ = q.shape
    out, points = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (v, v_points))
    # Not rounded: it is multiplied once more.
    pairs = q_points.new_empty(b, n, h, z2.shape[-1])
    heads = Heads(x, Scratch(q_points, q_points.dtype))
    with without_autocast(q):
        for item, some in head_groups(x):
            heads.lift(item, some)
            for rows in heads.blocks():
                attended = torch.bmm(heads.attend(rows), heads.v)
                if heads.gone is not None:
                    attended.masked_fill_(heads.gone[rows], 0.0)
                parts = ((out, heads.at.scalars), (points, heads.at.of_points), (pairs, heads.at.of_pairs))
                for into, where in parts:
                    into[item, rows, some] = attended[..., where].transpose(0, 1)
    return out, points, pairs


@factorized_streamed.register_fake
def _(q, k, v, q_points, k_points, v_points, weights, b1, b2, z2, centre, mask):  # type: ignore[no-untyped-def]
    b, n, h, _ = q.shape
    out, points = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (v, v_points))
    return out, points, q_points.new_empty(b, n, h, z2.shape[-1])


@torch.library.custom_op("foldkernels::factorized_streamed_backward", mutates_args=())
def factorized_streamed_backward(
    d_out: Tensor,
    d_points: Tensor,
    d_pairs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_points: Tensor,
    k_points: Tensor,
    v_points: Tensor,
    weights: Tensor,
    b1: Tensor,
    b2: Tensor,
    z2: Tensor,
    centre: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first ten inputs."""
    x = Inputs(q, k, v, q_points, k_points, v_points, weights, b1, b2, z2, centre, mask)
    found = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:10]]
    # What heads or items add to, in the points' type: 16 bits would lose it.
    of_weights, of_z2 = (torch.zeros_like(y, dtype=q_points.dtype) for y in (weights, z2))
    into = Inputs._make([*found, centre, mask])._replace(weights=of_weights, z2=of_z2)
    heads = Gradients(d_out, d_points, d_pairs, x, Scratch(q_points, q_points.dtype))
    with without_autocast(q):
        for item, some in head_groups(x):
            heads.lift(item, some)
            for rows in heads.blocks():
                heads.add(rows)
            heads.write(into)
    return (*into[:6], of_weights, into.b1, into.b2, of_z2.to(z2.dtype))


@factorized_streamed_backward.register_fake
def _(d_out, d_points, d_pairs, *x):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:10])


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out, d_points, d_pairs):  # type: ignore[no-untyped-def]
    return *factorized_streamed_backward(d_out, d_points, d_pairs, *ctx.saved_tensors), None, None


factorized_streamed.register_autograd(as_remembered(_backward), setup_context=remembering(_keep))
no_double_backward(factorized_streamed_backward, operation="factorized_point_attention", kernel="torch")
