"""The rule by which a kernel's numbers pass, and a check of one kernel against its operation's definition in float64.

A kernel passes when its error is at most twice the error that plain PyTorch makes at the same precision on the same
inputs, plus a floor. Outputs are judged, and every gradient.

Plain PyTorch is the definition. In float32 and float64 it runs in the type of its inputs. In 16 bits the result of each
of its operators is rounded (`rounded_operators`), as in a model that is held in that type; coordinates, and what is
computed from them, stay in float32, as the operations promise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...configs.kernel import KernelConfig
from ...configs.presets import OPERATIONS
from .. import registry
from ..hardware import tf32
from ..registry.types import Dims, Reason, Request
from .cases.case import Case
from .cases.memory_layouts import stored
from .cases.random_inputs import Draws
from .rounded_operators import plain_pytorch

#: What a kernel's error may be, beyond twice that of plain PyTorch, as a part of the largest value.
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
#: The types of 16 bits: what stands below of bfloat16 holds for float16 as well, whose floor is an eighth.
HALF = (torch.bfloat16, torch.float16)

#: Other scales of the cotangents, at which plain PyTorch in 16 bits is run besides. Its numbers are then rounded
#: elsewhere: of a gradient of few numbers, the error of a single run may by luck be next to nothing.
SCALES = (2**0.2, 2**0.4, 2**0.6, 2**0.8)

#: Where the rule does not hold, by how much it is exceeded, and why. Measured; nothing may be added without a reason.
EXCEEDS = {
    # A library whose attended points come back in bfloat16: value and sum are each rounded to 1 part in 512. Measured
    # on a stand-in.
    ("factorized_point_attention", "flash_attn", torch.bfloat16): 2.5,
    # A library that takes and gives points, which plain PyTorch keeps in float32, in 16 bits; so are the gradients of
    # lifted points. 3.8 was seen, on a stand-in.
    ("invariant_point_attention", "cuequivariance", torch.bfloat16): 4.5,
}
#: The same, on CUDA only: scaled_dot_product_attention, which is given lifted points, gives them in 16 bits there.
EXCEEDS_ON_CUDA = {("factorized_point_attention", "torch", torch.bfloat16): 2.5}

#: Gradients that come back through a ReLU. Of a value close to zero 16 bits may see the other side, which moves single
#: entries by all that passed there, and a kernel sees other entries flip than plain PyTorch does. Where single entries
#: do not hold, the norm of the error is judged, as a part of the norm. Of `torch` with products in bfloat16, up to 0.06
#: was seen.
_PERCEPTRON = frozenset({"nodes", "z", "weight_1", "bias_1", "weight_2", "bias_2"})
BEHIND_RELU = {
    "edge_features": (_PERCEPTRON - {"z"}) | {"relpos_weight", "relpos_bias"},
    "edge_transition": _PERCEPTRON,
    "edge_transition_attention": _PERCEPTRON,
}
FLIPPED = 0.15


class ContractBroken(AssertionError):
    """A kernel did what no kernel may do, whatever its numbers are: the message says what."""


@dataclass
class Ran:
    """What a call gave.

    Attributes:
        outputs: Every output.
        gradients: The gradient of every leaf by name.
        kernels: The kernels that ran, as "operation: kernel".
        rescaled: The gradients again, from cotangents of other scales.
    """

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    kernels: list[str]
    rescaled: tuple[dict[str, Tensor], ...] = ()

    def named(self) -> dict[str, Tensor]:
        """Outputs as `output 0`, gradients as `gradient of q`."""
        outputs = {f"output {i}": out for i, out in enumerate(self.outputs)}
        return outputs | {f"gradient of {name}": gradient for name, gradient in self.gradients.items()}


@dataclass(frozen=True)
class Verdict:
    """What came of one output or gradient.

    Attributes:
        name: `output 0`, `gradient of q`.
        error: The largest difference from the truth; NaN where there is one.
        plain: The same of plain PyTorch.
        allowed: The largest error that passes.
        largest: The largest value of the truth.
        passed: Whether it holds.
        note: What else there is to say: the rule that was applied in place of the usual, or what is wrong.
    """

    name: str
    error: float
    plain: float
    allowed: float
    largest: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        numbers = f"error {self.error:.3g} of {self.largest:.3g}; plain PyTorch {self.plain:.3g}"
        return f"{self.name}: {numbers}, allowed {self.allowed:.3g}" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class Check:
    """One kernel of one operation against its definition.

    Attributes:
        operation: The operation's name.
        kernel: The kernel's name.
        dtype: The precision of the inputs.
        device: Where it ran.
        dims: The sizes.
        verdicts: Of every output and gradient.
        broken: What no kernel may do and this one did (see `ContractBroken`), empty if nothing.
    """

    operation: str
    kernel: str
    dtype: torch.dtype
    device: str
    dims: Mapping[str, int]
    verdicts: tuple[Verdict, ...]
    broken: str = ""

    @property
    def passed(self) -> bool:
        """Whether all of it holds."""
        return not self.broken and bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def worst(self) -> Verdict | None:
        """The one nearest to what is allowed, or furthest beyond: one that fails before one that passes."""
        return max(self.verdicts, key=_badness, default=None)


def _badness(verdict: Verdict) -> tuple[bool, float]:
    share = verdict.error / verdict.allowed if verdict.allowed > 0 else verdict.error
    return (not verdict.passed, share if share == share else float("inf"))


# Running --------------------------------------------------------------------------------------------------------------


@contextmanager
def required(operation: str, kernel: str, **settings: Any) -> Iterator[str]:
    """The token of a configuration under which `kernel` runs, or nothing does.

    Args:
        operation: Its name.
        kernel: The kernel's name.
        **settings: More of the kernel configuration.
    """
    if operation in OPERATIONS:
        yield registry.token(KernelConfig.model_validate({operation: kernel, **settings}))
        return
    # The configuration has no word for it: it goes with the operations that it fuses.
    with registry.require(operation, kernel):
        yield registry.token(KernelConfig.model_validate(settings))


def given_dtype(case: Case, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a floating value is given: coordinates never in 16 bits."""
    return torch.promote_types(dtype, torch.float32) if name in case.points else dtype


def cotangents(shapes: Sequence[tuple[torch.Size, torch.dtype]], variant: str, dtype: torch.dtype) -> list[Tensor]:
    """Random, and the same for every kernel; `expanded` gives what comes back from a sum over the first axes."""
    r, found = Draws(1), []
    for shape, _ in shapes:
        x = r.normal(*shape).to(dtype)
        if variant == "expanded":
            x = x.flatten(0, -2)[0].expand(shape)
        elif variant == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        found.append(x)
    return found


def run(
    case: Case,
    kernel: str,
    dtype: torch.dtype,
    *,
    variant: str = "plain",
    device: str = "cpu",
    wide: bool = False,
    backward: bool = True,
    overwrite: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    rounded: bool = False,
    scales: Sequence[float] = (),
) -> Ran:
    """Run a case under a kernel, on inputs rounded to `dtype`.

    Args:
        case: What to run.
        kernel: The kernel's name, which is required.
        dtype: What the inputs are rounded to, and held in.
        variant: How they lie in memory.
        device: Where.
        wide: Hold them in float64 after rounding: the truth.
        backward: Also ask for every gradient.
        overwrite: Other contiguous values for some names.
        settings: More of the kernel configuration.
        rounded: Round each operator's result to `dtype`, which has 16 bits; coordinates stay in float32.
        scales: Ask for the gradients at these scales of the cotangents, too.

    PyTorch's global seed is set, so that dropout drops the same under every kernel.

    Raises:
        ContractBroken: Another kernel ran, an input was changed, or an output is not the caller's alone.
        KernelUnavailable: The kernel cannot serve the case.
    """
    leaves: dict[str, Tensor] = {}
    x: dict[str, Any] = {}
    for name, value in {**case.values, **(overwrite or {})}.items():
        if value is None:
            x[name] = None
            continue
        if value.is_floating_point():
            held = given_dtype(case, name, dtype)
            value = value.to(held).to(torch.float64 if wide else held)
        leaf, view = stored(value, variant, name in case.batched)
        leaf = leaf.to(device)
        if leaf.is_floating_point() and backward and name not in case.constants:
            leaf.requires_grad_()
        leaves[name], x[name] = leaf, view(leaf)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    torch.manual_seed(0)
    coordinates = [leaf for name, leaf in leaves.items() if name in case.points]
    operators = plain_pytorch(dtype, coordinates) if rounded else nullcontext()
    with (
        torch.set_grad_enabled(backward),
        required(case.operation, kernel, **(settings or {})) as config,
        registry.record_kernels() as ran,
        operators,
    ):
        outputs = case.call(x, config)
    if ran != [f"{case.operation}: {kernel}"]:
        raise ContractBroken(f"{kernel} was asked for, and {ran} ran")
    gradients: dict[str, Tensor] = {}
    rescaled: list[dict[str, Tensor]] = []
    if backward:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        shapes = [(out.shape, out.dtype) for out in outputs]
        drawn = [[ct * scale for ct in cotangents(shapes, variant, dtype)] for scale in (1.0, *scales)]
        each = [[ct.to(out.dtype).to(device) for ct, out in zip(some, outputs, strict=True)] for some in drawn]
        with operators:
            for asked in each:
                found = torch.autograd.grad(outputs, list(wanted.values()), asked, retain_graph=len(each) > 1)
                rescaled.append(dict(zip(wanted, found, strict=True)))
        gradients = rescaled.pop(0)
    _nothing_was_touched(kernel, outputs, leaves, before)
    return Ran(tuple(out.detach() for out in outputs), gradients, ran, tuple(rescaled))


def _nothing_was_touched(
    kernel: str, outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> None:
    for name, leaf in leaves.items():
        if not torch.equal(leaf, before[name]):
            raise ContractBroken(f"{kernel} changed its input {name}")
    held_by_inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves.values() if leaf.numel()}
    if any(out.untyped_storage().data_ptr() in held_by_inputs for out in outputs):
        raise ContractBroken(f"an output of {kernel} is a view of an input")


def truth_and_plain(case: Case, dtype: torch.dtype, variant: str = "plain", device: str = "cpu") -> tuple[Ran, Ran]:
    """The definition in float64, and what plain PyTorch makes of the same inputs at `dtype`."""
    where = "cpu" if device.partition(":")[0] == "mps" else device  # MPS has no float64
    scales = SCALES if dtype in HALF else ()
    truth = run(case, "reference", dtype, variant=variant, device=where, wide=True, scales=scales)
    return truth, run_plain(case, dtype, variant=variant, device=device)


def run_plain(
    case: Case, dtype: torch.dtype, *, variant: str = "plain", device: str = "cpu", backward: bool = True
) -> Ran:
    """Run the definition as plain PyTorch computes it at `dtype`: in 16 bits, with each operator's result rounded."""
    narrow = dtype in HALF
    scales = SCALES if narrow and backward else ()
    return run(
        case, "reference", dtype, variant=variant, device=device, backward=backward, rounded=narrow, scales=scales
    )


def reasons(
    case: Case, kernel: str, dtype: torch.dtype, device: str, grad: bool = True, precision: str = "float32"
) -> tuple[Reason, ...]:
    """Every reason why a kernel cannot serve a case; empty if it can.

    Args:
        case: What to run.
        kernel: The kernel's name.
        dtype: The precision of the inputs.
        device: Where.
        grad: Whether gradients are asked for.
        precision: What float32 data may be rounded to, as the configuration says it.
    """
    kind, _, index = device.partition(":")
    if kind == "mps" and dtype is torch.float64:
        return (Reason("MPS has no float64"),)
    request = Request(
        operation=case.operation,
        device=kind,
        dtype=dtype,
        capability=registry.machine.capability(kind, int(index) if index.isdecimal() else None),
        dims=Dims(case.dims),
        precision=precision,
        grad=grad,
        options=case.options,
    )
    return registry.reasons_against(registry.kernels(case.operation)[kernel], request)


def rounding(precision: str) -> AbstractContextManager[None]:
    """PyTorch's own switch for float32 products, which kernels read: "tf32" or nothing less than float32."""
    return tf32.switched(precision == "tf32")


def rule_of(dtype: torch.dtype, precision: str, device: str) -> torch.dtype:
    """The type by whose rule a result is judged.

    tf32 has ten bits, fewer than float32's rule allows for, and more than bfloat16's. Only NVIDIA's GPUs have it:
    elsewhere float32 stays what it is, and is held to its own rule.
    """
    return torch.bfloat16 if precision == "tf32" and device.partition(":")[0] == "cuda" else dtype


# Judgement ------------------------------------------------------------------------------------------------------------


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN where there is one.

    Raises:
        ContractBroken: The shapes differ.
    """
    if got.shape != truth.shape:
        raise ContractBroken(f"a result is {list(got.shape)}; the reference gives {list(truth.shape)}")
    # To the CPU first: MPS has no float64.
    return float((got.cpu().double() - truth.cpu().double()).abs().max()) if got.numel() else 0.0


def relative(got: Tensor, truth: Tensor) -> float:
    """The norm of the error, as a part of the truth's norm."""
    truth = truth.cpu().double()  # to the CPU first: MPS has no float64
    return float((got.cpu().double() - truth).norm() / truth.norm())


def exceeds(kernel: str, dtype: torch.dtype, device: str) -> float:
    """By how much a kernel (`operation: kernel`) may exceed the rule: 1 unless a reason is written down."""
    operation, _, name = kernel.partition(": ")
    key = (operation, name, torch.bfloat16 if dtype in HALF else dtype)
    return max(EXCEEDS.get(key, 1.0), EXCEEDS_ON_CUDA.get(key, 1.0) if device == "cuda" else 1.0)


def judge_one(
    name: str,
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    least: float = 0.0,
    exceeds: float = 1.0,
    at_other_scales: float = 0.0,
) -> Verdict:
    """At most twice plain PyTorch's error, plus the floor: a part of the largest value, and of `least` at least."""
    largest = max(float(truth.abs().max()) if truth.numel() else 0.0, least)
    ours, theirs = error(got, truth), max(error(plain, truth), at_other_scales)
    allowed = exceeds * (2 * theirs + FLOOR[dtype] * largest)
    if got.dtype is not plain.dtype:
        note = f"it is {got.dtype}; the reference gives {plain.dtype}"
        return Verdict(name, ours, theirs, allowed, largest, False, note)
    return Verdict(name, ours, theirs, allowed, largest, ours <= allowed)


def judge(got: Ran, plain: Ran, truth: Ran, dtype: torch.dtype) -> list[Verdict]:
    """Every output and every gradient.

    Raises:
        ContractBroken: Outputs or gradients are missing, or have other shapes.
    """
    device = got.outputs[0].device.type if got.outputs else "cpu"
    more = max((exceeds(kernel, dtype, device) for kernel in got.kernels), default=1.0)
    if len(got.outputs) != len(truth.outputs) or got.gradients.keys() != truth.gradients.keys():
        raise ContractBroken("it has other outputs or gradients than the reference")
    verdicts = [
        judge_one(f"output {i}", out, theirs, true, dtype, exceeds=more)
        for i, (out, theirs, true) in enumerate(zip(got.outputs, plain.outputs, truth.outputs, strict=True))
    ]
    # A gradient that is nothing but rounding (of q, where there is one key) is measured by what cancelled in it.
    all_gradients = max((float(g.abs().max()) for g in truth.gradients.values() if g.numel()), default=0.0)
    flips = BEHIND_RELU.get(got.kernels[0].partition(": ")[0] if got.kernels else "", frozenset())
    for name, gradient in got.gradients.items():
        true = truth.gradients[name]
        of_truth = float(true.abs().max()) if true.numel() else 0.0
        least = all_gradients if of_truth < 1e-9 * all_gradients else 0.0
        other = max(
            (
                error(theirs[name], of_scale[name]) / scale
                for theirs, of_scale, scale in zip(plain.rescaled, truth.rescaled, SCALES, strict=False)
            ),
            default=0.0,
        )
        verdict = judge_one(f"gradient of {name}", gradient, plain.gradients[name], true, dtype, least, more, other)
        if not verdict.passed and not verdict.note and name in flips and dtype in HALF:
            part = relative(gradient, true)
            note = f"behind a ReLU: the norm of its error is {part:.2g} of the norm, allowed {FLIPPED}"
            verdict = replace(verdict, passed=part <= FLIPPED, note=note)
        verdicts.append(verdict)
    return verdicts


def check(
    case: Case,
    kernel: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    variant: str = "plain",
    backward: bool = True,
    beside: tuple[Ran, Ran] | None = None,
    precision: str = "float32",
) -> Check:
    """Run one kernel on a case, and judge its outputs and every gradient.

    Args:
        case: What to run.
        kernel: The kernel's name.
        dtype: The precision of the inputs.
        device: Where.
        variant: How the inputs lie in memory.
        backward: Whether gradients are judged, too.
        beside: What `truth_and_plain` gave for the same; found when None. Give it where several kernels are checked.
        precision: What float32 data may be rounded to. For "tf32", be inside of `rounding`.

    Raises:
        KernelUnavailable: The kernel cannot serve the case.
        Exception: Whatever the kernel raises.
    """
    truth, plain = beside if beside is not None else truth_and_plain(case, dtype, variant, device)
    if not backward:
        truth, plain = (Ran(side.outputs, {}, side.kernels) for side in (truth, plain))
    verdicts: list[Verdict] = []
    broken = ""
    try:
        settings = {"precision": precision} if precision != "float32" else {}
        got = run(case, kernel, dtype, variant=variant, device=device, backward=backward, settings=settings)
        verdicts = judge(got, plain, truth, rule_of(dtype, precision, device))
        for out, gone in zip(got.outputs, case.gone_outputs or [None] * len(got.outputs), strict=True):
            if gone is not None and out.cpu()[gone].any():
                broken = "a row in which nothing takes part is not zero"
    except ContractBroken as wrong:
        broken = str(wrong)
    return Check(case.operation, kernel, dtype, device, dict(case.dims), tuple(verdicts), broken)
