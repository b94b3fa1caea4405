"""Attention with pair bias of Boltz-1 and Boltz-2.

Abramson et al. 2024, Supplementary Algorithm 24. One class name, two functions: Boltz-1's normalises s itself and may
keep its bias in a cache, Boltz-2's takes normalised s and what is attended to.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.attention_pair_bias import PairProjection, attention_pair_bias, pair_bias
from ....kernels.dtypes import widest
from ....kernels.registry.binding import Use
from ....modules.masks import boolean
from ..checks import (
    require_children,
    require_layer_norm,
    require_linear,
    require_parameters,
    require_signature,
    whole_numbers,
)
from ..recognition import Adapter, Declined, Example, Recognised
from ..replacement import original_forward
from ._openfold import require_mask

_PROJECTIONS = ("proj_q", "proj_k", "proj_v", "proj_g", "proj_o")
_BOLTZ_1 = "s z mask multiplicity= to_keys= model_cache="
_BOLTZ_2 = "s z mask k_in multiplicity="


class BoltzAttentionPairBias(Adapter):
    """`AttentionPairBias` of Boltz-1 and Boltz-2."""

    title = "attention with pair bias"
    operations = ("attention_pair_bias",)
    classes = ("AttentionPairBias",)
    projects = ("Boltz-1", "Boltz-2")
    parameters = ("proj_q.weight", "proj_k.weight", "proj_v.weight", "proj_g.weight", "proj_o.weight", "proj_q.bias")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, "c_s", "num_heads", "head_dim")
        cs, heads = size["c_s"], size["num_heads"]
        if cs != heads * size["head_dim"]:
            raise Declined(f"{heads} heads of {size['head_dim']} are no {cs} channels")
        require_mask(getattr(module, "inf", None))
        taken = require_signature(module, _BOLTZ_1, _BOLTZ_2)
        layer: Any = module
        projected = isinstance(getattr(layer, "proj_z", None), nn.Sequential)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (cs, cs) for name in _PROJECTIONS}
        shapes["proj_q.bias"] = (cs,)
        if projected:
            require_linear(module, "proj_z.1")
            cz = layer.proj_z[1].in_features
            require_layer_norm(module, "proj_z.0", cz)
            shapes |= {"proj_z.0.weight": (cz,), "proj_z.0.bias": (cz,), "proj_z.1.weight": (heads, cz)}
        own_norm = taken == _BOLTZ_1 and getattr(layer, "initial_norm", None) is True
        if own_norm:
            require_layer_norm(module, "norm_s", cs)
            shapes |= {"norm_s.weight": (cs,), "norm_s.bias": (cs,)}
        require_parameters(module, shapes)
        require_linear(module, *_PROJECTIONS)
        require_children(module, (*_PROJECTIONS, "proj_z", *["norm_s"] * own_norm))
        rearranged = layer.proj_z[2:] if projected else [layer.proj_z]
        if [getattr(part, "pattern", None) for part in rearranged] != ["b ... h -> b h ..."]:
            raise Declined("its proj_z does not end in the heads' move to the front")
        if taken == _BOLTZ_1:
            if not projected or not isinstance(getattr(layer, "initial_norm", None), bool):
                raise Declined("it takes Boltz-1's arguments, but lacks its proj_z or initial_norm")
            return Recognised("Boltz-1", boltz_1, uses, calls=(*_PROJECTIONS, "norm_s"))
        if getattr(layer, "compute_pair_bias", None) is not projected:
            raise Declined("whether z is a bias cannot be told: compute_pair_bias and proj_z differ")
        form = "Boltz-2" if projected else "Boltz-2, given a bias"
        return Recognised(form, boltz_2, uses, calls=_PROJECTIONS)

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        batch, length, multiplicity = 2, 13, 2
        projected = isinstance(layer.proj_z, nn.Sequential)
        channels = layer.proj_z[1].in_features if projected else layer.num_heads
        s = torch.randn(batch * multiplicity, length, layer.c_s, generator=generator)
        z = torch.randn(batch, length, length, channels, generator=generator)
        mask = torch.ones(batch * multiplicity, length)
        mask[0, -3:] = 0.0
        keys = () if hasattr(layer, "initial_norm") else (s,)
        return Example(
            args=(s, z, mask, *keys, multiplicity),
            compare=lambda out: {"update": out[mask.to(out.device) > 0.5]},
            leaves={"s": s, "z": z},
        )


def uses(layer: Any) -> list[Use]:
    """Attention with a pair bias, at the layer's sizes."""
    return [Use("attention_pair_bias", {"h": layer.num_heads, "d": layer.head_dim})]


def boltz_1(
    self: Any,
    s: Tensor,
    z: Tensor,
    mask: Tensor,
    multiplicity: int = 1,
    to_keys: Callable[[Tensor], Tensor] | None = None,
    model_cache: MutableMapping[str, Tensor] | None = None,
) -> Tensor:
    """Boltz-1's forward. The cache holds what the original would put into it."""
    if self.initial_norm:
        s = self.norm_s(s)
    k_in = s
    if to_keys is not None:
        k_in, mask = to_keys(s), to_keys(mask.unsqueeze(-1)).squeeze(-1)
    if model_cache is None and z.ndim == 4:
        return _attend(self, s, k_in, mask, multiplicity, z=z)
    bias = model_cache.get("z") if model_cache is not None else None
    if bias is None:
        bias = _bias(self, z)
        if model_cache is not None:
            model_cache["z"] = bias
    return _attend(self, s, k_in, mask, multiplicity, bias=bias)


def boltz_2(self: Any, s: Tensor, z: Tensor, mask: Tensor, k_in: Tensor, multiplicity: int = 1) -> Tensor:
    """Boltz-2's forward; without `compute_pair_bias` z is the bias itself."""
    if z.ndim != 4 or mask.ndim != 2:
        out: Tensor = original_forward(self)(self, s, z, mask, k_in, multiplicity)
        return out
    if self.compute_pair_bias:
        return _attend(self, s, k_in, mask, multiplicity, z=z)
    return _attend(self, s, k_in, mask, multiplicity, bias=z.permute(0, 3, 1, 2))


def _projection(layer: Any) -> PairProjection:
    norm, linear = layer.proj_z[0], layer.proj_z[1]
    return PairProjection(norm.weight, norm.bias, linear.weight, norm.eps)


def _bias(layer: Any, z: Tensor) -> Tensor:
    """The bias [b, h, n, m]."""
    if torch.is_grad_enabled() or z.ndim != 4:  # the streamed projection has no second derivative
        bias: Tensor = layer.proj_z(z)
        return bias
    return pair_bias(z, *_projection(layer))


def _attend(
    layer: Any,
    s: Tensor,
    k_in: Tensor,
    mask: Tensor,
    multiplicity: int,
    *,
    bias: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    heads = (layer.num_heads, layer.head_dim)
    q = layer.proj_q(s).unflatten(-1, heads)
    k, v = layer.proj_k(k_in).unflatten(-1, heads), layer.proj_v(k_in).unflatten(-1, heads)
    # An island of float32 under autocast, as in the original, whose weights were trained with it.
    dtype = widest(q)
    with torch.autocast(s.device.type, enabled=False):
        out = attention_pair_bias(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            boolean(mask).expand(s.shape[0], -1),
            bias=bias,
            z=z,
            projection=None if z is None else _projection(layer),
            config=layer.kernel_config,
        )
    update: Tensor = layer.proj_o(layer.proj_g(s).sigmoid() * out.to(v.dtype).flatten(2))
    return update


ADAPTER = BoltzAttentionPairBias()
