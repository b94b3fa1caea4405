"""How much faster than Boltz's unchunked formulas, on this machine's CPU: the triangle operations and pair bias.

    python -m benchmarks.studies.triangle_cpu                       the whole table (some minutes)
    python -m benchmarks.studies.triangle_cpu --quick      every row at N=48, three pairs: does it run, is it right
    python -m benchmarks.studies.triangle_cpu --rows 'triangle_*' --glibc default
    python -m benchmarks.studies.triangle_cpu --rows 'triangle_attention_*' --against chunks

Run from the repository's root. Both sides have the same weights, at Boltz's widths (pairs 128, 4 heads of 32; residues
384, 16 heads). `--against chunks` runs the baseline's triangle attention a few rows at a time, the way Boltz does where
memory is short. Each row runs in a fresh process: first the check, on chains with masked residues, against `reference`
in float64; then the times; memory in two processes more. Rows go to benchmarks/studies/results/triangle_cpu.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import original_triangle, side_by_side
from .multiflow_cpu import draw_weights

C_S, C_Z, HEADS, SINGLE_HEADS = 384, 128, 4, 16
CHUNK = 16  # rows: the size at which Boltz's own chunking was fastest on a CPU
TINY_LENGTH, QUICK_LENGTH = 16, 48
CHECKED_LENGTH = {"forward": 256, "step": 64}  # gradients in float64 are slow
MASKED_FRACTION = 0.1
#: The error rule: twice what the baseline's float32 makes, and a millionth of the largest value.
FACTOR, FLOOR = 2.0, 1e-6

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a row measures.

    Attributes:
        component: A key of `COMPONENTS`.
        mode: `forward` without gradients, or `step`: forward and backward, to the inputs and every weight.
        length: Residues; batch size is 1.
        against: `whole`, or `chunks` of rows (triangle attention's forward pass only).
        threads: PyTorch's intra-op threads.
        precision: What our kernels may round to.
    """

    component: str
    mode: str
    length: int
    against: str = "whole"
    threads: int = 1
    precision: str = "float32"

    @property
    def name(self) -> str:
        """`component_mode_length`."""
        return f"{self.component}_{self.mode}_{self.length}"


COMPONENTS = (
    "triangle_attention_starting",
    "triangle_attention_ending",
    "triangle_multiplication_outgoing",
    "triangle_multiplication_incoming",
    "attention_pair_bias",
    "pairformer_layer",
)
ROWS = (
    *(Task(component, mode, 256) for component in COMPONENTS for mode in ("forward", "step")),
    Task("pairformer_layer", "forward", 512),
)


def build(component: str) -> nn.Module:
    """Our module, which also holds the weights of the baseline."""
    from foldkernels.modules import attention_pair_bias, pairformer, triangle_attention, triangle_multiplication

    makers: Mapping[str, Callable[[], nn.Module]] = {
        "triangle_attention_starting": lambda: triangle_attention.TriangleAttentionStartingNode(C_Z, 32, HEADS),
        "triangle_attention_ending": lambda: triangle_attention.TriangleAttentionEndingNode(C_Z, 32, HEADS),
        "triangle_multiplication_outgoing": lambda: triangle_multiplication.TriangleMultiplicationOutgoing(C_Z),
        "triangle_multiplication_incoming": lambda: triangle_multiplication.TriangleMultiplicationIncoming(C_Z),
        "attention_pair_bias": lambda: attention_pair_bias.AttentionPairBias(C_S, C_Z, SINGLE_HEADS),
        "pairformer_layer": lambda: pairformer.PairformerLayer(C_S, C_Z, SINGLE_HEADS, 0.0, v2=True),
    }
    module = makers[component]()
    draw_weights(module)
    return module


def bound(task: Task) -> nn.Module:
    """Our module, with its kernels chosen."""
    from foldkernels.kernels.registry.binding import bind

    module = build(task.component).train(task.mode == "step")
    bind(module, {"preset": "torch", "fallback": "error", "precision": task.precision})
    return module


def draw(length: int, masked: int = 0) -> Inputs:
    """Representations, and a mask that leaves out the last residues."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1, length)
    mask[:, length - masked :] = 0
    return {
        "s": torch.randn(1, length, C_S, generator=generator),
        "z": torch.randn(1, length, length, C_Z, generator=generator),
        "mask": mask,
        "pair_mask": mask[:, :, None] * mask[:, None],
    }


def ours(component: str, module: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """Our side's call."""
    if component == "attention_pair_bias":
        return {"s": module(x["s"], x["z"], x["mask"], x["s"])}
    if component == "pairformer_layer":
        s, z = module(x["s"], x["z"], x["mask"], x["pair_mask"])
        return {"s": s, "z": z}
    return {"z": module(x["z"], x["pair_mask"])}


def theirs(component: str, w: Mapping[str, Tensor], x: Inputs, chunk: int | None = None) -> dict[str, Tensor]:
    """The baseline's call, with the weights by name."""
    kind, _, way = component.rpartition("_")
    if kind == "triangle_attention":
        z = original_triangle.triangle_attention(x["z"], x["pair_mask"], w, ending=way == "ending", chunk=chunk)
        return {"z": z}
    if kind == "triangle_multiplication":
        return {"z": original_triangle.triangle_multiplication(x["z"], x["pair_mask"], w, incoming=way == "incoming")}
    if component == "attention_pair_bias":
        s = original_triangle.attention_pair_bias(x["s"], x["z"], x["mask"], w, heads=SINGLE_HEADS)
        return {"s": s}
    s, z = original_triangle.pairformer_layer(x["s"], x["z"], x["mask"], x["pair_mask"], w, heads=SINGLE_HEADS)
    return {"s": s, "z": z}


def caller(task: Task, module: nn.Module, ours_: bool) -> Callable[[Inputs], dict[str, Tensor]]:
    """One side's call on inputs; the baseline reads the module's own parameters."""
    if ours_:
        return lambda x: ours(task.component, module, x)
    weights = dict(module.named_parameters())
    chunk = CHUNK if task.against == "chunks" else None
    return lambda x: theirs(task.component, weights, x, chunk)


def runner(task: Task, ours_: bool) -> Callable[[], object]:
    """What is timed."""
    module = bound(task)
    call, x = caller(task, module, ours_), draw(task.length)
    cotangents = {name: torch.randn(x[name].shape, generator=torch.Generator().manual_seed(1)) for name in ("s", "z")}

    def forward() -> object:
        with torch.no_grad():
            return call(x)

    def step() -> object:
        module.zero_grad(set_to_none=True)
        given = {**x, "s": x["s"].detach().requires_grad_(), "z": x["z"].detach().requires_grad_()}
        out = call(given)
        torch.autograd.backward(list(out.values()), [cotangents[name] for name in out])
        return given["s"].grad, given["z"].grad

    return step if task.mode == "step" else forward


def results(module: nn.Module, call: Callable[[Inputs], dict[str, Tensor]], x: Inputs, step: bool) -> dict[str, Tensor]:
    """Outputs on residues and pairs that are there, and all gradients of a sum of those."""
    there = {"s": x["mask"] > 0.5, "z": x["pair_mask"] > 0.5}
    if not step:
        with torch.no_grad():
            return {name: value[there[name]] for name, value in call(x).items()}
    given = {**x, "s": x["s"].detach().requires_grad_(), "z": x["z"].detach().requires_grad_()}
    module.zero_grad(set_to_none=True)
    out = {name: value[there[name]] for name, value in call(given).items()}
    generator = torch.Generator().manual_seed(2)
    shares = [(value * torch.randn(value.shape, generator=generator).to(value)).sum() for value in out.values()]
    torch.stack(shares).sum().backward()
    grads = {f"grad {name}": given[name].grad for name in ("s", "z")}
    grads |= {f"grad {name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach() for name, value in (out | grads).items() if value is not None}


def check(task: Task) -> tuple[bool, str]:
    """Whether ours is as near to float64 as the error rule wants, and the worst tensor in words."""
    length = min(task.length, CHECKED_LENGTH[task.mode])
    step, x = task.mode == "step", draw(length, masked=max(1, int(MASKED_FRACTION * length)))
    module = bound(task)
    mine = results(module, caller(task, module, True), x, step)
    plain = results(module, caller(task, module, False), x, step)
    module.double()
    truth = results(module, caller(task, module, False), {name: value.double() for name, value in x.items()}, step)
    worst, words = -1.0, "nothing was compared"
    largest = max((float(value.abs().max()) for name, value in truth.items() if name.startswith("grad")), default=0.0)
    for name, exact in truth.items():
        scale = max(float(exact.abs().max()), 1e-3 * largest if name.startswith("grad") else 0.0)
        error, of_plain = (float((side[name].double() - exact).abs().max()) for side in (mine, plain))
        share = error / (FACTOR * of_plain + FLOOR * scale)
        if not share <= worst:  # also takes NaN
            worst, words = share, f"{name}: {error:.1e} (plain PyTorch {of_plain:.1e}) of {scale:.1e}, N={length}"
        if share != share:
            break
    return worst <= 1.0 and mine.keys() >= truth.keys(), words


def measure_row(task: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Check, then time. Runs in a fresh process; the parts of a `Row`."""
    return side_by_side.check_and_time(Task(**task), pairs, check, runner, TINY_LENGTH)


def prepare_memory(task: Mapping[str, Any], ours: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up on a tiny chain, and the call whose memory is measured. Runs in a fresh process."""
    return side_by_side.warm_up_and_call(Task(**task), ours, runner, TINY_LENGTH)


def select(options: argparse.Namespace) -> list[Task]:
    """The tasks that the command line asks for."""
    chosen: dict[Task, None] = {}
    for task in ROWS:
        this = replace(task, length=QUICK_LENGTH) if options.quick else task
        if side_by_side.wanted(options.rows, task.name, this.name):
            chosen[replace(this, against=options.against, threads=options.threads)] = None
    return list(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table: 0, or 1 when a row is red, or 2 when no row matches."""
    parser = side_by_side.arguments(
        "python -m benchmarks.studies.triangle_cpu",
        "Compare foldkernels with Boltz's order of operations: same weights, checked first.",
        [task.name for task in ROWS],
        "triangle_cpu.json",
    )
    parser.add_argument("--against", choices=("whole", "chunks"), default="whole", help="the baseline's own chunking")
    options = parser.parse_args(argv)
    return side_by_side.run(
        options,
        select(options),
        measure_row,
        prepare_memory,
        lambda task: f"original formulas, {task.against}",
        "foldkernels against Boltz's order of operations",
    )


if __name__ == "__main__":
    sys.exit(main())
