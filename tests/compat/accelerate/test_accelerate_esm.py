"""fair-esm's model around its accelerated attention: hooks see what they would have seen, and checkpoints recompute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import foldkernels

from ...support.foreign import esm

RAN = ["attention: torch"] * 2


def tokens() -> Tensor:
    drawn = torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(0))
    drawn[0, -3:] = 1
    return drawn


def twins() -> tuple[nn.Module, nn.Module]:
    """A model, and an accelerated copy."""
    torch.manual_seed(0)
    theirs = esm.ESM2()
    ours = copy.deepcopy(theirs)
    assert foldkernels.accelerate(ours).replaced
    return theirs, ours


def reentrant(model: Any) -> None:
    """Layers that are called through a checkpoint, as projects patch them."""
    for layer in model.layers:
        own = layer.forward

        def forward(x: Tensor, own: Callable[..., Any] = own, **kwargs: Any) -> Any:
            return checkpoint(lambda y: own(y, **kwargs), x, use_reentrant=True)

        layer.forward = forward


def wrapped(model: Any) -> None:
    """PyTorch's wrapper, which takes the layer's place."""
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(tokens())["logits"]
    out[tokens() != 1].square().mean().backward()
    named = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    return {name: p.grad for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("change", [reentrant, wrapped])
def test_a_layer_that_is_computed_again_computes_the_same(change: Callable[[Any], None]) -> None:
    theirs, ours = twins()
    change(ours)
    with foldkernels.record_kernels() as ran:
        found = gradients(ours)
    assert ran == RAN * 2  # forward, and again in the backward pass
    expected = gradients(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()) + 1e-7, name


def test_a_wrapped_layer_is_recognised() -> None:
    torch.manual_seed(0)
    model = esm.ESM2()
    wrapped(model)
    report = foldkernels.accelerate(model)
    assert len(report.replaced) == 3
    with foldkernels.record_kernels() as ran:
        model(tokens())
    assert ran == RAN


def test_where_no_kernel_would_run_nothing_is_called_accelerated() -> None:
    model = esm.ESM2()
    reentrant(model)
    report = foldkernels.accelerate(model)
    assert report.replaced == ()
    assert "layers.0 has a forward of its own" in report.left_alone[""]
    assert "always asks for its weights" in report.left_alone["layers.0.self_attn"]
    assert "always asks for its weights" in foldkernels.accelerate(esm.TransformerLayer()).left_alone["self_attn"]


@pytest.mark.parametrize("name", ["layers.0", "layers.0.self_attn", "layers.0.fc1", "layers.0.self_attn.rot_emb"])
@pytest.mark.parametrize("keywords", [False, True])
def test_a_hook_gets_what_it_would_have_got(name: str, keywords: bool) -> None:
    seen: list[list[Any]] = []
    for model in twins():
        calls: list[Any] = []
        seen.append(calls)
        if keywords:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, out, calls=calls: calls.append((kwargs, out)), with_kwargs=True
            )
        else:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, calls=calls: calls.append(({}, out))
            )
        with foldkernels.record_kernels() as ran:
            model(tokens())
    # Under PyTorch's rules a hook with keywords may see `need_head_weights` itself: then no layer runs a kernel.
    expects_kernel = {"layers.0.fc1": 2, "layers.0.self_attn.rot_emb": 1}.get(name, 0 if keywords else 1)
    assert len(ran) == expects_kernel
    ((theirs, expected), *_), ((ours, found), *_) = seen
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in theirs.items()}
    present = tokens() != 1
    for right, value in zip(outputs(expected), outputs(found), strict=True):
        assert value.shape == right.shape
        if name != "layers.0.self_attn.rot_emb":
            rows = [x if x.shape[0] == 2 else x.transpose(0, 1) for x in (value, right)]
            torch.testing.assert_close(rows[0][present], rows[1][present], rtol=1e-4, atol=1e-5)


def outputs(value: Any) -> list[Tensor]:
    return [part for part in (value if isinstance(value, tuple) else (value,)) if part is not None]


def test_a_hook_on_all_modules_gets_the_weights() -> None:
    _, ours = twins()
    got: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: got.append(out[1]) if isinstance(module, esm.MultiheadAttention) else None
    )
    try:
        ours(tokens())
    finally:
        handle.remove()
    assert [weights.shape for weights in got] == [(2, 9, 9)] * 2


def test_the_whole_model_compiles_to_one_graph() -> None:
    _, ours = twins()
    expected = ours.eval()(tokens())["logits"]
    found = torch.compile(ours, fullgraph=True, backend="eager")(tokens())["logits"]
    torch.testing.assert_close(found[tokens() != 1], expected[tokens() != 1])
