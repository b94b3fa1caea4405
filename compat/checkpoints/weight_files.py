"""Finds and reads files of weights in the forms that training tools leave: whole, in shards, or as a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors|\.bin)")
_MOST_INDEX_BYTES = 1 << 26
_DOWNLOAD = "copy or download the file again, and compare its size with the original's."
_STATE_KEYS = ("state_dict", "model_state_dict", "module", "model")
_AVERAGED_KEYS = ("ema_state_dict", "ema", "model_ema")


def refuse_other_folders(folder: Path) -> None:
    """Names a folder that a tool for distributed training wrote, with the command that makes one file of it.

    Raises:
        BadInput: It is such a folder.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    target = folder.with_name(folder.name.removesuffix(".ckpt") + "-whole")
    if "zero_to_fp32.py" in names or any(name.endswith("_model_states.pt") for name in names):
        top = folder if "zero_to_fp32.py" in names else folder.parent
        raise BadInput(
            f"{folder}: this is a checkpoint folder of DeepSpeed, not a file of weights.",
            f"make a file of it, and pass that: python {top / 'zero_to_fp32.py'} {top} {target}",
        )
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        lightning = "meta.pt" in names
        command = (
            f"python -m pytorch_lightning.utilities.consolidate_checkpoint {folder} --output_file {target}.ckpt"
            if lightning
            else f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {target}.ckpt"
        )
        raise BadInput(
            f"{folder}: this is a folder of torch.distributed.checkpoint"
            f"{', as Lightning writes it under FSDP' if lightning else ''}, not a file of weights.",
            f"make one file of it, and pass that: {command}",
        )
    inner = sorted(name for name in names if (folder / name / ".metadata").is_file())
    if inner:
        refuse_other_folders(folder / inner[0])
    zero = sorted(name for name in names if (folder / name / "zero_to_fp32.py").is_file())
    if zero:
        refuse_other_folders(folder / zero[0])
    if "adapter_config.json" in names:
        raise BadInput(
            f"{folder}: this is an adapter of peft, not the weights of a model.",
            "merge it into the model before saving: model.merge_and_unload().save_pretrained(folder)",
        )


def find_shards(folder: Path) -> Path | None:
    """The index of a folder's shards, or the first shard where there are all of them and no index; None for neither.

    Raises:
        BadInput: There are several indexes, or shards of which some are missing.
    """
    for ending in (".safetensors", ".bin"):
        indexes = sorted(path for path in folder.glob(f"*{ending}{INDEX}") if path.is_file())
        if len(indexes) > 1:
            raise BadInput(
                f"{folder}: it holds {len(indexes)} indexes of shards: {', '.join(path.name for path in indexes[:4])}.",
                "pass one of these files itself.",
            )
        if indexes:
            return indexes[0]
    shards = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    return shards[0] if shards else None


def is_sharded(path: Path) -> bool:
    """Whether a file is an index of shards, or one of several shards."""
    return path.name.endswith(INDEX) or _SHARD.fullmatch(path.name) is not None


def read_shards(path: Path) -> dict[str, Tensor]:
    """Reads all shards of a model.

    Args:
        path: The index, or one of the shards, beside which the others lie.

    Raises:
        BadInput: The index is damaged, a shard is missing or damaged, or lacks a weight that the index says it has.
    """
    shard = _SHARD.fullmatch(path.name)
    weight_map: Mapping[str, str] = {}
    if shard is not None:
        beside = path.with_name(f"{shard['stem']}{shard['ending']}{INDEX}")
        if beside.is_file():
            path, shard = beside, None
    if shard is not None:
        count = int(shard["count"])
        numbers = [f"{shard['stem']}-{number:05d}-of-{count:05d}{shard['ending']}" for number in range(1, count + 1)]
        files: Sequence[str] = numbers
    else:
        weight_map = _weight_map(path)
        files = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise BadInput(
            f"{path}: {len(missing)} of its {len(files)} shards are missing: {shown}.",
            "copy or download them into the same folder.",
        )
    weights: dict[str, Tensor] = {}
    for name in files:
        part = read_tensors(path.parent / name)
        twice = next((weight for weight in part if weight in weights), None)
        if twice is not None:
            raise BadInput(f"{path.parent / name}: the weight {twice} is in another shard as well.", _DOWNLOAD)
        weights.update(part)
    lacking = [name for name in weight_map if name not in weights]
    if lacking:
        raise BadInput(
            f"{path}: {len(lacking)} weights of the index are in no shard, the first: {lacking[0]}.", _DOWNLOAD
        )
    return weights


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        if path.stat().st_size > _MOST_INDEX_BYTES:
            raise BadInput(f"{path}: far too large for an index of shards.", _DOWNLOAD)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no index of shards: it is no JSON ({error}).", _DOWNLOAD) from error
    weight_map = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise BadInput(f"{path}: no index of shards: it has no table `weight_map`.", _DOWNLOAD)
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or name in (".", ".."):
            raise BadInput(f"{path}: it names {name!r:.60} as a shard, which is no file in its own folder.", _DOWNLOAD)
    return weight_map


def read_tensors(path: Path) -> dict[str, Any]:
    """The weights in one file, whatever it is called: safetensors, or what ``torch.save`` wrote.

    Raises:
        BadInput: It is neither, or is damaged.
    """
    content = read_content(path)
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: this holds {type(content).__name__}, not weights.")
    weights = state_of(content, str(path))
    if not isinstance(weights, Mapping):
        raise BadInput(f"{path}: its state_dict is a {type(weights).__name__}, not a table of tensors.")
    return {str(name): value for name, value in weights.items()}


def read_content(path: Path) -> object:
    """What a file holds: a table of tensors from safetensors, or what ``torch.save`` wrote; the content tells which."""
    if is_safetensors(path):
        return read_safetensors(path)
    from .torch_file import read_torch_file

    return read_torch_file(path)


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors by its content; by its name where it is too short to tell, or not there."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
            size = path.stat().st_size
    except OSError:
        return path.suffix == ".safetensors"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80"))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        BadInput: It is missing, empty, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.stat().st_size == 0:
            raise BadInput(f"{path}: the file is empty (0 bytes).", "copy or download the file again.")
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path}: not a safetensors file, or cut short or damaged ({error}).", _DOWNLOAD) from error
    except FileNotFoundError as error:
        raise BadInput(f"{path}: there is no such file.", "check the path.") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error}).") from error


def state_of(content: Mapping[Any, Any], source: str) -> object:
    """The table of weights in what a file holds: the content itself, or what stands there as a training tool puts it.

    Raises:
        BadInput: DeepSpeed has left the weights to other files, or only averaged weights are there.
    """
    import torch

    for key in _STATE_KEYS:
        inner = content.get(key)
        if key == "state_dict" and key in content:
            return inner
        if isinstance(inner, Mapping) and (
            not inner or any(isinstance(value, torch.Tensor) for value in inner.values())
        ):
            empty = [name for name, value in inner.items() if isinstance(value, torch.Tensor) and not value.numel()]
            if key == "module" and len(empty) * 2 > len(inner):
                raise BadInput(
                    f"{source}: DeepSpeed (ZeRO stage 3) has left the weights to the files of its other processes.",
                    "make a file of the folder: python zero_to_fp32.py FOLDER OUTPUT, with the script that lies in it",
                )
            return inner
    averaged = [key for key in _AVERAGED_KEYS if isinstance(content.get(key), Mapping)]
    if averaged and not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise BadInput(
            f"{source}: it holds no state_dict, only averaged weights ({', '.join(averaged)}).",
            f"save the ones that you mean: torch.save({{'state_dict': content[{averaged[0]!r}]}}, 'weights.ckpt')",
        )
    return content
