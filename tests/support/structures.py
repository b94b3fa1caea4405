"""Folders of structures for the tests of training data: files made on the spot, and what their features are."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldkernels.compat.multiflow.dataset import (
    StructureDataset,
)
from foldkernels.compat.multiflow.structures.residue_types import LETTERS, NAMES

PDB = Path(__file__).parents[1] / "goldens" / "pdb" / "1odh.pdb"
GOLDENS = Path(__file__).parents[1] / "goldens" / "multiflow"
FEATURES = {
    "res_mask": torch.float32,
    "diffuse_mask": torch.float32,
    "plddt_mask": torch.float32,
    "res_plddt": torch.float32,
    "aatypes_1": torch.int64,
    "trans_1": torch.float32,
    "rotmats_1": torch.float32,
    "chain_idx": torch.int64,
    "res_idx": torch.int64,
    "csv_idx": torch.int64,
}


def chain_lines(
    num_res: int,
    chain: str = "A",
    *,
    first: int = 1,
    names: str | None = None,
    lacking: dict[int, str] | None = None,
    b_factor: float = 50.0,
    start: float = 0.0,
) -> str:
    """A chain in the PDB format: a helix of residues, counted from `first`; `lacking` says which lack which atom."""
    lines = []
    for place in range(num_res):
        angle, height = math.radians(100 * place), start + 1.5 * place
        turned = {"N": (-0.5, 1.36, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.5, 0.0, 0.3)}
        letter = names[place] if names else LETTERS[place % 20]
        name = NAMES[LETTERS.index(letter)] if letter in LETTERS else "UNK"
        for atom, (x, y, z) in turned.items():
            if lacking and lacking.get(place) == atom:
                continue
            x, y = x + 2.3, y
            x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            lines.append(
                f"ATOM  {len(lines) + 1:>5}  {atom:<3} {name} {chain}{first + place:>4}    {x:>8.3f}{y:>8.3f}"
                f"{z + height:>8.3f}{1:>6.2f}{b_factor:>6.2f}          {atom[0]:>2}"
            )
    return "\n".join([*lines, "TER", ""])


def quiet(*args: Any, **kwargs: Any) -> StructureDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StructureDataset(*args, **kwargs)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stored_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())
