"""Composes configs that are Hydra's, by Hydra itself: a `defaults:` list, config groups, a `hydra:` section."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import BadInput

if TYPE_CHECKING:
    from omegaconf import DictConfig

_INSTALL = "pip install 'foldkernels[hydra]'"
_KEYS = ("defaults", "hydra")
_MOST_LINES = 6


def hydra_keys(config: Mapping[Any, Any]) -> tuple[str, ...]:
    """The keys of a config that only Hydra gives a meaning: `defaults` and `hydra`."""
    return tuple(key for key in _KEYS if key in config)


def refuse_hydra_keys(config: Mapping[Any, Any], where: str) -> None:
    """Refuses a config without a file that has keys of Hydra's: the files that they name cannot be found.

    Raises:
        BadInput: It has one.
    """
    keys = hydra_keys(config)
    if keys:
        raise BadInput(
            f"{where}it has `{keys[0]}:`, which Hydra reads: what stands there would be passed over.",
            "pass the path of the YAML file, which is composed with the files beside it; or compose the config with "
            "Hydra first, and leave this key out.",
        )


def composed(path: Path, config: DictConfig) -> DictConfig:
    """Gives what Hydra makes of a config file, as `hydra.main` does with the file's folder and name.

    Args:
        path: The file. Config groups are looked for in its folder.
        config: Its content.

    Returns:
        The composed config, unresolved, without `defaults` and `hydra`; the config itself where it has neither.

    Raises:
        BadInput: hydra-core is not installed, a file or a group is missing, or Hydra refuses the config.
    """
    keys = hydra_keys(config)
    if not keys:
        return config
    named = " and ".join(f"`{key}:`" for key in keys)
    if path.suffix != ".yaml":
        raise BadInput(f"{path}: it has {named}, and Hydra reads files whose names end in .yaml only.", "rename it.")
    hydra = _hydra(path, named)
    _refuse_packages(path, config)
    try:
        with _apart(), hydra.initialize_config_dir(config_dir=str(path.absolute().parent), version_base=None):
            result: DictConfig = hydra.compose(config_name=path.stem)
    except Exception as error:
        if not _is_hydras(error):
            raise
        raise BadInput(
            f"{path}: Hydra cannot compose it: {_text(error)}.",
            f"put the files that `defaults:` names beside it, in {path.parent}, or write their settings into it.",
        ) from error
    return result


def _hydra(path: Path, named: str) -> Any:
    try:
        return importlib.import_module("hydra")
    except Exception as error:
        installed = "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__}: {error})"
        raise BadInput(
            f"{path}: it has {named}, which Hydra composes from other files, and hydra-core cannot be imported here"
            f"{installed}.",
            f"{_INSTALL}; or pass the composed config that a run wrote (its config.yaml or .hydra/config.yaml).",
        ) from error


def _refuse_packages(path: Path, config: DictConfig) -> None:
    """A search path of `pkg://` imports Python packages that a file names: no config runs code here."""
    from omegaconf import OmegaConf

    section = OmegaConf.to_container(config).get("hydra")  # type: ignore[union-attr]
    searched = section.get("searchpath") if isinstance(section, dict) else None
    for entry in searched if isinstance(searched, list) else ():
        if not str(entry).startswith("file://"):
            raise BadInput(
                f"{path}: hydra.searchpath names {str(entry)!r:.80}, and only folders (file://...) are searched: a "
                "package would be imported.",
                "name its folder: file:///path/to/configs",
            )




@contextmanager
def _apart() -> Iterator[None]:
    """Leaves a Hydra that is running in this process as it is, and keeps what it says of its own code to itself."""
    singleton = importlib.import_module("hydra.core.singleton").Singleton
    running = importlib.import_module("hydra.core.global_hydra").GlobalHydra.instance()
    state = singleton.get_state()
    running.clear()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*register_new_resolver", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*version_base", category=FutureWarning)
            yield
    finally:
        singleton.set_state(state)


def _is_hydras(error: Exception) -> bool:
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

    exception = importlib.import_module("hydra.errors").HydraException
    return isinstance(error, (exception, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError))


def _text(error: Exception) -> str:
    """What an error says, on a few lines at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:_MOST_LINES]).rstrip(".") or type(error).__name__
