"""A training config, whole: what the file says, checked, and what it leaves out, filled in.

What is written beside a checkpoint is complete and needs nothing else to be read: the original reads every section that
is here, without the defaults that its own configs hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ....configs.kernel import did_you_mean
from ....configs.options import FoldkernelsConfig
from ....errors import BadInput
from ..checkpoint.size_limits import refuse_oversize
from ..config.hydra_config import refuse_hydra_keys
from ..config.sections import (
    InterpolantConfig,
    ModelConfig,
    Section,
    as_data,
    checked,
    interpolant_section,
    model_section,
    read_config,
)
from .settings import ExperimentConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SECTIONS = ("model", "interpolant", "data", "experiment", "kernel", "foldkernels")
#: Sections of the original's configs that training here does not read: they are kept as they are where they resolve.
_OTHERS = ("folding", "shared", "pdb_dataset", "pdb_post2021_dataset", "inference")
#: Keys that the published checkpoint's config has and the public code lacks.
_PUBLISHED_KEYS = ("interpolant.twisting", "model.sequence_net")
#: What `data:` has in the original, and means nothing for a folder of structures.
_DATASET_KEYS = ("dataset", "task")


@dataclass(frozen=True)
class RunConfig:
    """The checked sections of a training config.

    Attributes:
        whole: All of them with their defaults, resolved: the `config.yaml` of the checkpoints.
        model: `model`.
        interpolant: `interpolant`.
        experiment: `experiment`.
        data: `data`, as given, but for what only the original's own data sets need.
        options: `foldkernels`.
        kernel: `kernel`, as given.
        source: The file, for messages.
    """

    whole: DictConfig
    model: ModelConfig
    interpolant: InterpolantConfig
    experiment: ExperimentConfig
    data: dict[str, Any]
    options: FoldkernelsConfig
    kernel: Any
    source: Path | None


def read_run_config(config: str | Path | Mapping[str, Any] | DictConfig) -> RunConfig:
    """Reads and checks a training config.

    Args:
        config: A YAML file, or its content. Every section but `model` may be left out; in `model`, what is left out is
            the published model's.

    Raises:
        BadInput: It cannot be read, a key does not exist (the message names the nearest one), a value is wrong, or the
            model is larger than this machine's memory.
    """
    from omegaconf import OmegaConf

    source = Path(config) if isinstance(config, str | Path) else None
    given: Any = config
    root: DictConfig = read_config(source) if source is not None else OmegaConf.create(dict(given))
    prefix = f"{source}: " if source else ""
    refuse_hydra_keys(root, prefix or "the training config: ")
    for key in root:
        if key not in (*_SECTIONS, *_OTHERS):
            raise BadInput(f"{prefix}no section {str(key)!r}{did_you_mean(str(key), list(_SECTIONS))}")
    model = model_section(root, source)
    interpolant = interpolant_section(root, source) if root.get("interpolant") else InterpolantConfig()
    _refuse_unknown(model, f"{prefix}model")
    _refuse_unknown(interpolant, f"{prefix}interpolant")
    experiment = _experiment(root, prefix)
    data = {key: value for key, value in _plain(root, "data", prefix).items() if key not in _DATASET_KEYS}
    options = _options(root, prefix)
    refuse_oversize(model, options, str(source or "the training config"))
    kernel = _plain(root, "kernel", prefix)
    sections = {
        "data": {"dataset": "pdb", "task": "hallucination", **_plain(root, "data", prefix)},
        "interpolant": interpolant.model_dump(),
        "experiment": experiment.model_dump(),
        "folding": _plain(root, "folding", prefix),
        "pdb_dataset": {},
        "model": model.model_dump(),
        **({"kernel": kernel} if kernel else {}),
        **({"foldkernels": options.model_dump(exclude_unset=True)} if options.model_fields_set else {}),
    }
    return RunConfig(OmegaConf.create(sections), model, interpolant, experiment, data, options, kernel or None, source)


def _experiment(root: DictConfig, prefix: str) -> ExperimentConfig:
    from omegaconf import OmegaConf

    section: Any = root.get("experiment") or {}
    # The original's folders are made of `${now:...}`, which is hydra's. Ours is the one that the caller names.
    ignored = {"checkpointer.dirpath", "wandb.name", "inference_dir"}
    given: dict[str, Any] = {}
    for key in section:
        part = section._get_node(key)
        if OmegaConf.is_dict(part):
            names = [name for name in part if f"{key}.{name}" not in ignored]
            given[str(key)] = {str(name): _resolved(part, name, f"{prefix}experiment.{key}") for name in names}
        elif key not in ignored:
            given[str(key)] = _resolved(section, key, f"{prefix}experiment")
    where = f"{prefix}experiment"
    return checked(ExperimentConfig, as_data(given, ExperimentConfig, where), where)


def _resolved(section: Any, key: Any, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = section[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise BadInput(f"{where}.{key} does not resolve ({str(error).splitlines()[0]}).") from error


def _plain(root: DictConfig, name: str, prefix: str) -> Any:
    """A section as plain data; empty where there is none."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        section = OmegaConf.select(root, name, throw_on_missing=True)
        if OmegaConf.is_config(section):
            return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BadInput(f"{prefix}the section `{name}:` does not resolve ({reason}).") from error
    return {} if section is None else section


def _options(root: DictConfig, prefix: str) -> FoldkernelsConfig:
    try:
        return FoldkernelsConfig.model_validate(_plain(root, "foldkernels", prefix))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["foldkernels", *map(str, first["loc"])])
        raise BadInput(f"{prefix}{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _refuse_unknown(section: Section, where: str) -> None:
    """A checkpoint's config may have keys that nobody knows; one that is written for a training may not."""
    for key in section.model_extra or {}:
        name = f"{where.rpartition(' ')[2]}.{key}"
        if name not in _PUBLISHED_KEYS:
            raise BadInput(f"{where}: no key {key!r}{did_you_mean(str(key), list(type(section).model_fields))}")
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            _refuse_unknown(value, f"{where}.{key}")
