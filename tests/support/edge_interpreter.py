"""Runs the Triton edge transition in Triton's interpreter, on a CPU, and says how wrong it is. Started as a script.

As `triton_interpreter.py`: one JSON object a line in, a case; one a line out, the errors by name, or `raised`.
"""

from typing import Any

import torch
from torch import Tensor

from foldkernels.kernels.common import blocking
from foldkernels.kernels.edge_transition import _launch, _rows, _tiles, reference, triton
from foldkernels.kernels.testing.rounded_operators import plain_pytorch

from .interpreted import FLOOR, answer_questions, poison_memory, second_derivative

#: Gradients that come back through a ReLU: of a value close to zero, 16 bits may see the other side, which moves single
#: entries by all that passed there. Their norm is judged instead, as for PyTorch's own 16-bit products.
BEHIND_RELU = frozenset(f"d_{name}" for name in ("nodes", "z", "weight_1", "bias_1", "weight_2", "bias_2"))
FLIPPED = 0.15

Values = dict[str, Tensor]
#: How each name's layout may differ: those of pairs.
PAIRS = ("z", "d_out")


def inputs(case: dict[str, Any]) -> Values:
    """Draws in float64, rounded to the case's type; weights are nowhere near zero."""
    g = torch.Generator().manual_seed(case["n"])
    b, n, cn, cz, cz_out = (case[name] for name in ("b", "n", "cn", "cz", "cz_out"))
    hidden = cz + 2 * cn

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64, generator=g)
        return scale * (x + 0.2 * x.sign())

    x = {
        "nodes": normal(b, n, cn),
        "z": normal(b, n, n, cz),
        "weight_1": normal(hidden, hidden, scale=hidden**-0.5),
        "bias_1": normal(hidden, scale=0.5),
        "weight_2": normal(hidden, hidden, scale=hidden**-0.5),
        "bias_2": normal(hidden, scale=0.5),
        "weight_out": normal(cz_out, hidden, scale=hidden**-0.5),
        "bias_out": normal(cz_out, scale=0.5),
        "norm_weight": normal(cz_out),
        "norm_bias": normal(cz_out),
        "d_out": normal(b, n, n, cz_out),
    }
    x = {name: value.to(getattr(torch, case["dtype"])) for name, value in x.items()}
    if case["masked"]:
        mask = torch.rand(b, n, generator=g) < 0.6
        mask[:, n // 2] = True
        mask[1:2] = False
        x["mask"] = mask
    return x


def stored(value: Tensor, layout: str) -> Tensor:
    """The same values, otherwise laid out in memory."""
    if layout == "transposed":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "spread":
        return torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0]
    if layout == "expanded":
        return value[:, :1].expand(value.shape)
    return value


def run(case: dict[str, Any], x: Values, function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient."""
    held: Values = {}
    for name, value in x.items():
        if value.is_floating_point():
            held[name] = stored(value.to(dtype), case["layout"] if name in PAIRS else "plain").detach()
    leaves = [value.requires_grad_() for name, value in held.items() if name != "d_out"]
    given = [value for name, value in held.items() if name != "d_out"]
    out = function(*given, x.get("mask"), 1e-3)
    gradients = torch.autograd.grad(out, leaves, held["d_out"].to(out.dtype))
    names = (f"d_{name}" for name in held if name != "d_out")
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def planted(case: dict[str, Any], x: Values) -> Values:
    """The mistakes that the comparison must see."""
    fault, x = case["fault"], dict(x)
    if fault == "flipped mask":
        x["mask"] = ~x["mask"]
    elif fault == "residues exchanged":  # i's share for j's
        cz, cn = case["cz"], case["cn"]
        for name in ("weight_1", "weight_out"):
            z, i, j = x[name].split([cz, cn, cn], 1)
            x[name] = torch.cat([z, j, i], 1)
    elif fault == "lost skip":
        x["weight_out"] = x["weight_out"].clone()
        x["weight_out"][:, : case["cz"]] = 0.0
    elif fault == "other norm":
        x["norm_weight"] = x["norm_weight"].roll(1)
    elif fault:
        raise ValueError(fault)
    return x


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Compare with the definition in float64."""
    dtype = getattr(torch, case["dtype"])
    x = inputs(case)
    truth = run(case, x, reference.run, torch.float64)
    with plain_pytorch(dtype):
        plain = run(case, x, reference.run, dtype)
    got = run(case, planted(case, x), triton.load(), dtype)
    again = run(case, x, triton.load(), dtype) if case.get("twice") else got
    answer: dict[str, Any] = {}
    for name, true in truth.items():
        error = (got[name].double() - true).abs().max().item()
        of_plain = (plain[name].double() - true).abs().max().item()
        may_be = 2 * of_plain + FLOOR[dtype] * true.abs().max().item()
        if dtype is not torch.float32 and name in BEHIND_RELU and not error <= may_be:
            error, may_be = ((got[name].double() - true).norm() / true.norm()).item(), FLIPPED
        answer[name] = {
            "error": error,
            "may_be": may_be,
            "of_plain": of_plain,
            "dtype": str(got[name].dtype),
            "same": torch.equal(got[name], again[name]),
        }
    if case["masked"] and not case["fault"]:
        gone = ~(x["mask"][:, :, None] & x["mask"][:, None])
        answer["of_empty_rows"] = [got[name][gone].abs().sum().item() for name in ("out", "d_z")]
    return answer


def check_operators(case: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's own checks of the custom operator, and a second derivative that must be refused."""
    x = inputs(case)
    weights = [value for name, value in x.items() if name not in ("nodes", "z", "d_out", "mask")]
    leaves = [x["z"].requires_grad_(), *(p.detach().requires_grad_() for p in
              _rows.split_exactly(x["nodes"], case["cz"], *weights))]  # fmt: skip
    operator = _launch.edge_transition_triton
    found = torch.library.opcheck(operator, (leaves[0], leaves[1:], x.get("mask"), 1e-3))
    out = operator(leaves[0], leaves[1:], x.get("mask"), 1e-3)
    return {"opcheck": found, "twice": second_derivative(out.square().sum(), leaves[0])}


def count_loads(case: dict[str, Any]) -> dict[str, Any]:
    """How many numbers of z a forward pass loads, by counting what the interpreter reads from z's memory."""
    import numpy
    from triton.runtime import interpreter

    x = inputs(case)
    load = interpreter.interpreter_builder.create_masked_load
    start, end = x["z"].data_ptr(), x["z"].data_ptr() + x["z"].nbytes
    counted = [0]

    def counting(pointers: Any, mask: Any, *rest: Any) -> Any:
        inside = (pointers.data >= start) & (pointers.data < end) & numpy.asarray(mask.data, bool)
        counted[0] += int(inside.sum())
        return load(pointers, mask, *rest)

    interpreter.interpreter_builder.create_masked_load = counting
    try:
        triton.load()(*(value for name, value in x.items() if name not in ("d_out", "mask")), x.get("mask"))
    finally:
        interpreter.interpreter_builder.create_masked_load = load
    return {"loaded": counted[0], "numbers": x["z"].numel()}


TILES = dict(_tiles.TILES)


def answer(case: dict[str, Any]) -> dict[str, Any]:
    _tiles.TILES = TILES
    if case["tile"]:  # a small one: several tiles a row, several blocks of columns
        _tiles.TILES = dict.fromkeys(TILES, (_tiles.Tile(*case["tile"]),) * 3)
    _tiles.PART = case["part"]
    blocking._PAIRS_PER_THREAD = dict.fromkeys((torch.float64, torch.float32), case["pairs"])
    blocking._PAIRS_PER_THREAD_16_BIT = case["pairs"]
    do = {"operators": check_operators, "loads": count_loads}.get(case["what"], measure)
    return do(case)


if __name__ == "__main__":
    poison_memory()
    answer_questions(answer)
