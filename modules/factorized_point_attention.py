"""FlashIPA's attention as a layer: invariant point attention over a pair representation that is never formed."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from ..kernels.factorized_point_attention import Lifting, factorized_point_attention
from ..kernels.registry.binding import Use
from .masks import boolean
from .point_attention import PointAttention
from .rigid import HasFrames, Rigid


class FactorizedPointAttention(PointAttention):
    """Liu et al. 2025 (FlashIPA, arXiv:2505.11580), with its parameters: z_ij = sum over r of z1_ir * z2_jr.

    It is **another function** than `InvariantPointAttention` with the same weights, even where z has exactly this rank:
    the logits' bias from the pairs is not scaled by sqrt(1/3), and `linear_b` and `down_z`, biases included, act on
    each factor before the two are multiplied and summed over the rank. The layer's memory is linear in the length.

    Args:
        c_s: Width of the single representation.
        c_z: Width of a factor; 0 for a layer that reads no pair representation.
        c_hidden: Channels of a head.
        no_heads: Heads.
        no_qk_points: Query and key points of a head.
        no_v_points: Value points of a head.
        rank: Factors of the pair representation; 0 where `c_z` is 0.
        attention_dtype: The type in which kernels may multiply on an NVIDIA GPU, as FlashIPA's `attn_dtype` says:
            flash-attn needs 16 bits. Elsewhere 16 bits gain nothing, and nothing is rounded; frames never are. None:
            the type of `s` everywhere.
        lifting: "precise", or "plain" for FlashIPA's own rounding to `attention_dtype`, on every device (see the
            operation).
        eps: Under the root of a point's norm.

    Raises:
        ValueError: `rank` and `c_z` are not both there, or both 0.
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
        rank: int,
        attention_dtype: torch.dtype | None = None,
        lifting: Lifting = "precise",
        eps: float = 1e-8,
    ) -> None:
        if (rank > 0) != (c_z > 0):
            raise ValueError(
                f"rank is {rank} and c_z is {c_z}: a layer with a factorised pair representation has both above 0, "
                "one without has both at 0"
            )
        super().__init__(
            c_s=c_s,
            c_z=c_z,
            c_hidden=c_hidden,
            no_heads=no_heads,
            no_qk_points=no_qk_points,
            no_v_points=no_v_points,
            eps=eps,
        )
        self.rank = rank
        self.attention_dtype, self.lifting = attention_dtype, lifting

    def kernel_uses(self) -> list[Use]:
        """Attention over factors."""
        return [factor_attention_use(self, self.rank, lifting=self.lifting, attention_dtype=self.attention_dtype)]

    def forward(
        self,
        s: Float[Tensor, "*b n c_s"],
        z_factor_1: Float[Tensor, "*b n rank c_z"] | None,
        z_factor_2: Float[Tensor, "*b n rank c_z"] | None,
        r: HasFrames | Rigid,
        mask: Shaped[Tensor, "*b n"] | None = None,
    ) -> Float[Tensor, "*b n c_s"]:
        """Update the single representation.

        Args:
            s: Single representation.
            z_factor_1: The factors of the query's residue; None where `c_z` is 0.
            z_factor_2: The factors of the key's residue, likewise.
            r: Frames, in nanometres.
            mask: 1 (or True) for residues that take part; all when None.

        Returns:
            The update. A masked row is the output layer's value for zeros in the global frame, seen from its own
            (its points are -R^T t): multiply it by the mask.

        Raises:
            ValueError: Factors are missing, or something does not fit `s`.
        """
        return attend_over_factors(
            self,
            self.rank,
            s,
            z_factor_1,
            z_factor_2,
            r,
            mask,
            lifting=self.lifting,
            attention_dtype=self.attention_dtype,
        )


def attend_over_factors(
    layer: PointAttention,
    rank: int,
    s: Float[Tensor, "*b n c_s"],
    z_factor_1: Float[Tensor, "*b n rank c_z"] | None,
    z_factor_2: Float[Tensor, "*b n rank c_z"] | None,
    r: HasFrames | Rigid,
    mask: Shaped[Tensor, "*b n"] | None,
    *,
    lifting: Lifting = "precise",
    attention_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*b n c_s"]:
    """What `FactorizedPointAttention` computes, with any layer that has its parameters."""
    check_factors(s, z_factor_1, z_factor_2, mask, rank, layer.c_z)
    lead, n = s.shape[:-2], s.shape[-2]
    frames = Rigid.of(r)
    frames = Rigid(frames.get_rot_mats().reshape(-1, n, 3, 3), frames.get_trans().reshape(-1, n, 3))
    s = s.reshape(-1, n, layer.c_s)
    q, k, v, q_points, k_points, v_points = layer.project(s, frames)
    bias_factors = pair_factors = None
    if layer.down_z is not None and z_factor_1 is not None and z_factor_2 is not None:
        # Each map acts on the factors, its bias included: FlashIPA's function, not that of their product.
        first, second = (z.reshape(-1, n, rank, layer.c_z) for z in (z_factor_1, z_factor_2))
        bias_factors = (layer.linear_b(first).transpose(2, 3), layer.linear_b(second).transpose(2, 3))
        pair_factors = (layer.down_z(first), layer.down_z(second))
    out, out_points, out_pair = factorized_point_attention(
        q,
        k,
        v,
        q_points,
        k_points,
        v_points,
        F.softplus(layer.head_weights),
        bias_factors,
        pair_factors,
        None if mask is None else boolean(mask.reshape(-1, n)),
        lifting=lifting,
        attention_dtype=_rounded_to(attention_dtype, lifting, s.device),
        config=layer.kernel_config,
    )
    return layer.assemble(out, out_points, out_pair, frames).view(*lead, n, layer.c_s)


def factor_attention_use(
    layer: PointAttention, rank: int, *, lifting: Lifting = "precise", attention_dtype: torch.dtype | None = None
) -> Use:
    """The operation that `attend_over_factors` calls."""
    dims = {
        "h": layer.no_heads,
        "c": layer.c_hidden,
        "p": layer.no_qk_points,
        "pv": layer.no_v_points,
        "r": rank,
        "cp": layer.c_z // 4,
    }
    options = ("bias_factors", "pair_factors") if rank else ()
    plain = ("plain_lifting",) if lifting == "plain" else ()
    dtype = _rounded_to(attention_dtype, lifting, layer.head_weights.device)
    return Use("factorized_point_attention", dims, (*options, *plain), dtype)


def _rounded_to(attention_dtype: torch.dtype | None, lifting: Lifting, device: torch.device) -> torch.dtype | None:
    """16 bits make attention fast on CUDA alone; elsewhere they would only cost precision, unless that is wanted."""
    return attention_dtype if device.type == "cuda" or lifting == "plain" else None


def check_factors(
    s: Tensor, z_factor_1: Tensor | None, z_factor_2: Tensor | None, mask: Tensor | None, rank: int, c_z: int
) -> None:
    """Raise ValueError, naming the tensor and what would fit, where something does not go with `s` [*, n, c]."""
    lead = tuple(s.shape[:-1])
    if mask is not None and tuple(mask.shape) != lead:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; with s {tuple(s.shape)} it must be {lead}")
    wanted = (*lead, rank, c_z)
    for name, factor in (("z_factor_1", z_factor_1), ("z_factor_2", z_factor_2)):
        if rank == 0 and factor is not None:
            raise ValueError(f"{name} is given to a layer without a pair representation (its c_z is 0)")
        if rank > 0 and factor is None:
            raise ValueError(
                f"{name} is missing: this layer reads the pair representation as two factors of shape {wanted}, "
                "as an edge embedder of mode flash_1d_bias or flash_2d_factorize_bias gives them"
            )
        if factor is not None and tuple(factor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}; with s {tuple(s.shape)}, rank {rank} and c_z {c_z} "
                f"it must be {wanted}"
            )
