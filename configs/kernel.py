"""The `kernel:` section: which kernels may run, and what they may round to."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .presets import OPERATIONS, PRESETS

Fallback = Literal["warn", "error", "silent"]
Precision = Literal["float32", "tf32", "bfloat16"]

#: Short names of number formats, accepted wherever a precision is named.
PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}


def did_you_mean(word: str, known: list[str]) -> str:
    """The tail of an error about an unknown word: the nearest known one if there is one, and all of them."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Known: {', '.join(known)}."


class KernelConfig(BaseModel):
    """Which kernel runs each operation.

    A bare word is a preset: `KernelConfig.model_validate("flash")` is `KernelConfig(preset="flash")`. A kernel given
    under an operation's name is required: if it cannot run, `KernelUnavailable` says why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field(
        default="auto",
        description="Ordered lists of kernels for each operation and device: " + ", ".join(PRESETS) + ".",
    )
    edge_features: str | None = Field(default=None, description="Kernel required for Multiflow's pair embedding.")
    invariant_point_attention: str | None = Field(
        default=None, description="Kernel required for invariant point attention."
    )
    factorized_point_attention: str | None = Field(
        default=None, description="Kernel required for FlashIPA's attention, whose pair representation is two factors."
    )
    attention: str | None = Field(
        default=None, description="Kernel required for padded self-attention over the sequence."
    )
    edge_transition: str | None = Field(default=None, description="Kernel required for Multiflow's pair update.")
    triangle_attention: str | None = Field(
        default=None, description="Kernel required for attention along the pair tensor."
    )
    triangle_multiplication: str | None = Field(
        default=None, description="Kernel required for the triangle multiplicative update of the pair tensor."
    )
    attention_pair_bias: str | None = Field(
        default=None, description="Kernel required for attention over the sequence with a bias from the pair tensor."
    )
    fallback: Fallback | None = Field(
        default=None,
        description="When a device's first choice cannot run: warn once at bind, raise (error), or leave it to the "
        "report (silent). Unset: silent for auto, warn for every other preset.",
    )
    precision: Precision = Field(
        default="float32",
        description="What a kernel may round float32 data to inside: float32 (nothing), tf32, bfloat16.",
    )
    deterministic: bool = Field(default=False, description="Use only kernels whose results are the same in every run.")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand(value)

    @property
    def on_fallback(self) -> Fallback:
        """`fallback`, or what the preset means by leaving it out."""
        return self.fallback or ("silent" if self.preset == "auto" else "warn")

    def required(self, operation: str) -> str | None:
        """The kernel named for `operation`, or None where the preset chooses."""
        return getattr(self, operation, None) if operation in OPERATIONS else None


def expand(value: Any) -> Any:
    """Turn what users write (a word, a mapping, a configuration) into a plain mapping; check the words in it.

    Raises:
        ValueError: A preset, an operation or a key that does not exist, with the nearest one that does.
    """
    if value is None:
        return {}
    if isinstance(value, KernelConfig):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"`kernel` is a word or a mapping, not {type(value).__name__}: write `kernel: flash`, "
            "or `kernel: {preset: flash, attention: torch}`."
        )
    preset = value.get("preset", "auto")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}" + did_you_mean(str(preset), list(PRESETS)))
    for key in value:
        if key not in KernelConfig.model_fields:
            raise ValueError(f"`kernel` has no key {key!r}" + did_you_mean(str(key), list(KernelConfig.model_fields)))
    values = dict(value)
    if "precision" in values:
        values["precision"] = PRECISION_ALIASES.get(str(values["precision"]), values["precision"])
    return values
