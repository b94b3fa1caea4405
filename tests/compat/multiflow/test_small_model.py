"""The small model in examples/: it loads, it is small, and it has learned what its training showed it."""

import pytest
import torch

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(root):
    return root / "examples" / "small_multiflow"


def test_it_is_small_and_loads_like_any_checkpoint(folder):
    from foldkernels.compat import multiflow

    assert (folder / "last.ckpt").stat().st_size < 8_000_000
    model = multiflow.load(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_711_661
    assert model.config.model.edge_features.self_condition


def test_it_has_learned_from_its_structures(folder):
    """Noise that no training has drawn: the losses are far below those of the same model with first weights."""
    from foldkernels.compat import multiflow
    from foldkernels.compat.multiflow.dataset import training_batches
    from foldkernels.compat.multiflow.training import corrupt_batch, losses

    model = multiflow.load(folder).eval()
    torch.manual_seed(0)
    untrained = multiflow.FlowModel(model.model_config).eval()
    config = model.config
    data = {"crop": 48, "cache": "off", "filter": {"min_num_res": 60}, "sampler": {"max_batch_size": 8, "repeats": 4}}
    torch.manual_seed(0)
    batch = corrupt_batch(next(iter(training_batches(folder / "structures", data))), config.interpolant)
    with torch.no_grad():
        learned, first = (losses(each, batch, config.experiment.training) for each in (model, untrained))
    for name, least in (("trans_loss", 3.0), ("rots_vf_loss", 2.0), ("aatypes_loss", 2.5)):
        assert first[name].mean() > least * learned[name].mean(), name


def test_its_samples_are_chains(folder, tmp_path):
    """Neighbouring CA atoms are as far apart as a peptide bond has them, which no untrained model gives."""
    from foldkernels.compat import multiflow

    model = multiflow.load(folder)
    torch.manual_seed(0)
    interpolant = multiflow.Interpolant(model.config.interpolant)
    _, clean = interpolant.sample(num_batch=2, num_res=48, model=model, num_timesteps=40)
    positions = torch.as_tensor(clean[-1][0])[..., 1, :].float()
    apart = (positions[:, 1:] - positions[:, :-1]).norm(dim=-1)
    assert ((apart - 3.8).abs() < 0.4).float().mean() > 0.85
