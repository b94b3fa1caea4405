"""Multiflow's `model:` and `interpolant:` sections as checked, frozen objects, and how a config file is read.

A section only resolves from the root of its file (`${model.node_embed_size}`), and the whole file never does
(`${now:...}`, missing values): so what is asked for is resolved, and nothing else. Keys that we do not know are kept
and ignored: the published checkpoint's config has some that the public code lacks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ....configs.options import MOST_CHANNELS, MOST_LAYERS
from ....errors import BadInput
from .hydra_config import composed, hydra_keys
from .reference_limits import refuse_bombs

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MOST_CONFIG_BYTES = 1 << 18  # published ones have some 6,000; reading YAML takes a second for each 100,000
_MOST_CONFIG_NODES = 100_000
_MOST_ERRORS_SHOWN = 12


class Section(BaseModel):
    """A section of Multiflow's config: attribute access, checked types, frozen, unknown keys kept."""

    # Strict: "8" or true where a number belongs is a mistake in the file, not a number. An int does for a float.
    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=(), allow_inf_nan=False)


Width = Field(gt=0, le=MOST_CHANNELS)


class NodeFeaturesConfig(Section):
    """`model.node_features`: the embedding of residues."""

    c_s: int = Width
    c_pos_emb: int = Field(default=128, gt=0, le=MOST_CHANNELS)
    c_timestep_emb: int = Field(default=128, gt=0, le=MOST_CHANNELS)
    max_num_res: int = 2000
    timestep_int: int = 1000
    embed_chain: bool = False
    embed_aatype: bool = True
    use_mlp: bool = True
    aatype_pred_num_tokens: int = Width


class EdgeFeaturesConfig(Section):
    """`model.edge_features`: the embedding of pairs."""

    single_bias_transition_n: int = 2
    c_s: int = Width
    c_p: int = Width
    relpos_k: int = 64
    feat_dim: int = Field(default=64, gt=0, le=MOST_CHANNELS)
    num_bins: int = Field(default=22, gt=1, le=MOST_CHANNELS)
    self_condition: bool = True
    embed_chain: bool = False
    embed_diffuse_mask: bool = True


class IPAConfig(Section):
    """`model.ipa`: the trunk's blocks."""

    c_s: int = Width
    c_z: int = Width
    c_hidden: int = Field(default=16, gt=0, le=MOST_CHANNELS)
    no_heads: int = Field(default=8, gt=0, le=MOST_CHANNELS)
    no_qk_points: int = Field(default=8, gt=0, le=MOST_CHANNELS)
    no_v_points: int = Field(default=12, gt=0, le=MOST_CHANNELS)
    seq_tfmr_num_heads: int = Field(default=4, gt=0, le=MOST_CHANNELS)
    seq_tfmr_num_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    num_blocks: int = Field(default=8, gt=0, le=MOST_LAYERS)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class ModelConfig(Section):
    """`model`: what `FlowModel` is built from. The defaults are the published checkpoint's.

    The widths that Multiflow's YAML repeats by interpolation (`c_s: ${model.node_embed_size}`) follow the model's where
    a section leaves them out, and must equal it where it does not.
    """

    node_embed_size: int = Field(default=256, gt=0, le=MOST_CHANNELS)
    edge_embed_size: int = Field(default=128, gt=0, le=MOST_CHANNELS)
    symmetric: bool = False
    aatype_pred: bool = True
    transformer_dropout: float = Field(default=0.2, ge=0.0, lt=1.0)
    aatype_pred_num_tokens: int = Field(default=21, gt=0, le=MOST_CHANNELS)
    node_features: NodeFeaturesConfig
    edge_features: EdgeFeaturesConfig
    ipa: IPAConfig

    @model_validator(mode="before")
    @classmethod
    def _share_widths(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        node, edge = filled.get("node_embed_size", 256), filled.get("edge_embed_size", 128)
        tokens = filled.get("aatype_pred_num_tokens", 21)
        shared: dict[str, dict[str, object]] = {
            "node_features": {"c_s": node, "aatype_pred_num_tokens": tokens},
            "edge_features": {"c_s": node, "c_p": edge},
            "ipa": {"c_s": node, "c_z": edge},
        }
        for name, widths in shared.items():
            section = filled.get(name, {})
            if isinstance(section, Mapping):
                filled[name] = {**widths, **section}
        return filled

    @model_validator(mode="after")
    def _check_widths(self) -> ModelConfig:
        pairs = (
            ("node_features.c_s", self.node_features.c_s, "node_embed_size", self.node_embed_size),
            ("edge_features.c_s", self.edge_features.c_s, "node_embed_size", self.node_embed_size),
            ("edge_features.c_p", self.edge_features.c_p, "edge_embed_size", self.edge_embed_size),
            ("ipa.c_s", self.ipa.c_s, "node_embed_size", self.node_embed_size),
            ("ipa.c_z", self.ipa.c_z, "edge_embed_size", self.edge_embed_size),
        )
        for name, value, expected_name, expected in pairs:
            if value != expected:
                raise ValueError(f"{name} is {value}, but {expected_name} is {expected}: they must be equal")
        if self.ipa.c_s % self.ipa.seq_tfmr_num_heads:
            heads = self.ipa.seq_tfmr_num_heads
            raise ValueError(f"ipa.seq_tfmr_num_heads ({heads}) must divide node_embed_size ({self.ipa.c_s})")
        return self


class RotationsConfig(Section):
    """`interpolant.rots`."""

    corrupt: bool = True
    train_schedule: Literal["linear", "exp"] = "linear"
    sample_schedule: Literal["linear", "exp"] = "exp"
    exp_rate: float = 10


class GyrationConfig(Section):
    """`interpolant.trans.rog`: the potential on the radius of gyration."""

    weight: float = 10.0
    cutoff: float = 5.0


class TranslationsConfig(Section):
    """`interpolant.trans`."""

    corrupt: bool = True
    batch_ot: bool = True
    train_schedule: Literal["linear"] = "linear"
    sample_schedule: Literal["linear", "vpsde"] = "linear"
    sample_temp: float = 1.0
    vpsde_bmin: float = 0.1
    vpsde_bmax: float = 20.0
    potential: str | None = None
    potential_t_scaling: bool = False
    rog: GyrationConfig = GyrationConfig()


class AatypesConfig(Section):
    """`interpolant.aatypes`: residue types."""

    corrupt: bool = True
    schedule: str = "linear"
    schedule_exp_rate: float = 10
    temp: float = Field(default=0.1, gt=0.0)
    noise: float = Field(default=20.0, ge=0.0)
    do_purity: bool = True
    train_extra_mask: float = 0.0
    interpolant_type: Literal["masking", "uniform"] = "masking"


class SamplingConfig(Section):
    """`interpolant.sampling`."""

    num_timesteps: int = Field(default=100, gt=0, le=1_000_000)
    do_sde: bool = False


class InterpolantConfig(Section):
    """`interpolant`: noise, schedules and sampling. The defaults are the published config's."""

    min_t: float = Field(default=0.01, ge=0.0, lt=1.0)
    separate_t: bool = False
    provide_kappa: bool = False
    hierarchical_t: bool = False
    codesign_separate_t: bool = True
    codesign_forward_fold_prop: float = Field(default=0.1, ge=0.0, le=1.0)
    codesign_inverse_fold_prop: float = Field(default=0.1, ge=0.0, le=1.0)
    rots: RotationsConfig = RotationsConfig()
    trans: TranslationsConfig = TranslationsConfig()
    aatypes: AatypesConfig = AatypesConfig()
    sampling: SamplingConfig = SamplingConfig()
    self_condition: bool = True


AnySection = TypeVar("AnySection", bound=Section)
AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_config(path: Path) -> DictConfig:
    """Reads a YAML config whole, resolving nothing; one with `defaults:` or `hydra:` as Hydra composes it.

    Raises:
        BadInput: No such file, not YAML, no mapping at its top; or Hydra is needed and not installed, or refuses it.
    """
    import yaml  # type: ignore[import-untyped,unused-ignore]
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise BadInput(f"{path}: far too large for a config file ({path.stat().st_size:,} bytes).")
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _count_nodes(path, tree, [0], 0)
        # OmegaConf makes a config even of a single word.
        config = OmegaConf.load(io.StringIO(text)) if isinstance(tree, yaml.MappingNode) else None
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"{path}: there is no such file.", "put the checkpoint's config.yaml beside it.") from error
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context
        raise BadInput(f"{path}: not valid YAML{where}: {problem}.", "correct the file.") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError, AttributeError) as error:
        # PyYAML's constructors raise whatever int(), float() and datetime() do.
        raise BadInput(f"{path}: not valid YAML ({_first_line(error)}).", "correct the file.") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"{path}: not a valid config ({_first_line(error)}).", "correct the file.") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read as a config ({error.strerror or error}).") from error
    if not isinstance(config, DictConfig) or not config:
        raise BadInput(f"{path}: no config in it: it should hold sections such as `model:`.")
    refuse_bombs(OmegaConf.to_container(config), str(path))
    if hydra_keys(config):
        config = composed(path, config)
        if not config:
            raise BadInput(f"{path}: no config in it, nor in what its `defaults:` names.")
        refuse_bombs(OmegaConf.to_container(config), str(path))
    return config


def model_section(config: DictConfig | Mapping[Any, Any], source: Path | None = None) -> ModelConfig:
    """Gives the checked `model:` section of a whole config.

    Args:
        config: The root: its `model:` may refer to other sections.
        source: The file it is from, for messages.

    Raises:
        BadInput: There is no such section, it does not resolve, or a value is wrong.
    """
    return _section(config, "model", ModelConfig, source)


def interpolant_section(config: object, source: Path | None = None) -> InterpolantConfig:
    """Gives the checked `interpolant:` section, of a whole config or in any form that a caller has it in.

    Args:
        config: A whole config (a mapping with `interpolant` in it), or what `as_interpolant_config` takes.
        source: The file it is from, for messages.

    Raises:
        BadInput: There is no such section, it does not resolve, or a value is wrong.
    """
    if isinstance(config, Mapping):  # a DictConfig is one too
        keys = {str(key) for key in config}
        # All settings have defaults, so a whole config without the section must not pass for an empty section.
        if "interpolant" in keys or (keys and keys.isdisjoint(InterpolantConfig.model_fields)):
            return _section(config, "interpolant", InterpolantConfig, source)
    return as_interpolant_config(config, "interpolant" if source is None else f"{source}: interpolant")


def as_model_config(section: object, where: str = "model") -> ModelConfig:
    """Gives a checked `ModelConfig` for what a caller has as its `model` section; see `as_interpolant_config`."""
    return checked(ModelConfig, as_data(section, ModelConfig, where), where)


def as_interpolant_config(section: object, where: str = "interpolant") -> InterpolantConfig:
    """Gives a checked `InterpolantConfig` for what a caller has as its `interpolant` section.

    Args:
        section: A mapping, a DictConfig (a node taken from a whole config still resolves), an `InterpolantConfig`, or
            any object that has the settings as attributes.
        where: What messages call it.

    Raises:
        BadInput: It does not resolve, or a value is wrong.
    """
    return checked(InterpolantConfig, as_data(section, InterpolantConfig, where), where)


def _section(
    config: DictConfig | Mapping[Any, Any], name: str, kind: type[AnySection], source: Path | None
) -> AnySection:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    prefix = "" if source is None else f"{source}: "
    try:
        root = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        section = OmegaConf.select(root, name)
    except OmegaConfBaseException as error:
        raise BadInput(f"{prefix}the section `{name}:` does not resolve ({_first_line(error)}).") from error
    if section is None:
        found = ", ".join(sorted(str(key) for key in list(root)[:12])) if root else "nothing"
        raise BadInput(
            f"{prefix}the config has no section `{name}:` (it has: {found}).",
            "use the config.yaml that was saved with the checkpoint.",
        )
    return checked(kind, as_data(section, kind, f"{prefix}{name}"), f"{prefix}{name}")


def as_data(value: object, kind: type[BaseModel], where: str) -> dict[str, Any]:
    """A plain dict of a section in any of its forms; sections inside it too."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, DictConfig):
        try:
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise BadInput(
                f"{where} does not resolve: {_first_line(error)}.",
                "pass the section of a whole config, or values instead of ${...} and ???.",
            ) from error
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, Mapping) and not hasattr(value, "__dict__") and not hasattr(value, "__slots__"):
        raise BadInput(f"{where} should be a section with settings, not {value!r:.80}.")
    if isinstance(value, Mapping):
        data: dict[str, Any] = {str(key): item for key, item in value.items()}
    else:
        # Any object with attributes. Only what we know is read from it: its other attributes may be anything.
        data = {name: getattr(value, name) for name in kind.model_fields if hasattr(value, name)}
    for name, item in data.items():
        inner = kind.model_fields[name].annotation if name in kind.model_fields else None
        if isinstance(inner, type) and issubclass(inner, Section):
            data[name] = as_data(item, inner, f"{where}.{name}")
        elif isinstance(item, str) and "${" in item and name in kind.model_fields:
            raise BadInput(
                f"{where}.{name} is the unresolved reference {item!r:.80}.",
                "pass the section of a whole config read with OmegaConf, or the value itself.",
            )
    return data


def checked(kind: type[AnyModel], data: dict[str, Any], where: str) -> AnyModel:
    """Gives a checked section, or one `BadInput` that lists everything that is wrong with it."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            place = ".".join((where, *(str(part) for part in problem["loc"])))
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            given = "" if problem["type"] in ("value_error", "missing") else f" (it is {problem['input']!r:.60})"
            lines.append(f"{place}: {message}{given}")
        if len(lines) > _MOST_ERRORS_SHOWN:
            lines[_MOST_ERRORS_SHOWN:] = [f"... and {len(lines) - _MOST_ERRORS_SHOWN} more"]
        raise BadInput("\n".join(lines), "correct these settings in the config.") from error


def _count_nodes(path: Path, node: Any, counted: list[int], depth: int) -> None:
    """Refuses YAML that a few nested aliases unfold into gigabytes, before anything unfolds it."""
    counted[0] += 1
    if counted[0] > _MOST_CONFIG_NODES or depth > 100:
        raise BadInput(f"{path}: the config unfolds into far too many parts, or contains itself.")
    if isinstance(node, tuple):
        children: Any = node
    else:
        children = node.value if node is not None and not isinstance(node.value, str) else ()
    for child in children:
        _count_nodes(path, child, counted, depth + 1)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__
