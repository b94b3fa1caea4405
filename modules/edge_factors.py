"""FlashIPA's pair representation: two factors of each residue, from its nearest neighbours or from a dense one."""

from math import sqrt
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.common.nearest_neighbors import nearest_neighbours
from ..kernels.common.sinusoidal import sinusoids
from ..kernels.edge_features import MAX_RELATIVE_POSITION
from ..kernels.edge_features.reference import bin_edges
from .children import ChildGuard, may_read
from .edge_features import pair_perceptron
from .masks import boolean


class EdgeFactors(nn.Module):
    """The factors of the first pair representation, without any pair: FlashIPA's mode `flash_1d_bias`.

    Liu et al. 2025 (arXiv:2505.11580): what Multiflow's edge features say of a pair is said here of one residue twice,
    once for each side: its embedding, its position, and its k nearest neighbours, as the bins of their distances and
    their positions. Memory is linear in the length.

    Args:
        c_s: Width of the single representation.
        c_p: Width of a factor.
        feat_dim: Width of the embeddings of residues and positions.
        num_bins: Bins of a distogram.
        rank: Factors.
        k: Nearest neighbours.
    """

    def __init__(self, *, c_s: int, c_p: int, feat_dim: int, num_bins: int, rank: int, k: int) -> None:
        super().__init__()
        neighbours = k * (num_bins + feat_dim)
        self.feat_dim, self.num_bins, self.z_factor_rank, self.k = feat_dim, num_bins, rank, k
        self.linear_s_p = nn.Linear(c_s, 2 * rank * feat_dim)
        self.linear_relpos = nn.Linear(feat_dim, 4 * rank * feat_dim)
        self.linear_t_distogram = nn.Linear(neighbours, 2 * rank * num_bins)
        self.linear_sc_distogram = nn.Linear(neighbours, 2 * rank * num_bins)
        self.edge_embedder = pair_perceptron(3 * feat_dim + 2 * num_bins, c_p)

    def forward(
        self,
        s: Float[Tensor, "b n c_s"],
        t: Float[Tensor, "b n 3"],
        sc_t: Float[Tensor, "b n 3"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n rank c_p"], Float[Tensor, "b n rank c_p"]]:
        """The factors of the first (query's) and of the second (key's) residue of a pair.

        Without a mask, as in the original, residues that do not take part are neighbours like any other, so padding
        changes the result. Neighbours change in jumps: distances pass no gradient.

        Args:
            s: Single representation.
            t: Coordinates in Angstrom.
            sc_t: Coordinates of the last prediction, in Angstrom; zeros where there is none.
            mask: True for residues that may be neighbours. Padding behind them then changes nothing, and where there
                are fewer than k, the features of the missing ones are zero.

        Raises:
            ValueError: There are fewer than k residues, and no mask is given.
        """
        return embed_factors(self, s, t, sc_t, mask)


class FactorLayers(Protocol):
    """The layers that `embed_factors` reads, and their sizes, under FlashIPA's names."""

    linear_s_p: nn.Linear
    linear_relpos: nn.Linear
    linear_t_distogram: nn.Linear
    linear_sc_distogram: nn.Linear
    edge_embedder: nn.Sequential
    feat_dim: int
    num_bins: int
    z_factor_rank: int
    k: int


def embed_factors(
    layers: FactorLayers,
    s: Float[Tensor, "b n c_s"],
    t: Float[Tensor, "b n 3"],
    sc_t: Float[Tensor, "b n 3"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b n rank c_p"], Float[Tensor, "b n rank c_p"]]:
    """What `EdgeFactors` computes, with any layers that have its parameters."""
    n, feat_dim, num_bins = s.shape[1], layers.feat_dim, layers.num_bins
    rank, k = layers.z_factor_rank, layers.k
    if n < k and mask is None:
        raise ValueError(f"{n} residues are fewer than the {k} nearest neighbours (k) that the edge embedder reads")

    def sides(x: Float[Tensor, "b n sides_rank_d"]) -> Float[Tensor, "b 2 n rank d"]:
        return x.unflatten(-1, (2, rank, -1)).movedim(2, 1)

    def neighbours(positions: Float[Tensor, "b n 3"]) -> Float[Tensor, "b n k_features"]:
        distances, indices = nearest_neighbours(positions, min(k, n), mask)
        bins = distance_bins(distances, bin_edges(num_bins, distances)).to(s.dtype)
        waves = sinusoids(indices, feat_dim, MAX_RELATIVE_POSITION, s.dtype)
        if mask is not None:  # an infinite distance lies in no bin
            waves = torch.where(distances.isfinite()[..., None], waves, 0.0)
        features = torch.cat([bins, waves], dim=-1).flatten(2)
        return F.pad(features, (0, (k - n) * (num_bins + feat_dim))) if n < k else features

    waves = sinusoids(torch.arange(n, device=s.device), feat_dim, MAX_RELATIVE_POSITION, s.dtype)
    features = [
        sides(layers.linear_s_p(s)),
        sides(layers.linear_relpos(waves)[None]).expand(s.shape[0], -1, -1, -1, -1),
        sides(layers.linear_t_distogram(neighbours(t))),
        sides(layers.linear_sc_distogram(neighbours(sc_t))),
    ]
    first, second = layers.edge_embedder(torch.cat(features, dim=-1)).unbind(1)
    return first, second


class LinearFactorizer(nn.Module):
    """The factors of a dense pair representation: FlashIPA's mode `flash_2d_factorize_bias`.

    Liu et al. 2025 (arXiv:2505.11580): one axis is compressed to the rank by a linear map over positions, whose weight
    fixes the longest length, then channels are mixed; LayerNorm after each.

    Args:
        in_L: The longest length.
        in_D: Width of the pair representation.
        target_rank: Factors.
        target_inner_dim: Width of a factor.
    """

    def __init__(self, in_L: int, in_D: int, target_rank: int = 4, target_inner_dim: int = 8) -> None:
        super().__init__()
        self.in_D = in_D
        self.in_L, self.target_rank, self.target_inner_dim = in_L, target_rank, target_inner_dim
        # nn.Linear's own initialisation is the original's.
        self.length_compressor = nn.Linear(in_L, target_rank, bias=False)
        self.inner_compressor = nn.Linear(in_D, target_inner_dim, bias=False)
        self.length_norm = nn.LayerNorm(target_rank)
        self.inner_norm = nn.LayerNorm(target_inner_dim)
        self.child_guard = ChildGuard(self, only=("length_compressor",))

    def factors(
        self, z: Float[Tensor, "b n n in_D"], mask: Shaped[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n rank d"], Float[Tensor, "b n rank d"]]:
        """The factors of the first and of the second residue of a pair.

        Args:
            z: Pair representation.
            mask: 1 (or True) for residues that take part; the factors of others become zero.

        Raises:
            ValueError: z is no square of pairs, or longer than `in_L`. (The original crops it without a word.)
        """
        n = z.shape[1]
        if z.ndim != 4 or z.shape[2] != n or z.shape[3] != self.in_D:
            raise ValueError(
                f"the pair representation has shape {tuple(z.shape)}; it must be "
                f"[batch, residues, residues, {self.in_D}]"
            )
        if n > self.in_L:
            raise ValueError(
                f"{n} residues are more than the {self.in_L} (max_len) whose positions this factoriser has weights "
                "for; the modes flash_1d_bias and flash_no_bias have no longest length"
            )
        if may_read(self, self.child_guard):
            # The originals pad z with zeros up to in_L: the weights that would meet them are left out instead.
            weight = self.length_compressor.weight[:, :n]
            sides = (torch.einsum("bjid,rj->bird", z, weight), torch.einsum("bijd,rj->bird", z, weight))
        else:
            padded = (F.pad(z.permute(order), (0, self.in_L - n)) for order in ((0, 2, 3, 1), (0, 1, 3, 2)))
            sides = tuple(self.length_compressor(side).transpose(2, 3) for side in padded)
        first, second = (self._side(side, mask) for side in sides)
        return first, second

    def forward(
        self, x: Float[Tensor, "b n n in_D"], mask: Shaped[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b_d n rank"], Float[Tensor, "b_d n rank"]]:
        """As `factors`, with the channels folded into the batch: the original's layout, [batch * d, n, rank]."""
        first, second = (side.permute(0, 3, 1, 2).flatten(0, 1) for side in self.factors(x, mask))
        return first, second

    def _side(self, compressed: Float[Tensor, "b n rank in_D"], mask: Tensor | None) -> Float[Tensor, "b n rank d"]:
        normed = self.length_norm(compressed.transpose(2, 3)).transpose(2, 3)
        out: Tensor = self.inner_norm(self.inner_compressor(normed))
        if mask is not None:
            out = out * boolean(mask)[..., None, None]
        return out / sqrt(self.target_rank)


def distance_bins(distances: Float[Tensor, "..."], lower: Float[Tensor, " bins"]) -> Bool[Tensor, "... bins"]:
    """Which bin a distance lies in: above a lower edge, below the next one. On an edge, it lies in none.

    Args:
        distances: Distances.
        lower: The bins' lower edges; the last bin has no upper one.
    """
    upper = torch.cat([lower[1:], lower.new_tensor([1e8])])
    return (distances[..., None] > lower) & (distances[..., None] < upper)
