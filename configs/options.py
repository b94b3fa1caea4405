"""The `foldkernels:` section: our own model options. Multiflow's sections stay as they are."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .kernel import did_you_mean

Block = Literal["ipa", "pairformer", "pairformer_no_seq", "double_attention_pair", "attention_pair_bias", "none"]
SequenceBlock = Literal[
    "mlp", "ipa", "pairformer", "pairformer_no_seq", "double_attention_pair", "attention_pair_bias", "none"
]
Init = Literal["fresh", "zero"]

#: Blocks that leave the single representation as it is.
PAIRS_ALONE = ("pairformer_no_seq", "double_attention_pair")


def _known(words: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        known = list(get_args(words))
        if isinstance(value, str) and value not in known:
            raise ValueError(f"no block {value!r}{did_you_mean(value, known)}")
        return value

    return BeforeValidator(check)


#: No width, and no number of layers, of any model comes near these: a larger one is a slip, or an attack on the memory.
MOST_CHANNELS, MOST_LAYERS = 1 << 16, 1 << 10


class Section(BaseModel):
    """Frozen; a key that does not exist is an error that names the nearest one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise ValueError(f"no key {key!r}{did_you_mean(str(key), list(cls.model_fields))}")
        return value


class IPABlockConfig(Section):
    """`blocks.ipa`. What is left out is the model's own `ipa` section's."""

    c_hidden: int | None = Field(
        default=None, gt=0, le=MOST_CHANNELS, description="Channels of a head; the model's own when left out."
    )
    no_heads: int | None = Field(
        default=None, gt=0, le=MOST_CHANNELS, description="Heads; the model's own when left out."
    )
    no_qk_points: int | None = Field(
        default=None,
        gt=0,
        le=MOST_CHANNELS,
        description="Query and key points of a head; the model's own when left out.",
    )
    no_v_points: int | None = Field(
        default=None, gt=0, le=MOST_CHANNELS, description="Value points of a head; the model's own when left out."
    )
    seq_tfmr_num_heads: int | None = Field(
        default=None,
        gt=0,
        le=MOST_CHANNELS,
        description="Heads of the sequence transformer; the model's own when left out.",
    )
    seq_tfmr_num_layers: int | None = Field(
        default=None,
        gt=0,
        le=MOST_LAYERS,
        description="Layers of the sequence transformer; the model's own when left out.",
    )
    dropout: float | None = Field(
        default=None, ge=0.0, lt=1.0, description="Dropout of IPA's logits; the model's own when left out."
    )
    transformer_dropout: float | None = Field(
        default=None, ge=0.0, lt=1.0, description="Dropout of the sequence transformer; the model's own when left out."
    )


class PairformerBlockConfig(Section):
    """`blocks.pairformer`, for `pairformer_no_seq` too."""

    num_heads: int = Field(
        default=8,
        gt=0,
        le=MOST_CHANNELS,
        description="Heads of the attention with pair bias; they share the width of the residues.",
    )
    pairwise_head_width: int = Field(
        default=32, gt=0, le=MOST_CHANNELS, description="Channels of a head of the triangle attention."
    )
    pairwise_num_heads: int = Field(default=4, gt=0, le=MOST_CHANNELS, description="Heads of the triangle attention.")
    dropout: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Dropout of rows and columns of the triangle updates, in training."
    )
    inference_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="The same, outside training.")
    post_layer_norm: bool = Field(default=False, description="A LayerNorm of the residues after each layer.")


class DoubleAttentionPairBlockConfig(Section):
    """`blocks.double_attention_pair`."""

    bottleneck_scale: int = Field(
        default=4, gt=0, le=MOST_CHANNELS, description="The pair width is divided by this; it must divide without rest."
    )
    use_film: bool = Field(default=True, description="Scale and shift each update by a function of time.")
    time_mlp_hidden_dim: int = Field(default=64, gt=0, le=MOST_CHANNELS, description="Hidden width of that function.")


class AttentionPairBiasBlockConfig(Section):
    """`blocks.attention_pair_bias`."""

    num_heads: int = Field(
        default=8, gt=0, le=MOST_CHANNELS, description="Heads; they share the width of the residues."
    )
    residual: bool = Field(
        default=True,
        description="Normalise before each layer and add its output to its input. `false` is cogeneration's bare "
        "stack, which starts by erasing the residues.",
    )


class BlocksConfig(Section):
    """`blocks`: the settings of each type of block, shared by all that use it."""

    ipa: IPABlockConfig = IPABlockConfig()
    pairformer: PairformerBlockConfig = PairformerBlockConfig()
    double_attention_pair: DoubleAttentionPairBlockConfig = DoubleAttentionPairBlockConfig()
    attention_pair_bias: AttentionPairBiasBlockConfig = AttentionPairBiasBlockConfig()


def _init_field() -> Any:
    return Field(
        default="fresh",
        description="How new weights start: fresh, or zero, so that the model computes at first what it computes "
        "without them; a checkpoint without them may then be loaded.",
    )


class TrunkConfig(Section):
    """What `enrichment` and `sequence_net` have in common. A bare word is a block."""

    num_layers: int = Field(default=4, gt=0, le=MOST_LAYERS, description="Blocks.")
    init: Init = _init_field()
    pre_add_init_embed: bool = Field(
        default=False, description="Begin with the mean of the representations and the initial embeddings."
    )
    pre_node_layer_norm: bool = Field(default=False, description="Then a LayerNorm of the residues.")
    pre_edge_layer_norm: bool = Field(default=False, description="Then a LayerNorm of the pairs.")
    post_add_init_embed: bool = Field(default=False, description="End with the mean of the result and the initial.")
    post_node_layer_norm: bool = Field(default=False, description="Then a LayerNorm of the residues.")
    post_edge_layer_norm: bool = Field(default=False, description="Then a LayerNorm of the pairs.")

    @model_validator(mode="before")
    @classmethod
    def _expand_word(cls, value: Any) -> Any:
        return {"block": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_init(self) -> "TrunkConfig":
        if self.init == "zero":
            changes = [name for name in _MERGING if getattr(self, name)]
            if changes:
                raise ValueError(
                    f"init: zero starts with the model unchanged, and {', '.join(changes)} would change it: leave out "
                    "one or the other"
                )
        return self

    @property
    def merges_initial(self) -> bool:
        """Whether the initial embeddings are read."""
        return self.pre_add_init_embed or self.post_add_init_embed


_MERGING = tuple(name for name in TrunkConfig.model_fields if name.startswith(("pre_", "post_")))


class EnrichmentConfig(TrunkConfig):
    """`enrichment`: blocks between the embeddings and the IPA trunk."""

    block: Annotated[Block, _known(Block)] = Field(
        default="none", description="Blocks before the IPA trunk. `none`: the model is Multiflow's exactly."
    )


class SequenceNetConfig(TrunkConfig):
    """`sequence_net`: blocks between the IPA trunk and the logits."""

    block: Annotated[SequenceBlock, _known(SequenceBlock)] = Field(
        default="mlp",
        description="Blocks before the logits. `mlp` (or `none`): Multiflow's own perceptron alone, exactly.",
    )
    num_layers: int = Field(default=2, gt=0, le=MOST_LAYERS, description="Blocks.")

    @model_validator(mode="after")
    def _check_readers(self) -> "SequenceNetConfig":
        if self.post_edge_layer_norm:
            raise ValueError("post_edge_layer_norm: nothing reads the pairs after a sequence net: leave it out")
        return self


class ESMCombinerConfig(Section):
    """`esm_combiner`: a frozen language model before the enrichment. A bare word is its checkpoint."""

    checkpoint: str | None = Field(
        default=None,
        description="Path of an ESM-2 checkpoint: what `esm.pretrained` downloads, or a state_dict under fair-esm's "
        "names or Hugging Face's. Without one, the model is Multiflow's exactly.",
    )
    only_single: bool = Field(
        default=False,
        description="Mix it into the residues alone. Pairs need attention maps, which flash kernels do not give.",
    )
    hidden_dim: int = Field(default=128, gt=0, le=MOST_CHANNELS, description="Hidden width of the projections.")
    init: Init = _init_field()
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Floating type of the language model."
    )
    linker: str = Field(
        default="<eos>",
        description="Tokens between chains. `<eos><cls>` gives each chain its own beginning and end, 25 times `G` is "
        "ESMFold's.",
    )
    residue_index_offset: int = Field(
        default=0, ge=0, description="Added to the positions at each new chain; ESMFold's is 512."
    )
    cache: int = Field(
        default=0, ge=0, description="Batches whose features are kept, for runs that ask for the same sequences again."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_word(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value


class FoldkernelsConfig(Section):
    """Options that change how a model is run, never what its checkpoint's weights mean."""

    activation_checkpointing: bool = Field(
        default=False,
        description="In training, compute each block's residue layers again in the backward pass instead of keeping "
        "their activations. The pair layers of the streamed kernels always do.",
    )
    esm_combiner: ESMCombinerConfig = ESMCombinerConfig()
    enrichment: EnrichmentConfig = EnrichmentConfig()
    sequence_net: SequenceNetConfig = SequenceNetConfig()
    blocks: BlocksConfig = BlocksConfig()
