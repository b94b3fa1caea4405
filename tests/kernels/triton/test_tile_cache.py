"""Tiles that were measured are kept, by source, GPU and versions; stand-ins take the place of a GPU and its clock."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from foldkernels.kernels.triton_tools import tile_cache
from foldkernels.kernels.triton_tools.tile_cache import TileCache


class Tile(NamedTuple):
    rows: int
    milliseconds: float


TILES = [Tile(1, 3.0), Tile(2, 1.0), Tile(3, 2.0)]
GPU = torch.device("cuda", 0)
SIZES: dict[str, int | str] = {"kernel": "forward", "n": 128}


class TooLarge(Exception):
    """What Triton raises where a tile does not fit."""


class Stand:
    """Counts what is run, and takes a tile's second number for its time."""

    def __init__(self) -> None:
        self.ran: list[Tile] = []
        self.too_large: list[Tile] = []

    def run(self, tile: Tile) -> float:
        self.ran.append(tile)
        if tile in self.too_large:
            raise TooLarge
        return tile.milliseconds

    def cache(self, source: str = "a", machine: str = "a GPU") -> TileCache:
        clock: Callable[[Callable[[], Any]], float] = lambda run: run()  # noqa: E731
        return TileCache("ipa", source, TooLarge, clock=clock, machine=lambda device: machine)

    def choose(self, cache: TileCache, **more: Any) -> Tile:
        return cache.choose(SIZES | more, TILES, self.run, GPU)


@pytest.fixture
def stand(tmp_path, monkeypatch) -> Iterator[Stand]:
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "not there yet"))
    monkeypatch.setenv("FOLDKERNELS_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield Stand()


def test_nothing_is_measured_unless_asked(stand, monkeypatch):
    monkeypatch.delenv("FOLDKERNELS_TUNE")
    assert stand.choose(stand.cache()) == TILES[0]
    assert not stand.ran and not tile_cache.folder().exists()


def test_the_fastest_is_kept(stand, monkeypatch):
    cache = stand.cache()
    assert stand.choose(cache) == TILES[1]
    assert stand.ran == TILES
    assert stand.choose(cache) == TILES[1]
    monkeypatch.delenv("FOLDKERNELS_TUNE")
    assert stand.choose(stand.cache()) == TILES[1], "another process reads it"
    assert stand.ran == TILES, "measured once"


@pytest.mark.parametrize("changed", [{"source": "b"}, {"machine": "another GPU"}])
def test_another_source_or_gpu_starts_anew(stand, changed):
    stand.choose(stand.cache())
    stand.choose(stand.cache(**changed))
    assert stand.ran == TILES * 2
    stand.choose(stand.cache())
    assert stand.ran == TILES * 2, "what was known of the first is still there"


def test_other_sizes_are_other_choices(stand):
    cache = stand.cache()
    stand.choose(cache)
    stand.choose(cache, n=256)
    assert stand.ran == TILES * 2
    content = json.loads(cache.path("a GPU").read_text())
    assert len(content["tiles"]) == 2 and content["machine"] == "a GPU"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tiles": 3}', '{"tiles": {"a": 3}, "wrong": 3}'])
def test_a_broken_file_is_no_file(stand, text):
    cache = stand.cache()
    cache.path("a GPU").parent.mkdir(parents=True)
    cache.path("a GPU").write_text(text)
    assert stand.choose(cache) == TILES[1]
    assert stand.choose(stand.cache()) == TILES[1] and stand.ran == TILES


def test_a_tile_that_is_no_candidate_is_not_taken(stand):
    stand.choose(stand.cache())
    others = [Tile(7, 1.0), Tile(8, 2.0)]
    assert stand.cache().choose(SIZES, others, stand.run, GPU) == others[0]


def test_a_disk_that_refuses_is_no_error(stand, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "file"))
    cache = stand.cache()
    assert stand.choose(cache) == TILES[1] and stand.choose(cache) == TILES[1]
    assert stand.ran == TILES


def test_no_clock_runs_where_it_may_not(stand, monkeypatch):
    assert stand.cache().choose(SIZES, TILES, stand.run, torch.device("cpu")) == TILES[0]
    assert stand.cache().choose(SIZES, TILES[:1], stand.run, GPU) == TILES[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert stand.choose(stand.cache()) == TILES[0]
    assert not stand.ran


def test_a_tile_that_does_not_fit_is_passed_over(stand, monkeypatch):
    stand.too_large = TILES[:2]
    assert stand.cache().run(SIZES, TILES, stand.run, GPU) == TILES[2].milliseconds
    assert stand.ran == [*TILES, TILES[2]], "measured, and the one that fits was run"
    monkeypatch.delenv("FOLDKERNELS_TUNE")
    stand.ran.clear()
    assert stand.cache().run(SIZES | {"n": 256}, TILES, stand.run, GPU) == TILES[2].milliseconds
    assert stand.ran == TILES
    stand.too_large = TILES
    with pytest.raises(TooLarge):
        stand.cache().run(SIZES, TILES, stand.run, GPU)


def test_a_tile_that_is_wrong_is_never_taken(stand, monkeypatch):
    """At no size, by no process, whether it is the fastest, the first or the last that is left; until it is right."""
    stand.cache().judge(SIZES, TILES[1], GPU, right=False)
    assert stand.choose(stand.cache(), n=512) == TILES[2] and stand.ran == [TILES[0], TILES[2]]
    monkeypatch.delenv("FOLDKERNELS_TUNE")
    cache = stand.cache()
    cache.keep(SIZES, TILES[1], GPU)
    assert stand.choose(cache) == TILES[0] == stand.choose(stand.cache()), "kept before it was judged"
    cache.judge(SIZES, TILES[0], GPU, right=False)
    assert stand.choose(cache, n=1024) == TILES[2] == stand.choose(stand.cache(), n=1024)
    assert cache.choose({"kernel": "backward"}, TILES, stand.run, GPU) == TILES[0], "another kernel"
    stand.ran.clear()
    stand.too_large = [TILES[2]]
    with pytest.raises(TooLarge):
        stand.cache().run(SIZES | {"n": 64}, TILES, stand.run, GPU)
    assert stand.ran == [TILES[2]]
    cache.judge(SIZES, TILES[2], GPU, right=False)
    assert stand.choose(stand.cache(), n=64) == TILES[0], "all are wrong: the command said so"
    cache.judge(SIZES, TILES[1], GPU, right=True)
    assert stand.choose(stand.cache()) == TILES[1]
    (kept,) = tile_cache.stored()
    assert kept["wrong"] == {'{"kernel": "forward"}': [list(TILES[0]), list(TILES[2])]} and len(kept["tiles"]) == 2


def test_names():
    assert [tile_cache.length_class(n) for n in (1, 2, 3, 128, 129)] == [1, 2, 4, 128, 256]
    assert tile_cache.source_of(tile_cache) == tile_cache.source_of(tile_cache) != tile_cache.source_of(json)
