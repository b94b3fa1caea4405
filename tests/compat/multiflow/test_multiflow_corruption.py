"""The noise of Multiflow's training: the original's, from the same seeds, and what must hold of any."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.flow.igso3 import angle_table, rotation_noise
from foldkernels.compat.multiflow.flow.ot_coupling import assign_noise
from foldkernels.compat.multiflow.flow.so3_steps import compose, rotation_vector
from foldkernels.compat.multiflow.training import corrupt_batch
from foldkernels.compat.multiflow.training.seeding import seed_batch
from foldkernels.errors import BadInput

from ...support.goldens import part, read

CASES = ("codesign", "together", "uniform", "exp", "folding")
#: Angstrom; and none, where turns of nearly half a circle divide by sines down to 0.01: a hundred float32 roundings.
TOLERANCE = {"trans_t": 5e-5, "rotmats_t": 2e-5}


def clean_batch(size: int = 4, length: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    one = torch.ones(size, length)
    trans = torch.randn(size, length, 3, generator=generator) * 8
    return {
        "res_mask": one,
        "diffuse_mask": one.clone(),
        "aatypes_1": torch.randint(20, (size, length), generator=generator),
        "trans_1": trans - trans.mean(1, keepdim=True),
        "rotmats_1": rotation_noise(size * length, generator=generator).view(size, length, 3, 3),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_originals_batch(case: str) -> None:
    """Five proteins with padding and fixed residues; the next random number is the original's too."""
    golden, metadata = read("train/corrupted.safetensors")
    settings = metadata[case]
    batch, expected = part(golden, "in."), part(golden, f"{case}.")
    before = {name: value.clone() for name, value in batch.items()}
    torch.manual_seed(settings["seed"])
    found = multiflow.Interpolant(settings["interpolant"]).corrupt_batch(batch)
    assert torch.equal(torch.rand(4), expected.pop("rand_after"))
    assert len(expected) == 6
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, atol=TOLERANCE.get(name, 0), rtol=0)
    assert all(torch.equal(batch[name], before[name]) and found[name] is batch[name] for name in batch)
    tokens = 20 if case == "uniform" else 21
    assert found["aatypes_sc"].shape == (5, 14, tokens) and not found["aatypes_sc"].any()
    assert found["trans_sc"].shape == (5, 14, 3) and not found["trans_sc"].any()


def test_a_generator_of_its_own() -> None:
    """The same numbers as from the global one, which is left alone."""
    batch = clean_batch()
    torch.manual_seed(3)
    expected = corrupt_batch(batch, {})
    torch.manual_seed(4)
    wanted = torch.rand(2)
    torch.manual_seed(4)
    found = corrupt_batch(batch, {}, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(2), wanted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_not_corrupted_draws_nothing() -> None:
    batch = clean_batch()
    still: dict[str, Any] = {"trans": {"corrupt": False}, "rots": {"corrupt": False}, "aatypes": {"corrupt": False}}
    torch.manual_seed(0)
    found = corrupt_batch(batch, {**still, "codesign_separate_t": False})
    left = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(4)
    assert torch.equal(left, torch.rand(1))
    for name in ("trans", "rotmats", "aatypes"):
        assert torch.equal(found[f"{name}_t"], batch[f"{name}_1"])


def test_tasks_and_times() -> None:
    """A tenth folds forward, a tenth inversely, and all other times lie between min_t and 1 - min_t."""
    batch = clean_batch(size=4000, length=1)
    torch.manual_seed(5)
    settings = {"min_t": 0.05, "trans": {"corrupt": False}, "rots": {"corrupt": False}}
    found = corrupt_batch(batch, settings)
    structure, sequence = found["r3_t"][:, 0], found["cat_t"][:, 0]
    assert torch.equal(found["so3_t"], found["r3_t"])
    folded, designed = sequence == 1, structure == 1
    assert not (folded & designed).any()
    for share in (folded, designed):
        assert abs(float(share.float().mean()) - 0.1) < 0.02
    for times in (sequence[~folded], structure[~designed]):
        assert 0.05 <= float(times.min()) < 0.06 and 0.94 < float(times.max()) <= 0.95
        assert abs(float(times.mean()) - 0.5) < 0.02
    # A type is lost with probability 1 - t, and never where the sequence is given.
    lost = (found["aatypes_t"] == 20)[:, 0]
    assert not lost[folded].any()
    early, late = lost[sequence < 0.3].float().mean(), lost[(sequence > 0.7) & ~folded].float().mean()
    assert abs(float(early) - 0.82) < 0.05 and abs(float(late) - 0.18) < 0.05


def test_the_angles_of_the_noise() -> None:
    """Angles follow the density of IGSO(3), summed here in another way; axes are uniform; matrices are rotations."""
    angles, cumulative = angle_table()
    grid = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)[1:]
    density = (
        sum(
            (2 * order + 1) * math.exp(-order * (order + 1) * 1.125) * torch.sin((order + 0.5) * grid)
            for order in range(12)
        )
        / torch.sin(grid / 2)
        * (1 - torch.cos(grid))
    )
    exact = torch.cumsum(density, 0) / density.sum()
    places = torch.searchsorted(grid, angles.double()).clamp(max=len(grid) - 1)
    assert float((exact[places] - cumulative.double()).abs().max()) < 1e-4
    noise = rotation_noise(20_000, generator=torch.Generator().manual_seed(0))
    assert float((compose(noise, noise.mT) - torch.eye(3)).abs().max()) < 1e-5
    vectors = rotation_vector(noise)
    drawn = torch.linalg.vector_norm(vectors, dim=-1).sort().values.double()
    probability = exact[torch.searchsorted(grid, drawn).clamp(max=len(grid) - 1)]
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert float((probability - uniform).abs().max()) < 0.015  # Kolmogorov-Smirnov at 1e-4 is 0.0156
    assert float((vectors / drawn[:, None]).mean(0).abs().max()) < 0.05


def test_transport_turns_noise_onto_proteins() -> None:
    """A protein's own positions, turned and given in another order, come back; the fit is a proper rotation."""
    batch = clean_batch(size=2)
    turns = rotation_noise(2, generator=torch.Generator().manual_seed(2))
    noise = (batch["trans_1"] @ turns)[[1, 0]]
    found = assign_noise(noise, batch["trans_1"], batch["diffuse_mask"])
    torch.testing.assert_close(found, batch["trans_1"], atol=1e-4, rtol=0)
    mirrored = batch["trans_1"] * torch.tensor([-1.0, 1.0, 1.0])
    found = assign_noise(mirrored, batch["trans_1"], batch["diffuse_mask"])
    assert float((found - batch["trans_1"]).abs().max()) > 1


def test_batches_are_seeded_by_their_number() -> None:
    """Another number, rank or seed gives other noise; the coin of self-conditioning is the same on every rank."""
    draws = {}
    coins = set()
    for number in range(40):
        each = set()
        for rank in range(2):
            each.add(seed_batch(7, number, rank))
            draws[number, rank] = float(torch.rand(1))
        assert len(each) == 1
        coins |= {(number, coin) for coin in each}
    assert len(set(draws.values())) == 80
    assert 10 <= sum(coin for _, coin in coins) <= 30
    seed_batch(7, 3, 1)
    assert float(torch.rand(1)) == draws[3, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trans_1": torch.zeros(4, 39, 3)}, r"trans_1 has shape \(4, 39, 3\)"),
        ({"trans_1": torch.full((4, 40, 3), float("nan"))}, r"trans_1 is not finite in batch item\(s\) \[0, 1, 2, 3\]"),
        ({"diffuse_mask": torch.zeros(4, 40)}, r"no residue is diffused in batch item\(s\) \[0, 1, 2, 3\]"),
    ],
)
def test_bad_batches(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        corrupt_batch({**clean_batch(), **change}, {})
    with pytest.raises(BadInput, match="lacks rotmats_1"):
        corrupt_batch({name: value for name, value in clean_batch().items() if name != "rotmats_1"}, {})
