"""The Pairformers of the boltz package, at their default sizes, beside their accelerated copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldkernels

from .beside import accelerated, assert_gradients_near, assert_near, assert_restored, draw_weights

pairformer = pytest.importorskip("boltz.model.layers.pairformer", reason="`make test-peers` installs boltz")

CLASSES = (
    "AttentionPairBias",
    "TriangleMultiplicationOutgoing",
    "TriangleMultiplicationIncoming",
    "TriangleAttention",
    "TriangleAttentionEndingNode",
    "Transition",
)
N = 23


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, N)
    mask[0, -5:] = 0.0
    s, z = torch.randn(2, N, 384, generator=generator), torch.randn(2, N, N, 128, generator=generator)
    return s, z, mask, mask[:, :, None] * mask[:, None, :]


@pytest.fixture(scope="module")
def boltz_2() -> nn.Module:
    return draw_weights(pairformer.PairformerModule(384, 128, num_blocks=2, v2=True)).eval()


def test_boltz_2s_pairformer(boltz_2: nn.Module) -> None:
    ours, report = accelerated(boltz_2, *CLASSES)
    assert len(report.replaced) == 14
    s, z, mask, pair_mask = inputs()
    with torch.no_grad(), foldkernels.record_kernels() as ran:
        wanted, found = boltz_2(s, z, mask, pair_mask), ours(s, z, mask, pair_mask)
    assert len(ran) == 10  # five a layer; the transitions call no operation
    assert_near(found[0], wanted[0], mask, "s")
    assert_near(found[1], wanted[1], pair_mask, "z")
    assert_restored(ours, report, boltz_2, lambda model: model(s, z, mask, pair_mask)[0])


def test_boltz_2s_pairformer_in_training(boltz_2: nn.Module) -> None:
    ours, _ = accelerated(boltz_2, *CLASSES)
    s, z, mask, pair_mask = inputs()
    try:
        boltz_2.train(), ours.train()
        assert_gradients_near(lambda model: model(s, z, mask, pair_mask)[0] * mask[..., None], boltz_2, ours)
    finally:
        boltz_2.eval()


def test_a_pairformer_without_a_sequence() -> None:
    theirs = draw_weights(pairformer.PairformerNoSeqModule(64, num_blocks=1)).eval()
    ours, _ = accelerated(theirs, *CLASSES)
    _, z, _, pair_mask = inputs()
    with torch.no_grad():
        assert_near(ours(z[..., :64], pair_mask), theirs(z[..., :64], pair_mask), pair_mask, "z")


@pytest.mark.parametrize("initial_norm", [True, False])
def test_boltz_1s_attention(initial_norm: bool) -> None:
    attention = pytest.importorskip("boltz.model.layers.attention").AttentionPairBias
    theirs = draw_weights(attention(384, 128, 16, initial_norm=initial_norm)).eval()
    ours, report = accelerated(theirs, "AttentionPairBias")
    s, z, mask, _ = inputs()
    assert_near(ours(s, z, mask), theirs(s, z, mask), mask)
    assert_gradients_near(lambda model: model(s, z, mask) * mask[..., None], theirs, ours)
    many, masks = torch.cat([s, s + 1.0]), mask.repeat_interleave(2, 0)
    caches: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    with torch.no_grad():
        for _ in range(2):
            wanted, found = (
                model(many, z, masks, multiplicity=2, model_cache=cache)
                for model, cache in zip((theirs, ours), caches, strict=True)
            )
            assert_near(found, wanted, masks, "with a cache")
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(4))[:16]
    wanted, found = (model(s, z[:, :, chosen], mask, to_keys=lambda x: x[:, chosen]) for model in (theirs, ours))
    assert_near(found, wanted, torch.ones(2, N), "with other keys")
    assert_restored(ours, report, theirs, lambda model: model(s, z, mask))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_boltz_1s_pairformer(checkpointing: bool) -> None:
    """Also with fairscale's checkpoints around its layers, which put a forward on each layer's instance."""
    trunk = pytest.importorskip("boltz.model.modules.trunk")
    # fairscale's wrapper holds on to its module: a deep copy would run the original's layers.
    theirs, copied = (
        draw_weights(trunk.PairformerModule(384, 128, num_blocks=2, activation_checkpointing=checkpointing)).eval()
        for _ in range(2)
    )
    copied.load_state_dict(theirs.state_dict())
    ours, report = accelerated(theirs, *CLASSES, ours=copied)
    assert len(report.replaced) == 14
    assert {entry.form for entry in report.entries if entry.class_name == "AttentionPairBias"} == {"Boltz-1"}
    s, z, mask, pair_mask = inputs()
    with torch.no_grad():
        wanted, found = theirs(s, z, mask, pair_mask), ours(s, z, mask, pair_mask)
    assert_near(found[0], wanted[0], mask, "s")
    assert_near(found[1], wanted[1], pair_mask, "z")
    theirs.train()
    ours.train()
    s.requires_grad_()  # or the checkpoints give no gradients
    assert_gradients_near(lambda model: model(s, z, mask, pair_mask)[0] * mask[..., None], theirs, ours)


@pytest.mark.parametrize("version", [1, 2])
def test_the_atom_transformer_attends_within_windows(version: int) -> None:
    """Windows of 8 atoms attend to 16, by `to_keys` or `k_in`; two samples share a bias; some atoms are padding."""
    boltz = pytest.importorskip("boltz.model.modules." + ("transformers" if version == 1 else "transformersv2"))
    encoders = pytest.importorskip("boltz.model.modules.encodersv2")
    sizes: dict[str, Any] = {"depth": 2, "heads": 4, "dim": 64, "dim_single_cond": 64}
    sizes |= {"dim_pairwise": 16} if version == 1 else {}
    theirs = draw_weights(boltz.AtomTransformer(attn_window_queries=8, attn_window_keys=16, **sizes)).eval()
    ours, _ = accelerated(theirs, "AttentionPairBias")
    windows, samples = 3, 2
    generator = torch.Generator().manual_seed(6)
    q, c = (torch.randn(samples, windows * 8, 64, generator=generator) for _ in range(2))
    z = torch.randn(1, windows, 8, 16, 16 if version == 1 else 8, generator=generator)  # or four heads, twice
    mask = torch.ones(samples, windows * 8)
    mask[:, -5:] = 0.0
    matrix = encoders.get_indexing_matrix(windows, 8, 16, "cpu")

    def run(model: nn.Module) -> Tensor:
        def to_keys(x: Tensor) -> Tensor:
            return encoders.single_to_keys(x, matrix, 8, 16)

        out: Tensor = model(q, c, z, to_keys, mask, multiplicity=samples)
        return out * mask[..., None]

    with torch.no_grad():
        assert_near(run(ours), run(theirs), mask)
    assert_gradients_near(run, theirs, ours)
