"""Requests for tests of the registry, and a registry that is left as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from foldkernels.configs.resolve import ENVIRONMENT_VARIABLE
from foldkernels.kernels.registry import operations
from foldkernels.kernels.registry.types import Dims, Request

from .standins import restored

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test may register what it likes; and the environment says nothing."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with restored():
        yield


def sizes_of(operation: str, n: int = 64) -> Dims:
    """Sizes of the published model's kind, with the length."""
    common = {"h": 8, "c": 16, "p": 8, "pv": 12, "cz": 128, "cz_out": 128, "cn": 128, "d": 64, "f": 64, "bins": 22}
    return Dims({name: common.get(name, 32) for name in operations()[operation].dims} | {"n": n})


def request_for(operation: str = "attention", device: str = "cpu", n: int = 64, **fields: Any) -> Request:
    return Request(operation, device, fields.pop("dtype", torch.float32), sizes_of(operation, n), **fields)


def every_request(operation: str, lengths: tuple[int, ...] = (64,)) -> Iterator[Request]:
    """Devices and their capabilities, floating types, precision, gradients, options: all of them with each other."""
    places = [("cpu", None), ("mps", None), ("meta", None), ("xpu", None)]
    places += [("cuda", capability) for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), None)]
    options = operations()[operation].options
    chosen = [frozenset(c) for size in range(len(options) + 1) for c in itertools.combinations(options, size)]
    flags = (False, True)
    for (device, capability), dtype, grad, compiled, deterministic, words, option, n in itertools.product(
        places, DTYPES, flags, flags, flags, ("float32", "tf32", "bfloat16"), chosen, lengths
    ):
        yield Request(
            operation, device, dtype, sizes_of(operation, n), capability, words, grad, compiled, deterministic, option
        )
