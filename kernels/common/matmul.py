"""Products that PyTorch computes rightly on every device, MPS among them.

On an Apple GPU, PyTorch hands products and attention to MPSGraph and to kernels of its own, and versions that people
have get some of it wrong without a word (pytorch/pytorch, by number):

- a product whose `out` is a slice or is not contiguous is not written there on macOS 14 (193385), or is an error on
  macOS 14 and 15 (187255), up to torch 2.13;
- a product with an expanded factor gives zeros for most rows on macOS 15 to 26.3 (180201), up to torch 2.11 at least;
- `beta=0` keeps what is NaN in the sum, which may be memory that nobody has written yet (187521), up to torch 2.13;
- attention reads queries, keys and values that are not contiguous wrongly (163597 in torch 2.8, 181133 up to 2.11), and
  values of another width than the queries (176767, up to 2.11); a boolean mask gives NaN to a query without keys
  (156707, up to 2.8 or so); and up to eight queries without a mask of floats read past the keys (169222, up to about
  2.9).

So on MPS a product is made whole, of factors that are whole, and copied to where it belongs.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def write_product(left: Float[Tensor, "g i k"], right: Float[Tensor, "g k j"], out: Float[Tensor, "g i j"]) -> Tensor:
    """Write a batch of products to `out`, which is of their type and may be a view."""
    if out.device.type == "mps":
        return out.copy_(torch.bmm(_own(left), _own(right)))
    return torch.bmm(left, right, out=out)


def add_product_(
    total: Float[Tensor, "g i j"], left: Float[Tensor, "g i k"], right: Float[Tensor, "g k j"], scale: float = 1.0
) -> None:
    """Add a batch of scaled products, in place. Where the sum is wider than the factors, nothing is rounded."""
    if total.device.type == "mps":
        total.add_(torch.bmm(_own(left), _own(right)), alpha=scale)
    elif total.dtype is left.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(product_in(total.dtype, left, right), alpha=scale)


def product_in(
    dtype: torch.dtype, left: Float[Tensor, "g i k"], right: Float[Tensor, "g k j"]
) -> Float[Tensor, "g i j"]:
    """A batch of products in a type that may be wider than the factors': 16-bit factors, and a float32 result."""
    if dtype is left.dtype:
        return torch.bmm(left, right)
    if left.is_cuda and dtype is torch.float32 and _WIDE_RESULTS:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


def accumulate_(total: Float[Tensor, "i j"], left: Float[Tensor, "i k"], right: Float[Tensor, "k j"]) -> None:
    """Add a product to a running sum, which may be wider than the factors.

    PyTorch's 16-bit products on a CPU add up in float32 and round what comes out: a block's share is rounded once.
    """
    if total.dtype is left.dtype and total.device.type != "mps":
        total.addmm_(left, right)
    elif left.is_cuda and total.dtype is torch.float32 and _WIDE_RESULTS:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right))


def dot_product_attention(
    q: Float[Tensor, "b h i d"],
    k: Float[Tensor, "b h j d"],
    v: Float[Tensor, "b h j dv"],
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h i dv"]:
    """PyTorch's scaled_dot_product_attention.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True for keys that take part, or what is added to the logits, in the type of q; broadcast to [b, h, i, j].
        scale: Factor of the products; one over the root of d by default.

    Returns:
        The attended values. What a query without keys gets differs from device to device: some number, zero or NaN.
    """
    if q.device.type != "mps":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width, of_values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x.contiguous() for x in (q, k, v))
    if mask is None and q.shape[-2] <= _FEW_QUERIES:
        mask = q.new_zeros(q.shape[-2], k.shape[-2])
    elif mask is not None and mask.dtype is torch.bool:
        # Finite, and halved, so that a logit added to it does not overflow.
        mask = q.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(q.dtype).min / 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :of_values]


#: Whether PyTorch's products of 16-bit factors can be had in float32: since torch 2.8, on NVIDIA's GPUs.
_WIDE_RESULTS = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None

#: Up to so many queries, PyTorch has kernels of its own on MPS, but where a mask of floats is given.
_FEW_QUERIES = 8


def _own(x: Tensor) -> Tensor:
    """The tensor with memory for each of its elements."""
    return x.contiguous() if 0 in x.stride() else x
