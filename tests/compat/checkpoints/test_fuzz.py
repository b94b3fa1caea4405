"""Damaged and hostile files, thousands of them: our error that names the file, or what is in it; nothing else.

The files are read in a process of its own, which may take a few hundred megabytes more than it has, and whose deeds
Python's audit events tell: a reader that runs code, starts a process or opens a socket is found out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint, write_safetensors
from foldkernels.modules.pairformer import PairformerModule

from .test_unpickling import child_environment

GOLDENS = Path(__file__).parents[2] / "goldens"
SMALL = GOLDENS / "multiflow" / "small"
SCRIPT = Path(__file__).parents[2] / "support" / "fuzzing.py"
FEW, MANY = 30, 1500


def _config() -> Any:
    return OmegaConf.load(SMALL / "config.yaml")


def _lightning(folder: Path) -> None:
    """As Lightning writes a checkpoint, without most of its weights: damage then falls on everything else."""
    weights = {"model.a.weight": torch.randn(3, 4), "model.b": torch.arange(5), "model.c": torch.randn(2).bfloat16()}
    content = {
        "state_dict": weights,
        "hyper_parameters": {"cfg": _config()},
        "callbacks": {"x": {"best": Path("/a/b"), "score": np.float64(1.5)}},
        "args": argparse.Namespace(a=[1, (2, 3)], b={4}),
    }
    torch.save(content, folder / "new.ckpt")
    torch.save(content, folder / "old.ckpt", _use_new_zipfile_serialization=False)


def _multiflow_safetensors(folder: Path) -> None:
    write_safetensors(read_checkpoint(SMALL), folder)
    (folder / "config.yaml").replace(folder.parent / "config.yaml")


def _config_alone(folder: Path) -> None:
    shutil.copy(SMALL / "last.ckpt", folder.parent / "last.ckpt")
    config = _config()
    shutil.copy(SMALL / "config.yaml", folder / "plain.yaml")
    config.kernel = {"preset": "torch", "fallback": "silent"}
    config.foldkernels = {
        "enrichment": {"block": "pairformer", "num_layers": 1, "init": "zero"},
        "sequence_net": {"block": "ipa", "num_layers": 1, "init": "zero"},
        "blocks": {"pairformer": {"num_heads": 2, "pairwise_num_heads": 2, "pairwise_head_width": 4}},
    }
    (folder / "more.yaml").write_text(OmegaConf.to_yaml(config))


def _stack() -> dict[str, torch.Tensor]:
    stack = PairformerModule(6, 4, 1, 2, 0.0, 3, 2, v2=True)
    return {f"pairformer_module.{name}": value for name, value in stack.state_dict().items()}


def _boltz(folder: Path) -> None:
    content = {"state_dict": _stack(), "hyper_parameters": {"pairformer_args": {"num_blocks": 1, "dropout": 0.3}}}
    torch.save(content, folder / "boltz.ckpt")


def _boltz_safetensors(folder: Path) -> None:
    save_file({name: value.clone() for name, value in _stack().items()}, folder / "boltz.safetensors")


def _esm(folder: Path) -> None:
    shutil.copy(GOLDENS / "esm" / "esm2_t3_tiny.pt", folder / "tiny.pt")


def _esm_config(folder: Path) -> None:
    """In Hugging Face's folder, whose settings are JSON."""
    from foldkernels.compat import esm

    model, _ = esm.load(GOLDENS / "esm" / "esm2_t3_tiny.pt", contacts=False)
    torch.save(model.state_dict(), folder.parent / "pytorch_model.bin")
    heads = {"num_attention_heads": model.attention_heads, "token_dropout": True}
    (folder / "config.json").write_text(json.dumps(heads, indent=1))


def _structure(folder: Path) -> None:
    lines = (GOLDENS / "pdb" / "1odh.pdb").read_text().splitlines()
    atoms = [line for line in lines if line.startswith("ATOM")][:80]
    (folder / "a.pdb").write_text("\n".join([*lines[:2], *atoms, "TER", "END"]))


def _results(folder: Path) -> None:
    """What `foldkernels bench` writes, of a few kernels."""
    from foldkernels.benchmarks.report.results import Results, Row, write_json

    machine = {"cpu": "x", "isa": "avx2", "threads": 2, "torch": "2.9"}
    rows = [
        Row("operation", "attention", kernel, mode, 64, "float32", "cpu", "measured", runs=("attention: torch",),
            sizes={"h": 4, "d": 8}, ms=ms, low_ms=0.9 * ms, high_ms=1.1 * ms, fastest_ms=0.8 * ms, rounds=7, calls=3,
            baseline="reference", ratio=2 / ms, ratio_low=1.9 / ms, ratio_high=2.1 / ms, memory_mb=8.0, error=1e-7,
            plain_error=1e-7, allowed_error=1e-6, machine=machine, versions={"torch": "2.9"})
        for kernel, ms in (("reference", 2.0), ("torch", 1.0))
        for mode in ("forward", "forward+backward")
    ]  # fmt: skip
    lost = Row("operation", "attention", "triton", "forward", 64, "float32", "cpu", "unavailable", why="no GPU")
    path = folder / "rows.json"
    write_json(Results((*rows, lost), "foldkernels bench", "2026-01-01T00:00:00Z", 12.5), path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # a line for each value


def _verified(folder: Path) -> None:
    shutil.copy(SMALL / "config.yaml", folder / "plain.yaml")


def _rna(folder: Path) -> None:
    """RNA-FrameFlow's config beside its weights."""
    from safetensors import safe_open

    golden = GOLDENS / "rna_frameflow" / "flash_1d_bias.safetensors"
    with safe_open(golden, "pt") as file:
        section = json.loads(file.metadata()["cfg"])
    weights = {f"model.{name[2:]}": value for name, value in load_file(golden).items() if name.startswith("w.")}
    torch.save({"state_dict": weights}, folder.parent / "last.ckpt")
    section["edge_features"]["c_s"] = "${model.node_embed_size}"
    OmegaConf.save(OmegaConf.create({"model": section}), folder / "config.yaml")


def _structure_cache(folder: Path) -> None:
    from foldkernels.compat.multiflow.dataset import parsed

    _structure(folder.parent)
    (folder / "a.safetensors").write_bytes(parsed._to_bytes(parsed.parse(folder.parent / "a.pdb")))


READERS: dict[str, Callable[[Path], None]] = {
    "torch": _lightning,
    "multiflow": _lightning,
    "multiflow-safetensors": _multiflow_safetensors,
    "config": _config_alone,
    "boltz": _boltz,
    "boltz-safetensors": _boltz_safetensors,
    "esm": _esm,
    "esm-config": _esm_config,
    "structure": _structure,
    "structure-cache": _structure_cache,
    "results": _results,
    "verify": _verified,
    "rna": _rna,
}


def fuzz(folder: Path, readers: list[str], count: int, seed: int) -> dict[str, dict[str, Any]]:
    jobs = []
    for name in readers:
        whole = folder / name / "whole"
        whole.mkdir(parents=True)
        READERS[name](whole)
        jobs.append(f"{name}={folder / name}")
    command = [sys.executable, str(SCRIPT), str(count), str(seed), *jobs]
    environment = child_environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def judge(answer: dict[str, dict[str, Any]], count: int) -> None:
    told = "\n".join(f"{name}: {problem}" for name, found in answer.items() for problem in found["problems"])
    assert not told, told
    for name, found in answer.items():
        assert found["read"] + found["refused"] == count, name
        assert found["refused"] > count // 20, f"{name}: hardly anything was damaged"


def test_damaged_files(tmp_path: Path) -> None:
    answer = fuzz(tmp_path, list(READERS), FEW, 0)
    judge(answer, FEW)
    assert sum(found["read"] for found in answer.values()) > FEW // 2, "hardly anything could be read"


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_damaged_files(tmp_path: Path, reader: str) -> None:
    seed = int(os.environ.get("FOLDKERNELS_FUZZ_SEED", "1"))
    judge(fuzz(tmp_path, [reader], MANY, seed), MANY)


# ---- files that are made to do harm


def _laughs(template: str, last: str, levels: int = 60) -> str:
    """Lines in which each name is twice the next one."""
    lines = [template.format(this=f"x{i}", next=f"x{i + 1}") for i in range(levels)]
    return "\n".join([*lines, f"x{levels}: {last}"])


def hostile_configs() -> dict[str, str]:
    """Each beside whole weights: with a good config they load."""
    good = (SMALL / "config.yaml").read_text()
    huge = {
        f"{name} is {value}": good.replace(f"\n  {name}: ", f"\n  {name}: {value} #", 1)
        for name in ("node_embed_size", "edge_embed_size")
        for value in ("1000000000", "60000", "-5", ".nan", ".inf", "1" * 4000, "1" * 5000, "null", "[1]")
    }
    return {
        **huge,
        "a model of a terabyte": good.replace("node_embed_size: ", "node_embed_size: 65536 #", 1),
        "a thousand million blocks": good.replace("num_blocks: ", "num_blocks: 1000000000 #", 1),
        "blocks in blocks": good.replace("num_blocks: ", "num_blocks: 1000 #", 1).replace(
            "seq_tfmr_num_layers: ", "seq_tfmr_num_layers: 1000 #", 1
        ),
        "new blocks of a terabyte": good
        + "\nfoldkernels:\n  enrichment: {block: pairformer, num_layers: 50, init: zero}"
        "\n  blocks: {pairformer: {pairwise_num_heads: 60000, pairwise_head_width: 60000}}\n",
        "references that double": good + "\n" + _laughs("{this}: ${{{next}}}${{{next}}}", "ha") + "\nkernel: ${x0}\n",
        "sections that double": good
        + "\n"
        + _laughs("{this}: {{a: '${{{next}}}', b: '${{{next}}}'}}", "{a: ha}")
        + "\nfoldkernels: ${x0}\n",
        "references that double in the model": good.replace(
            "\nmodel:", "\n" + _laughs("{this}: ${{{next}}}${{{next}}}", "ha") + "\nmodel:\n  joke: ${x0}", 1
        ),
        "references in a circle": good + "\nkernel: ${x}\nx: ${y}\ny: ${kernel}\n",
        "a section in itself": good + "\nfoldkernels: {enrichment: '${foldkernels}'}\n",
        "references that go deep": good
        + "\n"
        + "\n".join(f"x{i}: ${{x{i + 1}}}" for i in range(3000))
        + "\nx3000: auto\nkernel: ${x0}\n",
        "nested references": good
        + "\n"
        + "\n".join(f"y{i}: ${{a.${{z{i}}}}}" for i in range(30))
        + "\nkernel: ${y0}\n",
        "aliases that double": "a0: &a0 [ha, ha]\n"
        + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
        + "\n"
        + good,
        "aliases in a circle": "a: &a [*a]\n" + good,
        "deep": "a: " + "[" * 20_000 + "\n" + good,
        "deep braces": "a: " + "{a: " * 20_000 + "\n" + good,
        "long": "\n".join(f"a{i}: {i}" for i in range(200_000)) + "\n" + good,
        "no such preset": good + "\nkernel: flahs\n",
        "no such fallback": good + "\nkernel: {preset: torch, fallback: 7}\n",
        "python objects": f"a: !!python/object/apply:os.system ['touch {SMALL / 'canary'}']\n" + good,
        "python names": "a: !!python/name:os.system\n" + good,
        "python modules": "a: !!python/module:antigravity\n" + good,
        "python tuples": "a: !!python/tuple [1, 2]\n" + good,
        "a resolver that is not there": good + "\nkernel: ${eval:1+1}\n",
        "no text": good + "\n# \udcff",
        "null bytes": good + "\x00",
    }


def hostile_archives(folder: Path) -> None:
    """Zip bombs: one that unfolds, one that lies about sizes, one with very many records, one inside another."""
    import io
    import zipfile

    def archive(name: str, method: int, records: dict[str, bytes]) -> bytes:
        with zipfile.ZipFile(folder / name, "w", method) as file:
            for record, content in records.items():
                file.writestr(record, content)
        return (folder / name).read_bytes()

    zeros = bytes(64 << 20)
    good = {"x/data.pkl": b"\x80\x02}.", "x/byteorder": b"little", "x/version": b"3"}
    bomb = archive("unfolds.ckpt", zipfile.ZIP_DEFLATED, {**good, "x/data/0": zeros})
    archive("unfolds-lzma.ckpt", zipfile.ZIP_LZMA, {**good, "x/data.pkl": zeros[: 8 << 20]})
    archive("many.ckpt", zipfile.ZIP_STORED, {**good, **{f"x/data/{i}": b"" for i in range(5_000)}})
    archive("inside.ckpt", zipfile.ZIP_STORED, {**good, "x/data/0": bomb})
    lies = bytearray(archive("lies.ckpt", zipfile.ZIP_STORED, {**good, "x/data/0": bytes(64)}))
    for at in range(len(lies) - 4):
        if lies[at : at + 4] == (64).to_bytes(4, "little"):
            lies[at : at + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    (folder / "lies.ckpt").write_bytes(lies)
    # All records at one place: a small file whose records are large together.
    same = io.BytesIO()
    with zipfile.ZipFile(same, "w") as file:
        file.writestr("x/data/0", bytes(1 << 20))
        first = file.infolist()[0]
        for i in range(1, 300):
            twin = copy.copy(first)
            twin.filename = f"x/data/{i:04}"
            file.filelist.append(twin)
        file.writestr("x/data.pkl", good["x/data.pkl"])
    (folder / "overlap.ckpt").write_bytes(same.getvalue())


def hostile_safetensors(folder: Path) -> None:
    def file(name: str, header: bytes, data: bytes = b"", length: int | None = None) -> None:
        count = len(header) if length is None else length
        (folder / f"{name}.safetensors").write_bytes(count.to_bytes(8, "little") + header + data)

    def entry(shape: Any, offsets: Any, dtype: str = "F32") -> bytes:
        return json.dumps({"pairformer_module.a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()

    file("header of exabytes", b"{}", length=(1 << 63) - 1)
    file("header of a gigabyte", b"{}" + b" " * 100, length=1 << 30)
    file("deep header", b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    file(
        "many names",
        json.dumps({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}).encode(),
    )
    file("terabytes", entry([1 << 40], [0, 1 << 42]), bytes(64))
    file("overflow", entry([1 << 32, 1 << 32], [0, 64]), bytes(64))
    file("nothing of much", entry([0, 1 << 62], [0, 0]))
    file("backwards", entry([4], [16, 0]), bytes(16))
    file("outside", entry([4], [1 << 20, (1 << 20) + 16]), bytes(16))
    two = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")}
    file("overlap", json.dumps(two).encode(), bytes(16))
    file("hole", entry([4], [16, 32]), bytes(32))
    file("twice", entry([4], [0, 16])[:-1] + b"," + entry([4], [0, 16])[1:], bytes(16))
    file("no text", b'{"\xff": 1}')
    file("list", b"[]")
    file("nothing", b"")


def _as_they_are(folder: Path, readers: dict[str, Callable[[Path], None]]) -> dict[str, dict[str, Any]]:
    jobs = []
    for name, make in readers.items():
        for part in ("whole", "good"):
            (folder / name / part).mkdir(parents=True)
        make(folder / name / "whole")
        jobs.append(f"{name}={folder / name}")
    command = [sys.executable, str(SCRIPT), "0", "0", *jobs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=child_environment(), check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_files_that_are_made_to_do_harm(tmp_path: Path) -> None:
    """All are refused, in seconds, in a few hundred megabytes."""
    configs = hostile_configs()

    def write_configs(folder: Path) -> None:
        shutil.copy(SMALL / "last.ckpt", folder.parent / "last.ckpt")
        shutil.copy(SMALL / "config.yaml", folder.parent / "good")
        for i, text in enumerate(configs.values()):
            (folder / f"{i:03}.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))

    def write_archives(folder: Path) -> None:
        _boltz(folder.parent / "good")
        hostile_archives(folder)

    def write_safetensors_files(folder: Path) -> None:
        _boltz_safetensors(folder.parent / "good")
        hostile_safetensors(folder)

    readers = {"config": write_configs, "boltz": write_archives, "boltz-safetensors": write_safetensors_files}
    answer = _as_they_are(tmp_path, readers)
    told = "\n".join(f"{name}: {problem}" for name, found in answer.items() for problem in found["problems"])
    assert not told, f"{told}\n{dict(enumerate(configs))}"
    for name, found in answer.items():
        accepted = [list(configs)[int(i)] if name == "config" else i for i in found["accepted"]]
        assert not set(accepted) - HARMLESS, f"{name}: {accepted}"
    assert not (SMALL / "canary").exists()


#: Nothing comes of these.
HARMLESS: set[str] = set()


# ---- configs of models that no memory holds

#: Numbers of a config that make a model larger.
SIZES = (
    "node_embed_size edge_embed_size aatype_pred_num_tokens node_features.c_pos_emb node_features.c_timestep_emb "
    "edge_features.feat_dim edge_features.num_bins ipa.c_hidden ipa.no_heads ipa.no_qk_points ipa.no_v_points "
    "ipa.num_blocks ipa.seq_tfmr_num_heads ipa.seq_tfmr_num_layers"
).split()
PAIRFORMER = "enrichment: {block: pairformer, num_layers: 1, init: zero}"
LARGE_OPTIONS = (
    "enrichment: {block: pairformer, num_layers: 1000000000, init: zero}",
    "sequence_net: {block: ipa, num_layers: 1000000000, init: zero}",
    f"{PAIRFORMER}\n  blocks: {{pairformer: {{num_heads: 1000000000}}}}",
    f"{PAIRFORMER}\n  blocks: {{pairformer: {{pairwise_head_width: 1000000000}}}}",
    f"{PAIRFORMER}\n  blocks: {{pairformer: {{pairwise_num_heads: 60000, pairwise_head_width: 60000}}}}",
)

COMMANDS = """
import contextlib, io, json, resource, sys, time
from pathlib import Path
from foldkernels.cli.main import main

folder, every, commands = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def tell(words):
    told = io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main(words)
        except Exception as error:
            code = repr(error)[:300]
    return [code, time.process_time() - start, told.getvalue()]

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
found = [["as it was", words[0], *tell([word.replace("large", "small") for word in words])] for words in commands[:2]]
for i, config in enumerate(sorted(folder.glob("*.yaml"))):
    (folder / "large" / "config.yaml").write_bytes(config.read_bytes())
    # Each command has its own way to a model, and all of them the same way to a config.
    found += [[config.stem, words[0], *tell(words)] for words in (commands if i < every else commands[:1])]
print(json.dumps(found))
"""


#: Every command is asked about these; each setting is allowed by itself in the last two.
LARGE: tuple[dict[str, int], ...] = (
    {"ipa.num_blocks": 10**9},
    {"ipa.no_heads": 10**9},
    {"node_embed_size": 10**9},
    {"node_embed_size": 60_000},
    {"ipa.num_blocks": 1000, "ipa.seq_tfmr_num_layers": 1000},
)


def _large_configs() -> list[str]:
    texts = []
    for sizes in (*LARGE, *({size: 10**9} for size in SIZES)):
        config = _config()
        for size, value in sizes.items():
            OmegaConf.update(config, f"model.{size}", value)
        texts.append(OmegaConf.to_yaml(config))
    return [*texts, *(OmegaConf.to_yaml(_config()) + f"\nfoldkernels:\n  {options}\n" for options in LARGE_OPTIONS)]


def test_every_command_refuses_a_model_that_no_memory_holds(tmp_path: Path) -> None:
    """Thousands of millions of blocks, channels or heads: at once, with our error, and without taking the memory."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        shutil.copy(SMALL / "last.ckpt", tmp_path / name)
    shutil.copy(SMALL / "config.yaml", tmp_path / "small")
    (tmp_path / "structures").mkdir()
    shutil.copy(GOLDENS / "pdb" / "1odh.pdb", tmp_path / "structures")
    texts = _large_configs()
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.yaml").write_text(text)

    commands = [
        ["explain", "large"],
        ["convert", "large", "converted-large"],
        ["verify", "large", "-l", "8", "--device", "cpu"],
        ["bench", "--model", "large", "-l", "8", "--out", "measured", "--device", "cpu"],
        ["sample", "large", "-l", "8", "--timesteps", "2", "--out", "out", "--device", "cpu"],
        ["tune", "large", "--device", "cpu"],
    ]
    if importlib.util.find_spec("pytorch_lightning"):
        commands.append(["train", "large/config.yaml", "--data", "structures", "--out", "run", "--steps", "1"])
    process = [sys.executable, "-c", COMMANDS, str(tmp_path), str(len(LARGE)), json.dumps(commands)]
    environment = child_environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row[2] for row in found[:2]] == [0, 0], found[:2]
    assert len(found) == 2 + len(LARGE) * len(commands) + len(texts) - len(LARGE)
    wrong = [row for row in found[2:] if row[2] != 2 or row[3] > 10 or "Traceback" in row[4] or "large" not in row[4]]
    assert not wrong, f"{wrong[:5]}\n{dict(enumerate(texts))[int(wrong[0][0])]}"
