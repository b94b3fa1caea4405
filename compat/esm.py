"""ESM-2 with fast attention: `foldkernels.compat.esm.load(path)` gives what `esm.pretrained` gives.

Files are read from a local path, as data: nothing in them is run, and nothing is downloaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ..errors import BadInput
from .checkpoints.weight_files import (
    find_shards,
    is_sharded,
    read_content,
    read_shards,
    refuse_other_folders,
    state_of,
)
from .checkpoints.wrapped_names import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..modules.esm2 import ESM2
    from ..modules.esm_alphabet import Alphabet
    from ..modules.frozen_esm import LanguageModel

__all__ = ["from_huggingface", "load", "shared"]

_SOURCE = "https://dl.fbaipublicfiles.com/fair-esm"
_REGRESSION = "-contact-regression.pt"

#: What fair-esm calls the architectures of its other checkpoints.
_OTHERS = {
    "roberta_large": "ESM-1b or ESM-1v",
    "protein_bert_base": "ESM-1",
    "msa_transformer": "MSA Transformer",
    "invariant_gvp": "ESM-IF1",
}

#: The weight that every ESM-2 has once, under fair-esm's names and Hugging Face's, with what training puts before it.
_ANCHOR = r"(?:(?:esm\.)?embeddings\.word_embeddings|(?:encoder\.(?:sentence_encoder\.)?)?embed_tokens)\.weight"
#: Names that are ESM-2's own: what stands beside them, a classifier or a pooler, is another part of a fine-tuned model.
_OWN = re.compile(
    r"(esm\.)?(embeddings|encoder|contact_head)\.|(encoder\.(sentence_encoder\.)?)?"
    r"(embed_tokens|embed_positions|layers|emb_layer_norm|contact_head|lm_head|msa_position_embedding)"
)

_HUGGINGFACE_LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.self.rotary_embeddings": "self_attn.rot_emb",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}
_HUGGINGFACE = {
    "embeddings.word_embeddings": "embed_tokens",
    "encoder.emb_layer_norm_after": "emb_layer_norm_after",
    "contact_head.regression": "contact_head.regression",
}


def load(
    path: str | Path | Mapping[str, Tensor],
    kernel: Any = None,
    device: str | torch.device | None = None,
    *,
    contacts: bool = True,
) -> tuple[ESM2, Alphabet]:
    """Read an ESM-2 checkpoint, strictly, and build its model on the kernels that you name.

    Args:
        path: A `.pt` as `esm.pretrained` downloads it, whose `-contact-regression.pt` lies beside it; a state_dict
            (.pt, .safetensors) under fair-esm's names or Hugging Face's; a folder with Hugging Face's; or the
            state_dict itself.
        kernel: A word, a mapping or a `KernelConfig`; by default the environment, then auto.
        device: Where the model goes; by default the CPU.
        contacts: Whether to read the contact head. Without it, no regression file is needed.

    Returns:
        The model, in eval mode and float32 whatever the file holds, as fair-esm's, and its alphabet.

    Raises:
        BadInput: A file is missing, damaged or hostile, holds another architecture, or its weights do not fit; the
            message says what was expected and found.
        KernelUnavailable: A required kernel cannot run here.
    """
    import torch

    from ..kernels.registry.binding import bind

    model = _built(path, contacts)
    try:
        model.to(torch.device(device or "cpu"))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}", "use cpu, cuda or mps."
        ) from None
    bind(model, kernel)
    return model, model.alphabet


_shared: WeakValueDictionary[tuple[Any, ...], LanguageModel] = WeakValueDictionary()


def shared(path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """A frozen ESM-2 that all who ask for the same file, in the same floating type, have in common.

    Args:
        path: As for `load`. The contact head is not read.
        dtype: What it computes in; by default float32.

    Returns:
        The language model, for `FrozenESM`. It is kept as long as somebody holds it.

    Raises:
        BadInput: As for `load`.
    """
    from ..modules.frozen_esm import LanguageModel

    file = Path(path).expanduser().resolve()
    stamp = file.stat() if file.exists() else None
    key = (file, stamp and (stamp.st_mtime_ns, stamp.st_size), dtype)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = LanguageModel(_built(path, contacts=False), dtype)
    return found


def _built(path: str | Path | Mapping[str, Tensor], contacts: bool) -> ESM2:
    """The model with its weights, on the CPU, in eval mode."""
    import torch

    from ..modules.esm2 import ESM2

    weights, settings, source = _read(path, contacts)
    if not contacts:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("contact_head.")}
    sizes = _sizes(weights, settings, source)
    try:
        # Nothing is drawn: every parameter comes from the checkpoint.
        with torch.device("meta"):
            model = ESM2(**sizes, contacts=contacts)
    except ValueError as error:
        raise BadInput(f"{source}: no ESM-2: {error}.") from error
    _complete(weights, model)
    _check(weights, model, source)
    model.to_empty(device="cpu")
    model.lm_head.weight = model.embed_tokens.weight  # `to_empty` gives each name a tensor of its own
    model.load_state_dict(weights, strict=True)
    return model.eval()


def from_huggingface(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ESM-2 state_dict of Hugging Face's `EsmForMaskedLM`, under fair-esm's names.

    Args:
        state_dict: Names start with `esm.` and `lm_head.`.

    Returns:
        The same tensors; what fair-esm does not have (position ids, a second name of the last bias) is left out, and
        the last layer's tied weight is added where the file leaves it out.

    Raises:
        BadInput: A name is none of ESM-2's.
    """
    found: dict[str, Tensor] = {}
    for name, weight in state_dict.items():
        known = _renamed(name.removeprefix("esm."))
        if known is None:
            raise BadInput(f"{name} is no weight of Hugging Face's ESM-2.")
        if known:
            found[known] = weight
    if "embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["embed_tokens.weight"])
    return found


def _renamed(name: str) -> str | None:
    """fair-esm's name of a weight; empty for what it does not have, None for what is unknown."""
    if name in ("embeddings.position_ids", "lm_head.decoder.bias"):
        return ""
    if name == "lm_head.decoder.weight":
        return "lm_head.weight"
    if name == "lm_head.bias" or re.fullmatch(r"lm_head\.(dense|layer_norm)\.(weight|bias)", name):
        return name
    stem, _, leaf = name.rpartition(".")
    if stem in _HUGGINGFACE:
        return f"{_HUGGINGFACE[stem]}.{leaf}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
    if layer and layer[2] in _HUGGINGFACE_LAYER:
        return f"layers.{layer[1]}.{_HUGGINGFACE_LAYER[layer[2]]}.{leaf}"
    return None


# Reading --------------------------------------------------------------------------------------------------------------


def _read(path: str | Path | Mapping[str, Tensor], contacts: bool) -> tuple[dict[str, Tensor], Mapping[str, Any], str]:
    """Weights under fair-esm's names, the settings that stand beside them, and what to call the source."""
    if isinstance(path, Mapping):
        return _own_names(unwrapped(_tensors("state_dict", path), "state_dict"), "state_dict"), {}, "state_dict"
    path = Path(path).expanduser()
    settings: Mapping[str, Any] = {}
    if path.is_dir():
        path, settings = _in_folder(path)
    if not path.is_file():
        raise _missing(path)
    content = read_shards(path) if is_sharded(path) else read_content(path)
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: expected an ESM-2 checkpoint, found {type(content).__name__}.")
    if ("args" in content or "cfg" in content) and "state_dict" not in content:
        settings = _settings(content, path)
        weights = _upgraded(_tensors(str(path), content.get("model")))
        if contacts and not any(name.startswith("contact_head.") for name in weights):
            weights |= _regression(path)
        return weights, settings, str(path)
    weights = unwrapped(_tensors(str(path), state_of(content, str(path))), str(path))
    return _own_names(weights, str(path)), settings, str(path)


def _in_folder(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The weights and the settings in a folder of Hugging Face's."""
    import json

    for name in ("model.safetensors", "pytorch_model.bin", "last.ckpt"):
        if (folder / name).is_file():
            break
        refuse_other_folders(folder / name)
    else:
        refuse_other_folders(folder)
        shards = find_shards(folder)
        if shards is None:
            raise BadInput(
                f"{folder}: expected model.safetensors or pytorch_model.bin in this folder, whole or in shards, "
                "found neither.",
                "pass the file of weights itself.",
            )
        name = shards.name
    config = folder / "config.json"
    try:
        given = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{config}: no JSON ({error}).") from error
    if not isinstance(given, Mapping):
        raise BadInput(f"{config}: expected the settings of a model, found {type(given).__name__}.")
    found = {"num_attention_heads": "encoder_attention_heads", "token_dropout": "token_dropout"}
    return folder / name, {ours: given[theirs] for theirs, ours in found.items() if theirs in given}


def _missing(path: Path) -> BadInput:
    name = path.stem
    hint = "check the path."
    if re.fullmatch(r"esm2_t\d+_\w+", name):
        hint = f"download {_SOURCE}/models/{name}.pt and {_SOURCE}/regression/{name}{_REGRESSION} into one folder."
    return BadInput(f"{path}: there is no such file; expected an ESM-2 checkpoint.", hint)


def _settings(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The model's settings out of a checkpoint's argparse.Namespace, which was read as inert data."""
    from .checkpoints.plain_data import plain

    try:
        outer = plain(content.get("cfg", content.get("args")))
    except UnpicklingError as error:
        raise BadInput(f"{path}: its settings cannot be read ({error}).") from error
    settings = outer.get("model", outer) if isinstance(outer, Mapping) else None
    if not isinstance(settings, Mapping):
        raise BadInput(f"{path}: expected the settings of an ESM-2 model, found {type(outer).__name__}.")
    if "cfg" not in content:  # ESM-2's are the only ones with this word; inside it, their `arch` is ESM-1b's
        arch = str(settings.get("arch", ""))
        called = next((called for name, called in _OTHERS.items() if name in arch), "another model")
        raise BadInput(f"{path}: expected ESM-2, found {called} (arch {arch!r}).", "use a checkpoint esm2_*.pt.")
    return settings


def _regression(path: Path) -> dict[str, Tensor]:
    beside = path.with_name(path.stem + _REGRESSION)
    if not beside.is_file():
        raise BadInput(
            f"{beside}: there is no such file; the contact head's weights were expected beside {path.name}.",
            f"download {_SOURCE}/regression/{beside.name}, or load with contacts=False.",
        )
    content = read_content(beside)
    weights = _tensors(str(beside), content.get("model", content) if isinstance(content, Mapping) else None)
    strange = sorted(name for name in weights if not name.startswith("contact_head."))
    if strange:
        raise BadInput(f"{beside}: expected the weights of a contact head, found {strange[0]}.")
    return weights


def _tensors(source: str, weights: object) -> dict[str, Tensor]:
    import torch

    if not isinstance(weights, Mapping) or not weights:
        raise BadInput(f"{source}: expected an ESM-2 checkpoint; there are no weights in it.")
    strange = [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise BadInput(f"{source}: expected a state_dict; these entries are no tensors: {', '.join(strange[:5])}.")
    return {str(name): value.detach() for name, value in weights.items()}


def _upgraded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what fair-esm's training put before them."""
    return {re.sub(r"^encoder\.(sentence_encoder\.)?", "", name): weight for name, weight in weights.items()}


def _own_names(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A bare state_dict's weights under fair-esm's names."""
    weights = _of_language_model(weights, source)
    if any("word_embeddings" in name for name in weights):
        if any("position_embeddings" in name for name in weights):
            raise BadInput(f"{source}: expected ESM-2, found learned positions, as ESM-1b has them.")
        return from_huggingface(weights)
    if any(name.startswith("encoder.sentence_encoder.") for name in weights):
        return _upgraded(weights)
    return weights


def _of_language_model(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Those of the language model alone, out of a fine-tuned model's that holds it under some name."""
    prefixes = sorted(
        {
            match[1]
            for name in weights
            if (match := re.fullmatch(r"((?:.*?\.)??)" + _ANCHOR, name)) is not None and "decoder" not in match[1]
        }
    )
    if len(prefixes) > 1:
        called = " and ".join(repr(prefix.rstrip(".") or "the model itself") for prefix in prefixes[:3])
        raise BadInput(
            f"{source}: it holds {len(prefixes)} language models, under {called}.", "save one of them alone."
        )
    if not prefixes:
        return weights
    prefix = prefixes[0]
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    heads = [name for name in own if _OWN.match(name) is None]
    others = [name for name in weights if not name.startswith(prefix)] + [prefix + name for name in heads]
    for name in heads:
        del own[name]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        warnings.warn(f"{source}: left out are weights of other parts than ESM-2: {shown}", stacklevel=2)
    if not any("lm_head." in name for name in own):
        raise BadInput(
            f"{source}: an ESM-2 that was tuned without its language-model head: it has no lm_head.",
            "add the lm_head of the checkpoint that it was tuned from to the state_dict.",
        )
    return own


# Fitting --------------------------------------------------------------------------------------------------------------


def _sizes(weights: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The model's sizes, read off the weights; settings that say otherwise are an error."""
    for name, called in (
        ("embed_positions.weight", "ESM-1b or ESM-1v, with learned positions"),
        ("msa_position_embedding", "the MSA Transformer"),
        ("layers.0.row_self_attention.layer.k_proj.weight", "the MSA Transformer"),
    ):
        if name in weights:
            raise BadInput(f"{source}: expected ESM-2, found {called}.", "use a checkpoint esm2_*.pt.")
    embedding = weights.get("embed_tokens.weight")
    if embedding is None or embedding.dim() != 2:
        some = ", ".join(list(weights)[:3])
        raise BadInput(f"{source}: expected ESM-2's weights, with embed_tokens.weight; found {some} and others.")
    numbers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise BadInput(f"{source}: expected layers numbered from 0, found {', '.join(sorted(numbers)[:8]) or 'none'}.")
    layers, width = len(numbers), embedding.shape[1]
    frequencies = weights.get("layers.0.self_attn.rot_emb.inv_freq")
    contacts = weights.get("contact_head.regression.weight")
    if frequencies is not None and frequencies.numel():
        heads = width // (2 * frequencies.numel())
    elif "encoder_attention_heads" in settings:
        heads = settings["encoder_attention_heads"]
        if type(heads) is not int or heads < 1:
            raise BadInput(f"{source}: its settings say {heads!r:.40} attention heads.")
    elif contacts is not None:
        heads = contacts.shape[-1] // layers
    else:
        raise BadInput(
            f"{source}: nothing in it tells the number of heads; expected layers.0.self_attn.rot_emb.inv_freq."
        )
    found = {"encoder_layers": layers, "encoder_embed_dim": width, "encoder_attention_heads": heads}
    for name, size in found.items():
        if settings.get(name, size) != size:
            raise BadInput(f"{source}: its settings say {name} = {settings[name]}, its weights {size}.")
    return {
        "num_layers": layers,
        "embed_dim": width,
        "attention_heads": heads,
        "token_dropout": bool(settings.get("token_dropout", True)),
    }


def _complete(weights: dict[str, Tensor], model: ESM2) -> None:
    """Add the angles, which newer files of Hugging Face leave out: they follow from the head size."""
    from ..modules.esm2 import RotaryEmbedding

    angles = RotaryEmbedding(model.embed_dim // model.attention_heads).inv_freq
    if not any(name.endswith("rot_emb.inv_freq") for name in weights):
        weights.update({f"layers.{i}.self_attn.rot_emb.inv_freq": angles for i in range(model.num_layers)})


def _check(weights: Mapping[str, Tensor], model: ESM2, source: str) -> None:
    import torch

    from .multiflow.checkpoint.files import fit_report

    wanted = model.state_dict()
    report = fit_report(wanted, weights)
    if report:
        raise BadInput(f"{source}: its weights do not fit an ESM-2 of its sizes.\n{report}")
    if not torch.equal(weights["lm_head.weight"], weights["embed_tokens.weight"]):
        raise BadInput(f"{source}: lm_head.weight differs from embed_tokens.weight; in ESM-2 they are one.")
    first = weights["layers.0.self_attn.rot_emb.inv_freq"]
    if not all(torch.equal(w, first) for name, w in weights.items() if name.endswith("rot_emb.inv_freq")):
        raise BadInput(f"{source}: the layers' rot_emb.inv_freq differ; in ESM-2 they are the same.")
