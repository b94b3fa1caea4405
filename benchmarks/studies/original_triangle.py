"""The baseline for triangle operations: Boltz's unchunked modules in plain PyTorch, in their order of operations.

Our own code, written from the published algorithms (AlphaFold 2, Jumper et al. 2021, Supplementary Algorithms 11 to 14;
AlphaFold 3, Abramson et al. 2024, Supplementary Algorithm 24). It exists to be *measured against*, so it keeps what the
originals pay for: all logits at once, masks as large negative numbers that are added, LayerNorms over whole pair
tensors, and heads and channels moved about by `permute`. The maths is told in `kernels/<operation>/reference.py`.

Weights come as dictionaries with Boltz's parameter names. Masks are float, 1 = takes part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def _norm(x: Tensor, w: Weights, name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def triangle_attention(
    x: Tensor, mask: Tensor, w: Weights, *, ending: bool = False, inf: float = 1e9, chunk: int | None = None
) -> Tensor:
    """The update of x [b, n, n, c] under mask [b, n, n] by Algorithm 13, or 14 if `ending`.

    With `chunk`, that many rows at a time pass from the projections to the last layer, as Boltz does in evaluation.
    """
    if ending:
        x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
    x = _norm(x, w, "layer_norm")
    mask_bias = (inf * (mask - 1))[..., :, None, None, :]
    triangle_bias = _linear(x, w, "linear").permute(0, 3, 1, 2).unsqueeze(-4)
    if chunk is None:
        out = _attention(x, mask_bias, triangle_bias, w)
    else:
        starts = range(0, x.shape[1], chunk)
        rows = [_attention(x[:, i : i + chunk], mask_bias[:, i : i + chunk], triangle_bias, w) for i in starts]
        out = torch.cat(rows, 1)
    return out.transpose(-2, -3) if ending else out


def _attention(x: Tensor, mask_bias: Tensor, triangle_bias: Tensor, w: Weights) -> Tensor:
    """Gated attention along the last axis of nodes, under both biases."""
    heads = w["linear.weight"].shape[0]
    q, k, v = (
        _linear(x, w, f"mha.linear_{name}").unflatten(-1, (heads, -1)).transpose(-2, -3) for name in ("q", "k", "v")
    )
    q = q / q.shape[-1] ** 0.5
    logits = torch.matmul(q, k.transpose(-1, -2))
    logits += mask_bias
    logits += triangle_bias
    out = torch.matmul(torch.softmax(logits, -1), v).transpose(-2, -3)
    gate = torch.sigmoid(_linear(x, w, "mha.linear_g")).unflatten(-1, (heads, -1))
    return _linear((out * gate).flatten(-2), w, "mha.linear_o")


def triangle_multiplication(x: Tensor, mask: Tensor, w: Weights, *, incoming: bool = False) -> Tensor:
    """The update of x [b, n, n, c] under mask [b, n, n] by Algorithm 11, or 12 if `incoming`."""
    x = _norm(x, w, "norm_in")
    given = x
    x = _linear(x, w, "p_in") * _linear(x, w, "g_in").sigmoid()
    x = x * mask.unsqueeze(-1)
    a, b = torch.chunk(x.float() if x.dtype is not torch.float64 else x, 2, dim=-1)
    x = torch.einsum("bkid,bkjd->bijd" if incoming else "bikd,bjkd->bijd", a, b)
    return _linear(_norm(x, w, "norm_out"), w, "p_out") * _linear(given, w, "g_out").sigmoid()


def attention_pair_bias(
    s: Tensor, z: Tensor, mask: Tensor, w: Weights, *, heads: int, k_in: Tensor | None = None, inf: float = 1e6
) -> Tensor:
    """The update of s [b, n, c] under mask [b, n] with the pair tensor z [b, n, m, cz]."""
    if "norm_s.weight" in w:
        s = _norm(s, w, "norm_s")
    keys = s if k_in is None else k_in
    q = _linear(s, w, "proj_q").unflatten(-1, (heads, -1))
    k, v = (_linear(keys, w, name).unflatten(-1, (heads, -1)) for name in ("proj_k", "proj_v"))
    bias = _linear(_norm(z, w, "proj_z.0"), w, "proj_z.1").permute(0, 3, 1, 2)
    gate = _linear(s, w, "proj_g").sigmoid()
    logits = torch.einsum("bihd,bjhd->bhij", q, k)
    logits = logits / q.shape[-1] ** 0.5 + bias
    logits = logits + (1 - mask[:, None, None]) * -inf
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(-2)
    return _linear(gate * out, w, "proj_o")


def transition(x: Tensor, w: Weights) -> Tensor:
    """The gated perceptron of Abramson et al. 2024, Supplementary Algorithm 11."""
    x = _norm(x, w, "norm")
    return _linear(F.silu(_linear(x, w, "fc1")) * _linear(x, w, "fc2"), w, "fc3")


def pairformer_layer(
    s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor, w: Weights, *, heads: int
) -> tuple[Tensor, Tensor]:
    """Boltz-2's layer (Abramson et al. 2024, Supplementary Algorithm 17) without dropout."""

    def part(name: str) -> Weights:
        return {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}

    z = z + triangle_multiplication(z, pair_mask, part("tri_mul_out"))
    z = z + triangle_multiplication(z, pair_mask, part("tri_mul_in"), incoming=True)
    z = z + triangle_attention(z, pair_mask, part("tri_att_start"))
    z = z + triangle_attention(z, pair_mask, part("tri_att_end"), ending=True)
    z = z + transition(z, part("transition_z"))
    normed = _norm(s, w, "pre_norm_s")
    s = s + attention_pair_bias(normed, z, mask, part("attention"), heads=heads, k_in=normed)
    return s + transition(s, part("transition_s")), z
