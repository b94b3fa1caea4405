"""Multiflow's trunk: blocks of invariant point attention, a sequence transformer, a backbone and a pair update."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .edge_transition import EdgeTransition
from .invariant_point_attention import InvariantPointAttention
from .linear import Linear
from .rigid import Rigid
from .sequence_transformer import SequenceTransformer
from .structure import BackboneUpdate, StructureModuleTransition


class Trunk(nn.ModuleDict):
    """The blocks, under Multiflow's names: ipa_0, ipa_ln_0, seq_tfmr_0, post_tfmr_0, node_transition_0, ...

    Args:
        ipa: Multiflow's `ipa` section: IPA's sizes, seq_tfmr_num_heads, seq_tfmr_num_layers, num_blocks.
        c_z: Width of the pair representation.
        transformer_dropout: Dropout of the sequence transformer.
        checkpointing: Whether training computes the residue layers again in the backward pass.
    """

    def __init__(self, ipa: Any, c_z: int, transformer_dropout: float, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.num_blocks: int = ipa.num_blocks
        c = ipa.c_s
        for b in range(self.num_blocks):
            self[f"ipa_{b}"] = InvariantPointAttention(ipa)
            self[f"ipa_ln_{b}"] = nn.LayerNorm(c)
            self[f"seq_tfmr_{b}"] = SequenceTransformer(
                c, ipa.seq_tfmr_num_heads, ipa.seq_tfmr_num_layers, transformer_dropout
            )
            self[f"post_tfmr_{b}"] = Linear(c, c, init="final")
            self[f"node_transition_{b}"] = StructureModuleTransition(c)
            self[f"bb_update_{b}"] = BackboneUpdate(c)
            if b < self.num_blocks - 1:  # the last block's pair representation would have no reader
                self[f"edge_transition_{b}"] = EdgeTransition(
                    node_embed_size=c, edge_embed_in=c_z, edge_embed_out=c_z
                )

    def forward(  # type: ignore[override]
        self,
        nodes: Float[Tensor, "b n c_s"],
        z: Float[Tensor, "b n n c_z"],
        frames: Rigid,
        mask: Bool[Tensor, "b n"],
        moves: Float[Tensor, "b n"],
    ) -> tuple[Float[Tensor, "b n c_s"], Rigid]:
        """Run the blocks.

        Args:
            nodes: Single representation, zero for residues that do not take part.
            z: Pair representation, likewise.
            frames: Frames in nanometres.
            mask: True for residues that take part.
            moves: 1 for residues whose frames are updated.

        Returns:
            The single representation and the frames, in nanometres.
        """
        there = mask[..., None].to(nodes.dtype)
        for b in range(self.num_blocks):
            attended = self[f"ipa_{b}"](nodes, z, frames, mask)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                nodes = checkpoint(self._update_nodes, b, nodes, attended, mask, there, use_reentrant=False)
            else:
                nodes = self._update_nodes(b, nodes, attended, mask, there)
            frames = frames.compose_update(self[f"bb_update_{b}"](nodes), moves)
            if b < self.num_blocks - 1:
                z = self[f"edge_transition_{b}"](nodes, z, mask)
        return nodes, frames

    def _update_nodes(
        self, b: int, nodes: Tensor, attended: Tensor, mask: Bool[Tensor, "b n"], there: Tensor
    ) -> Float[Tensor, "b n c_s"]:
        """What a block does to the single representation once IPA has attended."""
        nodes = self[f"ipa_ln_{b}"](nodes + attended * there)
        nodes = nodes + self[f"post_tfmr_{b}"](self[f"seq_tfmr_{b}"](nodes, mask))
        nodes = self[f"node_transition_{b}"](nodes)
        return nodes * there
