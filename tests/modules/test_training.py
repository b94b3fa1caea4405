"""Training: gradients under every kernel, dropout, autocast, recomputation, and distributed data parallel."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.compat.multiflow.training import losses
from foldkernels.kernels.registry import record_kernels

from ..support.goldens import batch_of, part, read, small_model

pytestmark = pytest.mark.quick

KERNELS = ("reference", "torch")
CASE = "small/case_L17.safetensors"

Gradients = dict[str, Tensor]


def gradients_of(model: nn.Module) -> Gradients:
    """Every parameter's gradient; all must have one, or DDP would wait for it."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        found[name] = parameter.grad.clone()
    return found


def score(batch: dict[str, Tensor], out: dict[str, Tensor]) -> Tensor:
    """A number that every output reaches, with weights that are nowhere equal; masked rows count for nothing."""
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for name in ("pred_trans", "pred_rotmats", "pred_logits"):
        there = batch["res_mask"].view(*batch["res_mask"].shape, *[1] * (out[name].ndim - 2))
        weights = torch.randn(out[name].shape[1:], generator=generator)
        total = total + (out[name].float() * there * weights).sum() / there.sum()
    return total


def step(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> tuple[float, Gradients]:
    """The score and all gradients of one step, from a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = score(batch, model(batch))
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def largest_error(found: Gradients, expected: Gradients) -> float:
    """Of all gradients, in units of each one's largest entry, and at least of a thousandth of the largest of all."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    return max(
        float((found[name] - expected[name]).abs().max()) / max(float(expected[name].abs().max()), floor)
        for name in expected
    )


# ---------------------------------------------------------------------------------------------------- kernels agree


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_streamed_kernels_train_as_the_references(dtype: torch.dtype, training: bool) -> None:
    """Loss and every gradient, with dropout drawn from one seed and without: to 1e-9 in float64.

    In float32 the loss agrees to 2e-5 and all gradients together to 1e-2 of their norm: now and then one of the edge
    transition's 300,000 ReLUs has an input that rounds to the other side of zero, under either kernel.
    """
    batch = batch_of("small/case_L40.safetensors")
    found = {}
    for kernel in KERNELS:
        model = small_model(kernel).train(training).to(dtype)
        with record_kernels() as ran:
            found[kernel] = step(model, batch)
        assert {name.partition(": ")[2] for name in ran} == {kernel}
    (loss, gradients), (expected_loss, expected) = found["torch"], found["reference"]
    if dtype is torch.float64:
        assert abs(loss - expected_loss) <= 1e-6  # the score is a sum in float32
        assert largest_error(gradients, expected) <= 1e-9
    else:
        assert abs(loss - expected_loss) <= 2e-5 * max(1.0, abs(expected_loss))
        both = [torch.cat([each[name].flatten() for name in expected]) for each in (gradients, expected)]
        assert float((both[0] - both[1]).norm() / both[1].norm()) <= 1e-2


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_is_drawn_in_training_only(kernel: str) -> None:
    """Two seeds differ in training and agree in evaluation; one seed gives one result, bit for bit."""
    batch, model = batch_of(CASE), small_model(kernel)
    assert model.model_config.transformer_dropout == 0.2 and not model.training
    still, other = step(model, batch, 0), step(model, batch, 1)
    assert still[0] == other[0] and all(torch.equal(still[1][name], other[1][name]) for name in still[1])
    model.train()
    first, again, other = step(model, batch, 0), step(model, batch, 0), step(model, batch, 1)
    assert first[0] == again[0] and all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert abs(first[0] - other[0]) > 1e-4 and abs(first[0] - still[0]) > 1e-4
    model.eval()
    assert step(model, batch, 3)[0] == still[0]


def test_dropout_keeps_the_mean() -> None:
    """Over many draws of attention weights the mean is near the one without: what is kept is scaled by 1 / (1 - p)."""
    attention = small_model("torch").train().trunk["seq_tfmr_0"].layers[0].self_attn
    torch.manual_seed(0)
    x = torch.randn(1, 9, 64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        draws = torch.stack([attention(x, mask) for _ in range(2000)])
        expected = attention.eval()(x, mask)
    scale = float(expected.abs().max())
    assert float((draws.mean(0) - expected).abs().max()) <= 0.05 * scale
    assert float(draws.std(0).min()) > 0.05 * scale


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_of_everything_but_nothing(kernel: str) -> None:
    """Without dropout, training and evaluation compute the same."""
    batch, model = batch_of(CASE), small_model(kernel, model__transformer_dropout=0.0)
    quiet = step(model, batch)
    loud = step(model.train(), batch)
    assert abs(quiet[0] - loud[0]) <= 1e-6 * max(1.0, abs(quiet[0]))
    assert largest_error(loud[1], quiet[1]) <= 1e-5


def test_logit_dropout_of_ipa_trains() -> None:
    """`ipa.dropout`: the fused pass steps back, the reference serves IPA, and every parameter gets a gradient."""
    model = small_model({"preset": "torch", "fallback": "silent"}, model__ipa__dropout=0.1).train()
    batch = batch_of(CASE)
    with record_kernels() as ran:
        first = step(model, batch)
    assert {"invariant_point_attention: reference", "edge_transition: torch"} <= set(ran)
    assert step(model, batch)[0] == first[0] != step(model, batch, 1)[0]
    # Here the bias of the logits matters: a dropped logit loses it.
    assert float(first[1]["trunk.ipa_0.linear_b.bias"].abs().max()) > 1e-4
    with record_kernels() as ran:
        model.eval()(batch)
    assert {name.partition(": ")[2] for name in ran} == {"torch"}


# ------------------------------------------------------------------------------------------- autocast and recomputation


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_under_autocast(kernel: str) -> None:
    """bfloat16: every gradient is finite and float32, and points the way that float32's points."""
    batch, model = batch_of("small/case_L40.safetensors"), small_model(kernel).train()
    loss, expected = step(model, batch)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
        rounded = score(batch, out)
    rounded.backward()
    assert out["pred_trans"].dtype is torch.float32 and out["pred_rotmats"].dtype is torch.float32
    found = gradients_of(model)
    assert all(value.dtype is torch.float32 for value in found.values())
    assert 0 < abs(float(rounded.detach()) - loss) <= 0.05 * max(1.0, abs(loss))
    cosines = {
        name: float(torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0))
        for name in expected
        if float(expected[name].abs().max()) > 1e-2
    }
    assert len(cosines) > 50 and min(cosines.values()) > 0.9, sorted(cosines.items(), key=lambda item: item[1])[:5]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_recomputation_changes_no_bit(kernel: str, autocast: bool) -> None:
    """`activation_checkpointing`: with dropout, whose draws are repeated, loss and gradients are the same bits."""
    batch = batch_of(CASE)
    results = []
    for on in (False, True):
        model = small_model(kernel, foldkernels={"activation_checkpointing": on}).train()
        assert model.trunk.checkpointing is on
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), record_kernels() as ran:
            loss, gradients = step(model, batch)
        results.append((loss, gradients, sum(name.startswith("attention: ") for name in ran)))
    (loss, gradients, attended), (other_loss, other, attended_again) = results
    assert loss == other_loss
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)
    assert attended == 3 * 2 and attended_again == 2 * attended  # it was computed twice


def test_recomputation_is_for_training_alone() -> None:
    """In evaluation nothing is computed twice, gradients or not."""
    model = small_model("torch", foldkernels={"activation_checkpointing": True})
    with record_kernels() as ran:
        step(model, batch_of(CASE))
    assert sum(name.startswith("attention: ") for name in ran) == 3 * 2


def test_gradients_accumulate() -> None:
    """Two backward passes add up, as gradient accumulation asks."""
    batch, model = batch_of(CASE), small_model("torch")
    _, once = step(model, batch)
    score(batch, model(batch)).backward()
    assert largest_error(gradients_of(model), {name: 2 * value for name, value in once.items()}) <= 1e-6


def test_a_model_in_parts() -> None:
    """With the trunk's edge transitions frozen, or only them free, the rest gets the gradients that it had."""
    batch, model = batch_of(CASE), small_model("torch")
    _, expected = step(model, batch)
    for frozen in (True, False):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("edge_transition" in name) is not frozen)
        model.zero_grad(set_to_none=True)
        score(batch, model(batch)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert float((parameter.grad - expected[name]).abs().max()) <= 1e-4, name
            else:
                assert parameter.grad is None, name


def test_an_optimizer_learns() -> None:
    """A few AdamW steps on one batch of a real chain lower Multiflow's own loss, under autocast and with dropout."""
    golden, metadata = read("train/step_pdb_L48.safetensors")
    batch, model = part(golden, "in."), small_model("torch").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    totals = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = losses(model, batch, metadata["training"])["train_loss"].mean()
        torch.autograd.backward(total)
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.9 * totals[0], totals


# ------------------------------------------------------------------------------------------------ distributed training


def shard(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    size = len(batch["res_mask"]) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


@contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed_model(checkpointing: bool) -> FlowModel:
    changes: dict[str, Any] = {"model__transformer_dropout": 0.0} if not checkpointing else {}
    return small_model("torch", foldkernels={"activation_checkpointing": checkpointing}, **changes)


def train_distributed(rank: int, world: int, port: int, checkpointing: bool, results: Any) -> None:
    """What each process does: two steps with one optimizer, so that a gradient left hanging would show."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    with process_group(rank, world, port):
        model = distributed_model(checkpointing).train()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        batch = shard(batch_of(CASE), rank, world)
        for _ in range(2):
            wrapped.zero_grad(set_to_none=True)
            torch.manual_seed(rank)
            score(batch, wrapped(batch)).backward()
        results[rank] = {name: value.numpy() for name, value in gradients_of(model).items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_data_parallel_finds_no_unused_parameter(world: int, checkpointing: bool) -> None:
    """With `find_unused_parameters=False`, Lightning's plain `ddp`; its gradients are the mean of the shards'."""
    batch = batch_of(CASE)
    results: dict[int, dict[str, Any]] = {}
    if world == 1:
        train_distributed(0, 1, free_port(), checkpointing, results)
    else:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager:
            shared, port = manager.dict(), free_port()
            arguments = [(rank, world, port, checkpointing, shared) for rank in range(world)]
            workers = [context.Process(target=train_distributed, args=each) for each in arguments]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(240)
                assert worker.exitcode == 0
            results = dict(shared)
    alone = []
    for rank in range(world):
        model = distributed_model(checkpointing).train()
        alone.append(step(model, shard(batch, rank, world), seed=rank)[1])
    expected = {name: torch.stack([each[name] for each in alone]).mean(0) for name in alone[0]}
    assert len(results) == world
    for found in results.values():
        gradients = {name: torch.from_numpy(value) for name, value in found.items()}
        assert largest_error(gradients, expected) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_is_used(autocast: bool) -> None:
    """Under autocast too: a parameter without a gradient stops DDP at the next step."""
    model = small_model("torch").train()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = score(batch_of(CASE), model(batch_of(CASE)))
    loss.backward()
    zero = {name for name, value in gradients_of(model).items() if not value.any()}
    assert zero == {f"trunk.ipa_{b}.linear_b.bias" for b in range(3)}
