"""What every layer of invariant point attention has: the projections before the attention, and what follows it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.dtypes import without_autocast
from .kernel_module import KernelModule
from .linear import Linear
from .rigid import Rigid


class PointAttention(KernelModule):
    """The parameters of Jumper et al. 2021, Supplementary Algorithm 22, as OpenFold, Multiflow and FlashIPA name them.

    What stands between the projections and the output layer is a layer's own: attention over pairs
    (`invariant_point_attention`) or over factors of them (`factorized_point_attention`).

    Args:
        c_s: Width of the single representation.
        c_z: Width of the pair representation; 0 for a layer without one, which has no `linear_b` and no `down_z`.
        c_hidden: Channels of a head.
        no_heads: Heads.
        no_qk_points: Query and key points of a head.
        no_v_points: Value points of a head.
        down_z: Whether the pair representation is projected to c_z // 4 (Multiflow, FlashIPA) or read whole (OpenFold).
        eps: Under the root of a point's norm.
    """

    def __init__(
        self,
        *,
        c_s: int,
        c_z: int,
        c_hidden: int,
        no_heads: int,
        no_qk_points: int,
        no_v_points: int,
        down_z: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.c_s, self.c_z, self.c_hidden = c_s, c_z, c_hidden
        self.no_heads, self.no_qk_points, self.no_v_points = no_heads, no_qk_points, no_v_points
        self.eps = eps
        self.linear_q = Linear(c_s, no_heads * c_hidden)
        self.linear_kv = Linear(c_s, 2 * no_heads * c_hidden)
        self.linear_q_points = Linear(c_s, 3 * no_heads * no_qk_points)
        self.linear_kv_points = Linear(c_s, 3 * no_heads * (no_qk_points + no_v_points))
        self.down_z: Linear | None = None
        if c_z > 0:
            self.linear_b = Linear(c_z, no_heads)
            self.down_z = Linear(c_z, c_z // 4) if down_z else None
        # softplus of this is 1.
        self.head_weights = nn.Parameter(torch.full((no_heads,), 0.541324854612918))
        pair = c_z // 4 if down_z else c_z
        self.linear_out = Linear(no_heads * (pair + c_hidden + 4 * no_v_points), c_s, init="final")

    def project(self, s: Float[Tensor, "b n c_s"], frames: Rigid) -> tuple[Tensor, ...]:
        """Queries, keys and values [b, n, h, c], and their points [b, n, h, p, 3] in the global frame."""
        return project(self, s, frames)

    def assemble(
        self, out: Tensor, out_points: Tensor, out_pair: Tensor | None, frames: Rigid
    ) -> Float[Tensor, "b n c_s"]:
        """Points back into each residue's frame; then all, with the projected pair values, through the last layer."""
        return assemble(self, out, out_points, out_pair, frames)


# The same for any layer with these parameters and sizes, of another project's class too: hence no type of ours.


def project(layer: Any, s: Float[Tensor, "b n c_s"], frames: Rigid) -> tuple[Tensor, ...]:
    """Queries, keys and values [b, n, h, c], and their points [b, n, h, p, 3] in the global frame."""
    b, n, _ = s.shape
    heads = layer.no_heads
    q = layer.linear_q(s).view(b, n, heads, layer.c_hidden)
    k, v = layer.linear_kv(s).view(b, n, heads, 2 * layer.c_hidden).split(layer.c_hidden, dim=-1)
    q_points = place_points(layer.linear_q_points(s), heads, frames)
    k_points, v_points = place_points(layer.linear_kv_points(s), heads, frames).split(
        [layer.no_qk_points, layer.no_v_points], dim=3
    )
    return q, k, v, q_points, k_points, v_points


def place_points(flat: Float[Tensor, "b n xyz_points"], heads: int, frames: Rigid) -> Float[Tensor, "b n h points 3"]:
    """Local points as a layer gives them, all x first, then all y, then all z, in the global frame."""
    b, n, _ = flat.shape
    with without_autocast(flat):
        # Frames are never held in 16 bits.
        local = flat.view(b, n, 3, heads, -1).permute(0, 1, 3, 4, 2).to(frames.trans.dtype)
        return frames.apply(local)


def assemble(
    layer: Any, out: Tensor, out_points: Tensor, out_pair: Tensor | None, frames: Rigid
) -> Float[Tensor, "b n c_s"]:
    """Points back into each residue's frame; then all, with the projected pair values, through the last layer."""
    with without_autocast(out):
        local = frames.invert_apply(out_points)
        x, y, z = local.unbind(-1)
        norms = (x * x + y * y + z * z + layer.eps).sqrt()
    dtype = out.dtype
    features = [
        out.flatten(2),
        *(axis.flatten(2).to(dtype) for axis in (x, y, z)),
        norms.flatten(2).to(dtype),
    ]
    if out_pair is not None:
        features.append(out_pair.flatten(2).to(dtype))
    update: Tensor = layer.linear_out(torch.cat(features, dim=-1))
    return update
