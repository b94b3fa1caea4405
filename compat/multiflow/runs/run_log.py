"""The account of a sampling run that is kept beside its samples: ``run.json``.

Several processes may write to it: the ranks of one run, the same command started twice, and other commands into the
same folder. Each reads what is there, puts in what it did itself and writes the whole, under a claim.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...files.atomic import put_back, target_of, write_whole
from ...files.locks import Presence, waiting_for
from .rank import Worker
from .sample_folder import write_all_sequences

Status = Literal["running", "complete", "interrupted", "failed"]

#: A process writes down what it made when that takes less than this part of its time: a run of ten thousand samples
#: has an account of megabytes.
_SHARE_OF_TIME = 0.01


@dataclass(frozen=True)
class SampleRecord:
    """A line of ``run.json``: one sample.

    Attributes:
        folder: Its folder, relative to the run's.
        length: Number of residues.
        index: Number of the sample, from 0.
        seed: The seed it was drawn with: ``Interpolant.sample(..., seeds=[seed])`` gives it again.
        status: ``written``, ``kept`` (it was there already) or ``pending``.
        seconds: Time of the batch it was in; None if this run did not make it.
        batch_size: Size of that batch.
        rank: Which of the run's processes made it.
    """

    folder: str
    length: int
    index: int
    seed: int
    status: Literal["written", "kept", "pending"] = "pending"
    seconds: float | None = None
    batch_size: int | None = None
    rank: int | None = None


class RunLog:
    """A process's part in ``run.json``.

    Args:
        out_dir: The run's folder.
        arguments: What the run was asked for; must be JSON.
        interpolant: The sampler's settings.
        samples: A record of each sample by its folder. The caller replaces them as they are made.
        worker: Which process this is.
        device: Where its model is.

    Attributes:
        kernels: Names of the kernels that ran.

    Raises:
        TypeError: The arguments are not JSON.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        arguments: Mapping[str, Any],
        interpolant: Mapping[str, Any],
        samples: Mapping[str, SampleRecord],
        worker: Worker,
        device: str,
    ) -> None:
        # As they come back from the file. This fails here, not after an hour of sampling.
        self._arguments = _as_read(arguments)
        self._interpolant = _as_read(interpolant)
        self.kernels: list[str] = []
        self._out_dir = out_dir
        self._path = out_dir / "run.json"
        self._samples = samples
        self._worker = worker
        self._device = device
        self._started = time.time()
        self._run = uuid.uuid4().hex[:12]
        self._presence = Presence(out_dir / "run")
        self._errors: list[str] = []
        self._last_write = (0.0, 0.0)  # when it ended, and how long it took

    @property
    def seconds(self) -> float:
        """Time since this process began."""
        return time.time() - self._started

    def start(self) -> None:
        """Joins the account of a run that is going on with the same arguments, or begins one.

        Raises:
            OSError: The account cannot be written.
        """
        with waiting_for(self._path):
            self._clear_leftovers()
            others = self._presence.enter()
            try:
                account = self._read()
                self._warn_of_other_settings(account)
                if account is not None and self._joins(account, others):
                    self._run = account["run"]
                self._write(self._merged(account, "running"))
            except BaseException:
                self._presence.leave()
                raise

    def update(self) -> None:
        """Writes down what was made, unless that was done a moment ago."""
        ended, took = self._last_write
        if time.monotonic() - ended < took / _SHARE_OF_TIME:
            return
        with waiting_for(self._path):
            self._write(self._merged(self._read(), "running"))

    def finish(self, status: Status, error: str | None = None) -> list[SampleRecord]:
        """Writes down how this process ended; who ends a run writes ``sample.fasta`` too.

        Args:
            status: How it ended.
            error: What made it fail.

        Returns:
            What all processes of the run have made so far, in order.
        """
        if error is not None:
            self._errors.append(f"{self._worker}: {error}" if not self._worker.alone else error)
        with waiting_for(self._path):
            try:
                alone = self._presence.alone()
                before = self._read()
                account = self._merged(before, status)
                pending = any(sample["status"] == "pending" for sample in account["samples"])
                if not pending:
                    account["status"] = "complete"
                elif not alone and status == "complete":
                    account["status"] = "running"
                elif self._errors or account["errors"] or status == "complete":
                    account["status"] = "failed"
                was_complete = before is not None and before.get("run") == self._run and before["status"] == "complete"
                if alone or (not pending and not was_complete):
                    write_all_sequences(self._out_dir, self._samples)
                self._write(account)
            finally:
                self._presence.leave()
        return [SampleRecord(**sample) for sample in account["samples"]]

    def _joins(self, account: dict[str, Any], others: bool) -> bool:
        """Whether this process is one more at a run's work, rather than the first of another run."""
        if not self._same(account):
            return False
        if others and account["status"] == "running":
            return True
        # A rank that comes late, when the others have ended already: in one launch each rank comes once.
        ranks = [(each["rank"], each["world_size"]) for each in account["workers"]]
        worker = self._worker
        return (
            not worker.alone
            and all(size == worker.world_size for _, size in ranks)
            and worker.rank not in [rank for rank, _ in ranks]
        )

    def _same(self, account: dict[str, Any]) -> bool:
        ours, theirs = ({**each, "device": ""} for each in (self._arguments, account["arguments"]))
        return ours == theirs and account["interpolant"] == self._interpolant

    def _read(self) -> dict[str, Any] | None:
        """The account that is there; None for none, a damaged one, or one of another program."""
        try:
            account = json.loads(self._path.read_text(encoding="utf-8"))
            for run in (account, *account.setdefault("other_runs", [])):
                _check(run)
            return dict(account)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _merged(self, account: dict[str, Any] | None, status: Status) -> dict[str, Any]:
        """The account with this process's part put in."""
        others = [] if account is None else [account, *account.pop("other_runs")]
        base = next((each for each in others if each.get("run") == self._run), None)
        records = {record.folder: asdict(record) for record in self._samples.values()}
        for sample in base["samples"] if base else ():
            ours = records.get(sample["folder"])
            if ours is None or ours["rank"] is not None:  # made here
                continue
            made_elsewhere = sample["status"] == "pending" and ours["status"] != "pending"
            records[sample["folder"]] = {**ours, "status": "written"} if made_elsewhere else sample
        this = {
            "rank": self._worker.rank,
            "world_size": self._worker.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self._device,
            "threads": torch.get_num_threads(),
            "seconds": round(self.seconds, 3),
            "written": sum(record.rank is not None for record in self._samples.values()),
        }
        workers = [each for each in (base["workers"] if base else ()) if _identity(each) != _identity(this)]
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started))
        return {
            "status": status,
            "run": self._run,
            "started": base["started"] if base else started,
            "seconds": max(round(self.seconds, 3), base["seconds"] if base else 0.0),
            "arguments": base["arguments"] if base else self._arguments,
            "interpolant": self._interpolant,
            "versions": _versions(),
            "kernels": list(dict.fromkeys([*(base["kernels"] if base else ()), *self.kernels])),
            "workers": sorted([*workers, this], key=_identity),
            "errors": list(dict.fromkeys([*(base["errors"] if base else ()), *self._errors])),
            "samples": list(records.values()),
            # What other commands made in this folder, the last of each kind.
            "other_runs": [each for each in others if each is not base and not self._same(each)],
        }

    def _write(self, account: dict[str, Any]) -> None:
        began = time.monotonic()
        write_whole(self._path, json.dumps(account, indent=2) + "\n")
        ended = time.monotonic()
        self._last_write = (ended, ended - began)

    def _clear_leftovers(self) -> None:
        for name in os.listdir(self._out_dir):
            if target_of(name) in ("run.json", "sample.fasta"):
                put_back(self._out_dir / name)

    def _warn_of_other_settings(self, account: dict[str, Any] | None) -> None:
        """Says so where samples are kept that another seed or other settings made."""
        # With `overwrite` those are the other workers' to make anew.
        there = {record.folder for record in self._samples.values() if record.status == "kept"}
        kept = set() if self._arguments["overwrite"] else there
        different: dict[str, None] = {}
        for run in [] if account is None else [account, *account["other_runs"]]:
            theirs = kept.intersection(sample["folder"] for sample in run["samples"] if sample["status"] != "pending")
            kept -= theirs
            if theirs:
                names = [
                    name
                    for name in ("task", "seed", "num_timesteps")
                    if run["arguments"].get(name) != self._arguments[name]
                ]
                different |= dict.fromkeys(names + (["interpolant"] if run["interpolant"] != self._interpolant else []))
        if different:
            warnings.warn(
                f"{self._out_dir} keeps samples that were made with another {', '.join(different)}; "
                "overwrite them, or sample into another folder",
                stacklevel=4,
            )


#: What an account must hold to be gone on with; accounts of older versions lack some.
_KINDS: Mapping[str, type] = {
    "status": str,
    "run": str,
    "started": str,
    "seconds": float,
    "arguments": dict,
    "interpolant": dict,
    "kernels": list,
    "workers": list,
    "errors": list,
}
_NUMBERS = ("rank", "world_size", "pid")


def _identity(worker: Mapping[str, Any]) -> tuple[int, str, int]:
    return worker["rank"], worker["host"], worker["pid"]


def _check(run: dict[str, Any]) -> None:
    """Fills in what an older account lacks; any of four exceptions where it is no account."""
    for sample in run["samples"]:
        SampleRecord(**sample)
    for name, kind in _KINDS.items():
        if not isinstance(run.setdefault(name, kind()), kind):
            raise TypeError(name)
    for worker in run["workers"]:
        if not (isinstance(worker["host"], str) and all(isinstance(worker[name], int) for name in _NUMBERS)):
            raise TypeError("workers")


def _as_read(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data as JSON gives them back: tuples as lists."""
    return dict(json.loads(json.dumps(dict(data))))


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("foldkernels")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"foldkernels": own, "torch": torch.__version__, "python": platform.python_version()}
