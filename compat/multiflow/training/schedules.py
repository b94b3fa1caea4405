"""Learning-rate schedules named in a training config."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ....configs.kernel import did_you_mean
from ....errors import BadInput
from .class_paths import build
from .settings import ExperimentConfig

_WHERE = "experiment.lr_scheduler"
_LIGHTNINGS = ("interval", "frequency", "monitor", "strict", "name")


def learning_rate_schedule(experiment: ExperimentConfig, optimizer: Optimizer) -> dict[str, Any] | None:
    """Build `experiment.lr_scheduler` for an optimizer, as Lightning's `configure_optimizers` returns it.

    A schedule moves on after each step of the optimizer unless `interval: epoch` is given.

    Args:
        experiment: The section.
        optimizer: The optimizer whose rates it sets.

    Returns:
        The scheduler and Lightning's settings for it; None where the section is left out.

    Raises:
        BadInput: There is no such schedule, or an argument is wrong.
    """
    spec = experiment.lr_scheduler
    if spec is None:
        return None
    settings: dict[str, Any] = {}
    if isinstance(spec, dict):
        settings = {name: spec[name] for name in _LIGHTNINGS if name in spec}
        spec = {name: value for name, value in spec.items() if name not in _LIGHTNINGS}
        known = ["class_path", "init_args", *_LIGHTNINGS]
        for name in spec:
            if name not in known:
                raise BadInput(f"{_WHERE}: no key {str(name)!r}{did_you_mean(str(name), known)}")
    if settings.get("interval", "step") not in ("step", "epoch"):
        raise BadInput(f"{_WHERE}.interval is {settings['interval']!r}", "use step or epoch.")
    scheduler = build(spec, LRScheduler, "torch.optim.lr_scheduler", _WHERE, optimizer)
    return {"interval": "step", "frequency": 1, **settings, "scheduler": scheduler}
