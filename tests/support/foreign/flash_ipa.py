"""FlashIPA's layers: the pair representation whole (`orig_2d_bias`, the slow path), or as two factors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import multiflow
from .frames import Rigid


class InvariantPointAttention(nn.Module):
    def __init__(self, ipa_conf: Any, inf: float = 1e5, eps: float = 1e-8) -> None:
        super().__init__()
        self.use_flash_attn = ipa_conf.use_flash_attn
        self.inf, self.eps = inf, eps
        multiflow.ipa_parameters(self, ipa_conf)

    def forward(
        self,
        s: Tensor,
        z: Tensor | None,
        z_factor_1: Tensor | None,
        z_factor_2: Tensor | None,
        r: Rigid,
        mask: Tensor,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        if z is None:
            return s * 2.0
        return multiflow.attended(self, s, _z_reference_list[0] if _offload_inference else z, r, mask)


class EdgeTransition(multiflow.TransitionLayers):
    def __init__(self, *, mode: str, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.mode = mode

    def forward(
        self,
        node_embed: Tensor,
        edge_embed: Tensor | None,
        z_factor_1: Tensor | None = None,
        z_factor_2: Tensor | None = None,
    ) -> Any:
        if edge_embed is None:
            return z_factor_1, z_factor_2
        return self.updated(node_embed, edge_embed)


class EdgeEmbedder(nn.Module):
    def __init__(self, module_cfg: Any) -> None:
        super().__init__()
        self._cfg = cfg = module_cfg
        self.mode = cfg.mode
        self.c_s, self.c_p, self.feat_dim = cfg.c_s, cfg.c_p, cfg.feat_dim
        multiflow.edge_parameters(self, 3 * cfg.feat_dim + 2 * cfg.num_bins)

    def embed_relpos(self, pos: Tensor) -> Tensor:
        offsets = pos[:, :, None] - pos[:, None]
        out: Tensor = self.linear_relpos(multiflow.index_embedding(offsets, self.feat_dim, max_len=2056))
        return out

    def fwd_2d(self, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor) -> Tensor:
        features = [
            multiflow.cross(self.linear_s_p(s)),
            self.embed_relpos(torch.arange(s.shape[1]).repeat(s.shape[0], 1)),
            multiflow.distogram(t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
            multiflow.distogram(sc_t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
        ]
        out: Tensor = self.edge_embedder(torch.cat(features, dim=-1))
        out *= p_mask.unsqueeze(-1)
        return out

    def forward(
        self,
        node_embed: Tensor,
        translations: Tensor,
        trans_sc: Tensor,
        node_mask: Tensor,
        edge_embed: Tensor | None = None,
        edge_mask: Tensor | None = None,
    ) -> Any:
        edge_mask = node_mask[:, None] * node_mask[:, :, None] if edge_mask is None else edge_mask
        if edge_embed is None:
            edge_embed = self.fwd_2d(node_embed, translations, trans_sc, edge_mask)
        return edge_embed * edge_mask[..., None], None, None, edge_mask


def ipa(use_flash_attn: bool = False, **changes: Any) -> InvariantPointAttention:
    torch.manual_seed(0)
    return InvariantPointAttention(SimpleNamespace(**{**multiflow.SIZES, "use_flash_attn": use_flash_attn, **changes}))


def edge_transition(mode: str = "2d") -> EdgeTransition:
    torch.manual_seed(0)
    return EdgeTransition(mode=mode, node_embed_size=24, edge_embed_in=16, edge_embed_out=16)


def edge_embedder(mode: str = "orig_2d_bias", **changes: Any) -> EdgeEmbedder:
    torch.manual_seed(0)
    return EdgeEmbedder(SimpleNamespace(**{**multiflow.EDGES, "mode": mode, **changes}))
