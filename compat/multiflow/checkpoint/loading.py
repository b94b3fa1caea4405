"""From a checkpoint on disk to a model that runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ....configs.options import FoldkernelsConfig
from ....configs.resolve import ConfigError, resolve_kernel
from ....errors import BadInput
from ....kernels.registry.binding import bind
from ..config.sections import model_section
from ..model import FlowModel
from ..model_extras import PARTS
from .files import Checkpoint, fit_report, mismatch_report, read_checkpoint
from .size_limits import refuse_oversize


def load(
    path: str | Path,
    kernel: Any = None,
    device: str | torch.device | None = None,
    *,
    command_line: Iterable[str] = (),
) -> FlowModel:
    """A model with a checkpoint's weights, on the kernels that you name, in eval mode.

    Args:
        path: A folder with last.ckpt (or model.safetensors) and config.yaml, or such a file. No code in it is run.
        kernel: A word, a mapping or a `KernelConfig`; by default the environment, then the `kernel:` section of the
            checkpoint's config, then auto.
        device: Where the model goes; by default the CPU.
        command_line: The values of `--kernel`.

    Returns:
        The model. `model.config` is the checkpoint's whole config, `model.kernels` what was bound and why.

    Raises:
        BadInput: The checkpoint cannot be read, or its weights do not fit its config.
        KernelUnavailable: A required kernel cannot run here.
    """
    return build(read_checkpoint(path), kernel, device, command_line=command_line)


def build(
    checkpoint: Checkpoint,
    kernel: Any = None,
    device: str | torch.device | None = None,
    *,
    command_line: Iterable[str] = (),
) -> FlowModel:
    """As `load`, from a checkpoint that has been read."""
    model = described(checkpoint.config, checkpoint.source)
    _load_weights(model, checkpoint)
    model.to(_device(device))
    model.config = checkpoint.config
    section = _section(checkpoint, "kernel")
    try:  # by itself first: a call's or a command line's mistake is told as theirs
        resolve_kernel(file=section, environment="")
    except ConfigError as error:
        raise BadInput(f"{checkpoint.source}: {error}", "correct the config's `kernel:` section.") from error
    model.kernels = bind(model, kernel, command_line=command_line, file=section)
    return model.eval()


def _load_weights(model: FlowModel, checkpoint: Checkpoint) -> None:
    wanted, found = model.state_dict(), dict(checkpoint.state_dict)
    lacking = [part for part in PARTS if _names(wanted, part) and not _names(found, part)]
    unready = [part for part in lacking if getattr(model.options, part).init != "zero"]
    if unready:
        report = mismatch_report([name for part in unready for name in _names(wanted, part)], [], [])
        sections = " and ".join(f"foldkernels.{part}" for part in unready)
        first = "checkpoint" if unready[0] == "esm_combiner" else "block"
        how = f"{unready[0]}: {{{first}: ..., init: zero}}"
        raise BadInput(
            f"{checkpoint.source}: the config asks for {sections}, whose weights are not in this checkpoint.\n{report}",
            "train them first, and load the checkpoint that the training writes; or start them fresh, with the model "
            f"unchanged at first, by `{how}`; or leave the section out.",
        )
    for part in lacking:
        found |= {name: wanted[name] for name in _names(wanted, part)}
    model.fresh = tuple(lacking)
    report = fit_report(wanted, found)
    if report:
        raise BadInput(
            f"{checkpoint.source}: its weights do not fit the model that its config describes.\n{report}",
            "use the config.yaml that was written with these weights.",
        )
    model.load_state_dict(found, strict=True)


def _names(state: dict[str, torch.Tensor], part: str) -> list[str]:
    return [name for name in state if name.startswith(f"{part}.")]


def _device(device: str | torch.device | None) -> torch.device:
    try:
        wanted = torch.device(device or "cpu")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}", "use --device cpu, cuda or mps."
        ) from None
    return wanted


def _section(checkpoint: Checkpoint, name: str) -> Any:
    """A section of ours, resolved from the root; None where there is none."""
    try:
        # Not `name in config`: that is false for a reference to nothing, too.
        section = OmegaConf.select(checkpoint.config, name, throw_on_missing=True)
        if OmegaConf.is_config(section):
            return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{checkpoint.source}: the config's section `{name}:` does not resolve ({reason}).") from error
    return section


def described(config: DictConfig, source: Path) -> FlowModel:
    """The model that a whole config describes, with first weights.

    Args:
        config: The config.
        source: Where it is from, for messages.

    Raises:
        BadInput: A setting is wrong, or no memory holds such a model.
    """
    section, options = model_section(config, source), options_of(Checkpoint({}, config, source))
    refuse_oversize(section, options, str(source))
    return FlowModel(section, options)


def options_of(checkpoint: Checkpoint) -> FoldkernelsConfig:
    """The `foldkernels:` section of a checkpoint's config, checked; the defaults where there is none.

    Raises:
        BadInput: A key or a value is wrong; the message names the nearest that exists.
    """
    try:
        return FoldkernelsConfig.model_validate(_section(checkpoint, "foldkernels") or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{checkpoint.source}: {'.'.join(['foldkernels', *map(str, first['loc'])])}: "
            f"{first['msg'].removeprefix('Value error, ')}",
            f"the section's keys are {', '.join(FoldkernelsConfig.model_fields)}; docs/configuration.md lists theirs.",
        ) from None
