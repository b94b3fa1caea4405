"""One step of Multiflow's discrete flow over residue types.

All of it runs on the CPU: the draws are made there in any case, ``binomial`` has no MPS kernel, and the order of equal
scores in ``argsort`` differs between devices. The tensors are small (B x N x 21), and the trajectory copies each step
to the CPU anyway.

Source: Campbell et al., "Generative Flows on Discrete State-Spaces", 2024 (arXiv 2402.04997), and the released code,
whose order of draws and of operations is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from ..structures.residue_types import MASK
from .noise import Draws


def euler_step(
    d_t: Float[Tensor, ""],
    t: Float[Tensor, ""],
    logits: Float[Tensor, "b n s"],
    types: Shaped[Tensor, "b n"],
    *,
    temperature: float,
    noise: float,
    masking: bool,
    draws: Draws,
) -> Int64[Tensor, "b n"]:
    """One Euler step of the jump process.

    Args:
        d_t: Length of the step.
        t: Time at its start.
        logits: Predicted types at t = 1. With masking, the mask's logit is ignored. (The original overwrites it in the
            model's own output; nothing that it computes later reads that, and here the output stays as it is.)
        types: Types now.
        temperature: Divides the logits.
        noise: Rate of the jumps that leave the marginals unchanged.
        masking: Noise is the mask token (21 classes), else the uniform distribution (20).
        draws: Where random numbers come from.

    Returns:
        Types at ``t + d_t``.

    Raises:
        ValueError: A uniform flow holds a masked residue.
    """
    num_classes = logits.shape[-1]
    if masking:
        logits = logits.clone()
        logits[..., MASK] = -1e9
        predicted = F.softmax(logits / temperature, dim=-1)
        rates = d_t * predicted * ((1 + noise * t) / (1 - t))
        to_mask = torch.zeros(num_classes)
        to_mask[MASK] = 1.0
        rates = rates + d_t * (types != MASK)[..., None].float() * to_mask * noise
    else:
        if int(types.max()) >= num_classes:
            raise ValueError(
                f"a uniform interpolant knows the types 0 to {num_classes - 1}, and a residue has {int(types.max())}"
            )
        predicted = F.softmax(logits / temperature, dim=-1)
        stay = torch.gather(predicted, dim=-1, index=types.long()[..., None])
        rates = d_t * (predicted * ((1 + noise + noise * (num_classes - 1) * t) / (1 - t)) + noise * stay)
    return draws.categorical(_with_rest_on_current(rates, types))


def _with_rest_on_current(rates: Float[Tensor, "b n s"], types: Shaped[Tensor, "b n"]) -> Float[Tensor, "b n s"]:
    """Jump probabilities of a step: what does not jump stays where it is."""
    current = types.long()[..., None]
    jumps = rates.clamp(min=0.0, max=1.0).scatter(-1, current, 0.0)
    return jumps.scatter(-1, current, 1.0 - jumps.sum(-1, keepdim=True)).clamp(min=0.0, max=1.0)


def purity_step(
    d_t: Float[Tensor, ""],
    t: Float[Tensor, ""],
    logits: Float[Tensor, "b n 21"],
    types: Shaped[Tensor, "b n"],
    *,
    temperature: float,
    noise: float,
    draws: Draws,
) -> Float[Tensor, "b n"]:
    """One step that unmasks the residues the model is surest of, then masks some again at random.

    How many are unmasked is drawn from a binomial over the masked ones; which, is decided by their largest predicted
    probability.

    Args:
        d_t: Length of the step.
        t: Time at its start.
        logits: Predicted types at t = 1; the mask's is not used.
        types: Types now.
        temperature: Divides the logits.
        noise: Rate at which residues are masked again.
        draws: Where random numbers come from.

    Returns:
        Types at ``t + d_t``, as floats.
    """
    predicted = F.softmax(logits[..., :MASK] / temperature, dim=-1)
    sureness = predicted.log().amax(dim=-1) - (types != MASK).float() * 1e9  # masked residues come first
    order = sureness.argsort(dim=-1, descending=True)

    probability = (d_t * ((1 + noise * t) / (1 - t))).clamp(max=1)
    count = draws.binomial((types == MASK).sum(dim=-1).float(), probability)
    drawn = draws.categorical(predicted)

    num_res = types.shape[1]
    chosen = torch.arange(num_res)[None] < count[:, None]  # places in `order`
    unmask = torch.zeros_like(chosen).scatter(1, order, chosen).float()
    types = types * (1 - unmask) + drawn * unmask

    remask = (draws.uniform(num_res) < d_t * noise).float()
    return types * (1 - remask) + MASK * remask
