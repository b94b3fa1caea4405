"""The triangle attention update over one block of rows: the pieces that the streamed kernels are made of."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..biased_attention.streaming import attend, attend_backward
from ..common.blocking import block_dtype, norm_dtype
from ..common.matmul import accumulate_
from ..common.pair_blocks import layer_norm_backward, zeros_like_wide
from ..common.pair_projection import pair_bias_backward, pair_bias_into
from ..dtypes import widest
from . import Weights


class Forward:
    """The update of a pair tensor, block by block; the bias is there from the start.

    Args:
        z: The pair tensor, rows first: for the ending node its transpose.
        mask: Likewise.
        weights: The first eight fields of `Weights`.
        gate_bias: Its ninth.
        out_bias: Its tenth.
        eps: LayerNorm's epsilon.
    """

    def __init__(
        self,
        z: Float[Tensor, "b n n cz"],
        mask: Bool[Tensor, "b n n"] | None,
        weights: list[Tensor],
        gate_bias: Tensor | None,
        out_bias: Tensor | None,
        eps: float,
    ) -> None:
        self.z, self.mask, self.eps, self.given = z, mask, eps, Weights._make((*weights, gate_bias, out_bias))
        self.dtype = block_dtype(z)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        # What is added to a product, or multiplied onto one, is not rounded first.
        self.w = self.given.to(self.dtype)._replace(
            norm_weight=self.given.norm_weight.to(norm_dtype(z)),
            norm_bias=self.given.norm_bias.to(norm_dtype(z)),
            gate_bias=None if gate_bias is None else gate_bias.to(self.wide),
        )
        # One product for all four: the same block is read once, and the product is as wide as processors like it.
        self.packed: Float[Tensor, "4*h*d cz"] = torch.cat([self.w.q, self.w.k, self.w.v, self.w.gate])
        b, n, m, _ = z.shape
        self.bias: Float[Tensor, "b h n n"] = z.new_empty(b, self.w.bias.shape[0], n, m, dtype=widest(z))
        pair_bias_into(self.bias, z, self.w.norm_weight, self.w.norm_bias, self.w.bias, eps)

    def normed(self, rows: Float[Tensor, "r m cz"]) -> Float[Tensor, "pairs cz"]:
        x = rows.to(self.dtype)
        return torch.layer_norm(x, x.shape[-1:], self.w.norm_weight, self.w.norm_bias, self.eps).flatten(0, 1)

    def project(self, x: Float[Tensor, "pairs cz"], rows: int) -> tuple[Float[Tensor, "4 r h m d"], Tensor]:
        """Queries, keys and values by head, and the gate as the layers see it, [pairs, h * d], in float32 at least."""
        projected = x @ self.packed.t()
        gate = projected.view(len(x), 4, -1)[:, 3].to(self.wide)
        if self.w.gate_bias is not None:
            gate += self.w.gate_bias
        gate.sigmoid_()
        return by_head(projected, rows, self.bias.shape[1]), gate

    def block(self, i: int, rows: slice) -> Float[Tensor, "r m cz"]:
        """The update of some rows of batch item i."""
        given = self.z[i, rows]
        x = self.normed(given)
        (q, k, v, _), gate = self.project(x, len(given))
        attended = torch.empty_like(gate, dtype=self.dtype, memory_format=torch.contiguous_format)
        out = attended.view(*given.shape[:2], self.bias.shape[1], -1).transpose(1, 2)
        attend(q, k, v, self.bias[i], None if self.mask is None else self.mask[i, rows], out)
        attended *= gate
        return F.linear(attended, self.w.out, self.w.out_bias).view(given.shape)


class Backward(Forward):
    """The gradients, block by block; those of the weights and of the bias are sums over all blocks."""

    def __init__(
        self,
        z: Float[Tensor, "b n n cz"],
        mask: Bool[Tensor, "b n n"] | None,
        weights: list[Tensor],
        gate_bias: Tensor | None,
        out_bias: Tensor | None,
        eps: float,
    ) -> None:
        super().__init__(z, mask, weights, gate_bias, out_bias, eps)
        self.d_bias = torch.zeros_like(self.bias)
        self.d_project = zeros_like_wide(self.w.bias)
        self.d_packed, self.d_out = zeros_like_wide(self.packed), zeros_like_wide(self.w.out)
        self.d_scale, self.d_shift = zeros_like_wide(self.w.norm_weight), zeros_like_wide(self.w.norm_bias)
        self.d_gate_bias = self.d_packed.new_zeros(len(self.w.gate))
        self.d_out_bias = self.d_out.new_zeros(z.shape[-1])

    def block_gradient(self, i: int, rows: slice, d_update: Float[Tensor, "r m cz"]) -> Float[Tensor, "r m cz"]:
        """The gradient of some rows of z, but for what reaches them through the bias."""
        given = self.z[i, rows].to(self.dtype).contiguous()
        r, m, cz = given.shape
        norm = (given.shape[-1:], self.w.norm_weight, self.w.norm_bias)
        x, mean, inverse_std = torch.native_layer_norm(given, *norm, self.eps)
        x = x.view(-1, cz)
        (q, k, v, _), gate = self.project(x, r)

        d_last = d_update.reshape(-1, cz).to(self.dtype)
        d_gated = d_last @ self.w.out
        d_projected = torch.empty(len(x), len(self.packed), dtype=self.dtype, device=x.device)
        d_q, d_k, d_v, _ = by_head(d_projected, r, self.bias.shape[1])
        attended = torch.empty_like(gate, memory_format=torch.contiguous_format)
        attend_backward(
            (d_gated * gate).view(r, m, self.bias.shape[1], -1).transpose(1, 2),
            q,
            k,
            v,
            self.bias[i],
            None if self.mask is None else self.mask[i, rows],
            d_q,
            d_k,
            d_v,
            self.d_bias[i],
            attended.view(r, m, self.bias.shape[1], -1).transpose(1, 2),
        )
        d_gate = torch.ops.aten.sigmoid_backward(d_gated.to(self.wide).mul_(attended), gate)
        d_projected.view(len(x), 4, -1)[:, 3] = d_gate
        accumulate_(self.d_out, d_last.t(), attended.mul_(gate).to(self.dtype))
        accumulate_(self.d_packed, d_projected.t(), x)
        if self.w.gate_bias is not None:
            self.d_gate_bias += d_gate.sum(0, dtype=self.d_gate_bias.dtype)
        if self.w.out_bias is not None:
            self.d_out_bias += d_last.sum(0, dtype=self.d_out_bias.dtype)
        return layer_norm_backward(
            (d_projected @ self.packed).view(given.shape),
            given,
            self.w.norm_weight,
            self.w.norm_bias,
            self.d_scale,
            self.d_shift,
            mean,
            inverse_std,
        )

    def add_through_bias(self, i: int, dz: Float[Tensor, "n n cz"]) -> None:
        """Add what reaches batch item i through the bias, once all its blocks are done."""
        scale, shift, project = pair_bias_backward(
            dz[None],
            self.d_bias[i : i + 1],
            self.z[i : i + 1],
            self.w.norm_weight,
            self.w.norm_bias,
            self.w.bias,
            self.eps,
            add=True,
        )
        self.d_scale += scale
        self.d_shift += shift
        self.d_project += project

    def gradients(self) -> list[Tensor]:
        """The gradients of all ten weights, once every item is done; missing biases have one, too."""
        given = (*self.given[:8], self.given.gate, self.given.out)
        apart = (of_one.clone() for of_one in self.d_packed.chunk(4))  # an operator's results may not share memory
        found = (self.d_scale, self.d_shift, self.d_project, *apart, self.d_out, self.d_gate_bias, self.d_out_bias)
        return [gradient.to(like.dtype) for gradient, like in zip(found, given, strict=True)]


def by_head(projected: Float[Tensor, "pairs 4*h*d"], rows: int, heads: int) -> Float[Tensor, "4 r h m d"]:
    """Look at packed projections by head."""
    return projected.view(rows, -1, 4, heads, projected.shape[1] // (4 * heads)).permute(2, 0, 3, 1, 4)
