"""Runs invariant point attention's Triton kernels in Triton's interpreter, and says how wrong they are. A script.

The interpreter is chosen when Triton is imported, so that it needs a process of its own. Reads one JSON object a line,
a case of the contract test; answers with one JSON object a line: for each output and gradient its error, what the error
may be, and the error of plain PyTorch; or `raised`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime import interpreter

from foldkernels.kernels.invariant_point_attention import _launch, _tma_launch
from foldkernels.kernels.invariant_point_attention import _tiles as tiles
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.cases.builders import make
from foldkernels.kernels.testing.cases.case import Case

from .interpreted import FLOOR, allow_the_cpu, answer_questions, poison_memory, second_derivative

OPERATION = "invariant_point_attention"
#: Beyond that rule beside a float16 z: gradients are rounded to bfloat16 there, as in float16 they would underflow. Up
#: to 2.3 was seen.
EXCEEDS = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 2.5}


def plan(case: Mapping[str, Any]) -> None:
    """Have the launcher run in a given way, so that few residues are several tiles."""
    wide = case["sizes"][-1] > tiles.CHUNK or case["chunks"] == 2
    by_pointers = _launch.Plan(**{name: case[name] for name in _launch.Plan._fields[:-2]}, chunks=2 if wide else 1)
    described = [by_pointers._replace(chunks=1, descriptors=True)] if case["descriptors"] else []

    def plans(capability: Any, kernel: str, dtype: torch.dtype, **sizes: int) -> list[_launch.Plan]:
        return [*described, by_pointers] if kernel == tiles.FORWARD else [by_pointers]

    _launch.plans_for = plans
    _launch._PROGRAMS, _launch._FEWEST_BLOCKS = case["programs"], 1


def build(n: int, batch: int, masked: bool, sizes: Sequence[int], away: float = 0.0) -> Case:
    """A case of given heads, c_hidden, query points, value points and c_z."""
    named = dict(zip(("h", "c", "p", "pv", "cz"), sizes, strict=True))
    return make(OPERATION, n, batch=batch, masked=masked, sizes=named, away=away)


def beside(case: Case, dtype: torch.dtype) -> Case:
    """The same case with z in a type of its own."""

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
        z = x["z"] if x["z"].dtype is torch.float64 else x["z"].to(dtype)
        return case.call({**x, "z": z}, config)

    z = case.values["z"]
    assert z is not None
    return dataclasses.replace(case, call=call, values={**case.values, "z": z.to(dtype).double()})


FAULTS: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "flipped mask": lambda x: {"pair_mask": ~x["pair_mask"]},
    "lost bias": lambda x: {"bias_weight": torch.zeros_like(x["bias_weight"])},
    "lost points": lambda x: {"point_weights": torch.zeros_like(x["point_weights"])},
    "transposed z": lambda x: {"z": x["z"].transpose(1, 2).contiguous()},
    "no scalars": lambda x: {"q": torch.zeros_like(x["q"])},
}


def truncated(x: Any) -> Any:
    """float32 with the digits that tf32 holds."""
    return (x.view(numpy.uint32) & numpy.uint32(0xFFFFE000)).view(numpy.float32)


def multiply_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32's products as a GPU makes them of three of tf32; the interpreter alone would multiply exactly."""
    exactly = interpreter.InterpreterBuilder.create_dot

    def dot(of: Any, a: Any, b: Any, sums: Any, precision: Any, *more: Any) -> Any:
        if "TF32x3" not in str(precision):
            return exactly(of, a, b, sums, precision, *more)
        a_high, b_high = truncated(numpy.ascontiguousarray(a.data)), truncated(numpy.ascontiguousarray(b.data))
        a_low, b_low = truncated(a.data - a_high), truncated(b.data - b_high)
        low = numpy.matmul(a_low, b_high) + numpy.matmul(a_high, b_low)
        return interpreter.TensorHandle(sums.data + low + numpy.matmul(a_high, b_high), sums.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Compare with the definition in float64; and how often descriptors were used."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        described, forward = [], _tma_launch.forward

        def counted(*arguments: Any) -> Tensor:
            described.append(1)
            return forward(*arguments)

        monkeypatch.setattr(_tma_launch, "forward", counted)
        # No table has a fused way for float32: there, products are exact, and the test is of the arithmetic alone.
        if not asked["fused"]:
            multiply_in_tf32(monkeypatch)
        return {**compare(asked), "described": len(described)}


def compare(asked: dict[str, Any]) -> dict[str, Any]:
    dtype, variant = getattr(torch, asked["dtype"]), asked["variant"]
    of_z = getattr(torch, asked["z"] or asked["dtype"])
    batch = 1 if variant == "plain" else 3
    case = build(asked["n"], batch, variant != "plain", asked["sizes"], away=asked["away"])
    if of_z is not dtype:
        case = beside(case, of_z)
    truth = accuracy.run(case, "reference", dtype, variant=variant, wide=True)
    plain = accuracy.run_plain(case, dtype, variant=variant)
    # Beside a narrower z, the rest may be rounded as z is: that is what a precision of "bfloat16" allows.
    narrow = accuracy.run_plain(case, of_z, variant=variant) if of_z is not dtype else plain
    of_narrow = accuracy.run(case, "reference", of_z, variant=variant, wide=True) if of_z is not dtype else truth
    plan(asked)
    overwrite = FAULTS[asked["fault"]](case.values) if asked["fault"] else None
    got = accuracy.run(case, "triton", dtype, variant=variant, overwrite=overwrite)
    again = accuracy.run(case, "triton", dtype, variant=variant) if asked["twice"] else got
    all_gradients = max(float(g.abs().max()) for g in truth.gradients.values())
    answer: dict[str, Any] = {}
    names = ["out", "points", "pair", *truth.gradients]
    for i, name in enumerate(names):
        true, theirs, ours, same, rounded, unrounded = (
            run.outputs[i] if i < 3 else run.gradients[name] for run in (truth, plain, got, again, narrow, of_narrow)
        )
        largest = float(true.abs().max())
        # A gradient that is nothing but rounding (of q, where there is one key) is measured by what cancelled in it.
        largest = all_gradients if i >= 3 and largest < 1e-9 * all_gradients else largest
        of_plain = max(accuracy.error(theirs, true), accuracy.error(rounded, unrounded))
        answer[name] = {
            "error": accuracy.error(ours, true),
            "may_be": EXCEEDS[of_z] * (2 * of_plain + FLOOR[of_z] * largest),
            "of_plain": of_plain,
            "largest": largest,
            "same": torch.equal(ours, same),
            "as_plain": ours.dtype is theirs.dtype,
        }
    gone = [float(out[where].abs().sum()) for out, where in zip(got.outputs, case.gone_outputs, strict=True)]
    if variant == "masked":
        gone += [float(got.gradients[name][where].abs().sum()) for name, where in case.gone_values.items()]
    answer["of_empty_rows"] = [] if asked["fault"] else gone
    return answer


class Traffic:
    """How often each number of some tensors is read and written, by the addresses that kernels ask for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, list[Any]] = {"read": [], "written": []}
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def reading(of: Any, pointers: Any, mask: Any, *more: Any, **named: Any) -> Any:
            # A descriptor's mask comes as an array.
            here = mask if isinstance(mask, numpy.ndarray) else mask.data
            self.seen["read"].append(pointers.data[here.astype(bool)].ravel())
            return load(of, pointers, mask, *more, **named)

        def writing(of: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            self.seen["written"].append(pointers.data[mask.data.astype(bool)].ravel())
            return store(of, pointers, value, mask, *more)

        monkeypatch.setattr(builder, "create_masked_load", reading)
        monkeypatch.setattr(builder, "create_masked_store", writing)

    def times(self, what: str, x: Tensor) -> list[int]:
        """The fewest and the most times that a number of a contiguous tensor was read, or written."""
        places = (numpy.concatenate(self.seen[what]).astype(numpy.int64) - x.data_ptr()) // x.element_size()
        found = numpy.bincount(places[(places >= 0) & (places < x.numel())], minlength=x.numel())
        return [int(found.min()), int(found.max())]

    def forget(self) -> None:
        for places in self.seen.values():
            places.clear()


def operands(asked: Mapping[str, Any]) -> list[Any]:
    """What the operator takes: lifted q, k, v; z; bias_weight; there; pair_mask; points."""
    g = torch.Generator().manual_seed(0)
    n, h, d, dv, cz = asked["n"], *asked["lifted"]
    dtype = getattr(torch, asked["z"] or "float32")
    q, k, v = (torch.randn(2, h, n, x, generator=g) for x in (d, d, dv))
    z = torch.randn(2, n, n, cz, generator=g).to(dtype)
    pair_mask = torch.rand(2, n, n, generator=g) < 0.8
    pair_mask[..., 0] = True
    return [q, k, v, z, torch.randn(h, cz, generator=g), torch.ones(2, n, dtype=torch.bool), pair_mask, 3]


def count(asked: dict[str, Any]) -> dict[str, Any]:
    """How often each number of z is read, and of its gradient written, in each pass."""
    plan(asked)
    q, k, v, z, *rest = operands(asked)
    with pytest.MonkeyPatch.context() as monkeypatch:
        traffic = Traffic(monkeypatch)
        out, pair, lse = _launch.ipa_triton(q, k, v, z, *rest)
        answer: dict[str, Any] = {"forward": traffic.times("read", z)}
        traffic.forget()
        d_z = _launch.ipa_triton_backward(out, pair, q, k, v, z, *rest, out, pair, lse)[3]
        answer |= {"backward": traffic.times("read", z), "written": traffic.times("written", d_z)}
    return answer


def operators(asked: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's own checks of the custom operators, and a second derivative."""
    plan(asked)
    given = operands(asked)
    leaves = [x.requires_grad_() for x in given[:5]]
    found = torch.library.opcheck(_launch.ipa_triton, tuple(given))
    out, pair, lse = _launch.ipa_triton(*given)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (*given, out, pair, lse)]
    of_backward = torch.library.opcheck(
        _launch.ipa_triton_backward,
        (out.detach(), pair.detach(), *detached),
        test_utils=("test_schema", "test_faketensor"),
    )
    twice = second_derivative(out.square().sum() + pair.sum(), leaves[0])
    return {"forward": found, "backward": of_backward, "twice": twice, "lse_differentiable": lse.requires_grad}


def compiled(asked: dict[str, Any]) -> dict[str, Any]:
    """Whole graphs for several lengths, gradients among them, under autocast or not: the eager call's numbers."""
    plan(asked)
    counter = CompileCounterWithBackend("aot_eager")
    found: dict[str, Any] = {"most": 0.0}
    with (
        accuracy.required(OPERATION, "triton") as config,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked["autocast"]),
    ):
        function = build(9, 1, True, asked["sizes"]).call
        call = torch.compile(lambda x: function(x, config), fullgraph=True, backend=counter)
        for n in (9, 19, 11):
            values = build(n, 1, True, asked["sizes"]).values
            results = []
            for run in (lambda x: function(x, config), call):
                x = {name: v.float() if v is not None and v.is_floating_point() else v for name, v in values.items()}
                leaves = [v.requires_grad_() for name, v in x.items() if name != "logit_bias" and v.is_floating_point()]
                outputs = run(x)
                gradients = torch.autograd.grad(sum(out.float().square().sum() for out in outputs), leaves)
                results.append([*outputs, *gradients])
            for a, b in zip(*results, strict=True):
                found["most"] = max(found["most"], float((a - b).detach().abs().max()))
            found["types"] = [str(out.dtype) for out in outputs]
    return {**found, "graphs": counter.frame_count}


def describable(asked: dict[str, Any]) -> dict[str, Any]:
    """Tensors that a descriptor holds, and such as it does not."""
    z = torch.zeros(2, 3, 4, 24, dtype=torch.bfloat16)
    wide, odd = torch.zeros(2, 3, 4, 32, dtype=torch.bfloat16), torch.zeros(2, 3, 4, 23, dtype=torch.bfloat16)
    shifted = torch.zeros(2 * 3 * 4 * 24 + 8, dtype=torch.bfloat16)
    one = torch.zeros(1, 3, 4, 24, dtype=torch.bfloat16)
    cases = [
        (z, True),
        (wide[..., :24], True),  # rows apart
        (wide[..., :23], True),  # channels that fill no row
        (wide[:, :, ::2], True),
        (shifted[8:].view_as(z), True),
        (one.as_strided(one.shape, (7, 96, 24, 1)), True),  # one item: its stride means nothing
        (odd, False),  # rows of 46 bytes
        (shifted[1:-7].view_as(z), False),  # starts between
        (z.transpose(1, 2), False),
        (z[:1].expand(2, -1, -1, -1), False),
        (torch.zeros(2, 3, 4, 24, 2, dtype=torch.bfloat16)[..., 0], False),  # channels apart
        (z[:, :0], False),
    ]
    wrong = [i for i, (x, holds) in enumerate(cases) if _tma_launch.describable(x) is not holds]
    return {"wrong": wrong, "cases": len(cases)}


def far_apart(asked: dict[str, Any]) -> dict[str, Any]:
    """Rows of z more than 2^31 numbers apart give what they give side by side."""
    plan(asked)
    q, k, v, z, *rest = operands(asked)
    _, n, _, cz = z.shape
    # Memory that is never touched is never taken.
    far = 2**31 + 64
    strides = {"rows": (cz * n, far, cz, 1), "keys": (cz * n, cz, far, 1), "items": (far, cz * n, cz, 1)}
    answer = {}
    out, pair, lse = _launch.ipa_triton(q, k, v, z, *rest)
    near = (out, pair, *_launch.ipa_triton_backward(out, pair, q, k, v, z, *rest, out, pair, lse))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        # It would copy all of the memory onto itself.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *ignored: None)
        for name, stride in strides.items():
            if name not in asked["axes"]:
                continue
            reach = sum((size - 1) * step for size, step in zip(z.shape, stride, strict=True)) + 1
            far = torch.empty(reach, dtype=z.dtype).as_strided(z.shape, stride)
            far.copy_(z)
            out, pair, lse = _launch.ipa_triton(q, k, v, far, *rest)
            found = (out, pair, *_launch.ipa_triton_backward(out, pair, q, k, v, far, *rest, out, pair, lse))
            answer[name] = all(torch.equal(a, b) for a, b in zip(near, found, strict=True))
            del far
    return answer


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = globals()[asked["ask"]](asked)
    return found


if __name__ == "__main__":
    poison_memory()
    allow_the_cpu([OPERATION])
    answer_questions(answer)
