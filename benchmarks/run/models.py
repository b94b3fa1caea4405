"""Whole models: Multiflow's, from a config or a checkpoint, and a user's own, from `module:factory`.

A side is a preset; of several that choose the same kernels the first stands for all. A user's own model has one side
more, `original`: it runs as it is, where the others run under `accelerate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ...configs.presets import PRESETS
from ...errors import BadInput
from ...kernels.registry import KernelUnavailable, record_kernels
from ...kernels.registry.binding import bind, users_of
from .correctness import judge
from .operations import TINY, Checked, Point, Subject
from .random_models import draw_chains, draw_weights

#: Length at which a model is checked, at most: gradients in float64 take long.
CHECKED = 48
ORIGINAL, DEFINITION = "original", "reference"


def model_subject(spec: Mapping[str, Any]) -> Subject:
    """The model that a plan's specification means: a path, or `module:factory` and where its inputs come from.

    Raises:
        BadInput: There is none.
    """
    if spec.get("inputs"):
        return OwnModel(spec["source"], spec["inputs"])
    return MultiflowModel(Path(spec["source"]))


class ModelSubject:
    """What all models have in common: sides that are presets, checks and calls.

    Args:
        name: What the rows call it.
        model: In float32, on the CPU, in eval mode.
    """

    kind = "model"
    growth = 2.0

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self._ready = lru_cache(maxsize=1)(self._place)
        self._presets = lru_cache(maxsize=2)(self._distinct)
        self._truth = lru_cache(maxsize=2)(self._truth_and_plain)
        self._checked: dict[tuple[Any, ...], Checked] = {}
        self._ran: dict[str, list[str]] = {}
        self._inputs = lru_cache(maxsize=2)(self._batch)
        self._models: dict[tuple[str, str], nn.Module] = {}

    # What a kind of model brings --------------------------------------------------------------------------------------

    first = DEFINITION

    def sizes(self) -> Mapping[str, int]:
        """The number of parameters."""
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def inputs(self, length: int, seed: int, masked: bool) -> Any:
        """What `outputs` takes, on the CPU."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """Floating outputs by name; only residues that are there."""
        raise NotImplementedError

    def given(self, model: nn.Module, preset: str) -> None:
        """Give a model the kernels of a preset."""
        bind(model, {"preset": preset, "fallback": "silent"})

    # Sides ------------------------------------------------------------------------------------------------------------

    def sides(self, device: str) -> list[str]:
        """The side that the others are judged by, then the presets."""
        return sorted(self._presets(device), key=lambda side: side != self.first)

    def alike(self, device: str) -> Mapping[str, list[str]]:
        """For each side the presets that it stands for, besides its own."""
        return {side: others for side, others in self._presets(device).items() if others}

    def why_not(self, side: str, point: Point) -> str:
        """Why a side cannot run; empty if it can."""
        if point.dtype == "float64" and _on_mps(point):
            return "MPS has no float64"
        known = self.sides(point.device)
        return "" if side in known else f"no preset {side!r} here: {', '.join(known)}"

    def runs(self, side: str) -> list[str]:
        """The kernels that the side ran on a short chain."""
        return list(self._ran.get(side, ()))

    def _distinct(self, device: str) -> dict[str, list[str]]:
        """The presets that choose different kernels, found by running each on a short chain, and what else each is."""
        chosen: dict[tuple[str, ...], str] = {}
        found: dict[str, list[str]] = {}
        batch = self._moved(self.inputs(TINY, 0, False), device)
        words = [ORIGINAL] if self.first == ORIGINAL else []
        for word in [*words, *PRESETS]:
            try:
                with torch.no_grad(), record_kernels() as ran:
                    self.outputs(self._side(word, device), batch)
            except KernelUnavailable:
                continue
            kernels = () if word == ORIGINAL else tuple(sorted(set(ran)))
            if kernels in chosen:
                found[chosen[kernels]].append(word)
                continue
            chosen[kernels], found[word], self._ran[word] = word, [], list(kernels)
        return found

    def _side(self, side: str, device: str) -> nn.Module:
        """The model with a side's kernels: the parameters are the same tensors on every side."""
        if (side, device) not in self._models:
            model = self._ready(device)
            shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
            mine = copy.deepcopy(model, shared)
            if side != ORIGINAL:
                self.given(mine, side)
            self._models[side, device] = mine
        return self._models[side, device]

    def _place(self, device: str) -> nn.Module:
        self._models.clear()
        return self.model.to(device)

    # Calls ------------------------------------------------------------------------------------------------------------

    def call(self, side: str, point: Point) -> Callable[[], object]:
        """The forward pass, or forward, a scalar of every output, and backward to every parameter; no dropout."""
        model = self._side(side, point.device)
        inputs = self._inputs(point.length, point.seed, False, point.device)
        rounding = self._rounding(point)

        def forward() -> object:
            with torch.no_grad(), rounding():
                return self.outputs(model, inputs)

        def step() -> object:
            model.zero_grad(set_to_none=True)
            with torch.enable_grad(), rounding():
                value = _loss(self.outputs(model, inputs), point.seed)
            torch.autograd.backward(value)
            return [p.grad for p in model.parameters()]

        return step if point.backward else forward

    def forget(self) -> None:
        """Let go of inputs, gradients and results."""
        self._inputs.cache_clear()
        self._truth.cache_clear()
        self.model.zero_grad(set_to_none=True)

    def _batch(self, length: int, seed: int, masked: bool, device: str) -> Any:
        return self._moved(self.inputs(length, seed, masked), device)

    @staticmethod
    def _moved(inputs: Any, device: str, dtype: torch.dtype | None = None) -> Any:
        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype) if dtype is not None and x.is_floating_point() else x.to(device)

        return _pytree.tree_map(move, inputs)

    @staticmethod
    def _rounding(point: Point) -> Callable[[], AbstractContextManager[Any]]:
        if point.dtype != "bfloat16":
            return nullcontext
        kind = point.device.partition(":")[0]
        return lambda: torch.autocast(kind, torch.bfloat16)

    # Checks -----------------------------------------------------------------------------------------------------------

    def check(self, side: str, point: Point) -> Checked:
        """Hold a side to the first one in float64, on a short input."""
        length = min(point.length, CHECKED)
        key = (side, point.dtype, point.device, point.backward, length, point.seed)
        if key not in self._checked:
            at = Point(point.mode, length, point.dtype, point.device, point.seed)
            truth, plain = self._truth(at)
            found = judge(
                True, "bfloat16" if point.dtype == "bfloat16" else "float32", truth, plain, self._got(side, at)
            )
            words = f"{found.words}; L={length}, some residues masked"
            self._checked[key] = Checked(found.passed, words, found.error, found.plain, found.allowed)
        return self._checked[key]

    def _truth_and_plain(self, point: Point) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        where = "cpu" if _on_mps(point) else point.device
        exact = copy.deepcopy(self._side(self.first, point.device)).to(where).double()  # MPS has no float64
        inputs = self._moved(self.inputs(point.length, point.seed, True), where, torch.float64)
        truth = self._results(exact, inputs, point, nullcontext)
        return truth, self._got(self.first, point)

    def _got(self, side: str, point: Point) -> dict[str, Tensor]:
        inputs = self._moved(self.inputs(point.length, point.seed, True), point.device)
        model = self._side(side, point.device)
        found = self._results(model, inputs, point, self._rounding(point))
        model.zero_grad(set_to_none=True)
        return found

    def _results(
        self, model: nn.Module, inputs: Any, point: Point, rounding: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, Tensor]:
        """Outputs, and after a backward pass every parameter's gradient; on the CPU."""
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(point.backward), rounding():
            outputs = self.outputs(model, inputs)
            if point.backward:
                torch.autograd.backward(_loss(outputs, point.seed))
        found = {name: value.detach().cpu() for name, value in outputs.items()}
        if point.backward:
            grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
            found |= {name: grad.detach().cpu() for name, grad in grads.items() if grad is not None}
        return found


def _on_mps(point: Point) -> bool:
    """Whether it is measured on an Apple GPU; there is one, with or without its number."""
    return point.device.partition(":")[0] == "mps"


def _loss(outputs: Mapping[str, Tensor], seed: int) -> Tensor:
    """A scalar that reaches every output, in random directions so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed + 1)
    shares = []
    for value in outputs.values():
        wide = torch.promote_types(value.dtype, torch.float32)
        direction = torch.randn(value.shape, generator=generator).to(value.device, wide)
        shares.append((value.to(wide) * direction).mean())
    return torch.stack(shares).sum()


class MultiflowModel(ModelSubject):
    """Multiflow's model: of a checkpoint, or of a config with weights drawn at random.

    Args:
        path: A folder, a weights file or a config.yaml.
    """

    def __init__(self, path: Path) -> None:
        from ...compat.multiflow.checkpoint.loading import described, load
        from ...compat.multiflow.config.sections import read_config

        path = path.expanduser()
        if path.suffix.lower() in (".yaml", ".yml"):
            model = described(read_config(path), path)
            draw_weights(model)
        else:
            model = load(path, kernel={"preset": "reference"})
        super().__init__("multiflow", model.eval())
        self.config = model.model_config

    def sizes(self) -> Mapping[str, int]:
        """Widths, blocks, and the number of parameters, which tells whether blocks were added."""
        config = self.config
        widths = {"c_s": config.node_embed_size, "c_z": config.edge_embed_size, "blocks": config.ipa.num_blocks}
        return {**widths, **super().sizes()}

    def inputs(self, length: int, seed: int, masked: bool) -> dict[str, Tensor]:
        """The model's batch: one chain; with masks, its last tenth takes no part."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.config.node_features.aatype_pred_num_tokens
        return draw_chains(length, generator, max(1, length // 10) if masked else 0, tokens)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions, rotations and logits of the residues that are there."""
        out, there = model(inputs), inputs["res_mask"] > 0.5
        names = ("pred_trans", "pred_rotmats", "pred_logits")
        return {name: out[name][there] for name in names if name in out and out[name].is_floating_point()}


class OwnModel(ModelSubject):
    """A user's own model.

    Args:
        address: `module:factory`, as `foldkernels accelerate` takes it.
        inputs: `module:function`: called with a length, it gives the model's arguments: a tuple of them, a mapping of
            keyword arguments, or the only one.
    """

    first = ORIGINAL

    def __init__(self, address: str, inputs: str) -> None:
        from ...compat.accelerate.user_model import found_at, make, tried

        super().__init__(address, make(address, "--model").eval())
        self._draw, self._inputs_address = found_at(inputs, "--inputs"), inputs
        self._tried = tried
        if not callable(self._draw):
            raise BadInput(f"{inputs} is a {type(self._draw).__name__}, no function of a length")

    def inputs(self, length: int, seed: int, masked: bool) -> Any:
        """What the user's function gives for a length, its random numbers seeded."""
        torch.manual_seed(seed)
        return self._tried(f"calling {self._inputs_address} with {length}", lambda: self._draw(length))

    def outputs(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """Every floating tensor in what the model gives."""
        out = (
            model(**inputs)
            if isinstance(inputs, Mapping)
            else model(*(inputs if isinstance(inputs, tuple) else [inputs]))
        )
        leaves = _pytree.tree_leaves(out)
        found = {f"output {i}": x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()}
        if not found:
            raise BadInput(f"{self.name} gives a {type(out).__name__} in which no floating tensor is found")
        return found

    def given(self, model: nn.Module, preset: str) -> None:
        """Accelerate the model; bind it where it is made of this package's modules."""
        from ...compat.accelerate import accelerate

        kernel = {"preset": preset, "fallback": "silent"}
        if not accelerate(model, kernel).replaced and users_of(model):
            bind(model, kernel)  # a model made of this package's modules
