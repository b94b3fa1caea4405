"""Kernels and operations that are registered, found and looked up."""

from __future__ import annotations

import pickle
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from foldkernels.configs.kernel import KernelConfig
from foldkernels.kernels.attention import attention
from foldkernels.kernels.dtypes import under_autocast, without_autocast
from foldkernels.kernels.registry import (
    KernelUnavailable,
    broken_plugins,
    decide,
    dispatch,
    function_for,
    kernels,
    length_class,
    operations,
    record_kernels,
    register,
    register_operation,
    registration,
    settings_of,
    thresholds,
    token,
)
from foldkernels.kernels.registry.types import Dims, Kernel, Operation, Reason, Request

from ..support.requested import (
    registry_as_it_was,  # noqa: F401 - an autouse fixture
)
from ..support.standins import from_16_on, load_a, load_b, refuses, restored, run_a, run_b, serves, stand_in

pytestmark = pytest.mark.quick

# --------------------------------------------------------------------------------------------------------- registration


def test_register_takes_a_record_or_its_fields() -> None:
    """One of the same name takes its place, also where the old one has run."""
    x = torch.randn(1, 3, 2, 4)
    config = token(KernelConfig(attention="mine"))
    record = register(Kernel("attention", "mine", serves, load_a))
    assert kernels("attention")["mine"] is record
    look_up = {"dims": {"h": 2, "d": 4}, "length": 3, "grad": False, "config": config}
    assert function_for("attention", x, **look_up) is run_a
    same = register(operation="attention", name="mine", supports=serves, load=load_b)
    assert kernels("attention")["mine"] is same and same != record
    assert function_for("attention", x, **look_up) is run_b
    stand_in("mine", refuses)
    with pytest.raises(KernelUnavailable):
        function_for("attention", x, **look_up)


def test_a_tracer_may_make_symbols_of_the_sizes() -> None:
    """A table cannot hold those: the choice is made again, and is the same."""
    x = torch.randn(2, 5, 3, 4)
    config = token(KernelConfig(attention="torch"))
    traced = make_fx(lambda q: attention(q, q, q, config=config), tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), attention(x, x, x, config=config))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_left_alone_where_it_is_off(device: str) -> None:
    """Turning it off costs more than a look-up; a device that has none must not be asked to."""
    x = torch.empty(2, 3, device=device)
    with without_autocast(x) as context:
        assert context is None and not under_autocast(x)
    if device == "cpu":
        with torch.autocast("cpu"):
            assert under_autocast(x)
            with without_autocast(x):
                assert not under_autocast(x)
            assert under_autocast(x)


def test_the_restored_registry_has_no_stand_ins() -> None:
    """What keeps these tests apart from all others."""
    with restored():
        stand_in("mine")
        stand_in("torch", refuses)
        assert "mine" in kernels("attention")
    assert "mine" not in kernels("attention") and kernels("attention")["torch"].supports is not refuses


def test_an_operation_of_somebody_elses() -> None:
    """It is found, and the words mean what they say: the preset's lists hold its `torch`, then its `reference`."""
    register_operation(Operation("rotary", "turns", ("n",)))
    stand_in("reference", operation="rotary")
    request = Request("rotary", "cuda", torch.float32, Dims({"n": 3}))
    assert decide(request, "auto").rejected[0][0] == "torch"  # it has none, and that is said
    stand_in("torch", operation="rotary")
    assert decide(request, "flash").kernel.name == "torch" and decide(request, "reference").kernel.name == "reference"


def test_unknown_operations_are_named() -> None:
    """With the nearest one."""
    with pytest.raises(KeyError, match="did you mean 'edge_transition'"):
        kernels("edge_transitions")
    with pytest.raises(KeyError, match="no operation 'atention'"):
        decide(Request("atention", "cpu", torch.float32, Dims({"n": 1})))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution's entry points: one that registers, one that is a module, and three that fail."""
    package = tmp_path / "fake_kernels-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-kernels\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        textwrap.dedent(
            """
            [foldkernels.kernels]
            good = fake_kernels.good:register_all
            module = fake_kernels.module
            raises = fake_kernels.good:fails
            unimportable = fake_kernels.broken
            absent = fake_kernels.nowhere:register_all

            [foldkernels.other]
            other = fake_kernels.good:fails
            """
        )
    )
    folder = tmp_path / "fake_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    register = """
        from foldkernels.kernels.registry import register
        from foldkernels.kernels.registry.types import serves_everything
        def run(q, k, v, *rest): return v
        def load(): return run
    """
    good = """
        def register_all():
            register(operation="attention", name="theirs", supports=serves_everything, load=load)
        def fails():
            raise OSError("no licence server")
    """
    module = """
        register(operation="attention", name="theirs_too", supports=serves_everything, load=load)
    """
    (folder / "good.py").write_text(textwrap.dedent(register) + textwrap.dedent(good))
    (folder / "module.py").write_text(textwrap.dedent(register) + textwrap.dedent(module))
    (folder / "broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_discovered", False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_kernels"]:
        del sys.modules[name]


@pytest.mark.usefixtures("plugins")
def test_other_packages_register_through_the_entry_point_group() -> None:
    """A callable is called, a module imported; what raises is kept with its text and takes nothing down."""
    assert {"theirs", "theirs_too", "torch", "reference"} <= set(kernels("attention"))
    assert broken_plugins() == {
        "raises": "OSError: no licence server",
        "unimportable": "ModuleNotFoundError: No module named 'no_such_package'",
        "absent": "ModuleNotFoundError: No module named 'fake_kernels.nowhere'",
    }
    x = torch.randn(1, 3, 2, 4)
    with record_kernels() as ran:
        assert torch.equal(attention(x, x, 2 * x, config=token(KernelConfig(attention="theirs"))), 2 * x)
    assert ran == ["attention: theirs"]


# ---------------------------------------------------------------------------------------------------- in a forward pass


def test_length_classes() -> None:
    """Thresholds of all kernels together, in order; a length that reaches one is in the next class."""
    stand_in("one", from_16_on, thresholds=(16,))
    stand_in("two", thresholds=(16, 101))
    assert thresholds("attention") == (16, 101)
    assert [length_class("attention", n) for n in (0, 1, 15, 16, 17, 100, 101, 5000)] == [0, 0, 0, 1, 1, 1, 2, 2]
    # What fuses operations changes its mind wherever one of them does.
    stand_in("three", operation="invariant_point_attention", thresholds=(33,))
    assert 33 in thresholds("edge_transition_attention") and 16 not in thresholds("edge_transition_attention")


def test_the_table_asks_once_per_key() -> None:
    """An unseen device, type, gradient, length class or option is decided; a seen one is looked up."""
    asked: list[Request] = []

    def counts(request: Request) -> list[Reason]:
        asked.append(request)
        return from_16_on(request)

    stand_in("torch", counts, thresholds=(16,))
    config = token(KernelConfig(preset="torch"))

    def run(n: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> None:
        x = torch.zeros(1, n, 2, 4, dtype=dtype, device=device, requires_grad=grad)
        attention(x, x, x, config=config)

    for n in (3, 7, 15):
        run(n)
    assert len(asked) == 1 and asked[0].dims["n"] == 0
    for n in (16, 40, 300):
        run(n)
    assert len(asked) == 2 and asked[1].dims["n"] == 16
    run(3, torch.float64)
    run(3, grad=True)
    run(3, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        run(3)
    x = torch.zeros(1, 3, 2, 4)
    attention(x, x, x, dropout=0.5, config=config)
    seen = [(r.dtype, r.grad, r.device, r.options) for r in asked[2:]]
    assert seen == [
        (torch.float64, False, "cpu", frozenset()),
        (torch.float32, True, "cpu", frozenset()),
        (torch.float32, False, "meta", frozenset()),
        (torch.bfloat16, False, "cpu", frozenset()),
        (torch.float32, False, "cpu", frozenset({"dropout"})),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        run(5)
    run(9, torch.float64)
    assert len(asked) == 7


def test_record_kernels_nests() -> None:
    """Each lists what ran inside it, in order; the inner one's end does not end the outer one."""
    x = torch.randn(1, 3, 2, 4)
    reference, streamed = (token(KernelConfig(preset=word)) for word in ("reference", "torch"))
    with record_kernels() as outer:
        with record_kernels() as empty:
            pass
        attention(x, x, x, config=reference)
        with record_kernels() as inner:
            attention(x, x, x, config=streamed)
        attention(x, x, x, config=reference)
    attention(x, x, x, config=reference)
    assert empty == [] and inner == ["attention: torch"]
    assert outer == ["attention: reference", "attention: torch", "attention: reference"]
    with pytest.raises(ZeroDivisionError), record_kernels() as broken:
        1 / 0  # noqa: B018
    attention(x, x, x, config=reference)
    assert broken == [] and dispatch._recorders == []


def test_many_threads_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the kernels are still being found, nobody sees half of them; and all get the same function."""
    found = threading.Event()
    times = []

    def slowly() -> None:
        times.append(1)
        time.sleep(0.2)
        stand_in("late", thresholds=(16,))
        time.sleep(0.1)
        found.set()

    monkeypatch.setattr(registration, "_import_kernels", slowly)
    monkeypatch.setattr(registration, "_discovered", False)
    config = token(KernelConfig(attention="late"))
    barrier = threading.Barrier(12)
    results: list[Any] = []

    def work(n: int) -> None:
        barrier.wait()
        try:
            x = torch.zeros(1, n, 2, 4)
            function = function_for("attention", x, dims={"h": 2, "d": 4}, length=n, grad=False, config=config)
            results.append((function, found.is_set(), thresholds("attention")))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(n + 10,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [(run_a, True, (16,))] * 12 and times == [1]


def test_a_file_that_registers_while_it_is_found_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread finds kernels and waits for a file that another thread is importing, which registers: no deadlock."""
    registering, done = threading.Event(), threading.Event()

    def finder() -> None:
        registering.set()
        assert done.wait(20), "register waits for the thread that waits for it"

    monkeypatch.setattr(registration, "_import_kernels", finder)
    monkeypatch.setattr(registration, "_discovered", False)

    def other() -> None:
        registering.wait(20)
        stand_in("other")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert "other" in kernels("attention")
    thread.join(20)


def test_finding_kernels_may_fail_and_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted first use leaves no half of a registry behind."""
    calls = []

    def once_interrupted() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(registration, "_import_kernels", once_interrupted)
    monkeypatch.setattr(registration, "_discovered", False)
    with pytest.raises(KeyboardInterrupt):
        operations()
    assert operations() and len(calls) == 2


def test_tokens_survive() -> None:
    """The string that modules carry is a string, and gives the configuration back."""
    for config in (KernelConfig(), KernelConfig(preset="flash"), KernelConfig(attention="torch", fallback="error")):
        words = pickle.loads(pickle.dumps(token(config)))
        assert type(words) is str and settings_of(words) == config
