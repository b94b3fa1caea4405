"""Calls of operations as hypothesis draws them: sizes, masks, memory, what wants a gradient, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from foldkernels.kernels import registry
from foldkernels.kernels.common import blocking
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.cases.builders import make
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.testing.cases.random_inputs import Draws
from foldkernels.kernels.testing.rounded_operators import plain_pytorch

#: What each operation's builder takes besides sizes, and from where that is drawn.
FEATURES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "attention": {"dropout": st.sampled_from([0.0, 0.0, 0.4])},
    "attention_pair_bias": {
        "given": st.booleans(),
        "cross": st.booleans(),
        "shared": st.integers(1, 3),
        "normed": st.booleans(),
    },
    "edge_features": {"with_chain": st.booleans(), "with_diffuse": st.booleans()},
    "edge_transition": {},
    "edge_transition_attention": {"keep_z": st.booleans()},
    "factorized_point_attention": {
        "with_bias": st.booleans(),
        "with_pair": st.booleans(),
        "away": st.sampled_from([0.0, 0.0, 20.0]),
    },
    "invariant_point_attention": {
        "dropout": st.sampled_from([0.0, 0.0, 0.0, 0.4]),
        "away": st.sampled_from([0.0, 0.0, 20.0]),
    },
    "triangle_attention": {"square": st.booleans()},
    "triangle_attention_update": {"gate_bias": st.booleans(), "out_bias": st.booleans(), "ending": st.booleans()},
    "triangle_multiplication": {"biased": st.booleans(), "incoming": st.booleans()},
}
#: The widths that each size is drawn from; those of `f`, a sine and a cosine each, are doubled. A LayerNorm over a few
#: channels divides by almost nothing now and then, which says nothing about a kernel.
WIDTHS = {
    "h": (1, 5), "c": (1, 20), "d": (1, 20), "p": (1, 6), "pv": (1, 7), "cz": (8, 40), "cz_out": (8, 40),
    "cn": (1, 20), "f": (1, 6), "bins": (2, 22), "r": (1, 3), "cp": (1, 9),
}  # fmt: skip
#: Their gradients jump where a number before a ReLU rounds to the other side of zero: of a hundred thousand, one
#: does in float32.
WITH_RELU = ("edge_features", "edge_transition", "edge_transition_attention")
LAYOUTS = ("contiguous", "contiguous", "permuted", "spread", "offset", "slice", "expanded", "padded")
MASKS = ("drawn", "everybody", "nobody", "one", "nobody in the last", "first half")
MODES = ("gradients", "gradients", "gradients", "no_grad", "inference", "autocast")


@dataclass(frozen=True)
class Call:
    """One drawn call, as data: hypothesis prints it when it fails.

    Attributes:
        operation: What is called.
        kernel: Which kernel computes it.
        length: Residues or tokens.
        batch: Items.
        sizes: By name.
        features: By name.
        masked: Whether the call has masks at all.
        mask: What the masks are like.
        dtype: What the inputs are held in.
        mode: With gradients or without, under autocast or not.
        layouts: How each value lies in memory.
        wanted: The values that want a gradient.
        silent: Outputs that nothing is done with.
        rows: Query rows in a block; None for what the machine would take.
        seed: Of the numbers.
    """

    operation: str
    kernel: str
    length: int
    batch: int
    sizes: Mapping[str, int]
    features: Mapping[str, Any]
    masked: bool
    mask: str
    dtype: torch.dtype
    mode: str
    layouts: Mapping[str, tuple[str, int]]
    wanted: frozenset[str]
    silent: frozenset[int]
    rows: int | None
    seed: int

    @property
    def computed_in(self) -> torch.dtype:
        """What its results are rounded to."""
        return torch.bfloat16 if self.mode == "autocast" else self.dtype

    def case(self) -> Case:
        """Its tensors, contiguous and in float64."""
        case = make(
            self.operation,
            self.length,
            batch=self.batch,
            masked=self.masked,
            sizes=self.sizes,
            seed=self.seed,
            **self.features,
        )
        values = {name: self._mask(value) if _is_mask(value) else value for name, value in case.values.items()}
        return replace(case, values=values)

    def _mask(self, drawn: Tensor | None) -> Tensor | None:
        if drawn is None or self.mask == "drawn":
            return drawn
        mask = torch.zeros_like(drawn)
        if self.mask == "everybody":
            mask[:] = True
        elif self.mask == "one":
            mask.view(-1)[self.seed % max(mask.numel(), 1)] = True
        elif self.mask == "nobody in the last":
            mask[:-1] = True
        elif self.mask == "first half":
            mask[..., : max(1, mask.shape[-1] // 2)] = True
        return mask


def _is_mask(value: Tensor | None) -> bool:
    return value is not None and value.dtype is torch.bool


@st.composite
def calls(draw: st.DrawFn, operations: tuple[str, ...], kernels: tuple[str, ...], longest: int) -> Call:
    """Any call of these operations by these kernels, up to a length."""
    operation = draw(st.sampled_from(operations))
    known = registry.kernels(operation)
    kernel = draw(st.sampled_from([name for name in kernels if name in known]))
    length = draw(st.integers(1, longest if "triangle" not in operation else min(longest, 24)))
    call = Call(
        operation,
        kernel,
        length,
        batch=draw(st.integers(1, 3)),
        sizes={name: draw(st.integers(*WIDTHS[name])) * (2 if name == "f" else 1) for name in sizes_of(operation)},
        features={name: draw(values) for name, values in FEATURES[operation].items()},
        masked=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])),
        mode=draw(st.sampled_from(MODES)),
        layouts={},
        wanted=frozenset(),
        silent=frozenset(),
        rows=draw(st.sampled_from([None, None, 1, 2, 5])),
        seed=draw(st.integers(0, 2**16)),
    )
    case = call.case()
    given = [name for name, value in case.values.items() if value is not None]
    layouts = {name: (draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 23))) for name in given}
    may = wanted_of(case)
    everything = draw(st.booleans())
    wanted = frozenset(may if everything else draw(st.lists(st.sampled_from(may), unique=True)))
    silent = (
        frozenset(draw(st.lists(st.integers(0, 3), unique=True, max_size=2))) if draw(st.booleans()) else frozenset()
    )
    return replace(call, layouts=layouts, wanted=wanted, silent=silent)


def sizes_of(operation: str) -> list[str]:
    """The names of the sizes that an operation's builder takes, apart from the length."""
    from foldkernels.kernels.testing.cases import builders

    return sorted(builders.sizes_of(operation))


# Memory ---------------------------------------------------------------------------------------------------------------


def laid_out(value: Tensor, layout: str, which: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor to hold, and the view of it that the call is given: with the values of `value`, unless it is expanded.

    `padded` lies in a larger tensor on its last two axes, `slice` on its last one (as one of several projections that
    were computed at once), `offset` begins in the middle of a longer storage, `spread` has gaps between numbers,
    `permuted` has its axes in another order in memory, and `expanded` holds one axis once.
    """
    axes = value.ndim
    if layout == "expanded" and axes > 0 and value.is_floating_point():
        axis = which % axes
        return value.narrow(axis, 0, 1).clone(), lambda held: held.expand(value.shape)
    if layout == "permuted" and axes > 1:
        order = torch.randperm(axes, generator=torch.Generator().manual_seed(which)).tolist()
        back = [order.index(axis) for axis in range(axes)]
        return value.permute(order).contiguous(), lambda held: held.permute(back)
    if layout == "spread":
        return torch.stack([value, _other(value)], -1), lambda held: held[..., 0]
    if layout == "offset":
        more = 1 + which % 3
        flat = torch.cat([_other(value).reshape(-1)[:more], value.reshape(-1)])
        skipped = flat.numel() - value.numel()
        return flat, lambda held: held[skipped:].view(value.shape)
    if layout in ("slice", "padded") and axes > 0:
        before = which % 3
        held = _other(value).repeat_interleave(3, -1)
        held = torch.cat([held[..., :before], value, held[..., :2]], -1)
        if layout == "slice" or axes == 1:
            return held, lambda held: held[..., before : before + value.shape[-1]]
        held = torch.cat([held, held], -2)
        rows, columns = value.shape[-2:]
        return held, lambda held: held[..., :rows, before : before + columns]
    return value.clone(), lambda held: held


def _other(value: Tensor) -> Tensor:
    """What lies beside a value in memory: whoever reads it is found out."""
    if value.dtype is torch.bool:
        return ~value
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value + 1


# Running --------------------------------------------------------------------------------------------------------------


def run(call: Call, case: Case, kernel: str, *, wide: bool = False, plain: bool = False) -> accuracy.Ran:
    """Run a call under a kernel.

    Args:
        call: As drawn.
        case: Its tensors.
        kernel: The kernel's name.
        wide: Hold the inputs, rounded alike, in float64.
        plain: Compute as plain PyTorch does, which rounds each operator's result where that has 16 bits.

    Raises:
        AssertionError: Another kernel ran, or an input was changed.
    """
    leaves: dict[str, Tensor] = {}
    x: dict[str, Any] = dict.fromkeys(case.values)
    autocast = call.mode == "autocast"
    dtype = torch.float32 if autocast else call.dtype
    with torch.inference_mode(call.mode == "inference"):
        for name, value in case.values.items():
            if value is None:
                continue
            if value.is_floating_point():
                held = accuracy.given_dtype(case, name, dtype)
                value = value.to(held).to(torch.float64 if wide else held)
            leaf, view = laid_out(value, *call.layouts.get(name, ("contiguous", 0)))
            leaves[name] = leaf.requires_grad_() if name in call.wanted and _asks(call) else leaf
            x[name] = view(leaf)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    coordinates = [leaf for name, leaf in leaves.items() if name in case.points]
    torch.manual_seed(call.seed)
    with (
        _blocks_of(call),
        torch.inference_mode(call.mode == "inference"),
        torch.set_grad_enabled(_asks(call)),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast and not wide),
        accuracy.required(case.operation, kernel) as config,
        registry.record_kernels() as ran,
        plain_pytorch(call.computed_in, coordinates) if plain else nullcontext(),
    ):
        outputs = case.call(x, config)
        found = _gradients(call, outputs, leaves)
    assert ran == [f"{case.operation}: {kernel}"], ran
    for name, leaf in leaves.items():
        assert torch.equal(leaf.detach().nan_to_num(1.5), before[name].nan_to_num(1.5)), f"{name} was changed"
    return accuracy.Ran(tuple(out.detach() for out in outputs), found, ran)


def _asks(call: Call) -> bool:
    return call.mode in ("gradients", "autocast")


def _gradients(call: Call, outputs: tuple[Tensor, ...], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what wants one; of the outputs that something is done with. Where nothing comes back it is zero."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    used = [out for i, out in enumerate(outputs) if i not in call.silent and out.requires_grad]
    if not wanted or not used:
        return {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    r = Draws(call.seed + 1)
    asked = []
    for i, out in enumerate(used):
        x = r.normal(*out.shape).to(out.dtype)
        leaf, view = laid_out(x, LAYOUTS[(call.seed + i) % len(LAYOUTS)], call.seed % 7)
        asked.append(view(leaf))
    found = torch.autograd.grad(used, list(wanted.values()), asked, allow_unused=True)
    given = zip(wanted.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in given}


@contextmanager
def _blocks_of(call: Call) -> Iterator[None]:
    """Few rows in a block, so that short chains have several."""
    if call.rows is None:
        yield
        return
    pairs = call.rows * call.length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocking, "_PAIRS_PER_THREAD", dict.fromkeys((torch.float32, torch.float64), pairs))
        patch.setattr(blocking, "_PAIRS_PER_THREAD_16_BIT", pairs)
        yield


# Judgement ------------------------------------------------------------------------------------------------------------


def misses(call: Call) -> list[accuracy.Verdict]:
    """What a call gives that the rule does not pass: at most twice plain PyTorch's error, and the floor."""
    case = call.case()
    dtype = call.computed_in
    # Every gradient of the truth: one that is nothing but rounding is measured by what cancelled in it.
    everything = replace(call, wanted=frozenset(wanted_of(case)))
    truth = run(everything, case, "reference", wide=True)
    plain = run(call, case, "reference", plain=True)
    got = run(call, case, call.kernel)
    largest = max((float(g.abs().max()) for g in truth.gradients.values() if g.numel()), default=0.0)
    truth.gradients = {name: truth.gradients[name] for name in got.gradients}
    verdicts = accuracy.judge(got, plain, truth, dtype)
    for i, verdict in enumerate(verdicts):
        name = verdict.name.removeprefix("gradient of ")
        if not verdict.passed and name in got.gradients and verdict.largest < 1e-9 * largest:
            tensors = (got.gradients[name], plain.gradients[name], truth.gradients[name])
            verdicts[i] = accuracy.judge_one(verdict.name, *tensors, dtype, least=largest)
    return [verdict for verdict in verdicts if not verdict.passed]


def wanted_of(case: Case) -> list[str]:
    """The values of a case that may want a gradient."""
    values = case.values.items()
    return sorted(n for n, x in values if x is not None and x.is_floating_point() and n not in case.constants)


def assert_holds(call: Call) -> None:
    """Judge a call. Of few numbers a rounding error may by luck be thrice another: then other numbers decide.

    Raises:
        AssertionError: A miss by far, or with most of the other numbers, too.
    """
    missed = misses(call)
    if not missed:
        return
    told = "\n".join(map(str, missed))
    jumps = call.operation in WITH_RELU
    far = [v for v in missed if not v.error <= 10 * v.allowed and not (jumps and v.name.startswith("gradient"))]
    assert not far, told
    again = [misses(replace(call, seed=call.seed + 1000 * i)) for i in (1, 2, 3)]
    assert sum(map(bool, again)) < 2, told
