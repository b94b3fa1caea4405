"""The account of a training run that is kept beside its checkpoints: `run.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ...files.atomic import write_whole

Status = Literal["_running", "complete", "interrupted", "failed"]


class TrainingRecord:
    """Writes `run.json`.

    Args:
        path: The file.
        facts: What is known at the start: arguments, device, numbers of parameters; must be JSON.

    Attributes:
        kernels: Names of the kernels that ran.
        last: The last row of the losses.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, dict(facts)
        self._started = time.time()
        self.kernels: list[str] = []
        self.last: Mapping[str, float] = {}
        json.dumps(self._facts)  # fails here, not after an hour of training

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.time() - self._started

    def write(self, status: Status, problem: str | None = None) -> None:
        """Writes the account as it stands."""
        account = {
            "status": status,
            **({"problem": problem} if problem else {}),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "seconds": round(self.seconds, 3),
            **self._facts,
            "machine": _machine(),
            "versions": _versions(),
            "kernels": self.kernels,
            "last": dict(self.last),
        }
        write_whole(self._path, json.dumps(account, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("foldkernels", "pytorch-lightning", "numpy", "scipy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
