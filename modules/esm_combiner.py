"""Mixes a frozen language model's features into the single and the pair representation."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..configs.options import Init
from ..kernels.dtypes import any_requires_grad, item_masks
from .children import ChildGuard, may_read
from .frozen_esm import FrozenESM, PairRows
from .ipa_trunk import mask_pairs
from .masks import boolean


def _perceptron(c_in: int, hidden: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(c_in), nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, c_out))


def _gated(old: Tensor, new: Tensor, gate: Tensor | None) -> Tensor:
    """From old to new, as far as each channel's gate is open; without a gate, new."""
    return new if gate is None else old + gate * (new - old)


class ESMCombiner(nn.Module):
    """A learned mix over the language model's layers, and its attention maps, added to what is there and normalised.

    Nodes become LayerNorm((nodes + f(mixed layers)) / 2), edges LayerNorm((edges + g(attention maps)) / 2), where f and
    g are perceptrons. The maps of all layers and heads are never held at once: rows are projected as they are made, and
    in a backward pass made again.

    With `init="zero"` what comes in is moved towards that by a gate for each channel (`node_gate`, `edge_gate`), which
    begins shut: the LayerNorms leave no other weights under which the combiner changes nothing.

    Args:
        esm: The frozen language model; its parameters are not the combiner's. Its `pairs` are asked for here.
        node_dim: Width of the single representation.
        edge_dim: Width of the pair representation.
        hidden_dim: Hidden width of the perceptrons.
        only_single: Leave the edges as they are. Attention then needs no kernel that gives maps.
        init: Whether it begins by mixing ("fresh"), or by changing nothing ("zero").

    Raises:
        ValueError: Edges are to be changed, and the language model was built without pairs.
    """

    def __init__(
        self,
        esm: FrozenESM,
        node_dim: int,
        edge_dim: int,
        hidden_dim: int = 128,
        only_single: bool = False,
        *,
        init: Init = "fresh",
    ) -> None:
        super().__init__()
        if not (only_single or esm.pairs):
            raise ValueError("the language model gives no pairs: build FrozenESM with pairs=True, or set only_single")
        self.esm = esm
        self.only_single = only_single
        self.esm_single_combine = nn.Parameter(torch.zeros(esm.num_layers + 1))
        self.seq_proj = _perceptron(esm.embed_dim, hidden_dim, node_dim)
        self.single_layer_norm = nn.LayerNorm(node_dim)
        if not only_single:
            self.pair_proj = _perceptron(esm.num_layers * esm.num_heads, hidden_dim, edge_dim)
            self.pair_layer_norm = nn.LayerNorm(edge_dim)
            self.child_guard = ChildGuard(self, only=("pair_proj", "pair_layer_norm"))
        self.node_gate = nn.Parameter(torch.zeros(node_dim)) if init == "zero" else None
        self.edge_gate = nn.Parameter(torch.zeros(edge_dim)) if init == "zero" and not only_single else None

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"],
        aatypes: Int[Tensor, "b n"],
        chain_index: Int[Tensor, "b n"],
        mask: Shaped[Tensor, "b n"],
        pad_mask: Shaped[Tensor, "b n"] | None = None,
        *,
        overwrite_z: bool = False,
    ) -> tuple[Float[Tensor, "b n c_s"], Float[Tensor, "b n n c_z"]]:
        """Give both representations with the language model mixed in; zero where a residue takes no part.

        Args:
            node_embed: The single representation.
            edge_embed: The pair representation.
            aatypes: Residue types, 0 to 19 in AlphaFold's order, 20 where the type is masked.
            chain_index: The chain of each residue.
            mask: True for residues that take part.
            pad_mask: True for residues that are not padding; see `FrozenESM`.
            overwrite_z: Whether `edge_embed` may be written over, where no gradient needs it.

        Raises:
            ValueError: A type has no token, or a protein has no residue.
        """
        mask = boolean(mask)
        features = self.esm(aatypes, chain_index, mask, pad_mask)
        weights = self.esm_single_combine.softmax(0)
        # In the language model's own floating type a sum over dozens of layers would be rounded dozens of times.
        mixed = torch.einsum("bnlc,l->bnc", features.single.to(weights.dtype), weights)
        nodes = self.single_layer_norm(0.5 * (self.seq_proj(mixed) + node_embed))
        nodes = _gated(node_embed, nodes, self.node_gate) * mask[..., None]
        if self.only_single:
            return nodes, mask_pairs(edge_embed, mask, overwrite=overwrite_z)
        assert features.pairs is not None
        # A mask is looked at on a CPU only: asking a GPU would wait for it.
        masks = item_masks(mask, mask.shape[0])
        weights_of_pairs = [*self.pair_proj.parameters(), *self.pair_layer_norm.parameters(), self.edge_gate]
        if any_requires_grad(edge_embed, *weights_of_pairs):
            items = [
                torch.cat([self._rows_again(pairs, block, edges[block], here) for block in pairs.blocks()])
                for pairs, edges, here in zip(features.pairs, edge_embed, masks, strict=True)
            ]
            return nodes, torch.stack(items)
        out = edge_embed if overwrite_z else torch.empty_like(edge_embed)
        for pairs, edges, here, written in zip(features.pairs, edge_embed, masks, out, strict=True):
            for block in pairs.blocks():
                written[block] = self._rows(pairs, block, edges[block], here)
        return nodes, out

    def _rows_again(
        self, pairs: PairRows, block: slice, edges: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "r n c_z"]:
        """Rows that keep nothing for the backward pass but what they are made of."""
        rows: Tensor = checkpoint(self._rows, pairs, block, edges, mask, use_reentrant=False, preserve_rng_state=False)
        return rows

    def _rows(
        self, pairs: PairRows, block: slice, edges: Float[Tensor, "r n c_z"], mask: Bool[Tensor, " n"] | None
    ) -> Float[Tensor, "r n c_z"]:
        """Some rows of the pair representation; nothing of it is masked where `mask` is None.

        The perceptron's LayerNorm over layers and heads is folded around its first product, so that the maps are
        multiplied as they lie in memory, channels first: taking the mean from the maps is taking it from the weights,
        and the spread is one number a pair. The mean of two sums is normalised as their sum, with four times epsilon.
        """
        rows = self._mixed_rows(pairs.rows(block).flatten(1), edges)
        rows = _gated(edges, rows, self.edge_gate)
        if mask is not None:
            rows = rows.masked_fill(~(mask[block, None] & mask)[..., None], 0.0)
        return rows.to(edges.dtype)

    def _mixed_rows(
        self, maps: Float[Tensor, "l_h pairs"], edges: Float[Tensor, "r n c_z"]
    ) -> Float[Tensor, "r n c_z"]:
        """What the perceptron makes of the maps, with the edges, normalised."""
        if not may_read(self, self.child_guard):
            dtype = next(self.pair_proj.parameters(), edges).dtype
            mean: Tensor = 0.5 * (self.pair_proj(maps.t().to(dtype)).view_as(edges) + edges)
            return self.pair_layer_norm(mean)
        norm, first, _, last = self.pair_proj
        assert isinstance(norm, nn.LayerNorm) and isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        maps = maps.to(first.weight.dtype)
        ones = maps.new_full((1, maps.shape[0]), 1.0 / maps.shape[0])
        variance = torch.mm(ones, maps.square()) - torch.mm(ones, maps).square()
        spread = torch.rsqrt(variance.clamp(min=0.0) + norm.eps).view(-1, 1)
        weight = first.weight * norm.weight
        weight = weight - weight.mean(1, keepdim=True)
        hidden = torch.addcmul(first.bias + first.weight @ norm.bias, torch.mm(maps.t(), weight.t()), spread)
        pair = last(F.gelu(hidden)).view_as(edges) + edges
        final = self.pair_layer_norm
        return F.layer_norm(pair, final.normalized_shape, final.weight, final.bias, 4.0 * final.eps)
