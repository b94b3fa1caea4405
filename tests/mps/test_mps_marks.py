"""A Mac without a Mac: the device that marks tensors sees what a Mac could not do, and products that go round it.

The traps are faults of PyTorch's MPS backend that its own issues describe; kernels/products.py has their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldkernels.kernels.common import matmul
from foldkernels.kernels.common.blocking import block_dtype, pairs_per_block

from ..support.mps import on_mps


def test_where_tensors_say_that_they_are():
    with on_mps() as found:
        x = torch.ones(3)
        y = x.to("mps")
        assert x.device.type == "cpu" and y.device.type == "mps" and y.is_mps and not x.is_mps
        assert (y + 1).device.type == torch.zeros(2, device=y.device).device.type == "mps"
        assert y[:2].device.type == nn.Linear(3, 2).to("mps").weight.device.type == "mps"
        assert y.to("mps") is y and x.cpu() is x
        assert nn.Linear(3, 2).to(torch.device("mps")).weight.device == torch.device("mps", 0)
        assert (y * 2).cpu().device.type == "cpu" and y.device.type == "mps"
        torch.linalg.svd(torch.rand(3, 3).double())
        y.cpu().double().sum()
        x.double().to("mps", torch.float32).sum()
        y.copy_(x)
        assert y.cpu().numpy().sum() == 3
    assert "aten::_linalg_svd" not in found.operators and "aten::add.Tensor" in found.operators


@torch.library.custom_op("foldkernels_test::doubled_where_it_is", mutates_args=())
def _doubled(x: Tensor) -> Tensor:
    SEEN.append(x.device.type)
    return x + torch.ones_like(x)


SEEN: list[str] = []


def test_tensors_say_so_in_the_bodies_of_custom_operators():
    with on_mps():
        assert _doubled(torch.ones(3).to("mps")).device.type == "mps"
    assert SEEN.pop() == "mps"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_reaches_marked_tensors(dtype):
    with on_mps():
        x = torch.ones(3, 3).to("mps")
        with torch.autocast("mps", dtype):
            assert (x @ x).dtype is dtype
            with torch.autocast("mps", enabled=False):
                assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is torch.float32


PART = torch.zeros(2, 3, 3)
PLANTED: dict[str, Callable[[Tensor], object]] = {
    "float64": lambda x: x.double().cpu(),
    "without an MPS kernel": lambda x: torch.linalg.svd(x),
    "met tensors of MPS and of the CPU": lambda x: x + torch.ones(3, 3),
    "mm.out: its result is written to a part": lambda x: torch.mm(x, x, out=PART.to("mps")[1]),
    "baddbmm_: its result is written to a part": lambda x: x.repeat(2, 1, 1).mT.baddbmm_(*[x.repeat(2, 1, 1)] * 2),
    "mm: a factor that is expanded": lambda x: x[:1].expand(3, 3) @ x,
    "a product over 32767 or more": lambda x: x.new_ones(1, 32767) @ x.new_ones(32767, 1),
    "baddbmm_: beta=0": lambda x: x[None].baddbmm_(x[None], x[None], beta=0),
    "native_layer_norm_backward: weights' gradients": lambda x: _layer_norm(x),
    "complex": lambda x: torch.fft.fft(x),
    "pinned": lambda x: _pin(x + 1),
    "linear: an input that is expanded": lambda x: F.linear(x[:1].expand(3, 3), x),
    "linear: a weight that is not contiguous": lambda x: F.linear(x, x.t()),
    "attention: queries, keys or values that are not": lambda x: _attend(*(x.repeat(1, 1, 1, 1).mT for _ in "qkv")),
    "attention: values of another width": lambda x: _attend(*[x.repeat(1, 1, 1, 1)] * 2, x.repeat(1, 1, 1, 2)),
    "attention: a boolean mask": lambda x: _attend(*[x.repeat(1, 1, 1, 1)] * 3, x > 0),
    "attention: up to 8 queries": lambda x: _attend(*[x.repeat(1, 1, 1, 1)] * 3),
}


def _layer_norm(x: Tensor) -> None:
    F.layer_norm(x, (3,), torch.ones(3).to("mps").requires_grad_()).sum().backward()


def _pin(x: Tensor) -> None:
    with suppress(RuntimeError):  # a machine without a GPU has nothing to pin it for
        x.cpu().pin_memory()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("what", PLANTED)
def test_what_a_mac_could_not_do_is_seen(what):
    with pytest.raises(AssertionError, match=what), on_mps():
        PLANTED[what](torch.rand(3, 3).to("mps"))


def test_numpy_refuses():
    with pytest.raises(TypeError, match="NumPy"), on_mps():
        torch.ones(3).to("mps").numpy()


# What goes round the traps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["mps", "cpu"])
def test_products_into_parts_of_tensors_of_factors_that_are_expanded(on):
    left, right, total = torch.rand(2, 3, 4), torch.rand(4, 5).expand(2, 4, 5), torch.rand(2, 2, 5, 3)
    with on_mps() if on == "mps" else nullcontext():
        there = total.clone().to(on)
        matmul.write_product(left.to(on), right.to(on).expand(2, 4, 5), there[1].mT)
        matmul.add_product_(there[0].mT, left.to(on), right.to(on)[:1].expand(2, 4, 5))
        matmul.accumulate_(there[0, 1].t(), left.to(on)[0], right.to(on)[0])
        found = there.cpu()
    torch.testing.assert_close(found[1].mT, left @ right)
    wanted = total[0].mT + left @ right
    wanted[1] += left[0] @ right[0]
    torch.testing.assert_close(found[0].mT, wanted)


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
@pytest.mark.parametrize("queries", [3, 11])
@pytest.mark.parametrize("width", [4, 6])
def test_attention_is_what_pytorch_defines(mask, queries, width):
    """Contiguous or not, of one width or two, under every mask; a query without keys gets some number."""
    q, k, v = torch.rand(2, queries, 3, 4), torch.rand(2, 11, 3, 4), torch.rand(2, 11, 3, width)
    given = None if mask is None else torch.rand(2, 1, queries, 11) > 0.3
    if given is not None:
        given[0, 0, 0], given[1, 0, 0] = True, False
    if mask == "added":
        given = torch.zeros(given.shape).masked_fill(~given, -1e4)
    with on_mps():
        sent = [x.to("mps").transpose(1, 2) for x in (q, k, v)]
        found = matmul.dot_product_attention(*sent, None if given is None else given.to("mps"), 0.7).cpu()
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=given, scale=0.7)
    assert found.isfinite().all()
    there = slice(None) if mask is None else slice(1, None)
    torch.testing.assert_close(found[:, :, there], wanted[:, :, there])


def test_blocks_on_mps_are_short_and_in_float32():
    with on_mps():
        z = torch.zeros(1, 300, 300, 1, dtype=torch.bfloat16).to("mps")
        z = z + 0
        assert 300 <= pairs_per_block(z) < 32767
        assert block_dtype(z) is torch.float32
