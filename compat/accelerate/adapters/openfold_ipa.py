"""Invariant point attention of OpenFold and of those who have copied it: no `down_z`, the pair values stay cz wide.

Jumper et al. 2021, Supplementary Algorithm 22. Three sets of parameters are one function: points projected by a
submodule (OpenFold 2), by a linear layer (OpenFold 1, RhoFold, ESMFold), and the multimer's, whose keys and values are
apart and without bias, with the heads outermost in its points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....modules.invariant_point_attention import attend_over_pairs
from ....modules.rigid import Rigid
from ..checks import class_among, require_children, require_exactly, require_parameters, require_signature
from ..frames import example_frames
from ..recognition import Adapter, Declined, Example, Forward, Recognised
from ..replacement import original_forward
from ._openfold import HALF, in_float16, require_linears, require_mask

_OFFLOADED = "with _offload_inference its own forward runs"
_ARGUMENTS = "s z r mask inplace_safe= _offload_inference= _z_reference_list="
#: The multimer's class clamps the squared norm of a point at this, where the others add eps to it: in float32 the same.
_MULTIMER_EPS = 1e-16


class OpenFoldIPA(Adapter):
    """`InvariantPointAttention` without `down_z`, and `InvariantPointAttentionMultimer`."""

    title = "invariant point attention"
    operations = ("invariant_point_attention",)
    classes = ("InvariantPointAttention", "InvariantPointAttentionMultimer", "EsmFoldInvariantPointAttention")
    projects = ("OpenFold", "RhoFold", "ESMFold of Hugging Face")
    parameters = (
        "linear_q.weight",
        "linear_q_points.linear.weight",
        "linear_b.weight",
        "head_weights",
        "linear_out.weight",
    )

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        if hasattr(module, "down_z"):
            raise Declined("it has a down_z")
        size = _sizes(module)
        layer: Any = module
        require_mask(getattr(layer, "inf", getattr(getattr(layer, "config", None), "inf", None)))
        require_linears(module, ("linear_q", "linear_b"))
        cs, cz = layer.linear_q.in_features, layer.linear_b.in_features
        hc = size.heads * size.hidden
        multimer = hasattr(module, "linear_k")
        name = type(module).__name__
        if getattr(module, "is_multimer", multimer) != multimer or (name.endswith("Multimer") and not multimer):
            raise Declined("whether it is the multimer's cannot be told: its parameters and its attributes differ")
        plain = {"linear_b": (size.heads, cz), "linear_out": (cs, size.heads * (cz + size.hidden + 4 * size.pv))}
        points = {"linear_q_points": size.p}
        if multimer:
            points |= {"linear_k_points": size.p, "linear_v_points": size.pv}
        else:
            plain |= {"linear_q": (hc, cs), "linear_kv": (2 * hc, cs)}
            points |= {"linear_kv_points": size.p + size.pv}
        inside = ".linear" if hasattr(layer.linear_q_points, "linear") else ""
        if multimer and not inside:
            raise Declined("it has the multimer's keys, but not its points")
        plain |= {key + inside: (3 * size.heads * count, cs) for key, count in points.items()}
        shapes: dict[str, tuple[int, ...]] = {"head_weights": (size.heads,)}
        for key, shape in plain.items():
            shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
        without_bias = ("linear_q", "linear_k", "linear_v") if multimer else ()
        shapes |= {f"{key}.weight": (hc, cs) for key in without_bias}
        require_parameters(module, shapes)
        for key in points if inside else ():
            self._require_points(module, key, size, points[key], multimer)
        require_linears(module, [key for key in (*plain, *without_bias) if not key.endswith(".linear")])
        require_children(module, {key.partition(".")[0] for key in (*plain, *without_bias)} | {"softmax", "softplus"})
        require_exactly(module, softmax=nn.Softmax, **({} if name.endswith("Multimer") else {"softplus": nn.Softplus}))
        forms: dict[str, tuple[str, Forward]] = {
            _ARGUMENTS: ("OpenFold, multimer" if multimer else "OpenFold 2" if inside else "OpenFold 1", openfold),
            _ARGUMENTS.replace(" inplace_safe=", ""): ("RhoFold, ESMFold", copied),
        }
        form, forward = forms[require_signature(module, *forms)]
        calls = tuple(key for key in (*plain, *without_bias) if key != "linear_b")
        return Recognised(form, forward, uses, (_OFFLOADED, HALF), calls=calls)

    @staticmethod
    def _require_points(module: nn.Module, key: str, size: _Sizes, count: int, multimer: bool) -> None:
        projection: Any = module.get_submodule(key)
        found = (
            type(projection).__name__,
            getattr(projection, "no_heads", None),
            getattr(projection, "num_points", None),
            getattr(projection, "is_multimer", None),
            getattr(projection, "return_local_points", None),
        )
        if found != ("PointProjection", size.heads, count, multimer, False):
            raise Declined(f"its {key} is no PointProjection of {size.heads} heads and {count} points as it should be")
        if not isinstance(projection.linear, nn.Linear):
            raise Declined(f"its {key}.linear is a {type(projection.linear).__name__}, no Linear")

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        batch, length = 2, 17
        s = torch.randn(batch, length, layer.linear_q.in_features, generator=generator)
        z = torch.randn(batch, length, length, layer.linear_b.in_features, generator=generator)
        mask = torch.ones(batch, length)
        mask[0, -3:] = 0.0
        frames = example_frames(batch, length, generator)
        return Example(
            args=(s, z, frames, mask),
            compare=lambda out: {"s": out[mask.to(out.device) > 0.5]},
            leaves={"s": s, "z": z, "frames' rotations": frames.rotmats, "frames' translations": frames.trans},
        )


class _Sizes(NamedTuple):
    """The layer's sizes and its epsilon."""

    heads: int
    hidden: int
    p: int
    pv: int
    eps: float


def _sizes(layer: Any) -> _Sizes:
    """Under OpenFold's names, or under Hugging Face's."""
    eps = getattr(layer, "eps", getattr(getattr(layer, "config", None), "epsilon", None))
    if not isinstance(eps, float):
        raise Declined("it has no number eps")
    return _Sizes(
        heads=_size(layer, "no_heads", "num_heads"),
        hidden=_size(layer, "c_hidden", "hidden_dim"),
        p=_size(layer, "no_qk_points", "num_qk_points"),
        pv=_size(layer, "no_v_points", "num_v_points"),
        eps=eps,
    )


def _size(layer: Any, *names: str) -> int:
    found = [getattr(layer, name) for name in names if hasattr(layer, name)]
    if len(found) != 1 or not isinstance(found[0], int) or isinstance(found[0], bool):
        raise Declined(f"it has no whole number {names[0]}")
    return found[0]


class _Layer(NamedTuple):
    """The layer as `attend_over_pairs` asks for it: the multimer's keys, values and points in the others' order."""

    original: Any
    no_heads: int
    c_hidden: int
    no_qk_points: int
    no_v_points: int
    eps: float
    down_z: None = None

    @property
    def c_s(self) -> int:
        return int(self.original.linear_q.in_features)

    @property
    def c_z(self) -> int:
        return int(self.original.linear_b.in_features)

    @property
    def head_weights(self) -> Tensor:
        weights: Tensor = self.original.head_weights
        return weights

    @property
    def linear_b(self) -> Any:
        return self.original.linear_b

    @property
    def kernel_config(self) -> str:
        return str(self.original.kernel_config)

    def linear_q(self, s: Tensor) -> Tensor:
        out: Tensor = self.original.linear_q(s)
        return out

    def linear_out(self, features: Tensor) -> Tensor:
        out: Tensor = self.original.linear_out(features)
        return out

    def linear_kv(self, s: Tensor) -> Tensor:
        if hasattr(self.original, "linear_kv"):
            kv: Tensor = self.original.linear_kv(s)
            return kv
        k, v = (
            layer(s).unflatten(-1, (self.no_heads, -1)) for layer in (self.original.linear_k, self.original.linear_v)
        )
        return torch.cat([k, v], dim=-1).flatten(-2)

    def linear_q_points(self, s: Tensor) -> Tensor:
        return self._points(s, "linear_q_points").flatten(-3)

    def linear_kv_points(self, s: Tensor) -> Tensor:
        if hasattr(self.original, "linear_kv_points"):
            return self._points(s, "linear_kv_points").flatten(-3)
        parts = [self._points(s, "linear_k_points"), self._points(s, "linear_v_points")]
        return torch.cat(parts, dim=-1).flatten(-3)

    def _points(self, s: Tensor, name: str) -> Tensor:
        """Local points [..., xyz, heads, points]."""
        projection = getattr(self.original, name)
        flat: Tensor = getattr(projection, "linear", projection)(s)
        if hasattr(self.original, "linear_k"):  # the multimer's heads are outermost
            return flat.unflatten(-1, (self.no_heads, 3, -1)).transpose(-2, -3)
        return flat.unflatten(-1, (3, self.no_heads, -1))


def uses(layer: Any) -> list[Use]:
    """IPA, at the layer's sizes."""
    size = _sizes(layer)
    dims = {"h": size.heads, "c": size.hidden, "p": size.p, "pv": size.pv, "cz": layer.linear_b.in_features}
    return [Use("invariant_point_attention", dims)]


def openfold(
    self: Any,
    s: Tensor,
    z: Tensor | None,
    r: Any,
    mask: Tensor,
    inplace_safe: bool = False,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """OpenFold's forward. Nothing that is given is changed, whatever inplace_safe says."""
    if _offload_inference or z is None or in_float16(s):
        out: Tensor = original_forward(self)(self, s, z, r, mask, inplace_safe, _offload_inference, _z_reference_list)
        return out
    return _attend(self, s, z, r, mask)


def copied(
    self: Any,
    s: Tensor,
    z: Tensor | None,
    r: Any,
    mask: Tensor,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """RhoFold's and ESMFold's forward."""
    if _offload_inference or z is None or in_float16(s):
        out: Tensor = original_forward(self)(self, s, z, r, mask, _offload_inference, _z_reference_list)
        return out
    return _attend(self, s, z, r, mask)


def _attend(layer: Any, s: Tensor, z: Tensor, r: Any, mask: Tensor) -> Tensor:
    """What all forms compute. The originals broadcast a batch axis of one, so that is done here, too."""
    size = _sizes(layer)
    if class_among(layer, ("InvariantPointAttentionMultimer",)):
        size = size._replace(eps=_MULTIMER_EPS)
    lead = s.shape[:-1]
    if hasattr(r, "rotation"):  # the multimer's Rigid3Array
        rotmats, trans = r.rotation.to_tensor(), r.translation.to_tensor()
    else:
        rotmats, trans = r.get_rots().get_rot_mats(), r.get_trans()
    frames = Rigid(rotmats.expand(*lead, 3, 3), trans.expand(*lead, 3))
    pairs = z.expand(*lead, lead[-1], z.shape[-1])
    return attend_over_pairs(_Layer(layer, *size), s, pairs, frames, mask.expand(lead)).to(z.dtype)


ADAPTER = OpenFoldIPA()
