"""What the streamed kernels do to a block of pairs, whatever the operation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def relu_(x: Tensor) -> Tensor:
    """ReLU in place. In bfloat16 as a clamp of the bits seen as integers, whose order is the same above zero.

    PyTorch's own is slow there. A NaN whose sign bit is set becomes 0.
    """
    if x.dtype is torch.bfloat16 and x.device.type == "cpu":
        x.view(torch.int16).clamp_(min=0)
        return x
    return x.relu_()


def relu_backward_(gradient: Tensor, after: Tensor) -> Tensor:
    """Make the gradient after a ReLU the one before it, in place."""
    torch.ops.aten.threshold_backward.grad_input(gradient, after, 0, grad_input=gradient)
    return gradient


def add_rows(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Lay down rows[r] + columns[j] for every pair of a block; `out` is [pairs, c]."""
    torch.add(rows[:, None], columns, out=out.view(rows.shape[0], *columns.shape))
    return out


def no_pair(mask: Bool[Tensor, " n"], rows: slice) -> Bool[Tensor, "rows n 1"]:
    """True for the pairs of a block that have a masked residue."""
    return ~(mask[rows, None] & mask)[..., None]


def layer_norm_rows(
    x: Float[Tensor, "pairs c"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    rows: slice,
    mask: Bool[Tensor, " n"] | None,
    eps: float,
) -> Float[Tensor, "rows n c"]:
    """LayerNorm of a block's last layer, zero for pairs with a masked residue."""
    out = torch.layer_norm(x, x.shape[-1:], weight, bias, eps).view(rows.stop - rows.start, -1, x.shape[-1])
    return out if mask is None else out.masked_fill_(no_pair(mask, rows), 0.0)


def layer_norm_rows_backward(
    d_out: Float[Tensor, "rows n c"],
    x: Float[Tensor, "pairs c"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    d_weight: Float[Tensor, " c"],
    d_bias: Float[Tensor, " c"],
    rows: slice,
    mask: Bool[Tensor, " n"] | None,
    eps: float,
) -> Float[Tensor, "pairs c"]:
    """The gradient of `x`; those of the weight and the bias are added to `d_weight` and `d_bias`."""
    if mask is not None:
        d_out = d_out.masked_fill(no_pair(mask, rows), 0.0)
    _, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return layer_norm_backward(d_out.reshape(x.shape), x, weight, bias, d_weight, d_bias, mean, inverse_std)


def layer_norm_backward(
    d_out: Float[Tensor, "*b c"],
    x: Float[Tensor, "*b c"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    d_weight: Float[Tensor, " c"],
    d_bias: Float[Tensor, " c"],
    mean: Tensor,
    inverse_std: Tensor,
) -> Float[Tensor, "*b c"]:
    """The gradient of a LayerNorm's input, in its type; the weight's and the bias's are added to what is there.

    `mean` and `inverse_std` are what `torch.native_layer_norm` found of x.
    """
    # In float32 at least: in bfloat16, PyTorch adds up the weight's and the bias's gradients in bfloat16, too.
    given, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    d_x: Tensor
    d_out, x, mean, inverse_std = (part.to(wide) for part in (d_out, x, mean, inverse_std))
    d_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        d_out, x, x.shape[-1:], mean, inverse_std, weight.to(wide), bias.to(wide), [True, True, True]
    )
    d_weight.add_(of_weight)
    d_bias.add_(of_bias)
    return d_x.to(given)


def zeros_like_wide(part: Tensor) -> Tensor:
    """A sum to fill, in float32 at least: sums over many pairs lose too much in 16 bits."""
    return torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
