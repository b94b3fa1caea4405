"""What all tests share: one thread each, the golden data, `--slow`, and `--bare`, without any optional package."""

import os
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

# Before torch is imported: the tests run side by side, and threads that share a core make each other slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--bare", action="store_true", help="run in an environment without any optional package")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """With `--bare`: the same tests by the Python of a new environment (support/bare.py), and nothing here."""
    if not config.getoption("--bare"):
        return None
    from .support import bare

    capture = config.pluginmanager.getplugin("capturemanager")
    capture.suspend_global_capture(in_=True)
    with tempfile.TemporaryDirectory() as folder:
        python = bare.make(Path(folder) / "venv")
        arguments = [argument for argument in config.invocation_params.args if argument != "--bare"]
        command = [python, "-m", "pytest", *map(str, arguments)]
        return subprocess.call(command, env=os.environ | {"FOLDKERNELS_TESTS_BARE": "1"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow, and in make test-all"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that compiles where PyTorch itself says that it cannot: torch 2.9 on Python 3.14."""
    try:
        return (yield)
    except RuntimeError as error:
        if str(error).startswith("torch.compile is not supported on Python"):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The golden data that stand in the repo."""
    return Path(__file__).resolve().parent / "goldens"
