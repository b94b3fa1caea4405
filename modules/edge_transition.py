"""The edge transition as a layer."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.binding import Use
from ..kernels.edge_transition import edge_transition
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean

EdgeWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class EdgeTransition(KernelModule):
    """Update of the pair representation from itself and the two residues of each pair (FrameDiff, Multiflow).

    Args:
        node_embed_size: Width of the single representation.
        edge_embed_in: Width of the pair representation.
        edge_embed_out: Its width afterwards.
        num_layers: Layers of the perceptron; every published model has two, and so has the operation.
        node_dilation: The single representation is projected to node_embed_size // node_dilation.

    Raises:
        ValueError: `num_layers` is not two.
    """

    def __init__(
        self,
        *,
        node_embed_size: int,
        edge_embed_in: int,
        edge_embed_out: int,
        num_layers: int = 2,
        node_dilation: int = 2,
    ) -> None:
        super().__init__()
        if num_layers != 2:
            raise ValueError(f"an edge transition has two layers, not {num_layers}")
        share = node_embed_size // node_dilation
        hidden = 2 * share + edge_embed_in
        self.initial_embed = Linear(node_embed_size, share, init="relu")
        self.trunk = nn.Sequential(
            Linear(hidden, hidden, init="relu"), nn.ReLU(), Linear(hidden, hidden, init="relu"), nn.ReLU()
        )
        self.final_layer = Linear(hidden, edge_embed_out, init="final")
        self.layer_norm = nn.LayerNorm(edge_embed_out)

    def kernel_uses(self) -> list[Use]:
        """The edge transition."""
        return [
            Use(
                "edge_transition",
                {
                    "cn": self.initial_embed.out_features,
                    "cz": self.final_layer.in_features - 2 * self.initial_embed.out_features,
                    "cz_out": self.final_layer.out_features,
                },
            )
        ]

    def weights(self) -> EdgeWeights:
        """The operation's weights, in its order."""
        layers: tuple[Any, ...] = (self.trunk[0], self.trunk[2], self.final_layer, self.layer_norm)
        first, second, last, norm = layers
        return (
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            last.weight,
            last.bias,
            norm.weight,
            norm.bias,
        )

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        edge_embed: Float[Tensor, "b n n c_z"],
        mask: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n n c_z_out"]:
        """Update the pair representation.

        Args:
            node_embed: Single representation.
            edge_embed: Pair representation.
            mask: 1 (or True) for residues that take part; pairs with another one become zero. The originals multiply
                by it outside: leave it out, and this layer computes theirs.
        """
        return edge_transition(
            self.initial_embed(node_embed),
            edge_embed,
            *self.weights(),
            None if mask is None else boolean(mask),
            eps=self.layer_norm.eps,
            config=self.kernel_config,
        )
