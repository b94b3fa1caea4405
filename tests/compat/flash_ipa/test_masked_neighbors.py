"""Neighbours that respect the mask: padding behind a protein changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldkernels.compat.flash_ipa.edge_embedder import EdgeEmbedderConfig
from foldkernels.compat.flash_ipa.ipa import IPAConfig
from foldkernels.compat.flash_ipa.model import Model, ModelConfig
from foldkernels.kernels.common.nearest_neighbors import nearest_neighbours, valid_neighbour_indices
from foldkernels.modules.edge_factors import EdgeFactors

K = 6


def model(masked: bool) -> Model:
    torch.manual_seed(1)
    ipa = IPAConfig(c_s=32, c_z=16, c_hidden=8, no_heads=4, num_blocks=2, seq_tfmr_num_heads=4, seq_tfmr_num_layers=1)
    edges = EdgeEmbedderConfig(c_s=32, c_p=16, feat_dim=8, num_bins=7, k=K, masked_neighbors=masked)
    made = Model(ModelConfig(node_embed_size=32, edge_embed_size=16, ipa=ipa, edge_features=edges)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def batch(n: int, padding: int, *, predicted: bool) -> dict[str, Tensor]:
    """A protein, and behind it residues that do not take part, right among the others."""
    generator = torch.Generator().manual_seed(3)

    def padded(value: Tensor, fill: Tensor) -> Tensor:
        return torch.cat([value, fill.expand(1, padding, *value.shape[2:])], dim=1)

    nodes, positions = torch.randn(1, n, 32, generator=generator), 6 * torch.randn(1, n, 3, generator=generator)
    made = {
        "node_embeddings": padded(nodes, torch.tensor(5.0)),
        "translations": padded(positions, positions[:, :1] + 0.1),
        "rotations": padded(torch.eye(3).expand(1, n, 3, 3), torch.eye(3)),
        "node_mask": padded(torch.ones(1, n), torch.tensor(0.0)),
    }
    if predicted:
        made["trans_sc"] = padded(positions.flip(1), positions[:, :1])
    return made


@pytest.mark.parametrize("predicted", [False, True])  # before the first prediction all stand in one place
@pytest.mark.parametrize("n", [3, K, K + 1, 23])
def test_padding_changes_nothing(n: int, predicted: bool) -> None:
    own = model(True)
    with torch.no_grad():
        expected = own(batch(n, 0, predicted=predicted))
        for padding in (1, 4, 40):
            found = own(batch(n, padding, predicted=predicted))
            for name, value in expected.items():
                torch.testing.assert_close(found[name][:, :n], value, rtol=1e-4, atol=1e-4)


def test_by_default_padding_is_among_the_neighbours() -> None:
    own = model(False)
    with torch.no_grad():
        alone, padded = (own(batch(23, padding, predicted=True))["pred_trans"][:, :23] for padding in (0, 4))
    assert float((alone - padded).abs().max()) > 1e-2
    with pytest.raises(ValueError, match="3 residues are fewer than the 6 nearest neighbours"):
        own(batch(3, 0, predicted=True))


def test_without_padding_it_is_the_originals_function() -> None:
    given = batch(23, 0, predicted=True)
    with torch.no_grad():
        masked, default = (model(option)(given) for option in (True, False))
    assert model(True).state_dict().keys() == model(False).state_dict().keys()
    for name, value in default.items():
        assert torch.equal(masked[name], value)


@pytest.mark.parametrize("block", [1 << 21, 300])
def test_neighbours_of_a_mask(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("foldkernels.kernels.common.nearest_neighbors._BLOCK", block)
    generator = torch.Generator().manual_seed(4)
    positions = torch.randn(3, 20, 3, generator=generator)
    mask = torch.rand(3, 20, generator=generator) > 0.4
    mask[2] = torch.arange(20) < 4
    positions[~mask] = float("nan")
    distances, indices = nearest_neighbours(positions, 7, mask)
    for item in range(3):
        valid = mask[item].nonzero().flatten()
        exact = torch.cdist(positions[item, valid].double(), positions[item, valid].double())
        exact += 1e6 * torch.eye(len(valid), dtype=torch.float64)
        count = min(7, len(valid))
        expected = exact.sort(dim=-1).values[:, :count]
        torch.testing.assert_close(distances[item, valid, :count].double(), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(indices[item, valid, :count], valid[exact.argsort(dim=-1)[:, :count]])
        assert distances[item, valid, count:].isinf().all()
    alike = torch.zeros(1, 9, 3)
    assert nearest_neighbours(alike, 3, torch.ones(1, 9, dtype=torch.bool))[1][0, 1].tolist() == [0, 2, 3]
    torch.library.opcheck(valid_neighbour_indices, (torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.bool), 4))


def test_the_module_takes_a_mask() -> None:
    torch.manual_seed(0)
    factors = EdgeFactors(c_s=8, c_p=4, feat_dim=4, num_bins=5, rank=2, k=K)
    s, t = torch.randn(1, 30, 8), 5 * torch.randn(1, 30, 3)
    mask = (torch.arange(30) < 11)[None]
    with torch.no_grad():
        alone = factors(s[:, :11], t[:, :11], t[:, :11], mask[:, :11])
        padded = factors(s, t, t, mask)
    for one, other in zip(alone, padded, strict=True):
        torch.testing.assert_close(other[:, :11], one, rtol=1e-5, atol=1e-5)
