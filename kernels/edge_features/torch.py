"""Edge features in PyTorch's own operators: exact, the first layer taken apart, streamed over blocks of query rows."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..common.determinism import reasons_against_unordered_sums
from ..dtypes import widest
from ..registry import register
from ..registry.types import KernelFunction, Reason, Request
from ._rows import split
from ._streamed import edge_features_streamed


def run(
    nodes: Float[Tensor, "b n f"],
    positions: Float[Tensor, "b n 3"],
    positions_sc: Float[Tensor, "b n 3"],
    chain: Int[Tensor, "b n"] | None,
    diffuse: Float[Tensor, "b n"] | None,
    relpos_weight: Float[Tensor, "f f"],
    relpos_bias: Float[Tensor, " f"],
    weights: tuple[Float[Tensor, "cz features"], Float[Tensor, "cz cz"], Float[Tensor, "cz cz"]],
    biases: tuple[Float[Tensor, " cz"], Float[Tensor, " cz"], Float[Tensor, " cz"]],
    norm_weight: Float[Tensor, " cz"],
    norm_bias: Float[Tensor, " cz"],
    mask: Bool[Tensor, "b n"] | None,
    num_bins: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Float[Tensor, "b n n cz"]:
    """Take the first layer apart, then stream."""
    # The residues' shares and the tables cost next to nothing: they are never rounded to 16 bits.
    dtype = widest(nodes, weights[0])
    parts = split(
        nodes.to(dtype),
        diffuse,
        chain is not None,
        num_bins,
        relpos_weight.to(dtype),
        relpos_bias.to(dtype),
        (weights[0].to(dtype), weights[1].to(dtype), weights[2].to(dtype)),
        (biases[0].to(dtype), biases[1].to(dtype), biases[2].to(dtype)),
        norm_weight.to(dtype),
        norm_bias.to(dtype),
    )
    return edge_features_streamed(list(parts), positions, positions_sc, chain, mask, num_bins, eps, out_dtype)


def supports(request: Request) -> list[Reason]:
    """Refuse deterministic training on a GPU."""
    return reasons_against_unordered_sums(request, "index_add, which sums the gradients of the distogram tables,")


def load() -> KernelFunction:
    return run


register(operation="edge_features", name="torch", supports=supports, load=load)
