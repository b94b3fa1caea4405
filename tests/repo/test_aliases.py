"""Names that moved are still found where they were: imports with a warning, and models pickled before the move."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings

import pytest
import torch

import foldkernels

MOVED = {
    "compat.errors": "errors",
    "compat.multiflow.backbone": "compat.multiflow.structures.backbone",
    "compat.multiflow.configuration": "compat.multiflow.config.sections",
    "kernels.accuracy": "kernels.testing.accuracy",
    "kernels.binding": "kernels.registry.binding",
    "kernels.examples.builders": "kernels.testing.cases.builders",
    "kernels.examples.case": "kernels.testing.cases.case",
    "kernels.explanation": "kernels.registry.explanation",
    "kernels.machine": "kernels.hardware.machine",
    "kernels.requests": "kernels.registry.types",
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_gives_the_same_objects_and_a_warning(monkeypatch, old, new):
    monkeypatch.delitem(sys.modules, f"foldkernels.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"foldkernels.{old} is now foldkernels.{new}"):
        before = importlib.import_module(f"foldkernels.{old}")
    now = importlib.import_module(f"foldkernels.{new}")
    public = getattr(now, "__all__", None) or [name for name in vars(now) if not name.startswith("_")]
    assert public and all(getattr(before, name) is getattr(now, name) for name in public)


def test_exceptions_are_found_where_they_were():
    for old, name in (
        ("configs.resolve", "ConfigError"),
        ("kernels.registry", "KernelUnavailable"),
        ("kernels.registry", "KernelFallbackWarning"),
        ("compat.multiflow.training", "LossNotFinite"),
        ("compat.accelerate.engine", "VerificationFailed"),
    ):
        home = importlib.import_module("foldkernels.errors")
        assert getattr(importlib.import_module(f"foldkernels.{old}"), name) is getattr(home, name)


def test_a_bound_model_pickled_before_the_move_loads_and_runs(goldens):
    """The file was written by the last version with the old layout: `pickle.dumps` of a bound FlowModel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = pickle.loads((goldens / "pickles" / "bound_flow_model.pkl").read_bytes())
    b, n = 1, 7
    zeros, ones = torch.zeros(b, n, 3), torch.ones(b, n)
    batch = {
        "res_mask": ones, "diffuse_mask": ones, "chain_idx": ones.long(), "res_idx": torch.arange(n)[None],
        "trans_t": torch.randn(b, n, 3), "rotmats_t": torch.eye(3).expand(b, n, 3, 3), "trans_sc": zeros,
        "aatypes_t": torch.zeros(b, n, dtype=torch.long), "aatypes_sc": torch.zeros(b, n, 21),
        "so3_t": ones[:, :1] / 2, "r3_t": ones[:, :1] / 2, "cat_t": ones[:, :1] / 2,
    }  # fmt: skip
    with torch.no_grad(), foldkernels.record_kernels() as ran:
        out = model(batch)
    assert ran and out["pred_trans"].isfinite().all()
    assert "invariant_point_attention" in str(model.kernels)
