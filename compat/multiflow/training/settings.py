"""The sections of a training config that are about training: `experiment:` and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ....configs.kernel import did_you_mean
from ....configs.seeds import generator_seed
from ..config.sections import Section, as_data, checked


class StrictSection(Section):
    """A section in which a key that does not exist is an error that names the nearest one."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            check_keys(data, list(cls.model_fields))
        return data


def check_keys(data: Mapping[Any, Any], known: list[str]) -> None:
    """Raises a `ValueError` for the first key that is not known."""
    for key in data:
        if key not in known:
            raise ValueError(f"no key {key!r}{did_you_mean(str(key), known)}")


class TrainingConfig(StrictSection):
    """`experiment.training`: the losses. The defaults are Multiflow's for structure and sequence together."""

    mask_plddt: bool = True
    bb_atom_scale: float = 0.1
    trans_scale: float = 0.1
    aatypes_loss_weight: float = Field(default=1.0, ge=0.0)
    aatypes_label_smoothing: float = 0.0
    aatypes_loss_mean_or_sum: Literal["mean", "sum"] = "mean"
    aatypes_loss_use_likelihood_weighting: bool = False
    translation_loss_weight: float = Field(default=2.0, ge=0.0)
    t_normalize_clip: float = Field(default=0.9, gt=0.0, lt=1.0)
    rotation_loss_weights: float = Field(default=1.0, ge=0.0)
    aux_loss_weight: float = Field(default=0.0, ge=0.0)
    aux_loss_use_bb_loss: bool = True
    aux_loss_use_pair_loss: bool = True
    aux_loss_t_pass: float = 0.5

    @model_validator(mode="after")
    def _check_unused(self) -> TrainingConfig:
        # The original has these keys and reads neither of them: another value would be ignored there.
        if self.aatypes_label_smoothing or self.aatypes_loss_mean_or_sum != "mean":
            raise ValueError(
                "aatypes_label_smoothing and aatypes_loss_mean_or_sum do nothing in Multiflow: leave them at 0 and mean"
            )
        return self


class ExperimentConfig(StrictSection):
    """`experiment`: the run. `optimizer`, `trainer` and `checkpointer` are handed on to PyTorch and Lightning.

    `lr_scheduler`, `logger` and the list `trainer.callbacks` name classes; see `class_paths.build`.
    """

    debug: bool = False
    seed: int = 123
    num_devices: int = Field(default=1, ge=1)
    warm_start: str | None = None
    warm_start_cfg_override: bool = False
    raw_state_dict_reload: str | None = None
    training: TrainingConfig = TrainingConfig()
    wandb: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=lambda: {"lr": 1e-4})
    lr_scheduler: str | dict[str, Any] | None = None
    trainer: dict[str, Any] = Field(default_factory=lambda: {"max_epochs": 200, "accumulate_grad_batches": 2})
    checkpointer: dict[str, Any] = Field(default_factory=lambda: {"every_n_epochs": 50, "save_top_k": -1})
    inference_dir: str | None = None
    logger: Literal["csv", "tensorboard", "wandb", "none"] | dict[str, Any] | list[Any] = "csv"

    @field_validator("seed")
    @classmethod
    def _any_seed(cls, seed: int) -> int:
        return generator_seed(seed)


def as_training_config(section: object, where: str = "experiment.training") -> TrainingConfig:
    """Gives the checked losses' settings for what a caller has as such: a mapping, a DictConfig, an object.

    Raises:
        BadInput: A key that does not exist, or a value that is wrong.
    """
    return checked(TrainingConfig, as_data(section, TrainingConfig, where), where)
