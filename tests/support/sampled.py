"""A model that costs nothing, for tests of the folder that samples are written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "min_t": 0.01,
    "rots": {"sample_schedule": "exp", "exp_rate": 10},
    "trans": {"sample_schedule": "linear"},
    "aatypes": {"temp": 0.1, "noise": 20.0, "do_purity": True, "interpolant_type": "masking"},
    "sampling": {"num_timesteps": 3},
    "codesign_separate_t": False,
}


class BatchSensitive:
    """Predicts something else in a batch of another size or at another place in it, as rounding makes real models do.

    Args:
        before_call: Called with the number of each call, from 0.

    Attributes:
        sampled: Proteins that were asked for, counted once for all steps.
    """

    def __init__(self, before_call: Callable[[int], None] | None = None) -> None:
        self.weight = torch.linspace(-1, 1, 63).reshape(3, 21)
        self.before_call = before_call
        self.calls = 0

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.before_call is not None:
            self.before_call(self.calls)
        self.calls += 1
        trans = batch["trans_t"]
        items = torch.arange(len(trans))[:, None, None]
        logits = (trans[..., None] * self.weight).sum(-2).sin()
        return {
            "pred_trans": (0.5 + 0.01 * len(trans) + 0.003 * items) * trans,
            "pred_rotmats": batch["rotmats_t"],
            "pred_logits": logits,
            "pred_aatypes": logits[..., :20].argmax(-1),
        }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, but for the account of the run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "run.json"
    }


def hidden(folder: Path) -> list[str]:
    """What a run at work, or one that was killed, leaves."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def in_a_process(work: Callable[[], Any]) -> int:
    """Does something in a forked process, and gives that one's number; it exits with 0, or 1 after an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)
