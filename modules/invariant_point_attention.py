"""Invariant point attention as a layer: projections, frames, and the operation between them."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.binding import Use
from ..kernels.invariant_point_attention import invariant_point_attention
from ..kernels.tensors import without_autocast
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean
from .rigid import HasFrames, Rigid


class InvariantPointAttention(KernelModule):
    """Jumper et al. 2021, Supplementary Algorithm 22, with the parameters of OpenFold's and Multiflow's layer.

    Args:
        config: An object with the sizes below as attributes, as Multiflow passes it; or give them by name.
        c_s: Width of the single representation.
        c_z: Width of the pair representation.
        c_hidden: Channels of a head.
        no_heads: Heads.
        no_qk_points: Query and key points of a head.
        no_v_points: Value points of a head.
        dropout: Probability of dropping a logit in training.
        down_z: Whether the pair representation is projected to c_z // 4 before it is attended (Multiflow), or attended
            whole (OpenFold). The checkpoint decides.
        inf: Accepted for the originals' sake; masks are exact here.
        eps: Under the root of a point's norm.

    Raises:
        TypeError: A size is missing.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        c_s: int | None = None,
        c_z: int | None = None,
        c_hidden: int | None = None,
        no_heads: int | None = None,
        no_qk_points: int | None = None,
        no_v_points: int | None = None,
        dropout: float | None = None,
        down_z: bool = True,
        inf: float = 1e5,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.c_s = _size("c_s", c_s, config)
        self.c_z = _size("c_z", c_z, config)
        self.c_hidden = _size("c_hidden", c_hidden, config)
        self.no_heads = _size("no_heads", no_heads, config)
        self.no_qk_points = _size("no_qk_points", no_qk_points, config)
        self.no_v_points = _size("no_v_points", no_v_points, config)
        self.dropout_prob = float(dropout if dropout is not None else getattr(config, "dropout", 0.0))
        self.inf, self.eps = inf, eps

        heads = self.no_heads
        self.linear_q = Linear(self.c_s, heads * self.c_hidden)
        self.linear_kv = Linear(self.c_s, 2 * heads * self.c_hidden)
        self.linear_q_points = Linear(self.c_s, 3 * heads * self.no_qk_points)
        self.linear_kv_points = Linear(self.c_s, 3 * heads * (self.no_qk_points + self.no_v_points))
        self.linear_b = Linear(self.c_z, heads)
        self.down_z = Linear(self.c_z, self.c_z // 4) if down_z else None
        # softplus of this is 1.
        self.head_weights = nn.Parameter(torch.full((heads,), 0.541324854612918))
        pair = self.c_z // 4 if down_z else self.c_z
        self.linear_out = Linear(heads * (pair + self.c_hidden + 4 * self.no_v_points), self.c_s, init="final")

    def kernel_uses(self) -> list[Use]:
        """IPA; with dropped logits when training, if this layer drops any."""
        dims = {
            "h": self.no_heads,
            "c": self.c_hidden,
            "p": self.no_qk_points,
            "pv": self.no_v_points,
            "cz": self.c_z,
        }
        dropped = [Use("invariant_point_attention", dims, ("logit_dropout",))] if self.dropout_prob > 0 else []
        return [Use("invariant_point_attention", dims), *dropped]

    def forward(
        self,
        s: Float[Tensor, "*b n c_s"],
        z: Float[Tensor, "*b n n c_z"],
        r: HasFrames | Rigid,
        mask: Shaped[Tensor, "*b n"],
        attention_mask: Shaped[Tensor, "*b n n"] | None = None,
    ) -> Float[Tensor, "*b n c_s"]:
        """Update the single representation.

        Args:
            s: Single representation.
            z: Pair representation.
            r: Frames, in nanometres.
            mask: 1 (or True) for residues that take part.
            attention_mask: 1 (or True) where a query, second to last axis, may attend to a key, last axis.

        Returns:
            The update. A masked row is the output layer's value for zeros and their frame: multiply it by the mask.

        Raises:
            ValueError: A mask or the pair representation does not fit `s`.
        """
        pair_mask = None if attention_mask is None else boolean(attention_mask)
        return attend(self, s, z, Rigid.of(r), boolean(mask), pair_mask, dropout=self.dropout_prob)

    def project(self, s: Float[Tensor, "b n c_s"], frames: Rigid) -> tuple[Tensor, ...]:
        """Queries, keys and values [b, n, h, c], and their points [b, n, h, p, 3] in the global frame."""
        return project(self, s, frames)

    def combine(self, out: Tensor, out_points: Tensor, out_pair: Tensor, frames: Rigid) -> Float[Tensor, "b n c_s"]:
        """Points back into each residue's frame, the pair values through `down_z`, all through the last layer."""
        return combine(self, out, out_points, out_pair, frames)


# The forward's parts, for a layer of this class, or of another project's class with the same parameters -----------


def attend(
    layer: Any,
    s: Float[Tensor, "*b n c_s"],
    z: Float[Tensor, "*b n n c_z"],
    frames: Rigid,
    mask: Bool[Tensor, "*b n"],
    pair_mask: Bool[Tensor, "*b n n"] | None = None,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "*b n c_s"]:
    """The whole forward of a layer that has the parameters and the sizes of `InvariantPointAttention`.

    Args:
        layer: The layer, with its `kernel_config`.
        s: Single representation.
        z: Pair representation.
        frames: One frame a residue.
        mask: True for residues that take part.
        pair_mask: True where a query, second to last axis, may attend to a key, last axis.
        dropout: Probability of dropping a logit, if the layer is training.

    Raises:
        ValueError: A mask or the pair representation does not fit `s`.
    """
    check_shapes(s, z, mask, pair_mask)
    lead, n = s.shape[:-2], s.shape[-2]
    frames = Rigid(frames.get_rot_mats().reshape(-1, n, 3, 3), frames.get_trans().reshape(-1, n, 3))
    s, z, mask = s.reshape(-1, n, s.shape[-1]), z.reshape(-1, n, n, z.shape[-1]), mask.reshape(-1, n)
    q, k, v, q_points, k_points, v_points = project(layer, s, frames)
    out, out_points, out_pair = invariant_point_attention(
        q,
        k,
        v,
        q_points,
        k_points,
        v_points,
        F.softplus(layer.head_weights),
        z,
        layer.linear_b.weight,
        mask,
        None if pair_mask is None else pair_mask.reshape(-1, n, n),
        logit_bias=layer.linear_b.bias,
        logit_dropout=dropout if layer.training else 0.0,
        config=layer.kernel_config,
    )
    return combine(layer, out, out_points, out_pair, frames).view(*lead, n, -1)


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
    """Local points as a linear layer gives them, all x first, then y, then z, in the global frame."""
    b, n, _ = flat.shape
    with without_autocast(flat):
        # Frames are never held in 16 bits.
        local = flat.view(b, n, 3, heads, -1).permute(0, 1, 3, 4, 2).to(frames.trans.dtype)
        return frames.apply(local)


def combine(
    layer: Any, out: Tensor, out_points: Tensor, out_pair: Tensor, frames: Rigid
) -> Float[Tensor, "b n c_s"]:
    """Points back into each residue's frame, the pair values through `down_z`, all through the last layer."""
    with without_autocast(out):
        local = frames.invert_apply(out_points)
        x, y, z = local.unbind(-1)
        norms = (x * x + y * y + z * z + layer.eps).sqrt()
    if layer.down_z is not None:
        # The weights sum to one, so the mean of the projections is the projection of the mean.
        out_pair = layer.down_z(out_pair)
    dtype = out.dtype
    features = torch.cat(
        [
            out.flatten(2),
            *(axis.flatten(2).to(dtype) for axis in (x, y, z)),
            norms.flatten(2).to(dtype),
            out_pair.flatten(2).to(dtype),
        ],
        dim=-1,
    )
    update: Tensor = layer.linear_out(features)
    # The softmax removes this bias, so its gradient is zero: zero, not absent, or DDP would wait for it.
    return update + 0.0 * layer.linear_b.bias.sum() if torch.is_grad_enabled() else update


def _size(name: str, given: int | None, config: Any) -> int:
    value = given if given is not None else getattr(config, name, None)
    if value is None:
        raise TypeError(f"InvariantPointAttention needs {name}=, or a config object that has it")
    return int(value)


def check_shapes(s: Tensor, z: Tensor, mask: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raise ValueError, naming the tensor and what would fit, where a shape does not go with `s` [*, n, c]."""
    lead, n = tuple(s.shape[:-2]), s.shape[-2]
    for name, tensor, wanted in (
        ("mask", mask, (*lead, n)),
        ("attention_mask", attention_mask, (*lead, n, n)),
        ("z", None if z is None else z[..., 0], (*lead, n, n)),
    ):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with s {tuple(s.shape)} it must be {wanted}")
