"""Names of weights that were saved from a wrapped model, as the model's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import BadInput

#: Name that a wrapper gives the module inside it, wherever it stands, and whose it is.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel",
}
#: Lightning's name of the model: its checkpoints have it always, so nothing is said of it.
_LIGHTNING = "model"
#: Parts of names that tell of weights which are no longer, or not yet, those of the layers.
_FOREIGN = (
    (
        ("_flat_param", "flat_param"),
        "parameters that FSDP has flattened together",
        "save them whole: with torch.distributed.fsdp.FullStateDictConfig, or torch.distributed.checkpoint.state_dict."
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
    ),
    (
        ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector"),
        "LoRA adapters",
        "merge them into the weights before saving: model.merge_and_unload() of peft",
    ),
    (
        ("parametrizations",),
        "parametrized weights",
        "make them plain before saving: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    ),
    (("weight_orig", "weight_mask"), "pruned weights", "make them plain before saving: torch.nn.utils.prune.remove"),
)


def unwrapped(weights: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Takes what wrappers and Lightning put into the names of weights off, and says so in a warning.

    Off come ``_orig_mod``, ``_forward_module``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module`` and ``module``
    wherever they stand, and ``model`` in front, in any combination. Names of other modules stay as they are.

    Args:
        weights: By their names in the file.
        source: The file, for messages.

    Raises:
        BadInput: Two weights have one name then, or the file holds adapters, flattened, parametrized or pruned weights.
    """
    renamed: dict[str, Any] = {}
    originals: dict[str, str] = {}
    taken: dict[str, int] = {}
    for name, value in weights.items():
        parts = str(name).split(".")
        for marks, what, hint in _FOREIGN:
            if any(mark in parts for mark in marks):
                raise BadInput(f"{source}: it holds {what} ({name}), not the weights of the layers.", hint)
        inside = [part for part in parts[:-1] if part in _WRAPPERS]
        for part in dict.fromkeys(inside):
            taken[part] = taken.get(part, 0) + 1
        kept = [part for part in parts[:-1] if part not in _WRAPPERS] + parts[-1:]
        while len(kept) > 1 and kept[0] == _LIGHTNING:
            kept = kept[1:]
        short = ".".join(kept)
        if short == "n_averaged":
            taken.setdefault("module", 0)  # the counter of torch.optim.swa_utils.AveragedModel
            continue
        if short in renamed:
            raise BadInput(
                f"{source}: its state_dict holds both {originals[short]} and {name}, which are the same weight of two "
                f"models ({short}).",
                "save one of them alone.",
            )
        renamed[short], originals[short] = value, str(name)
    if taken:
        said = ", ".join(f"`{part}.` ({_WRAPPERS[part]})" for part in taken)
        warnings.warn(
            f"{source}: saved from a wrapped model; {said} is taken off the names of {max(taken.values())} weights",
            stacklevel=2,
        )
    return renamed
