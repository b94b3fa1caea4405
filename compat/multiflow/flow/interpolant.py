"""Multiflow's sampler: integrates frames and residue types from noise to a protein.

Source: Campbell et al., "Generative Flows on Discrete State-Spaces", 2024 (arXiv 2402.04997); Yim et al., "Fast protein
backbone generation with SE(3) flow matching", 2023 (arXiv 2310.05297). The released code's behaviour is kept, order of
random draws included, so that a checkpoint and a seed give the sample that they gave there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ....errors import BadInput
from ...files.progress import progress_bar
from ..config.sections import interpolant_section
from ..structures.backbone import atom37_from_trans_rot
from .discrete_steps import euler_step, purity_step
from .inputs import prepare
from .noise import Draws
from .so3_steps import geodesic

Trajectory = list[tuple[Tensor, Tensor]]
"""Atom37 positions (B, N, 37, 3; Angstrom) and residue types (B, N) of each step, on the CPU."""

Model = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""A ``FlowModel``, or anything that is called like one."""


def _mix(sampled: Tensor, fixed: Tensor, diffuse_mask: Tensor) -> Tensor:
    """Keeps fixed residues (mask 0) where they are known to be."""
    mask = diffuse_mask.reshape(*diffuse_mask.shape, *(1,) * (sampled.ndim - 2))
    return sampled * mask + fixed * (1 - mask)


class Interpolant:
    """Samples proteins from a Multiflow model.

    Args:
        cfg: The ``interpolant`` section of a Multiflow config: a mapping, an OmegaConf ``DictConfig``, or an object
            with its keys as attributes.

    Attributes:
        num_tokens: Classes of residue types: 21 with masking noise, 20 with uniform noise.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = interpolant_section(cfg)
        self._masking = self.cfg.aatypes.interpolant_type == "masking"
        self._exponential = self.cfg.rots.sample_schedule == "exp"
        if self.cfg.aatypes.do_purity and not self._masking:
            raise BadInput("aatypes.do_purity unmasks residues: it needs aatypes.interpolant_type: masking")
        self.num_tokens = 21 if self._masking else 20
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device | None:
        """The device that was set, or None where the model's is used."""
        return self._device

    def set_device(self, device: torch.device | str | int | None) -> None:
        """Samples on this device rather than on the model's; None goes back to the model's."""
        self._device = None if device is None else torch.device(device)

    def corrupt_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws a time for each protein of a clean batch, and noises it; see `training.corruption.corrupt_batch`."""
        from .corruption import corrupt_batch  # sampling needs none of it

        return corrupt_batch(batch, self.cfg)

    def sample(
        self,
        num_batch: int,
        num_res: int,
        model: Model,
        num_timesteps: int | None = None,
        trans_0: Float[Tensor, "b n 3"] | None = None,
        rotmats_0: Float[Tensor, "b n 3 3"] | None = None,
        aatypes_0: Shaped[Tensor, "b n"] | None = None,
        trans_1: Float[Tensor, "b n 3"] | None = None,
        rotmats_1: Float[Tensor, "b n 3 3"] | None = None,
        aatypes_1: Shaped[Tensor, "b n"] | None = None,
        diffuse_mask: Shaped[Tensor, "b n"] | None = None,
        chain_idx: Shaped[Tensor, "b n"] | None = None,
        res_idx: Shaped[Tensor, "b n"] | None = None,
        t_nn: Callable[[Tensor], Tensor] | None = None,
        forward_folding: bool = False,
        inverse_folding: bool = False,
        separate_t: bool = False,
        *,
        rewrite_fixed_types: bool = False,
        seeds: Sequence[int] | None = None,
        keep_trajectory: bool = True,
        on_step: Callable[[], None] | None = None,
        progress: bool | None = None,
    ) -> tuple[Trajectory, Trajectory]:
        """Samples a batch of proteins.

        Every random number is drawn on the CPU and moved, so that a seed gives the same noise on every device. The
        model is called ``num_timesteps`` times, without gradients, in whatever mode (train or eval) it is in.

        Two quirks of the original are kept, since a checkpoint's users see their effect: the last call of the model
        gets the residue types and the times of the call before it, and the residue types of noisy states are floats.
        A third is kept on demand: that the last call rewrites the types of fixed residues (``rewrite_fixed_types``).

        Args:
            num_batch: Proteins in the batch.
            num_res: Residues of each.
            model: Called with the batch; gives ``pred_trans``, ``pred_rotmats``, ``pred_aatypes`` and ``pred_logits``.
                A callable without parameters counts as being on the CPU.
            num_timesteps: Calls of the model, at least 2; by default ``sampling.num_timesteps`` of the config.
            trans_0: Where translations start, Angstrom; drawn if not given.
            rotmats_0: Where rotations start; drawn if not given.
            aatypes_0: Where residue types start; masks, or drawn for uniform noise, if not given.
            trans_1: Known translations, Angstrom: of a motif, or of the structure for inverse folding.
            rotmats_1: Known rotations.
            aatypes_1: Known residue types, 0 to 19 (20 is the mask).
            diffuse_mask: 1 where a residue is sampled, 0 where it is fixed to ``*_1``.
            chain_idx: Chain of each residue; all 1 by default.
            res_idx: Number of each residue; 0 to N - 1 by default.
            t_nn: Maps times (B, 1) to three columns: the times that the model is told for translations, rotations and
                residue types.
            forward_folding: Residue types are known (``aatypes_1``); needs ``aatypes.noise: 0``.
            inverse_folding: Frames are known (``trans_1`` and ``rotmats_1``).
            separate_t: Known parts stand at their end from the first step, and the model is told so.
            rewrite_fixed_types: Whether the last step gives fixed residues the types that the model predicts for them,
                as the original does. By default they keep their own, and stand where they are known to be.
            seeds: A seed for each item, which then gets the noise it would get alone (see ``draws.Draws``); by default
                torch's and numpy's global generators are used.
            keep_trajectory: False leaves out all but the last entry of each trajectory, which saves half a kilobyte for
                each residue and step.
            on_step: Called after each call of the model.
            progress: False hides the progress bar, which else appears on a terminal only.

        Returns:
            The trajectory of noisy states (``num_timesteps + 1`` entries, the last one being the sample) and that of
            the model's predictions (``num_timesteps`` entries, the last one being the sample too).

        Raises:
            BadInput: An argument of the wrong shape, NaN, or missing for what is asked.
            RuntimeError: The model's predictions are not finite.
        """
        cfg = self.cfg
        steps = cfg.sampling.num_timesteps if num_timesteps is None else num_timesteps
        if steps < 2:
            raise BadInput(f"num_timesteps is {steps}: sampling takes at least 2 calls of the model")
        if forward_folding and cfg.aatypes.noise != 0:
            noise = cfg.aatypes.noise
            raise BadInput(f"forward folding keeps residue types, but aatypes.noise is {noise:g}", "set it to 0")
        known = {}
        if not cfg.trans.corrupt:
            known["trans_1"] = "trans.corrupt is false"
        if not cfg.rots.corrupt:
            known["rotmats_1"] = "rots.corrupt is false"
        if not cfg.aatypes.corrupt:
            known["aatypes_1"] = "aatypes.corrupt is false"
        if forward_folding:
            known["aatypes_1"] = "forward folding keeps residue types"
        if inverse_folding:
            known["trans_1"] = known["rotmats_1"] = "inverse folding keeps the backbone"

        device = self._device or device_of(model)
        draws = Draws(num_batch, seeds)
        start = prepare(
            num_batch,
            num_res,
            given={
                "trans_0": trans_0, "rotmats_0": rotmats_0, "aatypes_0": aatypes_0,
                "trans_1": trans_1, "rotmats_1": rotmats_1, "aatypes_1": aatypes_1,
                "diffuse_mask": diffuse_mask, "chain_idx": chain_idx, "res_idx": res_idx,
            },
            masking=self._masking,
            known=known,
            draws=draws,
            device=device,
        )  # fmt: skip
        known_logits = torch.nn.functional.one_hot(start.aatypes_1, num_classes=self.num_tokens).float()
        trans_t, rotmats_t, types_t = start.trans_0, start.rotmats_0, start.aatypes_0
        if forward_folding and separate_t:
            types_t = start.aatypes_1
        if inverse_folding and separate_t:
            trans_t, rotmats_t = start.trans_1, start.rotmats_1
        # Residue types take their steps on the CPU, see discrete_steps.py.
        types_t, types_1, types_mask = types_t.cpu(), start.aatypes_1.cpu(), start.diffuse_mask.cpu()

        batch: dict[str, Tensor] = {
            "res_mask": start.res_mask,
            "diffuse_mask": start.diffuse_mask,
            "chain_idx": start.chain_idx,
            "res_idx": start.res_idx,
            "trans_sc": torch.zeros(num_batch, num_res, 3, device=device),
            "aatypes_sc": torch.zeros(num_batch, num_res, self.num_tokens, device=device),
        }
        # Times stay float32 tensors on the CPU: in the steps' arithmetic they round as the original's do, and reading
        # one never waits for a GPU.
        times = torch.linspace(cfg.min_t, 1.0, steps)
        noisy: Trajectory = [(_atoms(trans_t, rotmats_t), types_t)] if keep_trajectory else []
        clean: Trajectory = []
        with progress_bar("sampling", steps, False if on_step is not None else progress) as advance, torch.no_grad():
            for t, t_next in pairwise(times):
                d_t = t_next - t
                batch["trans_t"] = trans_t if cfg.trans.corrupt else start.trans_1
                batch["rotmats_t"] = rotmats_t if cfg.rots.corrupt else start.rotmats_1
                batch["aatypes_t"] = types_t.to(device) if cfg.aatypes.corrupt else start.aatypes_1
                batch.update(self._times(t, num_batch, t_nn, forward_folding, inverse_folding, separate_t, device))

                pred_trans, pred_rotmats, pred_types, pred_logits = _predictions(model(batch))
                if keep_trajectory:
                    clean.append((_atoms(pred_trans, pred_rotmats), pred_types.cpu()))
                if forward_folding:
                    pred_logits = 100.0 * known_logits
                if inverse_folding:
                    pred_trans, pred_rotmats = start.trans_1, start.rotmats_1
                if cfg.self_condition:
                    batch["trans_sc"] = _mix(pred_trans, start.trans_1, start.diffuse_mask)
                    batch["aatypes_sc"] = (
                        known_logits if forward_folding else _mix(pred_logits, known_logits, start.diffuse_mask)
                    )

                trans_t = self._trans_step(d_t, t, pred_trans, trans_t)
                rotmats_t = self._rotation_step(d_t, t, pred_rotmats, rotmats_t)
                types_t = self._type_step(d_t, t, _finite(pred_logits.cpu(), t), types_t, draws)
                trans_t = _mix(trans_t, start.trans_1, start.diffuse_mask)
                rotmats_t = _mix(rotmats_t, start.rotmats_1, start.diffuse_mask)
                types_t = _mix(types_t, types_1, types_mask)
                if keep_trajectory:
                    noisy.append((_atoms(trans_t, rotmats_t), types_t))
                advance()
                if on_step is not None:
                    on_step()

            # The last call. The original sets `aatype_t` here, a name that no model reads, so `aatypes_t` and the times
            # are still those of the step before.
            batch["trans_t"] = trans_t if cfg.trans.corrupt else start.trans_1
            batch["rotmats_t"] = rotmats_t if cfg.rots.corrupt else start.rotmats_1
            pred_trans, pred_rotmats, pred_types, _ = _predictions(model(batch))
            if forward_folding:
                pred_types = start.aatypes_1
            if inverse_folding:
                pred_trans, pred_rotmats = start.trans_1, start.rotmats_1
            if diffuse_mask is not None and not rewrite_fixed_types:
                pred_trans = _mix(pred_trans, start.trans_1, start.diffuse_mask)
                pred_rotmats = _mix(pred_rotmats, start.rotmats_1, start.diffuse_mask)
                fixed = start.diffuse_mask == 0
                pred_types = torch.where(fixed, start.aatypes_1.to(pred_types.dtype), pred_types)
            last = (_finite(_atoms(pred_trans, pred_rotmats), times[-1]), pred_types.cpu())
            clean.append(last)
            noisy.append(last)
            advance()
            if on_step is not None:
                on_step()
        return noisy, clean

    def _times(
        self,
        t: Float[Tensor, ""],
        num_batch: int,
        t_nn: Callable[[Tensor], Tensor] | None,
        forward_folding: bool,
        inverse_folding: bool,
        separate_t: bool,
        device: torch.device,
    ) -> dict[str, Float[Tensor, "b 1"]]:
        """The times that the model is told: of rotations, translations and residue types."""
        column = (torch.ones(num_batch, 1) * t).to(device)
        if t_nn is not None:
            r3_t, so3_t, cat_t = torch.tensor_split(t_nn(column), 3, dim=-1)
        else:
            r3_t, so3_t, cat_t = column, column, column
            if self.cfg.provide_kappa and self._exponential:
                so3_t = 1 - torch.exp(-column * self.cfg.rots.exp_rate)
        end = torch.full_like(column, 1 - self.cfg.min_t)
        if forward_folding and separate_t:
            cat_t = end
        if inverse_folding and separate_t:
            r3_t, so3_t = end, end
        return {"so3_t": so3_t, "r3_t": r3_t, "cat_t": cat_t}

    def _trans_step(self, d_t: Tensor, t: Tensor, trans_1: Tensor, trans_t: Tensor) -> Tensor:
        if self.cfg.trans.sample_schedule == "linear":
            return trans_t + (trans_1 - trans_t) / (1 - t) * d_t
        low, high = self.cfg.trans.vpsde_bmin, self.cfg.trans.vpsde_bmax
        beta = low + (high - low) * (1 - t)
        alpha = torch.exp(-low * (1 - t) - 0.5 * (1 - t) ** 2 * (high - low))
        drift = 0.5 * beta * trans_t + 0.5 * beta * (torch.sqrt(alpha) * trans_1 - trans_t) / (1 - alpha)
        return trans_t + drift * d_t

    def _rotation_step(self, d_t: Tensor, t: Tensor, rotmats_1: Tensor, rotmats_t: Tensor) -> Tensor:
        rate = self.cfg.rots.exp_rate if self._exponential else 1 / (1 - t)
        return geodesic(rate * d_t, rotmats_1, rotmats_t)

    def _type_step(self, d_t: Tensor, t: Tensor, logits: Tensor, types: Tensor, draws: Draws) -> Tensor:
        aatypes = self.cfg.aatypes
        if aatypes.do_purity:
            return purity_step(d_t, t, logits, types, temperature=aatypes.temp, noise=aatypes.noise, draws=draws)
        return euler_step(
            d_t, t, logits, types, temperature=aatypes.temp, noise=aatypes.noise, masking=self._masking, draws=draws
        )


def device_of(model: Any) -> torch.device:
    """Where a model is; the CPU for a callable without parameters."""
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def _atoms(trans: Tensor, rotmats: Tensor) -> Float[Tensor, "b n 37 3"]:
    """Atoms on the CPU: moving frames and placing atoms there costs a ninth of moving atom37 from a GPU."""
    return atom37_from_trans_rot(trans.cpu(), rotmats.cpu())


def _predictions(output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The model's predictions; float32 even where it ran under autocast."""
    return (
        output["pred_trans"].float(),
        output["pred_rotmats"].float(),
        output["pred_aatypes"],
        output["pred_logits"].float(),
    )


def _finite(tensor: Tensor, t: Tensor) -> Tensor:
    """Stops where a model has diverged: multinomial would only say that a probability is NaN."""
    if not bool(torch.isfinite(tensor).all()):
        items = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
        raise RuntimeError(f"the model's predictions are not finite at t = {float(t):.3f}, in batch item(s) {items}")
    return tensor
