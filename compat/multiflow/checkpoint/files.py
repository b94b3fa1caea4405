"""Finds, reads and writes Multiflow checkpoints: the weights, and the whole config that they were trained with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from ....errors import BadInput
from ...checkpoints.weight_files import (
    find_shards,
    is_safetensors,
    is_sharded,
    read_content,
    read_safetensors,
    read_shards,
    refuse_other_folders,
    state_of,
)
from ...checkpoints.wrapped_names import unwrapped
from ...files.atomic import flush_to_disk
from ...files.locks import holder, waiting_for
from ..config.reference_limits import refuse_bombs
from ..config.sections import read_config

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

LIGHTNING_NAME = "last.ckpt"
SAFETENSORS_NAME = "model.safetensors"
CONFIG_NAME = "config.yaml"
_ASIDE = ".writing-"
_LINES_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """Weights and config as read from disk.

    Attributes:
        state_dict: Names without the leading `model.` that Lightning gives them, tensors on the CPU.
        config: The whole config, unresolved: a section resolves from this root.
        source: The file with the weights.
    """

    state_dict: dict[str, Tensor]
    config: DictConfig
    source: Path


def find_weights(path: str | Path) -> Path:
    """Gives the weights file that a path means.

    Args:
        path: A `.ckpt` or `.safetensors` file, the index of shards or one of them; or a folder with `last.ckpt`, else
            `model.safetensors`, else shards in it.

    Raises:
        BadInput: There is no such path, the folder holds none of these files, or it is one of DeepSpeed or
            torch.distributed.checkpoint; the error has the command that converts it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for name in (LIGHTNING_NAME, SAFETENSORS_NAME):
            if (path / name).is_file():
                return path / name
            refuse_other_folders(path / name)
        refuse_other_folders(path)
        shards = find_shards(path)
        if shards is not None:
            return shards
        if (path / "pytorch_model.bin").is_file():
            return path / "pytorch_model.bin"
        others = sorted(file.name for file in path.iterdir() if file.suffix in (".ckpt", ".safetensors", ".pt", ".pth"))
        found = f" It holds {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}." if others else ""
        hint = f"pass the file itself: {path / others[0]}" if others else "pass the folder that training wrote."
        raise BadInput(f"{path}: no {LIGHTNING_NAME} and no {SAFETENSORS_NAME} in this folder.{found}", hint)
    if not path.exists():
        raise BadInput(f"{path}: there is no such file or folder.", "check the path.")
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint. Nothing in the file is run, and omegaconf's pickled objects are only data.

    The config is the `config.yaml` beside the weights; for a `.ckpt` without one, the config that Lightning saved.

    Args:
        path: See `find_weights`.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        BadInput: It is missing, damaged, hostile, holds no weights, or has no config; the message names the file.
    """
    source = find_weights(path)
    beside = source.parent / CONFIG_NAME
    config = read_config(beside) if beside.is_file() else None
    sharded = is_sharded(source)
    if sharded or is_safetensors(source):
        if config is None:
            raise BadInput(f"{source}: there is no {CONFIG_NAME} beside it.", "put the model's config.yaml there.")
        tensors = read_shards(source) if sharded else read_safetensors(source)
        return Checkpoint(_weights(source, tensors), config, source)

    content = read_content(source)
    if not isinstance(content, Mapping):
        raise BadInput(f"{source}: this holds {type(content).__name__}, not a checkpoint.")
    state_dict = _weights(source, state_of(content, str(source)))
    return Checkpoint(state_dict, config if config is not None else _pickled_config(source, content), source)


def write_safetensors(checkpoint: Checkpoint, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes `model.safetensors` and `config.yaml`, which `read_checkpoint` reads back as the same checkpoint.

    Both are written whole in a folder aside and then renamed into place: no reader meets half a file, and a failure (a
    full disk, a killed process) leaves what was there. The same call then does what is left to do.

    Args:
        checkpoint: What to write.
        folder: Where; made if it does not exist.
        overwrite: Replace files of these names.

    Returns:
        The path of the weights.

    Raises:
        BadInput: The files exist and `overwrite` is false, the folder cannot be written, or another process is writing
            there.
    """
    from omegaconf import OmegaConf
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder).expanduser()
    config = OmegaConf.to_yaml(checkpoint.config, resolve=False)
    if not overwrite:
        _refuse_to_replace(folder, config)
    # The last two parts of the path: enough to know the file again, and no home folder in a file meant for publishing.
    source = "/".join(checkpoint.source.absolute().parts[-2:])
    metadata = {"format": "pt", "written_by": "foldkernels", "source": source}
    # Copies: safetensors refuses tensors that share memory, as tied weights and views do.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in checkpoint.state_dict.items()}
    aside = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_for(folder / SAFETENSORS_NAME) as claim:
            if claim is None:
                raise BadInput(
                    f"{folder}: {holder(folder / SAFETENSORS_NAME)} is writing a checkpoint there.",
                    "wait for it, or choose another folder.",
                )
            if claim.locked:  # nobody else is at it: what there is of unfinished writing is a killed process's
                for left in folder.glob(f"{_ASIDE}*"):
                    shutil.rmtree(left, ignore_errors=True)
            aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
            save_file(tensors, aside / SAFETENSORS_NAME, metadata)
            (aside / CONFIG_NAME).write_text(config, encoding="utf-8")
            # save_file gives its file to its owner alone; the config has the mode that the user's umask asks for.
            (aside / SAFETENSORS_NAME).chmod((aside / CONFIG_NAME).stat().st_mode & 0o777)
            for name in (SAFETENSORS_NAME, CONFIG_NAME):
                with open(aside / name, "rb+") as file:
                    flush_to_disk(file.fileno())
            _rename_both(aside, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{folder}: cannot write the checkpoint there ({reason}).") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder / SAFETENSORS_NAME


def _refuse_to_replace(folder: Path, config: str) -> None:
    existing = [name for name in (SAFETENSORS_NAME, CONFIG_NAME) if (folder / name).exists()]
    if existing == [CONFIG_NAME] and (folder / CONFIG_NAME).read_bytes() == config.encode("utf-8"):
        return  # this very conversion, killed between its two renames
    if existing:
        raise BadInput(f"{folder}: already holds {' and '.join(existing)}.", "choose another folder, or overwrite.")


def mismatch_report(
    missing: Iterable[str],
    unexpected: Iterable[str],
    wrong_shape: Iterable[tuple[str, Sequence[int], Sequence[int]]],
) -> str:
    """Lists on one screen how a state_dict differs from a model.

    Args:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the model lacks.
        wrong_shape: (name, the model's shape, the checkpoint's shape).

    Returns:
        Text of some thirty lines at most, each list cut with a count; empty if nothing differs.
    """
    shapes = (f"{name}: model {tuple(model)}, checkpoint {tuple(found)}" for name, model, found in wrong_shape)
    lists = (
        ("the model has, but the checkpoint lacks", list(missing)),
        ("the checkpoint has, but the model lacks", list(unexpected)),
        ("shapes differ", list(shapes)),
    )
    lines: list[str] = []
    for title, entries in lists:
        if not entries:
            continue
        lines.append(f"{title} ({len(entries)}):")
        lines += [f"  {entry}" for entry in entries[:_LINES_SHOWN]]
        if len(entries) > _LINES_SHOWN:
            lines.append(f"  ... and {len(entries) - _LINES_SHOWN} more")
    return "\n".join(lines)


def fit_report(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """`mismatch_report` of a model's state_dict and a checkpoint's; empty if names and shapes are the same."""
    return mismatch_report(
        [name for name in wanted if name not in found],
        [name for name in found if name not in wanted],
        [
            (name, tensor.shape, found[name].shape)
            for name, tensor in wanted.items()
            if name in found and tensor.shape != found[name].shape
        ],
    )


def _rename_both(aside: Path, folder: Path) -> None:
    """Moves the pair into place; if the weights' move fails, the config's is taken back.

    The config goes first because its old content is small enough to keep: the old weights are never anywhere but in
    their place, until the new ones are.
    """
    config = folder / CONFIG_NAME
    before = config.read_bytes() if config.exists() else None
    os.replace(aside / CONFIG_NAME, config)
    try:
        os.replace(aside / SAFETENSORS_NAME, folder / SAFETENSORS_NAME)
    except OSError:
        if before is None:
            config.unlink()
        else:
            config.write_bytes(before)
        raise


def _weights(source: Path, weights: object) -> dict[str, Tensor]:
    """Checks that these are weights, and takes Lightning's and wrappers' parts off their names."""
    import torch

    if not isinstance(weights, Mapping):
        raise BadInput(f"{source}: its state_dict is a {type(weights).__name__}, not a table of tensors.")
    if not weights:
        raise BadInput(f"{source}: its state_dict is empty: there are no weights in it.")
    strange = [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange:
        names = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        raise BadInput(f"{source}: no state_dict in it: these entries are no tensors: {names}.")
    # Names of other modules stay as they are, so that the model's own strict loading names them.
    return {name: value.detach() for name, value in unwrapped(weights, str(source)).items()}


def _pickled_config(source: Path, content: Mapping[str, object]) -> DictConfig:
    """The config among the hyperparameters that Lightning saved with the weights."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ...checkpoints.plain_data import plain

    hint = f"put the model's {CONFIG_NAME} beside it."
    try:
        saved = plain(content.get("hyper_parameters"))
        config = saved.get("cfg", saved) if isinstance(saved, dict) else None
        if isinstance(config, dict) and config:
            refuse_bombs(config, str(source))
            return OmegaConf.create(config)
    except BadInput:
        raise
    except (UnpicklingError, OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{source}: the config saved in it cannot be used ({reason}).", hint) from error
    raise BadInput(f"{source}: there is no {CONFIG_NAME} beside it, and no config saved in it.", hint)
