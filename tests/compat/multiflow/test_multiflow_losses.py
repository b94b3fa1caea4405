"""Multiflow's losses and their gradients against the original's, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.training import LossNotFinite
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import record_kernels

from ...support.goldens import part, read, small_model

KERNELS = ("reference", "torch")
STEPS = ("step_pdb_L48", "step_pdb_L48_default_weights")
NAMES = ("trans_loss", "rots_vf_loss", "aatypes_loss", "auxiliary_loss", "train_loss")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_losses_and_gradients_are_the_originals(name: str, kernel: str) -> None:
    """Losses to 2e-5 relative, each weight's gradient to 2e-4 in relative norm, `linear_b.bias` below 1e-7."""
    golden, metadata = read(f"train/{name}.safetensors")
    model = small_model(kernel)
    with record_kernels() as ran:
        found = multiflow.losses(model, part(golden, "in."), metadata["training"])
    assert {entry.partition(": ")[2] for entry in ran} == {kernel}
    assert tuple(found) == NAMES
    for loss in NAMES:
        torch.testing.assert_close(found[loss].detach(), golden[f"out.{loss}"], rtol=2e-5, atol=0)
    found["train_loss"].mean().backward()
    expected = part(golden, "gradw.")
    assert len(expected) > 100
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    for key, wanted in expected.items():
        if key.endswith("linear_b.bias"):
            assert float(gradients[key].abs().max()) < 1e-7
        else:
            assert float((gradients[key] - wanted).norm()) <= 2e-4 * float(wanted.norm()), key


def golden_batch() -> tuple[dict[str, Tensor], dict[str, Any]]:
    golden, metadata = read("train/step_pdb_L48.safetensors")
    return part(golden, "in."), metadata["training"]


def echo(batch: dict[str, Tensor], shift: float = 0.0) -> Any:
    """A model that knows the answer, moved by `shift` Angstrom along x."""

    def model(_: Any) -> dict[str, Tensor]:
        logits = torch.nn.functional.one_hot(batch["aatypes_1"], 21).float() * 50
        moved = batch["trans_1"] + torch.tensor([shift, 0.0, 0.0])
        return {"pred_trans": moved, "pred_rotmats": batch["rotmats_1"], "pred_logits": logits}

    return model


def test_the_right_answer_costs_nothing() -> None:
    batch, settings = golden_batch()
    found = multiflow.losses(echo(batch), batch, settings)
    assert all(float(value.abs().max()) < 1e-6 for value in found.values())


@pytest.mark.parametrize("t", [0.2, 0.7, 0.97])
def test_the_value_of_a_shift(t: float) -> None:
    """CA moved by one Angstrom: 2 x (0.1 / (1 - t))^2 / 3, 1 - t being at least 0.1; distances do not change."""
    batch, settings = golden_batch()
    batch |= {name: torch.full((2, 1), t) for name in ("r3_t", "so3_t", "cat_t")}
    found = multiflow.losses(echo(batch, 1.0), batch, settings)
    scaled = (0.1 / max(1 - t, 0.1)) ** 2
    torch.testing.assert_close(found["trans_loss"], torch.full((2,), min(5.0, 2 * scaled / 3)), rtol=1e-4, atol=0)
    # N, CA and C each moved so, and divided by three times the number of residues; early structures do not count.
    auxiliary = scaled if t > settings["aux_loss_t_pass"] else 0.0
    torch.testing.assert_close(found["auxiliary_loss"], torch.full((2,), min(5.0, auxiliary)), rtol=1e-3, atol=0)


def test_flags_switch_their_terms() -> None:
    batch, settings = golden_batch()
    batch |= {name: torch.full((2, 1), 0.8) for name in ("r3_t", "so3_t", "cat_t")}

    def model(_: Any) -> dict[str, Tensor]:
        answer = echo(batch)(None)
        return {**answer, "pred_trans": answer["pred_trans"] * 1.05, "pred_logits": answer["pred_logits"] * 0}

    def total(**changes: Any) -> dict[str, Tensor]:
        return multiflow.losses(model, batch, {**settings, **changes})

    both = total()["auxiliary_loss"]
    atoms = total(aux_loss_use_pair_loss=False)["auxiliary_loss"]
    pairs = total(aux_loss_use_bb_loss=False)["auxiliary_loss"]
    assert (atoms > 0).all() and (pairs > 0).all() and (both < 5).all()
    torch.testing.assert_close(both, atoms + pairs)
    assert not total(aux_loss_use_pair_loss=False, aux_loss_use_bb_loss=False)["auxiliary_loss"].any()
    torch.testing.assert_close(total(aux_loss_weight=0.5)["auxiliary_loss"], both / 2)
    plain = total()["aatypes_loss"]
    torch.testing.assert_close(plain, torch.full((2,), 21.0).log())
    torch.testing.assert_close(total(aatypes_loss_use_likelihood_weighting=True)["aatypes_loss"], plain / 0.2)
    torch.testing.assert_close(total(aatypes_loss_weight=0.25)["aatypes_loss"], plain / 4)


def test_what_is_masked_does_not_count() -> None:
    """Neither padding, nor residues that are not diffused, nor those of low confidence unless that is switched off."""
    batch, settings = golden_batch()
    model = small_model()
    half = torch.ones_like(batch["res_mask"])
    half[:, 24:] = 0
    for name in ("res_mask", "diffuse_mask", "plddt_mask"):
        masked = {**batch, name: half}

        def wrong_there(given: Any, masked: dict[str, Tensor] = masked) -> dict[str, Tensor]:
            out = model(given)
            far = (1 - half)[..., None] * 100
            return {**out, "pred_trans": out["pred_trans"] + far, "pred_logits": out["pred_logits"] - far}

        expected = multiflow.losses(model, masked, settings)
        found = multiflow.losses(wrong_there, masked, settings)
        for key in ("trans_loss", "aatypes_loss"):
            torch.testing.assert_close(found[key], expected[key])
    everywhere = multiflow.losses(model, {**batch, "plddt_mask": half}, {**settings, "mask_plddt": False})
    torch.testing.assert_close(everywhere["aatypes_loss"], multiflow.losses(model, batch, settings)["aatypes_loss"])
    without = {name: value for name, value in batch.items() if name != "plddt_mask"}
    torch.testing.assert_close(
        multiflow.losses(model, without, settings)["train_loss"], multiflow.losses(model, batch, settings)["train_loss"]
    )


def test_unknown_types_are_no_target_without_a_token_for_them() -> None:
    batch, settings = golden_batch()
    batch["aatypes_1"] = batch["aatypes_1"].clone()
    batch["aatypes_1"][0, 3] = 20

    def model(_: Any) -> dict[str, Tensor]:
        return {**echo(batch)(None), "pred_logits": torch.zeros(2, 48, 20)}

    found = multiflow.losses(model, batch, settings)["aatypes_loss"]
    each = torch.tensor(20.0).log()
    length = float(batch["res_mask"][0].sum())
    torch.testing.assert_close(found, torch.stack((each * (length - 1) / length, each)))


@pytest.mark.parametrize("broken", ["pred_trans", "pred_logits"])
def test_a_loss_that_is_not_finite_names_its_item(broken: str) -> None:
    batch, settings = golden_batch()

    def model(_: Any) -> dict[str, Tensor]:
        out = echo(batch)(None)
        out[broken] = out[broken].clone()
        out[broken][1, 5] = float("nan")
        return out

    with pytest.raises(LossNotFinite, match=rf"item\(s\) \[1\].*in the prediction: {broken}"):
        multiflow.losses(model, batch, settings)


def test_bad_input() -> None:
    batch, settings = golden_batch()
    model = echo(batch)
    with pytest.raises(BadInput, match=r"no residue counts in batch item\(s\) \[0\]"):
        multiflow.losses(
            model, {**batch, "diffuse_mask": batch["diffuse_mask"] * torch.tensor([[0.0], [1.0]])}, settings
        )
    with pytest.raises(BadInput, match="lacks rotmats_t"):
        multiflow.losses(model, {name: batch[name] for name in batch if name != "rotmats_t"}, settings)
    with pytest.raises(BadInput, match="did you mean 'trans_scale'"):
        multiflow.losses(model, batch, {"trans_scal": 0.1})
    with pytest.raises(BadInput, match="do nothing in Multiflow"):
        multiflow.losses(model, batch, {"aatypes_label_smoothing": 0.1})
