"""What is measured: operations, each kernel a side; models stand in `models`, each preset a side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch

from ...configs.kernel import KernelConfig
from ...configs.presets import OPERATIONS, PRESETS
from ...kernels import registry
from ...kernels.registry.types import Dims, Request
from ...kernels.testing import accuracy
from ...kernels.testing.cases import builders
from ...kernels.testing.cases.case import Case
from ..report.results import BACKWARD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
#: Lengths at which kernels are checked, at most; beyond them only where a kernel changes its mind later.
CHECKED = {"cpu": 49}
CHECKED_ON_A_GPU = 129
TINY = 16
#: Operations whose work grows with the cube of the length, beside much that grows with its square.
CUBIC = frozenset({"triangle_attention", "triangle_attention_update", "triangle_multiplication"})
CUBIC_GROWTH = 2.5


@dataclass(frozen=True)
class Point:
    """One measurement: every side of a subject is measured at it.

    Attributes:
        mode: `forward` or `forward+backward`.
        length: Residues or tokens.
        dtype: A key of `DTYPES`.
        device: Where.
        seed: Of the inputs.
    """

    mode: str
    length: int
    dtype: str
    device: str
    seed: int = 0

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return self.mode == BACKWARD


@dataclass(frozen=True)
class Checked:
    """What came of a check.

    Attributes:
        passed: Whether the side may be timed.
        words: The check in words.
        error: The worst tensor's error, over its largest value.
        plain: The same of plain PyTorch.
        allowed: The largest that passes.
    """

    passed: bool
    words: str
    error: float
    plain: float
    allowed: float


class Subject(Protocol):
    """Something that several sides compute alike."""

    kind: str
    name: str
    growth: float

    def sizes(self) -> Mapping[str, int]:
        """The widths, by name, without the length."""
        ...

    def sides(self, device: str) -> list[str]:
        """The names of all sides, those that cannot run among them."""
        ...

    def alike(self, device: str) -> Mapping[str, list[str]]:
        """For a side, what else it stands for."""
        ...

    def why_not(self, side: str, point: Point) -> str:
        """Why a side cannot run; empty if it can."""
        ...

    def check(self, side: str, point: Point) -> Checked:
        """Hold a side to float64."""
        ...

    def call(self, side: str, point: Point) -> Callable[[], object]:
        """What is timed."""
        ...

    def runs(self, side: str) -> list[str]:
        """The kernels that `call` runs, as "operation: kernel"."""
        ...

    def forget(self) -> None:
        """Let go of inputs and of results that were kept."""
        ...


class OperationSubject:
    """An operation at published sizes: one item, nothing masked; checked on three items, each masked in its own way.

    Args:
        name: The operation's name.
        sizes: A key of `builders.SIZES`' three, or sizes by name.
    """

    kind = "operation"

    def __init__(self, name: str, sizes: int | Mapping[str, int] = builders.PUBLISHED) -> None:
        self.name, self._sizes = name, sizes
        self.growth = CUBIC_GROWTH if name in CUBIC else 2.0
        self._inputs = lru_cache(maxsize=1)(self._draw)
        self._beside = lru_cache(maxsize=2)(self._truth_and_plain)
        self._checked: dict[tuple[Any, ...], Checked] = {}
        self._cotangents: dict[Point, list[torch.Tensor]] = {}

    def sizes(self) -> Mapping[str, int]:
        """The widths, by name, without the length."""
        return builders.sizes_of(self.name, self._sizes)

    def sides(self, device: str) -> list[str]:
        """The definition first, then plain PyTorch, then the others by name."""
        first = ["reference", "torch"]
        return sorted(registry.kernels(self.name), key=lambda kernel: (*(kernel != name for name in first), kernel))

    def alike(self, device: str) -> Mapping[str, list[str]]:
        """Nothing: each kernel stands for itself."""
        return {}

    def why_not(self, side: str, point: Point) -> str:
        """Every reason why a kernel cannot run; empty if it can."""
        if side not in registry.kernels(self.name):
            return f"{self.name} has no kernel {side!r}"
        case = self._asked(self._case(TINY, False, point.seed), point.length)
        found = accuracy.reasons(case, side, DTYPES[point.dtype], point.device, point.backward)
        if found:
            return "; ".join(str(reason) for reason in found)
        return "" if self._token(side, point) else "no configuration chooses it: it serves as part of a module only"

    def check(self, side: str, point: Point) -> Checked:
        """Hold outputs, and every gradient, to the definition in float64; each once."""
        length = self.checked_length(point)
        key = (side, point.dtype, point.device, point.backward, length, point.seed)
        if key not in self._checked:
            self._checked[key] = self._check(side, replace(point, length=length))
        return self._checked[key]

    def checked_length(self, point: Point) -> int:
        """The length itself while it is short; else one at which the same kernels serve."""
        most = CHECKED.get(point.device, CHECKED_ON_A_GPU)
        reached = [edge for edge in registry.thresholds(self.name) if edge <= point.length]
        return min(point.length, max([most, *reached]))

    def _check(self, side: str, point: Point) -> Checked:
        dtype, words = DTYPES[point.dtype], "three items, masked"
        masked = not accuracy.reasons(self._example(point, True), side, dtype, point.device, point.backward)
        if not masked:  # it takes no such masks
            words = "one item, nothing masked"
        case = self._example(point, masked)
        beside = self._beside(replace(point, mode=BACKWARD), masked)
        found = accuracy.check(case, side, dtype, device=point.device, backward=point.backward, beside=beside)
        worst = found.worst
        words = f"{found.broken or worst}; N={point.length}, {words}"
        if worst is None:
            return Checked(False, words, float("nan"), float("nan"), float("nan"))
        scale = worst.largest or 1.0
        return Checked(found.passed, words, worst.error / scale, worst.plain / scale, worst.allowed / scale)

    def _example(self, point: Point, masked: bool) -> Case:
        return self._case(point.length, masked, point.seed, batch=3 if masked else 1)

    def _truth_and_plain(self, point: Point, masked: bool) -> tuple[accuracy.Ran, accuracy.Ran]:
        return accuracy.truth_and_plain(self._example(point, masked), DTYPES[point.dtype], device=point.device)

    def call(self, side: str, point: Point) -> Callable[[], object]:
        """The operation under the kernel, on inputs that all kernels share."""
        x, wanted, case = self._inputs(point)
        config, cotangents = self._token(side, point), self._cotangents.setdefault(point, [])

        def forward() -> object:
            with torch.no_grad():
                return case.call(x, config)

        def step() -> object:  # cotangents are drawn with the first call, and are the same for every side
            with torch.enable_grad():
                outputs = case.call(x, config)
            if not cotangents:
                generator = torch.Generator().manual_seed(point.seed + 1)
                cotangents.extend(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
            return torch.autograd.grad(outputs, wanted, cotangents)

        return step if point.backward else forward

    def runs(self, side: str) -> list[str]:
        """The kernel itself."""
        return [f"{self.name}: {side}"]

    def forget(self) -> None:
        """Let go of inputs and of results that were kept."""
        self._inputs.cache_clear()
        self._beside.cache_clear()
        self._cotangents.clear()

    def _draw(self, point: Point) -> tuple[dict[str, Any], list[torch.Tensor], Case]:
        """The inputs that all sides share, those among them that have a gradient, and the case without its values."""
        case, dtype = self._case(point.length, False, point.seed), DTYPES[point.dtype]
        x: dict[str, Any] = {}
        for name, value in case.values.items():
            if value is not None and value.is_floating_point():
                value = value.to(accuracy.given_dtype(case, name, dtype), copy=True).to(point.device)
                value.requires_grad_(point.backward and name not in case.constants)
            x[name] = value if value is None else value.to(point.device)
        wanted = [value for value in x.values() if value is not None and value.requires_grad]
        return x, wanted, replace(case, values={})

    def _case(self, length: int, masked: bool, seed: int, batch: int = 1) -> Case:
        return builders.make(self.name, length, batch=batch, masked=masked, sizes=self._sizes, seed=seed)

    def _asked(self, case: Case, length: int) -> Case:
        """The same case to ask about, at another length."""
        return replace(case, dims={**case.dims, registry.operations()[self.name].length: length})

    def _token(self, side: str, point: Point) -> str:
        """The token of a configuration under which the side runs; empty where there is none."""
        if self.name in OPERATIONS:
            return registry.token(KernelConfig.model_validate({self.name: side}))
        # A configuration has no word for it: a preset that chooses the kernel, then.
        case = self._asked(self._case(TINY, False, point.seed), point.length)
        request = Request(
            operation=self.name,
            device=point.device.partition(":")[0],
            dtype=DTYPES[point.dtype],
            capability=registry.machine.capability(point.device.partition(":")[0]),
            dims=Dims(case.dims),
            grad=point.backward,
            options=case.options,
        )
        for preset in PRESETS:
            config = KernelConfig(preset=preset, fallback="silent")
            with suppress(registry.KernelUnavailable):
                if registry.decide(request, config).kernel.name == side:
                    return registry.token(config)
        return ""
