"""A Mac without a Mac: models and the work of the commands, on tensors that say they are on MPS.

A tensor that is sent to MPS stays where it is, and is marked with all that is computed from it, until it is sent to the
CPU. So what the CPU is meant to do (draws, the definition in float64, files) needs no list: it has marks nowhere. On
marked tensors every operator needs an MPS kernel, none may be float64, and none may meet one from the CPU.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from foldkernels.cli.benchmarking.models import MultiflowModel
from foldkernels.cli.benchmarking.subjects import OperationSubject, Point
from foldkernels.compat import rna_frameflow
from foldkernels.compat.multiflow.checkpoint import read_checkpoint
from foldkernels.compat.multiflow.interpolant import Interpolant
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.compat.multiflow.preset_comparison import compare_presets
from foldkernels.compat.multiflow.training import corrupt_batch, losses, self_condition
from foldkernels.configs.options import FoldkernelsConfig
from foldkernels.kernels.binding import bind
from foldkernels.kernels.examples.builders import SMALL
from foldkernels.kernels.verification import plan, published_subjects, verify
from foldkernels.modules.pairformer import PairformerLayer, PairformerNoSeqLayer

from .kernel_cases import operations
from .support.goldens import MULTIFLOW, model_of, part, small_checkpoint
from .test_mps_operators import Collect, collected

DEVICE, IS_CPU = Tensor.device.__get__, Tensor.is_cpu.__get__  # type: ignore[attr-defined]
MPS, CPU = torch.device("mps"), torch.device("cpu")
TINY = MULTIFLOW.parent / "esm" / "esm2_t3_tiny.pt"
RANDOM = ("rand", "bernoulli", "normal_", "uniform", "multinomial", "dropout")
CHECKPOINT = cache(lambda: read_checkpoint(MULTIFLOW / "small_chain"))
N = 9
#: Operators that take tensors of two devices.
BETWEEN = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")


class Marks:
    """Which storages are on MPS. They are kept, so that no other comes to lie at their place."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        #: Whether a function of PyTorch runs that was given a tensor there: what it makes of nothing is there, too.
        self.inside = False

    def add(self, x: Any) -> Any:
        for leaf in tree_leaves(x):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.kept[storage._cdata] = storage
        return x

    def forget(self, x: Tensor) -> None:
        del self.kept[x.untyped_storage()._cdata]

    def has(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.kept


class OnMps(Collect):
    """Collects operators on marked tensors, and marks what they give."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks
        self.mixed: set[str] = set()

    def record(self, name: str, given: Any, out: Any) -> None:
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        there = [self.marks.has(x) for x in tensors]
        if not any(there) and (tensors or not self.marks.inside):
            return
        super().record(name, given, out)
        if name not in BETWEEN and any(x.ndim for x, marked in zip(tensors, there, strict=True) if not marked):
            self.mixed.add(name)
        self.marks.add(out)


def _names_mps(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "mps") or (isinstance(x, str) and x.partition(":")[0] == "mps")


class SentToMps(TorchFunctionMode):
    """What is asked of MPS is made on the CPU, and marked; a marked tensor says that it is on MPS."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == DEVICE:
            return MPS if self.marks.has(args[0]) else func(*args)
        if func == IS_CPU and self.marks.has(args[0]):
            return False
        if func in (Tensor.numpy, Tensor.__array__) and self.marks.has(args[0]):
            raise TypeError("a tensor on MPS has no NumPy array")
        if func is Tensor.cpu:
            return self._moved(args[0], "cpu", (), {})
        if func is Tensor.to:
            where = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str | torch.device | Tensor)]
            if where:
                to = MPS if self.marks.has(where[0]) else getattr(where[0], "device", where[0])
                dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
                dtypes += [x.dtype for x in where if isinstance(x, Tensor)]
                return self._moved(args[0], to, dtypes[:1])
        if name != "_parse_to" and any(_names_mps(a) for a in (*args, *kwargs.values())):
            args = tuple(CPU if _names_mps(a) else a for a in args)
            kwargs = {key: CPU if _names_mps(a) else a for key, a in kwargs.items()}
            return self.marks.add(func(*args, **kwargs))
        before = self.marks.inside
        self.marks.inside = before or any(self.marks.has(x) for x in tree_leaves((args, kwargs)))
        try:
            out = func(*args, **kwargs)
            return self.marks.add(out) if self.marks.inside and name == "new_tensor" else out
        finally:
            self.marks.inside = before

    def _moved(self, x: Tensor, to: Any, dtypes: Any = (), _: Any = None) -> Tensor:
        to_mps, on_mps = _names_mps(to), self.marks.has(x)
        if to_mps is on_mps:
            return x.to(*dtypes) if dtypes else x
        if on_mps:  # a copy is as wide on MPS as it was there, and another dtype is made where it arrives
            out = x.clone()
            self.marks.forget(out)
            return out.to(*dtypes) if dtypes else out
        out = x.to(*dtypes) if dtypes else x  # and the other way it is sent in the dtype that it is to have
        return self.marks.add(out.clone())


@contextmanager
def on_mps() -> Iterator[OnMps]:
    """Run as on a Mac, and fail if a Mac could not."""
    marks = Marks()
    with collected(collect=OnMps(marks)) as found, SentToMps(marks):
        yield found
    assert sorted(found.mixed) == [], "operators that met tensors of MPS and of the CPU"


# The check itself -----------------------------------------------------------------------------------------------------


def test_where_tensors_say_that_they_are():
    with on_mps() as found:
        x = torch.ones(3)
        y = x.to("mps")
        assert x.device.type == "cpu" and y.device.type == "mps"
        assert (y + 1).device.type == torch.zeros(2, device=y.device).device.type == "mps"
        assert y[:2].device.type == nn.Linear(3, 2).to("mps").weight.device.type == "mps"
        assert y.to("mps") is y and x.cpu() is x
        assert (y * 2).cpu().device.type == "cpu" and y.device.type == "mps"
        torch.linalg.svd(torch.rand(3, 3).double())
        y.cpu().double().sum()
        x.double().to("mps", torch.float32).sum()
        y.copy_(x)
        assert y.cpu().numpy().sum() == 3
    assert "aten::_linalg_svd" not in found.operators and "aten::add.Tensor" in found.operators


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "float64": lambda x: x.double().cpu(),
    "without an MPS kernel": lambda x: torch.linalg.svd(x),
    "met tensors of MPS and of the CPU": lambda x: x + torch.ones(3, 3),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_a_mac_could_not_do_is_seen(what):
    with pytest.raises(AssertionError, match=what), on_mps():
        PLANTED[what](torch.rand(3, 3).to("mps"))


def test_numpy_refuses():
    with pytest.raises(TypeError, match="NumPy"), on_mps():
        torch.ones(3).to("mps").numpy()


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean() -> dict[str, Tensor]:
    from foldkernels.cli.benchmarking.draws import draw_chains

    drawn = draw_chains(N, torch.Generator().manual_seed(0), 2, 21)
    clean = {name: drawn[name] for name in ("res_mask", "diffuse_mask", "chain_idx", "res_idx")}
    return clean | {"trans_1": drawn["trans_t"], "rotmats_1": drawn["rotmats_t"], "aatypes_1": drawn["aatypes_t"] % 20}


def train_once(model: FlowModel, clean: dict[str, Tensor], on: str = "mps") -> None:
    """What `train` computes in a step, as the Lightning module does it: noise on the CPU, the rest on MPS."""
    model.to(on).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    noisy = corrupt_batch(clean, small_checkpoint().config.interpolant)
    noisy = self_condition(model, {name: value.to(on) for name, value in noisy.items()})
    losses(model, noisy, {})["train_loss"].mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "esm_combiner": {"esm_combiner": {"checkpoint": str(TINY)}},
    "esm_combiner_single": {"esm_combiner": {"checkpoint": str(TINY), "only_single": True}},
    "enrichment_ipa": {"enrichment": {"block": "ipa", "num_layers": 1}},
}


def _some(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _some(SECTIONS, ["plain"]))
def test_multiflow_trains_and_samples(name, clean):
    """Draws and residue types are the CPU's, and no random number is drawn on MPS but dropout's."""
    checkpoint = small_checkpoint()
    model = FlowModel(CHECKPOINT().config.model, FoldkernelsConfig.model_validate(SECTIONS[name]))
    bind(model, "torch")
    with on_mps() as found:
        train_once(model, clean)
    assert any("_backward" in name for name in found.operators)
    config = checkpoint.config.interpolant
    with on_mps() as found:
        Interpolant(config).sample(2, N, model.to("mps").eval(), num_timesteps=2, progress=False)
    random = {name for name in found.operators if any(word in name for word in RANDOM)}
    assert not random, "random numbers drawn on MPS"


@pytest.mark.parametrize("case", ["flash_1d_bias", "dense"])
def test_rna_frameflow(case):
    path = MULTIFLOW.parent / "rna_frameflow" / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["cfg"])
    model = rna_frameflow.FlowModel(config)
    bind(model, "torch")
    batch = part(load_file(path), "in.")
    with on_mps():
        model.to("mps").train()
        out = model({name: value.to("mps") for name, value in batch.items()})
        sum(value.square().mean() for value in out.values()).backward()


@pytest.mark.parametrize("no_seq", [True, False])
def test_pairformer(no_seq):
    s, z, mask = torch.randn(2, N, 16), torch.randn(2, N, N, 8), torch.ones(2, N)
    sizes = {"pairwise_head_width": 4, "pairwise_num_heads": 2}
    layer: nn.Module = PairformerNoSeqLayer(8, **sizes) if no_seq else PairformerLayer(16, 8, 2, v2=True, **sizes)
    bind(layer, "torch")
    with on_mps():
        s, z, mask = s.to("mps"), z.to("mps"), mask.to("mps")
        pairs = mask[:, :, None] * mask[:, None]
        out = layer.to("mps").train()(*((z, pairs) if no_seq else (s, z, mask, pairs)))
        sum(x.square().mean() for x in (out if isinstance(out, tuple) else (out,))).backward()


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", _some(["float32", "bfloat16"], ["float32"]))
def test_the_work_of_verify_and_of_doctor(precision):
    """Every item that runs on a Mac passes: kernels on MPS, the definition in float64 on the CPU."""
    items, _ = plan(published_subjects(), device="mps", length=6, precisions=[precision], kernels=["torch"])
    assert len(items) > 5 and {item.device for item in items} == {"mps"}
    with on_mps():
        rows = [verify(item) for item in items]
    assert [(row.operation, row.what, row.why) for row in rows if row.status != "passed"] == []


@pytest.mark.parametrize("operation", _some(operations(), ["invariant_point_attention", "attention"]))
def test_the_work_of_bench_on_an_operation(operation):
    subject = OperationSubject(operation, SMALL)
    point = Point("forward+backward", 6, "float32", "mps")
    if why := subject.why_not("torch", point):
        assert "on a CPU only" in why
        pytest.skip(f"bench says of MPS: {why}")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


@pytest.mark.slow
def test_the_work_of_bench_on_a_model():
    subject = MultiflowModel(MULTIFLOW / "small")
    point = Point("forward+backward", N, "float32", "mps")
    with on_mps():
        assert subject.check("torch", point).passed
        subject.call("torch", point)()


def test_the_work_of_verify_on_a_checkpoint():
    with on_mps():
        rows = compare_presets(model_of("small").to("mps"), N, presets=["torch", "flash"])
    assert [(row.preset, row.why) for row in rows if not row.passed] == []
