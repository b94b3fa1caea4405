"""Blocks before the trunk and the logits: without them the model is Multiflow's; with them it runs and learns."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch import Tensor, nn

from foldkernels.cli.main import main
from foldkernels.compat.multiflow.checkpoint.files import Checkpoint, read_checkpoint
from foldkernels.compat.multiflow.checkpoint.loading import build, load
from foldkernels.compat.multiflow.model import FlowModel
from foldkernels.configs.options import BlocksConfig, FoldkernelsConfig, SequenceNetConfig, TrunkConfig
from foldkernels.errors import BadInput
from foldkernels.kernels.registry import record_kernels
from foldkernels.kernels.registry.binding import bind
from foldkernels.modules.attention_trunk import AttentionPairBiasTrunk, AttentionTrunk
from foldkernels.modules.double_attention import DoubleAttentionPairBlock
from foldkernels.modules.rigid import Rigid
from foldkernels.modules.sequence_net import SequenceIPANet

from ..support.goldens import MULTIFLOW, batch_of, model_of
from .test_training import free_port, process_group

BLOCKS = ("ipa", "pairformer", "pairformer_no_seq", "double_attention_pair", "attention_pair_bias")
SIZES = ("small", "small_chain")
OUTPUTS = ("pred_trans", "pred_rotmats", "pred_logits")

#: What each block runs, beside what the model runs anyway.
OPERATIONS = {
    "ipa": set(),
    "pairformer": {"triangle_attention", "triangle_multiplication", "attention_pair_bias"},
    "pairformer_no_seq": {"triangle_attention", "triangle_multiplication"},
    "double_attention_pair": set(),
    "attention_pair_bias": {"attention_pair_bias"},
}
#: A softmax takes these biases away.
WITHOUT_EFFECT = ("linear_b.bias", "gather_proj.bias")


checkpoint_of = cache(lambda size: read_checkpoint(MULTIFLOW / size))


@cache
def plain_outputs(size: str) -> dict[str, Tensor]:
    """What Multiflow's own model gives for the size's first case."""
    with torch.no_grad():
        return dict(model_of(size)(batch_of(f"{size}/case_L17.safetensors")))


def shuffled(model: nn.Module) -> nn.Module:
    """Weights that are nowhere zero: many layers begin as nothing, and would hide what is not connected."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("enrichment.", "sequence_net.")):
                scale = 0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def model_with(size: str = "small", kernel: Any = "torch", shuffle: bool = True, **foldkernels: Any) -> FlowModel:
    """A size's weights, with new parts whose weights are drawn."""
    checkpoint = checkpoint_of(size)
    torch.manual_seed(1)
    model = FlowModel(checkpoint.config.model, FoldkernelsConfig.model_validate(foldkernels))
    missing, unexpected = model.load_state_dict(checkpoint.state_dict, strict=False)
    assert not unexpected and all(name.startswith(("enrichment.", "sequence_net.")) for name in missing)
    if shuffle:
        shuffled(model)
    bind(model, kernel)
    return model.eval()


def score(batch: dict[str, Tensor], out: dict[str, Tensor]) -> Tensor:
    """A number that every output of a valid row reaches."""
    generator = torch.Generator().manual_seed(5)
    there = batch["res_mask"] > 0.5
    return sum(
        (torch.randn(out[name][there].shape, generator=generator) * out[name][there].float()).mean() for name in OUTPUTS
    )


def both(block: str) -> dict[str, Any]:
    """One layer in each place."""
    return {where: {"block": block, "num_layers": 1} for where in ("enrichment", "sequence_net")}


def difference(first: dict[str, Tensor], second: dict[str, Tensor], batch: dict[str, Tensor]) -> float:
    there = batch["res_mask"] > 0.5
    return max(float((first[name] - second[name])[there].detach().abs().max()) for name in OUTPUTS)


# ------------------------------------------------------------------------------------------------------- without them


def test_without_them_the_model_is_multiflows(tmp_path: Path) -> None:
    """The published config's own `model.sequence_net`, switched off, and words for nothing: same keys and bits."""
    batch, plain = batch_of("small/case_L17.safetensors"), model_of("small")
    expected = plain(batch)
    (tmp_path / "last.ckpt").symlink_to(MULTIFLOW / "small" / "last.ckpt")
    text = (MULTIFLOW / "small" / "config_extra_keys.yaml").read_text()
    for ours in ("", "foldkernels: {enrichment: none, sequence_net: mlp}\n", "foldkernels: {sequence_net: none}\n"):
        (tmp_path / "config.yaml").write_text(text + ours)
        model = load(tmp_path, "torch")
        assert OmegaConf.select(model.config, "model.sequence_net.num_layers") == 2
        assert list(model.state_dict()) == list(plain.state_dict()) == list(read_checkpoint(tmp_path).state_dict)
        found = model(batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------------- with them


@pytest.mark.parametrize("where", ["enrichment", "sequence_net"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_every_block_runs_and_learns(size: str, block: str, where: str) -> None:
    """Forward and a training step: it changes the outputs, its kernels run, and every parameter has a gradient.

    All but those that a softmax removes have one that is not zero; so DDP finds no parameter unused.
    """
    batch = batch_of(f"{size}/case_L17.safetensors")
    model = model_with(size, **{where: {"block": block, "num_layers": 2}})
    with torch.no_grad(), record_kernels() as ran:
        out = model(batch)
    # Attention along pairs with its projections is one pass, where a kernel has it.
    assert OPERATIONS[block] <= {name.partition(": ")[0].removesuffix("_update") for name in ran}
    assert {name.partition(": ")[2] for name in ran} == {"torch"}
    assert all(out[name].isfinite().all() for name in OUTPUTS)
    assert difference(out, plain_outputs(size), batch) > 1e-3
    if where == "sequence_net":  # it comes after the frames
        assert torch.equal(out["pred_trans"], plain_outputs(size)["pred_trans"])
    model.train()
    torch.manual_seed(0)
    score(batch, model(batch)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith(WITHOUT_EFFECT), name


@pytest.mark.parametrize("block", BLOCKS)
def test_both_at_once_reference_and_torch_agree(block: str) -> None:
    """The same word in both places; with gradients and without, kernel beside kernel, in float64."""
    batch = batch_of("small/case_L17.safetensors")
    found = {}
    for kernel in ("reference", "torch"):
        model = model_with(kernel=kernel, **both(block)).double()
        with torch.no_grad():
            found[kernel] = model(batch)
        assert difference(model(batch), found[kernel], batch) <= 1e-8
    assert difference(found["reference"], found["torch"], batch) <= 1e-8


@pytest.mark.parametrize("where", ["enrichment", "sequence_net"])
@pytest.mark.parametrize("block", BLOCKS)
def test_masked_residues_influence_nobody(block: str, where: str) -> None:
    """Whatever stands in rows that take no part, valid rows come out the same bits; an empty item stays finite."""
    batch, model = batch_of("small/case_L17.safetensors"), model_with(**{where: {"block": block, "num_layers": 2}})
    gone = batch["res_mask"] < 0.5
    assert gone.any()
    other = {name: value.clone() for name, value in batch.items()}
    other["trans_t"][gone] = 1e3
    other["trans_sc"][gone] = -50.0
    other["aatypes_t"][gone] = 3
    other["res_idx"][gone] = 777
    with torch.no_grad():
        before = model(batch)
        assert difference(model(other), before, batch) == 0.0
        other["res_mask"][1] = 0
        empty = model(other)
    assert all(value.isfinite().all() for value in empty.values())
    assert all(torch.equal(empty[name][0], before[name][0]) for name in OUTPUTS)


@pytest.mark.parametrize("block", BLOCKS)
def test_recomputation_changes_no_bit(block: str) -> None:
    """`activation_checkpointing`: with dropout, loss and gradients are the same bits."""
    batch, results = batch_of("small/case_L17.safetensors"), []
    for on in (False, True):
        model = model_with(**both(block), activation_checkpointing=on).train()
        torch.manual_seed(0)
        loss = score(batch, model(batch))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (again, repeated) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], repeated[name]) for name in gradients)


@pytest.mark.parametrize("block", BLOCKS)
def test_merging_with_the_first_embeddings(block: str) -> None:
    """In both places, pre and post; the kept embeddings are not overwritten on the way, and all is trained."""
    batch = batch_of("small/case_L17.safetensors")
    merging = {"pre_add_init_embed": True, "post_add_init_embed": True, "post_node_layer_norm": True}
    enrichment = {"block": block, "num_layers": 1, **merging, "pre_edge_layer_norm": True, "post_edge_layer_norm": True}
    sequence_net = {
        "block": block,
        "num_layers": 1,
        **merging,
        "pre_node_layer_norm": True,
        "pre_edge_layer_norm": True,
    }
    model = model_with(enrichment=enrichment, sequence_net=sequence_net)
    out = model(batch)
    with torch.no_grad():
        # Without gradients memory is used again: were it the embeddings', the outputs would tell.
        assert difference(model(batch), out, batch) <= 2e-4
    score(batch, out).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["autocast", "precision"])
def test_in_16_bits(block: str, kind: str) -> None:
    """Under autocast, and with the pair representation in bfloat16: near the float32 result, and not it."""
    batch = batch_of("small/case_L17.safetensors")
    kernel = {"preset": "torch", "precision": "bfloat16"} if kind == "precision" else "torch"
    options = both(block)
    exact, rounded = model_with(**options), model_with(kernel=kernel, **options)
    with torch.no_grad():
        expected = exact(batch)
        with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
            out = rounded(batch)
    error = difference(out, expected, batch)
    scale = max(float(expected[name].abs().max()) for name in OUTPUTS)
    assert 0 < error <= 0.2 * scale, (error, scale)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_bind_report_covers_them(block: str) -> None:
    """Every module that calls kernels is in the report, under its name."""
    model = model_with(**both(block))
    report = bind(model, "reference")
    for where in ("enrichment", "sequence_net"):
        inside = [bound for bound in report.modules if bound.module.startswith(f"{where}.")]
        run = {decision.request.operation for bound in inside for decision in bound.decisions}
        assert OPERATIONS[block] <= run
        assert {d.kernel.name for bound in inside for d in bound.decisions} <= {"reference"}
        callers = [name for name, module in model.named_modules() if hasattr(module, "kernel_uses")]
        assert {bound.module for bound in inside} == {name for name in callers if name.startswith(f"{where}.")}
    assert len(report.modules) > len(bind(model_of("small"), "reference").modules) or not (
        OPERATIONS[block] or block == "ipa"
    )


@pytest.mark.parametrize("block", ["pairformer", "double_attention_pair"])
def test_distributed_training_waits_for_nobody(block: str) -> None:
    """DDP with `find_unused_parameters=False`: a second step would raise, had the first left a gradient hanging."""
    batch, model = batch_of("small/case_L17.safetensors"), model_with(**both(block)).train()
    with process_group(0, 1, free_port()):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):
            wrapped.zero_grad(set_to_none=True)
            score(batch, wrapped(batch)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_explain_knows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`foldkernels explain` on a config alone: the new blocks' operations are there, and no weights are needed."""
    monkeypatch.delenv("FOLDKERNELS_KERNEL", raising=False)
    text = (MULTIFLOW / "small" / "config.yaml").read_text()
    shown = []
    for ours in ("", "foldkernels: {enrichment: pairformer}\n"):
        (tmp_path / "config.yaml").write_text(text + ours)
        assert main(["explain", str(tmp_path / "config.yaml"), "--json"]) == 0
        shown.append(capsys.readouterr().out)
    for operation in OPERATIONS["pairformer"]:
        assert [f'"operation": "{operation}"' in text for text in shown] == [False, True], operation


# ---------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_with(foldkernels: dict[str, Any], state: dict[str, Tensor] | None = None) -> Checkpoint:
    plain = checkpoint_of("small")
    config = plain.config.copy()
    OmegaConf.update(config, "foldkernels", foldkernels, force_add=True)
    return Checkpoint(plain.state_dict if state is None else state, config, plain.source)


@pytest.mark.parametrize("where", ["enrichment", "sequence_net"])
def test_a_checkpoint_without_their_weights_is_refused(where: str) -> None:
    """It says which are missing, and the three ways out."""
    with pytest.raises(BadInput) as caught:
        build(checkpoint_with({where: {"block": "pairformer", "num_layers": 1}}))
    text = str(caught.value)
    first = f"{where}.{'blocks.' if where == 'sequence_net' else ''}trunk.layers.0.pre_norm_s.weight"
    for words in (f"foldkernels.{where}", first, "more", "train them", "init: zero", "leave the section out", "Fix: "):
        assert words in text, text


@pytest.mark.parametrize("where", ["enrichment", "sequence_net"])
@pytest.mark.parametrize("block", BLOCKS)
def test_started_as_zero_the_model_is_unchanged_and_then_learns(block: str, where: str) -> None:
    """`init: zero`: the plain checkpoint loads, gives its outputs, and a few steps move all weights of the block."""
    batch, expected = batch_of("small/case_L17.safetensors"), plain_outputs("small")
    torch.manual_seed(0)
    # IPA's second block reads the first's pairs: there, layers that begin as zero stand behind one another.
    layers, steps = (2, 7) if block == "ipa" else (1, 3)
    section = {where: {"block": block, "num_layers": layers, "init": "zero"}}
    model = build(checkpoint_with(section), "torch")
    assert model.fresh == (where,)
    with torch.no_grad():
        assert difference(model(batch), expected, batch) <= 1e-5
    assert difference(model(batch), expected, batch) <= 1e-5
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(f"{where}.")}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        score(batch, model(batch)).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
    assert all(name.endswith(WITHOUT_EFFECT) for name in still), still
    # What was trained is read back, strictly.
    again = build(checkpoint_with(section, model.state_dict()), "torch")
    assert again.fresh == ()
    with torch.no_grad():
        assert all(torch.equal(again(batch)[name], model(batch)[name]) for name in OUTPUTS)


def test_half_of_their_weights_is_a_damaged_checkpoint() -> None:
    """`init: zero` is for a checkpoint that never had them."""
    model = model_with(enrichment={"block": "pairformer", "num_layers": 2})
    state = {name: value for name, value in model.state_dict().items() if "enrichment.trunk.layers.1" not in name}
    with pytest.raises(BadInput, match=r"enrichment\.trunk\.layers\.1"):
        build(checkpoint_with({"enrichment": {"block": "pairformer", "num_layers": 2, "init": "zero"}}, state))


def test_weights_that_the_config_does_not_ask_for_are_refused() -> None:
    """A trained enrichment is never left out in silence."""
    model = model_with(enrichment="attention_pair_bias")
    with pytest.raises(BadInput, match=r"enrichment\.trunk\.layers\.0"):
        build(checkpoint_with({}, model.state_dict()))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"enrichment": "pairfomer"}, ("foldkernels.enrichment.block", "did you mean 'pairformer'", "ipa")),
        ({"sequence_net": {"block": "mpl"}}, ("foldkernels.sequence_net.block", "did you mean 'mlp'")),
        ({"enrichment": {"block": "ipa", "layers": 2}}, ("foldkernels.enrichment", "did you mean 'num_layers'")),
        ({"enrichment": {"block": "ipa", "num_layers": 0}}, ("foldkernels.enrichment.num_layers", "greater than 0")),
        ({"blocks": {"pairfomer": {}}}, ("foldkernels.blocks", "did you mean 'pairformer'")),
        ({"enrichmant": "ipa"}, ("foldkernels", "did you mean 'enrichment'")),
        ({"enrichment": {"block": "ipa", "init": "zero", "post_node_layer_norm": True}}, ("post_node_layer_norm",)),
        ({"sequence_net": {"block": "ipa", "post_edge_layer_norm": True}}, ("post_edge_layer_norm", "leave it out")),
        (
            {"enrichment": "pairformer", "blocks": {"pairformer": {"num_heads": 7}}},
            ("foldkernels.enrichment", "AttentionPairBias", "7 heads", "64", "8 heads"),
        ),
        (
            {"sequence_net": "ipa", "blocks": {"ipa": {"seq_tfmr_num_heads": 5}}},
            ("foldkernels.sequence_net", "IPATrunk", "5 heads", "4 or 8 heads"),
        ),
        (
            {"enrichment": "double_attention_pair", "blocks": {"double_attention_pair": {"bottleneck_scale": 5}}},
            ("foldkernels.enrichment", "DoubleAttentionPairBlock", "bottleneck_scale 5", "32", "1, 2, 4, 8, 16, 32"),
        ),
        (
            {
                "enrichment": {"block": "attention_pair_bias", "init": "zero"},
                "blocks": {"attention_pair_bias": {"residual": False}},
            },
            ("foldkernels.enrichment", "residual: true"),
        ),
        (
            {
                "enrichment": {"block": "pairformer", "init": "zero"},
                "blocks": {"pairformer": {"post_layer_norm": True}},
            },
            ("foldkernels.enrichment", "post_layer_norm: false"),
        ),
    ],
)
def test_a_wrong_setting_is_named(section: dict[str, Any], words: tuple[str, ...]) -> None:
    """The place, what is wrong, and what would do."""
    with pytest.raises(BadInput) as caught:
        build(checkpoint_with(section), "torch")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_sequence_net_needs_residue_types() -> None:
    config = checkpoint_of("small").config.copy()
    config.model.aatype_pred = False
    with pytest.raises(BadInput, match=r"foldkernels\.sequence_net.*aatype_pred"):
        FlowModel(config.model, FoldkernelsConfig(sequence_net=SequenceNetConfig(block="ipa")))


def inputs(b: int = 2, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    nodes, z = torch.randn(b, n, 32, generator=generator), torch.randn(b, n, n, 16, generator=generator)
    return nodes, z, torch.ones(b, n)


IPA = {
    "c_hidden": 4,
    "no_heads": 2,
    "no_qk_points": 2,
    "no_v_points": 3,
    "seq_tfmr_num_heads": 2,
    "seq_tfmr_num_layers": 1,
    "dropout": 0.0,
    "transformer_dropout": 0.0,
}


def test_what_a_trunk_lacks_is_named() -> None:
    """Frames, a time, initial embeddings, sizes, a block: the module, and the way out."""
    nodes, z, mask = inputs()
    with pytest.raises(ValueError, match=r"AttentionTrunk: block 'ipa' needs c_hidden.*blocks\.ipa"):
        AttentionTrunk("ipa", 32, 16)
    trunk = AttentionTrunk("ipa", 32, 16, blocks=BlocksConfig.model_validate({"ipa": IPA}))
    with pytest.raises(ValueError, match=r"AttentionTrunk: block 'ipa' needs frames.*rigid=.*pairformer"):
        trunk(nodes, z, mask)
    with pytest.raises(TypeError, match="frames are a Rigid"):
        trunk(nodes, z, mask, rigid=nodes)
    with pytest.raises(ValueError, match=r"DoubleAttentionPairBlock: use_film needs the time.*use_film=False"):
        AttentionTrunk("double_attention_pair", 32, 16)(nodes, z, mask)
    with pytest.raises(ValueError, match=r"r3_t=, \[2, 1\].*shape \(3, 1\)"):
        AttentionTrunk("double_attention_pair", 32, 16)(nodes, z, mask, r3_t=torch.rand(3, 1))
    with pytest.raises(ValueError, match=r"AttentionTrunk: merging.*init_node_embed.*turn"):
        AttentionTrunk("attention_pair_bias", 32, 16, TrunkConfig(pre_add_init_embed=True))(nodes, z, mask)
    with pytest.raises(ValueError, match=r"AttentionTrunk: no block 'pairfomer'; there are ipa, pairformer"):
        AttentionTrunk("pairfomer", 32, 16)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="did you mean 'pairformer'"):
        FoldkernelsConfig.model_validate({"enrichment": {"block": "pairfomer"}})


# -------------------------------------------------------------------------------------------------------------- modules


def test_a_trunk_of_none_merges_alone() -> None:
    """Block `none`: what goes in comes out; with merging, the mean, and zero where nothing takes part."""
    nodes, z, mask = inputs()
    mask[1, 3:] = 0
    assert all(a is b for a, b in zip(AttentionTrunk("none", 32, 16)(nodes, z, mask), (nodes, z), strict=True))
    trunk = AttentionTrunk("none", 32, 16, TrunkConfig(post_add_init_embed=True))
    new_nodes, new_z = trunk(nodes, z, mask, init_node_embed=3 * nodes, init_edge_embed=5 * z)
    pairs = mask[:, :, None] * mask[:, None]
    torch.testing.assert_close(new_nodes, 2 * nodes * mask[..., None])
    torch.testing.assert_close(new_z, 3 * z * pairs[..., None])


@pytest.mark.parametrize("block", BLOCKS)
def test_inputs_are_left_alone_unless_given_away(block: str) -> None:
    """Without `overwrite_z` nothing that went in has changed; with it, the result is the same."""
    nodes, z, mask = inputs()
    mask[1, 3:] = 0
    blocks = BlocksConfig.model_validate({"ipa": IPA})
    trunk = AttentionTrunk(block, 32, 16, TrunkConfig(num_layers=2), blocks).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    given = (nodes.clone(), z.clone(), mask.clone())
    keywords = {"rigid": Rigid(torch.eye(3).expand(2, 5, 3, 3), nodes[..., :3]), "r3_t": torch.rand(2, 1)}
    with torch.no_grad():
        expected = trunk(*given, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(given, (nodes, z, mask), strict=True))
        found = trunk(nodes.clone(), z.clone(), mask, **keywords, overwrite_z=True)
    there = mask > 0.5
    torch.testing.assert_close(found[0][there], expected[0][there], atol=1e-5, rtol=0)
    pairs = there[:, :, None] & there[:, None]
    torch.testing.assert_close(found[1][pairs], expected[1][pairs], atol=1e-5, rtol=0)


def test_double_attention_gathers_over_all_pairs_but_the_masked() -> None:
    """Against the definition, pair by pair, in float64; gradients by finite differences."""
    torch.manual_seed(0)
    block = DoubleAttentionPairBlock(8, 2, True, 4).double()
    z = torch.randn(1, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 0, 0]]])
    t = torch.tensor([[0.3]], dtype=torch.float64)
    pairs = [z[0, i, j] for i in range(3) for j in range(3)]
    there = [pairs[k] for k in range(9) if mask.flatten()[k]]
    weights = torch.stack([block.gather_proj(pair) for pair in there]).softmax(0)
    context = sum(w[:, None] * block.value_proj(pair) for w, pair in zip(weights, there, strict=True))
    scale, shift = block.time_mlp(t)[0].chunk(2)
    expected = torch.stack(
        [p + block.output_proj(block.distribute_proj(p).softmax(-1) @ context) * (1 + scale) + shift for p in pairs]
    ).view(1, 3, 3, 8)
    torch.testing.assert_close(block(z, mask, t), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: block(x, mask, t), (z,))


def test_pair_blocks_reach_the_logits_through_a_reader() -> None:
    """A sequence net of blocks that change pairs alone is read by residues; others need no reader."""
    for block in BLOCKS:
        net = SequenceIPANet(block, 32, 16, blocks=BlocksConfig.model_validate({"ipa": IPA}))
        reads = block in ("pairformer_no_seq", "double_attention_pair")
        assert net.reads_pairs is reads and hasattr(net, "read_pairs") is reads


def test_blocks_share_their_settings() -> None:
    """`blocks:` holds for both places, and what IPA's leave out is the model's own."""
    blocks = {"ipa": {"no_v_points": 5}, "pairformer": {"num_heads": 4, "dropout": 0.5}}
    model = model_with(enrichment="ipa", sequence_net="ipa", blocks=blocks)
    assert model.enrichment is not None and model.sequence_net is not None
    for trunk in (model.enrichment.trunk, model.sequence_net.blocks.trunk):
        layer = trunk.trunk["ipa_0"]
        assert (layer.no_v_points, layer.no_qk_points) == (5, model.model_config.ipa.no_qk_points)
    assert model.trunk["ipa_0"].no_v_points == model.model_config.ipa.no_v_points != 5
    model = model_with(enrichment="pairformer", sequence_net="pairformer_no_seq", blocks=blocks)
    assert model.enrichment is not None and model.sequence_net is not None
    assert model.enrichment.trunk.layers[0].attention.num_heads == 4
    assert [trunk.layers[0].dropout for trunk in (model.enrichment.trunk, model.sequence_net.blocks.trunk)] == [0.5] * 2
    assert [len(trunk.layers) for trunk in (model.enrichment.trunk, model.sequence_net.blocks.trunk)] == [4, 2]


def test_more_layers_are_more_weights() -> None:
    counts = [sum(p.numel() for p in AttentionPairBiasTrunk(32, 16, layers, 4).parameters()) for layers in (1, 2, 3)]
    assert len({second - first for first, second in pairwise(counts)}) == 1 and counts[0] > 0
