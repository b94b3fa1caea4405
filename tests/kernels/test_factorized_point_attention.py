"""Factorised point attention: what lifting to 16 bits loses, flash-attn on a stand-in, limits and errors."""

from dataclasses import asdict
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.configs.kernel import KernelConfig
from foldkernels.kernels import registry
from foldkernels.kernels.factorized_point_attention import _lifting as lifting
from foldkernels.kernels.factorized_point_attention import factorized_point_attention, flash_attn, reference
from foldkernels.kernels.factorized_point_attention import torch as streamed
from foldkernels.kernels.factorized_point_attention._streamed import factorized_streamed
from foldkernels.kernels.hardware import machine
from foldkernels.kernels.hardware.machine import Machine
from foldkernels.kernels.registry.types import Dims, Request

from ..stand_ins import flash_attn as stand_in
from .kernel_cases import build

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
GPU = Machine("a GPU", "cuda", (9, 0), packages={"torch": "2.13.0", "flash-attn": "2.8.3", "triton": "3.7.1"})
#: The published layer: heads of 128, 8 query and 12 value points, rank 2, c_z 128.
PUBLISHED = {"h": 8, "c": 128, "p": 8, "pv": 12, "r": 2, "cp": 32}


# A protein ------------------------------------------------------------------------------------------------------------


def chain(n: int, extended: bool, g: torch.Generator) -> Tensor:
    """On a line that wavers, 0.38 nm apart (390 nm for 1,024 residues), or inside a ball as dense as proteins."""
    steps = torch.randn(n, 3, dtype=F64, generator=g)
    if extended:
        return (
            torch.cumsum(torch.nn.functional.normalize(steps + torch.tensor([4.0, 0, 0], dtype=F64), dim=-1), 0) * 0.38
        )
    # 2.2 N^0.38 Angstrom is a folded chain's radius of gyration.
    directions = torch.nn.functional.normalize(steps, dim=-1)
    radius = 0.22 * n**0.38 * sqrt(5 / 3)
    return directions * radius * torch.rand(n, 1, dtype=F64, generator=g) ** (1 / 3)


def rotation(g: torch.Generator) -> Tensor:
    found, _ = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=g))
    return found * torch.det(found)


class Protein:
    """Frames, and what a layer of the published size projects from its nodes, points in local frames."""

    def __init__(self, n: int = 1024, extended: bool = False, heads: int = 2, seed: int = 0, **sizes: int) -> None:
        g = torch.Generator().manual_seed(seed)
        size = {**PUBLISHED, "h": heads, **sizes}
        h, rank, cp = size["h"], size["r"], size["cp"]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(1, n, *shape, dtype=F64, generator=g)

        self.places = chain(n, extended, g)
        self.turns = torch.stack([rotation(g) for _ in range(n)])
        self.scalars = [normal(h, size["c"]).to(BF16) for _ in range(3)]
        self.points = [normal(h, size[p], 3, scale=0.5) for p in ("p", "p", "pv")]
        self.weights = torch.rand(h, dtype=F64, generator=g) + 0.5
        self.bias = tuple(normal(h, rank).to(BF16) for _ in range(2))
        self.pair = tuple(normal(rank, cp).to(BF16) for _ in range(2))

    def inputs(self, dtype: torch.dtype, offset: Tensor | float = 0.0, turn: Tensor | None = None) -> list[Any]:
        """The operation's arguments, moved as a whole: scalars as in bfloat16, points as in float32."""
        turn = torch.eye(3, dtype=F64) if turn is None else turn
        self.moved = (self.places @ turn.T + offset, turn @ self.turns)
        places, turns = (x.to(F32) for x in self.moved)
        points = [torch.einsum("nxy,bnhpy->bnhpx", turns, x.to(F32)) + places[:, None, None] for x in self.points]
        wide = torch.promote_types(dtype, F32)
        factors = [tuple(x.to(dtype) for x in pair) for pair in (self.bias, self.pair)]
        return [*(x.to(dtype) for x in self.scalars), *(x.to(wide) for x in points), self.weights.to(wide), *factors]

    def local(self, out: tuple[Tensor, ...]) -> Tensor:
        """The outputs side by side, points in their residue's frame, as a layer goes on with them."""
        places, turns = self.moved
        points = torch.einsum("nyx,bnhpy->bnhpx", turns, out[1].double() - places[:, None, None])
        return torch.cat([out[0].double().flatten(2), points.flatten(2), out[2].double().flatten(2)], -1)


DIRECTION = torch.tensor([0.6, -0.64, 0.48], dtype=F64)
CONFIG = KernelConfig(preset="auto")


def rows(inputs: list[Any], precise: bool, inner: torch.dtype) -> Tensor:
    """The attention that lifted queries and keys give, products summed in float32 or wider, as matrix units do."""
    lifted = lifting.lift(*inputs, None, precise, inner)
    wide = torch.promote_types(inner, F32)
    return torch.einsum("bihd,bjhd->bhij", lifted.q.to(wide), lifted.k.to(wide)).double().softmax(-1)


def off(found: Tensor, true: Tensor) -> float:
    """The largest total variation of a row."""
    return float(0.5 * (found - true).abs().sum(-1).max())


# What lifting loses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("extended", [False, True], ids=["globule", "extended"])
def test_rows_of_the_attention_in_bfloat16(extended, offset):
    """Within 0.005 of float64, with sums in float32. Rounded once, as FlashIPA does, rows are wrong off the origin."""
    protein = Protein(extended=extended)
    away = offset * DIRECTION
    true = rows(protein.inputs(F64, away), True, F64)
    found = {precise: off(rows(protein.inputs(BF16, away), precise, BF16), true) for precise in (True, False)}
    print(f"{'extended' if extended else 'globule'} at {offset} nm: {found[True]:.5f}, plain {found[False]:.5f}")
    assert found[True] < 0.005
    assert found[False] > 0.03 or (not extended and offset < 10.0)


def change(protein: Protein, kernel: Any, distance: float, precise: bool, dtype: torch.dtype) -> tuple[float, float]:
    """How much the outputs change when the protein is turned and moved: the largest number, and the norm's part."""
    g = torch.Generator().manual_seed(3)
    before = protein.local(kernel(*protein.inputs(dtype), None, precise, BF16))
    moved = protein.inputs(dtype, distance * DIRECTION, rotation(g))
    after = protein.local(kernel(*moved, None, precise, BF16))
    return float((after - before).abs().max()), float((after - before).norm() / before.norm())


@pytest.mark.parametrize("extended", [False, True], ids=["globule", "extended"])
def test_turned_and_moved_by_100_nm(extended):
    """A layer in float32 that allows bfloat16, streamed: below 1e-3 of the outputs' norm."""
    largest, part = change(Protein(512, extended), streamed.run, 100.0, True, F32)
    print(f"largest change {largest:.2g}, {part:.2g} of the norm")
    assert part < 1e-3 and largest < 1e-2


def test_turned_and_moved_where_all_is_in_16_bits():
    """flash-attn gives attended points in bfloat16: 1e-2 at any distance, where FlashIPA's lifting loses everything."""
    protein = Protein(512)
    for distance in (5.0, 100.0):
        precise, plain = (change(protein, in_16_bits, distance, how, F32)[1] for how in (True, False))
        print(f"{distance} nm: {precise:.2g}, plain {plain:.2g}")
        assert precise < 0.01 < plain
        assert distance < 100.0 or plain > 0.5


def in_16_bits(*given: Any) -> Any:
    """flash-attn's arithmetic, by PyTorch's fused attention on the CPU."""
    lifted = lifting.lift(*given)
    v, v_points, pair, mask = given[2], given[5], given[8], given[9]
    out = streamed._attend(*(x.transpose(1, 2) for x in (lifted.q, lifted.k, lifted.v))).transpose(1, 2)
    return lifting.split_values(out, lifted.centre, v, v_points, pair, mask)


def test_plain_lifting_is_flash_ipas():
    """Its own columns, in its own order, rounded once: the same bits."""
    q, k, v, q_points, k_points, v_points, weights, (b1, b2), (z1, z2) = Protein(16).inputs(F32, 3.0)
    c, p = 128, 8
    head_weights = weights * sqrt(1.0 / (3 * (p * 9.0 / 2)))
    q_norms, k_norms = (torch.norm(x, dim=-1) ** 2 for x in (q_points, k_points))
    wide = head_weights.view(1, 1, -1, 1)
    of_q = [q, q_points.flatten(-2), q_norms, torch.ones_like(q_norms), b1]
    of_k = [
        k * sqrt(1.0 / (3 * c)),
        k_points.flatten(-2) * wide,
        torch.ones_like(k_norms) * -0.5 * wide,
        k_norms * -0.5 * wide,
    ]
    of_v = [v, v_points.flatten(-2), z2.flatten(-2)[:, :, None].expand(-1, -1, 2, -1)]
    lifted = lifting.lift(q, k, v, q_points, k_points, v_points, weights, (b1, b2), (z1, z2), None, False, BF16)
    assert torch.equal(lifted.q, torch.cat(of_q, -1).to(BF16)) and torch.equal(lifted.v, torch.cat(of_v, -1).to(BF16))
    theirs = torch.cat([*of_k, b2], -1).to(BF16)
    # A square may be rounded one way or the other: it is a root's here, and a product's there.
    torch.testing.assert_close(lifted.k, theirs, rtol=2**-7, atol=0.0)
    assert (lifted.k == theirs).double().mean() > 0.99


@pytest.mark.parametrize("inner", [F16, BF16, F32, F64])
@pytest.mark.parametrize("precise", [True, False])
def test_widths(inner, precise):
    """What `supports` counts is what `lift` makes."""
    lifted = lifting.lift(*Protein(5).inputs(F64), None, precise, inner)
    assert lifted.q.dtype is lifted.k.dtype is lifted.v.dtype is inner
    expected = lifting.query_width(128, 8, 2, precise=precise, narrow=inner.itemsize == 2)
    assert lifted.q.shape[-1] == lifted.k.shape[-1] == expected
    assert lifted.v.shape[-1] == lifting.value_width(128, 12, 2, 32) == 228


# flash-attn -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "library", stand_in, raising=False)


def outcome(run: Any, n: int, variant: str, precise: bool = True, inner: torch.dtype = F64) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, in float64."""
    x = dict(build("factorized_point_attention", n, variant).values)
    names = [name for name, value in x.items() if value is not None and value.is_floating_point()]
    x |= {name: x[name].clone().requires_grad_() for name in names}
    factors = [(x[a], x[b]) if x[a] is not None else None for a, b in (("b1", "b2"), ("z1", "z2"))]
    first = [x[name] for name in "q k v q_points k_points v_points point_weights".split()]
    out = [y for y in run(*first, *factors, x["mask"], precise, inner) if y is not None]
    g = torch.Generator().manual_seed(1)
    asked = [torch.randn(y.shape, dtype=y.dtype, generator=g) for y in out]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, [x[name] for name in names], asked)]


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(found, true, strict=True))


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("variant", ["plain", "masked"])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 17])
def test_through_flash_attn(n, variant, precise, library):
    """Forward and every gradient, with all factors, none, and either one."""
    assert worst(outcome(flash_attn.run, n, variant, precise), outcome(reference.run, n, variant)) < 1e-10


@pytest.mark.parametrize("inner", [BF16, F16])
def test_through_flash_attn_in_16_bits(inner, library):
    found, true = (outcome(run, 17, "masked", True, inner) for run in (flash_attn.run, reference.run))
    assert 1e-5 < worst(found[:3], true[:3]) < 0.08
    for gradient, expected in zip(found[3:], true[3:], strict=True):
        assert float((gradient - expected).abs().max()) < 0.03 * float(expected.abs().max()) + 0.02


def decision(config: Any = "flash", on: Machine = GPU, dtype: torch.dtype = BF16, **more: Any) -> Any:
    options = frozenset(more.pop("options", ("bias_factors", "pair_factors")))
    dims = Dims({"n": 64, **PUBLISHED, **more})
    request = Request("factorized_point_attention", on.device, dtype, dims, on.capability, options=options)
    return registry.decide(request, config, on)


def test_the_choice():
    assert decision("auto").kernel.name == decision("flash").kernel.name == "flash_attn"
    assert decision("torch").kernel.name == "torch"
    assert decision(dtype=F32).kernel.name == "torch"
    assert (
        decision(on=machine.MACHINES["mac"]).kernel.name == "torch"
        and not decision(on=machine.MACHINES["mac"]).fell_back
    )


def test_what_flash_attn_cannot_take_is_said():
    """Wider than 256: the limit, and the kernels that have none."""
    for wide in ({"c": 256}, {"r": 4}, {"p": 12}):
        assert decision(**wide).kernel.name == "torch"
        with pytest.raises(registry.KernelUnavailable, match="takes 256 at most") as refusal:
            decision({"factorized_point_attention": "flash_attn"}, **wide)
        assert "'torch' or 'triton', which have no such limit" in str(refusal.value)
    assert decision(p=12, options=["plain_lifting"]).kernel.name == "flash_attn"


# Sizes that flash-attn refuses, and mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [F32, BF16])
def test_wide_heads_run(inner):
    """c_hidden 256, rank 4, 12 value points."""
    protein = Protein(33, c=256, r=4)
    given = protein.inputs(F32)
    out = factorized_point_attention(*given, attention_dtype=inner, config=registry.token(CONFIG))
    for found, true in zip(out, reference.run(*protein.inputs(F64), None, True, F64), strict=True):
        assert found.dtype is F32 and float((found - true).abs().max()) < 2e-5


@pytest.mark.parametrize("variant", ["plain", "masked"])
def test_the_streamed_operator_is_one(variant):
    """PyTorch's own checks, forward and backward."""
    x = build("factorized_point_attention", 7, variant).values
    first = [x[name].flatten(3) for name in "q k v q_points k_points v_points".split()]
    given = [*first, x["point_weights"], x["b1"], x["b2"], x["z2"].flatten(-2)]
    given = [y.detach().clone().requires_grad_() for y in given]
    centre = torch.ones(len(x["q"]), 3, dtype=F64)
    found = torch.library.opcheck(factorized_streamed, (*given, centre, x["mask"]))
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_memory_grows_with_length(mode):
    """By the power of 1.1 at most, and a tenth of what holding the softmax takes."""
    from benchmarks.studies import flash_ipa_cpu as benchmark
    from benchmarks.studies.rows import extra_peak_memory
    from foldkernels.benchmarks.measure.statistics import power_law

    lengths = (512, 1024, 2048)
    tasks = [asdict(benchmark.Task(mode, length)) for length in lengths]
    memory = [extra_peak_memory(benchmark.prepare_memory, task, True) for task in tasks]
    print(mode, memory)
    fit = power_law(lengths, memory)
    assert fit is not None and fit.exponent < 1.1
    if mode == "forward":
        assert memory[-1] < 0.1 * extra_peak_memory(benchmark.prepare_memory, tasks[-1], False)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"pair_factors": (torch.zeros(1, 5, 3, 4),) * 2}, r"one rank, not \[2, 2, 3, 3\]"),
        ({"lifting": "exact"}, "'precise' or 'plain', not 'exact'"),
        ({"attention_dtype": torch.int32}, "a floating type, not torch.int32"),
    ],
)
def test_mistakes(wrong, why):
    given = Protein(5).inputs(F32)
    names = "q k v q_points k_points v_points point_weights bias_factors pair_factors".split()
    with pytest.raises(ValueError, match=why):
        factorized_point_attention(**{**dict(zip(names, given, strict=True)), **wrong})
