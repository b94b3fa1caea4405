"""Edge features of Multiflow and its relatives (Campbell et al. 2024), with distances in Angstrom.

The forms differ in which of the chain and diffuse flags they read, and in what they return. The distogram's edges and
the longest relative position stand in their code alone, so the code is looked at: one relative has another first edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels import edge_features as operation
from ....kernels.registry.binding import Use
from ..autocasting import layer_norm_type
from ..checks import (
    require_children,
    require_constants,
    require_exactly,
    require_layer_norm,
    require_linear,
    require_parameters,
    require_signature,
    whole_numbers,
)
from ..recognition import Adapter, Declined, Example, Forward, Recognised
from ..replacement import original_forward

_MULTIFLOW = "s t sc_t p_mask diffuse_mask chain_idx"
_FRAMEFLOW = "s t sc_t p_mask diffuse_mask"
_RNA_FRAMEFLOW = "s t sc_t p_mask"
_FLASH_IPA = "node_embed translations trans_sc node_mask edge_embed= edge_mask="


class EdgeFeatures(Adapter):
    """`EdgeFeatureNet` of Multiflow and FrameFlow, `EdgeEmbedder` of RNA-FrameFlow and FlashIPA."""

    title = "edge features"
    operations = ("edge_features",)
    classes = ("EdgeFeatureNet", "EdgeEmbedder")
    projects = ("Multiflow", "FrameFlow", "RNA-FrameFlow", "FlashIPA")
    parameters = (
        "linear_s_p.weight",
        "linear_relpos.weight",
        "edge_embedder.0.weight",
        "edge_embedder.2.weight",
        "edge_embedder.4.weight",
        "edge_embedder.5.weight",
    )

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        taken = require_signature(module, _MULTIFLOW, _FRAMEFLOW, _RNA_FRAMEFLOW, _FLASH_IPA)
        form, forward, uses = _FORMS[taken]
        layer: Any = module
        kind: Any = type(module)
        if taken == _FLASH_IPA:
            if getattr(module, "mode", None) != "orig_2d_bias":
                raise Declined(f"its mode is {getattr(module, 'mode', None)!r}; only 'orig_2d_bias' embeds all pairs")
            source = getattr(kind, "fwd_2d", None)
        else:
            source = kind.forward
        relpos = getattr(kind, "embed_relpos", None)
        if source is None or relpos is None:
            raise Declined("it has no method embed_relpos or fwd_2d")
        require_constants(source, operation.MIN_BIN_ANGSTROM, operation.MAX_BIN_ANGSTROM)
        require_constants(relpos, operation.MAX_RELATIVE_POSITION)
        size = whole_numbers(module, "c_s", "c_p", "feat_dim")
        bins = getattr(getattr(module, "_cfg", None), "num_bins", None)
        if not isinstance(bins, int):
            raise Declined("its configuration has no whole number num_bins")
        reads_flags = taken in (_MULTIFLOW, _FRAMEFLOW)
        chain = reads_flags and _flag(module, "embed_chain")
        diffuse = reads_flags and _flag(module, "embed_diffuse_mask")
        if chain and taken == _FRAMEFLOW:
            raise Declined("its configuration says embed_chain, but its forward takes no chains")
        width, share = size["c_p"], size["feat_dim"]
        features = 3 * share + 2 * bins + chain + 2 * diffuse
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in {
            "linear_s_p": (share, size["c_s"]),
            "linear_relpos": (share, share),
            "edge_embedder.0": (width, features),
            "edge_embedder.2": (width, width),
            "edge_embedder.4": (width, width),
        }.items():
            require_linear(module, name)
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        shapes |= {"edge_embedder.5.weight": (width,), "edge_embedder.5.bias": (width,)}
        require_parameters(module, shapes)
        require_exactly(module, edge_embedder=nn.Sequential, edge_embedder__1=nn.ReLU, edge_embedder__3=nn.ReLU)
        require_children(layer.edge_embedder, "012345")
        require_layer_norm(module, "edge_embedder.5", width)
        return Recognised(form, forward, uses, calls=("linear_s_p",))

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        batch, n = 2, 13
        s = torch.randn(batch, n, layer.c_s, generator=generator)
        t, sc_t = (torch.randn(batch, n, 3, generator=generator).mul(3.8).cumsum(1) for _ in range(2))
        mask = torch.ones(batch, n)
        mask[0, -2:] = 0.0
        diffuse = torch.randint(0, 2, (batch, n), generator=generator).float()
        chains = torch.randint(0, 2, (batch, n), generator=generator)
        pairs = mask[:, :, None] * mask[:, None]
        taken = require_signature(module, *_FORMS)
        args = {
            _MULTIFLOW: (s, t, sc_t, pairs, diffuse, chains),
            _FRAMEFLOW: (s, t, sc_t, pairs, diffuse),
            _RNA_FRAMEFLOW: (s, t, sc_t, pairs),
            _FLASH_IPA: (s, t, sc_t, mask),
        }[taken]
        return Example(
            args=args,
            compare=lambda out: {"edges": out[0] if isinstance(out, tuple) else out},
            leaves={"s": s},
        )


def _flag(layer: Any, name: str) -> bool:
    return bool(getattr(getattr(layer, "_cfg", None), name, False))


def uses_with_flags(layer: Any) -> list[Use]:
    """Edge features of a form that reads the flags which its configuration names."""
    return _uses(layer, [("chain", _flag(layer, "embed_chain")), ("diffuse", _flag(layer, "embed_diffuse_mask"))])


def uses_without_flags(layer: Any) -> list[Use]:
    """Edge features of a form that knows no flags."""
    return _uses(layer, [])


def _uses(layer: Any, flags: list[tuple[str, bool]]) -> list[Use]:
    dims = {"f": layer.feat_dim, "cz": layer.c_p, "bins": layer._cfg.num_bins}
    return [Use("edge_features", dims, tuple(name for name, on in flags if on))]


def with_chain_and_diffuse(
    self: Any, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor, diffuse_mask: Tensor, chain_idx: Tensor
) -> Tensor:
    """Multiflow's forward."""
    chain = chain_idx if _flag(self, "embed_chain") else None
    diffuse = diffuse_mask if _flag(self, "embed_diffuse_mask") else None
    return _embed(self, s, t, sc_t, p_mask, chain, diffuse)


def with_diffuse(self: Any, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor, diffuse_mask: Tensor) -> Tensor:
    """FrameFlow's forward."""
    diffuse = diffuse_mask if _flag(self, "embed_diffuse_mask") else None
    return _embed(self, s, t, sc_t, p_mask, None, diffuse)


def without_flags(self: Any, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor) -> Tensor:
    """RNA-FrameFlow's forward."""
    return _embed(self, s, t, sc_t, p_mask)


def with_factors(
    self: Any,
    node_embed: Tensor,
    translations: Tensor,
    trans_sc: Tensor,
    node_mask: Tensor,
    edge_embed: Tensor | None = None,
    edge_mask: Tensor | None = None,
) -> Any:
    """The forward of FlashIPA's embedder where it embeds all pairs: no factors, and the pairs' mask."""
    if edge_embed is not None or self.mode != "orig_2d_bias":
        return original_forward(self)(self, node_embed, translations, trans_sc, node_mask, edge_embed, edge_mask)
    pairs = node_mask[:, None] * node_mask[:, :, None] if edge_mask is None else edge_mask
    edges = _embed(self, node_embed, translations, trans_sc, pairs)
    # Its forward multiplies by the mask once more, outside, so the type is that product's.
    return edges.to(torch.promote_types(edges.dtype, pairs.dtype)), None, None, pairs


def _embed(
    layer: Any,
    s: Tensor,
    t: Tensor,
    sc_t: Tensor,
    p_mask: Tensor,
    chain: Tensor | None = None,
    diffuse: Tensor | None = None,
) -> Tensor:
    """What all forms compute."""
    first, _, second, _, third, norm = layer.edge_embedder
    out = operation.edge_features(
        layer.linear_s_p(s),
        t,
        sc_t,
        chain,
        diffuse,
        layer.linear_relpos.weight,
        layer.linear_relpos.bias,
        (first.weight, second.weight, third.weight),
        (first.bias, second.bias, third.bias),
        norm.weight,
        norm.bias,
        num_bins=layer._cfg.num_bins,
        eps=norm.eps,
        out_dtype=layer_norm_type(norm, s),
        config=layer.kernel_config,
    )
    out *= p_mask.unsqueeze(-1).to(out.dtype)
    return out


_FORMS: dict[str, tuple[str, Forward, Any]] = {
    _MULTIFLOW: ("Multiflow", with_chain_and_diffuse, uses_with_flags),
    _FRAMEFLOW: ("FrameFlow", with_diffuse, uses_with_flags),
    _RNA_FRAMEFLOW: ("RNA-FrameFlow", without_flags, uses_without_flags),
    _FLASH_IPA: ("FlashIPA's 2d", with_factors, uses_without_flags),
}

ADAPTER = EdgeFeatures()
