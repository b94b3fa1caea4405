"""What a user does to a layer after `accelerate`: every change of a child takes effect as in the original."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import foldkernels
from foldkernels.compat.accelerate.adapters import adapters
from foldkernels.modules import children

from ...support.foreign import boltz
from .test_accelerate_adapters import FORMS
from .test_accelerate_multiflow import FORMS as MULTIFLOW_FORMS

BUILDERS = {name: form[:2] for name, form in {**FORMS, **MULTIFLOW_FORMS}.items()}


class Scaled(nn.Module):
    """A layer that stands in another's place, and shows its weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        for name in ("weight", "bias", "in_features", "out_features", "normalized_shape", "eps"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _doubled(self.layer(*args, **kwargs))


def _doubled(out: Any) -> Any:
    return tuple(_doubled(part) for part in out) if isinstance(out, tuple) else 2 * out


def hooked(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, out: _doubled(out))


def hooked_with_keywords(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(
        lambda module, args, kwargs, out: _doubled(out), with_kwargs=True, always_call=True
    )


def hooked_before(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (0.5 * args[0], *args[1:]))


def patched(model: nn.Module, name: str) -> None:
    child: Any = model.get_submodule(name)
    own = child.forward
    child.forward = lambda *args, **kwargs: _doubled(own(*args, **kwargs))


def replaced(model: nn.Module, name: str) -> None:
    above, _, key = name.rpartition(".")
    parent = model.get_submodule(above)
    parent._modules[key] = Scaled(model.get_submodule(name))


def of_a_subclass(model: nn.Module, name: str) -> None:
    child = model.get_submodule(name)
    own = type(child).forward
    forward = {"forward": lambda self, *args, **kwargs: _doubled(own(self, *args, **kwargs))}
    child.__class__ = type(type(child).__name__, (type(child),), forward)


CHANGES = (hooked, hooked_with_keywords, hooked_before, patched, replaced, of_a_subclass)


@pytest.fixture(autouse=True)
def said_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(children, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldkernels.KernelFallbackWarning)
        yield


def built(form: str) -> nn.Module:
    """A form whose weights are nowhere zero."""
    torch.manual_seed(0)
    module = BUILDERS[form][0]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def outputs(form: str, module: nn.Module) -> dict[str, Tensor] | str:
    """What is compared of a call; the error's class where it raises."""
    example = adapters()[BUILDERS[form][1]].example(built(form), torch.Generator().manual_seed(0))
    try:
        return dict(example.compare(module(*example.args, **example.kwargs)))
    except Exception as error:
        return type(error).__name__


def assert_alike(found: dict[str, Tensor] | str, expected: dict[str, Tensor] | str, what: str) -> None:
    assert type(found) is type(expected), (what, found, expected)
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected, what
        return
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), f"{what}: {name}"
        if value.numel() == 0:
            continue
        error = float((found[name] - value).detach().abs().max())
        assert error <= 2e-5 * float(value.detach().abs().max()), f"{what}: {name} is {error:.1e} off"


@pytest.mark.parametrize("form", BUILDERS)
def test_every_change_of_every_child_takes_effect(form: str) -> None:
    names = [name for name, _ in built(form).named_modules() if name]
    for change in CHANGES:
        for name in names:
            theirs, ours = built(form), built(form)
            assert foldkernels.accelerate(ours).replaced
            change(theirs, name)
            change(ours, name)
            what = f"{name} {change.__name__}"
            with torch.no_grad():
                assert_alike(outputs(form, ours), outputs(form, theirs), what)


def pruned(child: Any) -> None:
    prune.l1_unstructured(child, "weight", 0.5)


def weight_normed(child: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(child)
    child.weight_g.data.mul_(2)


def parametrized(child: Any) -> None:
    parametrizations.weight_norm(child)
    child.parametrizations.weight.original0.data.mul_(2)


def spectrally_normed(child: Any) -> None:
    torch.nn.utils.spectral_norm(child)


def with_another_bias(child: Any) -> None:
    child.bias = nn.Parameter(torch.full((child.out_features,), 0.5)) if child.bias is None else None


def in_another_type(child: Any) -> None:
    child.to(torch.bfloat16)


def with_another_shape(child: Any) -> None:
    child.weight = nn.Parameter(child.weight.detach()[:-1].clone())


class _Twice(Tensor):
    """A tensor that is twice what it holds wherever PyTorch multiplies by it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        if func is torch.nn.functional.linear:
            plain[1] = 2 * plain[1]
        return func(*plain, **(kwargs or {}))


def of_a_tensor_subclass(child: Any) -> None:
    child._parameters["weight"] = child.weight.detach().as_subclass(_Twice)


@pytest.mark.parametrize("form", BUILDERS)
def test_a_hook_sees_what_it_would_have_seen(form: str) -> None:
    """Inputs and outputs of the same shapes and types, as often."""
    for name in [name for name, _ in built(form).named_modules() if name]:
        seen: list[list[Any]] = []
        for accelerated in (False, True):
            module = built(form)
            if accelerated:
                foldkernels.accelerate(module)
            calls: list[Any] = []
            seen.append(calls)
            module.get_submodule(name).register_forward_hook(
                lambda child, args, kwargs, out, calls=calls: calls.append(described((args, kwargs, out))),
                with_kwargs=True,
            )
            with torch.no_grad():
                outputs(form, module)
        assert seen[0] == seen[1], name


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return [described(part) for part in value]
    return sorted(value) if isinstance(value, dict) else type(value)


WEIGHTS = (
    pruned,
    weight_normed,
    parametrized,
    spectrally_normed,
    with_another_bias,
    in_another_type,
    with_another_shape,
    of_a_tensor_subclass,
)


READ = [
    ("Boltz multiplication, outgoing", ("p_in", "g_out")),
    ("OpenFold triangle attention", ("linear", "mha.linear_g")),
    ("Boltz-2 pair bias", ("proj_z.1", "proj_q")),
    ("multiflow ipa", ("linear_b", "linear_q")),
    ("OpenFold IPA", ("linear_b",)),
    ("edge transition", ("trunk.2", "final_layer")),
    ("multiflow edges", ("linear_relpos", "edge_embedder.0")),
]


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("form, names", READ)
def test_every_change_of_a_weight_takes_effect(
    form: str, names: tuple[str, ...], change: Callable[[Any], None]
) -> None:
    for name in names:
        theirs, ours = built(form), built(form)
        foldkernels.accelerate(ours)
        for model in (theirs, ours):
            torch.manual_seed(1)
            change(model.get_submodule(name))
        assert_alike(outputs(form, ours), outputs(form, theirs), f"{name} {change.__name__}")


@pytest.mark.parametrize("form, names", READ)
def test_weights_on_another_device_are_an_error(form: str, names: tuple[str, ...]) -> None:
    """PyTorch's own operators let some of them pass, with memory that nobody wrote."""
    for name in names:
        ours = built(form)
        foldkernels.accelerate(ours)
        ours.get_submodule(name).to("meta")
        with torch.no_grad():
            assert outputs(form, ours) == "RuntimeError"


def test_a_hook_on_all_modules_is_called() -> None:
    model = boltz.TriangleMultiplicationOutgoing(12)
    foldkernels.accelerate(model)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(torch.randn(1, 5, 5, 12), torch.ones(1, 5, 5))
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


def test_a_change_is_said_once_and_names_the_child() -> None:
    model = nn.ModuleList([boltz.TriangleMultiplicationOutgoing(12) for _ in range(2)])
    foldkernels.accelerate(model)
    for layer in model:
        layer.p_in.register_forward_hook(lambda module, args, out: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layer in (*model, *model):
            layer(torch.randn(1, 5, 5, 12), torch.ones(1, 5, 5))
    assert [w.category for w in caught] == [foldkernels.KernelFallbackWarning]
    assert str(caught[0].message) == (
        "TriangleMultiplicationOutgoing: its p_in has a hook: its own forward runs, which calls its children"
    )


def test_what_is_taken_off_again_lets_the_kernel_run() -> None:
    form = "Boltz multiplication, outgoing"
    model = built(form)
    foldkernels.accelerate(model)
    handle = model.get_submodule("g_in").register_forward_hook(lambda module, args, out: 2 * out)
    for ran_before in (0, 1):
        with foldkernels.record_kernels() as ran:
            outputs(form, model)
        assert len(ran) == ran_before
        handle.remove()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_what_its_children_were(copied: Any) -> None:
    form = "edge transition"
    theirs, ours = built(form), built(form)
    foldkernels.accelerate(ours)
    replaced(theirs, "trunk.0")
    replaced(ours, "trunk.0")
    expected = outputs(form, theirs)
    assert_alike(outputs(form, copied(ours)), expected, "changed, then copied")
    again = copied(built(form))
    foldkernels.accelerate(again)
    again = copied(again)
    with foldkernels.record_kernels() as ran:
        outputs(form, again)
    assert len(ran) == 1
    replaced(again, "trunk.0")
    assert_alike(outputs(form, again), expected, "copied, then changed")


def test_restoring_reaches_a_forward_that_was_wrapped_later() -> None:
    form = "Boltz multiplication, outgoing"
    model = built(form)
    foldkernels.accelerate(model)
    own: Any = model.forward
    model.forward = lambda *args: 2 * own(*args)  # type: ignore[method-assign]
    assert foldkernels.restore(model) == 1
    with foldkernels.record_kernels() as ran:
        found = outputs(form, model)
    expected = outputs(form, built(form))
    assert isinstance(found, dict) and isinstance(expected, dict)
    assert ran == [] and torch.equal(found["update"], 2 * expected["update"])


@pytest.mark.parametrize("form", BUILDERS)
def test_nothing_to_compute_gives_what_the_original_gives(form: str) -> None:
    """A batch of none, and a length of none."""
    theirs, ours = built(form), built(form)
    foldkernels.accelerate(ours)
    example = adapters()[BUILDERS[form][1]].example(theirs, torch.Generator().manual_seed(0))
    first = next(arg for arg in example.args if isinstance(arg, Tensor))
    for size in {first.shape[0], first.shape[1]}:
        args = [emptied(arg, size) for arg in example.args]
        kwargs = {name: emptied(arg, size) for name, arg in example.kwargs.items()}
        assert_alike(called(ours, args, kwargs), called(theirs, args, kwargs), f"no {size}")


def emptied(value: Any, size: int) -> Any:
    """A tensor without its axes of this size."""
    if isinstance(value, Tensor):
        return value[tuple(slice(0) if n == size else slice(None) for n in value.shape)]
    if hasattr(value, "rotmats"):
        return type(value)(emptied(value.rotmats, size), emptied(value.trans, size))
    return value


def called(module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Tensor] | str:
    try:
        out = module(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return {str(i): part for i, part in enumerate(out if isinstance(out, tuple) else [out]) if part is not None}
