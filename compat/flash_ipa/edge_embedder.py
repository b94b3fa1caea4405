"""FlashIPA's edge embedder: the first pair representation, dense, in two factors, or none, as its mode says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ...errors import BadInput
from ...kernels.registry.binding import Use
from ...modules.edge_factors import LinearFactorizer, embed_factors
from ...modules.edge_features import READ, embed_pairs, pair_features_use, pair_perceptron
from ...modules.kernel_module import KernelModule
from ...modules.masks import boolean
from .utils import check_mode

_DENSE = ("orig_2d_bias", "flash_2d_factorize_bias")


@dataclass
class EdgeEmbedderConfig:
    """FlashIPA's `edge_features` section, with its defaults; the fields that it says it does not use, we do not either.

    Attributes:
        z_factor_rank: Factors of the pair representation.
        single_bias_transition_n: Not used.
        c_s: Width of the single representation.
        c_p: Width of the pair representation, or of a factor.
        relpos_k: Not used.
        use_rbf: Not used.
        num_rbf: Not used.
        feat_dim: Width of the embeddings of residues and positions.
        num_bins: Bins of a distogram.
        self_condition: Not used.
        mode: orig_no_bias, orig_2d_bias, flash_no_bias, flash_1d_bias or flash_2d_factorize_bias.
        k: Nearest neighbours, in mode flash_1d_bias.
        max_len: The longest length, in mode flash_2d_factorize_bias; no other mode has one.
        masked_neighbors: Whether the neighbours of mode flash_1d_bias are residues that take part only, so that padding
            changes nothing. Not FlashIPA's: its neighbours do not heed the mask.
    """

    z_factor_rank: int = 2
    single_bias_transition_n: int = 2
    c_s: int = 256
    c_p: int = 128
    relpos_k: int = 64
    use_rbf: bool = True
    num_rbf: int = 32
    feat_dim: int = 64
    num_bins: int = 22
    self_condition: bool = True
    mode: str = "flash_1d_bias"
    k: int = 10
    max_len: int | None = None
    masked_neighbors: bool = False


class EdgeEmbedder(KernelModule):
    """The first pair representation (Liu et al. 2025, arXiv:2505.11580), under FlashIPA's names.

    orig_2d_bias: Multiflow's edge features. flash_1d_bias: factors from each residue and its nearest neighbours; no
    pair is formed. flash_2d_factorize_bias: Multiflow's edge features (or a pair representation that is given),
    compressed to factors; memory is quadratic here, and linear afterwards. orig_no_bias, flash_no_bias: nothing.

    Args:
        module_cfg: An `EdgeEmbedderConfig`, or any object with its fields.

    Raises:
        BadInput: There is no such mode, or flash_2d_factorize_bias has no `max_len`.
    """

    linear_s_p: nn.Linear
    linear_relpos: nn.Linear
    linear_t_distogram: nn.Linear
    linear_sc_distogram: nn.Linear
    edge_embedder: nn.Sequential

    def __init__(self, module_cfg: EdgeEmbedderConfig | Any) -> None:
        super().__init__()
        self._cfg = module_cfg
        self.mode: str = module_cfg.mode
        check_mode(self.mode)
        self.c_s, self.c_p = module_cfg.c_s, module_cfg.c_p
        self.feat_dim, self.num_bins = module_cfg.feat_dim, module_cfg.num_bins
        self.max_len = getattr(module_cfg, "max_len", None)
        self.masked_neighbors: bool = getattr(module_cfg, "masked_neighbors", False)
        f, bins = self.feat_dim, self.num_bins
        if self.mode == "flash_1d_bias":
            rank = self.z_factor_rank = module_cfg.z_factor_rank
            self.k = module_cfg.k
            if rank < 1 or self.k < 1:
                raise BadInput(
                    f"mode flash_1d_bias has factors and neighbours: z_factor_rank is {rank}, k is {self.k}",
                    "give both, or choose a mode without bias.",
                )
            self.linear_s_p = nn.Linear(self.c_s, 2 * rank * f)
            self.linear_relpos = nn.Linear(f, 4 * rank * f)
            self.linear_t_distogram = nn.Linear(self.k * (bins + f), 2 * rank * bins)
            self.linear_sc_distogram = nn.Linear(self.k * (bins + f), 2 * rank * bins)
        elif self.mode in _DENSE:
            self.linear_s_p = nn.Linear(self.c_s, f)
            self.linear_relpos = nn.Linear(f, f)
        if self.mode == "flash_2d_factorize_bias":
            if self.max_len is None or module_cfg.z_factor_rank < 1:
                raise BadInput(
                    f"mode flash_2d_factorize_bias has a longest length and factors: max_len is {self.max_len}, "
                    f"z_factor_rank is {module_cfg.z_factor_rank}",
                    "give both; they are sizes of its weights.",
                )
            self.z_factor_rank = module_cfg.z_factor_rank
            self.factorizer = LinearFactorizer(self.max_len, self.c_p, self.z_factor_rank, self.c_p)
        # Modes without bias have these weights too, and never read them: their checkpoints hold them.
        self.edge_embedder = pair_perceptron(3 * f + 2 * bins, self.c_p)
        if self.mode in _DENSE:
            self.reads(*READ)

    def kernel_uses(self) -> list[Use]:
        """Edge features, in the modes that form pairs."""
        return [pair_features_use(self, self.num_bins)] if self.mode in _DENSE else []

    def forward(
        self,
        node_embed: Float[Tensor, "b n c_s"],
        translations: Float[Tensor, "b n 3"],
        trans_sc: Float[Tensor, "b n 3"],
        node_mask: Shaped[Tensor, "b n"],
        edge_embed: Float[Tensor, "b n n c_p"] | None = None,
        edge_mask: Shaped[Tensor, "b n n"] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Embed.

        Args:
            node_embed: Single representation.
            translations: Coordinates in Angstrom.
            trans_sc: Coordinates of the last prediction, in Angstrom; zeros where there is none.
            node_mask: 1 (or True) for residues that take part. The neighbours of mode flash_1d_bias do not heed it,
                unless `masked_neighbors` says so.
            edge_embed: A pair representation to use in place of the one that would be computed. In mode
                flash_2d_factorize_bias it is factorised as it is, unmasked.
            edge_mask: 1 for pairs that take part; by default those of residues that do.

        Returns:
            The pair representation [b, n, n, c_p] and the mask [b, n, n] that it was multiplied by, in mode
            orig_2d_bias; the two factors [b, n, rank, c_p] in the flash modes with a bias; None for the others of
            (pair representation, first factor, second factor, mask).

        Raises:
            BadInput: Pairs are given in a mode that has none.
            ValueError: There are more residues than `max_len`, or fewer than `k` without `masked_neighbors`.
        """
        if self.mode not in _DENSE:
            if edge_embed is not None or edge_mask is not None:
                given = "edge_embed" if edge_embed is not None else "edge_mask"
                raise BadInput(
                    f"{given} is given, but mode {self.mode} forms no pair of residues",
                    "leave it out, or use mode orig_2d_bias or flash_2d_factorize_bias.",
                )
            if self.mode != "flash_1d_bias":
                return None, None, None, None
            mask = boolean(node_mask) if self.masked_neighbors else None
            return None, *embed_factors(self, node_embed, translations, trans_sc, mask), None
        if self.mode == "flash_2d_factorize_bias" and self.max_len is not None and node_embed.shape[1] > self.max_len:
            # Before the pairs are formed: they may not fit.
            raise BadInput(
                f"{node_embed.shape[1]} residues are more than max_len ({self.max_len}), for whose positions the "
                "factoriser has weights",
                "use a shorter chain, or a model of mode flash_1d_bias or flash_no_bias, which have no longest length.",
            )
        given_mask = edge_mask
        if edge_mask is None:
            edge_mask = node_mask[:, None] * node_mask[:, :, None]
        z = edge_embed
        if z is None:
            mask = boolean(node_mask) if given_mask is None else None
            z = embed_pairs(
                self,
                node_embed,
                translations,
                trans_sc,
                self.num_bins,
                mask=mask,
                config=self.kernel_config,
                called=not self.may_read(),
            )
        if self.mode == "flash_2d_factorize_bias":
            if edge_embed is None and given_mask is not None:
                z = z * given_mask[..., None].to(z.dtype)
            return None, *self.factorizer.factors(z), None
        if edge_embed is not None or given_mask is not None:
            z = z * edge_mask[..., None].to(z.dtype)
        return z, None, None, edge_mask
