"""Crops of structures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldkernels.compat.multiflow.dataset import (
    Draw,
    StructureDataset,
)
from foldkernels.compat.multiflow.dataset.crops import draw_crop
from foldkernels.compat.multiflow.structures.residue_types import LETTERS

from ....support.structures import chain_lines, equal


def test_crops_are_drawn_again_from_the_same_key(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    lines = [
        chain_lines(1, names=LETTERS[place % 20], first=11 + place, start=1.5 * place, b_factor=place)
        for place in range(50)
    ]
    text = "".join(lines).replace("TER\n", "") + "TER\n"
    (folder / "a.pdb").write_text(text + chain_lines(9, "B", start=100))
    data = StructureDataset(folder, settings(crop=20))
    whole = StructureDataset(folder, settings())[0]
    assert data.lengths == [20, 9]
    starts = Counter()
    for number in range(200):
        item = data[Draw(0, (number,))]
        assert equal(item, data[Draw(0, (number,))])
        start = int(item["res_plddt"][0])
        starts[start] += 1
        for name in ("aatypes_1", "rotmats_1", "res_plddt"):
            assert torch.equal(item[name], whole[name][start : start + 20])
        stretch = whole["trans_1"][start : start + 20]
        torch.testing.assert_close(item["trans_1"], stretch - stretch.mean(0), rtol=0, atol=1e-4)
        assert item["res_idx"].tolist() == list(range(1, 21))
    assert {0, 30} <= set(starts)
    assert max(starts.values()) < 25
    assert equal(data[Draw(1, (0,))], data[Draw(1, (5,))])  # nothing to crop


@pytest.mark.parametrize("kind", ["contiguous", "chains"])
def test_crops_have_their_length(kind: Any) -> None:
    rng = np.random.default_rng(0)
    taken = Counter()
    for _ in range(300):
        masks = [rng.random(size) < 0.9 for size in rng.integers(1, 30, size=rng.integers(1, 5))]
        total = sum(map(len, masks))
        length = int(rng.integers(1, 60))
        crop = draw_crop(masks, length, kind, rng)
        sizes = [part.stop - part.start for part in crop]
        assert sum(sizes) == min(total, length)
        assert all(0 <= part.start <= part.stop <= len(mask) for part, mask in zip(crop, masks, strict=True))
        if length < total:
            taken[sum(size > 0 for size in sizes)] += 1
        if kind == "contiguous" and length < total:
            shown = np.concatenate([np.isin(np.arange(len(m)), np.r_[p]) for p, m in zip(crop, masks, strict=True)])
            edges = np.flatnonzero(np.diff(np.concatenate([[0], shown.astype(int), [0]])))
            assert len(edges) == 2
    assert len(taken) > 2


def test_a_crop_shows_residues_with_frames() -> None:
    mask = np.zeros(100, dtype=bool)
    mask[[0, *range(60, 70), 99]] = True
    for number in range(50):
        (part,) = draw_crop([mask], 10, "contiguous", np.random.default_rng(number))
        assert mask[part].sum() >= 5
