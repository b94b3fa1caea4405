"""Runs the Triton attention in Triton's interpreter, on a CPU, and says how wrong it is. Started as a script.

The interpreter is chosen when Triton is imported, so that it needs a process of its own. Reads one JSON object a line,
a case; answers with one JSON object a line: for each output and gradient its error, what the error may be, and the
error of plain PyTorch; or `raised`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldkernels.kernels.attention_pair_bias import PairProjection
from foldkernels.kernels.attention_pair_bias import reference as sequence_reference
from foldkernels.kernels.attention_pair_bias import triton as sequence
from foldkernels.kernels.biased_attention import _launch
from foldkernels.kernels.testing.rounded_operators import plain_pytorch
from foldkernels.kernels.triangle_attention import reference as triangle_reference
from foldkernels.kernels.triangle_attention import triton as triangle

from .interpreted import FLOOR, answer_questions, poison_memory, second_derivative

Values = dict[str, Tensor | None]


def mask_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Different in every row; every fourth row has no key at all, another every fourth all of them."""
    mask = torch.rand(shape, generator=generator) < 0.6
    rows = mask.view(-1, shape[-1])
    rows[1::4], rows[2::4] = False, True
    return mask


def inputs(case: dict[str, Any]) -> Values:
    """Draws in float64, rounded to the case's type."""
    g = torch.Generator().manual_seed(case["n"])
    b, h, r, n, m, d = (case[name] for name in ("b", "h", "r", "n", "m", "d"))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=g)

    if case["operation"] == "triangle_attention":
        x: Values = {"q": normal(b, h, r, n, d, scale=1.5)}
        x |= {name: normal(b, h, r, m, d, scale=1.5) for name in "kv"}
        x |= {"bias": normal(b, h, n, m), "d_out": normal(b, h, r, n, d)}
        mask = mask_of((b, r, m), g)
    else:
        s = b * r
        x = {"q": normal(s, n, h, d, scale=1.5)}
        x |= {name: normal(s, m, h, d, scale=1.5) for name in "kv"}
        x |= {"bias": normal(b, h, n, m)} if case["given"] else {"z": normal(b, n, m, 13), "weight": normal(h, 13)}
        x |= {"d_out": normal(s, n, h, d)}
        mask = mask_of((s, m), g)
    dtype = getattr(torch, case["dtype"])
    x = {name: value.to(dtype) for name, value in x.items() if value is not None}
    return {**x, "mask": mask if case["masked"] else None}


def stored(value: Tensor, layout: str) -> Tensor:
    """The same values, otherwise laid out in memory."""
    if layout == "transposed":  # as the ending node's: rows and their entries swapped
        return value.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "spread":
        return torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
    if layout == "expanded":
        return value[:1].expand(value.shape)
    return value


def run(case: dict[str, Any], x: Values, function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient."""
    leaves: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    for name, value in x.items():
        if value is not None and value.is_floating_point():
            leaves[name] = stored(value.to(dtype), case["layout"]).detach()
            held[name] = leaves[name].requires_grad_(name != "d_out")
    wanted = [name for name in leaves if name != "d_out"]
    if case["operation"] == "triangle_attention":
        bias = held["bias"].float() if case["wide_bias"] and dtype is not torch.float64 else held["bias"]
        out = function(held["q"], held["k"], held["v"], bias, x["mask"])
    else:
        projection = None if case["given"] else PairProjection(None, None, held["weight"])
        pairs = held["bias"] if case["given"] else held["z"]
        out = function(held["q"], held["k"], held["v"], pairs, x["mask"], projection)
    gradients = torch.autograd.grad(out, [held[name] for name in wanted], held["d_out"].to(out.dtype))
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(wanted, gradients, strict=True)}}


def planted(case: dict[str, Any], x: Values) -> Values:
    """The mistakes that the comparison must see."""
    fault, x = case["fault"], dict(x)
    if fault == "flipped mask":
        x["mask"] = ~x["mask"]
    elif fault == "transposed bias":
        x["bias"] = x["bias"].transpose(-1, -2)
    elif fault == "lost scale":
        x["q"] = x["q"] * case["d"] ** 0.5
    elif fault == "lost bias":
        x["bias"] = torch.zeros_like(x["bias"])
    elif fault:
        raise ValueError(fault)
    return x


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Compare with the definition in float64."""
    kernel, reference = {
        "triangle_attention": (triangle, triangle_reference),
        "attention_pair_bias": (sequence, sequence_reference),
    }[case["operation"]]
    dtype = getattr(torch, case["dtype"])
    x = inputs(case)
    truth = run(case, x, reference.run, torch.float64)
    with plain_pytorch(dtype):
        plain = run(case, x, reference.run, dtype)
    got = run(case, planted(case, x), kernel.load(), dtype)
    again = run(case, planted(case, x), kernel.load(), dtype) if case.get("twice") else got
    answer: dict[str, Any] = {}
    # A gradient that is nothing but rounding (of q, where there is one key) is measured by what cancelled in it.
    all_gradients = max(float(true.abs().max()) for name, true in truth.items() if name != "out")
    for name, true in truth.items():
        error = (got[name].double() - true).abs().max().item()
        of_plain = (plain[name].double() - true).abs().max().item()
        largest = true.abs().max().item()
        largest = all_gradients if name != "out" and largest < 1e-9 * all_gradients else largest
        may_be = 2 * of_plain + FLOOR[dtype] * largest
        answer[name] = {
            "error": error,
            "may_be": may_be,
            "of_plain": of_plain,
            "dtype": str(got[name].dtype),
            "same": torch.equal(got[name], again[name]),
        }
    if x["mask"] is not None and not case["fault"]:
        empty = ~x["mask"].any(-1)
        if case["operation"] == "triangle_attention":
            answer["of_empty_rows"] = [got[n].transpose(1, 2)[empty].abs().sum().item() for n in ("out", "d_q")]
        else:
            answer["of_empty_rows"] = [got[n][empty].abs().sum().item() for n in ("out", "d_q")]
    return answer


def check_operators(case: dict[str, Any]) -> dict[str, Any]:
    """Run PyTorch's own checks of a custom operator, and ask for a second derivative."""
    from foldkernels.kernels.triangle_attention._launch import triangle_attention_triton as operator

    x = inputs(case)
    leaves = [stored(x[name], case["layout"]).detach().requires_grad_() for name in ("q", "k", "v", "bias")]
    found = torch.library.opcheck(operator, (*leaves, x["mask"]))
    out, lse = operator(*leaves, x["mask"])
    twice = second_derivative(out.square().sum(), leaves[0])
    return {"opcheck": found, "twice": twice, "lse_differentiable": lse.requires_grad}


def answer(case: dict[str, Any]) -> dict[str, Any]:
    _launch._PROGRAMS = case["programs"]
    return check_operators(case) if case.get("operators") else measure(case)


if __name__ == "__main__":
    poison_memory()
    answer_questions(answer)
