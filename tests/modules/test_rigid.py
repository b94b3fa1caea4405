"""Frames against scipy's rotations and the published quaternion algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from foldkernels.modules.rigid import Rigid

pytestmark = pytest.mark.quick

ANGSTROM_TO_NM = 0.1


def frames(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Rigid, Rotation, np.ndarray]:
    """Random frames, and the same as scipy's rotations and an array of translations."""
    rng = np.random.default_rng(seed)
    rotations = Rotation.random(int(np.prod(lead)), rng)
    trans = 5 * rng.standard_normal((*lead, 3))
    rotmats = torch.from_numpy(rotations.as_matrix()).view(*lead, 3, 3)
    return Rigid(rotmats.to(dtype), torch.from_numpy(trans).to(dtype)), rotations, trans


@pytest.mark.parametrize("between", [(), (4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_apply_and_its_inverse_are_scipys(between: tuple[int, ...], batch: int) -> None:
    """R x + t for points with any number of axes between residues and coordinates; the inverse takes it back."""
    n = 5
    rigid, rotations, trans = frames(batch, n)
    points = np.random.default_rng(1).standard_normal((batch, n, *between, 3))
    flat = points.reshape(batch * n, -1, 3)
    expected = np.stack([r.apply(p) for r, p in zip(rotations, flat, strict=True)]) + trans.reshape(-1, 1, 3)
    found = rigid.apply(torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), expected.reshape(points.shape), atol=1e-12)
    np.testing.assert_allclose(rigid.invert_apply(found).numpy(), points, atol=1e-12)
    inverse = np.stack([r.inv().apply(p - t) for r, p, t in zip(rotations, flat, trans.reshape(-1, 3), strict=True)])
    np.testing.assert_allclose(
        rigid.invert_apply(torch.from_numpy(points)).numpy(), inverse.reshape(points.shape), atol=1e-12
    )


def test_batch_axes_are_those_of_the_frames() -> None:
    """Two leading axes of the frames are residues' and batches', never points'."""
    rigid, _, _ = frames(2, 3, 4)
    points = torch.randn(2, 3, 4, 6, 3, dtype=torch.float64)
    for i in range(2):
        one = Rigid(rigid.rotmats[i], rigid.trans[i])
        assert torch.equal(rigid.apply(points)[i], one.apply(points[i]))
        assert torch.equal(rigid.invert_apply(points)[i], one.invert_apply(points[i]))


def quaternion_update(rotation: Rotation, trans: np.ndarray, update: np.ndarray) -> tuple[Rotation, np.ndarray]:
    """Jumper et al. 2021, Supplementary Algorithm 23: (1, b, c, d) / sqrt(1 + b² + c² + d²), then T_i o (R, t).

    The product of quaternions is written out (Hamilton 1843), so that nothing of the tested code is used.
    """
    b, c, d, *shift = update
    norm = np.sqrt(1 + b * b + c * c + d * d)
    w2, x2, y2, z2 = np.array([1, b, c, d]) / norm
    x1, y1, z1, w1 = rotation.as_quat()
    product = [
        w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
        w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
        w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
    ]
    return Rotation.from_quat(product), trans + rotation.apply(shift)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 30.0])
def test_compose_update_is_the_published_algorithm(scale: float) -> None:
    """For small updates and for those that are nearly half turns."""
    rigid, rotations, trans = frames(2, 6)
    update = scale * np.random.default_rng(2).standard_normal((2, 6, 6))
    found = rigid.compose_update(torch.from_numpy(update))
    pairs = zip(rotations, trans.reshape(-1, 3), update.reshape(-1, 6), strict=True)
    expected = [quaternion_update(*each) for each in pairs]
    matrices = np.stack([rotation.as_matrix() for rotation, _ in expected]).reshape(2, 6, 3, 3)
    shifts = np.stack([shift for _, shift in expected]).reshape(2, 6, 3)
    np.testing.assert_allclose(found.rotmats.numpy(), matrices, atol=1e-12)
    np.testing.assert_allclose(found.trans.numpy(), shifts, atol=1e-12 * max(1, scale))


def test_a_mask_of_zero_moves_nothing() -> None:
    """Residues that stay are the same bits; the others move; no gradient passes to an update that is masked."""
    rigid, _, _ = frames(1, 4, dtype=torch.float32)
    update = torch.randn(1, 4, 6, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    found = rigid.compose_update(update, mask)
    still = mask == 0
    assert torch.equal(found.trans[still], rigid.trans[still])
    assert torch.equal(found.rotmats[still], rigid.rotmats[still])
    assert (found.trans[~still] != rigid.trans[~still]).any(-1).all()
    assert torch.equal(found.compose_update(update, mask.bool()).rotmats[still], rigid.rotmats[still])
    (found.trans.sum() + found.rotmats.square().sum() + found.rotmats.sum()).backward()
    assert update.grad is not None and (update.grad[still] == 0).all() and (update.grad[~still] != 0).any()


@pytest.mark.parametrize("autocast", [False, True])
def test_rotations_stay_rotations_after_eight_updates(autocast: bool) -> None:
    """The depth of the published trunk: R R^T = 1 to 2e-6 and det R = 1, under autocast too."""
    rigid, _, _ = frames(2, 200, dtype=torch.float32)
    truth = Rigid(rigid.rotmats.double(), rigid.trans.double())
    generator = torch.Generator().manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(8):
            update = torch.randn(2, 200, 6, generator=generator)
            rigid, truth = rigid.compose_update(update), truth.compose_update(update)
    assert rigid.rotmats.dtype is torch.float32 and rigid.trans.dtype is torch.float32
    product = rigid.rotmats.double() @ rigid.rotmats.double().transpose(-1, -2)
    assert float((product - torch.eye(3, dtype=torch.float64)).abs().max()) <= 2e-6
    assert float((torch.linalg.det(rigid.rotmats.double()) - 1).abs().max()) <= 2e-6
    assert float((rigid.rotmats - truth.rotmats).abs().max()) <= 2e-6
    assert float((rigid.trans - truth.trans).abs().max()) <= 1e-5


def test_an_update_in_16_bits_is_widened_first() -> None:
    """Under autocast the layer before gives bfloat16: the frames keep float32."""
    rigid, _, _ = frames(1, 3, dtype=torch.float32)
    update = torch.randn(1, 3, 6).bfloat16()
    found, expected = rigid.compose_update(update), rigid.compose_update(update.float())
    assert torch.equal(found.rotmats, expected.rotmats) and torch.equal(found.trans, expected.trans)


def test_gradients_of_an_update_are_right() -> None:
    """By finite differences, through both parts of the frames."""
    rigid, _, _ = frames(1, 2)

    def run(update: Tensor, rotmats: Tensor, trans: Tensor) -> tuple[Tensor, Tensor]:
        found = Rigid(rotmats, trans).compose_update(update)
        return found.rotmats, found.trans

    update = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (update, rigid.rotmats.requires_grad_(), rigid.trans.requires_grad_()))


def test_units_change_translations_alone() -> None:
    """`scale_translation` leaves the rotations as they are."""
    rigid, _, _ = frames(1, 3)
    scaled = rigid.scale_translation(ANGSTROM_TO_NM)
    assert torch.equal(scaled.get_trans(), rigid.trans * ANGSTROM_TO_NM)
    assert torch.equal(scaled.get_rots().get_rot_mats(), rigid.rotmats)


def test_what_is_a_frame() -> None:
    """A `Rigid` passes as it is; anything else is refused by name."""
    rigid, _, _ = frames(1, 3)
    assert Rigid.of(rigid) is rigid
    with pytest.raises(TypeError, match="not Tensor"):
        Rigid.of(rigid.trans)  # type: ignore[arg-type]
