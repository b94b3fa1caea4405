"""The edge transition on factors of the pair representation."""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .edge_transition import TransitionLayers
from .linear import Linear


class EdgeFactorTransition(TransitionLayers):
    """FlashIPA's 1-d edge transition (Liu et al. 2025, arXiv:2505.11580): each factor from itself and its residue.

    It is not Multiflow's edge transition of the product of the factors: that reads both residues of a pair.

    Args:
        node_embed_size: Width of the single representation.
        edge_embed_in: Width of a factor.
        edge_embed_out: Its width afterwards.
        rank: Factors; 0 for a model without a pair representation, which keeps these weights and never reads them.
        num_layers: Layers of the perceptron.
        node_dilation: The single representation is projected to node_embed_size // node_dilation.
    """

    def __init__(
        self,
        *,
        node_embed_size: int,
        edge_embed_in: int,
        edge_embed_out: int,
        rank: int,
        num_layers: int = 2,
        node_dilation: int = 2,
    ) -> None:
        super().__init__(
            node_embed_size=node_embed_size,
            edge_embed_in=edge_embed_in,
            edge_embed_out=edge_embed_out,
            num_layers=num_layers,
            node_dilation=node_dilation,
        )
        self.rank = rank
        self.edge_bias_linear = edge_bias_layer(self, rank)

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        z_factor_1: Float[Tensor, "b n rank c_z"],
        z_factor_2: Float[Tensor, "b n rank c_z"],
    ) -> tuple[Float[Tensor, "b n rank c_out"], Float[Tensor, "b n rank c_out"]]:
        """Update both factors.

        Args:
            node_embed: Single representation.
            z_factor_1: Factors of the first residue of a pair.
            z_factor_2: Factors of the second.
        """
        return update_factors(self, self.edge_bias_linear, self.rank, node_embed, z_factor_1, z_factor_2)


def edge_bias_layer(layer: TransitionLayers, rank: int) -> Linear:
    """The layer that gives each factor, on each side, its residue's share."""
    share = layer.sizes["cn"]
    return Linear(share, 4 * rank * share, init="final")


def update_factors(
    layer: TransitionLayers,
    edge_bias_linear: nn.Linear,
    rank: int,
    node_embed: Float[Tensor, "b n c_s"],
    z_factor_1: Float[Tensor, "b n rank c_z"],
    z_factor_2: Float[Tensor, "b n rank c_z"],
) -> tuple[Float[Tensor, "b n rank c_out"], Float[Tensor, "b n rank c_out"]]:
    """What `EdgeFactorTransition` computes, with any layer that has its parameters."""
    wanted = (*node_embed.shape[:2], rank, layer.sizes["cz"])
    for name, factor in (("z_factor_1", z_factor_1), ("z_factor_2", z_factor_2)):
        if tuple(factor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}; with node_embed {tuple(node_embed.shape)} and rank {rank} "
                f"it must be {wanted}"
            )
    shares = edge_bias_linear(layer.initial_embed(node_embed)).unflatten(-1, (2, rank, -1)).movedim(2, 1)
    factors = torch.stack([z_factor_1, z_factor_2], dim=1)
    # The division is FlashIPA's own, and not in the 2-d transition.
    features = torch.cat([factors, shares], dim=-1) / sqrt(2)
    first, second = layer.layer_norm(layer.final_layer(layer.trunk(features) + features)).unbind(1)
    return first, second
