"""Multiflow's trunk: blocks of invariant point attention, a sequence transformer, a backbone and a pair update."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.edge_transition_attention import edge_transition_attention, pays
from .children import has_hooks
from .edge_transition import EdgeTransition
from .invariant_point_attention import InvariantPointAttention
from .kernel_module import KernelModule
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
        num_blocks: Blocks, in place of the section's.
        checkpointing: Whether training computes the residue layers again in the backward pass.
        backbone_update: Whether the blocks move the frames. Without, they only enrich the two representations.
        final_edge_update: Whether the last block updates the pair representation, too: for whoever reads it afterwards.
    """

    def __init__(
        self,
        ipa: Any,
        c_z: int,
        transformer_dropout: float,
        *,
        num_blocks: int | None = None,
        checkpointing: bool = False,
        backbone_update: bool = True,
        final_edge_update: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.backbone_update, self.final_edge_update = backbone_update, final_edge_update
        self.num_blocks: int = ipa.num_blocks if num_blocks is None else num_blocks
        c = ipa.c_s
        for b in range(self.num_blocks):
            self[f"ipa_{b}"] = InvariantPointAttention(ipa)
            self[f"ipa_ln_{b}"] = nn.LayerNorm(c)
            self[f"seq_tfmr_{b}"] = SequenceTransformer(
                c, ipa.seq_tfmr_num_heads, ipa.seq_tfmr_num_layers, transformer_dropout
            )
            self[f"post_tfmr_{b}"] = Linear(c, c, init="final")
            self[f"node_transition_{b}"] = StructureModuleTransition(c)
            if backbone_update:
                self[f"bb_update_{b}"] = BackboneUpdate(c)
            if b < self.num_blocks - 1 or final_edge_update:  # else the last block's pairs would have no reader
                self[f"edge_transition_{b}"] = EdgeTransition(node_embed_size=c, edge_embed_in=c_z, edge_embed_out=c_z)

    def forward(
        self,
        nodes: Float[Tensor, "b n c_s"],
        z: Float[Tensor, "b n n c_z"],
        frames: Rigid,
        mask: Bool[Tensor, "b n"],
        moves: Float[Tensor, "b n"],
        *,
        pair_mask: Bool[Tensor, "b n n"] | None = None,
        consume_z: bool = False,
        keep_z: bool = False,
    ) -> tuple[Float[Tensor, "b n c_s"], Rigid, Float[Tensor, "b n n c_z"] | None]:
        """Run the blocks.

        Args:
            nodes: Single representation, zero for residues that do not take part.
            z: Pair representation, likewise.
            frames: Frames in nanometres.
            mask: True for residues that take part.
            moves: 1 for residues whose frames are updated.
            pair_mask: True for pairs that take part, if not all pairs of residues that do: each update of the pair
                representation leaves zeros for the others. Attention does not see it.
            consume_z: Whether z may be overwritten where no backward pass follows: it saves one pair representation.
            keep_z: Whether the pair representation is wanted afterwards.

        Returns:
            The single representation, the frames in nanometres, and the pair representation if it is wanted.
        """
        there = mask[..., None].to(nodes.dtype)
        attended = self["ipa_0"](nodes, z, frames, mask)
        for b in range(self.num_blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                nodes = checkpoint(self._update_nodes, b, nodes, attended, mask, there, use_reentrant=False)
            else:
                nodes = self._update_nodes(b, nodes, attended, mask, there)
            if self.backbone_update:
                frames = frames.compose_update(self[f"bb_update_{b}"](nodes), moves)
            if b < self.num_blocks - 1:
                kept = keep_z or self.final_edge_update or b < self.num_blocks - 2
                overwrite_z = consume_z or b > 0  # from the second block on, the trunk made z itself
                if pair_mask is None:
                    z, attended = self._pair_pass(b, nodes, z, frames, mask, keep_z=kept, overwrite_z=overwrite_z)
                else:
                    z = _masked(self[f"edge_transition_{b}"](nodes, z, mask), pair_mask)
                    attended = self[f"ipa_{b + 1}"](nodes, z, frames, mask)
        if self.final_edge_update:
            z = _masked(self[f"edge_transition_{self.num_blocks - 1}"](nodes, z, mask), pair_mask)
        return nodes, frames, z if keep_z else None

    def _pair_pass(
        self,
        b: int,
        nodes: Tensor,
        z: Tensor,
        frames: Rigid,
        mask: Bool[Tensor, "b n"],
        *,
        keep_z: bool,
        overwrite_z: bool,
    ) -> tuple[Tensor, Float[Tensor, "b n c_s"]]:
        """Block b's edge transition and the next block's IPA. Both see the same residues, so one pass may do both."""
        transition: Any = self[f"edge_transition_{b}"]
        attention: Any = self[f"ipa_{b + 1}"]
        together = (
            # One pass would go by without calling the layers, nor what was put around them or inside.
            _is_untouched(transition, EdgeTransition)
            and _is_untouched(attention, InvariantPointAttention)
            and transition.kernel_config == attention.kernel_config
            and not (self.training and attention.dropout_prob > 0)
        )
        if together:
            grad = torch.is_grad_enabled() and (z.requires_grad or transition.final_layer.weight.requires_grad)
            dims = {**transition.kernel_uses()[0].dims, **attention.kernel_uses()[0].dims}
            together = pays(z, dims=dims, grad=grad, config=attention.kernel_config)
        if not together:
            z = transition(nodes, z, mask)
            return z, attention(nodes, z, frames, mask)
        q, k, v, q_points, k_points, v_points = attention.project(nodes, frames)
        out = edge_transition_attention(
            transition.initial_embed(nodes),
            z,
            transition.weights(),
            q,
            k,
            v,
            q_points,
            k_points,
            v_points,
            F.softplus(attention.head_weights),
            attention.linear_b.weight,
            mask,
            eps=transition.layer_norm.eps,
            keep_z=keep_z,
            overwrite_z=overwrite_z,
            config=attention.kernel_config,
        )
        return z if out.z is None else out.z, attention.combine(out.values, out.points, out.pair, frames)

    def _update_nodes(
        self, b: int, nodes: Tensor, attended: Tensor, mask: Bool[Tensor, "b n"], there: Tensor
    ) -> Float[Tensor, "b n c_s"]:
        """What a block does to the single representation once IPA has attended."""
        nodes = self[f"ipa_ln_{b}"](nodes + attended * there)
        nodes = nodes + self[f"post_tfmr_{b}"](self[f"seq_tfmr_{b}"](nodes, mask))
        nodes = self[f"node_transition_{b}"](nodes)
        return nodes * there


def _masked(z: Tensor, pair_mask: Tensor | None) -> Tensor:
    return z if pair_mask is None else z * pair_mask[..., None].to(z.dtype)


def _is_untouched(layer: Any, kind: type[KernelModule]) -> bool:
    """Whether a layer is of this very class, without hooks, and its children's weights may be read."""
    return type(layer) is kind and "forward" not in layer.__dict__ and not has_hooks(layer) and layer.may_read()
