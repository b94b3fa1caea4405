"""Sampling in several processes: whatever their number, the folder is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foldkernels.cli.main import main
from foldkernels.cli.options import device_of_rank
from foldkernels.compat.files import locks
from foldkernels.compat.files.locks import Claim, claim_path, holder
from foldkernels.compat.multiflow.runs import work_sharing
from foldkernels.compat.multiflow.runs.rank import Worker
from foldkernels.compat.multiflow.runs.sampling import run_sampling
from foldkernels.errors import BadInput

from ....support.sampled import CONFIG, BatchSensitive, contents, hidden, in_a_process

pytestmark = pytest.mark.skipif(os.name == "nt", reason="claims are POSIX locks, and the tests fork")

ASKED: dict[str, Any] = {"lengths": [6, 4], "num": 5, "batch_size": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone")
    run_sampling(BatchSensitive(), CONFIG, out, **ASKED)
    assert hidden(out) == []
    return contents(out)


def account(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def at_once(works: list[Any]) -> list[BaseException | None]:
    """Does all of it at the same time, in threads; gives what each raised."""
    errors: list[BaseException | None] = [None] * len(works)

    def run(index: int) -> None:
        try:
            works[index]()
        except BaseException as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return errors


# Who is who -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, (3, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}, (5, 6, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1, 0)),  # a batch script's own process
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            (1, 2, 0),
        ),
    ],
)
def test_the_launchers_variables_are_read(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    worker = Worker.from_environment(environment)
    assert (worker.rank, worker.world_size, worker.local_rank) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, "RANK is set .1. and WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_variables_that_do_not_fit_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Worker.from_environment(environment)


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [device_of_rank("cuda", rank) for rank in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"]
    assert device_of_rank("cuda:2", 1) == "cuda:2"
    assert device_of_rank("cpu", 1) == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # a scheduler shows each process its own only
    assert device_of_rank("cuda", 3) == "cuda:0"


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_at_once_write_what_one_process_writes(tmp_path: Path, alone: dict[str, bytes], world_size: int) -> None:
    barrier = threading.Barrier(world_size)
    # The first call of each waits for all: else the first thread could be done before the last begins.
    models = [BatchSensitive(lambda call: barrier.wait(60) if call == 0 else None) for _ in range(world_size)]
    runs: list[Any] = [None] * world_size

    def rank(index: int) -> None:
        runs[index] = run_sampling(models[index], CONFIG, tmp_path, worker=Worker(index, world_size), **ASKED)

    # Six batches: with seven ranks one has nothing to do, and must not be waited for.
    if world_size == 7:
        barrier = threading.Barrier(6)
    assert at_once([lambda index=index: rank(index) for index in range(world_size)]) == [None] * world_size
    assert contents(tmp_path) == alone
    assert sum(model.calls for model in models) == 6 * 3  # no batch twice
    told = account(tmp_path)
    assert told["status"] == "complete"
    assert [worker["rank"] for worker in told["workers"]] == list(range(world_size))
    assert sum(worker["written"] for worker in told["workers"]) == 10
    assert {sample["status"] for sample in told["samples"]} == {"written"}
    assert len({sample["rank"] for sample in told["samples"]}) == min(world_size, 6)
    assert told["other_runs"] == told["errors"] == []
    assert all(len(run.samples) == 10 and not run.kept for run in runs)


def test_a_rank_begins_with_its_share_and_goes_on_with_the_others(tmp_path: Path, alone: dict[str, bytes]) -> None:
    order: list[int] = []
    model = BatchSensitive(lambda call: order.append(len(list(tmp_path.glob("length_*/sample_*")))))
    run_sampling(model, CONFIG, tmp_path, worker=Worker(1, 3), **ASKED)
    assert contents(tmp_path) == alone
    ranks = [sample["rank"] for sample in account(tmp_path)["samples"]]
    assert ranks == [1] * 10
    assert order[::3] == [0, 2, 4, 5, 6, 8]  # batches 1, 4; 2, 5 (of one sample each); 0, 3


def test_resuming_with_another_number_of_ranks_makes_what_is_missing(tmp_path: Path, alone: dict[str, bytes]) -> None:
    def stop(call: int) -> None:
        if call == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sampling(BatchSensitive(stop), CONFIG, tmp_path, worker=Worker(0, 2), **ASKED)
    assert account(tmp_path)["status"] == "interrupted"
    shutil.rmtree(tmp_path / "length_6" / "sample_0")  # half a batch: it is made whole, or it would round otherwise
    models = [BatchSensitive() for _ in range(3)]
    ranks = [lambda r=r: run_sampling(models[r], CONFIG, tmp_path, worker=Worker(r, 3), **ASKED) for r in range(3)]
    assert at_once(ranks) == [None] * 3
    assert contents(tmp_path) == alone
    assert sum(model.calls for model in models) == 5 * 3  # batches 0 (of which one sample was there) and four others


def test_a_rank_that_fails_says_so_and_the_others_do_its_work(tmp_path: Path, alone: dict[str, bytes]) -> None:
    both = threading.Barrier(2)

    def fail(call: int) -> None:
        if call == 0:
            both.wait(60)
        if call == 4:
            raise RuntimeError("the GPU caught fire")

    models = [BatchSensitive(lambda call: both.wait(60) if call == 0 else time.sleep(0.01)), BatchSensitive(fail)]
    ranks = [lambda r=r: run_sampling(models[r], CONFIG, tmp_path, worker=Worker(r, 2), **ASKED) for r in range(2)]
    first, second = at_once(ranks)
    assert first is None and isinstance(second, RuntimeError)
    assert "rank 1 of 2" in second.__notes__[0] and "the same command makes the rest" in second.__notes__[0]
    assert contents(tmp_path) == alone
    told = account(tmp_path)
    assert told["status"] == "complete"
    assert len(told["errors"]) == 1 and "rank 1 of 2" in told["errors"][0] and "caught fire" in told["errors"][0]


def test_ranks_make_their_share_anew_with_overwrite(tmp_path: Path, alone: dict[str, bytes]) -> None:
    run_sampling(BatchSensitive(), CONFIG, tmp_path, **{**ASKED, "seed": 7})
    models = [BatchSensitive() for _ in range(2)]
    for rank in (1, 0):  # one after the other: the second must not take the first's samples for old ones
        run_sampling(models[rank], CONFIG, tmp_path, worker=Worker(rank, 2), overwrite=True, **ASKED)
    assert contents(tmp_path) == alone
    assert [model.calls for model in models] == [9, 9]
    told = account(tmp_path)
    assert told["status"] == "complete" and {sample["status"] for sample in told["samples"]} == {"written"}


def test_a_late_rank_finds_the_work_done(tmp_path: Path) -> None:
    run_sampling(BatchSensitive(), CONFIG, tmp_path, worker=Worker(0, 2), **ASKED)
    run = run_sampling(BatchSensitive(), CONFIG, tmp_path, worker=Worker(1, 2), **ASKED)
    assert not run.kept and len(run.written) == 10
    assert [worker["written"] for worker in account(tmp_path)["workers"]] == [10, 0]
    # The same again is another run, which keeps all.
    assert len(run_sampling(BatchSensitive(), CONFIG, tmp_path, worker=Worker(0, 2), **ASKED).kept) == 10


def test_a_file_system_without_locks(tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell then what another makes: each rank does its own share, and no more."""
    monkeypatch.setattr(locks, "fcntl", None)
    model = BatchSensitive()
    run_sampling(model, CONFIG, tmp_path, worker=Worker(0, 2), **ASKED)
    assert model.calls == 9
    run_sampling(model, CONFIG, tmp_path, worker=Worker(1, 2), **ASKED)
    assert model.calls == 18
    assert contents(tmp_path) == alone


# Other commands in the same folder ------------------------------------------------------------------------------------


def test_commands_at_once_in_one_folder(tmp_path: Path, alone: dict[str, bytes]) -> None:
    """The same one three times, and another beside them: nothing is made twice, and nothing lost."""
    models = [BatchSensitive(lambda call: time.sleep(0.005)) for _ in range(4)]
    other = {**ASKED, "lengths": [4, 9], "num": 7}
    works = [lambda m=m: run_sampling(m, CONFIG, tmp_path, **ASKED) for m in models[:3]]
    assert at_once([*works, lambda: run_sampling(models[3], CONFIG, tmp_path, **other)]) == [None] * 4
    got = contents(tmp_path)
    assert hidden(tmp_path) == []
    folders = {f"length_{length}/sample_{index}" for length, num in ((6, 5), (4, 7), (9, 7)) for index in range(num)}
    assert {str(Path(name).parent) for name in got} == folders | {"."}
    assert all(got[name] == text for name, text in alone.items() if name.startswith("length_6"))
    names = [line[1:] for line in got["sample.fasta"].decode().splitlines()[::2]]
    assert sorted(names) == sorted(folder.replace("/", "_") for folder in folders)
    told = account(tmp_path)
    runs = [told, *told["other_runs"]]
    assert sorted(len(run["samples"]) for run in runs) == [10, 14]
    assert [run["status"] for run in runs] == ["complete"] * 2
    # A batch is made by one process alone, but for those that the two commands cut differently.
    assert sum(model.calls for model in models) <= 3 * (3 + 3 + 4 + 4)


def test_a_sample_that_was_finished_just_before_it_was_claimed(
    tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Claim.take

    def late(place: Path) -> Claim | None:
        if place == tmp_path / "length_6" / "sample_0":
            monkeypatch.setattr(Claim, "take", take)
            run_sampling(BatchSensitive(), CONFIG, tmp_path, **ASKED)  # another command comes and goes
        return take(place)

    monkeypatch.setattr(Claim, "take", late)
    model = BatchSensitive()
    run_sampling(model, CONFIG, tmp_path, **ASKED)
    assert model.calls == 0
    assert contents(tmp_path) == alone


def test_a_lone_process_says_for_whom_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_sharing, "_PATIENCE", 0.2)
    (tmp_path / "length_6").mkdir()
    claim = Claim.take(tmp_path / "length_6" / "sample_1")
    assert claim is not None
    timer = threading.Timer(1.0, claim.release)
    timer.start()
    with pytest.warns(UserWarning, match=f"waiting for 1 sample.s. that process {os.getpid()} on"):
        run = run_sampling(BatchSensitive(), CONFIG, tmp_path, lengths=[6], num=2)
    timer.join()
    assert len(run.written) == 2  # it was given up, and taken over


# Claims ---------------------------------------------------------------------------------------------------------------


def test_a_claim_excludes_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "sample_0"
    with Claim.take(place) as claim:  # type: ignore[union-attr]
        assert claim.locked and not claim.inherited
        assert Claim.take(place) is None
        assert holder(place) == f"process {os.getpid()} on {os.uname().nodename}"
    assert os.listdir(tmp_path) == []
    assert holder(place) == "another process"


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    place = tmp_path / "sample_0"
    child = in_a_process(lambda: Claim.take(place) and time.sleep(120))
    deadline = time.monotonic() + 60
    while not claim_path(place).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert Claim.take(place) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert claim_path(place).exists()
    claim = Claim.take(place)
    assert claim is not None and claim.inherited
    claim.release()
    assert os.listdir(tmp_path) == []


def test_a_claim_is_held_once_at_a_time(tmp_path: Path) -> None:
    """Releasing removes the file: who locks the removed one must not think that it holds the path."""
    place, inside, most, taken = tmp_path / "x", 0, 0, 0

    def work() -> None:
        nonlocal inside, most, taken
        for _ in range(300):
            claim = Claim.take(place)
            if claim is not None:
                inside += 1
                most = max(most, inside)
                taken += 1
                inside -= 1
                claim.release()

    assert at_once([work] * 4) == [None] * 4
    assert most == 1 and taken > 0
    assert os.listdir(tmp_path) == []


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(goldens: Path) -> Iterator[Path]:
    yield goldens / "multiflow" / "small"


def launched(*words: object, processes: int = 2, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    return subprocess.run(
        [*launcher, "-m", "foldkernels", "sample", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


@pytest.mark.slow
def test_torchrun_writes_what_one_process_writes(small: Path, tmp_path: Path, capsys: Any) -> None:
    words = (small, "--length", "30,17", "-n", 3, "--batch-size", 2, "--timesteps", 3, "--device", "cpu", "--out")
    assert main(["sample", *map(str, words), str(tmp_path / "one")]) == 0
    done = launched(*words, tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    report = json.loads(done.stdout)  # of rank 0 alone
    assert report["processes"] == 2 and len(report["written"]) == 6
    told = account(tmp_path / "two")
    assert [worker["rank"] for worker in told["workers"]] == [0, 1]
    assert all(worker["written"] for worker in told["workers"])

    # Some are lost; three ranks make them again.
    shutil.rmtree(tmp_path / "two" / "length_30" / "sample_0")
    shutil.rmtree(tmp_path / "two" / "length_17" / "sample_2")
    done = launched(*words, tmp_path / "two", processes=3)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert "2 sample(s) written" in done.stdout and "4 sample(s) were there already" in done.stdout


@pytest.mark.slow
def test_torchrun_with_a_rank_that_fails(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (small, "--length", 30, "-n", 6, "--timesteps", 3, "--device", "cpu", "--out", out)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch.nn.functional as F\n"
        "    def fail(*a, **k): raise RuntimeError('the GPU caught fire')\n"
        "    F.softmax = fail\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = launched(*words, PYTHONPATH=path)
    assert done.returncode != 0
    assert "the GPU caught fire" in done.stderr and "rank 1 of 2" in done.stderr
    assert "the samples that are finished stay in" in done.stderr
    for folder in out.glob("length_30/sample_*"):
        assert {file.name for file in folder.iterdir()} == {"sample.pdb", "sample.fasta", "bb_traj.pdb", "x0_traj.pdb"}
    done = launched(*words)
    assert done.returncode == 0, done.stderr
    assert account(out)["status"] == "complete" and hidden(out) == []
