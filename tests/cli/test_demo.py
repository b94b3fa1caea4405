"""The demo: its parts, without the timing."""

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def demo(root):
    specification = importlib.util.spec_from_file_location("foldkernels_demo", root / "examples" / "demo.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["foldkernels_demo"] = module  # dataclasses look their module up there
    specification.loader.exec_module(module)
    return module


def test_it_samples_and_draws(demo, tmp_path, capsys):
    assert demo.main(["--no-timing", "--timesteps", "3", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "the model has seen four proteins" in said and "invariant_point_attention: torch" in said
    for index in (0, 1):
        assert (tmp_path / "length_48" / f"sample_{index}" / "sample.pdb").is_file()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "demo.png").stat().st_size > 10_000
    else:
        assert "no picture" in said


def test_it_draws_the_times(demo, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs the extra [plots]")
    pdbs, kernels = demo.sample(tmp_path, 20, 1, 2, "cpu")
    assert "attention: torch" in kernels
    speeds = [demo.Speed(128, 1000.0, 500.0, 2.0, 1.9, 2.1, 1), demo.Speed(192, 2000.0, 800.0, 2.5, 2.4, 2.6, 1)]
    demo.draw(pdbs, speeds, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
