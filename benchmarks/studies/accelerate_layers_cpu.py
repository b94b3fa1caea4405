"""`accelerate` on layers of OpenFold, Boltz and fair-esm at their default sizes: how exact, and how much faster.

    git clone https://github.com/aqlaboratory/openfold /tmp/openfold
    PYTHONPATH=/tmp/openfold python -m benchmarks.studies.accelerate_layers_cpu openfold_ipa openfold_pair_stack
    PYTHONPATH=.peers python -m benchmarks.studies.accelerate_layers_cpu boltz_1_layer boltz_2_layer esm_2
    python -m benchmarks.studies.accelerate_layers_cpu --table  the rows measured so far, as docs/accelerate/ shows them

Run from the repository's root, in an environment in which the project's model imports; nothing of theirs is copied
here. Weights are random and nowhere zero. First every module is run beside its own forward (`verify=True`), then the
whole subject beside the unmodified one, with padding; then the times, without: interleaved pairs in one process.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rows import Comparison, Machine, compare, machine

RESULTS = Path(__file__).parent / "results" / "accelerate_layers_cpu.json"
GRADIENT_LENGTH = 40
MASKED_FRACTION = 0.1

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """Something to accelerate.

    Attributes:
        title: What it is.
        project: The module to import, whose checkout or version stands in the row.
        build: Makes it, at the project's default sizes.
        draw: Inputs at a length, some residues masked.
        call: Runs it; the outputs and, for each, the mask that says where it counts.
        length: Residues or tokens of the timed forward.
    """

    title: str
    project: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, int], Inputs]
    call: Callable[[nn.Module, Inputs], list[tuple[Tensor, Tensor]]]
    length: int = 256


def attribute(module: str, name: str) -> Any:
    """A class of a project that is on the path."""
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------------- OpenFold


def _prepare_openfold() -> None:
    """OpenFold imports its CUDA extension wherever it runs; what it has of it is a softmax in place."""
    if "attn_core_inplace_cuda" not in sys.modules:
        extension = types.ModuleType("attn_core_inplace_cuda")
        extension.__dict__["forward_"] = lambda a, rows, columns: a.copy_(torch.softmax(a, -1))
        sys.modules["attn_core_inplace_cuda"] = extension


def openfold_ipa() -> nn.Module:
    _prepare_openfold()
    layer: nn.Module = attribute("openfold.model.structure_module", "InvariantPointAttention")(384, 128, 16, 12, 4, 8)
    return layer


def openfold_multimer_ipa() -> nn.Module:
    _prepare_openfold()
    kind = attribute("openfold.model.structure_module", "InvariantPointAttentionMultimer")
    layer: nn.Module = kind(384, 128, 16, 12, 4, 8)
    return layer


def openfold_structure_module() -> nn.Module:
    _prepare_openfold()
    module: nn.Module = attribute("openfold.model.structure_module", "StructureModule")(
        c_s=384,
        c_z=128,
        c_ipa=16,
        c_resnet=128,
        no_heads_ipa=12,
        no_qk_points=4,
        no_v_points=8,
        dropout_rate=0.1,
        no_blocks=8,
        no_transition_layers=1,
        no_resnet_blocks=2,
        no_angles=7,
        trans_scale_factor=10,
        epsilon=1e-12,
        inf=1e5,
    )
    return module


def openfold_pair_stack() -> nn.Module:
    _prepare_openfold()
    stack: nn.Module = attribute("openfold.model.evoformer", "PairStack")(
        c_z=128,
        c_hidden_mul=128,
        c_hidden_pair_att=32,
        no_heads_pair=4,
        transition_n=4,
        pair_dropout=0.25,
        fuse_projection_weights=False,
        inf=1e9,
        eps=1e-10,
    )
    return stack


def call_ipa(layer: nn.Module, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    if type(layer).__name__.endswith("Multimer"):
        geometry = "openfold.utils.geometry."
        rotation = attribute(geometry + "rotation_matrix", "Rot3Array")
        frames = attribute(geometry + "rigid_matrix_vector", "Rigid3Array")(
            rotation(*(x["rotmats"][..., i, j] for i in range(3) for j in range(3))),
            attribute(geometry + "vector", "Vec3Array")(*x["trans"].unbind(-1)),
        )
    else:
        rotation = attribute("openfold.utils.rigid_utils", "Rotation")(rot_mats=x["rotmats"])
        frames = attribute("openfold.utils.rigid_utils", "Rigid")(rotation, x["trans"])
    return [(layer(x["s"], x["z"], frames, x["mask"]), x["mask"])]


def call_structure_module(module: nn.Module, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    kinds = torch.zeros(x["mask"].shape, dtype=torch.int64)
    out = module({"single": x["s"], "pair": x["z"]}, kinds, x["mask"])
    return [(out["single"], x["mask"]), (out["positions"][-1], x["mask"])]


def call_pair_stack(stack: nn.Module, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    # With gradients off it works in place, as OpenFold's own model has it.
    off = not torch.is_grad_enabled()
    z = x["z"].clone() if off else x["z"]
    return [(stack(z, x["pair_mask"], chunk_size=None, inplace_safe=off), x["pair_mask"])]


# ------------------------------------------------------------------------------------------------- Boltz and fair-esm


def boltz_2_layer() -> nn.Module:
    layer: nn.Module = attribute("boltz.model.layers.pairformer", "PairformerLayer")(384, 128, v2=True)
    return layer


def boltz_1_layer() -> nn.Module:
    layer: nn.Module = attribute("boltz.model.modules.trunk", "PairformerLayer")(384, 128)
    return layer


def call_pairformer(layer: nn.Module, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    # In evaluation, Boltz's trunk asks for chunks of 512 rows up to a length of 384.
    s, z = layer(x["s"], x["z"], x["mask"], x["pair_mask"], None if layer.training else 512)
    return [(s, x["mask"]), (z, x["pair_mask"])]


def esm_2() -> nn.Module:
    model: nn.Module = attribute("esm.model.esm2", "ESM2")(
        num_layers=6, embed_dim=320, attention_heads=20, alphabet="ESM-1b"
    )
    return model


def call_esm(model: nn.Module, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    return [(model(x["tokens"])["logits"], x["mask"])]


def draw_pairs(length: int, masked: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1, length)
    mask[:, length - masked :] = 0.0
    rotmats = torch.linalg.qr(torch.randn(1, length, 3, 3, generator=generator)).Q
    return {
        "s": torch.randn(1, length, 384, generator=generator),
        "z": torch.randn(1, length, length, 128, generator=generator),
        "mask": mask,
        "pair_mask": mask[:, :, None] * mask[:, None, :],
        "rotmats": rotmats * torch.linalg.det(rotmats)[..., None, None],
        "trans": torch.randn(1, length, 3, generator=generator) * 1.5,
    }


def draw_tokens(length: int, masked: int) -> Inputs:
    tokens = torch.randint(4, 24, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[:, length - masked :] = 1
    return {"tokens": tokens, "mask": (tokens != 1).float()}


SUBJECTS = {
    "openfold_ipa": Subject("OpenFold's IPA", "openfold", openfold_ipa, draw_pairs, call_ipa),
    "openfold_multimer_ipa": Subject("the multimer's IPA", "openfold", openfold_multimer_ipa, draw_pairs, call_ipa),
    "openfold_structure_module": Subject(
        "OpenFold's structure module", "openfold", openfold_structure_module, draw_pairs, call_structure_module
    ),
    "openfold_pair_stack": Subject(
        "an Evoformer block's pair stack", "openfold", openfold_pair_stack, draw_pairs, call_pair_stack
    ),
    "boltz_1_layer": Subject("Boltz-1's Pairformer layer", "boltz", boltz_1_layer, draw_pairs, call_pairformer),
    "boltz_2_layer": Subject("Boltz-2's Pairformer layer", "boltz", boltz_2_layer, draw_pairs, call_pairformer),
    "esm_2": Subject("ESM-2, 8M", "esm", esm_2, draw_tokens, call_esm, length=1024),
}

# ------------------------------------------------------------------------------------------------------------ one row


@dataclass(frozen=True)
class Row:
    """What was seen of one subject.

    Attributes:
        subject: Its key.
        version: The project's commit, or the package's version.
        replaced: How many modules of each class were replaced.
        left_alone: How many modules of known classes were not.
        same_state: Whether the `state_dict` has the same keys and the same tensors as before.
        module_forward: The largest difference of any module's output from its own forward's, relative.
        module_gradient: The same of a gradient.
        subject_forward: The whole subject's: the largest difference where the mask is, relative to the largest value.
        subject_gradient: The same of a parameter's gradient.
        length: Residues of the timed forward.
        time: Unmodified against accelerated, forward without gradients.
        kernels: Which kernels ran.
        machine: Where.
        at: When, UTC.
    """

    subject: str
    version: str
    replaced: dict[str, int]
    left_alone: int
    same_state: bool
    module_forward: float
    module_gradient: float
    subject_forward: float
    subject_gradient: float
    length: int
    time: Comparison | None
    kernels: tuple[str, ...]
    machine: Machine
    at: str

    @property
    def holds(self) -> bool:
        """Whether all modules were replaced, within the limits, and nothing else changed."""
        forward = max(self.module_forward, self.subject_forward)
        gradient = max(self.module_gradient, self.subject_gradient)
        return not self.left_alone and self.same_state and forward <= 1e-5 and gradient <= 1e-4


def measure(key: str, source: Path | None, pairs: int) -> Row:
    """Check a subject, and time it."""
    import foldkernels

    subject = SUBJECTS[key]
    torch.manual_seed(0)
    original = _draw_weights(subject.build()).eval()
    model = copy.deepcopy(original)
    before = dict(model.state_dict(keep_vars=True))
    report = foldkernels.accelerate(model, verify=True)
    print(report, file=sys.stderr)
    after = model.state_dict(keep_vars=True)
    same = list(after) == list(before) and all(after[name] is value for name, value in before.items())
    proofs = [entry.proof for entry in report.entries if entry.proof is not None]
    kinds = [entry.class_name for entry in report.entries if entry.status == "replaced"]
    with foldkernels.record_kernels() as ran, torch.no_grad():
        x = subject.draw(subject.length, int(MASKED_FRACTION * subject.length))
        forward = max(
            _error(found[mask > 0.5], wanted[mask > 0.5], 0.0)
            for (wanted, mask), (found, _) in zip(subject.call(original, x), subject.call(model, x), strict=True)
        )
    whole = subject.draw(subject.length, 0)

    def run(timed: nn.Module) -> object:
        with torch.no_grad():
            return subject.call(timed, whole)

    return Row(
        subject=key,
        version=_version(subject.project, source),
        replaced={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        left_alone=len(report.left_alone),
        same_state=same,
        module_forward=max(proof.forward for proof in proofs),
        module_gradient=max(proof.gradient for proof in proofs),
        subject_forward=forward,
        subject_gradient=_gradient_error(subject, original, model),
        length=subject.length,
        time=compare(lambda: run(original), lambda: run(model), pairs) if pairs else None,
        kernels=tuple(sorted(set(ran))),
        machine=machine(),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _draw_weights(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _error(found: Tensor, wanted: Tensor, floor: float) -> float:
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), floor)


def _gradient_error(subject: Subject, original: nn.Module, model: nn.Module) -> float:
    x = subject.draw(GRADIENT_LENGTH, int(MASKED_FRACTION * GRADIENT_LENGTH))

    def gradients(one: nn.Module) -> dict[str, Tensor]:
        one.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros(())
        for value, mask in subject.call(one, x):
            total = total + (value * torch.randn(value.shape, generator=generator))[mask > 0.5].mean()
        torch.autograd.backward(total)
        return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    wanted, found = gradients(original), gradients(model)
    if wanted.keys() != found.keys():
        return float("inf")
    # The softmax removes some biases: what is left of their gradients is noise.
    floor = 1e-2 * max(float(value.abs().max()) for value in wanted.values())
    return max(_error(found[name], value, floor) for name, value in wanted.items())


def _version(project: str, source: Path | None) -> str:
    if source is not None:
        command = ["git", "-C", str(source), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()[:7] if done.returncode == 0 else "unknown"
    names = {"esm": "fair-esm"}
    try:
        return importlib.metadata.version(names.get(project, project))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ----------------------------------------------------------------------------------------------------------- the rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| what, version, length | replaced | module: output, gradient | whole: output, gradient | ms, theirs -> ours "
        "| faster |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        timed = row["time"]
        times = f"{timed['a_ms']:.0f} -> {timed['b_ms']:.0f}" if timed else ""
        faster = f"{timed['ratio']:.1f}x ({timed['low']:.1f} to {timed['high']:.1f})" if timed else "not measured"
        lines.append(
            f"| {SUBJECTS[row['subject']].title} `{row['version']}`, {row['length']} | "
            f"{sum(row['replaced'].values())} of {sum(row['replaced'].values()) + row['left_alone']} | "
            f"{row['module_forward']:.0e}, {row['module_gradient']:.0e} | "
            f"{row['subject_forward']:.0e}, {row['subject_gradient']:.0e} | {times} | {faster} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure subjects and add their rows.

    Returns:
        0, or 1 when a row does not hold.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subjects", nargs="*", choices=[[], *SUBJECTS])
    parser.add_argument(
        "--source", type=Path, help="the project's checkout, for its commit; else its package's version"
    )
    parser.add_argument("--pairs", type=int, default=7, help="0 checks only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows measured so far")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    good = True
    for key in [] if options.table else options.subjects:
        row = measure(key, options.source, options.pairs)
        good = good and row.holds
        rows = [old for old in rows if old["subject"] != key] + [asdict(row)]
        rows.sort(key=lambda old: list(SUBJECTS).index(old["subject"]))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(table([asdict(row)]))
    if options.table or not options.subjects:
        print(table(rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
