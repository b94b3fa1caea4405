"""`kernel:` as users write it: words, mappings, YAML with references, the environment, and who wins."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from foldkernels.configs.kernel import KernelConfig, expand
from foldkernels.configs.options import FoldkernelsConfig
from foldkernels.configs.presets import DEVICES, OPERATIONS, PRESETS, candidates
from foldkernels.configs.resolve import ENVIRONMENT_VARIABLE, ConfigError, ResolvedKernel, parse_words, resolve_kernel
from foldkernels.kernels.hardware.machine import MACHINES
from foldkernels.kernels.registry import decide, kernels, operations, settings_of, token
from foldkernels.kernels.registry.types import Dims, Request

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have set it."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


# --------------------------------------------------------------------------------------------------- words and mappings


@pytest.mark.parametrize("word", list(PRESETS))
def test_a_word_is_a_preset(word: str) -> None:
    """The word, the mapping and the object are one configuration, equal and of one hash."""
    forms = [
        KernelConfig.model_validate(word),
        KernelConfig.model_validate({"preset": word}),
        KernelConfig(preset=word),
        KernelConfig.model_validate(KernelConfig(preset=word)),
        resolve_kernel(word).config,
        resolve_kernel({"preset": word}).config,
        resolve_kernel(KernelConfig(preset=word)).config,
        resolve_kernel(OmegaConf.create({"preset": word})).config,
    ]
    assert len(set(forms)) == 1 and len({hash(form) for form in forms}) == 1
    assert forms[0].preset == word


def test_the_defaults() -> None:
    """Nothing said is auto, exact and silent; every other preset warns when it falls back."""
    config = KernelConfig()
    assert config == resolve_kernel().config == KernelConfig.model_validate({}) == KernelConfig.model_validate(None)
    assert (config.preset, config.precision, config.deterministic) == ("auto", "float32", False)
    assert all(config.required(operation) is None for operation in OPERATIONS)
    assert config.on_fallback == "silent"
    assert {KernelConfig(preset=word).on_fallback for word in PRESETS if word != "auto"} == {"warn"}
    assert KernelConfig(preset="auto", fallback="error").on_fallback == "error"
    assert KernelConfig(preset="flash", fallback="silent").on_fallback == "silent"


def test_a_kernel_under_its_operation_is_required() -> None:
    """By any road."""
    for given in ({"attention": "reference"}, {"preset": "flash", "attention": "reference"}):
        config = KernelConfig.model_validate(given)
        assert config.required("attention") == "reference" and config.required("edge_transition") is None
    assert KernelConfig().required("somebody_elses") is None
    # What is no operation is never taken for a required kernel.
    assert KernelConfig(preset="flash").required("preset") is None


def test_it_is_frozen_hashable_and_survives() -> None:
    """Pickling, copying, and the token that modules carry."""
    config = KernelConfig(preset="flash", attention="torch", precision="bfloat16", deterministic=True)
    with pytest.raises(ValidationError, match="frozen"):
        config.preset = "auto"  # type: ignore[misc]
    assert {config: 1}[KernelConfig(preset="flash", attention="torch", precision="bfloat16", deterministic=True)] == 1
    assert config != KernelConfig(preset="flash", attention="torch", precision="bfloat16")
    assert pickle.loads(pickle.dumps(config)) == deepcopy(config) == settings_of(token(config)) == config
    assert token(KernelConfig()) != ""  # the empty token means the environment's
    resolved = resolve_kernel(config, file="torch")
    for copy in (pickle.loads(pickle.dumps(resolved)), deepcopy(resolved)):
        assert copy == resolved and hash(copy) == hash(resolved) and str(copy) == str(resolved)
        with pytest.raises(TypeError):
            copy.sources["preset"] = "nowhere"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("flsh", ["no preset 'flsh'", "did you mean 'flash'", "reference"]),
        ("Auto", ["did you mean 'auto'"]),
        ("zzzzzz", ["no preset 'zzzzzz'.", "Known: auto"]),
        ("", ["no preset ''"]),
        ({"preset": "tritn"}, ["no preset 'tritn'"]),
        ({"preset": None}, ["no preset None"]),
        ({"preset": ["flash"]}, ["no preset ['flash']"]),
        ({"atention": "torch"}, ["no key 'atention'", "did you mean 'attention'"]),
        ({"preset": "flash", "fall_back": "warn"}, ["no key 'fall_back'", "did you mean 'fallback'"]),
        ({1: "torch"}, ["no key 1"]),
        ({"attention": 3}, ["attention", "string"]),
        ({"attention": {"kernel": "torch"}}, ["attention", "string"]),
        ({"precision": "float16"}, ["precision", "'float32', 'tf32' or 'bfloat16'"]),
        ({"fallback": "loud"}, ["fallback", "'warn', 'error' or 'silent'"]),
        ({"deterministic": "perhaps"}, ["deterministic", "boolean"]),
        (True, ["a word or a mapping, not bool", "kernel: flash"]),
        (3, ["not int"]),
        (["flash"], ["not list"]),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(given: Any, words: list[str]) -> None:
    """Where it stands, what is wrong, and the nearest thing that is right; no pydantic in sight."""
    for place, arguments in (("call", {"call": given}), ("file", {"file": given})):
        with pytest.raises(ConfigError) as caught:
            resolve_kernel(**arguments)
        text = str(caught.value)
        assert text.startswith(f"kernel ({place}): ") and all(word in text for word in words), text
        assert len(text.splitlines()) == 1 and "pydantic" not in text and "Value error" not in text
    with pytest.raises(ValidationError):
        KernelConfig.model_validate(given)


def test_none_is_nothing_said() -> None:
    """In YAML an empty `kernel:`; under an operation, the preset's choice."""
    assert expand(None) == {}
    assert resolve_kernel(None, file=None).config == KernelConfig()
    assert resolve_kernel({"attention": None}).config.required("attention") is None
    # Said in the call, None takes back what the file requires.
    taken_back = resolve_kernel({"attention": None}, file={"attention": "reference"})
    assert taken_back.config.required("attention") is None and taken_back.sources["attention"] == "call"


# ------------------------------------------------------------------------------------------------------ where from


ENVIRONMENT = f"environment {ENVIRONMENT_VARIABLE}"


@pytest.mark.parametrize(
    ("given", "preset", "source"),
    [
        ({}, "auto", "default"),
        ({"file": "torch"}, "torch", "file"),
        ({"file": "torch", "environment": "flash"}, "flash", ENVIRONMENT),
        ({"file": "torch", "environment": "flash", "command_line": ["reference"]}, "reference", "command line"),
        ({"file": "torch", "environment": "flash", "command_line": ["torch"], "call": "auto"}, "auto", "call"),
        ({"environment": "", "file": {"preset": "flash"}}, "flash", "file"),
    ],
)
def test_the_nearest_place_wins(given: dict[str, Any], preset: str, source: str) -> None:
    """call > command line > environment > file > default, and the source is told."""
    resolved = resolve_kernel(given.pop("call", None), **given)
    assert (resolved.config.preset, resolved.sources["preset"]) == (preset, source)
    assert f"preset={preset} ({source})" in str(resolved)


def test_places_are_merged_key_by_key() -> None:
    """A word over a mapping keeps the mapping's other keys, a mapping over a word keeps the word."""
    file = {"preset": "torch", "attention": "reference", "precision": "bfloat16", "deterministic": True}
    resolved = resolve_kernel(
        {"deterministic": False},
        command_line=["edge_transition=reference"],
        environment="flash, precision=tf32",
        file=file,
    )
    assert resolved.config == KernelConfig(
        preset="flash", attention="reference", edge_transition="reference", precision="tf32", deterministic=False
    )
    assert dict(resolved.sources) == {
        **dict.fromkeys(KernelConfig.model_fields, "default"),
        "preset": ENVIRONMENT,
        "attention": "file",
        "edge_transition": "command line",
        "precision": ENVIRONMENT,
        "deterministic": "call",
    }
    word_over_mapping = resolve_kernel("reference", file=file).config
    assert (word_over_mapping.preset, word_over_mapping.attention) == ("reference", "reference")
    mapping_over_word = resolve_kernel({"attention": "torch"}, file="reference").config
    assert (mapping_over_word.preset, mapping_over_word.attention) == ("reference", "torch")
    assert file["attention"] == "reference" and len(file) == 4  # what was passed is left alone


def test_what_is_resolved_stays_resolved() -> None:
    """A resolved configuration passes as it is, whatever the other places say."""
    resolved = resolve_kernel("flash")
    assert resolve_kernel(resolved, file="torch", environment="reference") is resolved
    assert isinstance(resolved, ResolvedKernel)


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words separated by commas; blanks and empty words do not matter; an error names the variable."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, " flash , attention = torch ,, deterministic=true,")
    resolved = resolve_kernel()
    assert resolved.config == KernelConfig(preset="flash", attention="torch", deterministic=True)
    assert resolved.sources["attention"] == ENVIRONMENT
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "attention=torch,falsh")
    with pytest.raises(ConfigError, match=rf"{ENVIRONMENT_VARIABLE}\).*did you mean 'flash'"):
        resolve_kernel("torch")
    assert resolve_kernel(environment="").config == KernelConfig()


def test_words_of_a_command_line() -> None:
    """`--kernel flash --kernel attention=torch`; a later word wins, and a kernel's name may hold `=` signs."""
    assert parse_words(["flash", "attention=torch"]) == {"preset": "flash", "attention": "torch"}
    assert parse_words(["flash", "auto"]) == {"preset": "auto"}
    assert parse_words([]) == {}
    with pytest.raises(ConfigError, match=r"command line.*no key 'atention'.*'attention'"):
        resolve_kernel(command_line=["atention=torch"])
    with pytest.raises(ConfigError, match=r"command line.*no preset 'flas'"):
        resolve_kernel(command_line=["flas"])


# ------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kernel: flash", KernelConfig(preset="flash")),
        ("kernel:", KernelConfig()),
        ("kernel: {}", KernelConfig()),
        ("kernel: {preset: flash, attention: torch, deterministic: yes}",
         KernelConfig(preset="flash", attention="torch", deterministic=True)),
        ("word: flash\nkernel: ${word}", KernelConfig(preset="flash")),
        ("site: {kernel: {preset: torch, attention: reference}}\nkernel: ${site.kernel}",
         KernelConfig(preset="torch", attention="reference")),
        ("site: {name: torch, exact: float32}\n"
         "kernel:\n  preset: ${site.name}\n  edge_transition: ${kernel.preset}\n  precision: ${site.exact}",
         KernelConfig(preset="torch", edge_transition="torch", precision="float32")),
    ],
)  # fmt: skip
def test_yaml_resolves_from_its_root(text: str, expected: KernelConfig) -> None:
    """The section as OmegaConf gives it, taken out of its file or as a plain mapping."""
    section = OmegaConf.create(text).kernel
    assert resolve_kernel(file=section).config == expected
    plain = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    assert resolve_kernel(file=plain).config == expected


@pytest.mark.parametrize(
    ("below", "override", "expected"),
    [
        ("flash", {"attention": "reference"}, KernelConfig(preset="flash", attention="reference")),
        ({"preset": "torch", "attention": "reference"}, "flash", KernelConfig(preset="flash", attention="reference")),
        ({"attention": "torch"}, {"attention": "reference"}, KernelConfig(attention="reference")),
        ("flash", "torch", KernelConfig(preset="torch")),
    ],
)
def test_an_override_merges_with_what_it_overrides(below: Any, override: Any, expected: KernelConfig) -> None:
    """OmegaConf's own merge would let a mapping wipe out the word: so a word is expanded before."""
    root = OmegaConf.create({"kernel": expand(below)})
    merged = OmegaConf.merge(root, {"kernel": expand(override)})
    assert KernelConfig.model_validate(merged.kernel) == expected
    assert resolve_kernel(override, file=below).config == expected


def test_our_own_section_is_closed() -> None:
    """`foldkernels:` takes our options, frozen, and nothing else."""
    assert FoldkernelsConfig().activation_checkpointing is False
    assert FoldkernelsConfig.model_validate({"activation_checkpointing": True}).activation_checkpointing is True
    with pytest.raises(ValidationError, match="no key"):
        FoldkernelsConfig.model_validate({"activation_checkpoint": True})
    with pytest.raises(ValidationError, match="frozen"):
        FoldkernelsConfig().activation_checkpointing = True  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------- presets as data


def test_presets_name_what_exists() -> None:
    """Every operation is there, with a list for every device, of kernels that the registry has, none twice."""
    assert set(OPERATIONS) <= set(operations()) and len(set(OPERATIONS)) == len(OPERATIONS)
    for word, lists in PRESETS.items():
        assert set(lists) == set(OPERATIONS), word
        for operation, by_device in lists.items():
            assert set(by_device) == set(DEVICES), (word, operation)
            for device, names in by_device.items():
                where = (word, operation, device)
                assert names and set(names) <= set(kernels(operation)), where
                assert len(set(names)) == len(names), where


def test_a_configuration_has_a_field_for_every_operation() -> None:
    """The rest of its fields are the settings; an operation that no preset names fuses some that are named."""
    fields = set(KernelConfig.model_fields)
    assert fields == {"preset", "fallback", "precision", "deterministic", *OPERATIONS}
    for name, operation in operations().items():
        assert name in OPERATIONS or (operation.fuses and set(operation.fuses) <= set(OPERATIONS)), name


def test_what_the_words_mean() -> None:
    """`reference` never falls back; the others end in it; a Mac's and a CPU's lists hold PyTorch alone."""
    for operation in OPERATIONS:
        for device in DEVICES:
            assert candidates("reference", operation, device) == ("reference",)
            for word in set(PRESETS) - {"reference"}:
                assert candidates(word, operation, device)[-1] == "reference"
        for word in set(PRESETS) - {"reference"}:
            assert candidates(word, operation, "mps") == candidates(word, operation, "cpu") == ("torch", "reference")
        assert candidates("flash", operation, "xpu") == candidates("flash", operation, "cpu")
    assert candidates("reference", "somebody_elses", "cuda") == ("reference",)
    assert candidates("flash", "somebody_elses", "cuda") == ("torch", "reference")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_flash_on_a_mac_is_torch_and_says_nothing(operation: str) -> None:
    """No GPU of NVIDIA's, no better kernel, no fallback."""
    request = Request(operation, "mps", torch.float32, Dims(dict.fromkeys(operations()[operation].dims, 16)), grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision = decide(request, {"preset": "flash", "fallback": "error"}, MACHINES["mac"])
    assert decision.kernel.name == "torch" and not decision.fell_back and decision.rejected == ()
