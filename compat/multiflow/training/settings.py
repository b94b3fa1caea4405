"""The sections of a training config that are about training: `experiment:` and what it holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ....configs.kernel import did_you_mean
from ..configuration import Section


class Known(Section):
    """A section of ours to check: a key that does not exist is an error that names the nearest one."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"no key {key!r}{did_you_mean(str(key), list(cls.model_fields))}")
        return data


class TrainingConfig(Known):
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
