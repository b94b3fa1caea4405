"""Triangle attention of OpenFold, and of Boltz, RhoFold, Genie and Hugging Face's ESMFold, which have copied it.

Jumper et al. 2021, Supplementary Algorithms 13 and 14. Which of the two it is stands in `starting` alone: OpenFold's
`tri_att_end` says True, and its parent transposes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....kernels.triangle_attention_update import Weights, triangle_attention_update
from ..checks import require_children, require_exactly, require_parameters, require_signature, whole_numbers
from ..recognition import Adapter, Declined, Example, Forward, Recognised
from ..replacement import original_forward
from ._openfold import HALF, in_float16, require_linears, require_mask, require_norms
from ._pairs import is_square, pair_example, squares

_LINEARS = ("linear", "mha.linear_q", "mha.linear_k", "mha.linear_v", "mha.linear_g", "mha.linear_o")
_NAMED = "with use_memory_efficient_kernel or use_deepspeed_evo_attention its own forward runs"
_CHOSEN = "the configuration chooses the kernel, whatever {} says"


class TriangleAttention(Adapter):
    """`TriangleAttention` and its two names."""

    title = "triangle attention"
    operations = ("triangle_attention_update", "triangle_attention")
    classes = (
        "TriangleAttention",
        "TriangleAttentionStartingNode",
        "TriangleAttentionEndingNode",
        "EsmFoldTriangleAttention",
    )
    projects = ("OpenFold", "Boltz-1", "Boltz-2", "RhoFold", "Genie 2", "ESMFold of Hugging Face")
    parameters = ("layer_norm.weight", *(f"{name}.weight" for name in _LINEARS))

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, "c_in", "c_hidden", "no_heads")
        width, heads = size["c_in"], size["no_heads"]
        inner = heads * size["c_hidden"]
        shapes: dict[str, tuple[int, ...]] = {
            "layer_norm.weight": (width,),
            "layer_norm.bias": (width,),
            "linear.weight": (heads, width),
            **{f"mha.linear_{name}.weight": (inner, width) for name in "qkvg"},
            "mha.linear_o.weight": (width, inner),
        }
        require_parameters(module, shapes, {"mha.linear_g.bias": (inner,), "mha.linear_o.bias": (width,)})
        require_children(module, ("layer_norm", "linear", "mha"))
        require_linears(module, _LINEARS)
        require_norms(module, ("layer_norm",), width)
        require_exactly(module, mha__sigmoid=nn.Sigmoid)
        mha: Any = module.get_submodule("mha")
        if (getattr(mha, "no_heads", None), getattr(mha, "c_hidden", None)) != (heads, size["c_hidden"]):
            raise Declined("its mha has other heads than it says")
        require_mask(getattr(module, "inf", None))
        if not isinstance(getattr(module, "starting", None), bool):
            raise Declined("it does not say whether it is `starting`")
        form, forward, *notes = _FORMS[require_signature(module, *_FORMS)]
        return Recognised(form, forward, uses, (HALF, *notes))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        return pair_example(layer.c_in, generator)


def uses(layer: Any) -> list[Use]:
    """Triangle attention, at the layer's sizes."""
    return [Use("triangle_attention", {"h": layer.no_heads, "d": layer.c_hidden})]


def openfold_2(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    use_memory_efficient_kernel: bool = False,
    use_deepspeed_evo_attention: bool = False,
    use_lma: bool = False,
    inplace_safe: bool = False,
) -> Tensor:
    """OpenFold 2's forward. Rows are streamed whatever chunk_size and use_lma say; x is never changed."""
    if use_memory_efficient_kernel or use_deepspeed_evo_attention or not _served(x):
        out: Tensor = original_forward(self)(
            self, x, mask, chunk_size, use_memory_efficient_kernel, use_deepspeed_evo_attention, use_lma, inplace_safe
        )
        return out
    return _update(self, x, mask)


def openfold_1(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    use_memory_efficient_kernel: bool = False,
    use_lma: bool = False,
    inplace_safe: bool = False,
) -> Tensor:
    """OpenFold 1's forward, and ESMFold's."""
    if use_memory_efficient_kernel or not _served(x):
        out: Tensor = original_forward(self)(
            self, x, mask, chunk_size, use_memory_efficient_kernel, use_lma, inplace_safe
        )
        return out
    return _update(self, x, mask)


def rhofold(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    use_memory_efficient_kernel: bool = False,
    inplace_safe: bool = False,
) -> Tensor:
    """RhoFold's forward."""
    if use_memory_efficient_kernel or not _served(x):
        out: Tensor = original_forward(self)(self, x, mask, chunk_size, use_memory_efficient_kernel, inplace_safe)
        return out
    return _update(self, x, mask)


def vendored(self: Any, x: Tensor, mask: Tensor | None = None, chunk_size: int | None = None) -> Tensor:
    """The forward of OpenFold as other projects keep it."""
    if not _served(x):
        out: Tensor = original_forward(self)(self, x, mask, chunk_size)
        return out
    return _update(self, x, mask)


def genie(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Genie 2's forward."""
    if not _served(x):
        out: Tensor = original_forward(self)(self, x, mask)
        return out
    return _update(self, x, mask)


def boltz(
    self: Any, x: Tensor, mask: Tensor | None = None, chunk_size: int | None = None, use_kernels: bool = False
) -> Tensor:
    """The forward of Boltz from 2.1 on. The configuration chooses the kernel, whatever use_kernels says."""
    if not _served(x):
        out: Tensor = original_forward(self)(self, x, mask, chunk_size, use_kernels)
        return out
    return _update(self, x, mask)


def boltz_with_trifast(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    use_memory_efficient_kernel: bool = False,
    use_deepspeed_evo_attention: bool = False,
    use_lma: bool = False,
    use_trifast: bool = False,
    inplace_safe: bool = False,
) -> Tensor:
    """The forward of Boltz 1.0 to 2.0. The configuration chooses the kernel, whatever use_trifast says."""
    if use_memory_efficient_kernel or use_deepspeed_evo_attention or not _served(x):
        out: Tensor = original_forward(self)(
            self,
            x,
            mask,
            chunk_size,
            use_memory_efficient_kernel,
            use_deepspeed_evo_attention,
            use_lma,
            use_trifast,
            inplace_safe,
        )
        return out
    return _update(self, x, mask)


def _served(x: Tensor) -> bool:
    return is_square(x) and not in_float16(x)


def _update(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    z, pairs = squares(x, mask)
    mha = layer.mha
    weights = Weights(
        norm_weight=layer.layer_norm.weight,
        norm_bias=layer.layer_norm.bias,
        bias=layer.linear.weight,
        q=mha.linear_q.weight,
        k=mha.linear_k.weight,
        v=mha.linear_v.weight,
        gate=mha.linear_g.weight,
        out=mha.linear_o.weight,
        gate_bias=mha.linear_g.bias,
        out_bias=mha.linear_o.bias,
    )
    update = triangle_attention_update(
        z, pairs, weights, ending=not layer.starting, eps=layer.layer_norm.eps, config=layer.kernel_config
    )
    return update.reshape(x.shape)


#: By the forward's parameters: the form's name, our forward, and notes.
_FORMS: dict[str, tuple[str, Forward] | tuple[str, Forward, str]] = {
    "x mask= chunk_size= use_memory_efficient_kernel= use_deepspeed_evo_attention= use_lma= inplace_safe=": (
        "OpenFold 2",
        openfold_2,
        _NAMED,
    ),
    "x mask= chunk_size= use_memory_efficient_kernel= use_lma= inplace_safe=": ("OpenFold 1", openfold_1, _NAMED),
    "x mask= chunk_size= use_memory_efficient_kernel= inplace_safe=": ("RhoFold", rhofold, _NAMED),
    "x mask= chunk_size=": ("OpenFold as vendored", vendored),
    "x mask=": ("Genie 2", genie),
    "x mask= chunk_size= use_kernels=": ("Boltz", boltz, _CHOSEN.format("use_kernels")),
    "x mask= chunk_size= use_memory_efficient_kernel= use_deepspeed_evo_attention= use_lma= use_trifast= "
    "inplace_safe=": ("Boltz 1.0 to 2.0", boltz_with_trifast, _CHOSEN.format("use_trifast")),
}

ADAPTER = TriangleAttention()
