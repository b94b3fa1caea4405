"""What stands between the folding trunk and the logits of residue types, where a perceptron alone is not enough."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..configs.options import PAIRS_ALONE, BlocksConfig, SequenceBlock, SequenceNetConfig
from .attention_trunk import AttentionPairBiasTrunk, AttentionTrunk
from .rigid import HasFrames, Rigid


class SequenceIPANet(nn.Module):
    """Blocks of any type that give the residues' representation from which the types are predicted.

    Named after the net of IPA blocks that it began as; frames stay where they are. Logits are the caller's: Multiflow's
    perceptron reads what this gives. Blocks that change pairs alone would change no logit, so they are followed by one
    layer of attention with pair bias, through which residues read the pairs.

    Args:
        block: ipa | pairformer | pairformer_no_seq | double_attention_pair | attention_pair_bias.
        node_dim: Width of the single representation.
        edge_dim: Width of the pair representation.
        config: Number of layers, initialisation and merging.
        blocks: The settings of each type of block.
        checkpointing: Whether training computes layers again in the backward pass.

    Raises:
        ValueError: See `AttentionTrunk`.
    """

    def __init__(
        self,
        block: SequenceBlock,
        node_dim: int,
        edge_dim: int,
        config: SequenceNetConfig | None = None,
        blocks: BlocksConfig | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        config, blocks = config or SequenceNetConfig(), blocks or BlocksConfig()
        self.reads_pairs = block in PAIRS_ALONE
        self.blocks = AttentionTrunk(
            block, node_dim, edge_dim, config, blocks, pairs_wanted=self.reads_pairs, checkpointing=checkpointing
        )
        if self.reads_pairs:
            heads = blocks.attention_pair_bias.num_heads
            self.read_pairs = AttentionPairBiasTrunk(node_dim, edge_dim, 1, heads, residual=True)

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"],
        node_mask: Shaped[Tensor, "b n"],
        *,
        init_node_embed: Float[Tensor, "b n c_s"] | None = None,
        init_edge_embed: Float[Tensor, "b n n c_z"] | None = None,
        rigid: HasFrames | Rigid | None = None,
        r3_t: Shaped[Tensor, "b 1"] | Shaped[Tensor, " b"] | None = None,
        overwrite_z: bool = False,
    ) -> Float[Tensor, "b n c_s"]:
        """Give the representation that the logits are read from. Arguments as in `AttentionTrunk`."""
        nodes, z = self.blocks(
            node_embed,
            edge_embed,
            node_mask,
            init_node_embed=init_node_embed,
            init_edge_embed=init_edge_embed,
            rigid=rigid,
            r3_t=r3_t,
            overwrite_z=overwrite_z,
        )
        if self.reads_pairs:
            dtype: torch.dtype = self.read_pairs.norms[0].weight.dtype
            nodes = self.read_pairs(nodes, z.to(dtype), node_mask)
        return nodes
