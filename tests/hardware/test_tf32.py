"""TF32's switch: read by either of PyTorch's interfaces, allowed inside operators alone, and left as it was found."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from foldkernels.configs.kernel import KernelConfig
from foldkernels.kernels import registry
from foldkernels.kernels.hardware import tf32
from foldkernels.kernels.testing.accuracy import cotangents
from foldkernels.kernels.testing.cases.builders import BUILDERS
from foldkernels.kernels.testing.contract_grid import build

pytestmark = pytest.mark.quick

NEW = pytest.mark.skipif(not tf32.NEW_INTERFACE, reason="this PyTorch has the older interface alone")
SETTINGS = [
    pytest.param("", False, id="nothing"),
    pytest.param("torch.set_float32_matmul_precision('high')", True, id="high"),
    pytest.param("torch.set_float32_matmul_precision('medium')", True, id="medium"),
    pytest.param("torch.backends.cuda.matmul.allow_tf32 = True", True, id="allow"),
    pytest.param("torch.backends.cuda.matmul.allow_tf32 = False", False, id="forbid"),
    pytest.param("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True, id="new", marks=NEW),
    pytest.param("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False, id="new-ieee", marks=NEW),
    pytest.param("torch.backends.fp32_precision = 'tf32'", True, id="new-inherited", marks=NEW),
    pytest.param("torch.backends.fp32_precision = 'ieee'", False, id="new-inherited-ieee", marks=NEW),
]
PROGRAM = """
import torch
from foldkernels.kernels.hardware import tf32

def state():
    found = []
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32,
                lambda: torch.backends.cuda.matmul.fp32_precision, lambda: torch.backends.fp32_precision,
                lambda: torch.backends.mkldnn.matmul.fp32_precision):
        try:
            found.append(str(ask()))
        except Exception as error:
            found.append(type(error).__name__)
    return found

{setting}
before = state()
assert tf32.allowed() is {allowed}, before
for on in (True, False):
    with tf32.switched(on):
        assert tf32.allowed() is on
        with tf32.switched(not on):
            assert tf32.allowed() is not on
        assert tf32.allowed() is on
    assert state() == before, (state(), before)
try:
    with tf32.switched(not {allowed}):
        1 / 0
except ZeroDivisionError:
    pass
assert state() == before and tf32.allowed() is {allowed}
if tf32.NEW_INTERFACE and "backends.fp32" in {setting!r}:  # what was inherited still is
    torch.backends.fp32_precision = "ieee" if {allowed} else "tf32"
    assert tf32.allowed() is not {allowed}
"""


@pytest.mark.parametrize(("setting", "allowed"), SETTINGS)
def test_the_switch_is_read_and_restored(setting, allowed):
    """In a process of its own: the new interface cannot be unset."""
    program = textwrap.dedent(PROGRAM).format(setting=setting, allowed=allowed)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def everywhere(monkeypatch):
    """The CPU as a device that has TF32: what its operators see of the switch can be watched here."""
    monkeypatch.setattr(tf32, "DEVICES", frozenset({"cpu"}))
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the switch at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm") or "dot_product" in name or "foldkernels" in str(func):
            self.seen.append(tf32.allowed())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["tf32", "float32"])
@pytest.mark.parametrize("operation", sorted(BUILDERS))
def test_operators_see_it_forward_and_backward(everywhere, operation, precision):
    """Every product of the kernel in PyTorch's operators is made under the setting; outside, nothing has changed."""
    case = build(operation, 9, "masked", 0)
    values = {
        name: value.float().requires_grad_(name not in case.constants)
        if value is not None and value.is_floating_point()
        else value
        for name, value in case.values.items()
    }
    config = registry.token(KernelConfig(preset="torch", precision=precision))
    with Watch() as forward:
        outputs = case.call(values, config)
    assert forward.seen and set(forward.seen) == {precision == "tf32"}
    assert not tf32.allowed()
    asked = cotangents([(out.shape, out.dtype) for out in outputs], "plain", torch.float32)
    with Watch() as backward:
        torch.autograd.backward(outputs, [c.to(out.dtype) for c, out in zip(asked, outputs, strict=True)])
    if operation != "attention":  # its backward pass is PyTorch's own, in one fused kernel
        assert any(backward.seen) is (precision == "tf32")
    assert not tf32.allowed()


def test_an_exception_inside_leaves_the_switch(everywhere):
    with pytest.raises(ZeroDivisionError), tf32.allowance(torch.zeros(1), "tf32"):
        assert tf32.allowed()
        1 / 0  # noqa: B018
    assert not tf32.allowed()


def test_without_such_a_device_nothing_is_changed():
    with tf32.allowance(torch.zeros(1), "tf32"):
        assert not tf32.allowed()
