"""The k nearest residues of each, without ever holding the distances of all pairs."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .blocking import slices

#: Elements that the distances of one block of rows, and their three differences, may have.
_BLOCK = 1 << 21
#: Added to the distance to oneself, so that it comes last.
_ONESELF = 1e6


def nearest_neighbours(
    positions: Float[Tensor, "b n 3"], k: int, mask: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b n k"], Int[Tensor, "b n k"]]:
    """Distances to the k nearest residues and their indices, nearest first; oneself comes last, 1e6 away.

    Distances are computed for one block of rows at a time, so that memory is linear in the length. Equal distances
    come in the order of `torch.topk`, which nobody promises: where all residues stand in one place, as before a first
    prediction, that order is all that there is.

    Args:
        positions: Coordinates. They get no gradient: which residues are near changes in jumps.
        k: Neighbours; at most n.
        mask: True for residues that may be neighbours. Where fewer than k may, the distances after them are infinite.
            Equal distances then come in the order of the residues: which k those are does not depend on padding.
    """
    b, n, _ = positions.shape
    if mask is None:
        indices = neighbour_indices(positions.detach(), k)
    else:
        indices = valid_neighbour_indices(positions.detach(), mask, k)
    near = positions.detach().gather(1, indices.flatten(1)[..., None].expand(-1, -1, 3)).view(b, n, k, 3)
    distances = _distances(positions.detach()[:, :, None], near)
    rows = torch.arange(n, device=positions.device)
    distances = torch.where(indices == rows[:, None], distances + _ONESELF, distances)
    if mask is not None:
        valid = mask.gather(1, indices.flatten(1)).view(b, n, k)
        distances = distances.masked_fill(~valid, float("inf"))
    return distances, indices


# One operator, because the number of blocks depends on the length: traced, each length would be a graph of its own.
@torch.library.custom_op("foldkernels::neighbour_indices", mutates_args=())
def neighbour_indices(positions: Tensor, k: int) -> Tensor:
    """The indices alone [b, n, k]."""
    b, n, _ = positions.shape
    found = torch.empty(b, n, k, dtype=torch.int64, device=positions.device)
    for rows in slices(n, max(1, _BLOCK // max(1, 4 * b * n))):
        distances = _distances(positions[:, rows, None], positions[:, None])
        distances.diagonal(rows.start, 1, 2).add_(_ONESELF)
        found[:, rows] = distances.topk(k, dim=-1, largest=False).indices
    return found


@neighbour_indices.register_fake
def _(positions: Tensor, k: int) -> Tensor:
    b, n, _ = positions.shape
    return positions.new_empty(b, n, k, dtype=torch.int64)


@torch.library.custom_op("foldkernels::valid_neighbour_indices", mutates_args=())
def valid_neighbour_indices(positions: Tensor, mask: Tensor, k: int) -> Tensor:
    """The indices alone [b, n, k], of residues in the mask first, then of oneself, then of others."""
    b, n, _ = positions.shape
    found = torch.empty(b, n, k, dtype=torch.int64, device=positions.device)
    for rows in slices(n, max(1, _BLOCK // max(1, 4 * b * n))):
        distances = _distances(positions[:, rows, None], positions[:, None])
        distances.diagonal(rows.start, 1, 2).add_(_ONESELF)
        distances.masked_fill_(~mask[:, None], float("inf"))
        found[:, rows] = distances.sort(dim=-1, stable=True).indices[..., :k]
    return found


@valid_neighbour_indices.register_fake
def _(positions: Tensor, mask: Tensor, k: int) -> Tensor:
    b, n, _ = positions.shape
    return positions.new_empty(b, n, k, dtype=torch.int64)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # Differences, not an inner product: that would lose near neighbours far from the origin to cancellation.
    return torch.linalg.vector_norm(one - other, dim=-1)
