"""Multiflow's layers, and a small model of them: IPA, edge transition, edge feature net."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .frames import Rigid

SIZES = {"c_s": 24, "c_z": 16, "c_hidden": 5, "no_heads": 3, "no_qk_points": 4, "no_v_points": 6, "dropout": 0.0}


def attended(
    layer: Any, s: Tensor, z: Tensor, r: Any, mask: Tensor, attention_mask: Tensor | None = None, dropped: bool = False
) -> Tensor:
    """Supplementary Algorithm 22, with z projected to a quarter of its channels."""
    heads = layer.no_heads

    def points(flat: Tensor) -> Tensor:
        local = torch.stack(flat.chunk(3, dim=-1), dim=-1)
        return r[..., None].apply(local).unflatten(-2, (heads, -1))

    q = layer.linear_q(s).unflatten(-1, (heads, -1))
    k, v = layer.linear_kv(s).unflatten(-1, (heads, -1)).split(layer.c_hidden, dim=-1)
    q_points, kv_points = points(layer.linear_q_points(s)), points(layer.linear_kv_points(s))
    k_points, v_points = kv_points.split([layer.no_qk_points, layer.no_v_points], dim=-2)
    logits = torch.einsum("...ihc,...jhc->...hij", q, k) * math.sqrt(1 / (3 * layer.c_hidden))
    logits = logits + math.sqrt(1 / 3) * layer.linear_b(z).movedim(-1, -3)
    squares = ((q_points.unsqueeze(-4) - k_points.unsqueeze(-5)) ** 2).sum((-1, -2))
    weights = layer.softplus(layer.head_weights) * math.sqrt(1 / (3 * (layer.no_qk_points * 9 / 2)))
    logits = logits - 0.5 * (squares * weights).movedim(-1, -3)
    logits = logits + (layer.inf * (mask[..., :, None] * mask[..., None, :] - 1)).unsqueeze(-3)
    if dropped:
        logits = layer.dropout(logits)
    if attention_mask is not None:
        logits = logits - (1 - attention_mask[:, None]) * 1e7
    a = layer.softmax(logits)
    values = torch.einsum("...hij,...jhc->...ihc", a, v)
    averaged = torch.einsum("...hij,...jhpx->...ihpx", a, v_points)
    local = r[..., None, None].invert_apply(averaged)
    norms = torch.sqrt((local**2).sum(-1) + layer.eps)
    pairs = torch.einsum("...hij,...ijc->...ihc", a, layer.down_z(z))
    features = [values, *local.unbind(-1), norms, pairs]
    out: Tensor = layer.linear_out(torch.cat([feature.flatten(-2) for feature in features], dim=-1))
    return out


def ipa_parameters(layer: nn.Module, conf: Any) -> None:
    """The parameters and attributes that the whole family has."""
    for name in ("c_s", "c_z", "c_hidden", "no_heads", "no_qk_points", "no_v_points"):
        setattr(layer, name, getattr(conf, name))
    heads, hidden, down = conf.no_heads, conf.c_hidden, conf.c_z // 4
    layer.linear_q = nn.Linear(conf.c_s, heads * hidden)
    layer.linear_kv = nn.Linear(conf.c_s, 2 * heads * hidden)
    layer.linear_q_points = nn.Linear(conf.c_s, 3 * heads * conf.no_qk_points)
    layer.linear_kv_points = nn.Linear(conf.c_s, 3 * heads * (conf.no_qk_points + conf.no_v_points))
    layer.linear_b = nn.Linear(conf.c_z, heads)
    layer.down_z = nn.Linear(conf.c_z, down)
    layer.head_weights = nn.Parameter(torch.full((heads,), 0.54))
    layer.linear_out = nn.Linear(heads * (down + hidden + 4 * conf.no_v_points), conf.c_s)
    layer.softmax, layer.softplus = nn.Softmax(dim=-1), nn.Softplus()


class InvariantPointAttention(nn.Module):
    def __init__(self, ipa_conf: Any, inf: float = 1e5, eps: float = 1e-8) -> None:
        super().__init__()
        self._ipa_conf = ipa_conf
        self.inf, self.eps = inf, eps
        ipa_parameters(self, ipa_conf)
        self.dropout_prob = ipa_conf.dropout
        self.dropout = nn.Dropout(self.dropout_prob)

    def forward(
        self,
        s: Tensor,
        z: Tensor | None,
        r: Rigid,
        mask: Tensor,
        attention_mask: Tensor | None = None,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        z = _z_reference_list[0] if _offload_inference else z
        return attended(self, s, z, r, mask, attention_mask, dropped=self.dropout_prob > 0)


def ipa(**changes: Any) -> InvariantPointAttention:
    """A layer of odd sizes, with weights that are nowhere zero."""
    torch.manual_seed(0)
    return InvariantPointAttention(SimpleNamespace(**{**SIZES, **changes}))


class TransitionLayers(nn.Module):
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
        share = node_embed_size // node_dilation
        hidden = 2 * share + edge_embed_in
        self.initial_embed = nn.Linear(node_embed_size, share)
        layers = [layer for _ in range(num_layers) for layer in (nn.Linear(hidden, hidden), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.final_layer = nn.Linear(hidden, edge_embed_out)
        self.layer_norm = nn.LayerNorm(edge_embed_out)

    def updated(self, node_embed: Tensor, edge_embed: Tensor) -> Tensor:
        joined = torch.cat([edge_embed, cross(self.initial_embed(node_embed))], dim=-1)
        out: Tensor = self.layer_norm(self.final_layer(self.trunk(joined) + joined))
        return out


class EdgeTransition(TransitionLayers):
    def forward(self, node_embed: Tensor, edge_embed: Tensor) -> Tensor:
        return self.updated(node_embed, edge_embed)


def cross(x: Tensor) -> Tensor:
    """Of each pair of residues, the first's features and the second's."""
    n = x.shape[1]
    return torch.cat([x[:, :, None].expand(-1, -1, n, -1), x[:, None].expand(-1, n, -1, -1)], dim=-1)


def distogram(x: Tensor, min_bin: float, max_bin: float, num_bins: int) -> Tensor:
    distance = torch.linalg.norm(x[:, :, None] - x[:, None], dim=-1)[..., None]
    lower = torch.linspace(min_bin, max_bin, num_bins)
    upper = torch.cat([lower[1:], torch.tensor([1e8])])
    return ((distance > lower) & (distance < upper)).to(x.dtype)


def index_embedding(index: Tensor, size: int, max_len: int) -> Tensor:
    angles = index[..., None] * math.pi / max_len ** (2 * torch.arange(size // 2) / size)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


EDGES = {"c_s": 24, "c_p": 16, "feat_dim": 8, "num_bins": 22, "embed_chain": False, "embed_diffuse_mask": True}


class PairLayers(nn.Module):
    def __init__(self, module_cfg: Any) -> None:
        super().__init__()
        self._cfg = cfg = module_cfg
        self.c_s, self.c_p, self.feat_dim = cfg.c_s, cfg.c_p, cfg.feat_dim
        edge_parameters(self, 3 * cfg.feat_dim + 2 * cfg.num_bins + cfg.embed_chain + 2 * cfg.embed_diffuse_mask)

    def embed_relpos(self, r: Tensor) -> Tensor:
        out: Tensor = self.linear_relpos(index_embedding(r[:, :, None] - r[:, None], self.feat_dim, max_len=2056))
        return out


class EdgeFeatureNet(PairLayers):
    def forward(
        self, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor, diffuse_mask: Tensor, chain_idx: Tensor
    ) -> Tensor:
        features = [cross(self.linear_s_p(s)), self.embed_relpos(torch.arange(s.shape[1]).repeat(s.shape[0], 1))]
        features.append(distogram(t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins))
        features.append(distogram(sc_t, min_bin=1e-3, max_bin=20.0, num_bins=self._cfg.num_bins))
        if self._cfg.embed_chain:
            features.append((chain_idx[:, :, None] == chain_idx[:, None]).float()[..., None])
        if self._cfg.embed_diffuse_mask:
            features.append(cross(diffuse_mask[..., None]))
        out: Tensor = self.edge_embedder(torch.cat(features, dim=-1))
        out *= p_mask.unsqueeze(-1)
        return out


def edge_parameters(layer: nn.Module, features: int) -> None:
    layer.linear_s_p = nn.Linear(layer.c_s, layer.feat_dim)
    layer.linear_relpos = nn.Linear(layer.feat_dim, layer.feat_dim)
    layer.edge_embedder = nn.Sequential(
        nn.Linear(features, layer.c_p),
        nn.ReLU(),
        nn.Linear(layer.c_p, layer.c_p),
        nn.ReLU(),
        nn.Linear(layer.c_p, layer.c_p),
        nn.LayerNorm(layer.c_p),
    )


def edge_transition(**changes: Any) -> EdgeTransition:
    torch.manual_seed(0)
    return EdgeTransition(**{"node_embed_size": 24, "edge_embed_in": 16, "edge_embed_out": 16, **changes})


def edge_features(**changes: Any) -> EdgeFeatureNet:
    torch.manual_seed(0)
    return EdgeFeatureNet(SimpleNamespace(**{**EDGES, **changes}))
