"""OpenFold's layers: IPA in its three forms, triangle operations, pair transition; ESMFold's under other names."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """With a forward of its own, as OpenFold's has for bfloat16."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True, precision: torch.dtype | None = None) -> None:
        super().__init__(c_in, c_out, bias=bias)
        self.precision = precision

    def forward(self, input: Tensor) -> Tensor:
        if self.precision is not None:
            bias = None if self.bias is None else self.bias.to(self.precision)
            return F.linear(input.to(self.precision), self.weight.to(self.precision), bias).to(input.dtype)
        return F.linear(input, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, c_in: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.c_in, self.eps = (c_in,), eps
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(c_in))
        self.bias = nn.Parameter(0.1 * torch.randn(c_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.c_in, self.weight, self.bias, self.eps)


# ------------------------------------------------------------------------------------------------------------ frames


class Vec3Array:
    """The multimer's vector: x, y and z apart."""

    def __init__(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        self.x, self.y, self.z = x, y, z

    def to_tensor(self) -> Tensor:
        return torch.stack([self.x, self.y, self.z], dim=-1)


class Rot3Array:
    def __init__(self, matrices: Tensor) -> None:
        self._matrices = matrices

    def to_tensor(self) -> Tensor:
        return self._matrices


class Rigid3Array:
    """The multimer's frames."""

    def __init__(self, rotmats: Tensor, trans: Tensor) -> None:
        self.rotation, self.translation = Rot3Array(rotmats), Vec3Array(*trans.unbind(-1))

    def __getitem__(self, index: Any) -> Rigid3Array:
        rotmats, trans = self.rotation.to_tensor(), self.translation.to_tensor()
        return Rigid3Array(rotmats[(*index, slice(None), slice(None))], trans[(*index, slice(None))])

    def apply(self, points: Tensor) -> Tensor:
        return torch.einsum("...xy,...y->...x", self.rotation.to_tensor(), points) + self.translation.to_tensor()

    def apply_inverse_to_point(self, point: Vec3Array) -> Vec3Array:
        moved = point.to_tensor() - self.translation.to_tensor()
        return Vec3Array(*torch.einsum("...yx,...y->...x", self.rotation.to_tensor(), moved).unbind(-1))


# --------------------------------------------------------------------------------------------------------------- IPA


class PointProjection(nn.Module):
    def __init__(self, c_s: int, num_points: int, no_heads: int, is_multimer: bool) -> None:
        super().__init__()
        self.return_local_points = False
        self.no_heads, self.num_points, self.is_multimer = no_heads, num_points, is_multimer
        self.linear = Linear(c_s, 3 * no_heads * num_points, precision=torch.float32 if is_multimer else None)

    def forward(self, s: Tensor, r: Any) -> Tensor:
        flat = self.linear(s)
        if self.is_multimer:
            flat = flat.unflatten(-1, (self.no_heads, -1))
        local = torch.stack(flat.chunk(3, dim=-1), dim=-1)
        return r[..., None, None].apply(local.reshape(*s.shape[:-1], self.no_heads, self.num_points, 3))


def ipa_attended(
    layer: Any, sizes: Any, z: Tensor, r: Any, mask: Tensor, q: Tensor, kv: tuple[Tensor, Tensor], points: list[Tensor]
) -> Tensor:
    """Supplementary Algorithm 22, from projections and points on."""
    heads, inf, eps = q.shape[-2], sizes.inf, sizes.eps
    q_points, k_points, v_points = points
    logits = torch.einsum("...ihc,...jhc->...hij", q, kv[0]) * math.sqrt(1 / (3 * q.shape[-1]))
    logits = logits + math.sqrt(1 / 3) * layer.linear_b(z).movedim(-1, -3)
    squares = ((q_points.unsqueeze(-4) - k_points.unsqueeze(-5)) ** 2).sum((-1, -2))
    weights = F.softplus(layer.head_weights) * math.sqrt(1 / (3 * (q_points.shape[-2] * 9 / 2)))
    logits = logits - 0.5 * (squares * weights).movedim(-1, -3)
    logits = logits + (inf * (mask[..., :, None] * mask[..., None, :] - 1)).unsqueeze(-3)
    a = logits.softmax(-1)
    averaged = torch.einsum("...hij,...jhpx->...ihpx", a, v_points)
    if type(layer).__name__.endswith("Multimer"):
        flat = Vec3Array(*averaged.flatten(-3, -2).unbind(-1))
        local = r[..., None].apply_inverse_to_point(flat).to_tensor().unflatten(-2, (heads, -1))
        norms = torch.sqrt((local**2).sum(-1).clamp(min=eps**2))
    else:
        local = r[..., None, None].invert_apply(averaged)
        norms = torch.sqrt((local**2).sum(-1) + eps)
    values = torch.einsum("...hij,...jhc->...ihc", a, kv[1])
    pairs = torch.einsum("...hij,...ijc->...ihc", a, z)
    features = [values, *local.unbind(-1), norms, pairs]
    out: Tensor = layer.linear_out(torch.cat([feature.flatten(-2) for feature in features], dim=-1))
    return out


class _IPA(nn.Module):
    def __init__(
        self,
        c_s: int = 24,
        c_z: int = 16,
        c_hidden: int = 5,
        no_heads: int = 3,
        no_qk_points: int = 4,
        no_v_points: int = 6,
        inf: float = 1e5,
        eps: float = 1e-8,
        is_multimer: bool = False,
    ) -> None:
        super().__init__()
        self.c_s, self.c_z, self.c_hidden, self.no_heads = c_s, c_z, c_hidden, no_heads
        self.no_qk_points, self.no_v_points, self.inf, self.eps = no_qk_points, no_v_points, inf, eps
        inner = no_heads * c_hidden
        self.linear_q = Linear(c_s, inner, bias=not is_multimer)
        self.linear_q_points = PointProjection(c_s, no_qk_points, no_heads, is_multimer)
        if is_multimer:
            self.linear_k, self.linear_v = Linear(c_s, inner, bias=False), Linear(c_s, inner, bias=False)
            self.linear_k_points = PointProjection(c_s, no_qk_points, no_heads, is_multimer)
            self.linear_v_points = PointProjection(c_s, no_v_points, no_heads, is_multimer)
        else:
            self.linear_kv = Linear(c_s, 2 * inner)
            self.linear_kv_points = PointProjection(c_s, no_qk_points + no_v_points, no_heads, is_multimer)
        self.linear_b = Linear(c_z, no_heads)
        self.head_weights = nn.Parameter(torch.full((no_heads,), 0.54))
        self.linear_out = Linear(no_heads * (c_z + c_hidden + 4 * no_v_points), c_s)

    def forward(
        self,
        s: Tensor,
        z: Tensor | None,
        r: Any,
        mask: Tensor,
        inplace_safe: bool = False,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        if _offload_inference and inplace_safe:
            z = _z_reference_list[0]
        assert z is not None
        q = self.linear_q(s).unflatten(-1, (self.no_heads, -1))
        points = [self.linear_q_points(s, r)]
        if hasattr(self, "linear_k"):
            k, v = (layer(s).unflatten(-1, (self.no_heads, -1)) for layer in (self.linear_k, self.linear_v))
            points += [self.linear_k_points(s, r), self.linear_v_points(s, r)]
        else:
            k, v = self.linear_kv(s).unflatten(-1, (self.no_heads, -1)).split(self.c_hidden, dim=-1)
            points += self.linear_kv_points(s, r).split([self.no_qk_points, self.no_v_points], dim=-2)
        return ipa_attended(self, self, z, r, mask, q, (k, v), points)


class InvariantPointAttention(_IPA):
    """OpenFold 2's, the multimer's too."""

    def __init__(self, is_multimer: bool = False, **sizes: Any) -> None:
        super().__init__(is_multimer=is_multimer, **sizes)
        self.is_multimer = is_multimer
        self.softmax, self.softplus = nn.Softmax(dim=-1), nn.Softplus()


class InvariantPointAttentionMultimer(_IPA):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(is_multimer=True, **sizes)
        self.softmax = nn.Softmax(dim=-2)


class EsmFoldInvariantPointAttention(nn.Module):
    """ESMFold's: points by linear layers, other names, inf and eps in a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(inf=1e5, epsilon=1e-8)
        self.hidden_dim, self.num_heads, self.num_qk_points, self.num_v_points = 5, 3, 4, 6
        self.linear_q, self.linear_kv = nn.Linear(24, 15), nn.Linear(24, 30)
        self.linear_q_points, self.linear_kv_points = nn.Linear(24, 36), nn.Linear(24, 90)
        self.linear_b, self.head_weights = nn.Linear(16, 3), nn.Parameter(torch.full((3,), 0.54))
        self.linear_out = nn.Linear(3 * (16 + 5 + 24), 24)
        self.softmax, self.softplus = nn.Softmax(dim=-1), nn.Softplus()

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        r: Any,
        mask: Tensor,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        def points(flat: Tensor) -> Tensor:
            return r[..., None].apply(torch.stack(flat.chunk(3, dim=-1), dim=-1)).unflatten(-2, (3, -1))

        q = self.linear_q(s).unflatten(-1, (3, -1))
        k, v = self.linear_kv(s).unflatten(-1, (3, -1)).split(5, dim=-1)
        q_points, kv_points = points(self.linear_q_points(s)), points(self.linear_kv_points(s))
        sizes = SimpleNamespace(inf=self.config.inf, eps=self.config.epsilon)
        return ipa_attended(self, sizes, z, r, mask, q, (k, v), [q_points, *kv_points.split([4, 6], dim=-2)])


# ----------------------------------------------------------------------------------------------- triangle operations


class Attention(nn.Module):
    def __init__(self, c_in: int, c_hidden: int, no_heads: int, bias: bool) -> None:
        super().__init__()
        self.c_hidden, self.no_heads = c_hidden, no_heads
        for name in "qkv":
            setattr(self, f"linear_{name}", Linear(c_in, c_hidden * no_heads, bias=False))
        self.linear_o = Linear(c_hidden * no_heads, c_in, bias=bias)
        self.linear_g = Linear(c_in, c_hidden * no_heads, bias=bias)
        self.sigmoid = nn.Sigmoid()


def triangle_attended(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Supplementary Algorithms 13 and 14."""
    mask = x.new_ones(x.shape[:-1]) if mask is None else mask
    if not layer.starting:
        x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
    x, mha = layer.layer_norm(x), layer.mha
    q, k, v = (
        project(x).unflatten(-1, (mha.no_heads, -1)).transpose(-2, -3)
        for project in (mha.linear_q, mha.linear_k, mha.linear_v)
    )
    logits = q @ k.transpose(-1, -2) / math.sqrt(mha.c_hidden)
    logits = logits + (layer.inf * (mask - 1))[..., :, None, None, :] + layer.linear(x).movedim(-1, -3).unsqueeze(-4)
    out = (logits.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
    out = mha.linear_o(out * mha.sigmoid(mha.linear_g(x)))
    return out if layer.starting else out.transpose(-2, -3)


class _TriangleAttention(nn.Module):
    def __init__(
        self, c_in: int = 12, c_hidden: int = 4, no_heads: int = 3, starting: bool = True, inf: float = 1e9
    ) -> None:
        super().__init__()
        self.c_in, self.c_hidden, self.no_heads, self.starting, self.inf = c_in, c_hidden, no_heads, starting, inf
        self.layer_norm = LayerNorm(c_in)
        self.linear = Linear(c_in, no_heads, bias=False)
        self.mha = Attention(c_in, c_hidden, no_heads, bias=self.bias)

    bias = True


class TriangleAttention(_TriangleAttention):
    """OpenFold 2's."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
        use_memory_efficient_kernel: bool = False,
        use_deepspeed_evo_attention: bool = False,
        use_lma: bool = False,
        inplace_safe: bool = False,
    ) -> Tensor:
        return triangle_attended(self, x, mask)


class EsmFoldTriangleAttention(_TriangleAttention):
    """ESMFold's, and OpenFold 1's."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
        use_memory_efficient_kernel: bool = False,
        use_lma: bool = False,
        inplace_safe: bool = False,
    ) -> Tensor:
        return triangle_attended(self, x, mask)


class _TriangleMultiplication(nn.Module):
    def __init__(self, outgoing: bool, c_z: int = 12, c_hidden: int = 10, fused: bool = False) -> None:
        super().__init__()
        self.c_z, self.c_hidden, self._outgoing = c_z, c_hidden, outgoing
        self.linear_g, self.linear_z = Linear(c_z, c_z), Linear(c_hidden, c_z)
        self.layer_norm_in, self.layer_norm_out = LayerNorm(c_z), LayerNorm(c_hidden)
        for name in ("ab_p", "ab_g") if fused else ("a_p", "a_g", "b_p", "b_g"):
            setattr(self, f"linear_{name}", Linear(c_z, c_hidden * (1 + fused)))
        self.sigmoid = nn.Sigmoid()

    def _update(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Supplementary Algorithms 11 and 12."""
        mask = z.new_ones(z.shape[:-1]) if mask is None else mask
        x = self.layer_norm_in(z)
        if hasattr(self, "linear_ab_p"):
            a, b = (mask[..., None] * self.linear_ab_g(x).sigmoid() * self.linear_ab_p(x)).chunk(2, dim=-1)
        else:
            a = mask[..., None] * self.linear_a_g(x).sigmoid() * self.linear_a_p(x)
            b = mask[..., None] * self.linear_b_g(x).sigmoid() * self.linear_b_p(x)
        sums = "...ikc,...jkc->...ijc" if self._outgoing else "...kic,...kjc->...ijc"
        out: Tensor = self.linear_z(self.layer_norm_out(torch.einsum(sums, a, b))) * self.linear_g(x).sigmoid()
        return out

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        update = self._update(z, mask)
        if not inplace_safe:
            return update
        if _add_with_inplace:
            z += update
            return z
        return update if hasattr(self, "linear_ab_p") else z.copy_(update)


class TriangleMultiplicationOutgoing(_TriangleMultiplication):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(outgoing=True, **sizes)


class TriangleMultiplicationIncoming(_TriangleMultiplication):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(outgoing=False, **sizes)


class FusedTriangleMultiplicationOutgoing(_TriangleMultiplication):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(outgoing=True, fused=True, **sizes)


class FusedTriangleMultiplicationIncoming(_TriangleMultiplication):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(outgoing=False, fused=True, **sizes)


class PairTransition(nn.Module):
    def __init__(self, c_z: int = 12, n: int = 4) -> None:
        super().__init__()
        self.c_z, self.n = c_z, n
        self.layer_norm = LayerNorm(c_z)
        self.linear_1, self.relu, self.linear_2 = Linear(c_z, n * c_z), nn.ReLU(), Linear(n * c_z, c_z)

    def forward(self, z: Tensor, mask: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
        mask = z.new_ones(z.shape[:-1]) if mask is None else mask
        out: Tensor = self.linear_2(self.relu(self.linear_1(self.layer_norm(z)))) * mask[..., None]
        return out


class PairStack(nn.Module):
    """The Evoformer's pair stack: with gradients off it works in place, and `tri_att_end` gets z transposed."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.tri_mul_out = FusedTriangleMultiplicationOutgoing() if fused else TriangleMultiplicationOutgoing()
        self.tri_mul_in = FusedTriangleMultiplicationIncoming() if fused else TriangleMultiplicationIncoming()
        self.tri_att_start, self.tri_att_end = TriangleAttention(), TriangleAttention()
        self.pair_transition = PairTransition()

    def forward(self, z: Tensor, mask: Tensor, chunk_size: int | None = None) -> Tensor:
        inplace = not torch.is_grad_enabled()
        for multiply in (self.tri_mul_out, self.tri_mul_in):
            update = multiply(z, mask=mask, inplace_safe=inplace, _add_with_inplace=True)
            z = update if inplace else z + update
        z = z + self.tri_att_start(z, mask=mask, chunk_size=chunk_size, use_lma=True, inplace_safe=inplace)
        z = z.transpose(-2, -3)
        z = z + self.tri_att_end(z, mask=mask.transpose(-1, -2), chunk_size=chunk_size, inplace_safe=inplace)
        z = z.transpose(-2, -3)
        out: Tensor = z + self.pair_transition(z, mask=mask, chunk_size=chunk_size)
        return out
