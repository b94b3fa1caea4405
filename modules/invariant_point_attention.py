"""Invariant point attention as a layer: projections, frames, and the operation between them."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from ..kernels.invariant_point_attention import invariant_point_attention
from ..kernels.registry.binding import Use
from .masks import boolean
from .point_attention import PointAttention, assemble, project
from .rigid import HasFrames, Rigid


class InvariantPointAttention(PointAttention):
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
        ValueError: `c_z` is 0.
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
        super().__init__(
            c_s=_size("c_s", c_s, config),
            c_z=_size("c_z", c_z, config),
            c_hidden=_size("c_hidden", c_hidden, config),
            no_heads=_size("no_heads", no_heads, config),
            no_qk_points=_size("no_qk_points", no_qk_points, config),
            no_v_points=_size("no_v_points", no_v_points, config),
            down_z=down_z,
            eps=eps,
        )
        if self.c_z < 1:
            raise ValueError("invariant point attention reads a pair representation: c_z is at least 1")
        self.dropout_prob = float(dropout if dropout is not None else getattr(config, "dropout", 0.0))
        self.inf = inf
        self.reads("linear_b")

    def kernel_uses(self) -> list[Use]:
        """IPA; with dropped logits when training, if this layer drops any."""
        use = pair_attention_use(self)
        dropped = [Use(use.operation, use.dims, ("logit_dropout",))] if self.dropout_prob > 0 else []
        return [use, *dropped]

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
        dropout = self.dropout_prob if self.training else 0.0
        called = not self.may_read()
        return attend_over_pairs(self, s, z, r, mask, attention_mask, logit_dropout=dropout, called=called)

    def combine(self, out: Tensor, out_points: Tensor, out_pair: Tensor, frames: Rigid) -> Float[Tensor, "b n c_s"]:
        """Points back into each residue's frame, the pair values through `down_z`, all through the last layer."""
        return combine_over_pairs(self, out, out_points, out_pair, frames, self.linear_b.bias)


def attend_over_pairs(
    layer: Any,
    s: Float[Tensor, "*b n c_s"],
    z: Float[Tensor, "*b n n c_z"],
    r: HasFrames | Rigid,
    mask: Shaped[Tensor, "*b n"],
    attention_mask: Shaped[Tensor, "*b n n"] | None = None,
    *,
    logit_dropout: float = 0.0,
    called: bool = False,
) -> Float[Tensor, "*b n c_s"]:
    """What `InvariantPointAttention` computes, with any layer that has its parameters, of whatever class.

    Args:
        layer: The layer.
        s: As `InvariantPointAttention` takes it, and so are the next four.
        z: Pair representation.
        r: Frames.
        mask: Residues that take part.
        attention_mask: Pairs that take part.
        logit_dropout: Probability of dropping a logit.
        called: Whether `linear_b` is called, in place of an operation that reads its weight.
    """
    check_shapes(s, z, mask, attention_mask)
    lead, n = s.shape[:-2], s.shape[-2]
    frames = Rigid.of(r)
    frames = Rigid(frames.get_rot_mats().reshape(-1, n, 3, 3), frames.get_trans().reshape(-1, n, 3))
    s, z, mask = s.reshape(-1, n, layer.c_s), z.reshape(-1, n, n, layer.c_z), mask.reshape(-1, n)
    pair_mask = None if attention_mask is None else boolean(attention_mask.reshape(-1, n, n))
    q, k, v, q_points, k_points, v_points = project(layer, s, frames)
    width = z.shape[-1]
    if called:
        z, bias_weight = _beside(z, layer.linear_b(z))
        logit_bias = None
    else:
        bias_weight, logit_bias = layer.linear_b.weight, layer.linear_b.bias
    out, out_points, out_pair = invariant_point_attention(
        q,
        k,
        v,
        q_points,
        k_points,
        v_points,
        F.softplus(layer.head_weights),
        z,
        bias_weight,
        boolean(mask),
        pair_mask,
        logit_bias=logit_bias,
        logit_dropout=logit_dropout,
        config=layer.kernel_config,
    )
    out_pair = out_pair[..., :width]
    return combine_over_pairs(layer, out, out_points, out_pair, frames, logit_bias).view(*lead, n, layer.c_s)


def _beside(
    z: Float[Tensor, "b n n c_z"], bias: Float[Tensor, "b n n h"]
) -> tuple[Float[Tensor, "b n n c"], Float[Tensor, "h c"]]:
    """The pair representation with each head's bias as more of its channels, and the map that gives just these."""
    heads = bias.shape[-1]
    spare = -(z.shape[-1] + heads) % 16  # kernels read whole tiles of channels
    unit = torch.eye(heads, device=z.device, dtype=bias.dtype)
    return (
        torch.cat([z, F.pad(bias, (0, spare)).to(z.dtype)], dim=-1),
        F.pad(unit, (z.shape[-1], spare)),
    )


def combine_over_pairs(
    layer: Any, out: Tensor, out_points: Tensor, out_pair: Tensor, frames: Rigid, logit_bias: Tensor | None
) -> Float[Tensor, "b n c_s"]:
    """What follows the attention over pairs, whose logits had this bias on top of the weight's."""
    down_z = getattr(layer, "down_z", None)
    if down_z is not None:
        # The weights sum to one, so the mean of the projections is the projection of the mean.
        out_pair = down_z(out_pair)
    update: Tensor = assemble(layer, out, out_points, out_pair, frames)
    # The softmax removes this bias, so its gradient is zero: zero, not absent, or DDP would wait for it.
    return update if logit_bias is None or not torch.is_grad_enabled() else update + 0.0 * logit_bias.sum()


def pair_attention_use(layer: Any) -> Use:
    """The operation that `attend_over_pairs` calls."""
    dims = {
        "h": layer.no_heads,
        "c": layer.c_hidden,
        "p": layer.no_qk_points,
        "pv": layer.no_v_points,
        "cz": layer.c_z,
    }
    return Use("invariant_point_attention", dims)


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
