"""What of a folder's files is used, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ....configs.data import DataConfig
from ....errors import BadInput
from ...files.progress import progress_bar
from .files import structure_files
from .filters import against_example, against_file, least_compact, radius_of_gyration
from .parsed import ParsedFile, StructureCache
from .report import DataReport, Skipped

#: From so many files on that are not in the cache, starting processes to read them pays.
_MANY = 100


@dataclass(frozen=True)
class Example:
    """What an item is made of.

    Attributes:
        name: The file, relative to its folder, and the chain where it is a single one: ``1odh.pdb:A``.
        path: The file.
        chains: Places of the chains among the file's protein chains.
        num_res: Number of residues, before any crop.
    """

    name: str
    path: Path
    chains: tuple[int, ...]
    num_res: int


def read_folder(
    folder: Path,
    config: DataConfig,
    cache: StructureCache,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool | None = None,
) -> tuple[list[Example], DataReport]:
    """Reads every structure file of a folder.

    Args:
        folder: The folder, or a single file.
        config: The settings.
        cache: Where what was read is kept.
        rank: Number of this process; only the first shows progress.
        world_size: Number of processes. Each begins at another place, and finds what the others have read meanwhile.
        progress: False shows no progress bar.

    Returns:
        What is used, in the order of the files' names, and an account.

    Raises:
        BadInput: There is no such folder, or no structure file in it.
    """
    paths = structure_files(folder)
    reading = _Reading(config, folder)
    first = len(paths) * rank // world_size
    order = paths[first:] + paths[:first]
    show = False if rank else progress
    new = [path for path in order if not cache.has(path)] if cache.folder is not None else []
    if config.loader.num_workers > 1 and len(new) >= _MANY:
        with progress_bar("reading new structures", len(new), show) as advance:
            for _ in DataLoader(_Warming(new, cache), batch_size=None, num_workers=config.loader.num_workers):
                advance()
    with progress_bar("reading structures", len(paths), show) as advance:
        for path in order:
            reading.add(path, cache)
            advance()
    examples, skipped = reading.result(paths)
    lengths = tuple(example.num_res for example in examples)
    return examples, DataReport(str(folder), len(paths), lengths, tuple(skipped), reading.notes(paths))


class _Warming(Dataset[int]):
    """Files that worker processes put into the cache; what is wrong with one is told when it is looked at again."""

    def __init__(self, paths: Sequence[Path], cache: StructureCache) -> None:
        self._paths, self._cache = paths, cache

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> int:
        with suppress(BadInput):
            self._cache.read(self._paths[index])
        return index


class _Reading:
    """Collects what the files of a folder hold."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._examples: dict[Path, list[Example]] = {}
        self._skipped: dict[Path, list[Skipped]] = {}
        self._radii: dict[str, float] = {}
        self._notes: dict[Path, list[str]] = {}

    def add(self, path: Path, cache: StructureCache) -> None:
        """Reads a file, and notes what of it is used."""
        name = path.name if path == self._folder else path.relative_to(self._folder).as_posix()
        self._examples[path], self._skipped[path] = examples, skipped = [], []
        try:
            parsed = cache.read(path)
        except BadInput as error:
            detail = error.message.removeprefix(str(path)).lstrip(": ")
            skipped.append(Skipped(name, "cannot be read", detail))
            return
        self._notes[path] = [f"{name}: {note}" for note in parsed.notes]
        objection = against_file(parsed, self._config)
        if objection is not None:
            skipped.append(Skipped(name, *objection))
            return
        for label, places in self._candidates(name, parsed, skipped):
            chains = [parsed.chains[place] for place in places]
            objection = against_example(chains, self._config)
            if objection is not None:
                skipped.append(Skipped(label, *objection))
                continue
            examples.append(Example(label, path, places, sum(chain.num_res for chain in chains)))
            if self._config.filter.rog_quantile is not None:
                self._radii[label] = radius_of_gyration(chains)

    def _candidates(self, name: str, parsed: ParsedFile, skipped: list[Skipped]) -> list[tuple[str, tuple[int, ...]]]:
        if self._config.examples == "complexes":
            return [(name, tuple(range(len(parsed.chains))))]
        candidates: list[tuple[str, tuple[int, ...]]] = []
        first_with: dict[bytes, str] = {}
        for place, chain in enumerate(parsed.chains):
            label = f"{name}:{chain.name}"
            twin = first_with.setdefault(chain.aatypes.tobytes(), chain.name)
            if self._config.filter.identical_chains == "first" and twin != chain.name:
                skipped.append(Skipped(label, "identical chain", f"its sequence is that of chain {twin}"))
            else:
                candidates.append((label, (place,)))
        return candidates

    def notes(self, paths: Sequence[Path]) -> tuple[str, ...]:
        """What files leave open, in the order of the files."""
        return tuple(note for path in paths for note in self._notes.get(path, ()))

    def result(self, paths: Sequence[Path]) -> tuple[list[Example], list[Skipped]]:
        """What is used and what is not, in the order of the files."""
        examples = [example for path in paths for example in self._examples[path]]
        skipped = [skip for path in paths for skip in self._skipped[path]]
        quantile = self._config.filter.rog_quantile
        if quantile is None or not examples:
            return examples, skipped
        lengths = np.array([example.num_res for example in examples])
        radii = np.array([self._radii[example.name] for example in examples])
        beyond, allowed = least_compact(lengths, radii, quantile)
        for example, out, radius, most in zip(examples, beyond, radii, allowed, strict=True):
            if out:
                detail = f"{radius:.1f} A, most at {example.num_res} residues is {most:.1f}"
                skipped.append(Skipped(example.name, "radius of gyration", detail))
        return [example for example, out in zip(examples, beyond, strict=True) if not out], skipped
