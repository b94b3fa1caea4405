"""The IPA layer alone against the original: outputs to 5e-6, every gradient to 3e-5, both absolute."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.invariant_point_attention import InvariantPointAttention
from foldkernels.modules.rigid import Rigid

from ..support.goldens import full_checkpoint, part, read

OUT, GRADIENT = 5e-6, 3e-5
CASES = ("ipa_small_L17", "ipa_small_L33", "ipa_published_full_ipa3_L14")
LEAVES = ("s", "z", "trans", "rotmats")


@dataclass
class Golden:
    """The layer with the golden's weights, its inputs as leaves, and what must come out."""

    layer: InvariantPointAttention
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    def run(self, attention_mask: Tensor | None = None) -> Tensor:
        x = self.inputs
        out: Tensor = self.layer(x["s"], x["z"], Rigid(x["rotmats"], x["trans"]), x["mask"], attention_mask)
        return out

    @property
    def there(self) -> Tensor:
        return self.inputs["mask"] > 0.5

    def gradients(self) -> dict[str, Tensor | None]:
        """Named as in the golden."""
        inner = {f"grad.{name}": self.inputs[name].grad for name in LEAVES}
        return inner | {f"gradw.{name}": weight.grad for name, weight in self.layer.named_parameters()}


def golden(case: str, kernel: str) -> Golden:
    expected, metadata = read(f"ipa/{case}.safetensors")
    sizes = metadata["ipa_cfg"]
    layer = InvariantPointAttention(**sizes)
    # The published block's weights are the full checkpoint's.
    weights = part(expected, "w.") or part(full_checkpoint().state_dict, "trunk.ipa_3.")
    layer.load_state_dict(weights, strict=True)
    bind(layer, kernel)
    inputs = part(expected, "in.")
    for name in LEAVES:
        inputs[name].requires_grad_()
    return Golden(layer, inputs, expected)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.detach().double()).abs().max())


@pytest.mark.parametrize("kernel", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_originals(case: str, kernel: str) -> None:
    """Without and with `attention_mask`; gradients of inputs and weights, against the original's float32."""
    g = golden(case, kernel)
    there = g.there
    with record_kernels() as ran:
        restricted, out = g.run(g.inputs["attention_mask"]), g.run()
    assert ran == [f"invariant_point_attention: {kernel}"] * 2
    assert error(restricted[there], g.expected["out_attention_mask"][there]) <= OUT
    assert error(restricted[there], out[there]) > 0.01  # the mask does something
    assert error(out[there], g.expected["out"][there]) <= OUT
    truth = g.expected["out"].double() + g.expected["d64"].double()
    assert error(out[there], truth[there]) <= OUT

    loss = (out * g.inputs["loss_w"]).sum()
    assert abs(float(loss.detach()) - float(g.expected["loss"])) <= 1e-4
    loss.backward()
    found = g.gradients()
    names = [name for name in g.expected if name.startswith(("grad.", "gradw."))]
    assert len(names) >= 14 and {f"grad.{name}" for name in LEAVES} <= set(names)
    for name in names:
        gradient = found[name]
        assert gradient is not None, name
        assert error(gradient, g.expected[name]) <= GRADIENT, name


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_gradients_under_an_attention_mask_are_float64s(kernel: str) -> None:
    """No golden has them: the reference in float64 is the truth."""
    truth, g = golden("ipa_small_L17", "reference"), golden("ipa_small_L17", kernel)
    truth.layer.double()
    mask = truth.inputs["attention_mask"]
    truth.inputs = {
        name: (value.detach().double().requires_grad_() if name in LEAVES else value)
        for name, value in truth.inputs.items()
    }
    (truth.run(mask) * truth.inputs["loss_w"]).sum().backward()
    (g.run(mask) * g.inputs["loss_w"]).sum().backward()
    expected = truth.gradients()
    for name, gradient in g.gradients().items():
        wanted = expected[name]
        assert gradient is not None and wanted is not None
        assert error(gradient, wanted) <= GRADIENT, name
    # A pair that may not be attended, either way round, passes no gradient to z.
    allowed = (mask > 0.5) & g.there[:, :, None] & g.there[:, None]
    z_gradient = g.inputs["z"].grad
    assert z_gradient is not None and (z_gradient[~allowed] == 0).all() and (z_gradient[allowed] != 0).any()


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_the_bias_that_the_softmax_removes_has_zeros_for_a_gradient(kernel: str) -> None:
    """`linear_b.bias`: zeros, not None, or DDP would wait for it; and its value does not matter."""
    g = golden("ipa_small_L17", kernel)
    out = g.run()
    (out * g.inputs["loss_w"]).sum().backward()
    gradient = g.layer.linear_b.bias.grad
    assert gradient is not None and float(gradient.abs().max()) <= 1e-5
    if kernel == "torch":
        assert (gradient == 0).all()
    with torch.no_grad():
        g.layer.linear_b.bias += 3.0
    assert error(g.run()[g.there], out[g.there]) <= OUT


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_masked_rows_are_one_value_and_pass_no_gradient(kernel: str) -> None:
    """A masked row is the output layer's value for zeros seen from its frame: what stands in it does not matter."""
    g = golden("ipa_small_L17", kernel)
    gone = ~g.there
    assert gone.any()
    g.inputs["mask"] = g.there  # a boolean is as good
    out = g.run()
    out[gone].sum().backward()
    for name in ("s", "z"):
        gradient = g.inputs[name].grad
        assert gradient is not None and (gradient == 0).all(), name
    with torch.no_grad():
        g.inputs["s"][gone] = 100.0
        g.inputs["z"][gone] = -50.0
        g.inputs["z"].transpose(1, 2)[gone] = 70.0
        assert torch.equal(g.run(), out)


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_a_query_without_keys_is_as_if_masked(kernel: str) -> None:
    """A row of `attention_mask` that allows nothing gives zeros and finite gradients, not NaN."""
    g = golden("ipa_small_L17", kernel)
    allowed = torch.ones_like(g.inputs["attention_mask"])
    allowed[0, 2] = 0
    allowed[1, 3] = 0
    out = g.run(allowed)
    (out * g.inputs["loss_w"]).sum().backward()
    assert out.isfinite().all()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in g.gradients().values())
    mask = g.there.clone()
    mask[0, 2] = False
    alone = g.run()
    g.inputs["mask"] = mask
    without = g.run()
    assert error(out[0, 2], without[0, 2]) <= OUT and error(out[0, 2], alone[0, 2]) > 0.01
    # As a key it is still there.
    assert error(out[0, 1], alone[0, 1]) <= OUT


@pytest.mark.parametrize("name", ["mask", "z", "attention_mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    """A clear error instead of a broadcast that computes something else."""
    g = golden("ipa_small_L17", "torch")
    allowed = g.inputs["attention_mask"]
    if name == "attention_mask":
        allowed = allowed[:, :1]
    else:
        g.inputs[name] = g.inputs[name].detach()[:, :1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        g.run(allowed)


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_bfloat16_autocast_keeps_the_points_exact(kernel: str) -> None:
    """Under autocast the frames are never rounded: 100 nm away the layer is as right as at home."""
    g = golden("ipa_small_L33", kernel)
    there = g.there
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        near = g.run()
        g.inputs["trans"] += 100.0
        far = g.run()
    assert near.dtype is torch.bfloat16
    scale = float(g.expected["out"][there].abs().max())
    assert error(near[there], g.expected["out"][there]) <= 0.03 * scale
    assert error(far[there], near[there]) <= 0.01 * scale


def test_logit_dropout_drops_the_same_logits_under_every_preset() -> None:
    """`ipa.dropout` is the reference's alone: `torch` says so at bind and falls back, and the draw is the same."""
    outs = []
    for kernel in ("reference", {"preset": "torch", "fallback": "silent"}):
        expected, metadata = read("ipa/ipa_small_L17.safetensors")
        layer = InvariantPointAttention(**{**metadata["ipa_cfg"], "dropout": 0.3})
        layer.load_state_dict(part(expected, "w."))
        bind(layer, kernel)
        g = Golden(layer, part(expected, "in."), expected)
        torch.manual_seed(3)
        with record_kernels() as ran:
            outs.append(g.run())
        assert ran == ["invariant_point_attention: reference"]
        layer.eval()
        assert error(g.run()[g.there], expected["out"][g.there]) <= OUT
    assert torch.equal(*outs)
    assert error(outs[0][g.there], g.expected["out"][g.there]) > 0.01
