"""The pair modules beyond the goldens: gradients, orientation, dropout, checkpointing, memory, wrong input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.attention_pair_bias import AttentionPairBias, AttentionPairBiasV1
from foldkernels.modules.dropout import pair_dropout
from foldkernels.modules.outer_product_mean import OuterProductMean
from foldkernels.modules.pair_weighted_averaging import PairWeightedAveraging
from foldkernels.modules.pairformer import (
    PairformerLayer,
    PairformerModule,
    PairformerNoSeqLayer,
    PairformerNoSeqModule,
)
from foldkernels.modules.transition import Transition
from foldkernels.modules.triangle_attention import (
    TriangleAttention,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)
from foldkernels.modules.triangle_multiplication import TriangleMultiplicationIncoming, TriangleMultiplicationOutgoing

pytestmark = pytest.mark.quick

KERNELS = ("reference", "torch")
C_S, C_Z, HEADS, WIDTH, PAIR_HEADS = 12, 8, 3, 5, 2


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """With weights that are nowhere zero: many start there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            x = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.4 * (x + 0.2 * x.sign()))
    return module


def inputs(n: int = 6, b: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, z, mask, and a pair mask that is no mask over residues: asymmetric, with an empty row."""
    generator = torch.Generator().manual_seed(n)
    s = torch.randn(b, n, C_S, generator=generator, dtype=dtype)
    z = torch.randn(b, n, n, C_Z, generator=generator, dtype=dtype)
    mask = torch.ones(b, n, dtype=dtype)
    mask[-1, -2:] = 0
    pair_mask = (torch.rand(b, n, n, generator=generator) < 0.7).to(dtype)
    pair_mask[0, 1] = 0
    return s, z, mask, pair_mask


def layer(no_seq: bool = False, **more: object) -> PairformerLayer | PairformerNoSeqLayer:
    sizes = {"pairwise_head_width": WIDTH, "pairwise_num_heads": PAIR_HEADS, **more}
    made: nn.Module
    if no_seq:
        made = PairformerNoSeqLayer(C_Z, **sizes)  # type: ignore[arg-type]
    else:
        made = PairformerLayer(C_S, C_Z, HEADS, **{"v2": True, **sizes})  # type: ignore[arg-type]
    return drawn(made)  # type: ignore[return-value]


def stack(no_seq: bool = False, **more: object) -> PairformerModule | PairformerNoSeqModule:
    sizes = {"num_blocks": 2, "pairwise_head_width": WIDTH, "pairwise_num_heads": PAIR_HEADS, **more}
    made: nn.Module
    if no_seq:
        made = PairformerNoSeqModule(C_Z, **sizes)  # type: ignore[arg-type]
    else:
        made = PairformerModule(C_S, C_Z, num_heads=HEADS, **{"v2": True, **sizes})  # type: ignore[arg-type]
    return drawn(made)  # type: ignore[return-value]


def run(module: nn.Module, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor, **more: object) -> tuple[Tensor, ...]:
    """Whatever the module is: with a sequence, or without."""
    if isinstance(module, (PairformerLayer, PairformerModule)):
        out: tuple[Tensor, ...] = module(s, z, mask, pair_mask, **more)
        return out
    return (module(z, pair_mask, **more),)


# Gradients ------------------------------------------------------------------------------------------------------------


def to_keys(x: Tensor) -> Tensor:
    """Other keys than queries: three tokens, one of them twice."""
    return x[:, [0, 3, 0, 1]]


GRADCHECKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "triangle attention, starting": (
        lambda: TriangleAttentionStartingNode(C_Z, WIDTH, PAIR_HEADS),
        lambda m, s, z: m(z, inputs(4)[3][:1]),
    ),
    "triangle attention, ending": (
        lambda: TriangleAttentionEndingNode(C_Z, WIDTH, PAIR_HEADS),
        lambda m, s, z: m(z, inputs(4)[3][:1]),
    ),
    "triangle multiplication, outgoing": (
        lambda: TriangleMultiplicationOutgoing(C_Z),
        lambda m, s, z: m(z, inputs(4)[3][:1]),
    ),
    "triangle multiplication, incoming": (
        lambda: TriangleMultiplicationIncoming(C_Z),
        lambda m, s, z: m(z, inputs(4)[3][:1]),
    ),
    "attention with pair bias, other keys": (
        lambda: AttentionPairBias(C_S, C_Z, HEADS),
        lambda m, s, z: m(s.tile(2, 1, 1), z, torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 1]]), s.tile(2, 1, 1).flip(1), 2),
    ),
    "attention with pair bias, given": (
        lambda: AttentionPairBias(C_S, num_heads=HEADS, compute_pair_bias=False),
        lambda m, s, z: m(s, z[..., :HEADS], torch.tensor([[1.0, 0, 1, 1]]), s),
    ),
    "attention with pair bias, version 1": (
        lambda: AttentionPairBiasV1(C_S, C_Z, HEADS),
        lambda m, s, z: m(s, z, torch.tensor([[1.0, 0, 1, 1]]), to_keys=to_keys),
    ),
    "outer product mean": (
        lambda: OuterProductMean(C_Z, 3, 4),
        lambda m, s, z: m(z, inputs(4)[3][:1]),
    ),
    "pair-weighted averaging": (
        lambda: PairWeightedAveraging(C_S, C_Z, 4, HEADS),
        lambda m, s, z: m(s[:, None], z, inputs(4)[3][:1]),
    ),
    "transition": (lambda: Transition(C_Z, 7, 3), lambda m, s, z: m(z)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradients_in_float64(name: str, kernel: str) -> None:
    make, call = GRADCHECKS[name]
    module = drawn(make()).double()
    bind(module, kernel)
    s, z, _, _ = inputs(4, 1, torch.float64)
    s, z = s.requires_grad_(), z.requires_grad_()
    names = [name for name, _ in module.named_parameters()]
    caller = _Caller(module, call)

    def function(s: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        changed = {f"module.{name}": weight for name, weight in zip(names, weights, strict=True)}
        out: Tensor = torch.func.functional_call(caller, changed, (s, z))
        return out

    assert torch.autograd.gradcheck(function, (s, z, *module.parameters()), fast_mode=True)


class _Caller(nn.Module):
    """Calls a module in a way of one's own: `functional_call` wants it so."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return self.call(self.module, s, z)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_in_float64(kernel: str) -> None:
    """The gradient of a whole layer along random directions, against differences."""
    module = layer().double().eval()
    bind(module, kernel)
    s, z, mask, pair_mask = inputs(4, 1, torch.float64)

    def function(s: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return run(module, s, z, mask, pair_mask)

    assert torch.autograd.gradcheck(function, (s.requires_grad_(), z.requires_grad_()), fast_mode=True)


# Orientation and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ending_node_is_the_starting_node_of_the_transpose(kernel: str) -> None:
    start = drawn(TriangleAttentionStartingNode(C_Z, WIDTH, PAIR_HEADS))
    end = TriangleAttentionEndingNode(C_Z, WIDTH, PAIR_HEADS)
    end.load_state_dict(start.state_dict(), strict=True)
    for module in (start, end):
        bind(module, kernel)
    _, z, _, pair_mask = inputs(9)
    assert not torch.equal(pair_mask, pair_mask.mT)
    found = end(z, pair_mask)
    torch.testing.assert_close(found, start(z.transpose(1, 2), pair_mask.mT).transpose(1, 2), atol=1e-6, rtol=1e-6)
    # Neither transpose may be left out.
    assert (found - start(z.transpose(1, 2), pair_mask).transpose(1, 2)).abs().max() > 0.01
    assert (found - start(z, pair_mask)).abs().max() > 0.01


def test_starting_is_an_argument_as_in_boltz() -> None:
    assert TriangleAttentionStartingNode is TriangleAttention
    assert not TriangleAttentionEndingNode(C_Z, WIDTH, PAIR_HEADS, inf=1e9).starting
    as_argument = TriangleAttention(C_Z, WIDTH, PAIR_HEADS, False)
    as_class = TriangleAttentionEndingNode(C_Z, WIDTH, PAIR_HEADS)
    drawn(as_argument)
    drawn(as_class)
    _, z, _, pair_mask = inputs(5)
    assert torch.equal(as_argument(z, pair_mask), as_class(z, pair_mask))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: TriangleAttentionStartingNode(C_Z, WIDTH, PAIR_HEADS),
        lambda: TriangleAttentionEndingNode(C_Z, WIDTH, PAIR_HEADS),
        lambda: TriangleMultiplicationOutgoing(C_Z),
        lambda: TriangleMultiplicationIncoming(C_Z),
    ],
)
def test_batches_of_any_shape_and_no_mask(make: Callable[[], nn.Module], kernel: str) -> None:
    module = drawn(make())
    bind(module, kernel)
    _, z, _, pair_mask = inputs(5)
    expected = module(z, pair_mask)
    torch.testing.assert_close(module(z[0], pair_mask[0]), expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(module(z[:, None], pair_mask[:, None] > 0.5)[:, 0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(module(z, None), module(z, torch.ones_like(pair_mask)), atol=1e-6, rtol=1e-6)
    assert (module(z, None) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_residues_that_are_not_there_change_nothing(kernel: str) -> None:
    module = stack().eval()
    bind(module, kernel)
    s, z, mask, _ = inputs(7)
    pair_mask = mask[:, :, None] * mask[:, None, :]
    there = mask > 0.5
    first = run(module, s, z, mask, pair_mask)
    s2, z2 = s.clone(), z.clone()
    s2[~there] = 50.0
    z2[~(pair_mask > 0.5)] = -50.0
    second = run(module, s2, z2, mask, pair_mask)
    torch.testing.assert_close(second[0][there], first[0][there], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(second[1][pair_mask > 0.5], first[1][pair_mask > 0.5], atol=1e-6, rtol=1e-6)


# Attention with pair bias ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_multiplicity_shares_a_pair_representation(kernel: str) -> None:
    module = drawn(AttentionPairBias(C_S, C_Z, HEADS))
    bind(module, kernel)
    s, z, mask, _ = inputs(6)
    many = torch.cat([s[:1], s[:1] + 1, s[1:], s[1:] - 1])
    masks = mask.repeat_interleave(2, 0)
    expected = module(many, z.repeat_interleave(2, 0), masks, many)
    torch.testing.assert_close(module(many, z, masks, many, multiplicity=2), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(module(many, z, mask, many, multiplicity=2), expected, atol=1e-6, rtol=1e-6)
    assert (module(many, z.flip(0), masks, many, multiplicity=2) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_cached_bias_is_boltzs(kernel: str, grad: bool) -> None:
    """It is kept before the multiplicity, heads first, and later calls do not read z."""
    module = drawn(AttentionPairBiasV1(C_S, C_Z, HEADS))
    bind(module, kernel)
    s, z, mask, _ = inputs(6)
    cache: dict[str, Tensor] = {}
    with torch.set_grad_enabled(grad):
        expected = module(s, z, mask)
        first = module(s, z, mask, model_cache=cache)
        torch.testing.assert_close(cache["z"], module.proj_z(z).permute(0, 3, 1, 2), atol=1e-6, rtol=1e-5)
        second = module(s, torch.full_like(z, torch.nan), mask, model_cache=cache)
        twice = module(s.repeat_interleave(2, 0), z, mask.repeat_interleave(2, 0), 2, model_cache=cache)
    for found in (first, second, twice[::2]):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_keys_and_their_mask(kernel: str) -> None:
    """Version 1 through `to_keys`, version 2 through `k_in`: both against the full attention's own keys."""
    v1 = drawn(AttentionPairBiasV1(C_S, C_Z, HEADS, initial_norm=False))
    v2 = AttentionPairBias(C_S, C_Z, HEADS)
    v2.load_state_dict(v1.state_dict(), strict=True)
    for module in (v1, v2):
        bind(module, kernel)
    s, z, mask, _ = inputs(6)
    z_keys = z[:, :, [0, 3, 0, 1]]
    mask[:, 3] = 0
    found = v1(s, z_keys, mask, to_keys=to_keys)
    torch.testing.assert_close(found, v2(s, z_keys, mask[:, [0, 3, 0, 1]], to_keys(s)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, v1(s, z_keys, mask > 0.5, to_keys=to_keys), atol=1e-6, rtol=1e-6)
    assert (found - v1(s, z_keys, torch.ones_like(mask), to_keys=to_keys)).abs().max() > 0.01


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (Transition(C_Z, 1024, 5), (torch.randn(2, 40, 31, C_Z),)),
        (OuterProductMean(C_Z, 16, 5), (torch.randn(2, 3, 71, C_Z), (torch.rand(2, 3, 71) < 0.7).float())),
        (
            PairWeightedAveraging(C_S, C_Z, 4, HEADS),
            (torch.randn(2, 3, 7, C_S), torch.randn(2, 7, 7, C_Z), (torch.rand(2, 7, 7) < 0.7).float()),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_without_gradients_the_result_is_the_same(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Then they work on a few rows at a time; these inputs take several blocks, the last a short one."""
    drawn(module)
    whole = module(*arguments).detach()
    calls: list[object] = []
    if hasattr(module, "_rows"):
        rows = module._rows
        module._rows = lambda *given: calls.append(given) or rows(*given)  # type: ignore[assignment, func-returns-value]
    with torch.no_grad():
        streamed = module(*arguments)
    assert not hasattr(module, "_rows") or len(calls) > 2
    torch.testing.assert_close(streamed, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("no_seq", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_inference_in_place_is_inference(no_seq: bool, kernel: str, rate: float) -> None:
    """The residual sums are taken in place: never in what the caller gave, unless the caller offers it."""
    for module in (layer(no_seq, inference_dropout=rate).eval(), stack(no_seq, inference_dropout=rate).eval()):
        bind(module, kernel)
        given = inputs()
        kept = [x.clone() for x in given]
        torch.manual_seed(1)
        expected = run(module, *given)
        with torch.no_grad():
            torch.manual_seed(1)
            found = run(module, *given)
            assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))
            torch.manual_seed(1)
            overwritten = run(module, given[0], given[1].clone(), *given[2:], overwrite_z=True)
        for one, other in ((found, expected), (overwritten, expected)):
            for x, y in zip(one, other, strict=True):
                torch.testing.assert_close(x, y, atol=1e-5 * float(y.detach().abs().max()), rtol=1e-5)


class Same(nn.Module):
    """An update that costs its result and no more."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return z.clone()


@pytest.mark.parametrize(("no_seq", "overwrite_z", "most"), [(True, False, 2), (True, True, 1), (False, False, 2)])
def test_memory_of_a_layer(no_seq: bool, overwrite_z: bool, most: int) -> None:
    """What an inference holds beside the caller's z: one pair tensor of its own, and the update at work."""
    module = layer(no_seq).eval()
    for name in ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end", "transition_z"):
        setattr(module, name, Same())
    given = inputs(64, 1)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(module, *given, overwrite_z=overwrite_z)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    pair_tensor = given[1].numel() * 4
    assert most * pair_tensor <= peak < (most + 0.9) * pair_tensor  # small as they are, sequence and bias show


# Training -------------------------------------------------------------------------------------------------------------


def gradients(module: nn.Module, seed: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    s, z, mask, pair_mask = inputs()
    torch.manual_seed(seed)
    outs = run(module, s, z, mask, pair_mask)
    module.zero_grad()
    torch.stack([(out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outs]).sum().backward()
    return outs, {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("no_seq", [False, True])
def test_checkpointing_changes_no_gradient(no_seq: bool, kernel: str) -> None:
    """Under one seed, with dropout; another seed gives others."""
    plain = stack(no_seq, dropout=0.4).train()
    saving = stack(no_seq, dropout=0.4, activation_checkpointing=True).train()
    for module in (plain, saving):
        bind(module, kernel)
    outs, expected = gradients(plain, 3)
    with record_kernels() as ran:
        outs_again, found = gradients(saving, 3)
    assert len(expected) == len(list(plain.parameters()))
    assert len(ran) == 2 * 2 * (4 if no_seq else 5)  # two layers, and each once more for the backward pass
    for x, y in zip(outs_again, outs, strict=True):
        assert torch.equal(x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    others = gradients(plain, 4)[1]
    assert any((others[name] - gradient).abs().max() > 0.01 for name, gradient in expected.items())


@pytest.mark.parametrize("v2", [False, True])
def test_a_training_step_lowers_the_loss(v2: bool) -> None:
    module = stack(v2=v2, dropout=0.2, activation_checkpointing=True).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    s, z, mask, pair_mask = inputs()
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        found_s, found_z = run(module, s, z, mask, pair_mask)
        loss = found_s.square().mean() + found_z.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_fresh_layer_changes_nothing_and_learns() -> None:
    """Every branch ends in zeros, as Boltz's do, and a gradient reaches what ends it."""
    module = PairformerLayer(C_S, C_Z, HEADS, 0.0, WIDTH, PAIR_HEADS, v2=True)
    s, z, mask, pair_mask = inputs()
    found_s, found_z = module(s, z, mask, pair_mask)
    assert torch.equal(found_s, s)
    assert torch.equal(found_z, z)
    (found_s.square().sum() + found_z.square().sum()).backward()
    for weight in (module.attention.proj_o, module.tri_mul_out.p_out, module.tri_att_end.mha.linear_o):
        assert weight.weight.grad is not None
        assert weight.weight.grad.abs().max() > 0


def test_dropout_is_drawn_as_boltz_draws_it() -> None:
    """Whole rows, or columns; from the default generator, one number each; what stays is scaled up."""
    z = torch.randn(2, 300, 200, 3)
    for columnwise, shape in ((False, (2, 300, 1, 1)), (True, (2, 1, 200, 1))):
        torch.manual_seed(5)
        factor = pair_dropout(0.25, z, columnwise)
        torch.manual_seed(5)
        expected = (torch.rand(shape) >= 0.25) / 0.75
        assert factor is not None
        assert torch.equal(factor, expected)
        assert 0.6 < float((factor > 0).float().mean()) < 0.9
    state = torch.get_rng_state()
    assert pair_dropout(0.0, z) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("no_seq", [False, True])
def test_dropout_in_training_and_outside(no_seq: bool) -> None:
    module = layer(no_seq, dropout=0.5).train()
    torch.manual_seed(0)
    first, second = run(module, *inputs())[-1], run(module, *inputs())[-1]
    assert (first - second).abs().max() > 0.1
    module.eval()
    assert torch.equal(run(module, *inputs())[-1], run(module, *inputs())[-1])
    both = layer(no_seq, dropout=0.0, inference_dropout=0.5)
    assert torch.equal(run(both.train(), *inputs())[-1], run(both, *inputs())[-1])
    assert (run(both.eval(), *inputs())[-1] - run(both, *inputs())[-1]).abs().max() > 0.1


def test_dropout_drops_rows_of_three_updates_and_columns_of_the_fourth() -> None:
    """With one update alone and the others zero, the difference from z shows which."""
    _, z, _, pair_mask = inputs(12, 1)
    for name, end, axis in (
        ("tri_mul_out", "p_out", 2),
        ("tri_mul_in", "p_out", 2),
        ("tri_att_start", "mha.linear_o", 2),
        ("tri_att_end", "mha.linear_o", 1),
    ):
        module = layer(no_seq=True, dropout=0.5).train()
        for other in (
            "tri_mul_out.p_out",
            "tri_mul_in.p_out",
            "tri_att_start.mha.linear_o",
            "tri_att_end.mha.linear_o",
        ):
            if other != f"{name}.{end}":
                nn.init.zeros_(module.get_submodule(other).weight)  # type: ignore[arg-type]
        nn.init.zeros_(module.transition_z.fc3.weight)
        torch.manual_seed(0)
        dropped = (module(z, torch.ones_like(pair_mask)) - z).abs().sum(-1) == 0
        whole = dropped.all(axis)  # [1, rows] or [1, columns]
        assert 0 < int(whole.sum()) < 12, name
        assert torch.equal(dropped, (whole[:, :, None] if axis == 2 else whole[:, None, :]).expand_as(dropped)), name


def test_autocast_leaves_the_sequence_in_float32() -> None:
    module = layer().eval()
    s, z, mask, pair_mask = inputs()
    expected_s, expected_z = run(module, s, z, mask, pair_mask)
    with torch.autocast("cpu", torch.bfloat16):
        found_s, found_z = run(module, s, z, mask, pair_mask)
    assert found_s.dtype is found_z.dtype is torch.float32
    assert (found_z - expected_z).abs().max() < 0.1 * expected_z.abs().max()
    # The sequence half alone, on the same z: nothing was rounded to bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        update = module.attention(s, z, mask, s)
    assert update.dtype is torch.bfloat16
    assert not torch.equal(found_s, found_s.bfloat16().float())
    torch.testing.assert_close(expected_s, found_s, atol=0.2 * float(expected_s.abs().max()), rtol=0.1)


def test_a_model_in_bfloat16_runs() -> None:
    module = layer().eval()
    given = inputs()
    expected = run(module, *given)
    found = run(module.bfloat16(), *(x.bfloat16() for x in given))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype is torch.bfloat16
        assert (x - y).abs().max() < 0.15 * y.abs().max()


def test_copies_and_pickles() -> None:
    module = stack().eval()
    bind(module, "torch")
    expected = run(module, *inputs())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(run(again, *inputs())[1], expected[1])


# Wrong input ----------------------------------------------------------------------------------------------------------


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"AttentionPairBias: 5 heads cannot share a width of 12; give it 3, 4 or 6 heads"
    ):
        AttentionPairBias(12, 8, 5)
    with pytest.raises(ValueError, match=r"AttentionPairBiasV1: 5 heads"):
        PairformerLayer(12, 8, 5)
    with pytest.raises(ValueError, match=r"AttentionPairBias: needs c_z, or compute_pair_bias=False"):
        AttentionPairBias(12, num_heads=3)
    with pytest.raises(ValueError, match="needs num_heads"):
        AttentionPairBias(12, 8)
    with pytest.raises(ValueError, match="TriangleAttention: c_hidden and no_heads must be positive"):
        TriangleAttention(8, 4, 0)
    with pytest.raises(ValueError, match=r"PairformerNoSeqLayer: dropout is a probability .* not 1"):
        PairformerNoSeqLayer(8, dropout=1.0)
    with pytest.raises(ValueError, match="PairformerLayer: inference_dropout"):
        PairformerLayer(12, 8, 3, inference_dropout=-0.1)
    with pytest.raises(TypeError, match=r"PairformerModule: unknown arguments: pairwise_head_widht"):
        PairformerModule(12, 8, 1, 3, pairwise_head_widht=3)
    with pytest.raises(
        ValueError, match="no_update_s is not supported; for pairs alone there is PairformerNoSeqModule"
    ):
        PairformerModule(12, 8, 1, 3, no_update_s=True)
    PairformerModule(12, 8, 1, 3, no_update_s=False, offload_to_cpu=True, use_kernels=True)
    PairformerNoSeqModule(8, 1, num_heads=3, v2=True)


def test_wrong_shapes_are_named() -> None:
    s, z, mask, pair_mask = inputs(6)
    module = layer()
    with pytest.raises(
        ValueError, match=r"TriangleMultiplicationOutgoing: the mask has shape \(2, 6\).*mask\[:, :, None\]"
    ):
        module(s, z, mask, mask)
    with pytest.raises(ValueError, match=r"must be \[..., n, n, 8\]"):
        module(s, z[:, :, :5], mask, pair_mask)
    with pytest.raises(ValueError, match=r"AttentionPairBias: the mask .* \[2, 6\]"):
        module(s, z, pair_mask, pair_mask)
    with pytest.raises(ValueError, match=r"AttentionPairBias: with s .* must be \[2, 5, 5, 8\]"):
        module(s[:, :5], z, mask[:, :5], pair_mask)
    with pytest.raises(ValueError, match="multiplicity of 2"):
        module.attention(s[:1], z[:1], mask[:1], s[:1], 2)
    with pytest.raises(ValueError, match="OuterProductMean: the mask"):
        OuterProductMean(C_Z, 3, 4)(z, mask)
    with pytest.raises(ValueError, match="PairWeightedAveraging: the mask"):
        PairWeightedAveraging(C_S, C_Z, 4, 2)(s[:, None], z, mask)


# Compilation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_all_lengths(training: bool) -> None:
    """Whole graphs, with dropout and checkpointing too; one for the first length, one for all others."""
    module = stack(num_blocks=1, dropout=0.2, activation_checkpointing=training).train(training)
    bind(module, "torch")
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for n in (5, 6, 7, 9):
        given = inputs(n, 1)
        with torch.set_grad_enabled(training):
            torch.manual_seed(0)
            expected = module(*given)
            torch.manual_seed(0)
            found = compiled(*given)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert len(graphs) <= 2
