"""Runs the Python of the pages: `python run_pages.py ROOT FOLDER`, and prints what went wrong as JSON.

The blocks of a page share a namespace and run in order, in a folder of the page's own. A block with a title is that
file in the folder, and is not run. Each page is a process of its own, forked from this one, so that no page sees what
another has registered, and PyTorch is imported once.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pages import Block, blocks


def main(root: Path, folder: Path) -> None:
    """Run every page of `root`, each in a folder of its own below `folder`."""
    os.environ["FOLDKERNELS_CACHE"] = str(folder / "cache")
    # So that each page's process finds them imported.
    homes = ("compat.multiflow.checkpoint.loading", "compat.multiflow.runs.sampling", "kernels.registry.explanation")
    for name in homes:
        importlib.import_module(f"foldkernels.{name}")
    importlib.import_module("foldkernels.kernels.registry").operations()
    wanted = [block for block in blocks(root) if block.language == "python" and not block.reason]
    by_page: dict[str, list[Block]] = {}
    for block in wanted:
        by_page.setdefault(block.page, []).append(block)
    lacking = folder / "material"
    make_material(root, lacking)
    report = {"blocks": len(wanted), "wrong": []}
    for page, its in by_page.items():
        place = folder / page.replace("/", "_").removesuffix(".md")
        shutil.copytree(lacking, place)
        report["wrong"] += apart(lambda its=its, place=place: run(its, place))
    print(json.dumps(report))


def apart(function: Callable[[], list[str]]) -> list[str]:
    """What a function says in a process of its own; that it ended, where it says nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(2, 1)  # what a page prints is no part of the report
        said: list[str] = ["ended without a word"]
        try:
            said = function()
        finally:
            with os.fdopen(writing, "w") as file:
                json.dump(said, file)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else [f"a page's process ended with status {status}"]


def run(page: Sequence[Block], place: Path) -> list[str]:
    """Run a page's blocks; the first error ends it."""
    os.chdir(place)
    sys.path.insert(0, str(place))
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in page:
        if block.title:
            (place / block.title).write_text(block.text, encoding="utf-8")
            continue
        try:
            exec(compile(block.before, "before the block", "exec"), namespace)
            # Lines are counted from the page's top, so that a traceback names the page's own.
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), namespace)
        except BaseException as error:
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.page]
            return [f"{block.page}:{at[0] if at else block.line}: {type(error).__name__}: {error}"]
    return []


def make_material(root: Path, place: Path) -> None:
    """What the pages say lies in the working folder: a small checkpoint (few steps), structures, a language model."""
    weights = place / "weights"
    weights.mkdir(parents=True)
    golden = Path(__file__).parents[1] / "goldens"
    shutil.copy(golden / "multiflow" / "small" / "last.ckpt", weights)
    config = (golden / "multiflow" / "small" / "config.yaml").read_text(encoding="utf-8")
    assert "num_timesteps: 100" in config
    (weights / "config.yaml").write_text(config.replace("num_timesteps: 100", "num_timesteps: 2"), encoding="utf-8")
    shutil.copytree(golden / "pdb", place / "structures")
    from foldkernels.modules.esm2 import ESM2

    # As many layers and heads as its name says, and hardly any channels.
    torch.manual_seed(0)
    torch.save(ESM2(33, 40, 20).state_dict(), place / "esm2_t33_650M_UR50D.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
