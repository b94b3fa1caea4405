"""A folder is read once: what is kept of it, and how processes share the work."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foldkernels.compat.multiflow.dataset import (
    StructureDataset,
    parsed,
    reading,
)
from foldkernels.errors import BadInput

from ....support.structures import chain_lines, equal, stored_files


def test_what_was_read_is_kept(
    folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    read_atoms = parsed.read_atoms
    monkeypatch.setattr(parsed, "read_atoms", lambda path: (calls.append(path.name), read_atoms(path))[1])
    for name in ("a.pdb", "b.pdb"):
        (folder / name).write_text(chain_lines(20) + chain_lines(8, "B", start=50))
    first = StructureDataset(folder, settings())
    items = [first[index] for index in range(4)]
    assert calls == ["a.pdb", "b.pdb"]
    kept = stored_files(tmp_path / "cache")
    assert [path.suffix for path in kept] == [".safetensors"] * 2

    calls.clear()
    second = StructureDataset(folder, settings())
    assert all(equal(items[index], second[index]) for index in range(4))
    assert not calls

    # Damaged in each way: cut short, emptied, a byte changed, something else.
    whole = kept[0].read_bytes()
    changed = bytearray(whole)
    changed[-100] ^= 1
    for damage in (whole[:-10], whole[:20], b"", bytes(changed), b"x" * 500):
        calls.clear()
        kept[0].write_bytes(damage)
        again = StructureDataset(folder, settings())
        assert all(equal(items[index], again[index]) for index in range(4))
        assert len(calls) == 1
        assert kept[0].read_bytes() == whole

    # A file that has changed is another file.
    calls.clear()
    (folder / "a.pdb").write_text(chain_lines(21))
    assert StructureDataset(folder, settings()).lengths == [21, 20, 8]
    assert calls == ["a.pdb"]
    with pytest.raises(BadInput, match="has changed since"):
        pickle.loads(pickle.dumps(second))[0]

    monkeypatch.setattr(parsed, "PARSER_VERSION", parsed.PARSER_VERSION + 1)
    calls.clear()
    StructureDataset(folder, settings())
    assert calls == ["a.pdb", "b.pdb"]


def test_without_a_cache(folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(20))
    off = StructureDataset(folder, settings(cache="off"))
    assert off[0]["res_mask"].sum() == 20
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(UserWarning, match="nothing is kept in .*cache"):
        blocked = StructureDataset(folder, settings())
    assert equal(blocked[0], off[0])


def test_the_users_cache_folder(
    folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "mine"))
    (folder / "a.pdb").write_text(chain_lines(20))
    StructureDataset(folder, settings(cache="auto"))
    assert len(stored_files(tmp_path / "mine" / "structures")) == 1


@pytest.mark.filterwarnings("ignore")
def test_processes_read_many_new_files(
    folder: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    read_atoms = parsed.read_atoms
    monkeypatch.setattr(parsed, "read_atoms", lambda path: (calls.append(path.name), read_atoms(path))[1])
    monkeypatch.setattr(reading, "_MANY", 5)
    for place in range(5):
        (folder / f"{place}.pdb").write_text(chain_lines(20 + place))
    (folder / "broken.pdb").write_text("")
    data = StructureDataset(folder, settings(loader={"num_workers": 2}))
    assert data.lengths == [20, 21, 22, 23, 24]
    assert calls == ["broken.pdb"]  # this process has only looked through them
    assert data.report.reasons == {"cannot be read": 1}


def test_processes_that_start_together(folder: Path, settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for place in range(12):
        (folder / f"{place:02}.pdb").write_text(chain_lines(20 + place))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def read(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            data = StructureDataset(folder, settings(), rank=rank % 3, world_size=3)
            results.put([data[index]["trans_1"].sum().item() for index in range(len(data))])
        except BaseException as error:  # or the test would wait forever
            results.put(repr(error))
            raise

    processes = [context.Process(target=read, args=(rank,)) for rank in range(6)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join(60)
    assert len(found[0]) == 12
    assert all(one == found[0] for one in found)
    assert [path.suffix for path in stored_files(tmp_path / "cache")] == [".safetensors"] * 12


def test_ranks_share_the_first_reading(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    for place in range(6):
        (folder / f"{place}.pdb").write_text(chain_lines(20 + place))
    ranks = [StructureDataset(folder, settings(), rank=rank, world_size=3) for rank in range(3)]
    assert ranks[0].examples == ranks[1].examples == ranks[2].examples
    assert ranks[0].lengths == [20, 21, 22, 23, 24, 25]
