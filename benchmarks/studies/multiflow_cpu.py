"""How much faster than Multiflow's own order of operations, on this machine's CPU: one table, correctness first.

    python -m benchmarks.studies.multiflow_cpu                          the whole table (half an hour and more)
    python -m benchmarks.studies.multiflow_cpu --quick         every row at L=64, three pairs: does it run, is it right
    python -m benchmarks.studies.multiflow_cpu --rows 'model_*' --precision bfloat16 --glibc both
    python -m benchmarks.studies.multiflow_cpu --self-check --quick     the baseline against itself: ratios of about 1.0

Run from the repository's root. Both sides have the same weights, of the published size, random and nowhere zero. Each
row runs in a fresh process: first the check (on chains with masked residues, against float64), then the times; memory
in two processes more. A row whose check is red has no time. Rows go to benchmarks/studies/results/ as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foldkernels.benchmarks.run import correctness
from foldkernels.benchmarks.run.random_models import draw_chains, draw_weights

from . import original_formulas, side_by_side

PUBLISHED: dict[str, Any] = {
    "node_embed_size": 256,
    "edge_embed_size": 128,
    "symmetric": False,
    "aatype_pred": True,
    "aatype_pred_num_tokens": 21,
    "transformer_dropout": 0.2,
    "node_features": {
        "c_s": 256,
        "c_pos_emb": 128,
        "c_timestep_emb": 128,
        "max_num_res": 2000,
        "timestep_int": 1000,
        "embed_chain": False,
        "embed_aatype": True,
        "use_mlp": True,
        "aatype_pred_num_tokens": 21,
    },
    "edge_features": {
        "single_bias_transition_n": 2,
        "c_s": 256,
        "c_p": 128,
        "relpos_k": 64,
        "feat_dim": 64,
        "num_bins": 22,
        "self_condition": True,
        "embed_chain": False,
        "embed_diffuse_mask": True,
    },
    "ipa": {
        "c_s": 256,
        "c_z": 128,
        "c_hidden": 16,
        "no_heads": 8,
        "no_qk_points": 8,
        "no_v_points": 12,
        "seq_tfmr_num_heads": 4,
        "seq_tfmr_num_layers": 4,
        "num_blocks": 8,
        "dropout": 0.0,
    },
}

TINY_LENGTH = 16  # warm-ups before memory is measured
GRADIENT_CHECK_LENGTH = 64  # gradients in float64 at L=256 take minutes and 9 GB
QUICK_LENGTH = 64
MASKED_FRACTION = 0.1


@dataclass(frozen=True)
class Task:
    """What a row measures.

    Attributes:
        component: `ipa`, `edge_transition`, `edge_features` or `model`.
        mode: `forward` without gradients in eval mode, or `step`: forward, loss, backward in training mode.
        length: residues; batch size is 1.
        precision: what our kernels may round to, `float32` or `bfloat16`.
        against: `float32`, or `autocast`: the original under PyTorch's bfloat16 autocast.
        self_check: the baseline on both sides.
        threads: PyTorch's intra-op threads.
    """

    component: str
    mode: str
    length: int
    precision: str = "float32"
    against: str = "float32"
    self_check: bool = False
    threads: int = 1

    @property
    def name(self) -> str:
        """`component_mode_length`."""
        return f"{self.component}_{self.mode}_{self.length}"


ROWS = (
    Task("ipa", "forward", 384),
    Task("ipa", "step", 384),
    Task("edge_transition", "forward", 256),
    Task("edge_transition", "step", 256),
    Task("edge_features", "forward", 256),
    Task("model", "forward", 128),
    Task("model", "forward", 256),
    Task("model", "forward", 384),
    Task("model", "step", 128),
    Task("model", "step", 256),
)


# --------------------------------------------------------------------------------------------------------------------
# Inputs, weights, modules
# --------------------------------------------------------------------------------------------------------------------


def draw_inputs(length: int, masked: int = 0, seed: int = 0, pairs: bool = True) -> dict[str, Tensor]:
    """The model's batch, and `s`, `z` for single layers; float32, batch size 1, the last `masked` residues absent.

    `pairs` may leave z empty, which the model does not take and which is nearly all of the work.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        **draw_chains(length, generator, masked),
        "s": torch.randn(1, length, PUBLISHED["node_embed_size"], generator=generator),
        "z": torch.randn(1, length, length if pairs else 0, PUBLISHED["edge_embed_size"], generator=generator),
    }


def build_original(component: str, dropout: float) -> nn.Module:
    """One of the baseline's modules, weights drawn."""
    sizes = PUBLISHED["node_embed_size"], PUBLISHED["edge_embed_size"]
    module: nn.Module
    if component == "ipa":
        module = original_formulas.InvariantPointAttention(PUBLISHED["ipa"])
    elif component == "edge_transition":
        module = original_formulas.EdgeTransition(
            node_embed_size=sizes[0], edge_embed_in=sizes[1], edge_embed_out=sizes[1]
        )
    elif component == "edge_features":
        module = original_formulas.EdgeFeatureNet(PUBLISHED["edge_features"])
    else:
        module = original_formulas.FlowModel({**PUBLISHED, "transformer_dropout": dropout})
    draw_weights(module)
    return module


def build_ours(component: str, dropout: float, kernel: object) -> nn.Module:
    """One of foldkernels' modules, weights drawn and kernels bound."""
    import foldkernels
    from foldkernels.compat.multiflow import FlowModel
    from foldkernels.compat.multiflow.config.sections import ModelConfig
    from foldkernels.modules.edge_features import EdgeFeatureNet
    from foldkernels.modules.edge_transition import EdgeTransition
    from foldkernels.modules.invariant_point_attention import InvariantPointAttention

    config = ModelConfig(**{**PUBLISHED, "transformer_dropout": dropout})
    module: nn.Module
    if component == "ipa":
        widths = ("c_s", "c_z", "c_hidden", "no_heads", "no_qk_points", "no_v_points")
        module = InvariantPointAttention(**{name: PUBLISHED["ipa"][name] for name in widths})
    elif component == "edge_transition":
        module = EdgeTransition(
            node_embed_size=config.node_embed_size,
            edge_embed_in=config.edge_embed_size,
            edge_embed_out=config.edge_embed_size,
        )
    elif component == "edge_features":
        module = EdgeFeatureNet(config.edge_features)
    else:
        module = FlowModel(config)
    draw_weights(module)
    foldkernels.bind(module, kernel)
    return module


def call(component: str, module: nn.Module, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a module of either side and name its outputs.

    Args:
        component: which.
        module: ours or the baseline's.
        x: what `draw_inputs` drew; lengths in Angstrom.

    Returns:
        Float outputs.
    """
    mask = x["res_mask"]
    if component == "ipa":
        trans = x["trans_t"] / original_formulas.ANGSTROM_PER_NANOMETRE
        return {"s": module(x["s"], x["z"], _frames(module, x["rotmats_t"], trans), mask)}
    if component == "edge_transition":
        return {"z": module(x["s"], x["z"])}
    if component == "edge_features":
        edge_mask = mask[:, None] * mask[:, :, None]
        return {"z": module(x["s"], x["trans_t"], x["trans_sc"], edge_mask, x["diffuse_mask"], x["chain_idx"])}
    result = module({name: value for name, value in x.items() if name not in ("s", "z")})
    return {name: result[name] for name in ("pred_trans", "pred_rotmats", "pred_logits")}


def _frames(module: nn.Module, rotations: Tensor, trans: Tensor) -> Any:
    """Frames in the type that the module's side takes."""
    if isinstance(module, original_formulas.InvariantPointAttention):
        return original_formulas.Frames(rotations, trans)
    from foldkernels.modules.rigid import Rigid

    return Rigid(rotations, trans)


Call = Callable[[str, nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


def loss(outputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """A scalar that reaches every output of the valid residues, with random directions so that nothing cancels."""
    generator = torch.Generator().manual_seed(1)
    total = mask.new_zeros(())
    for value in outputs.values():
        direction = torch.randn(value.shape, generator=generator).to(value)
        total = total + (value * direction)[_valid(mask, value)].mean()
    return total


def _valid(mask: Tensor, value: Tensor) -> Tensor:
    """Which rows (B, N), or pairs (B, N, N), of an output are defined: the original leaves noise in the others."""
    present = mask > 0.5
    pairs = value.dim() == 4 and value.shape[2] == value.shape[1]
    return present[:, :, None] & present[:, None, :] if pairs else present


# --------------------------------------------------------------------------------------------------------------------
# What runs in fresh processes
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rounding(task: Task, ours: bool) -> Iterator[None]:
    """Autocast for the baseline where it is asked for; our side rounds inside its kernels."""
    with torch.autocast("cpu", torch.bfloat16, enabled=not ours and task.against == "autocast"):
        yield


def _build(task: Task, ours: bool, dropout: float) -> nn.Module:
    """The module of one side, in the row's mode."""
    if ours and not task.self_check:
        module = build_ours(task.component, dropout, {"preset": "auto", "precision": task.precision})
    else:
        module = build_original(task.component, dropout)
    return module.train(task.mode == "step")


def runner(task: Task, ours: bool) -> Callable[[], object]:
    """What is timed: the forward pass, or the training step with the published dropout."""
    module = _build(task, ours, PUBLISHED["transformer_dropout"])
    x = draw_inputs(task.length)
    if task.mode == "step" and task.component != "model":
        x["s"].requires_grad_()
        x["z"].requires_grad_()

    def forward() -> object:
        with torch.no_grad(), _rounding(task, ours):
            return call(task.component, module, x)

    def step() -> object:
        module.zero_grad(set_to_none=True)
        x["s"].grad = x["z"].grad = None
        with _rounding(task, ours):
            value = loss(call(task.component, module, x), x["res_mask"])
        torch.autograd.backward(value)
        return value

    return step if task.mode == "step" else forward


def results(task: Task, module: nn.Module, x: Mapping[str, Tensor], call: Call = call) -> dict[str, Tensor]:
    """Everything that the check compares: outputs of valid rows, and in a step all gradients."""
    step = task.mode == "step"
    leaves = {"s": x["s"], "z": x["z"]} if step and task.component != "model" else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.set_grad_enabled(step):
        outputs = call(task.component, module, x)
        if step:
            torch.autograd.backward(loss(outputs, x["res_mask"]))
    found = {name: value.detach()[_valid(x["res_mask"], value)] for name, value in outputs.items()}
    if step:
        leaves = {**leaves, **dict(module.named_parameters())}
        found |= {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found


def check(task: Task) -> tuple[bool, str]:
    """Hold our side to float64, judged by what plain PyTorch loses at the same precision on the same inputs.

    The error of each tensor (outputs; in a layer's step also every gradient) may be twice plain PyTorch's, four times
    after the eight blocks of a whole model, plus 1e-6 (float32) or 2e-3 (bfloat16) of the tensor's largest value. A
    gradient far smaller than the largest one counts as 1e-3 of that: `linear_b.bias` has none but rounding noise.

    A whole model's gradients are judged by their norms: see `judging.gradients_hold`.

    Args:
        task: the row. Dropout is off, a tenth of the residues is masked, and a step is checked at L=64 at most.

    Returns:
        Whether it passed, and the worst tensor in words.
    """
    length = min(task.length, GRADIENT_CHECK_LENGTH) if task.mode == "step" else task.length

    def inputs() -> dict[str, Tensor]:
        return draw_inputs(length, masked=max(1, int(MASKED_FRACTION * length)))

    plain = replace(task, against="autocast" if task.precision == "bfloat16" else "float32")
    truth = results(task, _build(task, False, 0.0).double(), {k: _double(v) for k, v in inputs().items()})
    with _rounding(plain, ours=False):
        theirs = results(task, _build(task, False, 0.0), inputs())
    ours = results(task, _build(task, True, 0.0), inputs())
    correct, words = judge(task.component, task.precision, truth, theirs, ours)
    return correct, f"{words}, L={length}"


def judge(
    component: str,
    precision: str,
    truth: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
) -> tuple[bool, str]:
    """Compare what `results` found on three sides; see `check` for the rule."""
    found = correctness.judge(component == "model", precision, truth, theirs, ours)
    return found.passed, found.words


def _double(value: Tensor) -> Tensor:
    """Float tensors in float64, others as they are."""
    return value.double() if value.is_floating_point() else value


def measure_row(task: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Check, then time. Runs in a fresh process; the parts of a `Row`."""
    found = side_by_side.check_and_time(Task(**task), pairs, check, runner, TINY_LENGTH)
    return {**found, "kernels": ["original formulas"]} if task["self_check"] else found


def prepare_memory(task: Mapping[str, Any], ours: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up on a tiny chain, and the call whose memory is measured. Runs in a fresh process."""
    return side_by_side.warm_up_and_call(Task(**task), ours, runner, TINY_LENGTH)


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = side_by_side.arguments(
        "python -m benchmarks.studies.multiflow_cpu",
        "Compare foldkernels with Multiflow's order of operations: same weights, checked first.",
        [task.name for task in ROWS],
        "multiflow_cpu.json",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "both"), default="both", help="our side's rounding"
    )
    parser.add_argument("--against", choices=("float32", "autocast"), default="float32", help="how the original runs")
    parser.add_argument("--self-check", action="store_true", help="the baseline on both sides")
    return parser


def select(options: argparse.Namespace) -> list[Task]:
    """The tasks that the command line asks for."""
    precisions = ("float32", "bfloat16") if options.precision == "both" else (options.precision,)
    if options.self_check:
        precisions = ("float32",)
    chosen: dict[Task, None] = {}
    for task in ROWS:
        this = replace(task, length=QUICK_LENGTH) if options.quick else task
        if not side_by_side.wanted(options.rows, task.name, this.name):
            continue
        for precision in precisions:
            chosen[
                replace(
                    this,
                    precision=precision,
                    against=options.against,
                    self_check=options.self_check,
                    threads=options.threads,
                )
            ] = None
    return list(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the table.

    Returns:
        0, or 1 when a row is red, or 2 when no row matches.
    """
    options = arguments().parse_args(argv)
    return side_by_side.run(
        options,
        select(options),
        measure_row,
        prepare_memory,
        lambda task: f"original formulas, {task.against}",
        "foldkernels against the original's order of operations",
    )


if __name__ == "__main__":
    sys.exit(main())
