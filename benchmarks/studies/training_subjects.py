"""What the training curves are made of: a small Multiflow model, dense or with FlashIPA's factors, and its steps.

A run is decided by its seed alone: the weights, the order and the crops of the data, the noise, and which batches are
self-conditioned are the same under every kernel. The dense model is `FlowModel` as `foldkernels train` trains it. The
factorised one has the same residue features, losses and residue types' head; its pair representation is FlashIPA's, in
the mode that forms no pair (`flash_1d_bias`), so its function and its weights are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "small_multiflow" / "config.yaml"
STRUCTURES = CONFIG.parent / "structures"

#: The example's config, made smaller still: what is asked here needs many runs.
NODE_EMBED_SIZE, BLOCKS, BATCH, LEARNING_RATE = 64, 3, 4, 7e-4
#: FlashIPA's default.
NEIGHBOURS = 10
EVALUATION_SEED, EVALUATION_BATCHES = 1000, 32


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: As the plots and tables call it.
        kernel: A preset.
        precision: `float32`, or `bfloat16` for autocast around the model.
        rank: Factors of FlashIPA's pair representation; 0 for the dense one.
        length: Residues of a crop.
        batch: Proteins of a batch.
        seed: What the weights, the data's order and the noise follow from.
        nudge: By how much of itself every first weight is changed, up or down at random: what rounding alone does to a
            curve is seen beside a kernel's.
        threads: PyTorch's.
    """

    name: str
    kernel: str = "torch"
    precision: str = "float32"
    rank: int = 0
    length: int = 48
    batch: int = BATCH
    seed: int = 1
    nudge: float = 0.0
    threads: int = 1

    def autocast(self) -> AbstractContextManager[Any]:
        """What the model is called in."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bfloat16" else nullcontext()


class FactorizedFlowModel(nn.Module):
    """Multiflow's inputs and outputs around FlashIPA's pair representation (arXiv:2505.11580).

    Args:
        section: Multiflow's `model:` section.
        rank: Factors of the pair representation.
    """

    def __init__(self, section: Any, rank: int) -> None:
        super().__init__()
        from foldkernels.modules.edge_factors import EdgeFactors
        from foldkernels.modules.factor_trunk import FactorTrunk
        from foldkernels.modules.node_features import NodeFeatureNet

        c, edges = section.node_embed_size, section.edge_features
        self.node_feature_net = NodeFeatureNet(section.node_features)
        self.edge_factors = EdgeFactors(
            c_s=c,
            c_p=section.edge_embed_size,
            feat_dim=edges.feat_dim,
            num_bins=edges.num_bins,
            rank=rank,
            k=NEIGHBOURS,
        )
        self.aatype_pred_net = nn.Sequential(
            nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, section.aatype_pred_num_tokens)
        )
        ipa = SimpleNamespace(**{**section.ipa.model_dump(), "z_factor_rank": rank})
        self.trunk = FactorTrunk(ipa, section.edge_embed_size)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the clean structure and sequence of Multiflow's batch."""
        from foldkernels.modules.rigid import Rigid

        mask = batch["res_mask"] > 0.5
        there = mask[..., None].float()
        nodes = self.node_feature_net(
            so3_t=batch["so3_t"],
            r3_t=batch["r3_t"],
            cat_t=batch["cat_t"],
            res_mask=mask,
            diffuse_mask=batch["diffuse_mask"],
            chain_index=batch["chain_idx"],
            pos=batch["res_idx"],
            aatypes=batch["aatypes_t"].long(),
            aatypes_sc=batch["aatypes_sc"],
        )
        first, second = self.edge_factors(nodes, batch["trans_t"], batch["trans_sc"])
        frames = Rigid(batch["rotmats_t"], batch["trans_t"]).scale_translation(0.1)
        first, second = first * there[..., None], second * there[..., None]
        moves = there[..., 0] * batch["diffuse_mask"]
        nodes, frames = self.trunk(nodes * there, first, second, frames, mask, moves)
        frames = frames.scale_translation(10.0)
        return {
            "pred_trans": frames.get_trans(),
            "pred_rotmats": frames.get_rot_mats(),
            "pred_logits": self.aatype_pred_net(nodes),
        }


@lru_cache
def settings() -> Any:
    """The example's training config at the size of the curves."""
    from omegaconf import OmegaConf

    from foldkernels.compat.multiflow.training.run_config import read_run_config

    whole = OmegaConf.load(CONFIG)
    whole.model.node_embed_size = NODE_EMBED_SIZE
    whole.model.ipa.num_blocks = BLOCKS
    return read_run_config(whole)


def make(run: Run) -> nn.Module:
    """The model with its first weights, its kernels bound, in training mode."""
    import foldkernels
    from foldkernels.compat.multiflow.model import FlowModel

    torch.manual_seed(run.seed)
    section = settings().model
    model = FactorizedFlowModel(section, run.rank) if run.rank else FlowModel(section)
    with torch.no_grad():
        for parameter in model.parameters() if run.nudge else ():
            parameter.mul_(1 + run.nudge * torch.empty_like(parameter).bernoulli_().mul_(2).sub_(1))
    # `deterministic`: no kernel whose own sums differ from run to run could blur what is compared.
    foldkernels.bind(model, {"preset": run.kernel, "deterministic": True})
    return model.train()


def noisy_batches(run: Run, seed: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Noisy batches without end, and whether each is self-conditioned."""
    from foldkernels.compat.multiflow.dataset import as_data_config, training_batches
    from foldkernels.compat.multiflow.training import corrupt_batch
    from foldkernels.compat.multiflow.training.seeding import seed_batch

    config = settings()
    given = as_data_config(config.data)
    data = given.model_copy(
        update={
            "crop": given.crop.model_copy(update={"length": run.length}),
            "sampler": given.sampler.model_copy(
                update={"max_batch_size": run.batch, "max_num_res_squared": 10**9, "repeats": 100}
            ),
            "cache": "off",
        }
    )
    loader = training_batches(STRUCTURES, data, seed=seed)
    number, epoch = 0, 0
    while True:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            coin = seed_batch(seed, number, 0)
            yield corrupt_batch(batch, config.interpolant), coin
            number += 1
        epoch += 1


class Training:
    """A run under way: each call of `step` is one step of the optimizer.

    Attributes:
        model: The model.
    """

    def __init__(self, run: Run) -> None:
        torch.set_num_threads(run.threads)
        self.run, self.model = run, make(run)
        self._batches = noisy_batches(run, run.seed)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(self) -> dict[str, float]:
        """Train on the next batch.

        Returns:
            The mean of each loss.
        """
        batch, guess_first = next(self._batches)
        found = self._losses(batch, guess_first)
        self._optimizer.zero_grad()
        found["train_loss"].mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return {name: float(value.detach().mean()) for name, value in found.items()}

    @torch.no_grad()
    def evaluate(self, number: int = EVALUATION_BATCHES) -> dict[str, float]:
        """The mean of each loss over crops of the same proteins that are drawn apart, for all runs the same."""
        batches = noisy_batches(self.run, EVALUATION_SEED)
        found = [self._losses(*next(batches)) for _ in range(number)]
        return {name: float(torch.cat([each[name] for each in found]).mean()) for name in found[0]}

    def _losses(self, batch: Mapping[str, Tensor], guess_first: bool) -> dict[str, Tensor]:
        from foldkernels.compat.multiflow.training import losses, self_condition

        def called(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            with self.run.autocast():
                return self.model(given)  # type: ignore[no-any-return]

        noisy = self_condition(called, batch) if guess_first else batch
        return losses(called, noisy, settings().experiment.training)
