"""This package's own modules: what a user puts in a child's place, or on it, takes effect under every preset."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foldkernels
from foldkernels.compat import flash_ipa
from foldkernels.configs.presets import PRESETS
from foldkernels.modules import children
from foldkernels.modules.attention_pair_bias import AttentionPairBias, AttentionPairBiasV1
from foldkernels.modules.double_attention import DoubleAttentionPairBlock
from foldkernels.modules.edge_factors import EdgeFactors, LinearFactorizer
from foldkernels.modules.esm2 import ESM2
from foldkernels.modules.esm_combiner import ESMCombiner
from foldkernels.modules.frozen_esm import FrozenESM
from foldkernels.modules.outer_product_mean import OuterProductMean
from foldkernels.modules.pair_weighted_averaging import PairWeightedAveraging
from foldkernels.modules.transition import Transition
from foldkernels.modules.triangle_attention import TriangleAttention, TriangleAttentionEndingNode
from foldkernels.modules.triangle_multiplication import TriangleMultiplicationIncoming, TriangleMultiplicationOutgoing
from foldkernels.modules.trunk import Trunk

from ..support.foreign.frames import random_rigid

N, C, CZ = 7, 12, 8
Call = Callable[[Any], Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


RESIDUES = torch.ones(2, N)
RESIDUES[1, -2:] = 0.0
PAIRS = RESIDUES[:, :, None] * RESIDUES[:, None]
S, Z = draw(2, N, C), draw(2, N, N, CZ)
FRAMES = random_rigid(2, N)


class _Ipa:
    """Multiflow's `ipa` section."""

    c_s, c_z, c_hidden, no_heads, no_qk_points, no_v_points = C, CZ, 4, 2, 3, 2
    seq_tfmr_num_heads, seq_tfmr_num_layers, num_blocks, dropout = 2, 1, 2, 0.0


class _Edges:
    """Multiflow's `edge_features` section."""

    c_s, c_p, feat_dim, num_bins, embed_chain, embed_diffuse_mask = C, CZ, 6, 5, True, True


def trunk() -> nn.Module:
    return Trunk(_Ipa(), CZ, 0.0)


def embedder(mode: str) -> nn.Module:
    return flash_ipa.EdgeEmbedder(
        flash_ipa.EdgeEmbedderConfig(
            mode=mode, c_s=C, c_p=CZ, feat_dim=6, num_bins=5, z_factor_rank=2, k=3, max_len=N + 2
        )
    )


def edge_feature_net() -> nn.Module:
    from foldkernels.modules.edge_features import EdgeFeatureNet

    return EdgeFeatureNet(_Edges())


def language_model() -> ESM2:
    torch.manual_seed(3)
    return ESM2(num_layers=2, embed_dim=8, attention_heads=2)


TOKENS = torch.randint(4, 24, (2, N), generator=torch.Generator().manual_seed(0))
#: How to make a module, and how to call it.
MODULES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "trunk": (
        trunk,
        lambda m: m(S, Z, _rigid(), RESIDUES > 0.5, RESIDUES)[0],
    ),
    "edge features": (
        edge_feature_net,
        lambda m: m(S, 4 * draw(2, N, 3), draw(2, N, 3), PAIRS, RESIDUES, (RESIDUES > 0.5).long()),
    ),
    "flash edges": (lambda: embedder("orig_2d_bias"), lambda m: m(S, 4 * draw(2, N, 3), draw(2, N, 3), RESIDUES)[0]),
    "flash factors": (
        lambda: embedder("flash_2d_factorize_bias"),
        lambda m: torch.stack(m(S, 4 * draw(2, N, 3), draw(2, N, 3), RESIDUES)[1:3]),
    ),
    "edge factors": (
        lambda: EdgeFactors(c_s=C, c_p=CZ, feat_dim=6, num_bins=5, rank=2, k=3),
        lambda m: torch.stack(m(S, 4 * draw(2, N, 3), draw(2, N, 3))),
    ),
    "factorizer": (lambda: LinearFactorizer(N + 2, CZ, 3, 4), lambda m: torch.stack(m.factors(Z, RESIDUES))),
    "multiplication, outgoing": (lambda: TriangleMultiplicationOutgoing(CZ), lambda m: m(Z, PAIRS)),
    "multiplication, incoming": (lambda: TriangleMultiplicationIncoming(CZ), lambda m: m(Z, PAIRS)),
    "triangle attention": (lambda: TriangleAttention(CZ, 3, 2), lambda m: m(Z, PAIRS)),
    "triangle attention, ending": (lambda: TriangleAttentionEndingNode(CZ, 3, 2), lambda m: m(Z, PAIRS)),
    "pair bias": (lambda: AttentionPairBias(C, CZ, 3), lambda m: m(S, Z, RESIDUES, S)),
    "Boltz-1's pair bias": (lambda: AttentionPairBiasV1(C, CZ, 3), lambda m: m(S, Z, RESIDUES)),
    "Boltz-1's pair bias, kept": (lambda: AttentionPairBiasV1(C, CZ, 3), lambda m: m(S, Z, RESIDUES, model_cache={})),
    "averaging": (lambda: PairWeightedAveraging(C, CZ, 3, 2), lambda m: m(draw(2, 3, N, C), Z, PAIRS)),
    "outer product": (lambda: OuterProductMean(C, 3, CZ), lambda m: m(draw(2, 3, N, C), torch.ones(2, 3, N))),
    "transition": (lambda: Transition(CZ, 16), lambda m: m(Z)),
    "double attention": (
        lambda: DoubleAttentionPairBlock(CZ, 2, time_mlp_hidden_dim=4),
        lambda m: m(Z, PAIRS, torch.tensor([[0.3], [0.8]])),
    ),
    "ESM-2": (language_model, lambda m: m(TOKENS, return_contacts=True)["contacts"]),
    "ESM-2, a layer at a time": (language_model, lambda m: m.predict_contacts(TOKENS)),
    "ESM-2's features": (
        lambda: ESMCombiner(FrozenESM(language_model()), C, CZ, 5),
        lambda m: m(S, Z, TOKENS - 4, torch.zeros(2, N, dtype=torch.long), RESIDUES > 0.5)[1],
    ),
}


def _rigid() -> Any:
    from foldkernels.modules.rigid import Rigid

    return Rigid(FRAMES.get_rots().get_rot_mats(), FRAMES.get_trans())


def built(name: str) -> nn.Module:
    """A module whose weights are nowhere zero."""
    torch.manual_seed(0)
    module = MODULES[name][0]().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


class Doubled(nn.Module):
    """A layer in another's place. It shows no weight and no size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.layer(x)
        return out


def double_weights(module: nn.Module, name: str) -> None:
    with torch.no_grad():
        for parameter in module.get_submodule(name).parameters():
            parameter.mul_(2)


def replace(module: nn.Module, name: str) -> None:
    above, _, key = name.rpartition(".")
    module.get_submodule(above)._modules[key] = Doubled(module.get_submodule(name))


def hook(module: nn.Module, name: str) -> None:
    module.get_submodule(name).register_forward_hook(lambda child, args, out: 2 * out)


def layers(module: nn.Module) -> list[str]:
    """The names of its linear layers and LayerNorms."""
    return [name for name, child in module.named_modules() if name and isinstance(child, nn.Linear | nn.LayerNorm)]


@pytest.fixture(autouse=True)
def said_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(children, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", foldkernels.KernelFallbackWarning)
        yield


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_doubled_child_gives_what_doubled_weights_give(name: str, grad: bool) -> None:
    call = MODULES[name][1]
    effects = 0
    with torch.set_grad_enabled(grad):
        plain = call(built(name))
        for child in layers(built(name)):
            expected, *found = (built(name) for _ in range(3))
            for change, module in zip((double_weights, replace, hook), (expected, *found), strict=True):
                change(module, child)
            right = call(expected)
            effects += float((right - plain).abs().max()) > 1e-3 * float(plain.abs().max())
            for module in found:
                error = float((call(module) - right).abs().max())
                assert error <= 3e-5 * float(right.abs().max()), f"{child}: {error:.1e} off"
    assert effects  # a child that nothing reads would let all of this pass


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_of_the_trunk_counts_under_every_preset(preset: str) -> None:
    call = MODULES["trunk"][1]
    with torch.no_grad():
        for child in layers(built("trunk")):
            expected, found = built("trunk"), built("trunk")
            for module in (expected, found):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    foldkernels.bind(module, {"preset": preset, "fallback": "silent"})
            double_weights(expected, child)
            replace(found, child)
            error = float((call(found) - call(expected)).abs().max())
            assert error <= 3e-5 * float(call(expected).abs().max()), f"{child}: {error:.1e} off"


def test_a_replaced_child_is_told_from_one_of_the_same_class_name() -> None:
    """Adapters' and quantized layers are called Linear, too: the message says whose each is."""

    class Linear(nn.Linear):
        """Another project's."""

    module = nn.Sequential(nn.Linear(3, 3))
    guard = children.ChildGuard(module)
    assert guard.holds(module) and guard.change(module) == ""
    module[0] = Linear(3, 3)
    assert not guard.holds(module)
    theirs, ours = f"{Linear.__module__}.{Linear.__qualname__}", "torch.nn.modules.linear.Linear"
    assert guard.change(module) == f"its 0 is a {theirs} now, and was a {ours}"
