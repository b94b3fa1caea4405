"""Edge features, as Multiflow writes them: the function that every other kernel must compute."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..common.sinusoidal import sinusoids
from ..dtypes import widest
from ..registry import register
from ..registry.types import ALL_TRANSFORMS, KernelFunction, serves_everything
from . import MAX_BIN_ANGSTROM, MAX_RELATIVE_POSITION, MIN_BIN_ANGSTROM


def distogram(positions: Float[Tensor, "b n 3"], num_bins: int) -> Bool[Tensor, "b n n bins"]:
    """Which bin each distance lies in; a distance of 0, or exactly on an edge, lies in none."""
    distance = torch.linalg.vector_norm(positions[:, :, None] - positions[:, None], dim=-1)[..., None]
    lower = bin_edges(num_bins, positions)
    upper = torch.cat([lower[1:], lower.new_tensor([1e8])])
    return (distance > lower) & (distance < upper)


def bin_edges(num_bins: int, like: Tensor) -> Float[Tensor, " bins"]:
    """The lower edges of the bins, in Angstrom, rounded as the checkpoints' own code rounds them."""
    return torch.linspace(MIN_BIN_ANGSTROM, MAX_BIN_ANGSTROM, num_bins, device=like.device, dtype=torch.float32).to(
        like.dtype
    )


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
    """Concatenate the features of each pair, three layers with ReLU between them, LayerNorm."""
    dtype = widest(nodes, weights[0])
    waves = position_waves(nodes, relpos_weight.shape[1], dtype)
    relpos = F.linear(waves, relpos_weight.to(dtype), relpos_bias.to(dtype))
    out = pair_columns(nodes.to(dtype), positions, positions_sc, chain, diffuse, relpos, num_bins)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = F.linear(out if layer == 0 else F.relu(out), weight.to(dtype), bias.to(dtype))
    out = F.layer_norm(out, out.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return without_masked(out, mask).to(out_dtype)


def position_waves(nodes: Float[Tensor, "b n f"], width: int, dtype: torch.dtype) -> Float[Tensor, "n n f"]:
    """Sinusoids of the sequence distance of each pair."""
    index = torch.arange(nodes.shape[1], device=nodes.device)
    return sinusoids(index[:, None] - index[None], width, MAX_RELATIVE_POSITION, dtype)


def pair_columns(
    nodes: Float[Tensor, "b n f"],
    positions: Float[Tensor, "b n 3"],
    positions_sc: Float[Tensor, "b n 3"],
    chain: Int[Tensor, "b n"] | None,
    diffuse: Float[Tensor, "b n"] | None,
    relpos: Float[Tensor, "n n f"],
    num_bins: int,
) -> Float[Tensor, "b n n features"]:
    """The features of each pair, in the order of the first layer's columns."""
    b, n, _ = nodes.shape
    dtype = nodes.dtype
    columns = [
        nodes[:, :, None].expand(-1, -1, n, -1),
        nodes[:, None].expand(-1, n, -1, -1),
        relpos[None].expand(b, -1, -1, -1),
        distogram(positions, num_bins).to(dtype),
        distogram(positions_sc, num_bins).to(dtype),
    ]
    if chain is not None:
        columns.append((chain[:, :, None] == chain[:, None])[..., None].to(dtype))
    if diffuse is not None:
        flags = diffuse.to(dtype)[..., None]
        columns += [flags[:, :, None].expand(-1, -1, n, -1), flags[:, None].expand(-1, n, -1, -1)]
    return torch.cat(columns, dim=-1)


def without_masked(out: Float[Tensor, "b n n cz"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n n cz"]:
    """Zeros for the pairs with a masked residue."""
    return out if mask is None else out.masked_fill(~(mask[:, :, None] & mask[:, None])[..., None], 0.0)


def load() -> KernelFunction:
    return run


register(operation="edge_features", name="reference", supports=serves_everything, load=load, transforms=ALL_TRANSFORMS)
