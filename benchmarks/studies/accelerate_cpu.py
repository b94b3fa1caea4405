"""`accelerate` on other projects' own models, at their default sizes: what is replaced, how exact, and how much faster.

    git clone https://github.com/jasonkyuyim/multiflow /tmp/multiflow
    PYTHONPATH=/tmp/multiflow python -m benchmarks.studies.accelerate_cpu multiflow --source /tmp/multiflow
    PYTHONPATH=/tmp/frameflow python -m benchmarks.studies.accelerate_cpu frameflow --source /tmp/frameflow
    python -m benchmarks.studies.accelerate_cpu --table  the rows measured so far, as docs/accelerate.md shows them

Run from the repository's root, one project at a time, in an environment in which that project's model imports; nothing
of theirs is copied here. Weights are random and nowhere zero. First every module is run beside its own forward
(`verify=True`), then the whole model beside the unmodified one, then the times: interleaved pairs in one process.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .multiflow_cpu import PUBLISHED, draw_inputs, draw_weights
from .rows import Comparison, Machine, compare, machine

RESULTS = Path(__file__).parent / "results" / "accelerate_cpu.json"
CLASSES = ("InvariantPointAttention", "EdgeTransition", "EdgeFeatureNet", "EdgeEmbedder")
GRADIENT_LENGTH = 48
MASKED_FRACTION = 0.1


def as_config(value: Any) -> Any:
    """Nested dictionaries as objects with attributes, as OmegaConf gives them."""
    return SimpleNamespace(**{k: as_config(v) for k, v in value.items()}) if isinstance(value, Mapping) else value


# --------------------------------------------------------------------------------------------------------------------
# The projects
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """How to make a project's model at its default sizes, and how to call it.

    Attributes:
        title: Its name.
        address: Its repository on GitHub.
        build: Imports the project and makes the model.
        call: Runs the model on what `draw_inputs` drew; the outputs that count, by name.
    """

    title: str
    address: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


def attribute(module: str, name: str) -> Any:
    """A class of a project that is on the path."""
    return getattr(importlib.import_module(module), name)


def multiflow() -> nn.Module:
    config = as_config({**PUBLISHED, "transformer_dropout": 0.0})
    model: nn.Module = attribute("multiflow.models.flow_model", "FlowModel")(config)
    return model


def frameflow() -> nn.Module:
    parts = {key: dict(PUBLISHED[key]) for key in ("node_features", "edge_features", "ipa")}
    parts["ipa"] |= {"seq_tfmr_num_layers": 2, "num_blocks": 6}
    config = as_config({"node_embed_size": 256, "edge_embed_size": 128, **parts})
    model: nn.Module = attribute("models.flow_model", "FlowModel")(config)
    return model


def rna_frameflow() -> nn.Module:
    parts = {key: dict(PUBLISHED[key]) for key in ("node_features", "edge_features", "ipa")}
    parts["node_features"] |= {"embed_diffuse_mask": False}
    parts["edge_features"] = {k: v for k, v in parts["edge_features"].items() if not k.startswith("embed_")}
    parts["ipa"] |= {"seq_tfmr_num_layers": 2, "num_blocks": 6, "c_hidden": 128}
    config = as_config({"node_embed_size": 256, "edge_embed_size": 128, "use_flashipa": False, **parts})
    model: nn.Module = attribute("rna_backbone_design.models.flow_model", "FlowModel")(config)
    return model


FRAMEDIFF = {
    "node_embed_size": 256,
    "edge_embed_size": 128,
    "dropout": 0.0,
    "embed": {
        "index_embed_size": 32,
        "aatype_embed_size": 64,
        "embed_self_conditioning": True,
        "num_bins": 22,
        "min_bin": 1e-5,
        "max_bin": 20.0,
    },
    "ipa": {
        "c_s": 256,
        "c_z": 128,
        "c_hidden": 256,
        "c_skip": 64,
        "no_heads": 8,
        "no_qk_points": 8,
        "no_v_points": 12,
        "seq_tfmr_num_heads": 4,
        "seq_tfmr_num_layers": 2,
        "num_blocks": 4,
        "coordinate_scaling": 0.1,
        "p_uncond": 0.2,
    },
}


class Fields:
    """In the place of FoldFlow's flow matcher and FrameDiff's diffuser, which hold no parameters: differences."""

    def calc_rot_vectorfield(self, rot_t: Tensor, rot_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return rot_t, rot_t - rot_0

    def calc_trans_vectorfield(self, trans_t: Tensor, trans_0: Tensor, t: Tensor, **_: Any) -> Tensor:
        return trans_t - trans_0

    def calc_rot_score(self, rots_t: Any, rots_0: Any, t: Tensor) -> Tensor:
        return rots_0.get_rot_mats()[..., 0] - rots_t.get_rot_mats()[..., 0]

    def calc_trans_score(self, trans_t: Tensor, trans_0: Tensor, t: Tensor, **_: Any) -> Tensor:
        return trans_0 - trans_t


def foldflow() -> nn.Module:
    model: nn.Module = attribute("foldflow.models.components.network", "VectorFieldNetwork")(
        as_config(FRAMEDIFF), Fields()
    )
    return model


def framediff() -> nn.Module:
    model: nn.Module = attribute("model.score_network", "ScoreNetwork")(as_config(FRAMEDIFF), Fields())
    return model


def call_flow_model(model: nn.Module, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    batch = {name: value for name, value in x.items() if name not in ("s", "z")}
    out = model({**batch, "t": batch["so3_t"]})
    return {name: out[name] for name in ("pred_trans", "pred_rotmats", "pred_logits", "pred_torsions") if name in out}


def call_frame_model(model: nn.Module, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rigid = attribute("openfold.utils.rigid_utils", "Rigid")
    rotation = attribute("openfold.utils.rigid_utils", "Rotation")
    mask = x["res_mask"]
    out = model(
        {
            "res_mask": mask,
            "fixed_mask": torch.zeros_like(mask),
            "seq_idx": x["res_idx"],
            "t": x["so3_t"][:, 0],
            "sc_ca_t": x["trans_sc"],
            "rigids_t": rigid(rotation(rot_mats=x["rotmats_t"]), x["trans_t"]).to_tensor_7(),
            "torsion_angles_sin_cos": torch.zeros(*mask.shape, 7, 2),
        }
    )
    return {"rigids": out["rigids"], "psi": out["psi"]}


PROJECTS = {
    "multiflow": Project("Multiflow", "jasonkyuyim/multiflow", multiflow, call_flow_model),
    "frameflow": Project("FrameFlow", "microsoft/protein-frame-flow", frameflow, call_flow_model),
    "rna_frameflow": Project("RNA-FrameFlow", "rish-16/rna-backbone-design", rna_frameflow, call_flow_model),
    "foldflow": Project("FoldFlow", "DreamFold/FoldFlow", foldflow, call_frame_model),
    "framediff": Project("FrameDiff", "jasonkyuyim/se3_diffusion", framediff, call_frame_model),
}

# --------------------------------------------------------------------------------------------------------------------
# One row
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was seen of one project.

    Attributes:
        project: Its key.
        commit: The project's commit.
        present: Modules of the known classes in the model, by class.
        replaced: How many of them were replaced.
        same_state: Whether the `state_dict` has the same keys and the same tensors as before.
        module_forward: The largest difference of any module's output from its own forward's, relative.
        module_gradient: The same of a gradient.
        model_forward: The whole model's: the worst output's difference on valid rows, relative to its largest value.
        model_gradient: Of the parameters' gradients, as the norm of the difference over the norm: the median.
        model_gradient_worst: The largest of these. Rounding switches a ReLU here and there, which changes the gradients
            of its layer by a step; module by module, on the same inputs, that is hardly ever met.
        length: Residues of the timed forward.
        time: Unmodified against accelerated, forward without gradients.
        kernels: Which kernels ran.
        machine: Where.
        at: When, UTC.
    """

    project: str
    commit: str
    present: dict[str, int]
    replaced: int
    same_state: bool
    module_forward: float
    module_gradient: float
    model_forward: float
    model_gradient: float
    model_gradient_worst: float
    length: int
    time: Comparison | None
    kernels: tuple[str, ...]
    machine: Machine
    at: str

    @property
    def holds(self) -> bool:
        """Whether all modules were replaced, within the limits, and nothing else changed."""
        exact = self.module_forward <= 1e-5 and self.module_gradient <= 1e-4
        return self.replaced == sum(self.present.values()) and self.same_state and exact


def measure(key: str, source: Path, length: int, pairs: int) -> Row:
    """Check a project, and time it."""
    import foldkernels

    project = PROJECTS[key]
    torch.manual_seed(0)
    original = project.build().eval()
    draw_weights(original)
    model = copy.deepcopy(original)
    kinds = [type(module).__name__ for module in model.modules()]
    before = dict(model.state_dict(keep_vars=True))
    report = foldkernels.accelerate(model, verify=True)
    print(report, file=sys.stderr)
    after = model.state_dict(keep_vars=True)
    same = list(after) == list(before) and all(after[name] is value for name, value in before.items())
    proofs = [entry.proof for entry in report.entries if entry.proof is not None]
    with foldkernels.record_kernels() as ran:
        forward = _forward_error(project, original, model, length)
    gradients = _gradient_errors(project, original, model)
    x = draw_inputs(length)

    def run(timed: nn.Module) -> object:
        with torch.no_grad():
            return project.call(timed, x)

    timing = compare(lambda: run(original), lambda: run(model), pairs) if pairs else None
    return Row(
        project=key,
        commit=_commit(source),
        present={kind: kinds.count(kind) for kind in CLASSES if kind in kinds},
        replaced=len(report.replaced),
        same_state=same,
        module_forward=max(proof.forward for proof in proofs),
        module_gradient=max(proof.gradient for proof in proofs),
        model_forward=forward,
        model_gradient=statistics.median(gradients),
        model_gradient_worst=max(gradients),
        length=length,
        time=timing,
        kernels=tuple(sorted(set(ran))),
        machine=machine(),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _forward_error(project: Project, original: nn.Module, model: nn.Module, length: int) -> float:
    x = draw_inputs(length, masked=int(MASKED_FRACTION * length))
    there = x["res_mask"] > 0.5
    with torch.no_grad():
        wanted, found = project.call(original, x), project.call(model, x)
    errors = [
        float((found[name] - value)[there].abs().max() / value[there].abs().max()) for name, value in wanted.items()
    ]
    return max(errors)


def _gradient_errors(project: Project, original: nn.Module, model: nn.Module) -> list[float]:
    x = draw_inputs(GRADIENT_LENGTH, masked=int(MASKED_FRACTION * GRADIENT_LENGTH))
    there = x["res_mask"] > 0.5

    def gradients(one: nn.Module) -> dict[str, Tensor]:
        one.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros(())
        for value in project.call(one, x).values():
            total = total + (value * torch.randn(value.shape, generator=generator))[there].mean()
        torch.autograd.backward(total)
        return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    wanted, found = gradients(original), gradients(model)
    if wanted.keys() != found.keys():
        return [float("inf")]
    largest = max(float(value.norm()) for value in wanted.values())
    return [
        float((found[name] - value).norm()) / max(float(value.norm()), 1e-2 * largest) for name, value in wanted.items()
    ]


def _commit(source: Path) -> str:
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


# --------------------------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| project, commit | replaced of present | module: output, gradient | whole model: output, gradient | faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        project, timing = PROJECTS[row["project"]], row["time"]
        faster = f"{timing['ratio']:.1f}x ({timing['low']:.1f} to {timing['high']:.1f})" if timing else "not measured"
        kept = " [memory kept]" if "mmap_threshold" in row["machine"]["glibc_tunables"] else ""
        lines.append(
            f"| {project.title} `{row['commit'][:7]}`{kept} | {row['replaced']} of {sum(row['present'].values())} | "
            f"{row['module_forward']:.0e}, {row['module_gradient']:.0e} | "
            f"{row['model_forward']:.0e}, {row['model_gradient']:.0e} | {faster} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one project and add its row.

    Returns:
        0, or 1 when the row does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", nargs="?", choices=list(PROJECTS))
    parser.add_argument("--source", type=Path, default=Path(), help="the project's checkout, for its commit")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7, help="0 checks only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows measured so far")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    if options.table or options.project is None:
        print(table(rows))
        return 0
    row = measure(options.project, options.source, options.length, options.pairs)
    new = asdict(row)
    same = [old["project"] == row.project and _kept(old) == _kept(new) for old in rows]
    rows = [old for old, is_same in zip(rows, same, strict=True) if not is_same] + [new]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table([new]))
    return 0 if row.holds else 1


def _kept(row: Mapping[str, Any]) -> bool:
    return "mmap_threshold" in row["machine"]["glibc_tunables"]


if __name__ == "__main__":
    sys.exit(main())
