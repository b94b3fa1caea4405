"""A whole model under each preset, side by side: the same inputs, and the definition in float64 to judge by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...configs.presets import PRESETS
from ...kernels.registry import record_kernels
from ...kernels.registry.binding import bind
from .model import FlowModel

#: A preset may be this many times as far from float64 as the definition is at the model's own precision: rounding grows
#: on its way through the layers, and differently for each order of adding.
TIMES = 5.0
#: And this much more: Angstrom, degrees, and a part of the largest logit.
FLOORS = {"translations": 1e-4, "rotations": 1e-3, "logits": 1e-5}


@dataclass(frozen=True)
class PresetRow:
    """A preset's distance from the definition in float64, where residues take part.

    Attributes:
        preset: Its name.
        kernels: What ran, as "operation: kernel".
        translations: The largest distance of two positions, in Angstrom.
        rotations: The largest angle between two frames, in degrees.
        logits: The largest difference.
        largest_logit: The largest value in float64.
        other_types: The share of residues for which another type is predicted.
        passed: Whether all of it holds (see `TIMES`).
        why: What it raised instead.
        seconds: How long the forward pass took, its first.
    """

    preset: str
    kernels: tuple[str, ...] = ()
    translations: float | None = None
    rotations: float | None = None
    logits: float | None = None
    largest_logit: float | None = None
    other_types: float | None = None
    passed: bool = False
    why: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def compare_presets(
    model: FlowModel,
    length: int,
    *,
    seed: int = 0,
    presets: Iterable[str] = tuple(PRESETS),
    advance: Callable[[], None] = lambda: None,
) -> list[PresetRow]:
    """Run a model under each preset on the same random inputs, two proteins, one of them padded.

    Args:
        model: In eval mode, on its device. It is bound anew, and left with the last preset.
        length: Residues.
        seed: Of the inputs.
        presets: Which; `reference` comes first, whether it is named or not, because the others are judged by it.
        advance: Called after each preset.
    """
    batch = random_batch(model, length, seed)
    device = next(model.parameters()).device
    exact = deepcopy(model).to("cpu" if device.type == "mps" else device).double()  # MPS has no float64
    bind(exact, "reference")
    truth = {name: value.cpu() for name, value in _run(exact, batch).items()}
    del exact
    there = batch["res_mask"].bool()
    rows: list[PresetRow] = []
    for preset in ["reference", *(name for name in presets if name != "reference")]:
        start = time.perf_counter()
        try:
            bind(model, {"preset": preset, "fallback": "silent"})
            with record_kernels() as ran:
                found = _run(model, batch)
            row = _row(preset, ran, found, truth, there, rows[0] if rows else None, time.perf_counter() - start)
        except Exception as error:
            row = PresetRow(preset, why=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        rows.append(row)
        advance()
    return rows


def random_batch(model: FlowModel, length: int, seed: int = 0) -> dict[str, Tensor]:
    """What the model takes, on the CPU: two proteins of two chains each, the second padded; some residues are given."""
    generator = torch.Generator().manual_seed(seed)
    tokens, there = model.model_config.aatype_pred_num_tokens, torch.ones(2, length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    def walk() -> Tensor:
        steps = 3.8 * torch.nn.functional.normalize(normal(length, 3), dim=-1)  # Angstrom between two residues
        chain = steps.cumsum(1)
        return chain - chain.mean(1, keepdim=True)

    there[1, max(1, length - length // 3) :] = 0.0
    given = torch.rand(2, length, generator=generator) < 0.1
    times = torch.full((2, 1), 0.5)
    frames = torch.linalg.qr(normal(length, 3, 3))[0]
    return {
        "res_mask": there,
        "diffuse_mask": (~given).float(),
        "chain_idx": (torch.arange(length) >= (length + 1) // 2).long().expand(2, length) + 1,
        "res_idx": torch.arange(1, length + 1).expand(2, length),
        "so3_t": times,
        "r3_t": times,
        "cat_t": times,
        "trans_t": walk(),
        "trans_sc": walk(),
        "rotmats_t": frames * torch.linalg.det(frames)[..., None, None].sign(),  # no reflections
        "aatypes_t": torch.randint(0, 21, (2, length), generator=generator),
        "aatypes_sc": normal(length, tokens).softmax(-1),
    }


def _run(model: FlowModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    moved = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
    with torch.no_grad():
        return {name: value.cpu() for name, value in model(moved).items()}


def _row(
    preset: str,
    ran: list[str],
    found: dict[str, Tensor],
    truth: dict[str, Tensor],
    there: Tensor,
    plain: PresetRow | None,
    seconds: float,
) -> PresetRow:
    ours, true = ({name: value[there].double() for name, value in side.items()} for side in (found, truth))
    apart = float((ours["pred_trans"] - true["pred_trans"]).norm(dim=-1).max())
    angle = _degrees(ours["pred_rotmats"], true["pred_rotmats"])
    logits = float((ours["pred_logits"] - true["pred_logits"]).abs().max())
    largest = float(true["pred_logits"].abs().max())
    errors = {"translations": apart, "rotations": angle, "logits": logits}
    scales = {"translations": 1.0, "rotations": 1.0, "logits": largest}
    # The definition's own error is what the others are judged by.
    theirs = {name: getattr(plain, name, None) or 0.0 for name in errors} if plain is not None else errors
    passed = all(error <= TIMES * theirs[name] + FLOORS[name] * scales[name] for name, error in errors.items())
    if not all(map(math.isfinite, errors.values())):  # which JSON has no word for
        return PresetRow(preset, tuple(sorted(set(ran))), why="its outputs hold NaN or infinity")
    other = float((ours["pred_aatypes"] != true["pred_aatypes"]).double().mean())
    kernels = tuple(sorted(set(ran)))
    return PresetRow(preset, kernels, apart, angle, logits, largest, other, passed, "", round(seconds, 3))


def _degrees(ours: Tensor, true: Tensor) -> float:
    """The largest angle between two rotations: from their difference, which small angles do not cancel in."""
    chord = torch.linalg.matrix_norm(ours - true) / 2**1.5
    return float((2.0 * chord.clamp(max=1.0).asin()).rad2deg().max())
