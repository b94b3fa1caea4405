"""Multiflow's edge feature network as a layer."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..kernels.binding import Use
from ..kernels.edge_features import edge_features
from .kernel_module import KernelModule
from .masks import boolean


class EdgeFeatureNet(KernelModule):
    """The first pair representation, from residues, sequence distance and two sets of coordinates (Multiflow).

    Args:
        config: Multiflow's `edge_features` section: c_s, c_p, feat_dim, num_bins, embed_chain, embed_diffuse_mask.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c_p: int = config.c_p
        self.num_bins: int = config.num_bins
        self.embed_chain: bool = config.embed_chain
        self.embed_diffuse_mask: bool = config.embed_diffuse_mask
        self.linear_s_p = nn.Linear(config.c_s, config.feat_dim)
        self.linear_relpos = nn.Linear(config.feat_dim, config.feat_dim)
        features = 3 * config.feat_dim + 2 * config.num_bins + self.embed_chain + 2 * self.embed_diffuse_mask
        self.edge_embedder = nn.Sequential(
            nn.Linear(features, config.c_p),
            nn.ReLU(),
            nn.Linear(config.c_p, config.c_p),
            nn.ReLU(),
            nn.Linear(config.c_p, config.c_p),
            nn.LayerNorm(config.c_p),
        )

    def kernel_uses(self) -> list[Use]:
        """Edge features."""
        options = [name for name, on in (("chain", self.embed_chain), ("diffuse", self.embed_diffuse_mask)) if on]
        dims = {"f": self.linear_s_p.out_features, "cz": self.c_p, "bins": self.num_bins}
        return [Use("edge_features", dims, tuple(options))]

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
        layers: Any = self.edge_embedder
        out = edge_features(
            self.linear_s_p(s),
            t,
            sc_t,
            chain_idx if self.embed_chain else None,
            diffuse_mask if self.embed_diffuse_mask else None,
            self.linear_relpos.weight,
            self.linear_relpos.bias,
            (layers[0].weight, layers[2].weight, layers[4].weight),
            (layers[0].bias, layers[2].bias, layers[4].bias),
            layers[5].weight,
            layers[5].bias,
            None if mask is None else boolean(mask),
            num_bins=self.num_bins,
            eps=layers[5].eps,
            out_dtype=out_dtype,
            config=self.kernel_config,
        )
        return out if p_mask is None else out * p_mask[..., None].to(out.dtype)
