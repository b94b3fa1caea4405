"""The sampler against the original's: every call of the model, the trajectory, and the generators' state after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roma
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat.multiflow.flow.interpolant import Interpolant
from foldkernels.compat.multiflow.flow.noise import Draws
from foldkernels.compat.multiflow.flow.so3_steps import geodesic, rotation_vector
from foldkernels.errors import BadInput

GOLDENS = Path(__file__).parents[2] / "goldens" / "multiflow"
REPLAYS = sorted(GOLDENS.glob("sample*/*.safetensors"))

CONFIG: dict[str, Any] = {
    "min_t": 0.01,
    "provide_kappa": False,
    "codesign_separate_t": False,
    "self_condition": True,
    "rots": {"corrupt": True, "sample_schedule": "exp", "exp_rate": 10},
    "trans": {"corrupt": True, "sample_schedule": "linear"},
    "aatypes": {"corrupt": True, "temp": 0.1, "noise": 1.0, "do_purity": True, "interpolant_type": "masking"},
    "sampling": {"num_timesteps": 5},
}

OUTPUTS = ("pred_trans", "pred_rotmats", "pred_aatypes", "pred_logits")


def config(**changes: Any) -> dict[str, Any]:
    """The default settings with some changed, by dotted name with ``__`` for the dot."""
    cfg = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        *path, last = name.split("__")
        section = cfg
        for part in path:
            section = section[part]
        section[last] = value
    return cfg


def stand_in(num_tokens: int = 21) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A model whose output for an item depends on that item's input alone."""

    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        trans, rotmats = batch["trans_t"], batch["rotmats_t"]
        weights = torch.linspace(-1.0, 1.0, 3 * num_tokens).reshape(3, num_tokens)
        logits = trans[..., None, :].mul(weights.T).sum(-1).sin() + batch["aatypes_sc"].tanh()
        turned = geodesic(0.3, rotmats.flip(1), rotmats)
        return {
            "pred_trans": 0.8 * trans - 0.1 * batch["trans_sc"],
            "pred_rotmats": turned,
            "pred_logits": logits,
            "pred_aatypes": logits[..., :20].argmax(-1),
        }

    return model


def draws_as_recorded() -> bool:
    """Tell whether `exponential_`, which `torch.multinomial` uses, draws as PyTorch 2.13 does: 2.6 does not."""
    drawn = torch.empty(3).exponential_(generator=torch.Generator().manual_seed(0))
    return torch.allclose(drawn, torch.tensor([3.5083263, 1.2303847, 0.6150441]))


@pytest.mark.skipif(not draws_as_recorded(), reason="this PyTorch draws other residue types from the recorded seed")
@pytest.mark.parametrize("path", REPLAYS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_replays_the_original(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    num_steps, num_batch, num_res = golden["step.aatypes_t"].shape
    inputs = {key[3:]: value for key, value in golden.items() if key.startswith("in.")}
    if "flags" in metadata:
        flags = json.loads(metadata["flags"])
    else:
        flags = {
            "forward_folding": metadata["task"] == "forward_folding",
            "inverse_folding": metadata["task"] == "inverse_folding",
            "separate_t": metadata["separate_t"] == "true",
        }
        if metadata["rng_draw"] == "true":
            inputs = {}
    expected_inputs = {
        key[5:]: value for key, value in golden.items() if key.startswith("step.") and not key.startswith("step.o_")
    }
    calls = 0
    # 5e-6 is one rounding of a coordinate far from the origin. Near half a turn a logarithm magnifies rounding a
    # hundredfold (1 / sin), which is what half_turns is made of.
    atol = 5e-5 if path.stem == "half_turns" else 5e-6

    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        for name, recorded in expected_inputs.items():
            torch.testing.assert_close(
                batch[name].float(),
                recorded[calls],
                rtol=1e-6,
                atol=atol,
                msg=lambda m, name=name: f"{name}, call {calls}: {m}",
            )
        outputs = {name: golden[f"step.o_{name}"][calls].clone() for name in OUTPUTS}
        calls += 1
        return outputs

    seed = int(metadata["seed"])
    torch.manual_seed(seed)
    np.random.seed(seed)
    interpolant = Interpolant(json.loads(metadata["interpolant"]))
    noisy, clean = interpolant.sample(
        num_batch,
        num_res,
        model,
        num_timesteps=int(metadata["num_timesteps"]),
        rewrite_fixed_types=True,
        **inputs,
        **flags,
    )
    assert torch.equal(torch.rand(4), golden["rand_after"])
    if "rand_after_numpy" in golden:
        assert torch.equal(torch.tensor(np.random.random(4)), golden["rand_after_numpy"])

    assert calls == num_steps == len(clean) == len(noisy) - 1
    for name, trajectory in (("prot", noisy), ("clean", clean)):
        types = torch.stack([step[1].float() for step in trajectory])
        assert torch.equal(types, golden[f"out.{name}_traj_aatypes"].float())
        atoms = torch.stack([step[0] for step in trajectory])
        assert not atoms[..., 5:, :].any()
        if f"out.{name}_traj_atom37" in golden:
            torch.testing.assert_close(atoms[..., :5, :], golden[f"out.{name}_traj_atom37"], rtol=0, atol=1e-4)


def test_geodesics_follow_the_original_at_every_angle() -> None:
    golden = load_file(GOLDENS / "geometry" / "rotations.safetensors")
    angle = golden["angle"]
    vector = rotation_vector(golden["relative"])
    torch.testing.assert_close(vector, golden["log"], rtol=0, atol=5e-6)
    for fraction in (0.02, 0.2, 1.0, 2.475):
        ours = geodesic(fraction, golden["target"], golden["start"])
        torch.testing.assert_close(ours, golden[f"geodesic_{fraction}"], rtol=0, atol=1e-5)
        product = ours.transpose(-1, -2) @ ours
        torch.testing.assert_close(product, torch.eye(3).expand_as(product), rtol=0, atol=2e-6)
    # Away from pi the maths is roma's. Within 0.01 of it the axis is right to about 1e-2 (see rotation_vector).
    away = (angle - math.pi).abs() > 0.0101
    torch.testing.assert_close(vector[away], roma.rotmat_to_rotvec(golden["relative"][away]), rtol=0, atol=3e-5)
    end = geodesic(1.0, golden["target"], golden["start"])
    assert float((end - golden["target"])[away].abs().max()) < 1e-5
    assert float((end - golden["target"]).abs().max()) < 0.05


def test_seeds_make_an_item_independent_of_its_batch() -> None:
    interpolant = Interpolant(config())
    seeds = [11, 2**40 + 3, 7]
    state = torch.get_rng_state()
    together, _ = interpolant.sample(3, 8, stand_in(), seeds=seeds)
    assert torch.equal(torch.get_rng_state(), state)
    for item, seed in enumerate(seeds):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        alone, _ = interpolant.sample(1, 8, stand_in())
        for step, (atoms, types) in enumerate(alone):
            assert torch.equal(types[0], together[step][1][item]), f"step {step}"
            torch.testing.assert_close(atoms[0], together[step][0][item], rtol=0, atol=1e-4)


@pytest.mark.parametrize("purity", [True, False])
def test_seeds_with_uniform_noise_and_without_purity(purity: bool) -> None:
    if purity:
        with pytest.raises(BadInput, match="do_purity"):
            Interpolant(config(aatypes__interpolant_type="uniform"))
        return
    interpolant = Interpolant(config(aatypes__interpolant_type="uniform", aatypes__do_purity=False))
    noisy, _ = interpolant.sample(2, 6, stand_in(20), seeds=[1, 1])
    for atoms, types in noisy:
        assert torch.equal(types[0], types[1]) and torch.equal(atoms[0], atoms[1])


def test_the_last_call_gets_the_types_and_times_of_the_one_before() -> None:
    seen = []

    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({name: value.clone() for name, value in batch.items()})
        return stand_in()(batch)

    noisy, _ = Interpolant(config()).sample(1, 9, model, num_timesteps=4, seeds=[5])
    for name in ("aatypes_t", "cat_t", "r3_t", "so3_t"):
        assert torch.equal(seen[-1][name], seen[-2][name])
    assert not torch.equal(noisy[-2][1], seen[-1]["aatypes_t"])
    assert noisy[1][1].dtype == torch.float32


def test_the_models_logits_stay_as_they_are() -> None:
    kept = []

    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = stand_in()(batch)
        kept.append((outputs["pred_logits"], outputs["pred_logits"].clone()))
        return outputs

    Interpolant(config(aatypes__do_purity=False)).sample(1, 5, model, seeds=[0])
    assert all(torch.equal(before, after) for before, after in kept)


def test_t_nn_gives_the_times() -> None:
    seen = []

    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append([float(batch[name]) for name in ("r3_t", "so3_t", "cat_t")])
        return stand_in()(batch)

    Interpolant(config()).sample(
        1, 3, model, num_timesteps=3, seeds=[0], t_nn=lambda t: torch.cat((t, 2 * t, 3 * t), -1)
    )
    assert seen[0] == pytest.approx([0.01, 0.02, 0.03])


def test_the_batch_is_on_the_models_device_and_holds_no_float64() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            assert all(value.device == self.weight.device for value in batch.values())
            assert all(value.dtype != torch.float64 for value in batch.values())
            assert not torch.is_grad_enabled()
            return stand_in()(batch)

    trans_1 = torch.randn(1, 4, 3, dtype=torch.float64)
    rotmats_1 = torch.eye(3, dtype=torch.float64).repeat(1, 4, 1, 1)
    Interpolant(config()).sample(
        1, 4, Module(), trans_1=trans_1, rotmats_1=rotmats_1, inverse_folding=True, separate_t=True, seeds=[0]
    )


def test_on_step_counts_every_call() -> None:
    calls = []
    Interpolant(config()).sample(1, 3, stand_in(), num_timesteps=6, seeds=[0], on_step=lambda: calls.append(1))
    assert len(calls) == 6


def test_autocast_around_sampling_leaves_the_geometry_alone() -> None:
    interpolant = Interpolant(config())
    plain, _ = interpolant.sample(1, 7, stand_in(), seeds=[3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = interpolant.sample(1, 7, stand_in(), seeds=[3])
    torch.testing.assert_close(cast[-1][0], plain[-1][0], rtol=0, atol=1e-4)


ROTATIONS = torch.eye(3).repeat(2, 4, 1, 1)
BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"trans_0": torch.zeros(2, 5, 3)}, r"trans_0 has shape \(2, 5, 3\), expected \(2, 4, 3\)"),
    "nan": ({"trans_1": torch.full((2, 4, 3), math.nan)}, r"trans_1 \(shape \(2, 4, 3\)\) holds NaN .* 8 residue"),
    "rotation nan": ({"rotmats_1": ROTATIONS * math.nan}, "rotmats_1 .*NaN"),
    "no rotation": ({"rotmats_0": ROTATIONS * 1.5}, "rotation matrices"),
    "reflection": ({"rotmats_0": -ROTATIONS}, "reflections"),
    "mask shape": ({"diffuse_mask": torch.ones(4)}, "diffuse_mask has shape"),
    "mask values": ({"diffuse_mask": torch.full((2, 4), 2.0)}, "from 0 .fixed. to 1"),
    "motif missing": ({"diffuse_mask": torch.zeros(2, 4)}, "diffuse_mask fixes residues, so trans_1 is needed"),
    "types range": ({"aatypes_1": torch.full((2, 4), 21)}, "from 0 to 20, found 21"),
    "types fraction": ({"aatypes_0": torch.full((2, 4), 0.5)}, "whole residue types"),
    "inverse": ({"inverse_folding": True}, "inverse folding keeps the backbone, so trans_1 is needed"),
    "forward": ({"forward_folding": True}, "noise is 1"),
    "steps": ({"num_timesteps": 1}, "at least 2"),
    "seeds": ({"seeds": [1]}, "1 seeds for a batch of 2"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named(case: str) -> None:
    arguments, message = BAD_INPUTS[case]
    with pytest.raises((BadInput, ValueError), match=message):
        Interpolant(config()).sample(2, 4, stand_in(), **arguments)


def test_missing_ends_are_named() -> None:
    with pytest.raises(BadInput, match="forward folding keeps residue types, so aatypes_1"):
        Interpolant(config(aatypes__noise=0.0)).sample(1, 4, stand_in(), forward_folding=True)
    with pytest.raises(BadInput, match=r"rots.corrupt is false, so rotmats_1"):
        Interpolant(config(rots__corrupt=False)).sample(1, 4, stand_in())
    with pytest.raises(BadInput, match="at least 1"):
        Interpolant(config()).sample(0, 4, stand_in())


@pytest.mark.parametrize("name", ["pred_logits", "pred_trans"])
def test_a_model_that_diverges_is_told(name: str) -> None:
    def model(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = stand_in()(batch)
        outputs[name][1] = math.nan
        return outputs

    with pytest.raises(RuntimeError, match=r"not finite at t = .*item\(s\) \[1\]"):
        Interpolant(config()).sample(2, 4, model, seeds=[1, 2])


def test_draws_do_not_touch_the_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    draws = Draws(2, [1, 2])
    draws.normal(3), draws.rotations(3), draws.uniform(3), draws.types(3, 20)
    draws.categorical(torch.ones(2, 3, 21)), draws.binomial(torch.ones(2), torch.tensor(0.5))
    assert (torch.rand(1), np.random.random()) == expected


def test_steps_on_a_device_stay_there_and_have_mps_kernels() -> None:
    import torchgen
    import yaml
    from torch.utils._python_dispatch import TorchDispatchMode

    from foldkernels.compat.multiflow.flow.interpolant import _mix

    operators: set[str] = set()

    class Collect(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            operators.add(str(func))
            assert not (isinstance(result, Tensor) and result.dtype == torch.float64), func
            return result

    # The meta device stands for a GPU: mixing it with tensors of the CPU fails as it would there.
    device = torch.device("meta")
    trans, rotmats = torch.empty(2, 7, 3, device=device), torch.empty(2, 7, 3, 3, device=device)
    mask = torch.empty(2, 7, device=device)
    t, t_next = torch.linspace(0.01, 1.0, 5)[:2]
    linear = config(trans__sample_schedule="vpsde", rots__sample_schedule="linear")
    with Collect():
        for cfg in (config(provide_kappa=True), linear):
            interpolant = Interpolant(cfg)
            step = interpolant._trans_step(t_next - t, t, trans, trans)
            turned = interpolant._rotation_step(t_next - t, t, rotmats, rotmats)
            times = interpolant._times(t, 2, None, True, False, True, device)
            mixed = (_mix(step, trans, mask), _mix(turned, rotmats, mask))
            assert all(tensor.device == device for tensor in (*mixed, *times.values()))

    packaged = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    functions = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(packaged.read_text())}

    def has_mps_kernel(operator: str) -> bool:
        name = operator.removeprefix("aten.").removesuffix(".default")
        entry = functions.get(name, {})
        entry = functions[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        dispatch = entry.get("dispatch")
        return bool(entry) and (dispatch is None or any("MPS" in key or "Composite" in key for key in dispatch))

    # `prim.device` only asks a tensor where it is.
    assert [name for name in sorted(operators - {"prim.device.default"}) if not has_mps_kernel(name)] == []
    assert not has_mps_kernel("aten.binomial.default")
