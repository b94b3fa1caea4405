"""Loss curves: the same under every kernel, and dense attention beside FlashIPA's factors.

    python -m benchmarks.studies.training_curves              every run that is missing in the results, then the plots
    python -m benchmarks.studies.training_curves --runs 'rank *'       some of them
    python -m benchmarks.studies.training_curves --speed               times and memory of a step, beside the dense one
    python -m benchmarks.studies.training_curves --plot                draw again what was measured

What is trained, on what, stands in `training_subjects`. A run goes to a JSON file of its own as soon as it is done, so
a command that was stopped goes on with the next, and two can share the work (`--runs`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .rows import compare, extra_peak_memory, in_fresh_process, machine
from .training_subjects import EVALUATION_BATCHES, ROOT, Run, Training

RESULTS = ROOT / "benchmarks" / "studies" / "results" / "training_curves"
SPEED = ROOT / "benchmarks" / "studies" / "results" / "training_speed_cpu.json"
FIGURES = ROOT / "docs" / "figures"
BASELINE = "reference"
RANKS = (1, 2, 4, 8)

#: Each run and its steps. Those that ask whether a kernel changes the curve need fewer than those that ask what a model
#: can learn.
RUNS: Mapping[Run, int] = {
    Run("torch"): 1200,
    Run(BASELINE, BASELINE): 600,
    Run("reference, nudged", BASELINE, nudge=1e-6): 600,
    Run("torch, bfloat16", precision="bfloat16"): 600,
    Run("reference, bfloat16", BASELINE, "bfloat16"): 600,
    **{Run(f"rank {rank}", rank=rank): 1200 for rank in RANKS},
}
SPEED_LENGTHS = (48, 128, 256)
SMOOTHING = 50


def train(run: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """One run, in a fresh process: every step's losses, and those of the batches that are kept for the end."""
    training = Training(Run(**run))
    curve = [training.step() for _ in range(steps)]
    return {
        "run": dict(run),
        "steps": steps,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "losses": {name: [round(step[name], 6) for step in curve] for name in curve[0]},
        "evaluation": training.evaluate(min(EVALUATION_BATCHES, steps)),
        "machine": asdict(machine()),
    }


def compare_steps(ours: Mapping[str, Any], baseline: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """A step of one beside a step of the other, interleaved, in a fresh process."""
    sides = Training(Run(**baseline)), Training(Run(**ours))
    return asdict(compare(sides[0].step, sides[1].step, pairs))


def prepare_memory(run: Mapping[str, Any]) -> tuple[Any, Any]:
    """A warm-up on short crops, and the step that is measured; see `measure.extra_peak_memory`."""
    warm, measured = Training(replace(Run(**run), length=16, batch=1)), Training(Run(**run))
    return warm.step, measured.step


def speed(pairs: int, output: Path, lengths: Sequence[int] = SPEED_LENGTHS) -> list[dict[str, Any]]:
    """Every model and precision beside the dense model under `reference` in float32; writes and gives the rows."""
    rows: list[dict[str, Any]] = []
    for length in lengths:
        # As many residues squared in each batch, as Multiflow's sampler has it.
        batch = max(1, 4 * 48**2 // length**2)
        base = Run(BASELINE, BASELINE, length=length, batch=batch)
        for run in RUNS:
            if run.nudge:
                continue
            ours = replace(run, length=length, batch=batch)
            time = None if ours == base else in_fresh_process(compare_steps, asdict(ours), asdict(base), pairs)
            memory = extra_peak_memory(prepare_memory, asdict(ours))
            rows.append({"run": asdict(ours), "time": time, "extra_mb": memory, "machine": asdict(machine())})
            output.write_text(json.dumps(rows, indent=1) + "\n")
            faster = f"{time['ratio']:.2f}x ({time['low']:.2f} to {time['high']:.2f})" if time else "baseline"
            print(f"L={length} batch {batch} {run.name}: {faster}, {memory:,.0f} MB", flush=True)
    return rows


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The runs that are done, by name."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {each["run"]["name"]: each for each in found}


def smooth(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Means over the last `window` values, or as many as there are."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the curves say, in lines."""
    lines = []
    for name, run in found.items():
        last = smooth(run["losses"]["train_loss"])[-1]
        kept = ", ".join(f"{loss.removesuffix('_loss')} {value:.3f}" for loss, value in run["evaluation"].items())
        lines.append(f"{name}: {run['steps']} steps, last {SMOOTHING} {last:.3f}; drawn apart: {kept}")
    pairs = (
        ("torch", BASELINE),
        ("reference, nudged", BASELINE),
        ("torch, bfloat16", "reference, bfloat16"),
        ("torch, bfloat16", "torch"),
    )
    for ours, theirs in pairs:
        if ours in found and theirs in found:
            a, b = (smooth(found[name]["losses"]["train_loss"]) for name in (ours, theirs))
            apart = max(abs(x - y) / y for x, y in zip(a, b, strict=False))
            first = max(
                abs(x - y) / y
                for x, y in list(zip(*(found[n]["losses"]["train_loss"] for n in (ours, theirs)), strict=False))[:20]
            )
            lines.append(f"{ours} beside {theirs}: curves at most {apart:.2%} apart; {first:.1e} in the first 20 steps")
    return lines


def plot(found: Mapping[str, Mapping[str, Any]], folder: Path = FIGURES) -> None:
    """Draw the kernels' curves on top of each other, and the models' beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [BASELINE, "torch", "reference, nudged", "reference, bfloat16", "torch, bfloat16"]
    models = ["torch", *(f"rank {rank}" for rank in RANKS)]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, style in zip(kernels, ("-", "--", ":", "-", "--"), strict=True):
        if name in found:
            curve = found[name]["losses"]["train_loss"][:600]
            axes[0].plot(range(1, len(curve) + 1), smooth(curve), style, label=name, linewidth=1.4)
            axes[1].plot(range(1, len(curve[:50]) + 1), curve[:50], style, label=name, linewidth=1.4)
    axes[0].set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHING} steps", title="one seed, each kernel")
    axes[1].set(xlabel="step", ylabel="training loss", title="the first 50 steps, as they are")
    for each in axes:
        each.legend()
    figure.savefig(folder / "training-kernels.png", dpi=120)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in (name for name in models if name in found):
        for each, loss in zip(axes, ("train_loss", "trans_loss"), strict=True):
            curve = smooth(found[name]["losses"][loss])
            each.plot(range(1, len(curve) + 1), curve, label="dense" if name == "torch" else name, linewidth=1.2)
    for each, loss in zip(axes, ("training loss", "translation loss"), strict=True):
        each.set(xlabel="step", ylabel=f"{loss}, mean of {SMOOTHING} steps", yscale="log")
        each.legend()
    figure.suptitle("dense attention beside FlashIPA's factors (flash_1d_bias)")
    figure.savefig(folder / "training-ranks.png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and draw.

    Returns:
        0, or 2 when no run matches.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.training_curves",
        description="Loss curves under every kernel, dense and factorised.",
        epilog="runs: " + "; ".join(run.name for run in RUNS),
    )
    parser.add_argument("--runs", nargs="+", default=["*"], metavar="PATTERN", help="shell patterns over their names")
    parser.add_argument("--steps", type=int, help="fewer steps than a run's own")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--plot", action="store_true", help="only draw what is there")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="the folder of the plots")
    parser.add_argument("--speed", type=Path, nargs="?", const=SPEED, help="time and memory of a step instead")
    parser.add_argument("--lengths", type=int, nargs="+", default=SPEED_LENGTHS, help="with --speed: crops' residues")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs (7)")
    options = parser.parse_args(argv)
    if options.speed is not None:
        speed(options.pairs, options.speed, options.lengths)
        return 0
    wanted = [run for run in RUNS if any(fnmatch.fnmatch(run.name, pattern) for pattern in options.runs)]
    if not wanted:
        print(f"no run matches {' '.join(options.runs)}; --help lists them", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    for run in () if options.plot else wanted:
        path = options.output / f"{run.name.replace(', ', '_').replace(' ', '_')}.json"
        if not path.exists():
            done = in_fresh_process(train, asdict(run), min(options.steps or RUNS[run], RUNS[run]))
            path.write_text(json.dumps(done, indent=None) + "\n")
            print(f"{run.name}: {path}", flush=True)
    found = results(options.output)
    if found:
        options.figures.mkdir(parents=True, exist_ok=True)
        plot(found, options.figures)
    print("\n".join(summary(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
