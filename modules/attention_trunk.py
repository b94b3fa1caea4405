"""One trunk for every type of block: a word chooses it."""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..configs.options import BlocksConfig, SequenceBlock, TrunkConfig
from .attention_pair_bias import AttentionPairBias
from .double_attention import DoubleAttentionPairTrunk
from .ipa_trunk import IPATrunk, mask_pairs
from .linear import Linear
from .masks import boolean
from .pairformer import PairformerModule, PairformerNoSeqModule
from .rigid import HasFrames, Rigid


class AttentionPairBiasTrunk(nn.Module):
    """A stack of attention with pair bias on the residues; pairs are read only.

    Args:
        node_dim: Width of the single representation.
        edge_dim: Width of the pair representation.
        num_layers: Layers.
        num_heads: Heads.
        residual: Whether each layer is normalised before and added to its input (Abramson et al. 2024, Supplementary
            Algorithm 24). Without, each layer's output takes its input's place, as in cogeneration's stack.
        final_layer_norm: Whether a linear layer and a LayerNorm follow.
        checkpointing: Whether training computes the layers again in the backward pass.

    Raises:
        ValueError: The heads do not share node_dim.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        residual: bool = True,
        final_layer_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.residual, self.final_layer_norm, self.checkpointing = residual, final_layer_norm, checkpointing
        self.layers = nn.ModuleList(AttentionPairBias(node_dim, edge_dim, num_heads) for _ in range(num_layers))
        if residual:
            self.norms = nn.ModuleList(nn.LayerNorm(node_dim) for _ in range(num_layers))
        if final_layer_norm:
            self.final_layer = Linear(node_dim, node_dim, init="final")
            self.layer_norm = nn.LayerNorm(node_dim)

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"],
        node_mask: Shaped[Tensor, "b n"],
    ) -> Float[Tensor, "b n c_s"]:
        """Update the residues.

        Args:
            node_embed: Single representation.
            edge_embed: Pair representation.
            node_mask: 1 (or True) for residues that take part.
        """
        mask = boolean(node_mask)
        for i, layer in enumerate(self.layers):
            given = self.norms[i](node_embed) if self.residual else node_embed
            if self.checkpointing and self.training and torch.is_grad_enabled():
                update = checkpoint(layer, given, edge_embed, mask, given, use_reentrant=False)
            else:
                update = layer(given, edge_embed, mask, given)
            node_embed = node_embed + update if self.residual else update
        if self.final_layer_norm:
            node_embed = self.layer_norm(self.final_layer(node_embed))
        return node_embed


class AttentionTrunk(nn.Module):
    """A trunk of one type of block, and how it is merged with the initial embeddings.

    What a block does not touch passes through. Parameters are Boltz-2's and Multiflow's below `trunk.`; cogeneration's
    names for them are read, too.

    Args:
        block: ipa | pairformer | pairformer_no_seq | double_attention_pair | attention_pair_bias | none.
        node_dim: Width of the single representation.
        edge_dim: Width of the pair representation.
        config: Number of layers, initialisation and merging.
        blocks: The settings of each type of block. IPA's must be complete: a model fills in its own.
        pairs_wanted: Whether anything reads the pair representation afterwards. Without, layers that nothing would
            read are left out: a parameter without a gradient makes distributed training wait.
        checkpointing: Whether training computes layers again in the backward pass.

    Raises:
        ValueError: No such block; or sizes that do not go together, naming the layer.
    """

    def __init__(
        self,
        block: SequenceBlock,
        node_dim: int,
        edge_dim: int,
        config: TrunkConfig | None = None,
        blocks: BlocksConfig | None = None,
        *,
        pairs_wanted: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.block, self.config = block, config or TrunkConfig()
        self.node_dim, self.edge_dim = node_dim, edge_dim
        for name, dim in (("node", node_dim), ("edge", edge_dim)):
            for place in ("pre", "post"):
                if getattr(self.config, f"{place}_{name}_layer_norm"):
                    self.add_module(f"{place}_{name}_ln", nn.LayerNorm(dim))
        self.trunk: Any = self._build(blocks or BlocksConfig(), pairs_wanted, checkpointing)
        self.gated = False
        if self.config.init == "zero":
            self._start_as_nothing(pairs_wanted)
        self.register_load_state_dict_pre_hook(_boltz_names)

    def _build(self, blocks: BlocksConfig, pairs_wanted: bool, checkpointing: bool) -> nn.Module | None:
        layers = self.config.num_layers
        if self.block == "none":
            return None
        if self.block == "ipa":
            ipa = SimpleNamespace(c_s=self.node_dim, c_z=self.edge_dim, **blocks.ipa.model_dump())
            missing = [name for name, value in vars(ipa).items() if value is None]
            if missing:
                raise ValueError(
                    f"AttentionTrunk: block 'ipa' needs {', '.join(missing)}: give them in blocks.ipa (a model takes "
                    "those of its own trunk)"
                )
            return IPATrunk(ipa, layers, final_edge_update=pairs_wanted, checkpointing=checkpointing)
        if self.block == "attention_pair_bias":
            bias = blocks.attention_pair_bias
            return AttentionPairBiasTrunk(
                self.node_dim,
                self.edge_dim,
                layers,
                bias.num_heads,
                residual=bias.residual,
                checkpointing=checkpointing,
            )
        if self.block == "double_attention_pair":
            double = blocks.double_attention_pair.model_dump()
            return DoubleAttentionPairTrunk(self.edge_dim, layers, checkpointing=checkpointing, **double)
        pairformer = blocks.pairformer.model_dump()
        heads = pairformer.pop("num_heads")
        if self.block == "pairformer":
            return PairformerModule(
                self.node_dim,
                self.edge_dim,
                layers,
                num_heads=heads,
                v2=True,
                activation_checkpointing=checkpointing,
                **pairformer,
            )
        if self.block == "pairformer_no_seq":
            return PairformerNoSeqModule(self.edge_dim, layers, activation_checkpointing=checkpointing, **pairformer)
        raise ValueError(f"AttentionTrunk: no block {self.block!r}; there are {', '.join(_BLOCKS)}")

    def _start_as_nothing(self, pairs_wanted: bool) -> None:
        """Make the trunk the identity, and leave every weight a way to move."""
        if self.block == "double_attention_pair":
            self.trunk.zero_output()
        elif self.block == "ipa":
            # Its blocks end in LayerNorms, so no weights make them the identity: a gate between old and new does.
            self.gated = True
            self.node_gate = nn.Parameter(torch.zeros(self.node_dim))
            if pairs_wanted:
                self.edge_gate = nn.Parameter(torch.zeros(self.edge_dim))
        elif self.block == "attention_pair_bias" and not self.trunk.residual:
            raise ValueError(
                "AttentionTrunk: init 'zero' needs block 'attention_pair_bias' with residual: true; its bare stack "
                "starts by erasing the residues"
            )
        elif self.block == "pairformer" and self.trunk.post_layer_norm:
            raise ValueError("AttentionTrunk: init 'zero' needs blocks.pairformer.post_layer_norm: false")
        # All others add an update whose last layer starts as zero.

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
    ) -> tuple[Float[Tensor, "b n c_s"], Float[Tensor, "b n n c_z"]]:
        """Enrich both representations.

        Args:
            node_embed: Single representation.
            edge_embed: Pair representation.
            node_mask: 1 (or True) for residues that take part. A pair takes part where both of its residues do.
            init_node_embed: What `pre_add_init_embed` and `post_add_init_embed` merge with.
            init_edge_embed: Likewise.
            rigid: Frames in nanometres, for block `ipa`.
            r3_t: Time, from 0 to 1, for block `double_attention_pair` with FiLM.
            overwrite_z: Whether `edge_embed` may be overwritten where no backward pass follows.

        Returns:
            Both, in the types they came in. Rows and pairs that do not take part hold nothing of meaning.

        Raises:
            ValueError: Frames, a time or an initial embedding is missing, or the shapes do not go together.
        """
        self._check(init_node_embed, init_edge_embed, rigid)
        mask = boolean(node_mask)
        nodes, z = node_embed, edge_embed
        if self.trunk is not None and self.block != "ipa":
            # Layers are held to their weights' type; IPA's kernels read 16 bits as well.
            z = z.to(next(self.trunk.parameters()).dtype)
        overwrite_z = overwrite_z or z is not edge_embed
        nodes, z, overwrite_z = self._merge("pre", nodes, z, mask, init_node_embed, init_edge_embed, overwrite_z)
        nodes, z = self._run(nodes, z, mask, rigid, r3_t, overwrite_z)
        nodes, z, _ = self._merge("post", nodes, z, mask, init_node_embed, init_edge_embed, overwrite_z)
        return nodes.to(node_embed.dtype), z.to(edge_embed.dtype)

    def _run(
        self,
        nodes: Tensor,
        z: Tensor,
        mask: Bool[Tensor, "b n"],
        rigid: HasFrames | Rigid | None,
        r3_t: Tensor | None,
        overwrite_z: bool,
    ) -> tuple[Tensor, Tensor]:
        if self.trunk is None:
            return nodes, z
        if self.block == "ipa":
            new_nodes, new_z, _, _ = self.trunk(nodes, z, mask, rigid, overwrite_z=overwrite_z and not self.gated)
            if not self.gated:
                return new_nodes, new_z
            nodes = nodes + self.node_gate * (new_nodes - nodes)
            return nodes, z + self.edge_gate * (new_z - z) if hasattr(self, "edge_gate") else z
        if self.block == "attention_pair_bias":
            return self.trunk(nodes, z, mask), z
        pair_mask = mask[:, :, None] & mask[:, None]
        if self.block == "pairformer":
            nodes, z = self.trunk(nodes, z, mask, pair_mask, overwrite_z=overwrite_z)
            return nodes, z
        if self.block == "pairformer_no_seq":
            return nodes, self.trunk(z, pair_mask, overwrite_z=overwrite_z)
        return nodes, self.trunk(z, pair_mask, r3_t, overwrite_z=overwrite_z)

    def _merge(
        self,
        place: str,
        nodes: Tensor,
        z: Tensor,
        mask: Bool[Tensor, "b n"],
        init_nodes: Tensor | None,
        init_z: Tensor | None,
        overwrite_z: bool,
    ) -> tuple[Tensor, Tensor, bool]:
        """The mean with the initial embeddings, then the LayerNorms; and whether z is ours now."""
        if getattr(self.config, f"{place}_add_init_embed"):
            assert init_nodes is not None and init_z is not None
            nodes = 0.5 * (nodes + init_nodes) * mask[..., None].to(nodes.dtype)
            z, overwrite_z = mask_pairs(0.5 * (z + init_z), mask, overwrite=True), True
        if getattr(self.config, f"{place}_node_layer_norm"):
            nodes = getattr(self, f"{place}_node_ln")(nodes)
        if getattr(self.config, f"{place}_edge_layer_norm"):
            z, overwrite_z = getattr(self, f"{place}_edge_ln")(z), True
        return nodes, z, overwrite_z

    def _check(self, init_nodes: Tensor | None, init_z: Tensor | None, rigid: HasFrames | Rigid | None) -> None:
        if self.config.merges_initial and (init_nodes is None or init_z is None):
            raise ValueError(
                "AttentionTrunk: merging with the initial embeddings needs init_node_embed and init_edge_embed; pass "
                "both, or turn pre_add_init_embed and post_add_init_embed off"
            )
        if self.block == "ipa" and rigid is None:
            others = [block for block in _BLOCKS if block not in ("ipa", "none")]
            raise ValueError(
                "AttentionTrunk: block 'ipa' needs frames, and none were given; pass rigid= (in nanometres), or choose "
                f"a block that needs none: {', '.join(others)}"
            )


_BLOCKS = ("ipa", "pairformer", "pairformer_no_seq", "double_attention_pair", "attention_pair_bias", "none")

# What cogeneration calls the parts of a Pairformer layer.
_COGENERATION = {
    ".node_transition.": ".transition_s.",
    ".edge_transition.": ".transition_z.",
    ".node_post_norm.": ".s_post_norm.",
}


def _boltz_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}trunk.layers.")]:
        for theirs, ours in _COGENERATION.items():
            if theirs in name:
                state_dict[name.replace(theirs, ours)] = state_dict.pop(name)
