"""FrameFlow's layers, RNA-FrameFlow's edge embedder, and the IPA of FoldFlow and FrameDiff: fewer arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import multiflow
from .frames import Rigid


class InvariantPointAttention(nn.Module):
    """FrameFlow's and RNA-FrameFlow's; with `rbf`, FoldFlow's and FrameDiff's."""

    def __init__(self, ipa_conf: Any, inf: float = 1e5, eps: float = 1e-8, rbf: bool = False) -> None:
        super().__init__()
        self.inf, self.eps = inf, eps
        multiflow.ipa_parameters(self, ipa_conf)
        if rbf:
            self.linear_rbf = nn.Linear(20, 1)

    def forward(
        self,
        s: Tensor,
        z: Tensor | None,
        r: Rigid,
        mask: Tensor,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        return multiflow.attended(self, s, _z_reference_list[0] if _offload_inference else z, r, mask)


class EdgeFeatureNet(multiflow.PairLayers):
    def forward(self, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor, diffuse_mask: Tensor) -> Tensor:
        features = [
            multiflow.cross(self.linear_s_p(s)),
            self.embed_relpos(torch.arange(s.shape[1]).repeat(s.shape[0], 1)),
            multiflow.distogram(t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
            multiflow.distogram(sc_t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
        ]
        if self._cfg.embed_diffuse_mask:
            features.append(multiflow.cross(diffuse_mask[..., None]))
        out: Tensor = self.edge_embedder(torch.cat(features, dim=-1))
        out *= p_mask.unsqueeze(-1)
        return out


class EdgeEmbedder(nn.Module):
    """RNA-FrameFlow's."""

    def __init__(self, module_cfg: Any) -> None:
        super().__init__()
        self._cfg = cfg = module_cfg
        self.c_s, self.c_p, self.feat_dim = cfg.c_s, cfg.c_p, cfg.feat_dim
        multiflow.edge_parameters(self, 3 * cfg.feat_dim + 2 * cfg.num_bins)

    def embed_relpos(self, pos: Tensor) -> Tensor:
        offsets = pos[:, :, None] - pos[:, None]
        out: Tensor = self.linear_relpos(multiflow.index_embedding(offsets, self.feat_dim, max_len=2056))
        return out

    def forward(self, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor) -> Tensor:
        features = [
            multiflow.cross(self.linear_s_p(s)),
            self.embed_relpos(torch.arange(s.shape[1]).repeat(s.shape[0], 1)),
            multiflow.distogram(t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
            multiflow.distogram(sc_t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins),
        ]
        out: Tensor = self.edge_embedder(torch.cat(features, dim=-1))
        out *= p_mask.unsqueeze(-1)
        return out


def ipa(rbf: bool = False, **changes: Any) -> InvariantPointAttention:
    torch.manual_seed(0)
    return InvariantPointAttention(SimpleNamespace(**{**multiflow.SIZES, **changes}), rbf=rbf)


def edge_features(**changes: Any) -> EdgeFeatureNet:
    torch.manual_seed(0)
    return EdgeFeatureNet(SimpleNamespace(**{**multiflow.EDGES, **changes}))


def edge_embedder(**changes: Any) -> EdgeEmbedder:
    torch.manual_seed(0)
    return EdgeEmbedder(SimpleNamespace(**{**multiflow.EDGES, **changes}))
