"""How much faster than fair-esm, on this machine's CPU: one table, correctness first.

    python -m benchmarks.studies.esm_cpu                          the whole table
    python -m benchmarks.studies.esm_cpu --rows 'ragged_*' --glibc default
    python -m benchmarks.studies.esm_cpu --quick                  every row at 128 residues: does it run, is it right

Run from the repository's root, with fair-esm installed (pip install '.[esm]'). Both sides have the same weights, of the
8M model's size and random. Each row runs in a fresh process: first the check against fair-esm in float64, then the
times; memory in two processes more. A row whose check is red has no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import side_by_side

#: esm2_t6_8M_UR50D, and the widths of Multiflow's published model that its features are mixed into.
LAYERS, WIDTH, HEADS = 6, 320, 20
NODES, EDGES, HIDDEN = 256, 128, 128
#: Residues of a ragged batch, as parts of the longest: 60 to 1,000.
RAGGED = (0.06, 0.12, 0.22, 0.4, 0.65, 1.0)
QUICK_LENGTH, TINY_LENGTH = 128, 24


@dataclass(frozen=True)
class Task:
    """What a row measures.

    Attributes:
        component: `forward`: logits and the last representation of one sequence. `ragged`: the same of six, 6% of
            the longest to all of it. `maps`: the attention maps as well. `contacts`: contacts alone. `features`: nodes
            and edges mixed with every layer and every map, on both sides. `features_or_maps`: the same on ours, and on
            fair-esm's no more than the maps.
        length: Residues of the longest sequence.
        precision: What our side computes in.
        threads: PyTorch's intra-op threads.
    """

    component: str
    length: int
    precision: str = "float32"
    threads: int = 1

    @property
    def name(self) -> str:
        """`component_length`."""
        return f"{self.component}_{self.length}"


ROWS = (
    Task("forward", 1024),
    Task("ragged", 1000),
    Task("maps", 1024),
    Task("contacts", 512),
    Task("features", 1024),
    Task("features_or_maps", 1024),
)


def fair_esm() -> ModuleType:
    """The package.

    Raises:
        SystemExit: It is not installed.
    """
    try:
        import esm

        if not hasattr(esm, "ESM2"):
            raise ImportError(f"the `esm` at {esm.__file__} is another package")
    except ImportError as error:
        raise SystemExit(f"fair-esm, the other side, cannot be used: {error}; pip install '.[esm]'") from None
    return esm  # type: ignore[no-any-return]


def tokens_of(task: Task) -> Tensor:
    """Random residues between BOS and EOS, padded."""
    generator = torch.Generator().manual_seed(task.length)
    parts = RAGGED if task.component == "ragged" else (1.0,)
    lengths = [max(1, round(part * task.length)) for part in parts]
    tokens = torch.full((len(lengths), max(lengths) + 2), 1)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length + 1] = 0, 2
        row[1 : length + 1] = torch.randint(4, 24, (length,), generator=generator)
    return tokens


def models(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """fair-esm's model and ours, with the same random weights."""
    from foldkernels.kernels.registry.binding import bind
    from foldkernels.modules.esm2 import ESM2

    torch.manual_seed(0)
    theirs = fair_esm().ESM2(LAYERS, WIDTH, HEADS, "ESM-1b").eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5)
    ours = ESM2(LAYERS, WIDTH, HEADS).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    bind(ours, "torch")
    return theirs.to(dtype), ours.to(dtype)


def combiner_of(ours: Any) -> Any:
    """The combiner around our model."""
    from foldkernels.kernels.registry.binding import bind
    from foldkernels.modules.esm_combiner import ESMCombiner
    from foldkernels.modules.frozen_esm import FrozenESM

    torch.manual_seed(1)
    combiner = ESMCombiner(FrozenESM(ours), NODES, EDGES, HIDDEN).eval()
    bind(combiner, "torch")
    return combiner


def mixed_by_the_formula(
    theirs: Any, combiner: Any, tokens: Tensor, nodes: Tensor, edges: Tensor
) -> tuple[Tensor, ...]:
    """What the combiner computes, from fair-esm's maps all at once, in the published order of operations."""
    found = theirs(tokens, repr_layers=range(LAYERS + 1), need_head_weights=True)
    layers = torch.stack([x for _, x in sorted(found["representations"].items())], 2)[:, 1:-1]
    maps = found["attentions"].permute(0, 3, 4, 1, 2).flatten(3)[:, 1:-1, 1:-1]
    single = (combiner.esm_single_combine.softmax(0)[:, None] * layers).sum(2)
    nodes = combiner.single_layer_norm(0.5 * (combiner.seq_proj(single) + nodes))
    return nodes, combiner.pair_layer_norm(0.5 * (combiner.pair_proj(maps) + edges))


def runner(task: Task, ours: bool, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed, and checked: the tensors that it gives."""
    mine = ours and task.precision == "bfloat16"
    theirs_model, our_model = models(torch.bfloat16 if mine else dtype)
    model, tokens = our_model if ours else theirs_model, tokens_of(task)
    last = LAYERS

    def outputs(found: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (
            found["logits"],
            found["representations"][last],
            *([found["attentions"]] if "attentions" in found else []),
        )

    def forward() -> tuple[Tensor, ...]:
        return outputs(model(tokens, repr_layers=[last], need_head_weights=task.component == "maps"))

    def contacts() -> tuple[Tensor, ...]:
        return (model.predict_contacts(tokens),)

    def features() -> tuple[Tensor, ...]:
        if not ours:
            if task.component == "features_or_maps" and dtype is torch.float32:
                return outputs(model(tokens, repr_layers=range(last + 1), need_head_weights=True))
            return mixed_by_the_formula(model, combiner, tokens, nodes, edges)
        chains = torch.zeros_like(types)
        # As in Multiflow's model: the embedding of the pairs is not needed again.
        found: tuple[Tensor, ...] = combiner(nodes, edges, types, chains, chains == 0, overwrite_z=True)
        return found

    if "features" in task.component:
        letters = "ARNDCQEGHILKMFPSTWYV"
        number = {our_model.alphabet.get_idx(letter): i for i, letter in enumerate(letters)}
        types = torch.tensor([[number[int(token)] for token in tokens[0, 1:-1]]])
        n = types.shape[1]
        combiner = combiner_of(our_model).to(dtype)
        generator = torch.Generator().manual_seed(2)
        nodes, edges = (
            torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, n, NODES), (1, n, n, EDGES))
        )
    calls = {"forward": forward, "ragged": forward, "maps": forward, "contacts": contacts}
    call = calls.get(task.component, features)

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call()

    return run


def check(task: Task) -> tuple[bool, str]:
    """Hold our side to fair-esm in float64: at most twice the error of fair-esm in float32, plus a floor.

    The floor is 1e-6 of the largest value, in bfloat16 5e-2. Padding is not compared.
    """
    this = replace(task, component="features") if task.component == "features_or_maps" else task
    # The written-out features of a thousand residues hold gigabytes in float64.
    this = replace(this, length=min(this.length, 256)) if this.component == "features" else this
    truth = runner(this, False, torch.float64)()
    plain, found = runner(this, False)(), runner(this, True)()
    there = tokens_of(this) != 1
    worst, words = -1.0, ""
    for i, (exact, theirs, mine) in enumerate(zip(truth, plain, found, strict=True)):
        kept = there if exact.shape[:2] == there.shape else slice(None)
        error, plain_error = (float((x.double() - exact)[kept].abs().max()) for x in (mine, theirs))
        largest = float(exact[kept].abs().max())
        share = error / (2 * plain_error + (5e-2 if task.precision == "bfloat16" else 1e-6) * largest)
        if not share <= worst:
            worst, words = share, f"output {i}: {error:.1e} (fair-esm {plain_error:.1e}) of {largest:.1e}"
    return worst <= 1.0, f"{words}, L={this.length}"


def measure_row(task: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Check, then time. Runs in a fresh process; the parts of a `Row`."""
    return side_by_side.check_and_time(Task(**task), pairs, check, runner, TINY_LENGTH)


def prepare_memory(task: Mapping[str, Any], ours: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up on a tiny sequence, and the call whose memory is measured. Runs in a fresh process."""
    return side_by_side.warm_up_and_call(Task(**task), ours, runner, TINY_LENGTH)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table.

    Returns:
        0, or 1 when a row is red, or 2 when no row matches.
    """
    parser: argparse.ArgumentParser = side_by_side.arguments(
        "python -m benchmarks.studies.esm_cpu",
        "Compare foldkernels' ESM-2 with fair-esm's: same weights, checked first.",
        [task.name for task in ROWS],
        "esm_cpu.json",
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="our side's type")
    options = parser.parse_args(argv)
    fair_esm()
    tasks = [
        replace(
            task,
            length=QUICK_LENGTH if options.quick else task.length,
            precision=options.precision,
            threads=options.threads,
        )
        for task in ROWS
        if side_by_side.wanted(options.rows, task.name)
    ]
    return side_by_side.run(
        options, tasks, measure_row, prepare_memory, lambda task: "fair-esm, float32", "ESM-2 against fair-esm"
    )


if __name__ == "__main__":
    sys.exit(main())
