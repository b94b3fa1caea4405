"""RNA-FrameFlow (Anand et al. 2024), with FlashIPA or without. `from foldkernels.compat import rna_frameflow`.

Parameters, inputs and outputs have the names of github.com/rish-16/rna-backbone-design: a state_dict of either of its
configs loads strictly. With `use_flashipa` its `mode` says what is computed (docs/flash-ipa.md); without, or in a
config from before there was such a key, the model is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..kernels.common.sinusoidal import sinusoids, time_sinusoids
from ..kernels.registry.binding import BindReport, bind
from ..modules.angle_resnet import AngleResnet
from ..modules.masks import boolean
from ..modules.rigid import Rigid
from .flash_ipa.edge_embedder import EdgeEmbedder, EdgeEmbedderConfig
from .flash_ipa.ipa import IPAConfig
from .flash_ipa.model import check_model_config, run_trunk, trunk_of
from .flash_ipa.utils import ANG_TO_NM_SCALE, NM_TO_ANG_SCALE

if TYPE_CHECKING:
    from .multiflow.checkpoint.files import Checkpoint

_POSITIONS = 2056
_TORSIONS = 8

Section = TypeVar("Section", IPAConfig, EdgeEmbedderConfig)


@dataclass(frozen=True)
class ModelConfig:
    """RNA-FrameFlow's `model:` section, checked.

    Attributes:
        mode: FlashIPA's mode; orig_2d_bias without `use_flashipa`.
        node_embed_size: Width of the single representation.
        edge_embed_size: Width of the pair representation, or of a factor.
        c_pos_emb: Channels of a position's embedding.
        c_timestep_emb: Channels of a time's.
        ipa: The attention and the blocks.
        edge_features: The edge embedder.
    """

    mode: str
    node_embed_size: int
    edge_embed_size: int
    c_pos_emb: int
    c_timestep_emb: int
    ipa: IPAConfig
    edge_features: EdgeEmbedderConfig


def as_model_config(section: Any) -> ModelConfig:
    """A checked `ModelConfig`.

    Args:
        section: The `model:` section: a mapping, an OmegaConf node that resolves, a `ModelConfig`, or an object with
            the settings as attributes. Settings that the model does not use are ignored.

    Raises:
        BadInput: A setting is missing or wrong, or two contradict each other.
    """
    if isinstance(section, ModelConfig):
        return section
    data = _plain(section)
    flash = bool(data.get("use_flashipa", False))
    nodes, pairs = data.get("node_embed_size", 256), data.get("edge_embed_size", 128)
    ipa = _section(IPAConfig, data, "ipa", c_s=nodes, c_z=pairs)
    edges = _section(EdgeEmbedderConfig, data, "edge_features", c_s=nodes, c_p=pairs)
    if not flash:
        ipa = replace(ipa, use_flash_attn=False, z_factor_rank=0)
        edges = replace(edges, mode="orig_2d_bias")
    features = _plain(data.get("node_features", {}))
    config = ModelConfig(
        mode=data.get("mode", edges.mode) if flash else "orig_2d_bias",
        node_embed_size=nodes,
        edge_embed_size=pairs,
        c_pos_emb=features.get("c_pos_emb", 128),
        c_timestep_emb=features.get("c_timestep_emb", 128),
        ipa=ipa,
        edge_features=edges,
    )
    check_model_config(config)
    return config


class NodeEmbedder(nn.Module):
    """The first single representation, from positions and the time.

    Args:
        c_s: Its width.
        c_pos_emb: Channels of a position's embedding.
        c_timestep_emb: Channels of the time's.
    """

    def __init__(self, c_s: int, c_pos_emb: int, c_timestep_emb: int) -> None:
        super().__init__()
        self.c_pos_emb, self.c_timestep_emb = c_pos_emb, c_timestep_emb
        self.linear = nn.Linear(c_pos_emb + c_timestep_emb, c_s)

    def forward(self, timesteps: Tensor, mask: Tensor) -> Tensor:
        """Embed the residues.

        Args:
            timesteps: Times in [0, 1], [b, 1].
            mask: 1 for residues that take part, [b, n].
        """
        dtype = self.linear.weight.dtype
        positions = torch.arange(mask.shape[1], device=mask.device)
        waves = sinusoids(positions, self.c_pos_emb, _POSITIONS, dtype)[None].expand(mask.shape[0], -1, -1)
        time = time_sinusoids(timesteps[:, 0], self.c_timestep_emb, dtype)[:, None].expand(-1, mask.shape[1], -1)
        out: Tensor = self.linear(torch.cat([waves, time], dim=-1) * mask[..., None].to(dtype))
        return out


class FlowModel(nn.Module):
    """RNA-FrameFlow's model: frames and torsion angles from noisy frames.

    Args:
        model_conf: The `model:` section; see `as_model_config`.

    Attributes:
        config: The section, checked.
        kernels: What `bind` reported, where `load` made the model; else None.

    Raises:
        BadInput: A setting is wrong.
    """

    def __init__(self, model_conf: Any) -> None:
        super().__init__()
        self.config = as_model_config(model_conf)
        self.kernels: BindReport | None = None
        c = self.config.node_embed_size
        self.node_embedder = NodeEmbedder(c, self.config.c_pos_emb, self.config.c_timestep_emb)
        self.edge_embedder = EdgeEmbedder(self.config.edge_features)
        self.trunk = trunk_of(self.config)
        self.angle_pred_net = AngleResnet(c, 128, 2, _TORSIONS)

    def forward(self, input_feats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the clean structure.

        Args:
            input_feats: `res_mask` [b, n], `t` [b, 1], `trans_t` [b, n, 3] in Angstrom, `rotmats_t` [b, n, 3, 3], and
                `trans_sc` [b, n, 3] if there is a last prediction.

        Returns:
            `pred_trans` [b, n, 3] in Angstrom, `pred_rotmats` [b, n, 3, 3], and `pred_torsions` [b, n, 8, 2] as points
            on the unit circle. Rows of residues that do not take part hold nothing of meaning.

        Raises:
            BadInput: A tensor is missing, or has a shape that does not fit.
            ValueError: There are more residues than `max_len`, or fewer than `k`.
        """
        _check(input_feats)
        dtype = self.node_embedder.linear.weight.dtype
        trans = input_feats["trans_t"].to(dtype)
        there = boolean(input_feats["res_mask"]).to(dtype)
        first = self.node_embedder(input_feats["t"], there) * there[..., None]
        z, z_factor_1, z_factor_2, _ = self.edge_embedder(
            first, trans, input_feats.get("trans_sc", torch.zeros_like(trans)).to(dtype), there
        )
        frames = Rigid(input_feats["rotmats_t"].to(dtype), trans).scale_translation(ANG_TO_NM_SCALE)
        nodes, frames = run_trunk(self.trunk, first, (z, z_factor_1, z_factor_2), frames, there)
        frames = frames.scale_translation(NM_TO_ANG_SCALE)
        _, torsions = self.angle_pred_net(nodes, first)
        return {
            "pred_torsions": torsions,
            "pred_trans": frames.get_trans(),
            "pred_rotmats": frames.get_rot_mats(),
        }


def load(
    path: str | Path,
    kernel: Any = None,
    device: str | torch.device | None = None,
    *,
    command_line: Iterable[str] = (),
) -> FlowModel:
    """A model with a checkpoint's weights, on the kernels that you name, in eval mode.

    Args:
        path: Lightning's checkpoint (its config beside it as config.yaml, or saved in it), or a folder with last.ckpt
            and config.yaml. No code in it is run.
        kernel: A word, a mapping or a `KernelConfig`; by default the environment, then auto.
        device: Where the model goes; by default the CPU.
        command_line: The values of `--kernel`.

    Raises:
        BadInput: The checkpoint cannot be read, or its weights do not fit its config.
        KernelUnavailable: A required kernel cannot run here.
    """
    from .multiflow.checkpoint.files import fit_report, read_checkpoint

    checkpoint = read_checkpoint(path)
    config = _config_of(checkpoint)
    with torch.device("meta"):  # no memory is taken before the sizes are known to be those of the weights
        try:
            wanted = FlowModel(config).state_dict()
        except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise BadInput(
                f"{checkpoint.source}: the config describes no model that can be made ({str(error)[:200]})",
                "correct its sizes.",
            ) from error
    found = checkpoint.state_dict
    report = fit_report(wanted, found)
    if report:
        raise BadInput(
            f"{checkpoint.source}: its weights do not fit the model that its config describes.\n{report}",
            "use the config.yaml that was written with these weights; `use_flashipa` and `mode` must be those of the "
            "training.",
        )
    model = FlowModel(config)
    model.load_state_dict(found, strict=True)
    model.to(device or "cpu")
    model.kernels = bind(model, kernel, command_line=command_line)
    return model.eval()


def _model_section(checkpoint: Checkpoint) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        section = OmegaConf.select(checkpoint.config, "model")
    except OmegaConfBaseException as error:
        raise BadInput(f"{checkpoint.source}: the section `model:` does not resolve ({error}).") from error
    if section is None:
        raise BadInput(f"{checkpoint.source}: the config has no section `model:`.")
    return section


def _config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The checked section of a checkpoint, whose messages name the file; and not of more layers than it has weights."""
    try:
        config = as_model_config(_model_section(checkpoint))
    except BadInput as error:
        source = str(checkpoint.source)
        message = error.message if source in error.message else f"{source}: {error.message}"
        raise BadInput(message, error.hint) from error
    layers = config.ipa.num_blocks * (1 + max(0, config.ipa.seq_tfmr_num_layers))
    if layers > len(checkpoint.state_dict):
        raise BadInput(
            f"{checkpoint.source}: its weights do not fit the model that its config describes: {layers:,} layers",
            "correct the config's numbers of layers.",
        )
    return config


def _plain(section: Any) -> dict[str, Any]:
    """A plain mapping of a section in any of its forms."""
    if isinstance(section, Mapping) and type(section).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            section = OmegaConf.to_container(section, resolve=True)  # type: ignore[arg-type,unused-ignore]
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"model: does not resolve ({reason})", "pass the section of a whole config.") from error
    if isinstance(section, Mapping):
        return {str(key): value for key, value in section.items()}
    if not hasattr(section, "__dict__"):
        raise BadInput(f"a section with settings was expected, not {section!r:.80}")
    return dict(vars(section))


def _section(kind: type[Section], data: Mapping[str, Any], name: str, **widths: int) -> Section:
    """A dataclass of a section; widths that the section leaves out are the model's."""
    given = _plain(data.get(name, {}))
    known = {field.name: field.default for field in fields(kind)}
    values = {**widths, **{key: value for key, value in given.items() if key in known}}
    for key, value in values.items():
        default = known[key]
        numbers = isinstance(default, int) and not isinstance(default, bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, int)):
            raise BadInput(f"model.{name}.{key} is {value!r}; it must be a whole number")
    return kind(**values)


_SHAPES = {"trans_t": (3,), "rotmats_t": (3, 3), "trans_sc": (3,)}


def _check(batch: Mapping[str, Tensor]) -> None:
    needed = ("res_mask", "t", "trans_t", "rotmats_t")
    missing = [name for name in needed if name not in batch]
    if missing:
        raise BadInput(f"the batch lacks {', '.join(missing)}", f"a batch holds {', '.join(needed)}.")
    if batch["res_mask"].ndim != 2:
        raise BadInput(f"res_mask has shape {tuple(batch['res_mask'].shape)}; it must be [batch, residues]")
    lead = tuple(batch["res_mask"].shape)
    for name, wanted in {name: (*lead, *last) for name, last in _SHAPES.items()}.items():
        if name in batch and tuple(batch[name].shape) != wanted:
            raise BadInput(f"{name} has shape {tuple(batch[name].shape)}; with res_mask {lead} it must be {wanted}")
    if tuple(batch["t"].shape) != (lead[0], 1):
        raise BadInput(f"t has shape {tuple(batch['t'].shape)}; with res_mask {lead} it must be {(lead[0], 1)}")
