"""The account of a sampling run that is kept beside its samples: ``run.json``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .whole_files import write_whole

Status = Literal["running", "complete", "interrupted", "failed"]


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
    """

    folder: str
    length: int
    index: int
    seed: int
    status: Literal["written", "kept", "pending"] = "pending"
    seconds: float | None = None
    batch_size: int | None = None


class RunLog:
    """Writes ``run.json``, anew after each batch.

    Args:
        path: The file.
        arguments: What the run was asked for; must be JSON.
        interpolant: The sampler's settings.
        samples: A record of each sample by its folder. The caller replaces them as they are made.

    Attributes:
        kernels: Names of the kernels that ran.

    Raises:
        TypeError: The arguments are not JSON.
    """

    def __init__(
        self,
        path: Path,
        *,
        arguments: Mapping[str, Any],
        interpolant: Mapping[str, Any],
        samples: Mapping[str, SampleRecord],
    ) -> None:
        json.dumps(dict(arguments))  # fails here, not after an hour of sampling
        self.kernels: list[str] = []
        self._path = path
        self._arguments = dict(arguments)
        self._interpolant = dict(interpolant)
        self._samples = samples
        self._started = time.time()

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.time() - self._started

    def write(self, status: Status) -> None:
        """Writes the account as it stands; makes the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        account = {
            "status": status,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "seconds": round(self.seconds, 3),
            "arguments": self._arguments,
            "interpolant": self._interpolant,
            "versions": _versions(),
            "kernels": self.kernels,
            "samples": [asdict(record) for record in self._samples.values()],
        }
        write_whole(self._path, json.dumps(account, indent=2) + "\n")

    def warn_of_other_settings(self) -> None:
        """Says so where samples are kept that another seed or other settings made."""
        try:
            before = json.loads(self._path.read_text(encoding="utf-8"))
            arguments, interpolant = cast("dict[str, Any]", before["arguments"]), before["interpolant"]
            different = [
                name for name in ("task", "seed", "num_timesteps") if arguments.get(name) != self._arguments[name]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # samples of the original's code, or a damaged file: nothing to compare with
        if interpolant != json.loads(json.dumps(self._interpolant)):
            different.append("interpolant")
        if different:
            warnings.warn(
                f"{self._path.parent} keeps samples that were made with another {', '.join(different)}; "
                "overwrite them, or sample into another folder",
                stacklevel=3,
            )


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("foldkernels")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"foldkernels": own, "torch": torch.__version__, "python": platform.python_version()}
