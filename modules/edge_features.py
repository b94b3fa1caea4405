"""Multiflow's edge feature network as a layer."""

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from ..kernels.dtypes import floating_type, widest
from ..kernels.edge_features import edge_features
from ..kernels.edge_features.reference import pair_columns, position_waves, without_masked
from ..kernels.registry.binding import Use
from .kernel_module import KernelModule
from .masks import boolean

#: The children whose weights the operation reads.
READ = ("linear_relpos", "edge_embedder")


class EdgeFeatureNet(KernelModule):
    """The first pair representation, from residues, sequence distance and two sets of coordinates (Multiflow).

    Args:
        config: Multiflow's `edge_features` section: c_s, c_p, feat_dim, num_bins, embed_chain, embed_diffuse_mask.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_bins: int = config.num_bins
        self.embed_chain: bool = config.embed_chain
        self.embed_diffuse_mask: bool = config.embed_diffuse_mask
        self.linear_s_p = nn.Linear(config.c_s, config.feat_dim)
        self.linear_relpos = nn.Linear(config.feat_dim, config.feat_dim)
        features = 3 * config.feat_dim + 2 * config.num_bins + self.embed_chain + 2 * self.embed_diffuse_mask
        self.edge_embedder = pair_perceptron(features, config.c_p)
        self.feat_dim: int = config.feat_dim
        self.c_p: int = config.c_p
        self.reads(*READ)

    def kernel_uses(self) -> list[Use]:
        """Edge features."""
        options = [name for name, on in (("chain", self.embed_chain), ("diffuse", self.embed_diffuse_mask)) if on]
        return [pair_features_use(self, self.num_bins, *options)]

    def forward(
        self,
        s: Float[Tensor, "b n c_s"],
        t: Float[Tensor, "b n 3"],
        sc_t: Float[Tensor, "b n 3"],
        p_mask: Shaped[Tensor, "b n n"] | None,
        diffuse_mask: Float[Tensor, "b n"],
        chain_idx: Shaped[Tensor, "b n"],
        *,
        mask: Shaped[Tensor, "b n"] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "b n n c_p"]:
        """Embed every pair of residues.

        Args:
            s: Single representation.
            t: Coordinates in Angstrom.
            sc_t: Coordinates of the last prediction, in Angstrom; zeros where there is none.
            p_mask: The originals' pair mask, 1 where a pair takes part. The result is multiplied by it.
            diffuse_mask: 1 for residues that are generated.
            chain_idx: Chain indices.
            mask: In place of `p_mask`: 1 (or True) for residues that take part. Costs nothing extra.
            out_dtype: The floating type of the result.
        """
        out = embed_pairs(
            self,
            s,
            t,
            sc_t,
            self.num_bins,
            chain_idx if self.embed_chain else None,
            diffuse_mask if self.embed_diffuse_mask else None,
            None if mask is None else boolean(mask),
            out_dtype=out_dtype,
            config=self.kernel_config,
            called=not self.may_read(),
        )
        return out if p_mask is None else out * p_mask[..., None].to(out.dtype)


class PairLayers(Protocol):
    """The layers that `embed_pairs` reads, under the names of Multiflow and FlashIPA."""

    linear_s_p: nn.Linear
    linear_relpos: nn.Linear
    edge_embedder: nn.Sequential
    feat_dim: int
    c_p: int


def embed_pairs(
    layers: PairLayers,
    s: Float[Tensor, "b n c_s"],
    t: Float[Tensor, "b n 3"],
    sc_t: Float[Tensor, "b n 3"],
    num_bins: int,
    chain_idx: Shaped[Tensor, "b n"] | None = None,
    diffuse_mask: Float[Tensor, "b n"] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    config: str = "",
    called: bool = False,
) -> Float[Tensor, "b n n c_p"]:
    """What `EdgeFeatureNet` computes, with any layers that have its parameters.

    Args:
        layers: The layers.
        s: As `EdgeFeatureNet` takes it, and so are those not named here.
        t: Coordinates.
        sc_t: Coordinates of the last prediction.
        num_bins: Bins of a distogram.
        chain_idx: Chain indices, if they are read.
        diffuse_mask: Which residues are generated, if it is read.
        mask: Residues that take part.
        out_dtype: The floating type of the result.
        config: A module's kernel configuration, as its token.
        called: Whether the layers are called, in place of an operation that reads their weights.
    """
    perceptron: Any = layers.edge_embedder
    nodes = layers.linear_s_p(s)
    if called:
        relpos = layers.linear_relpos(position_waves(nodes, layers.feat_dim, widest(nodes)).to(nodes.dtype))
        columns = pair_columns(nodes, t.detach(), sc_t.detach(), chain_idx, diffuse_mask, relpos, num_bins)
        return without_masked(perceptron(columns), mask).to(out_dtype or floating_type(nodes))
    return edge_features(
        nodes,
        t,
        sc_t,
        chain_idx,
        diffuse_mask,
        layers.linear_relpos.weight,
        layers.linear_relpos.bias,
        (perceptron[0].weight, perceptron[2].weight, perceptron[4].weight),
        (perceptron[0].bias, perceptron[2].bias, perceptron[4].bias),
        perceptron[5].weight,
        perceptron[5].bias,
        mask,
        num_bins=num_bins,
        eps=perceptron[5].eps,
        out_dtype=out_dtype,
        config=config,
    )


def pair_features_use(layers: PairLayers, num_bins: int, *options: str) -> Use:
    """The operation that `embed_pairs` calls."""
    dims = {"f": layers.feat_dim, "cz": layers.c_p, "bins": num_bins}
    return Use("edge_features", dims, options)


def pair_perceptron(features: int, c_p: int) -> nn.Sequential:
    """Three layers and a LayerNorm: the last step of Multiflow's and of FlashIPA's edge features."""
    return nn.Sequential(
        nn.Linear(features, c_p), nn.ReLU(), nn.Linear(c_p, c_p), nn.ReLU(), nn.Linear(c_p, c_p), nn.LayerNorm(c_p)
    )
