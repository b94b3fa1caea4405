"""A folder of PDB and mmCIF files as batches that Multiflow trains on."""

from __future__ import annotations

from .batches import LengthBatchSampler, collate, training_batches
from .features import make_features
from .reading import Example
from .report import DataReport, Skipped
from .structures import Draw, StructureDataset, as_data_config, check_data

__all__ = [
    "DataReport",
    "Draw",
    "Example",
    "LengthBatchSampler",
    "Skipped",
    "StructureDataset",
    "as_data_config",
    "check_data",
    "collate",
    "make_features",
    "training_batches",
]
