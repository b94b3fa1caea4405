"""FlashIPA's attention on this machine's CPU: against its own order of operations, and how memory grows with length.

    python -m benchmarks.studies.flash_ipa_cpu                       times and memory at L=512 and 2,048 (some minutes)
    python -m benchmarks.studies.flash_ipa_cpu --quick      every row at L=128, three pairs: does it run, is it right
    python -m benchmarks.studies.flash_ipa_cpu --growth growth.json  memory of ours, L=512 to 8,192
    python -m benchmarks.studies.flash_ipa_cpu --growth growth.json --plot growth.png

Run from the repository's root. The operation alone, of the published size (8 heads of 128, 8 query and 12 value points,
rank 2, c_z 128), one item, float32, on random inputs. Each row runs in a fresh process: first the check against
float64, then the times; memory in processes more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldkernels.benchmarks.measure.statistics import power_law

from . import side_by_side
from .original_flash_ipa import lifted_attention
from .rows import extra_peak_memory, machine

PUBLISHED = {"h": 8, "c": 128, "p": 8, "pv": 12, "r": 2, "cp": 32}
CHECK_LENGTH, QUICK_LENGTH, TINY_LENGTH = 256, 128, 16
LENGTHS = (512, 1024, 2048, 4096, 8192)
MODES = ("forward", "step")

#: What an error may be beyond twice the baseline's, as a part of a tensor's largest value.
FLOOR = 1e-6


@dataclass(frozen=True)
class Task:
    """What a row measures.

    Attributes:
        mode: "forward", or "step" for forward and backward.
        length: Residues.
        precision: What our side may round to.
        threads: PyTorch's.
    """

    mode: str
    length: int
    precision: str = "float32"
    threads: int = 1

    @property
    def name(self) -> str:
        """`attention_<mode>_<length>`."""
        return f"attention_{self.mode}_{self.length}"


ROWS = [Task(mode, length) for mode in MODES for length in (512, 2048)]


def draw_inputs(length: int, grad: bool) -> list[Any]:
    """The operation's arguments: nodes as after a LayerNorm, points half a nanometre around a compact chain."""
    g = torch.Generator().manual_seed(0)
    h, c, p, pv, r, cp = PUBLISHED.values()

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(1, length, *shape, generator=g)).requires_grad_(grad)

    places = 0.22 * length**0.38 * torch.randn(1, length, 1, 1, 3, generator=g)
    scalars = [normal(h, c) for _ in range(3)]
    points = [(normal(h, n, 3, scale=0.5).detach() + places).requires_grad_(grad) for n in (p, p, pv)]
    weights = (torch.rand(h, generator=g) + 0.5).requires_grad_(grad)
    return [*scalars, *points, weights, (normal(h, r), normal(h, r)), (normal(r, cp), normal(r, cp))]


def leaves(inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors among the arguments."""
    return [x for value in inputs for x in (value if isinstance(value, tuple) else (value,))]


def ours(*inputs: Any) -> tuple[Tensor, ...]:
    """Our operation, as a user calls it."""
    from foldkernels.kernels.factorized_point_attention import factorized_point_attention

    return tuple(x for x in factorized_point_attention(*inputs) if x is not None)


def results(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Any], grad: bool) -> list[Tensor]:
    """Outputs, and after a step every gradient."""
    with torch.set_grad_enabled(grad):
        out = function(*inputs)
        if not grad:
            return list(out)
        return [*(x.detach() for x in out), *torch.autograd.grad([x.square().sum() for x in out], leaves(inputs))]


def runner(task: Task, our_side: bool) -> Callable[[], object]:
    """The call that is measured."""
    grad = task.mode == "step"
    inputs = draw_inputs(task.length, grad)
    function = ours if our_side else lifted_attention
    return lambda: results(function, inputs, grad)


def check(task: Task) -> tuple[bool, str]:
    """Both sides against the definition in float64; our error may be twice the baseline's, plus `FLOOR`."""
    from foldkernels.kernels.factorized_point_attention import reference

    grad = task.mode == "step"
    inputs = draw_inputs(min(task.length, CHECK_LENGTH), grad)
    double = [
        tuple(y.detach().double().requires_grad_(grad) for y in x)
        if isinstance(x, tuple)
        else x.detach().double().requires_grad_(grad)
        for x in inputs
    ]

    def definition(*given: Any) -> tuple[Tensor, ...]:
        return tuple(x for x in reference.run(*given, None, True, torch.float64) if x is not None)

    truth = results(definition, double, grad)
    worst = 0.0
    for true, theirs, got in zip(
        truth, results(lifted_attention, inputs, grad), results(ours, inputs, grad), strict=True
    ):
        errors = [float((x.double() - true).abs().max()) for x in (theirs, got)]
        worst = max(worst, errors[1] / (2 * errors[0] + FLOOR * float(true.abs().max())))
    return worst <= 1.0, f"error at most {worst:.2g} of what it may be, L={min(task.length, CHECK_LENGTH)}"


def measure_row(task: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Check, then time. Runs in a fresh process; the parts of a `Row`."""
    return side_by_side.check_and_time(Task(**task), pairs, check, runner, TINY_LENGTH)


def prepare_memory(task: Mapping[str, Any], ours: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up on a tiny chain, and the call whose memory is measured. Runs in a fresh process."""
    return side_by_side.warm_up_and_call(Task(**task), ours, runner, TINY_LENGTH)


# Growth ---------------------------------------------------------------------------------------------------------------


def grow(path: Path, lengths: Sequence[int] = LENGTHS) -> None:
    """Measure our extra peak memory at each length, and write and print it with its exponents."""
    found: dict[str, Any] = {"lengths": list(lengths), "machine": asdict(machine())}
    for mode in MODES:
        memory = [extra_peak_memory(prepare_memory, asdict(Task(mode, length)), True) for length in lengths]
        fit = power_law(lengths, memory)
        assert fit is not None, "two lengths at least"
        found[mode] = {"extra_mb": memory, "exponent": fit.exponent}
        row = ", ".join(f"{length}: {m:,.1f} MB" for length, m in zip(lengths, memory, strict=True))
        print(f"{mode}: {row}; exponent {found[mode]['exponent']:.3f}")
    path.write_text(json.dumps(found, indent=1) + "\n")


def plot(measured: Path, picture: Path) -> None:
    """Draw what `grow` wrote, both axes logarithmic, beside a line that grows with the length's square."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads(measured.read_text())
    lengths = found["lengths"]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for mode, words in (("forward", "forward"), ("step", "forward and backward")):
        label = f"{words}: L to the power {found[mode]['exponent']:.2f}"
        axes.loglog(lengths, found[mode]["extra_mb"], "o-", label=label)
    start = found["forward"]["extra_mb"][0]
    square = [start * (length / lengths[0]) ** 2 for length in lengths]
    axes.loglog(lengths, square, ":", color="gray", label="L squared, for comparison")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="residues L", ylabel="extra memory at the peak, MB", title="factorised point attention, `torch`")
    axes.legend()
    figure.savefig(picture, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table, or measure growth.

    Returns:
        0, or 1 when a row is red, or 2 when no row matches.
    """
    parser = side_by_side.arguments(
        "python -m benchmarks.studies.flash_ipa_cpu",
        "Compare factorised point attention with FlashIPA's order of operations: checked first.",
        [task.name for task in ROWS],
        "flash_ipa_cpu.json",
    )
    parser.add_argument("--growth", type=Path, metavar="FILE", help="measure memory by length instead, to FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --growth: draw FILE, measured if not there")
    options = parser.parse_args(argv)
    if options.plot is not None and options.growth is None:
        parser.error("--plot draws what --growth FILE holds: name both")
    if options.growth is not None:
        if options.plot is None or not options.growth.exists():
            grow(options.growth)
        if options.plot is not None:
            plot(options.growth, options.plot)
        return 0
    tasks = [
        replace(task, length=QUICK_LENGTH if options.quick else task.length, threads=options.threads)
        for task in ROWS
        if side_by_side.wanted(options.rows, task.name)
    ]
    tasks = list(dict.fromkeys(tasks))
    return side_by_side.run(
        options,
        tasks,
        measure_row,
        prepare_memory,
        lambda task: "FlashIPA's formulas, softmax held whole, float32",
        "foldkernels against FlashIPA's order of operations",
    )


if __name__ == "__main__":
    sys.exit(main())
