"""Lightning's checkpoints, read back without running anything from them, and held against the model first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from ....errors import BadInput
from ...checkpoints.torch_file import read_torch_file
from ..checkpoint.files import fit_report


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes as Lightning does, whole or not at all; reads plain data and tensors, and refuses code.

    Lightning's own reading runs whatever a checkpoint's pickle asks for, since the config in it is an object.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, on the CPU; its config is data that nothing reads."""
        return read_training_checkpoint(Path(path))


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that training can go on from.

    Raises:
        BadInput: It cannot be read, or has weights alone.
    """
    content = read_torch_file(path)
    needed = ("state_dict", "optimizer_states", "loops", "global_step")
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise BadInput(
            f"{path}: training cannot go on from this checkpoint: it has no {', '.join(missing)}",
            "start from its weights instead: experiment.raw_state_dict_reload in the config.",
        )
    return cast("dict[str, Any]", content)


def check_fits(module: nn.Module, state_dict: dict[str, Tensor], source: Path) -> None:
    """Holds a checkpoint's weights against a model.

    Raises:
        BadInput: Names or shapes differ; the message lists them.
    """
    wanted = module.state_dict()
    report = fit_report(wanted, state_dict)
    if report:
        raise BadInput(
            f"{source}: its weights do not fit the model that the config describes.\n{report}",
            "use the config that it was trained with, or train into another folder.",
        )
