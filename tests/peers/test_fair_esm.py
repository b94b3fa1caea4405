"""ESM-2 of the fair-esm package, in the size of its 8M model with random weights, beside its accelerated copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foldkernels

from .beside import accelerated, assert_gradients_near, assert_near, assert_restored, draw_weights

esm2 = pytest.importorskip("esm.model.esm2", reason="`make test-peers` installs fair-esm")

N = 41


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return draw_weights(esm2.ESM2(num_layers=6, embed_dim=320, attention_heads=20, alphabet="ESM-1b")).eval()


@pytest.fixture(scope="module")
def tokens(model: nn.Module) -> Tensor:
    drawn = torch.randint(4, 24, (2, N), generator=torch.Generator().manual_seed(5))
    drawn[0, -9:] = model.padding_idx
    return drawn


def test_esm_2(model: nn.Module, tokens: Tensor) -> None:
    ours, report = accelerated(model, "ESM2", "MultiheadAttention")
    assert len(report.replaced) == 7
    there = (tokens != model.padding_idx).float()
    with torch.no_grad(), foldkernels.record_kernels() as ran:
        wanted, found = model(tokens, repr_layers=[3, 6]), ours(tokens, repr_layers=[3, 6])
    assert ran == ["attention: torch"] * 6
    assert_near(found["logits"], wanted["logits"], there, "logits")
    for layer in (3, 6):
        assert_near(found["representations"][layer], wanted["representations"][layer], there, f"layer {layer}")
    assert_gradients_near(lambda one: one(tokens)["logits"] * there[..., None], model, ours)
    assert_restored(ours, report, model, lambda one: one(tokens)["logits"])


def test_contacts_and_weights_are_the_originals(model: nn.Module, tokens: Tensor) -> None:
    ours, _ = accelerated(model, "ESM2", "MultiheadAttention")
    with torch.no_grad():
        wanted, found = model(tokens, return_contacts=True), ours(tokens, return_contacts=True)
        for name in ("contacts", "attentions", "logits"):
            assert torch.equal(found[name], wanted[name])
        x = torch.randn(N, 2, 320)
        for mine, theirs in zip(ours.layers[0](x), model.layers[0](x), strict=True):
            assert torch.equal(mine, theirs)
