"""What one block of each type costs, beside one IPA block: time, memory, parameters, at the published widths.

    python -m benchmarks.studies.blocks                every block at L = 128, 256, 512, forward and training step
    python -m benchmarks.studies.blocks --lengths 64 --pairs 3  does it run, is it right
    python -m benchmarks.studies.blocks --device cuda --write   on a GPU; and the table into docs/choosing-blocks.md
    python -m benchmarks.studies.blocks --render                the page's table again, from the JSON

Run from the repository's root. An IPA block is Multiflow's: IPA, sequence transformer, transitions, without a backbone
update. Each row runs in a fresh process: first the check against the reference kernels in float64, on a chain with
masked residues; then block and IPA block in interleaved pairs; memory in two processes more. A row whose check is red
has no time. Rows go to benchmarks/studies/results/blocks_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .multiflow_cpu import PUBLISHED, draw_weights
from .rows import compare, extra_peak_memory, in_fresh_process, machine

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "choosing-blocks.md"
BEGIN, END = "<!-- blocks: written by benchmarks/blocks.py -->", "<!-- blocks: end -->"
BLOCKS = ("ipa", "pairformer", "pairformer_no_seq", "double_attention_pair", "attention_pair_bias")
LENGTHS = (128, 256, 512)
TINY_LENGTH, CHECKED_LENGTH = 16, 33
#: Of the largest value, in float32, on residues and pairs that take part.
TOLERANCE = 2e-5
#: Multiflow's own number of IPA blocks: the budget.
BUDGET = int(PUBLISHED["ipa"]["num_blocks"])

Mode = Literal["forward", "step"]


@dataclass(frozen=True)
class Task:
    """One row: a block, a length, forward or training step, a device, threads, and the preset of kernels."""

    block: str
    length: int
    mode: Mode
    device: str = "cpu"
    threads: int = 1
    preset: str = "auto"


def build(task: Task, block: str, preset: str) -> nn.Module:
    """One block at the published widths, with weights that are nowhere zero, bound."""
    from foldkernels.configs.options import BlocksConfig, IPABlockConfig, TrunkConfig
    from foldkernels.kernels.registry.binding import bind
    from foldkernels.modules.attention_trunk import AttentionTrunk

    sizes = {name: value for name, value in PUBLISHED["ipa"].items() if name in IPABlockConfig.model_fields}
    ipa = IPABlockConfig(**{**sizes, "transformer_dropout": PUBLISHED["transformer_dropout"]})
    trunk = AttentionTrunk(
        block,  # type: ignore[arg-type]
        PUBLISHED["node_embed_size"],
        PUBLISHED["edge_embed_size"],
        TrunkConfig(num_layers=1),
        BlocksConfig(ipa=ipa),
    )
    draw_weights(trunk)
    trunk.to(task.device).train(task.mode == "step")
    bind(trunk, {"preset": preset, "fallback": "silent"})
    return trunk


def draw(length: int, device: str, masked: int = 0) -> dict[str, Tensor]:
    """Representations, frames of a random walk in nanometres, a time, and a mask that leaves out the last residues."""
    import roma

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(1, length)
    mask[:, length - masked :] = 0
    drawn = {
        "nodes": normal(1, length, PUBLISHED["node_embed_size"]),
        "z": normal(1, length, length, PUBLISHED["edge_embed_size"]),
        "mask": mask,
        "rotmats": roma.unitquat_to_rotmat(nn.functional.normalize(normal(1, length, 4), dim=-1)),
        "trans": 0.38 * nn.functional.normalize(normal(1, length, 3), dim=-1).cumsum(1),
        "t": torch.full((1, 1), 0.4),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def call(trunk: nn.Module, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both representations, updated."""
    from foldkernels.modules.rigid import Rigid

    frames = Rigid(x["rotmats"], x["trans"])
    nodes, z = trunk(x["nodes"], x["z"], x["mask"], rigid=frames, r3_t=x["t"])
    return nodes, z


def runner(task: Task, block: str) -> Callable[[], object]:
    """What is measured: a forward pass without gradients, or one with the backward pass to inputs and weights."""
    trunk, x = build(task, block, task.preset), draw(task.length, task.device)

    def forward() -> object:
        with torch.no_grad():
            return call(trunk, x)

    def step() -> object:
        trunk.zero_grad(set_to_none=True)
        given = {**x, "nodes": x["nodes"].requires_grad_(), "z": x["z"].requires_grad_()}
        nodes, z = call(trunk, given)
        (nodes.square().mean() + z.square().mean()).backward()
        grads = x["nodes"].grad, x["z"].grad
        x["nodes"].grad = x["z"].grad = None
        return grads

    return step if task.mode == "step" else forward


def check(task: Task) -> tuple[bool, str, list[str]]:
    """The bound kernels in float32 against `reference` in float64, and which kernels those were."""
    from foldkernels.kernels.registry import record_kernels

    x = draw(CHECKED_LENGTH, task.device, masked=5)
    still = replace(task, mode="forward")
    with torch.no_grad():
        with record_kernels() as ran:
            found = call(build(still, task.block, task.preset), x)
        truth = call(
            build(still, task.block, "reference").double(), {name: value.double() for name, value in x.items()}
        )
    there = x["mask"] > 0.5
    errors = []
    for ours, exact, valid in zip(found, truth, (there, there[:, :, None] & there[:, None]), strict=True):
        errors.append(float((ours.double() - exact)[valid].abs().max() / exact[valid].abs().max()))
    words = f"error {max(errors):.1e} of the largest value, at most {TOLERANCE:.0e}"
    return max(errors) <= TOLERANCE, words, sorted({str(kernel) for kernel in ran})


def measure_row(task: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Check, then time against the IPA block. Runs in a fresh process."""
    this = Task(**task)
    torch.set_num_threads(this.threads)
    correct, words, kernels = check(this)
    timed = compare(runner(this, this.block), runner(this, "ipa"), pairs) if correct and pairs else None
    return {
        **task,
        "correct": correct,
        "check": words,
        "kernels": kernels,
        "parameters": sum(p.numel() for p in build(this, this.block, this.preset).parameters()),
        "time": asdict(timed) if timed else None,  # a is the block, b the IPA block
        "machine": asdict(machine()),
    }


def prepare_memory(task: Mapping[str, Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up on a tiny chain, and the call whose memory is measured. Runs in a fresh process."""
    this = Task(**task)
    torch.set_num_threads(this.threads)
    return runner(replace(this, length=TINY_LENGTH), this.block), runner(this, this.block)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page's tables: one block's cost, and how many of it the budget buys."""
    where = rows[0]["machine"]
    place = where["accelerator"] or f"{where['cpu']}, {where['threads']} thread(s)"
    pairs = next((row["time"]["pairs"] for row in rows if row["time"]), 0)
    lines = [
        f"{place}; torch {where['torch']}; float32. Medians of {pairs} interleaved pairs with an IPA block; memory is "
        "what the call adds at its peak.",
        "",
        "| block | L | pass | ms | of an IPA block | 95% interval | extra MB | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        timed, memory = row["time"], row["memory_mb"]
        cells = [
            f"`{row['block']}`",
            str(row["length"]),
            row["mode"],
            f"{timed['a_ms']:,.1f}" if timed else "",
            f"{timed['ratio']:.2f}" if timed else "" if row["correct"] else "**wrong**",
            f"{timed['low']:.2f} to {timed['high']:.2f}" if timed else "",
            f"{memory:,.0f}" if memory is not None else "",
            f"{row['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Blocks that take the time of Multiflow's {BUDGET} IPA blocks, alone and beside half of them:", ""]
    lines += ["| block | L | pass | alone | with " + f"{BUDGET // 2} IPA blocks |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if row["time"] and row["block"] != "ipa":
            many = BUDGET / row["time"]["ratio"]
            lines.append(f"| `{row['block']}` | {row['length']} | {row['mode']} | {many:.1f} | {many / 2:.1f} |")
    return "\n".join(lines)


def write_page(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the tables between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--modes", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="auto", help="the preset of kernels")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs; 0 leaves out the times")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the table into docs/choosing-blocks.md")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the table from the JSON")
    parser.add_argument("--out", type=Path, help="the JSON; benchmarks/studies/results/blocks_<device>.json")
    options = parser.parse_args(argv)
    path: Path = options.out or RESULTS / f"blocks_{options.device.partition(':')[0]}.json"
    if options.render:
        write_page(json.loads(path.read_text()))
        return 0
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        for length in options.lengths:
            for block in options.blocks:
                task = asdict(Task(block, length, mode, options.device, options.threads, options.preset))
                print(f"{block} L={length} {mode} ...", file=sys.stderr, flush=True)
                row = in_fresh_process(measure_row, task, options.pairs)
                wanted = row["correct"] and not options.no_memory
                rows.append({**row, "memory_mb": extra_peak_memory(prepare_memory, task) if wanted else None})
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")  # after every row: a long run may be stopped
    print(markdown(rows))
    if options.write:
        write_page(rows)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
