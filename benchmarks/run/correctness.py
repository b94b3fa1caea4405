"""Whether a whole model's results are right: outputs and gradients of many layers, against the same in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

#: What an error may be beyond plain PyTorch's, as a part of the tensor's largest value, and how far off the norm of a
#: whole model's gradient may be.
FLOORS = {"float32": (1e-6, 1e-2), "tf32": (5e-4, 0.2), "bfloat16": (2e-3, 0.5)}
#: Errors may be so many times plain PyTorch's: of one layer, and after a model's many.
LAYER_FACTOR, MODEL_FACTOR = 2.0, 4.0


@dataclass(frozen=True)
class Judgement:
    """What came of the comparison.

    Attributes:
        passed: Whether the rule holds.
        words: The worst tensor, or what is wrong.
        error: The worst tensor's largest difference, over its largest value.
        plain: The same of plain PyTorch.
        allowed: The largest that passes.
    """

    passed: bool
    words: str
    error: float = float("nan")
    plain: float = float("nan")
    allowed: float = float("nan")


def judge(
    whole_model: bool,
    precision: str,
    truth: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
) -> Judgement:
    """Hold results to float64, judged by what plain PyTorch loses at the same precision on the same inputs.

    The error of each tensor may be twice plain PyTorch's, four times after the many layers of a whole model, plus a
    floor. A gradient far smaller than the largest one counts as 1e-3 of that: some have none but rounding noise. A
    whole model's gradients are judged by their norms: see `gradients_hold`.

    Args:
        whole_model: Whether this is one, or a single layer.
        precision: A key of `FLOORS`.
        truth: Tensors by name, in float64; gradients are called `grad ...`.
        theirs: Plain PyTorch's.
        ours: What is judged.
    """
    missing = truth.keys() - ours.keys()
    if missing:
        return Judgement(False, f"no {', '.join(sorted(missing))}")
    factor = MODEL_FACTOR if whole_model else LAYER_FACTOR
    floor, most = FLOORS[precision]
    largest_gradient = max((float(v.abs().max()) for k, v in truth.items() if k.startswith("grad")), default=0.0)
    if whole_model:
        held, judged = gradients_hold(truth, theirs, ours, factor, floor, most)
        if not held:
            return Judgement(False, judged)
        truth = {name: exact for name, exact in truth.items() if not name.startswith("grad")}
    worst, found = -1.0, Judgement(False, "nothing was compared")
    for name, exact in truth.items():
        least = 1e-3 * largest_gradient if name.startswith("grad") else 0.0
        scale = max(float(exact.abs().max()), least)
        error, plain_error = (float((side[name].double() - exact).abs().max()) for side in (ours, theirs))
        allowed = factor * plain_error + floor * scale
        share = error / allowed if allowed else (0.0 if error == 0.0 else math.inf)
        if not share <= worst:  # also takes NaN
            worst = share
            words = f"{name}: {error:.1e} (plain PyTorch {plain_error:.1e}) of {scale:.1e}"
            over = scale or 1.0
            found = Judgement(share <= 1.0, words, error / over, plain_error / over, allowed / over)
        if math.isnan(share):
            break
    return found


def gradients_hold(
    truth: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    factor: float,
    floor: float,
    most: float,
) -> tuple[bool, str]:
    """Whether a whole model's gradients are right, and how far off they are, in words.

    Among some ten million ReLUs a few stand so close to zero that two correct roundings differ in the sign. Such a flip
    moves one entry of a gradient by far more than rounding, on either side. So the relative error of each tensor's norm
    is taken: the median over all tensors is held to plain PyTorch's, and no tensor may be off by `most`.
    """
    names = [name for name in truth if name.startswith("grad") and not name.endswith("linear_b.bias")]
    names = [name for name in names if float(truth[name].norm()) > 0]
    if not names:
        return True, ""
    errors, plain = (
        [float((side[n].double() - truth[n]).norm() / truth[n].norm()) for n in names] for side in (ours, theirs)
    )
    median, plain_median = sorted(errors)[len(names) // 2], sorted(plain)[len(names) // 2]
    largest = max(errors)
    worst = names[errors.index(largest)]
    words = f"gradients: median {median:.1e} (plain PyTorch {plain_median:.1e}), most {largest:.1e} in {worst}"
    return median <= factor * plain_median + floor and largest <= most, words
