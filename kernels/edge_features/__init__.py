"""Edge features: Multiflow's first pair representation, from residues, sequence distance and two sets of coordinates.

Campbell et al. 2024 (Multiflow); relative positions and distograms as in Jumper et al. 2021, Supplementary Algorithms 4
and 5.
"""

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..dtypes import any_requires_grad, floating_type, in_use, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="edge_features",
        summary="pair embedding: residues, relative positions and distograms through a three-layer perceptron",
        dims=("n", "f", "cz", "bins"),
        options=("chain", "diffuse"),
    )
)

#: The distogram's first and last lower edge, in Angstrom.
MIN_BIN_ANGSTROM, MAX_BIN_ANGSTROM = 1e-3, 20.0
#: The longest relative position that the sinusoids are spread over.
MAX_RELATIVE_POSITION = 2056


def edge_features(
    nodes: Float[Tensor, "b n f"],
    positions: Float[Tensor, "b n 3"],
    positions_sc: Float[Tensor, "b n 3"],
    chain: Int[Tensor, "b n"] | None,
    diffuse: Float[Tensor, "b n"] | None,
    relpos_weight: Float[Tensor, "f f"],
    relpos_bias: Float[Tensor, " f"],
    weights: tuple[Float[Tensor, "cz features"], Float[Tensor, "cz cz"], Float[Tensor, "cz cz"]],
    biases: tuple[Float[Tensor, " cz"], Float[Tensor, " cz"], Float[Tensor, " cz"]],
    norm_weight: Float[Tensor, " cz"],
    norm_bias: Float[Tensor, " cz"],
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    num_bins: int = 22,
    eps: float = 1e-5,
    out_dtype: pytorch.dtype | None = None,
    config: str = "",
) -> Float[Tensor, "b n n cz"]:
    """Embed every pair of residues.

    The features of a pair, in the order of the first layer's columns: nodes_i, nodes_j (f each), the embedded sequence
    distance i - j (f), the distogram of `positions` and of `positions_sc` (num_bins each), whether the two are of one
    chain (1, if `chain` is given), and the two diffuse flags (2, if `diffuse` is given).

    Args:
        nodes: The residues' share, already projected (Multiflow's `linear_s_p`).
        positions: Coordinates in Angstrom.
        positions_sc: Coordinates of the last prediction (self-conditioning), in Angstrom; zeros where there is none.
        chain: Chain indices.
        diffuse: 1 for residues that are being generated, 0 for those given.
        relpos_weight: The linear map of the sinusoids of the sequence distance.
        relpos_bias: Its bias.
        weights: The perceptron's three layers.
        biases: Their biases.
        norm_weight: LayerNorm's scale.
        norm_bias: LayerNorm's shift.
        mask: True for residues that take part; a pair with a masked residue becomes zero and passes no gradient.
        num_bins: Bins of a distogram. Both edges of a bin are exclusive: a distance of 0, or on an edge, is in none.
        eps: LayerNorm's epsilon.
        out_dtype: The floating type of the result; by default that of `nodes`, under autocast autocast's.
        config: A module's kernel configuration, as its token.

    Returns:
        The pair representation. Distances are not differentiated: a distogram is a step function.

    Raises:
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    read = (nodes, relpos_weight, relpos_bias, *weights, *biases, norm_weight, norm_bias)
    require_one_device(*read, positions, positions_sc, chain, diffuse, mask)
    run = function_for(
        OPERATION.name,
        nodes,
        length=nodes.shape[1],
        dims={"f": nodes.shape[-1], "cz": weights[2].shape[0], "bins": num_bins},
        grad=any_requires_grad(*read),
        config=config,
        options=in_use(chain=chain, diffuse=diffuse),
    )
    dtype = out_dtype or floating_type(nodes)
    with without_autocast(nodes), tf32.allowance(nodes, precision(config)):
        out: Tensor = run(
            nodes,
            positions.detach() if positions.requires_grad else positions,
            positions_sc.detach() if positions_sc.requires_grad else positions_sc,
            chain,
            diffuse,
            relpos_weight,
            relpos_bias,
            weights,
            biases,
            norm_weight,
            norm_bias,
            mask,
            num_bins,
            eps,
            dtype,
        )
    return out
