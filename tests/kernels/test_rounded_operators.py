"""Plain PyTorch in 16 bits: what is rounded, what stays in float32, and that it is what PyTorch's own 16 bits give."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.accuracy import Ran, judge
from foldkernels.kernels.testing.rounded_operators import RoundedOperators, plain_pytorch

BF16, F16 = torch.bfloat16, torch.float16
NARROW = [BF16, F16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    """Normal numbers that 16 bits hold."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fits(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a float32 tensor holds numbers of a 16-bit type."""
    return x.dtype is torch.float32 and torch.equal(x, x.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_elementwise_operators_are_pytorchs_own(dtype):
    """Sums, products, activations: what 16-bit tensors give, forward and backward."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y + y).sigmoid() * (x - 0.25).relu()

    x, y, cotangent = (drawn(40, 7, seed=seed, dtype=dtype) for seed in range(3))
    inputs = [v.clone().requires_grad_() for v in (x, y)]
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    with plain_pytorch(dtype):
        wide = [v.clone().requires_grad_() for v in (x, y)]
        ours = function(*(v.float() for v in wide))
        found = torch.autograd.grad(ours, wide, cotangent.float())
    assert torch.equal(ours, out.float())
    for gradient, expected in zip(found, gradients, strict=True):
        # PyTorch's own float16 rounds once more inside of the sigmoid's backward.
        eps = 0.0 if dtype is BF16 else torch.finfo(F16).eps
        torch.testing.assert_close(gradient, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_products_add_up_in_float32_and_are_rounded_once(dtype):
    """With a bias that is added before the rounding, as a linear layer's is."""
    x, weight, bias = drawn(9, 300, dtype=dtype), drawn(11, 300, seed=1, dtype=dtype), drawn(11, seed=2, dtype=dtype)
    with plain_pytorch(dtype):
        out = F.linear(x.float(), weight.float(), bias.float())
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert fits(out, dtype)
    assert bool(((out - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-4).all())


def test_coordinates_stay_in_float32():
    """What is computed from them alone is not rounded; a 16-bit logit is added to a float32 one."""
    points = 100.0 + torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with plain_pytorch(BF16, [points]):
        logits = drawn(5, 5).float()
        distance = (points[:, None] - points).square().sum(-1)
        rounded = logits * 1.1
        weights = (rounded - distance).softmax(-1)
        moved = weights @ points
        values = weights @ drawn(5, 4, seed=1).float()
    assert torch.equal(distance, (points[:, None] - points).square().sum(-1))
    assert fits(rounded, BF16) and not torch.equal(rounded, logits * 1.1)
    assert torch.equal(weights, (rounded - distance).softmax(-1))
    assert torch.equal(moved, weights @ points)
    # PyTorch multiplies factors of one type only: with 16-bit values, the weights are cast.
    assert fits(values, BF16)


def test_constants_take_the_type_of_what_they_meet():
    """Bin edges beside coordinates, sinusoids in a product, a mask over logits."""
    positions = torch.tensor([[0.0, 0.0, 6.4]])
    with plain_pytorch(BF16, [positions]):
        x = drawn(3, 4).float()
        edges = torch.linspace(0.1, 20.3, 7)
        upper = torch.cat([edges[1:], edges.new_tensor([1.2345678])])
        waves = torch.arange(4).float().sin() + 1.001
        mixed = x * waves
        inside = positions.norm(dim=-1) < upper
    assert torch.equal(upper[:-1], edges[1:]) and float(upper[-1]) == float(torch.tensor(1.2345678))
    assert not fits(waves, BF16)
    assert fits(mixed, BF16)
    assert inside.dtype is torch.bool


def test_in_place_operators_and_views():
    with plain_pytorch(BF16):
        x = drawn(4, 6).float()
        sums = torch.zeros(4, 6)
        sums[1:3] += x[1:3]
        sums.view(-1).mul_(1.1)
    assert fits(sums, BF16)
    assert torch.equal(sums[1], (x[1] * 1.1).to(BF16).float()) and not sums[0].any()


def test_layer_norm_keeps_its_statistics():
    """The mean of a thousand numbers near 100 lies between two of bfloat16's."""
    x = (100 + drawn(2, 1000).float()).to(BF16)
    with RoundedOperators(BF16):
        out, mean, deviation = torch.native_layer_norm(x.float(), [1000], None, None, 1e-5)
    assert fits(out, BF16) and not fits(mean, BF16) and not fits(deviation, BF16)


def test_wider_types_run_as_they_stand():
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        with plain_pytorch(dtype):
            assert torch.equal(x.to(dtype) * 1.1, x.to(dtype) * 1.1)


# The rule in 16 bits --------------------------------------------------------------------------------------------------


def ran(gradients: dict[str, Tensor], *rescaled: dict[str, Tensor]) -> Ran:
    return Ran((), gradients, [], rescaled)


def test_a_gradient_that_is_zero_in_truth_is_measured_by_the_largest():
    """A softmax removes what is constant over the keys: its gradient is nothing but rounding."""
    truth = ran({"q": torch.tensor([2.0, 1.0]), "norm_bias": torch.tensor([1e-12])})
    plain = ran({"q": torch.tensor([2.0, 1.0]), "norm_bias": torch.tensor([1e-12])})
    floor = accuracy.FLOOR[BF16] * 2.0
    for off, expected in ((0.9 * floor, True), (1.1 * floor, False)):
        got = ran({"q": torch.tensor([2.0, 1.0]), "norm_bias": torch.tensor([off])})
        verdicts = {verdict.name: verdict.passed for verdict in judge(got, plain, truth, BF16)}
        assert verdicts == {"gradient of q": True, "gradient of norm_bias": expected}


def test_the_worst_of_several_scales_counts():
    """One run whose error is next to nothing by luck does not condemn a kernel; the other runs are measured alike."""
    truth = ran({"q": torch.ones(1)}, *({"q": torch.full((1,), scale)} for scale in accuracy.SCALES))
    lucky = ran({"q": torch.ones(1)}, *({"q": torch.full((1,), 1.01 * scale)} for scale in accuracy.SCALES))
    got = ran({"q": torch.tensor([1.015])})
    (verdict,) = judge(got, lucky, truth, BF16)
    assert verdict.passed and verdict.plain == pytest.approx(0.01, rel=1e-3)
    (verdict,) = judge(got, ran({"q": torch.ones(1)}), ran({"q": torch.ones(1)}), BF16)
    assert not verdict.passed
