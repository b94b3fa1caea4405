"""What the GPU suite runs: one kernel of an operation, a layer or the whole model, ours or in the original formulas.

An item names a subject and a side:

* `operation.<name>`: the operation alone at the published widths; the sides are its kernels, and of factorised
  attention, which has no layer here, `original`;
* `layer.<name>`: a layer with its projections; the sides are `original` and the kernels of its operation;
* `model`: Multiflow's model of the published size; the sides are `original` and presets.

Under `bfloat16` operations get tensors in bfloat16, layers and models run under autocast, the original too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldkernels.kernels.hardware import tf32
from foldkernels.kernels.testing import accuracy, contract_grid
from foldkernels.kernels.testing.cases.builders import SIZES, make
from foldkernels.kernels.testing.cases.case import Case

from . import multiflow_cpu, original_flash_ipa, original_triangle
from .multiflow_cpu import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
#: The operation of each layer.
LAYERS = {
    "ipa": "invariant_point_attention",
    "edge_transition": "edge_transition",
    "edge_features": "edge_features",
    "triangle_attention": "triangle_attention",
    "triangle_multiplication": "triangle_multiplication",
    "attention_pair_bias": "attention_pair_bias",
}
#: Operations whose original formulas are known for the operation alone, not for a layer with its projections.
ORIGINALS = ("factorized_point_attention",)
#: Boltz's widths: pairs, heads and head size of the triangle operations, width and heads of the sequence's attention.
C_Z, HEADS, HEAD_SIZE, C_S, SEQUENCE_HEADS = 128, 4, 32, 384, 16
SAMPLING_STEPS = 3


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        what: `check`, `grid`, `warm`, `time`, `longest`, `ceilings`, `describe` or `ready`.
        subject: See above.
        side: A kernel, a preset, or `original`.
        precision: `float32`, `tf32` or `bfloat16`.
        mode: `forward` (no gradients), `step` (forward, loss and backward, in training mode), or `sample`.
        length: Residues; the batch is one.
        gib: For `longest`, the memory that a smaller GPU would have.
    """

    what: str
    subject: str = ""
    side: str = ""
    precision: str = "bfloat16"
    mode: str = "forward"
    length: int = 0
    gib: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def __str__(self) -> str:
        words = (self.what, self.subject, self.side, self.precision, self.mode if self.what != "grid" else "")
        size = f"L={self.length}" if self.length else ""
        return " ".join(word for word in (*words, size, f"{self.gib:g} GiB" if self.gib else "") if word)


def rounding(item: Item) -> AbstractContextManager[None]:
    """PyTorch's own switch for float32 products, as the item wants it."""
    return tf32.switched(item.precision == "tf32")


def autocast(item: Item, device: str) -> Any:
    """What a layer or a model runs under."""
    return torch.autocast(device, torch.bfloat16) if item.precision == "bfloat16" else nullcontext()


def of(item: Item) -> str:
    """The subject without its kind."""
    return item.subject.partition(".")[2]


# Operations -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def published(operation: str, length: int, device: str) -> Case:
    """The operation's case at the published widths, one item, nothing masked. The last one is kept: kernels share it.

    An operation that nobody gave sizes for raises `NoExample`.
    """
    case = make(operation, length, seed=length)
    values = {name: None if value is None else value.to(device) for name, value in case.values.items()}
    return replace(case, values=values)


@contextmanager
def operation(item: Item, device: str) -> Iterator[Callable[[], object]]:
    """The call of one kernel; under `step` with every gradient."""
    case = published(of(item), item.length, device)
    step = item.mode == "step"
    x: dict[str, Any] = {}
    for name, value in case.values.items():
        if value is not None and value.is_floating_point():
            value = value.to(accuracy.given_dtype(case, name, item.dtype), copy=True)
            value.requires_grad_(step and name not in case.constants)
        x[name] = value
    wanted = [value for value in x.values() if value is not None and value.requires_grad]
    settings = {"precision": "tf32" if item.precision == "tf32" else "float32"}
    original = item.side == "original"
    kernel = "reference" if original else item.side
    with rounding(item), accuracy.required(case.operation, kernel, **settings) as config:
        cotangents: list[Tensor] = []

        def run() -> object:
            with torch.set_grad_enabled(step):
                outputs = _original(x) if original else case.call(x, config)
                if not step:
                    return outputs
                if not cotangents:
                    cotangents.extend(torch.randn_like(out) for out in outputs)
                return torch.autograd.grad(outputs, wanted, cotangents)

        yield run


def _original(x: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Factorised attention in FlashIPA's own order, all of it in one type, as there."""
    names = "q k v q_points k_points v_points point_weights b1 b2 z1 z2".split()
    *given, b1, b2, z1, z2 = (x[name].to(x["q"].dtype) for name in names)
    return original_flash_ipa.lifted_attention(*given, (b1, b2), (z1, z2))


def check_operation(item: Item, device: str, n: int, variant: str, size: int, **more: Any) -> dict[str, Any]:
    """Forward and every gradient against float64 by the contract's rule, and whether a second run gives the same bits.

    What fails is in the words of a red check.
    """
    dtype = item.dtype
    case = contract_grid.build(of(item), n, variant, size, **more)
    truth, plain = contract_grid.truth_and_plain(of(item), n, variant, size, dtype, device, tuple(more.items()))
    got, again = (accuracy.run(case, item.side, dtype, variant=variant, device=device) for _ in range(2))
    true, ours = truth.named(), got.named()
    errors = {name: accuracy.error(ours[name], x) / max(float(x.abs().max()), 1e-30) for name, x in true.items()}
    worst = max((name for name in errors if "output" in name), key=errors.__getitem__)
    result = {
        "correct": True,
        "check": f"n={n} {variant}: {worst} off by {errors[worst]:.1e} of its largest value",
        "error": errors[worst],
        "repeatable": all(torch.equal(x, again.named()[name]) for name, x in ours.items()),
    }
    try:
        for verdict in accuracy.judge(got, plain, truth, dtype):
            assert verdict.passed, str(verdict)
        for out, gone in zip(got.outputs, case.gone_outputs, strict=True):
            assert gone is None or not out.cpu()[gone].any(), "a row in which nothing takes part is not zero"
    except AssertionError as wrong:
        return {**result, "correct": False, "check": f"n={n} {variant}: {wrong}"}
    return result


def forget() -> None:
    """Let go of cases and of what they gave: their memory is not that of what is measured next."""
    published.cache_clear()
    contract_grid.build.cache_clear()
    contract_grid.truth_and_plain.cache_clear()


# Layers and the model -------------------------------------------------------------------------------------------------


class OriginalTriangle(nn.Module):
    """The original formulas of a triangle operation, with our module's weights, whose names are Boltz's."""

    def __init__(self, kind: str, weights: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        for name, part in weights.named_children():
            self.add_module(name, part)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        if self.kind == "attention_pair_bias":
            return original_triangle.attention_pair_bias(s, z, mask, weights, heads=SEQUENCE_HEADS)
        pairs = mask[:, :, None] * mask[:, None]
        run = getattr(original_triangle, self.kind)
        update: Tensor = run(z, pairs, weights)
        return update


def build(item: Item, device: str, dropout: float) -> nn.Module:
    """A layer or a model of one side, weights drawn, in the item's mode."""
    name = of(item) or "model"
    precision = "tf32" if item.precision == "tf32" else "float32"
    kernel: dict[str, Any] = {"fallback": "silent", "precision": precision}
    kernel |= {"preset": item.side} if name == "model" else {LAYERS[name]: item.side}
    original = item.side == "original"
    if "triangle" in name or name == "attention_pair_bias":
        import foldkernels
        from foldkernels.modules.attention_pair_bias import AttentionPairBiasV1
        from foldkernels.modules.triangle_attention import TriangleAttention
        from foldkernels.modules.triangle_multiplication import TriangleMultiplicationOutgoing

        module: nn.Module
        if name == "triangle_attention":
            module = TriangleAttention(C_Z, HEAD_SIZE, HEADS)
        elif name == "triangle_multiplication":
            module = TriangleMultiplicationOutgoing(C_Z)
        else:
            module = AttentionPairBiasV1(C_S, C_Z, SEQUENCE_HEADS)
        multiflow_cpu.draw_weights(module)
        if original:
            module = OriginalTriangle(name, module)
        else:
            foldkernels.bind(module.to(device), kernel)
    elif original:
        module = multiflow_cpu.build_original(name, dropout)
    else:
        module = multiflow_cpu.build_ours(name, dropout, kernel)
    return module.to(device).train(item.mode == "step")


def draw(item: Item, device: str, masked: int = 0) -> dict[str, Tensor]:
    """Inputs; the pair representation in the type that autocast makes of it."""
    drawn = multiflow_cpu.draw_inputs(item.length, masked, pairs=False)
    if item.subject != "model":
        z = torch.empty(1, item.length, item.length, C_Z, device=device)
        drawn["z"] = z.normal_(generator=torch.Generator(device).manual_seed(3))
    x = {name: value.to(device) for name, value in drawn.items()}
    if of(item) == "attention_pair_bias":
        x["s"] = torch.randn(1, item.length, C_S, generator=torch.Generator().manual_seed(2)).to(device)
    return {**x, "z": x["z"].to(item.dtype)}


def call(component: str, module: nn.Module, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a layer or a model of either side and name its outputs."""
    if isinstance(module, OriginalTriangle):
        return {"out": module(x["s"], x["z"], x["res_mask"].to(x["z"].dtype))}
    pairs = x["res_mask"][:, :, None] * x["res_mask"][:, None]
    if "triangle" in component:
        return {"out": module(x["z"], pairs)}
    if component == "attention_pair_bias":
        return {"out": module(x["s"], x["z"], x["res_mask"])}
    return multiflow_cpu.call(component, module, x)


class Autocast(nn.Module):
    """A model whose forward pass alone runs under autocast: the steps between are float32."""

    def __init__(self, model: nn.Module, item: Item, device: str) -> None:
        super().__init__()
        self.model, self.item, self.device = model, item, device

    def forward(self, batch: Any) -> Any:
        with autocast(self.item, self.device):
            return self.model(batch)


@contextmanager
def layer(item: Item, device: str) -> Iterator[Callable[[], object]]:
    """The call of a layer or of the model; one call of `sample` is `SAMPLING_STEPS` steps."""
    name = of(item) or "model"
    module = build(item, device, PUBLISHED["transformer_dropout"])
    x = draw(item, device)
    leaves = [] if name == "model" else [x["s"].requires_grad_(), x["z"].requires_grad_()]

    def forward() -> object:
        with torch.no_grad(), autocast(item, device):
            return call(name, module, x)

    def step() -> object:
        module.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None
        with autocast(item, device):
            outputs = call(name, module, x)
            value = torch.stack([(out.float() * directions(out)).mean() for out in outputs.values()]).sum()
        torch.autograd.backward(value)
        return value

    @lru_cache
    def direction(shape: torch.Size) -> Tensor:
        return torch.randn(shape, device=device)

    def directions(out: Tensor) -> Tensor:
        return direction(out.shape)

    def sample() -> object:
        from foldkernels.compat.multiflow.flow.interpolant import Interpolant

        model = Autocast(module, item, device)
        settings = {"num_timesteps": SAMPLING_STEPS, "seeds": [0], "keep_trajectory": False, "progress": False}
        return Interpolant({}).sample(1, item.length, model, **settings)  # type: ignore[arg-type]

    with rounding(item):
        yield {"forward": forward, "step": step, "sample": sample}[item.mode]


def check_layer(item: Item, device: str) -> dict[str, Any]:
    """Outputs and every gradient against the original formulas in float64, judged by their own error."""
    name = of(item) or "model"
    masked = max(1, item.length // 10)
    mode = "step" if item.mode == "step" else "forward"
    task = multiflow_cpu.Task(name, mode, item.length)
    sides = []
    for side, exact in (("original", True), ("original", False), (item.side, False)):
        this = replace(item, side=side, mode=mode, precision="float32" if exact else item.precision)
        module, x = build(this, device, 0.0), draw(item, device, masked)
        if exact:
            module, x = module.double(), {key: multiflow_cpu._double(value) for key, value in x.items()}
        with rounding(this), nullcontext() if exact else autocast(this, device):
            sides.append(multiflow_cpu.results(task, module, x, call))
    correct, words = multiflow_cpu.judge(name, item.precision, *sides)
    return {"correct": correct, "check": words}


def prepared(item: Item, device: str) -> Any:
    """A context that gives the call to time."""
    return operation(item, device) if item.subject.startswith("operation.") else layer(item, device)


# Floors ---------------------------------------------------------------------------------------------------------------


def needs(item: Item) -> tuple[float, float]:
    """Bytes that must be moved and operations that must be done, at the published widths; zeros where not counted.

    Of the pair tensor alone: what grows with the length alone is left out. A step needs the forward pass and the
    gradients of inputs and weights, three times the products; recomputing is a choice, and counts for nothing.
    """
    n, width, step = item.length, 2 if item.precision == "bfloat16" else 4, item.mode == "step"
    name = LAYERS.get(of(item), of(item))
    pairs, products = n * n, 3 if step else 1
    if item.subject == "model":
        blocks = int(PUBLISHED["ipa"]["num_blocks"])
        both = ("invariant_point_attention", "edge_transition")
        parts = [replace(item, subject=f"operation.{part}") for part in both]
        (z, f), (edge_bytes, edge_flops) = (needs(part) for part in parts)
        return blocks * z + (blocks - 1) * edge_bytes, blocks * f + (blocks - 1) * edge_flops
    if name == "invariant_point_attention":
        return pairs * 128 * width * (3 if step else 1), 0.0  # forward z; backward z again, and its gradient
    if name == "edge_transition":
        flops = 2 * (128 * 384 + 384 * 384 + 384 * 128 + 128 * 128) * products
        return pairs * 128 * width * (5 if step else 2), float(pairs * flops)  # backward: z, d_out, dz
    if name == "triangle_attention":
        return pairs * HEADS * HEAD_SIZE * width * (11 if step else 4), 4.0 * HEADS * HEAD_SIZE * n**3 * products
    if name == "triangle_multiplication":
        flops = 2.0 * C_Z * n**3 + 2.0 * pairs * (4 * C_Z * C_Z + 2 * C_Z * C_Z)
        return pairs * C_Z * width * (5 if step else 2), flops * products
    if name == "factorized_point_attention":  # nothing of n * n is in memory: logits and values, multiplied
        h, c, p, pv, r, cp = (SIZES[name][2][size] for size in ("h", "c", "p", "pv", "r", "cp"))
        return 0.0, 2.0 * pairs * h * (2 * c + 3 * p + 3 * pv + r + r * cp) * products
    if name == "attention_pair_bias":
        return pairs * 128 * width * (3 if step else 1), 4.0 * pairs * C_S * products
    if name == "edge_features":
        return pairs * 128 * width * (2 if step else 1), 0.0  # written; its gradient read
    return 0.0, 0.0
