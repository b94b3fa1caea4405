"""`make demo`: samples two small proteins on the `flash` kernels, then times the published size against the original.

    python examples/demo.py                       two minutes or so on two cores
    python examples/demo.py --lengths 128         times one length only
    python examples/demo.py --no-timing           samples only

The checkpoint is examples/small_multiflow: Multiflow's architecture at a twelfth of its size, trained on four proteins
for an hour of one CPU core. It has memorised what stretches of a chain look like, and designs nothing: for that, use
the published weights (`foldkernels sample weights/ --length 100 --out out/`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "small_multiflow"
LENGTH = 48  # the length that it was trained on
BOND, TOLERANCE = 3.8, 0.4  # Angstrom, between the CA atoms of neighbours


@dataclass(frozen=True)
class Speed:
    """The whole model's forward pass at one length, ours against the original's order of operations.

    Attributes:
        length: Residues.
        original_ms: Median time of the original formulas.
        ours_ms: Median time of foldkernels.
        ratio: How many times faster, and the 95% interval of that.
        low: See `ratio`.
        high: See `ratio`.
        threads: PyTorch's threads, on both sides.
    """

    length: int
    original_ms: float
    ours_ms: float
    ratio: float
    low: float
    high: float
    threads: int


def sample(out: Path, length: int, num: int, timesteps: int, device: str) -> tuple[list[Path], list[str]]:
    """Sample with the small checkpoint; gives the PDB files and the kernels that ran."""
    from foldkernels import record_kernels
    from foldkernels.compat import multiflow

    model = multiflow.load(CHECKPOINT, kernel="flash", device=device)
    with record_kernels() as ran:
        done = multiflow.run_sampling(
            model,
            model.config.interpolant,
            out,
            lengths=[length],
            num=num,
            batch_size=num,
            num_timesteps=timesteps,
            overwrite=True,
            kernels=lambda: list(dict.fromkeys(ran)),
        )
    return [out / record.folder / "sample.pdb" for record in done.samples], list(dict.fromkeys(ran))


def bonded(pdb: Path) -> float:
    """The part of neighbouring residues whose CA atoms are as far apart as a peptide bond has them."""
    from foldkernels.compat.multiflow.structures.reading import read_structure

    positions = read_structure(pdb).trans
    apart = (positions[1:] - positions[:-1]).norm(dim=-1)
    return float(((apart - BOND).abs() < TOLERANCE).float().mean())


def measure(length: int, pairs: int, threads: int) -> Speed | str:
    """Hold the published size (random weights) to float64, then time it; a string says what is wrong instead."""
    import torch

    torch.set_num_threads(threads)
    sys.path.append(str(ROOT))  # the benchmarks are no part of the package
    from benchmarks.studies.multiflow_cpu import Task, check, runner
    from benchmarks.studies.rows import compare

    task = Task("model", "forward", length, threads=threads)
    correct, words = check(task)
    if not correct:
        return f"L={length}: not timed, because it is not right: {words}"
    timed = compare(runner(task, False), runner(task, True), pairs)
    return Speed(length, timed.a_ms, timed.b_ms, timed.ratio, timed.low, timed.high, threads)


def draw(pdbs: Sequence[Path], speeds: Sequence[Speed], picture: Path) -> None:
    """Draw each sample's CA trace and distance map, and the times as bars."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on machines without a display, too
    import torch
    from matplotlib import pyplot

    from foldkernels.compat.multiflow.structures.reading import read_structure

    rows, columns = len(pdbs), 3 if speeds else 2
    figure = pyplot.figure(figsize=(4.2 * columns, 3.8 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for row, path in enumerate(pdbs):
        positions = read_structure(path).trans
        _trace(figure.add_subplot(grid[row, 0], projection="3d"), positions, f"sample {row}: CA trace")
        axes = figure.add_subplot(grid[row, 1])
        image = axes.imshow(torch.cdist(positions, positions).numpy(), cmap="viridis_r", origin="lower")
        axes.set(title=f"sample {row}: CA distances", xlabel="residue", ylabel="residue")
        figure.colorbar(image, ax=axes, label="Angstrom", shrink=0.85)
    if speeds:
        _bars(figure.add_subplot(grid[:, 2]), speeds)
    figure.suptitle("foldkernels demo: a small Multiflow model that has seen four proteins")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _trace(axes: Any, positions: Any, title: str) -> None:
    x, y, z = positions.numpy().T
    axes.plot(x, y, z, color="0.6", linewidth=1)
    axes.scatter(x, y, z, c=range(len(x)), cmap="turbo", s=14, depthshade=False)
    axes.set(title=title, xticklabels=[], yticklabels=[], zticklabels=[])
    axes.set_box_aspect((1, 1, 1))


def _bars(axes: Any, speeds: Sequence[Speed]) -> None:
    places = range(len(speeds))
    axes.bar([p - 0.2 for p in places], [s.original_ms for s in speeds], 0.4, color="0.7", label="original formulas")
    axes.bar([p + 0.2 for p in places], [s.ours_ms for s in speeds], 0.4, color="tab:blue", label="foldkernels")
    for place, speed in zip(places, speeds, strict=True):
        words = f"{speed.ratio:.1f}x\n({speed.low:.1f} to {speed.high:.1f})"
        axes.text(place + 0.2, speed.ours_ms, words, ha="center", va="bottom", fontsize=9)
    axes.set_xticks(list(places), [f"L={speed.length}" for speed in speeds])
    axes.set(title=f"published size, forward pass\n{speeds[0].threads} CPU thread(s)", ylabel="milliseconds")
    axes.margins(y=0.15)
    axes.legend(loc="upper left")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 1 if something is not right."""
    parser = argparse.ArgumentParser(description="Sample two small proteins, then time the published size.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="output folder (demo/)")
    parser.add_argument("--timesteps", type=int, default=100, help="calls of the model for a sample (100)")
    parser.add_argument("--device", default="cpu", help="where to sample (cpu)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 192], help="lengths to time (128 192)")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs to time (7)")
    # One, as in the README's table: the ratio of a machine that is busy with other things is then still a ratio.
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads while timing (1)")
    parser.add_argument("--no-timing", action="store_true", help="sample only")
    options = parser.parse_args(argv)

    print(f"1. Two samples of {LENGTH} residues, kernel: flash. A demonstration: the model has seen four proteins.")
    pdbs, kernels = sample(options.out, LENGTH, 2, options.timesteps, options.device)
    for path in pdbs:
        print(f"   written: {path} ({bonded(path):.0%} of its CA atoms {BOND} +- {TOLERANCE} A from the next)")
    print(*("   kernels that ran:", *kernels), sep="\n     ")

    speeds: list[Speed] = []
    failed = False
    if not options.no_timing:
        print("2. The published size (random weights) against the original's order of operations, on this CPU.")
        for length in options.lengths:
            print(f"   L={length}: held to float64, then {options.pairs} interleaved pairs ...", flush=True)
            speed = measure(length, options.pairs, options.threads)
            if isinstance(speed, str):
                print(f"   {speed}")
                failed = True
                continue
            speeds.append(speed)
            print(
                f"   L={length}: {speed.original_ms:,.0f} ms -> {speed.ours_ms:,.0f} ms, {speed.ratio:.2f}x faster "
                f"(95% interval {speed.low:.2f} to {speed.high:.2f}), {speed.threads} thread(s)"
            )

    picture = options.out / "demo.png"
    try:
        draw(pdbs, speeds, picture)
        print(f"picture: {picture}")
    except ImportError as error:
        print(f"no picture: {error} (fix: pip install '.[plots]')")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
