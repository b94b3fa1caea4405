"""The `foldkernels` command: what it does, and that every bad input is one clear screen and exit code 2."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from foldkernels.cli import options
from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.cli.main import main
from foldkernels.configs.presets import PRESETS
from foldkernels.kernels import registry
from foldkernels.kernels.registry import choice, registration
from foldkernels.kernels.registry.types import Kernel, Reason, serves_everything

OPERATIONS = ("edge_features", "invariant_point_attention", "attention", "edge_transition")


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs the command in this process."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def small(goldens: Path) -> Path:
    """A checkpoint with random weights."""
    return goldens / "multiflow" / "small"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("last.ckpt", "config.yaml"):
        shutil.copyfile(small / name, folder / name)
    return folder


@pytest.fixture
def imaginary(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of `attention` that runs on an NVIDIA GPU only, and needs a package that nobody has."""

    def supports(request):
        return [] if request.device == "cuda" else [Reason("it needs an NVIDIA GPU", "use kernel 'torch'")]

    kernel = Kernel("attention", "imaginary", supports, lambda: print, needs=("no-such-package-as-this",))
    monkeypatch.setitem(registration._kernels, "attention", {**registry.kernels("attention"), "imaginary": kernel})
    return "imaginary"


def is_one_clear_screen(done: Done) -> bool:
    """Exit code 2, nothing on stdout, a few lines on stderr, no traceback."""
    lines = done.err.strip().splitlines()
    return done.code == 2 and not done.out and 1 <= len(lines) <= 40 and "Traceback" not in done.err


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_sample_writes_files_and_says_which_kernels_ran(call, small, tmp_path):
    out = tmp_path / "out"
    words = ("sample", small, "--length", "12,17", "--length", 20, "--timesteps", 3, "--kernel", "flash", "--out", out)
    done = call(*words, "--device", "cpu", "--trajectories")
    assert done.code == 0, done.err
    assert "3 sample(s) written" in done.out
    assert "invariant_point_attention: torch" in done.out
    for length in (12, 17, 20):
        for name in ("sample.pdb", "sample.fasta", "bb_traj.pdb", "x0_traj.pdb"):
            assert (out / f"length_{length}" / "sample_0" / name).is_file()
    account = json.loads((out / "run.json").read_text())
    assert account["status"] == "complete"
    assert "attention: torch" in account["kernels"]
    assert account["arguments"]["device"] == "cpu"
    assert account["arguments"]["kernel"] == ["flash"]


def test_sample_keeps_what_is_there_unless_told(call, small, tmp_path):
    words = ("sample", small, "--length", 12, "--timesteps", 2, "--device", "cpu", "--out", tmp_path / "out", "--json")
    pdb = tmp_path / "out" / "length_12" / "sample_0" / "sample.pdb"
    report = json.loads(call(*words).out)
    assert len(report["written"]) == 1 and report["kept"] == []
    assert "attention: torch" in report["kernels"]
    first = pdb.read_text()
    pdb.write_text("mine")
    report = json.loads(call(*words, "--num", 2).out)
    assert len(report["written"]) == 1 and len(report["kept"]) == 1
    assert pdb.read_text() == "mine"
    report = json.loads(call(*words, "--overwrite").out)
    assert len(report["written"]) == 1 and report["kept"] == []
    assert pdb.read_text() == first  # the same seed
    call(*words, "--overwrite", "--seed", 7)
    assert pdb.read_text() != first


@pytest.mark.parametrize("task", ["inverse_folding", "forward_folding"])
def test_sample_folds_both_ways(call, small, goldens, tmp_path, task):
    pdb = goldens / "pdb" / "1odh.pdb"
    words = ("--task", task, "--pdb", pdb, "--chain", "A", "--timesteps", 2, "--device", "cpu")
    done = call("sample", small, *words, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert (Path(json.loads(done.out)["written"][0]) / "sample.pdb").is_file()


def test_a_fallback_is_one_line(call, small, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "candidates", lambda preset, operation, device: ("missing", "torch"))
    done = call("sample", small, "--length", 12, "--timesteps", 2, "--kernel", "flash", "--out", tmp_path / "out")
    assert done.code == 0
    assert done.err.count("warning:") == 1
    assert "preset 'flash' falls back" in done.err
    assert "attention: torch, not missing" in done.err


FILES_OF_A_SAMPLE = {"sample.pdb", "sample.fasta", "bb_traj.pdb", "x0_traj.pdb"}


def test_ctrl_c_keeps_what_is_finished(small, tmp_path):
    out = tmp_path / "out"
    words = ["sample", str(small), "--length", "30", "--num", "500", "--timesteps", "20", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "foldkernels", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A job in the background is started with SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = out / "length_30" / "sample_0" / "sample.pdb"
    try:
        deadline = time.monotonic() + 240
        while not first.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "stopped" in errors and printed == ""
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert {file.name for file in first.parent.iterdir()} == FILES_OF_A_SAMPLE
    assert not list(out.rglob("*.partial"))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint(call, tmp_path):
    done = call("sample", tmp_path / "nowhere", "--length", 12, "--out", tmp_path / "out")
    assert is_one_clear_screen(done)
    assert "nowhere" in done.err and "no such file or folder" in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights(call, tmp_path):
    done = call("sample", tmp_path, "--length", 12, "--out", tmp_path / "out")
    assert is_one_clear_screen(done)
    assert "last.ckpt" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "convert"])
@pytest.mark.parametrize("size", [0, 100, 1_000_000])
def test_a_truncated_checkpoint(call, copy, tmp_path, command, size):
    weights = copy / "last.ckpt"
    weights.write_bytes(weights.read_bytes()[:size])
    rest = ("--length", 12, "--out", tmp_path / "out") if command == "sample" else (tmp_path / "out",)
    done = call(command, copy, *rest)
    assert is_one_clear_screen(done)
    assert "last.ckpt" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "convert", "explain"])
def test_a_config_without_a_model_section(call, copy, tmp_path, command):
    (copy / "config.yaml").write_text("interpolant: {min_t: 0.01}\n")
    rest = {"sample": ("--length", 12, "--out", tmp_path / "out"), "convert": (tmp_path / "out",), "explain": ()}
    done = call(command, copy, *rest[command])
    assert is_one_clear_screen(done)
    assert "no section `model:`" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "convert"])
def test_keys_that_do_not_match_are_listed(call, copy, tmp_path, command):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["ipa"]["num_blocks"] = 4
    config["model"]["node_features"]["c_pos_emb"] = 64
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    rest = ("--length", 12, "--out", tmp_path / "out") if command == "sample" else (tmp_path / "out",)
    done = call(command, copy, *rest)
    assert is_one_clear_screen(done)
    assert "trunk.edge_transition_2." in done.err and "more" in done.err
    assert "node_feature_net.linear.0.weight: model (64, 246), checkpoint (64, 214)" in done.err
    assert not (tmp_path / "out").exists()


def test_a_length_beyond_what_models_are_trained_at(call, copy, goldens, tmp_path):
    """The embeddings of positions are sinusoids: there is no table to run out of, and a warning says what is known."""
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["node_features"]["max_num_res"] = 12
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    done = call("sample", copy, "--length", "12-14:2", "--timesteps", 2, "--out", tmp_path / "out")
    assert done.code == 0
    assert "warning: 14 residues: no model of this kind has been trained at such a length" in done.err
    assert (tmp_path / "out/length_12/sample_0/sample.pdb").is_file()
    assert (tmp_path / "out/length_14/sample_0/sample.pdb").is_file()
    done = call("sample", copy, "--length", 12, "--timesteps", 2, "--out", tmp_path / "other")
    assert done.code == 0
    assert "trained" not in done.err


def test_a_motif_as_mmcif_with_any_seed(call, small, goldens, tmp_path):
    done = call(
        *("sample", small, "--task", "motif_scaffolding", "--pdb", goldens / "pdb", "--contigs", "2-4/A60-64/3"),
        *("--length", "11-12", "--num", 2, "--seed", -7, "--format", "mmcif", "--timesteps", 2, "--json"),
        *("--out", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    written = json.loads(done.out)["written"]
    assert len(written) == 2
    for folder in written:
        files = {path.name for path in Path(folder).iterdir()}
        assert files == {"bb_traj.cif", "contigs.json", "sample.cif", "sample.fasta", "x0_traj.cif"}
        kept = json.loads((Path(folder) / "contigs.json").read_text())["kept"]
        assert [entry["from_number"] for entry in kept] == [60, 61, 62, 63, 64]


def test_nan_among_the_coordinates(call, small, goldens, tmp_path):
    lines = (goldens / "pdb" / "1odh.pdb").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("ATOM") and line[12:16].strip() == "CA")
    lines[at] = lines[at][:30] + "     NaN" + lines[at][38:]
    (tmp_path / "nan.pdb").write_text("".join(lines))
    done = call("sample", small, "--task", "inverse_folding", "--pdb", tmp_path / "nan.pdb", "--out", tmp_path / "out")
    assert is_one_clear_screen(done)
    assert "nan.pdb" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("flahs", "did you mean 'flash'?"),
        ("atention=torch", "did you mean 'attention'?"),
        ("attention=tocrh", "did you mean 'torch'?"),
        ("precision=bf17", "precision"),
        ("attention=flash_attn", "flash_attn cannot"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "explain"])
def test_a_wrong_kernel_word(call, small, tmp_path, command, word, said):
    rest = ("--length", 12, "--out", tmp_path / "out") if command == "sample" else ()
    done = call(command, small, "--kernel", word, *rest)
    assert done.code == 2 and "Traceback" not in done.err
    assert said in done.err + done.out
    assert not (tmp_path / "out").exists()


def test_a_wrong_word_in_the_environment_is_named(call, small, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDKERNELS_KERNEL", "flahs")
    done = call("sample", small, "--length", 12, "--out", tmp_path / "out")
    assert is_one_clear_screen(done)
    assert "FOLDKERNELS_KERNEL" in done.err


def test_a_kernel_that_cannot_run_here(call, small, tmp_path, imaginary):
    words = ("--length", 12, "--device", "cpu", "--out", tmp_path / "out")
    done = call("sample", small, "--kernel", f"attention={imaginary}", *words)
    assert is_one_clear_screen(done)
    for said in ("imaginary cannot", "not installed", "pip install no-such-package", "it needs an NVIDIA GPU", "fix:"):
        assert said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    "words",
    [
        ("sampel",),
        ("sample",),
        ("sample", "W"),
        ("sample", "W", "--out", "O"),
        ("sample", "W", "--out", "O", "--length", "many"),
        ("sample", "W", "--out", "O", "--length", "0"),
        ("sample", "W", "--out", "O", "--length", "12", "--num", "0"),
        ("sample", "W", "--out", "O", "--length", "12", "--timesteps", "1"),
        ("sample", "W", "--out", "O", "--length", "12", "--task", "dreaming"),
        ("sample", "W", "--out", "O", "--length", "12", "--device", "abacus"),
        ("sample", "W", "--out", "O", "--length", "12", "--pdb", "1odh.pdb"),
        ("sample", "W", "--out", "O", "--task", "inverse_folding"),
        ("sample", "W", "--out", "O", "--task", "inverse_folding", "--pdb", "nowhere.pdb"),
        ("explain", "nowhere.yaml"),
        ("explain", "W", "--machine", "h10"),
        ("explain", "W", "--length", "0"),
        ("convert", "W", "a file/in the way"),
    ],
)
def test_wrong_usage(call, small, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    done = call(*(small if word == "W" else word for word in words))
    assert done.code == 2 and "Traceback" not in done.err
    assert len((done.out + done.err).splitlines()) < 80  # a command without its arguments shows its help
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_an_output_folder_that_cannot_be_made(call, small, tmp_path):
    (tmp_path / "file").write_text("")
    done = call("sample", small, "--length", 12, "--timesteps", 2, "--out", tmp_path / "file" / "out")
    assert is_one_clear_screen(done)
    assert str(tmp_path / "file") in done.err


def test_debug_shows_the_traceback(call, tmp_path, monkeypatch):
    done = call("sample", tmp_path / "nowhere", "--length", 12, "--out", tmp_path / "out", "--debug")
    assert done.code == 2 and "Traceback" in done.err
    monkeypatch.setenv("FOLDKERNELS_DEBUG", "1")
    assert "Traceback" in call("explain", tmp_path / "nowhere").err


def test_a_mistake_of_ours_keeps_its_traceback(call, small, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("foldkernels.kernels.registry.explanation.explain", fail)
    with pytest.raises(ZeroDivisionError):
        call("explain", small)


@pytest.mark.parametrize("make", [lambda: torch.empty(10**15), lambda: torch.empty(1 << 62), lambda: b" " * (1 << 62)])
def test_more_memory_than_there_is(call, small, monkeypatch, make):
    """Not a mistake of ours, but of the sizes: as PyTorch and Python themselves say it."""
    monkeypatch.setattr("foldkernels.kernels.registry.explanation.explain", lambda *args, **kwargs: make())
    done = call("explain", small)
    assert is_one_clear_screen(done) and "not enough memory" in done.err and "Fix:" in done.err


# The other commands ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_convert_gives_a_checkpoint_that_samples_the_same(call, small, tmp_path):
    report = json.loads(call("convert", small, tmp_path / "safe", "--json").out)
    assert Path(report["weights"]).name == "model.safetensors" and report["tensors"] > 100
    for weights, out in ((small, "a"), (tmp_path / "safe", "b")):
        words = ("--length", 12, "--timesteps", 2, "--device", "cpu", "--out", tmp_path / out)
        assert call("sample", weights, *words).code == 0
    name = Path("length_12", "sample_0", "sample.pdb")
    assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    again = call("convert", small, tmp_path / "safe")
    assert is_one_clear_screen(again) and "already holds" in again.err
    assert call("convert", small, tmp_path / "safe", "--overwrite").code == 0


def test_convert_does_not_need_the_kernels_that_the_file_names(call, copy, tmp_path, imaginary):
    with (copy / "config.yaml").open("a") as config:
        config.write(f"\nkernel: {{attention: {imaginary}}}\n")
    assert call("convert", copy, tmp_path / "safe").code == 0
    assert "imaginary" in (tmp_path / "safe" / "config.yaml").read_text()


@pytest.mark.quick
def test_explain_reads_the_files_kernel_section(call, copy, goldens):
    config = copy / "config.yaml"
    text = config.read_text()
    config.write_text(text + "\nword: torch\nkernel: {preset: flash, attention: '${word}'}\n")
    for target in (config, copy, copy / "last.ckpt"):
        report = json.loads(call("explain", target, "--length", 256, "--machine", "h100", "--json").out)
        found = report["configurations"][0]
        assert found["config"]["preset"] == "flash" and found["config"]["attention"] == "torch"
        assert found["sources"]["attention"] == "file"
        assert set(report["kernels"]) == set(OPERATIONS)
        assert report["capability"] == [9, 0] and report["length"] == 256
    config.write_text(text + "\nkernel: reference\n")
    report = json.loads(call("explain", config, "--kernel", "attention=torch", "--json").out)
    assert report["kernels"] == {**{name: ["reference"] for name in OPERATIONS}, "attention": ["torch"]}
    config.write_text(text + "\nkernel: ${nowhere}\n")
    assert is_one_clear_screen(call("explain", config))


def test_explain_needs_no_weights(call, goldens):
    done = call("explain", goldens / "multiflow" / "full" / "config.yaml", "--length", 256, "--machine", "mac")
    assert done.code == 0
    assert "Apple M3 Max" in done.out and "256 residues" in done.out
    assert len(done.out.splitlines()) < 30


def test_explain_says_what_cannot_run(call, small, imaginary):
    done = call("explain", small, "--machine", "mac", "--kernel", f"attention={imaginary}")
    assert done.code == 2
    assert "No kernel can run this." in done.out and "it needs an NVIDIA GPU" in done.out
    report = json.loads(call("explain", small, "--kernel", f"attention={imaginary}", "--json").out)
    assert report["runs"] is False
    assert any(choice["refused"] for choice in report["choices"])


@pytest.mark.quick
def test_doctor(call, monkeypatch, imaginary):
    monkeypatch.setenv("FOLDKERNELS_KERNEL", "flash")
    done = call("doctor", "--device", "cpu", "--no-check")
    assert done.code == 0
    for said in ("torch", "invariant_point_attention", "ready", "imaginary", "FOLDKERNELS_KERNEL=flash"):
        assert said in done.out
    report = json.loads(call("doctor", "--device", "cpu", "--no-check", "--json").out)
    assert report["kernels"]["attention"]["torch"] == []
    whys = [reason["why"] for reason in report["kernels"]["attention"]["imaginary"]]
    assert any("not installed" in why for why in whys) and "it needs an NVIDIA GPU" in whys
    assert report["problems"] == []
    assert report["environment"]["FOLDKERNELS_KERNEL"] == "flash"


def test_doctor_never_crashes(call, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("the driver does not answer")

    def load():
        raise RuntimeError("half installed")

    broken = {
        "asks": Kernel("attention", "asks", fail, lambda: print),
        "loads": Kernel("attention", "loads", serves_everything, load),
    }
    monkeypatch.setitem(registration._kernels, "attention", broken)
    monkeypatch.setattr("foldkernels.kernels.hardware.machine.describe", fail)
    monkeypatch.setattr("foldkernels.kernels.hardware.packages.usable", fail)
    monkeypatch.setattr("foldkernels.kernels.hardware.packages.conflicts", lambda: ["one and the other (fix: neither)"])
    monkeypatch.setitem(registration._broken_plugins, "theirs", "ImportError: no")
    monkeypatch.setenv("FOLDKERNELS_KERNEL", "flahs")
    done = call("doctor", "--device", "cpu", "--no-check")
    assert done.code == 0
    for said in ("the driver does not answer", "half installed", "one and the other", "theirs: ImportError", "flahs"):
        assert said in done.out
    assert json.loads(call("doctor", "--no-check", "--json").out)["problems"]


@pytest.mark.quick
@pytest.mark.parametrize("command", ["sample", "convert", "explain", "doctor", "verify", "tune"])
def test_help_has_examples(call, command):
    done = call(command, "--help")
    assert done.code == 0
    assert f"foldkernels {command}" in done.out and "Examples:" in done.out
    assert max(map(len, done.out.splitlines())) <= 110


def test_help_is_fast():
    """Nothing heavy is imported for it."""
    code = "import sys; from foldkernels.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "sample" in done.stdout
    assert not {"torch", "numpy", "pydantic", "omegaconf", "rich"} & set(done.stderr.split())


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    words = ["sample", str(tmp_path / "nowhere"), "--length", "12", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "foldkernels", *words], capture_output=True, text=True, check=False)
    assert is_one_clear_screen(Done(done.returncode, done.stdout, done.stderr))


def test_every_environment_variable_is_known(root):
    used = set()
    for room in ("kernels", "modules", "configs", "compat", "cli"):
        for file in (root / room).rglob("*.py"):
            used |= set(re.findall(r"\bFOLDKERNELS_[A-Z0-9_]*[A-Z0-9]\b", file.read_text(encoding="utf-8")))
    assert used == set(OURS)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("smaple",), "error: no such command 'smaple'. Did you mean 'sample'?\n  Fix: foldkernels --help"),
        (("sample", "--lenght", 5), "error: no such option: --lenght (Possible options: --length)\n  Fix: foldkernels"),
        (("explain", "w", "--length", "x"), "error: invalid value for --length: 'x' is no whole number"),
        (("verify", "--precision", "bf17"), "error: invalid value for --precision: no precision 'bf17'; did you mean"),
    ],
)
def test_errors_of_the_command_line_are_in_one_style(call, words, error):
    done = call(*words)
    assert done.code == 2 and not done.out and done.err.startswith(error), done.err


def test_short_names_of_number_formats(call, small):
    for name in ("bf16", "bfloat16"):
        report = json.loads(call("explain", small, "--kernel", f"precision={name}", "--json").out)
        assert [each["config"]["precision"] for each in report["configurations"]] == ["bfloat16"]
    names = options.precisions(["bf16,fp32", "half"], ["float32", "bfloat16", "float16"], "--precision")
    assert names == ["bfloat16", "float32", "float16"]


def test_explain_takes_a_list_of_lengths(call, small):
    reports = json.loads(call("explain", small, "--length", "16,300", "--json").out)
    assert [report["length"] for report in reports] == [16, 300]
    text = call("explain", small, "--length", "16,300").out
    assert "16 residues" in text and "300 residues" in text


def test_the_help_names_every_preset(call):
    text = " ".join(call("explain", "--help").out.split())
    assert f"A preset ({', '.join(PRESETS)})" in text
