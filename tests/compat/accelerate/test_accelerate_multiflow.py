"""The adapters of the Multiflow lineage, beside stand-ins for each project's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldkernels
from foldkernels.compat.accelerate import recognise
from foldkernels.compat.accelerate.adapters import adapters

from ...support.foreign import flash_ipa, frameflow, multiflow
from ...support.foreign.frames import random_rigid

Build = Callable[[], nn.Module]
FORMS: dict[str, tuple[Build, str, str]] = {
    "multiflow ipa": (multiflow.ipa, "multiflow_ipa", "Multiflow"),
    "frameflow ipa": (frameflow.ipa, "multiflow_ipa", "FrameFlow"),
    "foldflow ipa": (lambda: frameflow.ipa(rbf=True), "multiflow_ipa", "FoldFlow, FrameDiff"),
    "flash ipa": (flash_ipa.ipa, "multiflow_ipa", "FlashIPA's slow path"),
    "edge transition": (multiflow.edge_transition, "edge_transition", "FrameDiff lineage"),
    "another width": (lambda: multiflow.edge_transition(edge_embed_out=12), "edge_transition", "FrameDiff lineage"),
    "flash edge transition": (flash_ipa.edge_transition, "edge_transition", "FlashIPA's 2d"),
    "multiflow edges": (multiflow.edge_features, "edge_features", "Multiflow"),
    "multiflow edges, chains": (lambda: multiflow.edge_features(embed_chain=True), "edge_features", "Multiflow"),
    "frameflow edges": (frameflow.edge_features, "edge_features", "FrameFlow"),
    "no flags": (lambda: frameflow.edge_features(embed_diffuse_mask=False), "edge_features", "FrameFlow"),
    "rna edges": (frameflow.edge_embedder, "edge_features", "RNA-FrameFlow"),
    "flash edges": (flash_ipa.edge_embedder, "edge_features", "FlashIPA's 2d"),
}


@pytest.mark.parametrize("build, adapter, form", FORMS.values(), ids=FORMS)
def test_each_form_is_recognised_and_proved(build: Build, adapter: str, form: str) -> None:
    module = build()
    assert recognise(module)[0] == adapter and recognise(module)[1].form == form
    report = foldkernels.accelerate(module, verify=True)
    (entry,) = report.entries
    assert entry.status == "replaced" and entry.proof is not None and entry.proof.passed, report
    assert entry.kernels == (f"{adapters()[adapter].operations[0]}: torch",)


@pytest.mark.parametrize("build, adapter, form", FORMS.values(), ids=FORMS)
def test_each_form_gives_the_type_that_its_own_forward_gives(build: Build, adapter: str, form: str) -> None:
    """In float32, in float64 where the originals run in it, and under autocast."""
    wide = [] if adapter == "edge_features" else [(torch.float64, False)]
    for dtype, autocast in ((torch.float32, False), *wide, (torch.float32, True)):
        module = build().to(dtype)
        example = adapters()[adapter].example(module, torch.Generator().manual_seed(0))
        args = [convert(value, dtype) for value in example.args]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            wanted = first(module(*args))
            foldkernels.accelerate(module)
            found = first(module(*args))
        assert found.dtype is wanted.dtype and found.shape == wanted.shape
        assert found.is_contiguous()


def first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


def convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if hasattr(value, "rotmats"):
        return type(value)(value.rotmats.to(dtype), value.trans.to(dtype))
    return value


def ipa_inputs(n: int = 9) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    s, z = torch.randn(2, n, 24, generator=generator), torch.randn(2, n, n, 16, generator=generator)
    return s, z, random_rigid(2, n), torch.ones(2, n)


def test_an_attention_mask_is_honoured() -> None:
    layer = multiflow.ipa().eval()
    pairs = (torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    pairs[:, range(9), range(9)] = 1.0
    wanted = layer(*ipa_inputs(), pairs)
    foldkernels.accelerate(layer)
    with foldkernels.record_kernels() as ran:
        torch.testing.assert_close(layer(*ipa_inputs(), attention_mask=pairs), wanted, rtol=1e-5, atol=1e-5)
    assert ran == ["invariant_point_attention: torch"]


def test_a_batch_axis_of_one_is_broadcast_as_by_the_original() -> None:
    layer = multiflow.ipa().eval()
    s, z, _, mask = ipa_inputs()
    wanted = layer(s, z[:1], random_rigid(1, 9), mask[:1])
    foldkernels.accelerate(layer)
    torch.testing.assert_close(layer(s, z[:1], random_rigid(1, 9), mask[:1]), wanted, rtol=1e-5, atol=1e-5)


def test_an_unknown_keyword_is_an_error_as_before() -> None:
    layer = multiflow.ipa()
    foldkernels.accelerate(layer)
    with pytest.raises(TypeError, match="inplace_safe"):
        layer(*ipa_inputs(), inplace_safe=True)


def test_an_output_may_be_changed_in_place() -> None:
    """As all the originals' parents do: the backward must not have kept it."""
    for build, adapter, _ in FORMS.values():
        module = build()
        foldkernels.accelerate(module)
        example = adapters()[adapter].example(module, torch.Generator().manual_seed(0))
        out = first(module(*example.args))
        out *= 2.0
        out.sum().backward()


def test_flash_ipas_other_paths_run_its_own_code() -> None:
    s, _, r, mask = ipa_inputs()
    layer = flash_ipa.ipa()
    foldkernels.accelerate(layer)
    assert torch.equal(layer(s, None, s, s, r, mask), s * 2.0)
    edge = flash_ipa.edge_transition()
    foldkernels.accelerate(edge)
    assert edge(s, None, s, mask) == (s, mask)
    embedder = flash_ipa.edge_embedder()
    foldkernels.accelerate(embedder)
    given = torch.randn(2, 9, 9, 16)
    assert torch.equal(embedder(s, r.get_trans(), r.get_trans(), mask, given)[0], given)
    assert torch.equal(embedder(s, r.get_trans(), r.get_trans(), mask)[3], torch.ones(2, 9, 9))


class OtherBins(multiflow.PairLayers):
    """A relative's: the same parameters, another first edge."""

    def forward(self, s, t, sc_t, p_mask, diffuse_mask, chain_idx):  # type: ignore[no-untyped-def]
        return multiflow.distogram(t, min_bin=1e-4, max_bin=20.0, num_bins=22)


OtherBins.__name__ = "EdgeFeatureNet"


def three_layers() -> nn.Module:
    return multiflow.edge_transition(num_layers=3)


def other_bins() -> nn.Module:
    return OtherBins(multiflow.edge_features()._cfg)


def no_bias() -> nn.Module:
    layer = multiflow.edge_transition()
    layer.layer_norm = nn.LayerNorm(16, bias=False)
    return layer


def gelu() -> nn.Module:
    layer = multiflow.edge_transition()
    layer.trunk[1] = nn.GELU()
    return layer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: flash_ipa.ipa(use_flash_attn=True), "its flash path reads z as two factors"),
        (lambda: flash_ipa.edge_transition(mode="1d"), "it updates two factors of the pair representation"),
        (lambda: flash_ipa.edge_embedder(mode="flash_1d_bias"), "only 'orig_2d_bias' embeds all pairs"),
        (lambda: frameflow.edge_features(embed_chain=True), "its forward takes no chains"),
        (three_layers, "a submodule it should not have: 4, 5"),
        (gelu, "its trunk.1 is a GELU, no plain ReLU"),
        (no_bias, "no parameter layer_norm.bias"),
        (other_bins, "does not have the constant 0.001"),
    ],
)
def test_another_function_under_the_same_name_is_left_alone(build: Build, reason: str) -> None:
    report = foldkernels.accelerate(build())
    assert report.replaced == () and reason in report.left_alone[""], report
