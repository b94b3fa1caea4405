"""FlashIPA's trunk: Multiflow's blocks on a pair representation in two factors, or on none."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..kernels.factorized_point_attention import Lifting
from .edge_factor_transition import EdgeFactorTransition
from .factorized_point_attention import FactorizedPointAttention
from .linear import Linear
from .rigid import Rigid
from .sequence_transformer import SequenceTransformer
from .structure import BackboneUpdate, StructureModuleTransition


class FactorTrunk(nn.ModuleDict):
    """The blocks, under FlashIPA's names: ipa_0, ipa_ln_0, seq_tfmr_0, post_tfmr_0, node_transition_0, ...

    Args:
        ipa: FlashIPA's `ipa` section: IPA's sizes, z_factor_rank, seq_tfmr_num_heads, seq_tfmr_num_layers, num_blocks.
        c_z: Width of a factor in the edge transitions. A model without a pair representation (`ipa.c_z` 0) has edge
            transitions too, which nothing reads, because its checkpoints hold them.
        attention_dtype: See `FactorizedPointAttention`.
        lifting: See `FactorizedPointAttention`.
        c_skip: Width of the first single representation that each block reads again (FoldFlow's `skip_embed_0`, ...);
            0 for none.
    """

    def __init__(
        self,
        ipa: Any,
        c_z: int,
        *,
        attention_dtype: torch.dtype | None = None,
        lifting: Lifting = "precise",
        c_skip: int = 0,
    ) -> None:
        super().__init__()
        self.num_blocks: int = ipa.num_blocks
        self.rank: int = ipa.z_factor_rank
        self.c_skip = c_skip
        c = ipa.c_s
        for b in range(self.num_blocks):
            self[f"ipa_{b}"] = FactorizedPointAttention(
                c_s=c,
                c_z=ipa.c_z,
                c_hidden=ipa.c_hidden,
                no_heads=ipa.no_heads,
                no_qk_points=ipa.no_qk_points,
                no_v_points=ipa.no_v_points,
                rank=self.rank,
                attention_dtype=attention_dtype,
                lifting=lifting,
            )
            self[f"ipa_ln_{b}"] = nn.LayerNorm(c)
            if c_skip:
                self[f"skip_embed_{b}"] = Linear(c, c_skip, init="final")
            self[f"seq_tfmr_{b}"] = SequenceTransformer(
                c + c_skip, ipa.seq_tfmr_num_heads, ipa.seq_tfmr_num_layers, 0.0
            )
            self[f"post_tfmr_{b}"] = Linear(c + c_skip, c, init="final")
            self[f"node_transition_{b}"] = StructureModuleTransition(c)
            self[f"bb_update_{b}"] = BackboneUpdate(c)
            if b < self.num_blocks - 1:  # the last block's factors would have no reader
                self[f"edge_transition_{b}"] = EdgeFactorTransition(
                    node_embed_size=c, edge_embed_in=c_z, edge_embed_out=c_z, rank=self.rank
                )

    def forward(
        self,
        nodes: Float[Tensor, "b n c_s"],
        z_factor_1: Float[Tensor, "b n rank c_z"] | None,
        z_factor_2: Float[Tensor, "b n rank c_z"] | None,
        frames: Rigid,
        mask: Bool[Tensor, "b n"],
        moves: Float[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b n c_s"], Rigid]:
        """Run the blocks.

        Args:
            nodes: Single representation, zero for residues that do not take part.
            z_factor_1: Factors of the first residue of a pair; None without a pair representation.
            z_factor_2: Factors of the second.
            frames: Frames in nanometres.
            mask: True for residues that take part.
            moves: 1 for residues whose frames are updated.

        Returns:
            The single representation, and the frames in nanometres.

        Raises:
            ValueError: Factors are missing, or something does not fit.
        """
        there = mask[..., None].to(nodes.dtype)
        first_nodes = nodes
        for b in range(self.num_blocks):
            attended = self[f"ipa_{b}"](nodes, z_factor_1, z_factor_2, frames, mask)
            nodes = self[f"ipa_ln_{b}"](nodes + attended * there)
            read = torch.cat([nodes, self[f"skip_embed_{b}"](first_nodes)], dim=-1) if self.c_skip else nodes
            nodes = nodes + self[f"post_tfmr_{b}"](self[f"seq_tfmr_{b}"](read, mask))
            nodes = self[f"node_transition_{b}"](nodes) * there
            frames = frames.compose_update(self[f"bb_update_{b}"](nodes), moves)
            if b < self.num_blocks - 1 and self.rank:
                z_factor_1, z_factor_2 = (
                    z * there[..., None] for z in self[f"edge_transition_{b}"](nodes, z_factor_1, z_factor_2)
                )
        return nodes, frames
