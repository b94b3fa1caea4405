"""The `foldkernels:` section: our own model options. Multiflow's sections stay as they are."""

from pydantic import BaseModel, ConfigDict, Field


class FoldkernelsConfig(BaseModel):
    """Options that change how a model is run, never what its checkpoint's weights mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation_checkpointing: bool = Field(
        default=False,
        description="In training, compute each block's residue layers again in the backward pass instead of keeping "
        "their activations. The pair layers of the streamed kernels always do.",
    )
