"""A folder of structures as Multiflow's training features. Lengths are Angstrom."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ....configs.data import DataConfig
from ....errors import BadInput
from ....kernels.triton_tools import tile_cache
from ..config.sections import as_data, checked
from .crops import draw_crop
from .features import make_features
from .parsed import ParsedChain, ParsedFile, StructureCache
from .reading import Example, read_folder
from .report import DataReport

_MOST_IN_MEMORY = 1024


class Draw(NamedTuple):
    """An example, and what its random choices are drawn from.

    Attributes:
        example: Its number.
        key: Whole numbers, none negative: the same key gives the same crop and the same order of chains.
    """

    example: int
    key: tuple[int, ...] = ()


def as_data_config(section: Any = None, where: str = "data") -> DataConfig:
    """Gives the checked settings for what a caller has: a mapping, a DictConfig, a `DataConfig`, or None.

    Raises:
        BadInput: A key that does not exist, or a value that is wrong.
    """
    if isinstance(section, DataConfig):
        return section
    return DataConfig() if section is None else checked(DataConfig, as_data(section, DataConfig, where), where)


class StructureDataset(Dataset[dict[str, Tensor]]):
    """The proteins of a folder of PDB and mmCIF files, as items of Multiflow's training.

    Each file is read once and kept in a cache on disk; processes that read the same folder at the same time share the
    work. What cannot be read or does not pass the filters is left out: ``report`` has every file and the reason, and
    one warning counts them.

    Args:
        folder: The folder; the folders in it are read too. Or a single file.
        config: The settings, in any form that `as_data_config` takes.
        rank: Number of this process. Only the first shows progress and warns.
        world_size: Number of processes. Each begins to read at another place.
        progress: False shows no progress bar.

    Attributes:
        config: The settings.
        examples: What is used, in the order of the files' names.
        report: An account of what was read.

    Raises:
        BadInput: A setting is wrong, there is no structure file, or none can be used; the message says why.

    Warns:
        UserWarning: Something was left out, files leave something open, or nothing can be kept in the cache.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Any = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: bool | None = None,
    ) -> None:
        self.config = as_data_config(config)
        self._cache = StructureCache(_cache_folder(self.config.cache))
        self._in_memory: dict[Path, ParsedFile] = {}
        self.examples, self.report = read_folder(
            Path(folder), self.config, self._cache, rank=rank, world_size=world_size, progress=progress
        )
        if not self.examples:
            raise BadInput(
                f"{folder}: none of {self.report.files} structure file(s) can be used.\n{self.report.skipped_text()}",
                "correct the files, or the filters in the data settings.",
            )
        if rank == 0:
            if self.report.skipped:
                warnings.warn(
                    f"{folder}: {len(self.examples)} example(s) are used, and left out are\n"
                    f"{self.report.skipped_text()}",
                    stacklevel=2,
                )
            if self.report.notes:
                warnings.warn(
                    f"{folder}: {len(self.report.notes)} note(s) on how files were read\n{self.report.notes_text()}",
                    stacklevel=2,
                )
            if self._cache.problem is not None:
                warnings.warn(f"{self._cache.problem}; each start reads the files again", stacklevel=2)

    @property
    def lengths(self) -> list[int]:
        """Number of residues of each item, after crops."""
        return [self.config.cropped(example.num_res) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        """The features of one item, without a batch dimension; see `make_features`.

        Raises:
            BadInput: The file is no longer what it was.
        """
        index, key = draw if isinstance(draw, tuple) else (draw, ())
        example = self.examples[index]
        chains = self._chains(example)
        rng = np.random.default_rng([index, *key])
        crop = draw_crop([chain.res_mask for chain in chains], self.config.crop.length, self.config.crop.kind, rng)
        numbers = np.arange(len(chains))
        if self.config.shuffle_chains:
            rng.shuffle(numbers)
        item = make_features(chains, crop, (numbers + 1).tolist(), self.config.min_plddt)
        item["csv_idx"] = torch.tensor([index])
        return item

    def _chains(self, example: Example) -> list[ParsedChain]:
        parsed = self._in_memory.get(example.path)
        if parsed is None:
            parsed = self._cache.read(example.path)
            if len(self._in_memory) >= _MOST_IN_MEMORY:
                self._in_memory.pop(next(iter(self._in_memory)))
            self._in_memory[example.path] = parsed
        if max(example.chains) < len(parsed.chains):
            chains = [parsed.chains[place] for place in example.chains]
            if sum(chain.num_res for chain in chains) == example.num_res:
                return chains
        raise BadInput(f"{example.path} has changed since the data were read", "start again.")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read what they need.
        return {**self.__dict__, "_in_memory": {}}


def check_data(folder: str | os.PathLike[str], config: Any = None, *, progress: bool | None = None) -> DataReport:
    """Reads a folder as training would, and says what is in it; also where nothing of it can be used.

    Args:
        folder: The folder, or a single file.
        config: The settings, in any form that `as_data_config` takes.
        progress: False shows no progress bar.

    Raises:
        BadInput: A setting is wrong, or there is no structure file.
    """
    settings = as_data_config(config)
    return read_folder(Path(folder), settings, StructureCache(_cache_folder(settings.cache)), progress=progress)[1]


def _cache_folder(setting: str) -> Path | None:
    if setting == "off":
        return None
    return tile_cache.folder() / "structures" if setting == "auto" else Path(setting).expanduser()
