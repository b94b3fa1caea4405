"""Blocks of invariant point attention as a trunk of their own: to enrich both representations, or to fold."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .masks import boolean
from .pair_shapes import head_size
from .rigid import HasFrames, Rigid
from .structure import TorsionAngles
from .trunk import Trunk


class IPATrunk(nn.Module):
    """Multiflow's blocks (Campbell et al. 2024, after Jumper et al. 2021), with or without their backbone update.

    Parameters have Multiflow's names below `trunk.`: an enrichment can start from a Multiflow trunk's weights.
    cogeneration's weights, whose attention stands one level deeper (`ipa_0.impl.linear_q`), are read too.

    Args:
        ipa: IPA's sizes, seq_tfmr_num_heads, seq_tfmr_num_layers, dropout and transformer_dropout, as attributes.
        num_layers: Blocks.
        backbone_update: Whether the blocks move the frames.
        final_edge_update: Whether the last block updates the pair representation, too.
        num_torsions: Torsion angles predicted for each residue from the last block; none by default.
        checkpointing: Whether training computes the residue layers again in the backward pass.

    Raises:
        ValueError: The sequence transformer's heads do not share the width.
    """

    def __init__(
        self,
        ipa: Any,
        num_layers: int,
        *,
        backbone_update: bool = False,
        final_edge_update: bool = True,
        num_torsions: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        head_size("IPATrunk: seq_tfmr_num_heads", ipa.c_s, ipa.seq_tfmr_num_heads)
        self.num_torsions = num_torsions
        self.trunk = Trunk(
            ipa,
            ipa.c_z,
            ipa.transformer_dropout,
            num_blocks=num_layers,
            checkpointing=checkpointing,
            backbone_update=backbone_update,
            final_edge_update=final_edge_update,
        )
        if num_torsions:
            self.torsion_pred = TorsionAngles(ipa.c_s, num_torsions)
        self.register_load_state_dict_pre_hook(_without_impl)

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"],
        node_mask: Shaped[Tensor, "b n"],
        rigid: HasFrames | Rigid,
        diffuse_mask: Shaped[Tensor, "b n"] | None = None,
        *,
        overwrite_z: bool = False,
    ) -> tuple[Float[Tensor, "b n c_s"], Float[Tensor, "b n n c_z"], Rigid, Float[Tensor, "b n torsions 2"] | None]:
        """Run the blocks.

        Args:
            node_embed: Single representation.
            edge_embed: Pair representation.
            node_mask: 1 (or True) for residues that take part. A pair takes part where both of its residues do.
            rigid: Frames, in nanometres.
            diffuse_mask: 1 for residues whose frames are updated; all that take part when None.
            overwrite_z: Whether `edge_embed` may be overwritten where no backward pass follows.

        Returns:
            Both representations, zero for what does not take part; the frames, in nanometres; and the torsion angles
            as points on the unit circle, if this trunk predicts any.
        """
        mask = boolean(node_mask)
        there = mask[..., None].to(node_embed.dtype)
        moves = there[..., 0] if diffuse_mask is None else there[..., 0] * diffuse_mask.to(node_embed.dtype)
        z = mask_pairs(edge_embed, mask, overwrite=overwrite_z)
        nodes, frames, z_out = self.trunk(
            node_embed * there, z, Rigid.of(rigid), mask, moves, consume_z=overwrite_z, keep_z=True
        )
        assert z_out is not None
        torsions = None
        if self.num_torsions:
            _, angles = self.torsion_pred(nodes)
            torsions = angles.unflatten(-1, (self.num_torsions, 2)) * there[..., None]
        return nodes, z_out, frames, torsions


def mask_pairs(
    z: Float[Tensor, "b n n c_z"], mask: Shaped[Tensor, "b n"], *, overwrite: bool = False
) -> Float[Tensor, "b n n c_z"]:
    """Zeros for every pair with a residue that does not take part.

    Args:
        z: Pair representation.
        mask: True for residues that take part.
        overwrite: Whether z may be overwritten where no backward pass follows.
    """
    gone = ~(mask[:, :, None] & mask[:, None])[..., None]
    return z.masked_fill_(gone, 0.0) if overwrite and not torch.is_grad_enabled() else z.masked_fill(gone, 0.0)


def _without_impl(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Read `ipa_0.impl.linear_q`, as cogeneration names it, which wraps its attention, as `ipa_0.linear_q`."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}trunk.ipa_") and ".impl." in name]:
        state_dict[name.replace(".impl.", ".", 1)] = state_dict.pop(name)
