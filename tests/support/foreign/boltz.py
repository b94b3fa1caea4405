"""Boltz's layers: triangle operations, attention with pair bias in both versions, transition, a Pairformer layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import openfold


class Rearrange(nn.Module):
    """einops' layer, for the one pattern that Boltz uses."""

    pattern = "b ... h -> b h ..."

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class _TriangleMultiplication(nn.Module):
    sums: str

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.p_in, self.g_in = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.p_out, self.g_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor, use_kernels: bool = False) -> Tensor:
        x = self.norm_in(x)
        a, b = (self.p_in(x) * self.g_in(x).sigmoid() * mask.unsqueeze(-1)).chunk(2, dim=-1)
        out: Tensor = self.p_out(self.norm_out(torch.einsum(self.sums, a, b))) * self.g_out(x).sigmoid()
        return out


class TriangleMultiplicationOutgoing(_TriangleMultiplication):
    sums = "bikd,bjkd->bijd"


class TriangleMultiplicationIncoming(_TriangleMultiplication):
    sums = "bkid,bkjd->bijd"


class TriangleAttention(openfold._TriangleAttention):
    bias = False

    def forward(
        self, x: Tensor, mask: Tensor | None = None, chunk_size: int | None = None, use_kernels: bool = False
    ) -> Tensor:
        return openfold.triangle_attended(self, x, mask)


class TriangleAttentionEndingNode(TriangleAttention):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(starting=False, **sizes)


class Transition(nn.Module):
    def __init__(self, dim: int = 12, hidden: int = 20, out_dim: int | None = None) -> None:
        super().__init__()
        self.hidden = hidden
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.fc3, self.silu = nn.Linear(hidden, out_dim or dim, bias=False), nn.SiLU()

    def forward(self, x: Tensor, chunk_size: int | None = None) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.fc3(self.silu(self.fc1(x)) * self.fc2(x))
        return out


def biased_attention(layer: Any, s: Tensor, k_in: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """Supplementary Algorithm 24 of AlphaFold 3, from the projections on."""
    heads = (layer.num_heads, layer.head_dim)
    q, k, v = (f(x).unflatten(-1, heads) for f, x in ((layer.proj_q, s), (layer.proj_k, k_in), (layer.proj_v, k_in)))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / layer.head_dim**0.5 + bias
    logits = logits + (1 - mask[:, None, None]) * -layer.inf
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(-2)
    result: Tensor = layer.proj_o(layer.proj_g(s).sigmoid() * out)
    return result


class _AttentionPairBias(nn.Module):
    def __init__(self, c_s: int, c_z: int | None, num_heads: int, inf: float = 1e6) -> None:
        super().__init__()
        self.c_s, self.num_heads, self.head_dim, self.inf = c_s, num_heads, c_s // num_heads, inf
        self.proj_q = nn.Linear(c_s, c_s)
        for name in "kvgo":
            setattr(self, f"proj_{name}", nn.Linear(c_s, c_s, bias=False))
        move = Rearrange()
        self.proj_z: nn.Module = move
        if c_z is not None:
            self.proj_z = nn.Sequential(nn.LayerNorm(c_z), nn.Linear(c_z, num_heads, bias=False), move)


def boltz_1(c_s: int = 15, c_z: int = 12, num_heads: int = 3, initial_norm: bool = True) -> nn.Module:
    """Boltz-1's layer; the two versions have one name, so they are made here."""

    return _named(_Boltz1, c_s, c_z, num_heads, initial_norm)


def boltz_2(c_s: int = 15, c_z: int = 12, num_heads: int = 3, compute_pair_bias: bool = True) -> nn.Module:
    """Boltz-2's layer."""
    return _named(_Boltz2, c_s, c_z, num_heads, compute_pair_bias)


class _Boltz1(_AttentionPairBias):
    def __init__(self, c_s: int, c_z: int, num_heads: int, initial_norm: bool) -> None:
        super().__init__(c_s, c_z, num_heads)
        self.initial_norm = initial_norm
        if initial_norm:
            self.norm_s = nn.LayerNorm(c_s)

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        multiplicity: int = 1,
        to_keys: Callable[[Tensor], Tensor] | None = None,
        model_cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        s = self.norm_s(s) if self.initial_norm else s
        k_in = s if to_keys is None else to_keys(s)
        mask = mask if to_keys is None else to_keys(mask.unsqueeze(-1)).squeeze(-1)
        cache = {} if model_cache is None else model_cache
        if "z" not in cache:
            cache["z"] = self.proj_z(z)
        return biased_attention(self, s, k_in, mask, cache["z"].repeat_interleave(multiplicity, 0))


class _Boltz2(_AttentionPairBias):
    def __init__(self, c_s: int, c_z: int, num_heads: int, compute_pair_bias: bool) -> None:
        super().__init__(c_s, c_z if compute_pair_bias else None, num_heads)
        self.compute_pair_bias = compute_pair_bias

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, k_in: Tensor, multiplicity: int = 1) -> Tensor:
        return biased_attention(self, s, k_in, mask, self.proj_z(z).repeat_interleave(multiplicity, 0))


def _named(base: type[nn.Module], *args: Any) -> nn.Module:
    return type("AttentionPairBias", (base,), {"__init__": base.__init__, "forward": base.forward})(*args)


class PairformerLayer(nn.Module):
    """Boltz-2's, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_norm_s, self.attention = nn.LayerNorm(15), boltz_2()
        self.tri_mul_out, self.tri_mul_in = TriangleMultiplicationOutgoing(), TriangleMultiplicationIncoming()
        self.tri_att_start, self.tri_att_end = TriangleAttention(), TriangleAttentionEndingNode()
        self.transition_s, self.transition_z = Transition(15), Transition()

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.tri_mul_out(z, mask=pair_mask, use_kernels=False)
        z = z + self.tri_mul_in(z, mask=pair_mask, use_kernels=False)
        z = z + self.tri_att_start(z, mask=pair_mask, chunk_size=128, use_kernels=False)
        z = z + self.tri_att_end(z, mask=pair_mask, chunk_size=128, use_kernels=False)
        z = z + self.transition_z(z)
        normed = F.layer_norm(s, (15,), self.pre_norm_s.weight, self.pre_norm_s.bias)
        s = s + self.attention(s=normed, z=z, mask=mask, k_in=normed)
        return s + self.transition_s(s), z
