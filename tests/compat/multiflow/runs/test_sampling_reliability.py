"""Samples and converted checkpoints survive kill -9 at any moment, a full disk, and folders in a bad state."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foldkernels.cli.main import main
from foldkernels.compat.multiflow.checkpoint.files import Checkpoint, read_checkpoint, write_safetensors
from foldkernels.compat.multiflow.runs.rank import Worker
from foldkernels.compat.multiflow.runs.sampling import run_sampling
from foldkernels.errors import BadInput

from ....support.sampled import CONFIG, BatchSensitive, contents, hidden, in_a_process

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the tests fork and mount")

ASKED: dict[str, Any] = {"lengths": [5], "num": 3, "batch_size": 2}


def sampled(out: Path, *, model: BatchSensitive | None = None, **changes: Any) -> Any:
    return run_sampling(model or BatchSensitive(), CONFIG, out, **{**ASKED, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing disturbs writes."""
    out = tmp_path_factory.mktemp("whole")
    sampled(out)
    return contents(out)


def shown(out: Path) -> dict[str, bytes]:
    """The files under their final names."""
    return {name: text for name, text in contents(out).items() if "/." not in f"/{name}"}


def by_sample(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """The samples' files, by sample."""
    found: dict[str, dict[str, bytes]] = {}
    for name, text in files.items():
        if "/" in name:
            found.setdefault(str(Path(name).parent), {})[Path(name).name] = text
    return found


def is_whole(out: Path, whole: dict[str, bytes]) -> int:
    """Holds all that stands under a final name to what it must be; gives the number of samples."""
    samples, expected = by_sample(shown(out)), by_sample(whole)
    for folder, files in samples.items():
        assert files == expected[folder], f"{folder} is not whole"
    if (out / "sample.fasta").exists():
        lines = (out / "sample.fasta").read_text().splitlines()
        truth = whole["sample.fasta"].decode().splitlines()
        assert set(zip(lines[::2], lines[1::2], strict=True)) <= set(zip(truth[::2], truth[1::2], strict=True))
    if (out / "run.json").exists():
        json.loads((out / "run.json").read_text())
    return len(samples)


# kill -9 --------------------------------------------------------------------------------------------------------------

EVENTS = frozenset(("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.truncate", "os.fsync"))


def killed_at(moment: int, out: Path, work: Callable[[], Any]) -> bool:
    """Does the work in another process, which dies at its n-th call to the system about a path in `out`.

    Gives whether it lived that long.
    """

    def run() -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS and arguments and str(out) in str(arguments[0]):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)  # there is no way to take one out again, but the process ends
        # These have no audit event, or one without a path.
        for name in ("fsync", "ftruncate"):
            original = getattr(os, name)
            setattr(os, name, lambda *a, _name=name, _original=original: (hook("os.fsync", (out,)), _original(*a))[1])
        work()

    _, status = os.waitpid(in_a_process(run), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the work failed at moment {moment}"
    return False


def kill_everywhere(out: Path, whole: dict[str, bytes], every: int) -> int:
    """Kills a run at each n-th moment, and runs the same again each time; gives the number of kills."""
    for kills, moment in enumerate(range(1, 100_000, every)):
        shutil.rmtree(out, ignore_errors=True)
        if not killed_at(moment, out, lambda: sampled(out)):
            assert shown(out) == whole
            return kills
        before = is_whole(out, whole)
        model = BatchSensitive()
        run = sampled(out, model=model)
        assert len(run.kept) == before, f"moment {moment}: a finished sample was not kept"
        assert contents(out) == whole and hidden(out) == [], f"moment {moment}"
        assert json.loads((out / "run.json").read_text())["status"] == "complete"
    raise AssertionError("the run never ended")


def test_kill_at_some_moments(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kills = kill_everywhere(tmp_path / "out", whole, every=17)
    assert kills >= 5


@pytest.mark.slow
def test_kill_at_every_moment(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kills = kill_everywhere(tmp_path / "out", whole, every=1)
    print(f"killed at {kills} moments")
    assert kills >= 80


@pytest.mark.filterwarnings("ignore:.*keeps samples that were made with another seed")
def test_kill_while_samples_are_replaced(tmp_path: Path, whole: dict[str, bytes], every: int = 23) -> None:
    """With overwrite each sample is the old one or the new one, and none is lost."""
    out, new = tmp_path / "out", by_sample(whole)
    sampled(tmp_path / "old", seed=7)
    old = by_sample(contents(tmp_path / "old"))
    kills, mixed = 0, 0
    for moment in range(1, 100_000, every):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        if not killed_at(moment, out, lambda: sampled(out, overwrite=True)):
            break
        kills += 1
        for folder, files in by_sample(shown(out)).items():
            assert files in (old[folder], new[folder]), f"moment {moment}: {folder}"
        model = BatchSensitive()
        sampled(out, model=model)
        samples = by_sample(contents(out))
        assert model.calls == 0, f"moment {moment}: a sample was lost"
        assert all(samples[folder] in (old[folder], new[folder]) for folder in new)
        mixed += any(samples[folder] == old[folder] for folder in new) and any(
            samples[folder] == new[folder] for folder in new
        )
        assert hidden(out) == []
        sampled(out, overwrite=True)
        assert contents(out) == whole
    print(f"killed at {kills} moments; both old and new samples were left by {mixed}")
    assert kills >= 5 and mixed >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*keeps samples that were made with another seed")
def test_kill_at_every_moment_while_samples_are_replaced(tmp_path: Path, whole: dict[str, bytes]) -> None:
    test_kill_while_samples_are_replaced(tmp_path, whole, every=1)


@pytest.mark.slow
def test_kill_of_several_at_random_moments(tmp_path: Path) -> None:
    """Three processes in one folder, one of which is killed at a random time; the others do its work."""
    asked = {"lengths": [5, 8], "num": 6, "batch_size": 2}
    run_sampling(BatchSensitive(), CONFIG, tmp_path / "whole", **asked)
    expected = contents(tmp_path / "whole")
    out, chance, kills = tmp_path / "out", random.Random(0), 0

    def work(rank: int) -> None:
        model = BatchSensitive(lambda call: time.sleep(0.003))
        run_sampling(model, CONFIG, out, worker=Worker(rank, 3), progress=False, **asked)

    for attempt in range(60):
        shutil.rmtree(out, ignore_errors=True)
        children = [in_a_process(lambda rank=rank: work(rank)) for rank in range(3)]
        time.sleep(chance.uniform(0, 0.5))
        os.kill(children[0], signal.SIGKILL)
        codes = [os.waitpid(child, 0)[1] for child in children]
        kills += os.WIFSIGNALED(codes[0])
        assert codes[1:] == [0, 0], f"attempt {attempt}"
        assert shown(out) == expected, f"attempt {attempt}"
        run = run_sampling(BatchSensitive(), CONFIG, out, **asked)
        assert len(run.kept) == 12
        assert contents(out) == expected and hidden(out) == []
    print(f"{kills} of 60 were killed before they ended")
    assert kills >= 30


# A full disk ----------------------------------------------------------------------------------------------------------


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk whose number of pages of 4 kB the test chooses, and may change."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    try:
        mount(folder, "size=4k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")

    def of(pages: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(folder)], check=True, capture_output=True)
        return folder

    yield of
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def fill_everywhere(disk: Callable[[int], Path], whole: dict[str, bytes], every: int) -> int:
    """Runs on disks of more and more room until it suffices, and each time again with enough; gives how many failed."""
    for failed, pages in enumerate(range(1, 1000, every)):
        out = disk(1000) / "out"
        shutil.rmtree(out, ignore_errors=True)
        disk(pages)
        try:
            sampled(out)
        except (OSError, BadInput) as error:
            said = str(error)
            assert os.strerror(errno.ENOSPC) in said and str(out) in said, said
        else:
            assert contents(out) == whole
            return failed
        before = is_whole(out, whole)
        assert [name for name in hidden(out) if not name.endswith(".claim")] == [], f"{pages} pages"
        disk(1000)
        run = sampled(out)
        assert len(run.kept) == before
        assert contents(out) == whole and hidden(out) == []
    raise AssertionError("there was never room enough")


def test_a_disk_that_is_too_small(small_disk: Callable[[int], Path], whole: dict[str, bytes]) -> None:
    assert fill_everywhere(small_disk, whole, every=6) >= 2


@pytest.mark.slow
def test_disks_of_every_size(small_disk: Callable[[int], Path], whole: dict[str, bytes]) -> None:
    failed = fill_everywhere(small_disk, whole, every=1)
    print(f"{failed} disks were too small")
    assert failed >= 12


def test_the_command_on_a_full_disk(
    small_disk: Callable[[int], Path], goldens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk(12) / "out"
    words = ["sample", str(goldens / "multiflow" / "small"), "--length", "12", "-n", "4", "--timesteps", "2"]
    words += ["--device", "cpu", "--out", str(out)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and os.strerror(errno.ENOSPC) in said and "finished stay in" in said
    finished = len(list(out.glob("length_12/sample_*")))
    assert finished >= 1
    small_disk(1000)
    assert main(words) == 0
    assert f"{finished} sample(s) were there already" in capsys.readouterr().out
    assert hidden(out) == []


# Folders in a bad state -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(goldens: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Runs the command, which must refuse; gives what it said."""

    def run(out: Path) -> str:
        words = ["sample", str(goldens / "multiflow" / "small"), "--length", "12", "--timesteps", "2"]
        assert main([*words, "--device", "cpu", "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert not said.out and "Traceback" not in said.err and said.err.startswith("error: ")
        return said.err

    return run


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, command: Callable[[Path], str], request: pytest.FixtureRequest
) -> None:
    if os.geteuid() == 0:  # permissions do not bind root, but a disk that is read-only does
        out = request.getfixturevalue("small_disk")(10)
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True, capture_output=True)
    else:
        out = tmp_path / "out"
        out.mkdir()
        out.chmod(0o500)
    assert f"{out}: cannot be written to" in command(out)
    assert f"{out / 'new'}: cannot be written to" in command(out / "new")


def test_files_where_folders_should_be(tmp_path: Path, command: Callable[[Path], str]) -> None:
    for place in ("", "length_12", "length_12/sample_0"):
        out = tmp_path / f"out_{len(place)}"
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text("mine")
        assert "is a file, not a folder to write samples to" in command(out)
        assert (out / place).read_text() == "mine"
    for name in ("run.json", "sample.fasta"):
        (tmp_path / name / name).mkdir(parents=True)
        assert f"{name} is a folder" in command(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "either")
    assert "cannot be written to" in command(tmp_path / "link")


@pytest.mark.parametrize("what", [".", "length_5", "length_5/sample_0"])
@pytest.mark.parametrize("when", [1, 4, 8])
def test_what_is_removed_while_a_run_goes_on(tmp_path: Path, whole: dict[str, bytes], what: str, when: int) -> None:
    """Removed in the middle of a batch: an error that says so, and the same command makes all."""
    out = tmp_path / "out"

    def remove(call: int) -> None:
        if call == when:
            shutil.rmtree(out / what, ignore_errors=True)

    if what == "length_5/sample_0" and when < 3:
        sampled(out, model=BatchSensitive(remove))  # not there yet
        assert contents(out) == whole
        return
    with pytest.raises(BadInput, match="removed"):
        sampled(out, model=BatchSensitive(remove), batch_size=1)
    if what == ".":
        assert not out.exists()
    sampled(out, batch_size=1)
    assert set(contents(out)) == set(whole)
    assert hidden(out) == []


# Conversion -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return read_checkpoint(Path(__file__).parents[3] / "goldens" / "multiflow" / "small")


def converted(folder: Path) -> dict[str, Any]:
    """The files of a conversion, the header of the weights as data: safetensors writes its metadata in any order."""
    files: dict[str, Any] = dict(contents(folder)) if folder.exists() else {}
    text = files.get("model.safetensors")
    if text is not None:
        size = 8 + int.from_bytes(text[:8], "little")
        files["model.safetensors"] = (json.loads(text[8:size]), text[size:])
    return {name: data for name, data in files.items() if not name.endswith(".claim")}


def convert_everywhere(small: Checkpoint, tmp_path: Path, every: int) -> int:
    """Kills a conversion at each n-th moment, and converts again; gives the number of kills."""
    out = tmp_path / "out"
    write_safetensors(small, tmp_path / "whole")
    whole = converted(tmp_path / "whole")
    for kills, moment in enumerate(range(1, 10_000, every)):
        shutil.rmtree(out, ignore_errors=True)
        if not killed_at(moment, out, lambda: write_safetensors(small, out)):
            assert converted(out) == whole
            return kills
        files = {name: data for name, data in converted(out).items() if "/" not in name}
        assert all(text == whole[name] for name, text in files.items()), f"moment {moment}"
        if "model.safetensors" in files:  # it was done, and says so
            with pytest.raises(BadInput, match="already holds"):
                write_safetensors(small, out)
            write_safetensors(small, out, overwrite=True)
        else:
            write_safetensors(small, out)
        assert converted(out) == whole and hidden(out) == [], f"moment {moment}"
    raise AssertionError("the conversion never ended")


def test_a_conversion_that_is_killed(small: Checkpoint, tmp_path: Path) -> None:
    assert convert_everywhere(small, tmp_path, every=5) >= 2


@pytest.mark.slow
def test_a_conversion_that_is_killed_at_every_moment(small: Checkpoint, tmp_path: Path) -> None:
    kills = convert_everywhere(small, tmp_path, every=1)
    print(f"killed at {kills} moments")
    assert kills >= 10


def test_a_conversion_onto_a_disk_that_is_too_small(
    small_disk: Callable[[int], Path], small: Checkpoint, tmp_path: Path
) -> None:
    write_safetensors(small, tmp_path / "whole")
    whole = converted(tmp_path / "whole")
    pages = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir()) // 4096
    for room in (1, 2, pages // 2, pages - 1):
        out = small_disk(room) / "out"
        with pytest.raises(BadInput, match=f"{out}: cannot write the checkpoint there .*No space left"):
            write_safetensors(small, out)
        assert converted(out) == {}
    small_disk(pages + 20)
    write_safetensors(small, out)
    assert converted(out) == whole
    small_disk(pages + 22)  # no room for another beside it, so the old one stays
    with pytest.raises(BadInput, match="No space left"):
        write_safetensors(small, out, overwrite=True)
    assert converted(out) == whole


def test_conversions_at_once_into_one_folder(small: Checkpoint, tmp_path: Path) -> None:
    """One after the other, each whole; and who has nothing to wait for any longer says who is in the way."""
    children = [in_a_process(lambda: write_safetensors(small, tmp_path / "out", overwrite=True)) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    write_safetensors(small, tmp_path / "whole")
    assert converted(tmp_path / "out") == converted(tmp_path / "whole")
