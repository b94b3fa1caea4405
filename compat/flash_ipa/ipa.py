"""FlashIPA's layers: invariant point attention over pairs or over factors of them, and the edge transition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ...errors import BadInput
from ...kernels.factorized_point_attention import Lifting
from ...kernels.registry.binding import Use
from ...modules.edge_factor_transition import edge_bias_layer, update_factors
from ...modules.edge_transition import READ, TransitionLayers, check_two_layers, update_pairs
from ...modules.factorized_point_attention import attend_over_factors, factor_attention_use
from ...modules.invariant_point_attention import attend_over_pairs, pair_attention_use
from ...modules.point_attention import PointAttention
from ...modules.rigid import HasFrames, Rigid
from ...modules.structure import BackboneUpdate, StructureModuleTransition

__all__ = [
    "BackboneUpdate",
    "EdgeTransition",
    "IPAConfig",
    "InvariantPointAttention",
    "StructureModuleTransition",
    "attention_dtype",
    "attn_dtype_dict",
]

attn_dtype_dict = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class IPAConfig:
    """FlashIPA's `ipa` section, with its defaults.

    Attributes:
        use_flash_attn: Whether the pair representation is read as two factors. It says what is computed; which kernel
            computes it is `kernel:`'s to say, and flash-attn is one of them.
        attn_dtype: "fp32", or "bf16" or "fp16": what attention over factors may be rounded to on an NVIDIA GPU. On
            other devices, where that would not be faster, nothing is rounded.
        use_packed: Not used: it chose between two functions of flash-attn.
        c_s: Width of the single representation.
        c_z: Width of the pair representation, or of a factor; 0 for none.
        c_hidden: Channels of a head. There is no limit of 256 on what they add up to with points and factors.
        no_heads: Heads.
        z_factor_rank: Factors of the pair representation; 0 for none.
        no_qk_points: Query and key points of a head.
        no_v_points: Value points of a head.
        seq_tfmr_num_heads: Heads of the sequence transformer.
        seq_tfmr_num_layers: Its layers.
        num_blocks: Blocks of the trunk.
    """

    use_flash_attn: bool = True
    attn_dtype: str = "bf16"
    use_packed: bool = True
    c_s: int = 256
    c_z: int = 128
    c_hidden: int = 128
    no_heads: int = 8
    z_factor_rank: int = 2
    no_qk_points: int = 8
    no_v_points: int = 12
    seq_tfmr_num_heads: int = 4
    seq_tfmr_num_layers: int = 2
    num_blocks: int = 6


def attention_dtype(ipa_conf: IPAConfig | Any) -> torch.dtype | None:
    """What `attn_dtype` lets attention over factors be rounded to; None for nothing.

    Raises:
        BadInput: It is none of FlashIPA's words.
    """
    word = getattr(ipa_conf, "attn_dtype", "bf16")
    if word not in attn_dtype_dict:
        raise BadInput(f"attn_dtype is {word!r}", f"it is one of {', '.join(attn_dtype_dict)}.")
    return None if word == "fp32" else attn_dtype_dict[word]


class InvariantPointAttention(PointAttention):
    """FlashIPA's layer (Liu et al. 2025, arXiv:2505.11580, after Jumper et al. 2021, Supplementary Algorithm 22).

    With `use_flash_attn` it reads the pair representation as two factors, and is another function than without: see
    `foldkernels.modules.factorized_point_attention`. Without, it is Multiflow's layer. Without a pair representation
    (c_z is 0) the two are one, and memory is linear in the length either way.

    Args:
        ipa_conf: An `IPAConfig`, or any object with its fields.
        inf: Accepted for the original's sake; masks are exact here.
        eps: Under the root of a point's norm.

    Attributes:
        lifting: "precise"; "plain" rounds as FlashIPA does in 16 bits, whose logits are wrong off the origin.

    Raises:
        BadInput: A setting is wrong.
    """

    lifting: Lifting = "precise"

    def __init__(self, ipa_conf: IPAConfig | Any, inf: float = 1e5, eps: float = 1e-8) -> None:
        self._check(ipa_conf)
        super().__init__(
            c_s=ipa_conf.c_s,
            c_z=ipa_conf.c_z,
            c_hidden=ipa_conf.c_hidden,
            no_heads=ipa_conf.no_heads,
            no_qk_points=ipa_conf.no_qk_points,
            no_v_points=ipa_conf.no_v_points,
            eps=eps,
        )
        self._ipa_conf = ipa_conf
        self.inf = inf
        self.use_flash_attn = bool(ipa_conf.use_flash_attn)
        self.rank: int = ipa_conf.z_factor_rank if self.use_flash_attn else 0
        self.attention_dtype = attention_dtype(ipa_conf) if self.use_flash_attn else None
        if self._reads_pairs:
            self.reads("linear_b")

    @property
    def _reads_pairs(self) -> bool:
        return not self.use_flash_attn and self.c_z > 0

    def kernel_uses(self) -> list[Use]:
        """Attention over pairs or over factors."""
        if self._reads_pairs:
            return [pair_attention_use(self)]
        return [factor_attention_use(self, self.rank, lifting=self.lifting, attention_dtype=self.attention_dtype)]

    def forward(
        self,
        s: Float[Tensor, "*b n c_s"],
        z: Float[Tensor, "*b n n c_z"] | None,
        z_factor_1: Float[Tensor, "*b n rank c_z"] | None,
        z_factor_2: Float[Tensor, "*b n rank c_z"] | None,
        r: HasFrames | Rigid,
        mask: Shaped[Tensor, "*b n"] | None,
        _offload_inference: bool = False,
        _z_reference_list: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "*b n c_s"]:
        """Update the single representation.

        Args:
            s: Single representation.
            z: Pair representation; None with `use_flash_attn`.
            z_factor_1: Factors of the query's residue; None without `use_flash_attn`.
            z_factor_2: Factors of the key's residue, likewise.
            r: Frames, in nanometres.
            mask: 1 (or True) for residues that take part; all when None.
            _offload_inference: Whether the pair representation is the first of `_z_reference_list`. It stays on its
                device: z is only read, once.
            _z_reference_list: See there.

        Returns:
            The update. Multiply masked rows by the mask: they are the output layer's value for zeros in the global
            frame, seen from the residue's own. (The original's are that with factors, and rounding noise with pairs.)

        Raises:
            BadInput: Pairs are given to a layer that reads factors, or factors to one that reads pairs, or neither.
            ValueError: A shape does not fit `s`.
        """
        if _offload_inference and _z_reference_list:
            z = _z_reference_list[0]
        factors = z_factor_1 is not None or z_factor_2 is not None
        if self._reads_pairs:
            if factors or z is None:
                raise BadInput(
                    f"this layer (use_flash_attn off) reads a dense pair representation z, and "
                    f"{'is given factors' if factors else 'is given none'}",
                    "use mode orig_2d_bias throughout, or turn use_flash_attn on.",
                )
            mask = s.new_ones(s.shape[:-1]) if mask is None else mask
            return attend_over_pairs(self, s, z, r, mask, called=not self.may_read())
        if z is not None:
            raise BadInput(
                "this layer never reads a dense pair representation, and is given one (z)"
                if self.c_z
                else "this layer reads no pair representation (c_z is 0), and is given one (z)",
                "pass None; EdgeEmbedder of mode flash_2d_factorize_bias makes two factors of a dense one."
                if self.c_z
                else "pass None.",
            )
        if self.c_z and (z_factor_1 is None or z_factor_2 is None):
            raise BadInput(
                f"this layer (use_flash_attn on) reads two factors of rank {self.rank}, and is not given both",
                "pass the z_factor_1 and z_factor_2 of an EdgeEmbedder, or set c_z and z_factor_rank to 0.",
            )
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

    @staticmethod
    def _check(ipa_conf: IPAConfig | Any) -> None:
        if ipa_conf.use_flash_attn and (ipa_conf.z_factor_rank > 0) != (ipa_conf.c_z > 0):
            raise BadInput(
                f"z_factor_rank is {ipa_conf.z_factor_rank} and c_z is {ipa_conf.c_z}",
                "with use_flash_attn both are above 0, or both are 0 for a layer without a pair representation.",
            )


class EdgeTransition(TransitionLayers):
    """FlashIPA's edge transition: of a pair representation ("2d"), as Multiflow's, or of its two factors ("1d").

    Args:
        mode: "1d" or "2d".
        node_embed_size: Width of the single representation.
        edge_embed_in: Width of the pair representation, or of a factor.
        edge_embed_out: Its width afterwards.
        z_factor_rank: Factors, in mode 1d.
        num_layers: Layers of the perceptron; two.
        node_dilation: The single representation is projected to node_embed_size // node_dilation.

    Raises:
        BadInput: There is no such mode.
        ValueError: `num_layers` is not two.
    """

    def __init__(
        self,
        *,
        mode: str,
        node_embed_size: int,
        edge_embed_in: int,
        edge_embed_out: int,
        z_factor_rank: int = 0,
        num_layers: int = 2,
        node_dilation: int = 2,
    ) -> None:
        if mode not in ("1d", "2d"):
            raise BadInput(f"an edge transition's mode is {mode!r}", "it is 1d (factors) or 2d (pairs).")
        check_two_layers(num_layers)
        super().__init__(
            node_embed_size=node_embed_size,
            edge_embed_in=edge_embed_in,
            edge_embed_out=edge_embed_out,
            num_layers=num_layers,
            node_dilation=node_dilation,
        )
        self.mode, self.z_factor_rank = mode, z_factor_rank
        if mode == "1d":
            self.edge_bias_linear = edge_bias_layer(self, z_factor_rank)
        else:
            self.reads(*READ)

    def kernel_uses(self) -> list[Use]:
        """The edge transition, in mode 2d."""
        return [Use("edge_transition", self.sizes)] if self.mode == "2d" else []

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"] | None,
        z_factor_1: Float[Tensor, "b n rank c_z"] | None = None,
        z_factor_2: Float[Tensor, "b n rank c_z"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Update the pair representation, or its factors. Masking is the caller's, as in the original.

        Args:
            node_embed: Single representation.
            edge_embed: Pair representation, in mode 2d.
            z_factor_1: Factors of the first residue of a pair, in mode 1d.
            z_factor_2: Factors of the second.

        Returns:
            The pair representation, or the two factors.

        Raises:
            BadInput: What this mode does not read is given, or what it reads is not.
            ValueError: A factor's shape does not fit.
        """
        factors = (z_factor_1, z_factor_2)
        if self.mode == "2d":
            if edge_embed is None or any(factor is not None for factor in factors):
                raise BadInput("an edge transition of mode 2d reads a pair representation", "pass edge_embed alone.")
            return update_pairs(self, node_embed, edge_embed, called=not self.may_read())
        if edge_embed is not None or z_factor_1 is None or z_factor_2 is None:
            raise BadInput("an edge transition of mode 1d reads two factors", "pass z_factor_1 and z_factor_2 alone.")
        return update_factors(self, self.edge_bias_linear, self.z_factor_rank, node_embed, z_factor_1, z_factor_2)
