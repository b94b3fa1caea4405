"""Invariant point attention of the FrameDiff lineage: with `down_z`, in nanometres, keys and values in one layer.

Jumper et al. 2021, Supplementary Algorithm 22, as FrameDiff (Yim et al. 2023) changed it. The forms differ in their
arguments alone; FoldFlow's and FrameDiff's carry a `linear_rbf` that nothing reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....modules.invariant_point_attention import attend_over_pairs, pair_attention_use
from ....modules.rigid import Rigid
from ..checks import (
    require_exactly,
    require_linear,
    require_parameters,
    require_signature,
    whole_numbers,
)
from ..frames import example_frames
from ..recognition import Adapter, Declined, Example, Recognised
from ..replacement import original_forward

_SIZES = ("c_s", "c_z", "c_hidden", "no_heads", "no_qk_points", "no_v_points")
_OFFLOADED = "with _offload_inference its own forward runs"
_DROPPED = "in training its own forward runs, for its dropout drops the mask's terms too"


class MultiflowIPA(Adapter):
    """`InvariantPointAttention` as Multiflow, FrameFlow, FrameDiff and their relatives have it."""

    title = "invariant point attention with down_z"
    operations = ("invariant_point_attention",)
    classes = ("InvariantPointAttention",)
    projects = ("Multiflow", "FrameFlow", "FrameDiff", "FoldFlow", "RNA-FrameFlow", "cogeneration", "FlashIPA")
    parameters = (
        "linear_q.weight",
        "linear_kv.weight",
        "linear_q_points.weight",
        "linear_kv_points.weight",
        "linear_b.weight",
        "down_z.weight",
        "head_weights",
        "linear_out.weight",
    )

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, *_SIZES)
        heads, hidden, cs, cz = size["no_heads"], size["c_hidden"], size["c_s"], size["c_z"]
        layers = {
            "linear_q": (heads * hidden, cs),
            "linear_kv": (2 * heads * hidden, cs),
            "linear_q_points": (3 * heads * size["no_qk_points"], cs),
            "linear_kv_points": (3 * heads * (size["no_qk_points"] + size["no_v_points"]), cs),
            "linear_b": (heads, cz),
            "down_z": (cz // 4, cz),
            "linear_out": (cs, heads * (cz // 4 + hidden + 4 * size["no_v_points"])),
        }
        shapes: dict[str, tuple[int, ...]] = {"head_weights": (heads,)}
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        require_parameters(module, shapes, {"linear_rbf.weight": (1, 20), "linear_rbf.bias": (1,)})
        require_linear(module, *layers)
        require_exactly(module, softmax=nn.Softmax, softplus=nn.Softplus)
        if not isinstance(getattr(module, "eps", None), float):
            raise Declined("it has no number eps")
        calls = tuple(name for name in layers if name not in ("linear_b", "down_z"))
        taken = require_signature(
            module,
            "s z r mask attention_mask= _offload_inference= _z_reference_list=",
            "s z r mask _offload_inference= _z_reference_list=",
            "s z z_factor_1 z_factor_2 r mask _offload_inference= _z_reference_list=",
        )
        if "z_factor_1" in taken:
            if getattr(module, "use_flash_attn", True):
                raise Declined("its flash path reads z as two factors, which is another function")
            without_z = (_OFFLOADED, "without z it runs, too")
            return Recognised("FlashIPA's slow path", ipa_with_factors, uses, without_z, calls=calls)
        if "attention_mask=" in taken:
            dropout = getattr(module, "dropout_prob", None)
            if not isinstance(dropout, int | float):
                raise Declined("it has no number dropout_prob")
            notes = (_OFFLOADED, *[_DROPPED] * (dropout > 0))
            return Recognised("Multiflow", ipa_with_attention_mask, uses, notes, calls=calls)
        if hasattr(module, "dropout_prob"):
            raise Declined("it has a dropout_prob, which this form of it does not read")
        form = "FoldFlow, FrameDiff" if hasattr(module, "linear_rbf") else "FrameFlow"
        return Recognised(form, ipa_without_attention_mask, uses, (_OFFLOADED,), calls=(*calls, "linear_rbf"))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        batch, length = 2, 17
        s = torch.randn(batch, length, layer.c_s, generator=generator)
        z = torch.randn(batch, length, length, layer.c_z, generator=generator)
        mask = torch.ones(batch, length)
        mask[0, -3:] = 0.0
        frames = example_frames(batch, length, generator)
        factors = (None, None) if hasattr(module, "use_flash_attn") else ()
        return Example(
            args=(s, z, *factors, frames, mask),
            compare=lambda out: {"s": out[mask.to(out.device) > 0.5]},
            leaves={"s": s, "z": z, "frames' rotations": frames.rotmats, "frames' translations": frames.trans},
        )


def uses(layer: Any) -> list[Use]:
    """IPA, at the layer's sizes."""
    return [pair_attention_use(layer)]


def ipa_with_attention_mask(
    self: Any,
    s: Tensor,
    z: Tensor | None,
    r: Any,
    mask: Tensor,
    attention_mask: Tensor | None = None,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """Multiflow's forward."""
    if _offload_inference or z is None or (self.training and self.dropout_prob > 0):
        out: Tensor = original_forward(self)(self, s, z, r, mask, attention_mask, _offload_inference, _z_reference_list)
        return out
    return _attend(self, s, z, r, mask, attention_mask)


def ipa_without_attention_mask(
    self: Any,
    s: Tensor,
    z: Tensor | None,
    r: Any,
    mask: Tensor,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """The forward of FrameFlow, FrameDiff, FoldFlow and RNA-FrameFlow."""
    if _offload_inference or z is None:
        out: Tensor = original_forward(self)(self, s, z, r, mask, _offload_inference, _z_reference_list)
        return out
    return _attend(self, s, z, r, mask)


def ipa_with_factors(
    self: Any,
    s: Tensor,
    z: Tensor | None,
    z_factor_1: Tensor | None,
    z_factor_2: Tensor | None,
    r: Any,
    mask: Tensor,
    _offload_inference: bool = False,
    _z_reference_list: Any = None,
) -> Tensor:
    """The forward of FlashIPA's layer where it does not use flash attention: the factors are not read."""
    if _offload_inference or z is None or self.use_flash_attn:
        out: Tensor = original_forward(self)(
            self, s, z, z_factor_1, z_factor_2, r, mask, _offload_inference, _z_reference_list
        )
        return out
    return _attend(self, s, z, r, mask)


def _attend(layer: Any, s: Tensor, z: Tensor, r: Any, mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What all forms compute. The originals broadcast a batch axis of one, so that is done here, too."""
    lead, n = s.shape[:-2], s.shape[-2]
    pairs = None if attention_mask is None else attention_mask.expand(*lead, n, n)
    z, mask = z.expand(*lead, n, n, z.shape[-1]), mask.expand(*lead, n)
    return attend_over_pairs(layer, s, z, _spread(Rigid.of(r), s), mask, pairs)


def _spread(frames: Rigid, s: Tensor) -> Rigid:
    """The frames with all batch axes of `s`."""
    lead = s.shape[:-1]
    return Rigid(frames.get_rot_mats().expand(*lead, 3, 3), frames.get_trans().expand(*lead, 3))


ADAPTER = MultiflowIPA()
