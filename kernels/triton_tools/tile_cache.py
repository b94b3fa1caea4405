"""Which of a few tiles runs a Triton kernel fastest on this GPU: measured once, if asked for, and kept on disk.

Without FOLDKERNELS_TUNE=1 nothing is measured: what an earlier run found is read, and else the first candidate is
taken, which is the one that stands in the kernel's table. `foldkernels tune` judges tiles against float64, too, and
what it found wrong is never taken. A measurement in the middle of a run cannot judge: it sees the launch of one kernel,
often in autograd's thread, and not the operation's inputs, from which the right numbers would have to be made.

What is found is kept by the kernels' source, the GPU and the versions of what compiles: a change of any of them starts
anew. A tile changes the order in which numbers are added, and so the last bits of a result.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, TypeVar

import torch

TUNE_VARIABLE = "FOLDKERNELS_TUNE"
FOLDER_VARIABLE = "FOLDKERNELS_CACHE"
_WARM_UPS, _REPEATS = 2, 7
_SUBFOLDER = "tiles"

Tile = TypeVar("Tile", bound=tuple[Any, ...])
Result = TypeVar("Result")
Clock = Callable[[Callable[[], object]], float]
#: Called in the place of `TileCache.choose`, with the cache and its arguments; gives the tile to run.
Chooser = Callable[["TileCache", Mapping[str, int | str], Sequence[Any], Callable[[Any], object], torch.device], Any]

_chooser: Chooser | None = None


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Inside, `chooser` has every choice of a tile, in every thread: backward passes run in others."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def folder() -> Path:
    """Where what was found is kept: FOLDKERNELS_CACHE, or `foldkernels` in the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foldkernels"


def tiles_folder() -> Path:
    """Where tiles are kept."""
    return folder() / _SUBFOLDER


def files(operations: Collection[str] = ()) -> list[Path]:
    """The files of some operations, or of all, whatever GPU and versions they are for."""
    found = sorted(tiles_folder().glob("*.json"))
    return [path for path in found if not operations or path.stem.rpartition("-")[0] in operations]


def stored(operations: Collection[str] = ()) -> list[dict[str, Any]]:
    """What is kept: for each file its path, operation, machine and tiles by sizes. A broken one has no tiles."""
    found = files(operations)
    return [{"path": str(path), "operation": path.stem.rpartition("-")[0], **_content(path)} for path in found]


def clear(operations: Collection[str] = ()) -> list[Path]:
    """Forget what is kept of some operations, or of all.

    Returns:
        The files that were removed.

    Raises:
        OSError: One cannot be.
    """
    gone = files(operations)
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def _content(path: Path) -> dict[str, Any]:
    """A file's machine and tiles; none, where it cannot be read or is not what was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tiles, machine = content["tiles"], str(content.get("machine", "unknown"))
    except (OSError, ValueError, KeyError, TypeError):
        return {"machine": "unknown", "tiles": {}, "wrong": {}}
    return {"machine": machine, "tiles": _lists(tiles), "wrong": _lists(content.get("wrong"))}


def _lists(found: object) -> dict[str, list[Any]]:
    return {key: x for key, x in found.items() if isinstance(x, list)} if isinstance(found, dict) else {}


@functools.lru_cache(maxsize=64)
def source_of(*modules: ModuleType) -> str:
    """A short name for the text of modules, which changes with it."""
    return hashlib.sha256("\n".join(map(inspect.getsource, modules)).encode()).hexdigest()[:16]


def gpu_and_compiler(device: torch.device) -> str:
    """The GPU's name, and the versions of what compiles for it."""
    import triton

    versions = f"triton {triton.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name(device)}, {versions}"


def length_class(n: int) -> int:
    """The power of two next above: lengths up to it share a tile."""
    return 1 << max(n - 1, 0).bit_length()


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a few runs, by the GPU's own clock."""
    for _ in range(_WARM_UPS):
        run()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _words(sizes: Mapping[str, int | str]) -> str:
    return json.dumps(dict(sorted(sizes.items())))


def _judged(sizes: Mapping[str, int | str]) -> str:
    """What a tile is right or wrong for: a kernel and its types, at every size."""
    return _words({name: sizes[name] for name in ("kernel", "dtype", "z", "precision") if name in sizes})


class TileCache:
    """The tiles of one operation's kernels.

    Args:
        operation: Its name.
        source: See `source_of`.
        too_large: What a launch raises, before it starts, where a tile takes more than the chip has: Triton's
            OutOfResources.
        clock: Measures a run; `milliseconds`, but in tests.
        machine: Names a device's GPU and compiler; `gpu_and_compiler`, but in tests.
    """

    def __init__(
        self,
        operation: str,
        source: str,
        too_large: type[Exception],
        clock: Clock | None = None,
        machine: Callable[[torch.device], str] | None = None,
    ) -> None:
        self.operation, self.source, self.too_large = operation, source, too_large
        self.clock, self.machine = clock or milliseconds, machine or gpu_and_compiler
        self._chosen: dict[tuple[Any, ...], list[Any] | None] = {}
        self._machines: dict[torch.device, str] = {}
        self._wrong: dict[str, dict[str, list[Any]]] = {}

    def choose(
        self,
        sizes: Mapping[str, int | str],
        candidates: Sequence[Tile],
        run: Callable[[Tile], object],
        device: torch.device,
    ) -> Tile:
        """The fastest candidate that is known, or may be measured now; else the first.

        Args:
            sizes: What the choice depends on, the kernel's name among it.
            candidates: A few tiles, the one to take unmeasured first. All must fit the chip.
            run: Runs the kernel in a tile. It may be called many times: each must do the same.
            device: Where. Only a CUDA device is measured, and none while a CUDA graph is recorded.
        """
        if _chooser is not None:
            tile: Tile = _chooser(self, sizes, candidates, run, device)
            return tile
        if len(candidates) == 1 or device.type != "cuda":
            return candidates[0]
        candidates = self.right(sizes, candidates, device)
        on = self._on(device)
        key = (on, *sizes.items())
        if key not in self._chosen:
            self._chosen[key] = self._read(on).get(_words(sizes))
        known = self._named(self._chosen[key], candidates)
        if known is None and os.environ.get(TUNE_VARIABLE) == "1" and not torch.cuda.is_current_stream_capturing():
            times = [self.time(functools.partial(run, tile)) for tile in candidates]
            known = candidates[times.index(min(times))]
            self.keep(sizes, known, device)
        return candidates[0] if known is None else known

    def right(self, sizes: Mapping[str, int | str], candidates: Sequence[Tile], device: torch.device) -> Sequence[Tile]:
        """Those that `foldkernels tune` did not find wrong on this GPU; all, where it found nothing else."""
        on = self._on(device)
        if on not in self._wrong:
            self._wrong[on] = _content(self.path(on))["wrong"]
        wrong = self._wrong[on].get(_judged(sizes))
        return [tile for tile in candidates if list(tile) not in wrong] or candidates if wrong else candidates

    def judge(
        self, sizes: Mapping[str, int | str], tile: tuple[Any, ...], device: torch.device, *, right: bool
    ) -> None:
        """Have a tile never taken from now on, whatever the size, because its numbers are wrong; or taken again."""
        on = self.machine(device)
        wrong = _content(self.path(on))["wrong"]
        before = wrong.get(_judged(sizes), [])
        after = [x for x in before if x != list(tile)] + ([] if right else [list(tile)])
        self._wrong[on] = {**wrong, _judged(sizes): after}
        if after != before:
            self._write(on, wrong=self._wrong[on])

    def _on(self, device: torch.device) -> str:
        """The device's GPU and compiler, asked for once."""
        if device not in self._machines:
            self._machines[device] = self.machine(device)
        return self._machines[device]

    def keep(self, sizes: Mapping[str, int | str], tile: tuple[Any, ...], device: torch.device) -> None:
        """Have a tile taken for these sizes from now on, here and in later processes."""
        on = self.machine(device)
        self._chosen[on, *sizes.items()] = list(tile)
        self._write(on, tiles={**self._read(on), _words(sizes): list(tile)})

    def time(self, run: Callable[[], object]) -> float:
        """What a run takes, in milliseconds; infinity, where it asks for more than the chip has."""
        try:
            return self.clock(run)
        except self.too_large:
            return float("inf")

    def run(
        self,
        sizes: Mapping[str, int | str],
        candidates: Sequence[Tile],
        run: Callable[[Tile], Result],
        device: torch.device,
    ) -> Result:
        """Run the kernel in the tile of `choose`; the next candidate, where that takes more than the chip has."""
        first = self.choose(sizes, candidates, run, device)
        if device.type == "cuda" and len(candidates) > 1:
            candidates = self.right(sizes, candidates, device)
        left = [first, *(tile for tile in candidates if tile != first)]
        for tile in left[:-1]:
            try:
                return run(tile)
            except self.too_large:
                continue
        return run(left[-1])

    @staticmethod
    def _named(found: list[Any] | None, candidates: Sequence[Tile]) -> Tile | None:
        """The candidate that was found; None where there is none such (any more)."""
        return next((tile for tile in candidates if list(tile) == found), None)

    def path(self, on: str) -> Path:
        """The file for a GPU and compiler."""
        name = hashlib.sha256(f"{self.source} {on}".encode()).hexdigest()[:16]
        return tiles_folder() / f"{self.operation}-{name}.json"

    def _read(self, on: str) -> dict[str, list[Any]]:
        """What was found before; nothing, where the file cannot be read or is not what was written."""
        tiles: dict[str, list[Any]] = _content(self.path(on))["tiles"]
        return tiles

    def _write(self, on: str, **changed: dict[str, list[Any]]) -> None:
        """Keep what changed; several processes may do so at once. A disk that refuses costs the next run its time."""
        path = self.path(on)
        content = {**_content(path), "machine": on, "source": self.source, **changed}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(file.name, path)
        except OSError:
            pass
