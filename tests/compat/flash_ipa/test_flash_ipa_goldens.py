"""FlashIPA's layers, edge embedder and model against the original, every mode: float32, absolute errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldkernels.compat.flash_ipa.rigid import create_rigid
from foldkernels.kernels.registry import record_kernels

from ...support.flash_ipa import FACTORISED, MODES, embedder_of, layer_of, model_of
from ...support.goldens import part

pytestmark = pytest.mark.quick

LAYER, EMBEDDER, GRADIENT = 5e-6, 3e-5, 3e-5
#: A weight's gradient is a sum over residues: the original's own is 2.6e-5 away from float64's.
WEIGHT_GRADIENT = 6e-5
EMBEDDED = ("flash_1d_bias", "flash_2d_factorize_bias", "orig_2d_bias")
OPERATION = {
    mode: "invariant_point_attention" if mode == "orig_2d_bias" else "factorized_point_attention" for mode in MODES
}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.detach().double()).abs().max())


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("mode", MODES)
def test_the_layer_is_the_originals(mode: str, kernel: str) -> None:
    """Outputs (masked rows too, where the original's mean something), and the gradients of inputs and weights."""
    layer, golden = layer_of(mode, kernel)
    x = part(golden, "in.")
    leaves = {name: x[name].requires_grad_() for name in ("node", "rots", "z", "z1", "z2") if name in x}
    leaves["trans"] = (10 * x["trans_nm"]).requires_grad_()
    with record_kernels() as ran:
        frames = create_rigid(x["rots"], 0.1 * leaves["trans"])
        out = layer(x["node"], x.get("z"), x.get("z1"), x.get("z2"), frames, x["mask"])
    assert ran == [f"{OPERATION[mode]}: {kernel}"]
    there = x["mask"] > 0.5
    assert not there.all()
    assert error(out[there], golden["out"][there]) <= LAYER
    truth = golden["out"].double() + golden["d64"].double()
    assert error(out[there], truth[there]) <= LAYER
    if mode.startswith("flash"):
        # Without factors the original leaves rounding noise there: it subtracts 1e5 from every logit of the row.
        assert error(out[~there], golden["out"][~there]) <= LAYER

    (out * x["W"]).sum().backward()
    expected = part(golden, "grad.")
    assert {"node", "trans", "rots"} <= set(expected) and ("z1" in expected) == (mode in FACTORISED)
    for name, gradient in expected.items():
        found = leaves[name].grad
        assert found is not None and error(found, gradient) <= GRADIENT, name
    expected, weights = part(golden, "gradw."), dict(layer.named_parameters())
    assert len(expected) >= 8
    for name, gradient in expected.items():
        found = weights[name].grad
        assert found is not None and error(found, gradient) <= WEIGHT_GRADIENT, name


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("mode", EMBEDDED)
def test_the_edge_embedder_is_the_originals(mode: str, kernel: str) -> None:
    embedder, golden = embedder_of(mode, kernel)
    x, expected = part(golden, "in."), part(golden, "out.")
    given = embedder(x["node_embed"], x["trans"], x["trans_sc"], x["mask"])
    found = dict(zip(("edge_embed", "z_factor_1", "z_factor_2", "edge_mask"), given, strict=True))
    assert {name for name, value in found.items() if value is not None} == set(expected)
    for name, value in expected.items():
        assert error(found[name], value) <= EMBEDDER, name


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("mode", EMBEDDED)
def test_the_model_is_the_originals(mode: str, kernel: str) -> None:
    """Two blocks, self-conditioned and padded."""
    model, golden = model_of(mode, kernel)
    batch = part(golden, "in.")
    with torch.no_grad(), record_kernels() as ran:
        out = model(batch)
    assert {name for name in ran if name.startswith(OPERATION[mode])} == {f"{OPERATION[mode]}: {kernel}"} or (
        # One pass over the pairs may do both the edge transition and the attention.
        mode == "orig_2d_bias" and kernel == "torch"
    )
    there = batch["node_mask"] > 0.5
    assert error(out["pred_trans"][there], golden["out.pred_trans"][there]) <= 2e-5
    assert error(out["pred_rotmats"][there], golden["out.pred_rotmats"][there]) <= LAYER


@pytest.mark.parametrize("mode", EMBEDDED)
@pytest.mark.parametrize(
    "weight", ["trunk.ipa_1.linear_b.weight", "trunk.ipa_0.down_z.weight", "edge_embedder.linear_s_p.weight"]
)
def test_a_weight_that_is_off_is_seen(mode: str, weight: str) -> None:
    """The tests above could not fail if a weight did nothing."""
    model, golden = model_of(mode)
    with torch.no_grad():
        model.get_parameter(weight).mul_(1.05)
        out = model(part(golden, "in."))
    there = golden["in.node_mask"] > 0.5
    assert error(out["pred_trans"][there], golden["out.pred_trans"][there]) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_in_masked_rows_does_not_matter(mode: str) -> None:
    """To the layer. (The neighbours of flash_1d_bias, like the original's, do see padding.)"""
    layer, golden = layer_of(mode)
    x = part(golden, "in.")
    gone = x["mask"] < 0.5

    def run() -> Tensor:
        frames = create_rigid(x["rots"], x["trans_nm"])
        with torch.no_grad():
            return layer(x["node"], x.get("z"), x.get("z1"), x.get("z2"), frames, gone.logical_not())

    before = run()
    for name in ("node", "z", "z1", "z2"):
        if name in x:
            x[name][gone] = 30.0
    after = run()
    assert error(after, before) <= 1e-6


@pytest.mark.parametrize("mode", FACTORISED)
def test_factors_are_not_the_dense_layer_on_their_product(mode: str) -> None:
    """Another function, even where z has exactly that rank: no kernel choice can turn one into the other."""
    layer, golden = layer_of(mode)
    dense, _ = layer_of("orig_2d_bias")
    dense.load_state_dict(layer.state_dict(), strict=True)
    x = part(golden, "in.")
    frames = create_rigid(x["rots"], x["trans_nm"])
    z = torch.einsum("birc,bjrc->bijc", x["z1"], x["z2"])
    with torch.no_grad():
        found = dense(x["node"], z, None, None, frames, x["mask"])
        expected = layer(x["node"], None, x["z1"], x["z2"], frames, x["mask"])
    there = x["mask"] > 0.5
    assert error(found[there], expected[there]) > 0.05


def test_without_pairs_the_two_are_one() -> None:
    """orig_no_bias and flash_no_bias: the same function of the same weights."""
    flash, golden = layer_of("flash_no_bias")
    dense, _ = layer_of("orig_no_bias")
    dense.load_state_dict(flash.state_dict(), strict=True)
    x = part(golden, "in.")
    frames = create_rigid(x["rots"], x["trans_nm"])
    with torch.no_grad():
        outs = [layer(x["node"], None, None, None, frames, x["mask"]) for layer in (flash, dense)]
    assert error(*outs) <= 1e-6
