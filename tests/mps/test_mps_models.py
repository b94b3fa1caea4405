"""A Mac without a Mac: every model, in every configuration that has a word, on tensors that say they are on MPS."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import product
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import foldkernels
from foldkernels.compat import boltz, esm, rna_frameflow
from foldkernels.compat.accelerate import verification
from foldkernels.compat.accelerate.adapters import adapters
from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint
from foldkernels.compat.multiflow.flow.interpolant import Interpolant
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.compat.multiflow.training import corrupt_batch, losses, self_condition
from foldkernels.configs.kernel import Precision
from foldkernels.configs.options import Block, ESMCombinerConfig, FoldkernelsConfig, SequenceBlock, TrunkConfig
from foldkernels.configs.presets import OPERATIONS, PRESETS
from foldkernels.kernels.registry import KernelFallbackWarning, record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.esm_combiner import ESMCombiner
from foldkernels.modules.frozen_esm import FrozenESM, LanguageModel

from ..compat.accelerate.test_accelerate_adapters import FORMS
from ..compat.checkpoints.test_boltz_loading import checkpoint as boltz_checkpoint
from ..compat.checkpoints.test_boltz_loading import inputs as pairformer_inputs
from ..compat.checkpoints.test_boltz_loading import trunk
from ..modules.test_boltz_goldens import CASES, Golden
from ..support.flash_ipa import FOLDER as GOLDENS
from ..support.flash_ipa import MODES, embedder_of, layer_of, small_config
from ..support.goldens import MULTIFLOW, part, small_checkpoint
from ..support.mps import MPS, on_mps

TINY = MULTIFLOW.parent / "esm" / "esm2_t3_tiny.pt"
RANDOM = ("rand", "bernoulli", "normal_", "uniform", "multinomial", "dropout")
CHECKPOINT = cache(lambda size: read_checkpoint(MULTIFLOW / size))
N = 9
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def some(names: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """All of them; those that are not quick are slow."""
    return [
        pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]


def rounding(word: str) -> AbstractContextManager[object]:
    """Autocast of a precision's word, on MPS."""
    return nullcontext() if AUTOCAST[word] is None else torch.autocast("mps", AUTOCAST[word])


def sent(x: Any) -> Any:
    """Every tensor in it on MPS."""
    return tree_map(lambda leaf: leaf.to("mps") if isinstance(leaf, Tensor) else leaf, x)


def score(out: Any) -> Tensor:
    """A number that every floating output reaches."""
    found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
    return torch.stack([x.float().square().mean() for x in found]).sum()


def run_both(module: nn.Module, *given: Any, **named: Any) -> Any:
    """Forward and backward in training, forward in eval."""
    module.to("mps").train()
    score(module(*sent(given), **sent(named))).backward()
    with torch.no_grad():
        return module.eval()(*sent(given), **sent(named))


# Multiflow ------------------------------------------------------------------------------------------------------------


def sections() -> dict[str, dict[str, Any]]:
    """The `foldkernels:` sections: every block in every place, and every setting of the others that is a word.

    Taken from the configuration's own types, so that a new block or setting is here without an edit.
    """
    found: dict[str, dict[str, Any]] = {"plain": {}, "activation_checkpointing": {"activation_checkpointing": True}}
    places = {"enrichment": get_args(Block), "sequence_net": get_args(SequenceBlock)}
    for where, words in places.items():
        for block in words:
            found[f"{where} {block}"] = {where: {"block": block, "num_layers": 1}}
            # A bare stack of attention has no identity to start from, and nothing has none.
            if block not in ("none", "mlp"):
                found[f"{where} {block} zero"] = {where: {"block": block, "num_layers": 1, "init": "zero"}}
    switches = [name for name, field in TrunkConfig.model_fields.items() if field.annotation is bool]
    for where in places:
        on = {name: True for name in switches if (where, name) != ("sequence_net", "post_edge_layer_norm")}
        found[f"{where} with all switches"] = {where: {"block": "pairformer", "num_layers": 1, **on}}
    for name, field in ESMCombinerConfig.model_fields.items():
        values = [True] if field.annotation is bool else get_args(field.annotation) if name == "precision" else []
        for value in values:
            found[f"esm_combiner {name} {value}"] = {"esm_combiner": {"checkpoint": str(TINY), name: value}}
    found["esm_combiner cache"] = {"esm_combiner": {"checkpoint": str(TINY), "cache": 2}}
    found["everything"] = {
        "esm_combiner": {"checkpoint": str(TINY)},
        "enrichment": {"block": "pairformer", "num_layers": 1},
        "sequence_net": {"block": "pairformer", "num_layers": 1},
        "activation_checkpointing": True,
    }
    return found


SECTIONS = sections()


def clean() -> dict[str, Tensor]:
    from foldkernels.benchmarks.run.random_models import draw_chains

    drawn = draw_chains(N, torch.Generator().manual_seed(0), 2, 21)
    clean = {name: drawn[name] for name in ("res_mask", "diffuse_mask", "chain_idx", "res_idx")}
    return clean | {"trans_1": drawn["trans_t"], "rotmats_1": drawn["rotmats_t"], "aatypes_1": drawn["aatypes_t"] % 20}


def train_once(model: FlowModel, precision: str = "float32") -> None:
    """What `train` computes in a step, as the Lightning module does it: noise on the CPU, the rest on MPS."""
    model.to("mps").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    noisy = sent(corrupt_batch(clean(), small_checkpoint().config.interpolant))
    with rounding(precision):
        noisy = self_condition(model, noisy)
        loss = losses(model, noisy, {})["train_loss"].mean()
    loss.backward()
    assert bool(loss.isfinite())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def flow_model(size: str, section: str, kernel: Any = "torch") -> FlowModel:
    torch.manual_seed(0)
    model = FlowModel(CHECKPOINT(size).config.model, FoldkernelsConfig.model_validate(SECTIONS[section]))
    bind(model, kernel)
    return model


def test_every_block_is_among_the_sections():
    assert {f"enrichment {block}" for block in get_args(Block)} <= SECTIONS.keys()
    assert {f"sequence_net {block}" for block in get_args(SequenceBlock)} <= SECTIONS.keys()
    assert len(SECTIONS) >= 30


QUICK = {("small_chain", "plain", "float32"), ("small", "enrichment pairformer", "bfloat16")}
EVERY = [
    (size, section, precision)
    for size, section, precision in product(("small", "small_chain"), SECTIONS, AUTOCAST)
    # Sizes differ in the chain's embedding only, which the plain model has, too.
    if size == "small" or section == "plain"
]


@pytest.mark.parametrize(("size", "section", "precision"), some(EVERY, QUICK))
def test_multiflow_trains_and_samples(size, section, precision):
    """Draws and residue types are the CPU's, and no random number is drawn on MPS but dropout's."""
    model = flow_model(size, section)
    with on_mps() as found:
        train_once(model, precision)
    assert any("_backward" in name for name in found.operators)
    with on_mps() as found, rounding(precision), record_kernels() as ran:
        model.to("mps").eval()
        noisy, _ = Interpolant(small_checkpoint().config.interpolant).sample(
            2, N, model, num_timesteps=2, progress=False
        )
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in noisy[-1])
    assert {name.partition(": ")[2] for name in ran} == {"torch"}
    assert not {name for name in found.operators if any(word in name for word in RANDOM)}, "drawn on MPS"


@pytest.mark.slow
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("preset", PRESETS)
def test_multiflow_under_every_preset_and_precision(preset, precision):
    model = flow_model("small", "everything", {"preset": preset, "precision": precision})
    with on_mps():
        train_once(model)


# Presets on a Mac -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_decides_on_a_mac_and_says_nothing(preset, precision):
    """What a preset means on a Mac is its first choice there, so nothing falls back; `flash` is `torch`."""
    model = flow_model("small", "everything")
    with on_mps(needed=False), warnings.catch_warnings():
        warnings.simplefilter("error", KernelFallbackWarning)
        report = bind(model.to("mps"), {"preset": preset, "precision": precision})
    assert report.decisions() and not report.refused
    wanted = "reference" if preset == "reference" else "torch"
    assert {decision.request.device for decision in report.decisions()} == {"mps"}
    assert {decision.kernel.name for decision in report.decisions()} == {wanted}
    assert not any(decision.fell_back for decision in report.decisions())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gpus_kernel_that_is_required_is_refused_with_the_reason(operation):
    from foldkernels.kernels.registry import kernels

    model = flow_model("small", "everything")
    for name in set(kernels(operation)) - {"torch", "reference"}:
        report = foldkernels.explain(model, machine="mac", kernel={operation: name})
        assert report.runs or any(word in str(report) for word in ("not installed", "NVIDIA", "CUDA", "no kernel"))


# The other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", some(AUTOCAST, ["float32"]))
@pytest.mark.parametrize("case", some(["flash_1d_bias", "dense"], ["flash_1d_bias"]))
def test_rna_frameflow(case, precision):
    """With FlashIPA and without."""
    path = MULTIFLOW.parent / "rna_frameflow" / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["cfg"])
    model = rna_frameflow.FlowModel(config)
    bind(model, "torch")
    batch = part(load_file(path), "in.")
    with on_mps(), rounding(precision):
        run_both(model, batch)


def flash_ipa_batch(pairs: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, N)
    mask[1, N - 2 :] = 0
    given = {
        "node_embeddings": torch.randn(2, N, 16, generator=generator),
        "translations": 8 * torch.randn(2, N, 3, generator=generator),
        "rotations": torch.linalg.qr(torch.randn(2, N, 3, 3, generator=generator))[0],
        "trans_sc": 8 * torch.randn(2, N, 3, generator=generator),
        "node_mask": mask,
    }
    return given | ({"edge_embeddings": torch.randn(2, N, N, 8, generator=generator)} if pairs else {})


FLASH_IPA = [(mode, precision) for mode in MODES for precision in AUTOCAST]


@pytest.mark.parametrize(
    ("mode", "precision"), some(FLASH_IPA, [("flash_1d_bias", "float32"), ("orig_2d_bias", "float32")])
)
def test_flash_ipa(mode, precision):
    """Its whole model, in each of its modes."""
    from foldkernels.compat import flash_ipa

    torch.manual_seed(0)
    model = flash_ipa.Model(small_config(mode))
    bind(model, "torch")
    with on_mps(), rounding(precision):
        run_both(model, flash_ipa_batch(mode == "orig_2d_bias"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_flash_ipas_modules(mode):
    """The modules under its own names: its Rigid, the edge embedder and the attention."""
    from foldkernels.compat import flash_ipa

    layer, golden = layer_of(mode)
    with on_mps():
        x = sent(part(golden, "in."))
        frames = flash_ipa.create_rigid(x["rots"], 0.1 * 10 * x["trans_nm"])
        layer.to("mps").train()
        score(layer(x["node"].requires_grad_(), x.get("z"), x.get("z1"), x.get("z2"), frames, x["mask"])).backward()
        with torch.no_grad():
            layer.eval()(x["node"], x.get("z"), x.get("z1"), x.get("z2"), frames, x["mask"])
        again = flash_ipa.Rigid.from_tensor_7(frames.to_tensor_7())
        assert again.invert().compose(frames).get_trans().device == frames.get_rots().get_quats().device == MPS
    if (GOLDENS / f"edge_embedder_{mode}.safetensors").exists():
        embedder, golden = embedder_of(mode)
        with on_mps():
            x = sent(part(golden, "in."))
            run_both(embedder, x["node_embed"].requires_grad_(), x["trans"], x["trans_sc"], x["mask"])


@pytest.mark.parametrize("precision", some(AUTOCAST, ["float32"]))
def test_esm_2(precision):
    """Read from its file onto MPS: features of a padded batch, contacts, and a step of training."""
    tokens = torch.randint(4, 24, (2, N))
    tokens[0, 6:] = 1
    with on_mps():
        model, _ = esm.load(TINY, "torch", "mps")
        with rounding(precision):
            with torch.no_grad():
                found = model(sent(tokens), repr_layers=range(model.num_layers + 1), return_contacts=True)
                model.predict_contacts(sent(tokens))
            score(model.train()(sent(tokens), repr_layers=[1])["logits"]).backward()
    assert found["contacts"].shape[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("only_single", [True, False])
def test_the_combiner_of_frozen_features(only_single, precision):
    """The language model goes with the combiner, in a floating type of its own."""
    dtype = AUTOCAST[precision] or torch.float32
    frozen = FrozenESM(LanguageModel(esm.load(TINY, "torch")[0], dtype), pairs=not only_single, cache=1)
    combiner = ESMCombiner(frozen, 16, 8, 16, only_single)
    bind(combiner, "torch")
    mask = torch.ones(2, N)
    mask[1, 6:] = 0
    given = torch.randint(0, 21, (2, N)), torch.ones(2, N, dtype=torch.long), mask
    with on_mps():
        nodes, edges = (sent(torch.randn(2, N, *more)).requires_grad_() for more in ((16,), (N, 8)))
        combiner.to("mps")
        assert next(frozen.language_model.model.parameters()).device.type == "mps"
        for mode in (True, False):
            score(combiner.train(mode)(nodes, edges, *sent(given))).backward()


@pytest.mark.parametrize("name", some(CASES, ["N16/pairformer_layer_v2"]))
def test_boltzs_modules(name):
    """Each of the modules that stand for Boltz's, on the golden's inputs."""
    golden = Golden(name, "torch")
    with on_mps():
        golden.arguments = sent(golden.arguments)
        golden.leaves()
        golden.module.to("mps").train()
        score(golden.run()).backward()
        golden.module.eval()
        with torch.no_grad():
            golden.run()


@pytest.mark.parametrize("checkpointing", some([False, True], [False]))
def test_a_pairformer_from_boltzs_checkpoint(checkpointing):
    content = boltz_checkpoint(trunk())
    s, z, mask, pair_mask = pairformer_inputs()
    weights = {name: value for name, value in content["state_dict"].items() if value.is_floating_point()}
    with on_mps():
        stack = boltz.load_pairformer(weights, kernel="torch", device="mps", activation_checkpointing=checkpointing)
        run_both(stack, s.requires_grad_(), z.requires_grad_(), mask, pair_mask)


@pytest.mark.parametrize("form", some(FORMS, ["OpenFold IPA", "Boltz-2 pair bias"]))
def test_an_accelerated_module(form):
    """It is proved beside its own forward, as `--verify` does, and computes nothing that MPS gets wrong."""
    make, adapter, _ = FORMS[form]
    torch.manual_seed(0)
    module = nn.Sequential(make())
    with on_mps(traps=False):  # the original's code has traps of its own
        report = foldkernels.accelerate(module.to("mps"), verify=True)
    (entry,) = report.entries
    assert entry.status == "replaced" and entry.proof is not None and entry.proof.passed, str(report)
    example = adapters()[adapter].example(module[0], torch.Generator().manual_seed(0))
    with on_mps(), record_kernels() as ran:
        module.to("mps")
        verification._run(lambda module, *args, **named: module(*args, **named), module[0], example, MPS)
    assert ran or "transition" in adapter
