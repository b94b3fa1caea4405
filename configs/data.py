"""What is read of a folder of structures for training, and how it is put into batches."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from .options import Section

_MULTIFLOWS_MOST = 384


class FilterConfig(Section):
    """`filter`: what is left out. Each thing left out is reported with its reason."""

    min_num_res: int = Field(default=60, ge=1, description="Shorter ones are left out; Multiflow's is 60.")
    max_num_res: int | None = Field(
        default=None,
        ge=1,
        description=f"Longer ones are left out. When not set: {_MULTIFLOWS_MOST}, Multiflow's, or no limit where crops "
        "are asked for.",
    )
    max_resolution: float | None = Field(
        default=None,
        gt=0,
        description="Angstrom; files of a worse one are left out. Files that state none (NMR, predictions) stay.",
    )
    max_unknown: float = Field(
        default=0.1, ge=0, le=1, description="Largest part of residues whose type is none of the twenty."
    )
    max_missing: float = Field(
        default=0.1, ge=0, le=1, description="Largest part of residues that lack N, CA or C, ends not counted."
    )
    num_chains: tuple[int, ...] | None = Field(
        default=None,
        description="Numbers of protein chains that a file may have; Multiflow's is `[1]`. Any when not set.",
    )
    identical_chains: Literal["keep", "first"] = Field(
        default="keep",
        description="`first`: of chains of one file that have the same sequence, only the first is used. Not for "
        "complexes.",
    )
    min_mean_plddt: float | None = Field(
        default=None, ge=0, le=100, description="Smallest mean pLDDT, read from the B-factors of the CA atoms."
    )
    rog_quantile: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Leaves out the least compact: those whose radius of gyration lies 1 Angstrom above a curve that "
        "is fitted to this quantile of the radii of each length. Multiflow's is 0.96.",
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> "FilterConfig":
        if self.max_num_res is not None and self.max_num_res < self.min_num_res:
            raise ValueError(f"max_num_res ({self.max_num_res}) is below min_num_res ({self.min_num_res})")
        return self


class CropConfig(Section):
    """`crop`: what is taken of longer ones. A bare number is its length, null is no crop."""

    length: int | None = Field(
        default=None, ge=1, description="Residues of a crop; longer ones are cropped anew each time. Off when not set."
    )
    kind: Literal["contiguous", "chains"] = Field(
        default="contiguous",
        description="`contiguous`: one stretch. `chains`: a stretch of each chain, in random shares, as AlphaFold-"
        "Multimer's contiguous crops.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_number(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return {"length": value} if value is None or is_number else value


class SamplerConfig(Section):
    """`sampler`: what goes into one batch."""

    max_batch_size: int = Field(default=80, ge=1, description="Most items of a batch; Multiflow's for 40 GB is 80.")
    max_num_res_squared: int = Field(
        default=400_000,
        ge=1,
        description="A batch of length L has at most this / L**2 + 1 items; Multiflow's for 40 GB is 400,000.",
    )
    length_bucket: int = Field(
        default=8,
        ge=0,
        description="Most residues by which lengths in a batch differ; shorter ones are padded. 0, as Multiflow: none.",
    )
    repeats: int = Field(
        default=1, ge=1, description="How often an epoch goes through the data, with other crops each time."
    )
    fill_batches: bool = Field(
        default=False, description="Repeat the items of a batch that is not full as often as they fit, as Multiflow."
    )


class LoaderConfig(Section):
    """`loader`: the processes that prepare batches."""

    num_workers: int = Field(default=2, ge=0, description="Processes; 0 prepares batches in the training process.")
    prefetch_factor: int = Field(default=4, ge=1, description="Batches that each keeps ready.")


class DataConfig(Section):
    """What is read of a folder of structures, and how it is put into batches."""

    examples: Literal["chains", "complexes"] = Field(
        default="chains", description="What an item is: a chain, or all protein chains of a file together."
    )
    filter: FilterConfig = FilterConfig()
    crop: CropConfig = CropConfig()
    min_plddt: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Residues of a pLDDT up to this are marked in `plddt_mask`: the B-factors are pLDDT. Multiflow's "
        "`min_plddt_threshold`.",
    )
    shuffle_chains: bool = Field(
        default=True, description="Number the chains of a complex in random order, as Multiflow does."
    )
    sampler: SamplerConfig = SamplerConfig()
    loader: LoaderConfig = LoaderConfig()
    validation: str | None = Field(
        default=None,
        description="Folder of structures that are validated on and never trained on: `valid/loss` after each epoch. "
        "`trainer.val_check_interval` and Lightning's other settings choose when.",
    )
    cache: str = Field(
        default="auto",
        description="Folder where what was read is kept. `auto`: `structures` in FOLDKERNELS_CACHE, or in the user's "
        "cache folder; `off`: nothing is kept on disk.",
    )

    @model_validator(mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML reads a bare `off` as False.
        if isinstance(value, Mapping) and value.get("cache") is False:
            return {**value, "cache": "off"}
        return value

    @property
    def max_num_res(self) -> int | None:
        """`filter.max_num_res`, or what leaving it out means."""
        if self.filter.max_num_res is not None or self.crop.length is not None:
            return self.filter.max_num_res
        return max(_MULTIFLOWS_MOST, self.filter.min_num_res)

    def cropped(self, num_res: int) -> int:
        """The length of an item of a structure of `num_res` residues."""
        return num_res if self.crop.length is None else min(num_res, self.crop.length)
