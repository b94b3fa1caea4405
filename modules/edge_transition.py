"""The edge transition as a layer."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..kernels.dtypes import cast, floating_type
from ..kernels.edge_transition import edge_transition
from ..kernels.registry.binding import Use
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean

#: The children whose weights the operation reads.
READ = ("trunk", "final_layer", "layer_norm")

EdgeWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class TransitionLayers(KernelModule):
    """The layers that edge transitions have, under the names of FrameDiff, Multiflow and FlashIPA.

    Args:
        node_embed_size: Width of the single representation.
        edge_embed_in: Width of what is updated: a pair representation, or factors of one.
        edge_embed_out: Its width afterwards.
        num_layers: Layers of the perceptron.
        node_dilation: The single representation is projected to node_embed_size // node_dilation.
    """

    def __init__(
        self, *, node_embed_size: int, edge_embed_in: int, edge_embed_out: int, num_layers: int, node_dilation: int
    ) -> None:
        super().__init__()
        share = node_embed_size // node_dilation
        hidden = 2 * share + edge_embed_in
        self.initial_embed = Linear(node_embed_size, share, init="relu")
        layers: list[nn.Module] = []
        for _ in range(num_layers):
            layers += [Linear(hidden, hidden, init="relu"), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.final_layer = Linear(hidden, edge_embed_out, init="final")
        self.layer_norm = nn.LayerNorm(edge_embed_out)
        self.sizes = {"cn": share, "cz": edge_embed_in, "cz_out": edge_embed_out}

    def kernel_uses(self) -> list[Use]:
        """None: the layers alone call no kernel."""
        return []


class EdgeTransition(TransitionLayers):
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
        check_two_layers(num_layers)
        super().__init__(
            node_embed_size=node_embed_size,
            edge_embed_in=edge_embed_in,
            edge_embed_out=edge_embed_out,
            num_layers=num_layers,
            node_dilation=node_dilation,
        )
        self.reads(*READ)

    def kernel_uses(self) -> list[Use]:
        """The edge transition."""
        return [Use("edge_transition", self.sizes)]

    def weights(self) -> EdgeWeights:
        """The operation's weights, in its order."""
        return transition_weights(self)

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
        return update_pairs(self, node_embed, edge_embed, mask, called=not self.may_read())


def update_pairs(
    layer: Any,
    node_embed: Float[Tensor, "b n c_s"],
    edge_embed: Float[Tensor, "b n n c_z"],
    mask: Float[Tensor, "b n"] | None = None,
    *,
    called: bool = False,
) -> Float[Tensor, "b n n c_z_out"]:
    """What `EdgeTransition` computes, with any layer that has its parameters, of whatever class.

    Args:
        layer: The layer.
        node_embed: As `EdgeTransition` takes it, and so are the next two.
        edge_embed: Pair representation.
        mask: Residues that take part.
        called: Whether the children are called, in place of an operation that reads their weights.
    """
    nodes, present = layer.initial_embed(node_embed), None if mask is None else boolean(mask)
    if called:
        return _called(layer, nodes, edge_embed, present)
    return edge_transition(
        nodes,
        edge_embed,
        *transition_weights(layer),
        present,
        eps=layer.layer_norm.eps,
        config=layer.kernel_config,
    )


def _called(
    layer: Any, nodes: Float[Tensor, "b n cn"], z: Float[Tensor, "b n n c_z"], mask: Bool[Tensor, "b n"] | None
) -> Float[Tensor, "b n n c_z_out"]:
    """The operation's definition, of layers in place of weights."""
    b, n, share = nodes.shape
    sides = (nodes[:, :, None].expand(b, n, n, share), nodes[:, None].expand(b, n, n, share))
    features = torch.cat([z, *sides], dim=-1)
    out: Tensor = layer.layer_norm(layer.final_layer(layer.trunk(features) + features))
    if mask is not None:
        out = out.masked_fill(~(mask[:, :, None] & mask[:, None])[..., None], 0.0)
    return cast(out, floating_type(z))


def transition_weights(layer: Any) -> EdgeWeights:
    """The operation's weights, in its order."""
    first, second, last, norm = layer.trunk[0], layer.trunk[2], layer.final_layer, layer.layer_norm
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


def pair_transition_use(layer: Any) -> Use:
    """The operation that `update_pairs` calls."""
    nodes = layer.initial_embed.out_features
    return Use(
        "edge_transition",
        {"cn": nodes, "cz": layer.final_layer.in_features - 2 * nodes, "cz_out": layer.final_layer.out_features},
    )


def check_two_layers(num_layers: int) -> None:
    """Raise ValueError where the operation has another number of layers."""
    if num_layers != 2:
        raise ValueError(f"an edge transition has two layers, not {num_layers}")
