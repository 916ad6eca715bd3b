r"""Product quantization: short pieces of a weight's rows become codewords of a small dictionary.

Each row of a weight is cut into blocks of $d$ neighbours. All blocks of the matrix share a
dictionary of $K$ codewords, found by k-means; a block is stored as the number of its codeword:

$$\min_{C, I} \sum_b \sum_j h_j\,(b_j - C_{I(b), j})^2 .$$

A block costs $\log_2 K$ bits instead of $32\,d$, and the dictionary $16\,K d$ bits once. The
importance $h_j$ of a column is 1, or the mean square of the layer's input there: the error of the
layer's output then counts, not that of its weight (a diagonal form of Stock et al.'s objective).

Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", 2011. For networks: Stock
et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", 2020, arXiv
1907.05686, eqs. 2 to 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.checks import check_finite


@dataclass(frozen=True)
class ProductWeight:
    """A matrix as codewords.

    Attributes:
        codebook: The dictionary, (codewords, block).
        codes: The number of each block's codeword, (rows, blocks).
        objective: What k-means minimized, after each round; it never rises.
    """

    codebook: Float[Tensor, "codewords block"] = field(repr=False)
    codes: Int[Tensor, "rows blocks"] = field(repr=False)
    objective: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.codes.shape[0], self.codes.shape[1] * self.codebook.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The matrix that is stored."""
        return self.codebook[self.codes].flatten(1).to(dtype)

    @property
    def bytes(self) -> int:
        r"""Bytes of the codes, $\lceil \log_2 K \rceil$ bits each, and of the 16-bit codebook."""
        return stored_bytes(self.codes.numel(), *self.codebook.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per number, the codebook counted."""
        rows, columns = self.shape
        return 8 * self.bytes / (rows * columns)


def stored_bytes(blocks: int, codewords: int, block_size: int) -> int:
    r"""$\lceil B \lceil \log_2 K \rceil / 8 \rceil + 2 K d$ bytes for B blocks."""
    bits = max(1, math.ceil(math.log2(codewords))) if codewords > 1 else 1
    return math.ceil(blocks * bits / 8) + 2 * codewords * block_size


def kmeans(
    points: Float[Tensor, "points dim"],
    count: int,
    *,
    importance: Float[Tensor, "points dim"] | None = None,
    iterations: int = 15,
    seed: int = 0,
) -> tuple[Float[Tensor, "count dim"], Int[Tensor, " points"], list[float]]:
    r"""Lloyd's k-means with weights: $\min \sum_i \sum_j h_{ij} (x_{ij} - c_{I(i), j})^2$.

    The first centres are points far from each other: each is drawn with a probability that grows
    with the square of its distance to the nearest one drawn before (k-means++, Arthur and
    Vassilvitskii, 2007). A centre that lost all its points moves to the point that is served worst.

    Returns:
        The centres, the number of each point's centre, and the objective after each round.

    Raises:
        ValueError: When there are fewer points than centres, or no round is allowed.
    """
    if not 1 <= count <= len(points):
        raise ValueError(
            f"{count} codewords are asked for {len(points)} blocks; 1 to that many fit."
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1.")
    h = torch.ones_like(points) if importance is None else importance
    centres = points[_first(points, h, count, seed)].clone()
    objective = []

    def assign() -> tuple[Tensor, Tensor]:
        # $\sum_j h_j x_j^2 - 2 h_j x_j c_j + h_j c_j^2$, in three products
        distance = (h * points * points).sum(1, keepdim=True)
        distance = distance - 2 * (h * points) @ centres.T + h @ (centres * centres).T
        nearest = distance.argmin(1)
        own = (h * (points - centres[nearest]).square()).sum(1)
        return nearest, own

    for _ in range(iterations):
        nearest, own = assign()
        for lost in (torch.bincount(nearest, minlength=count) == 0).nonzero()[:, 0].tolist():
            worst = int(own.argmax())
            if float(own[worst]) == 0:
                break
            centres[lost], nearest[worst], own[worst] = points[worst], lost, 0
        total = torch.zeros_like(centres).index_add_(0, nearest, h * points)
        mass = torch.zeros_like(centres).index_add_(0, nearest, h)
        centres = torch.where(mass > 0, total / mass.clamp(min=1e-30), centres)
        nearest, own = assign()
        objective.append(float(own.sum()))
        if len(objective) > 1 and objective[-2] - objective[-1] <= 1e-9 * objective[0]:
            break
    return centres, nearest, objective


def _first(points: Tensor, h: Tensor, count: int, seed: int) -> Tensor:
    """Numbers of the points that k-means begins with."""
    draw = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=draw))]
    nearest = (h * (points - points[chosen[0]]).square()).sum(1)
    while len(chosen) < count:
        if float(nearest.sum()) > 0:
            place = int(torch.multinomial(nearest.cpu(), 1, generator=draw))
        else:  # all that is left are copies of points that were drawn
            place = int(torch.randint(len(points), (1,), generator=draw))
        chosen.append(place)
        nearest = torch.minimum(nearest, (h * (points - points[place]).square()).sum(1))
    return torch.tensor(chosen, device=points.device)


def product_quantize(
    weight: Float[Tensor, "rows columns"],
    block_size: int = 8,
    centroids: int = 256,
    *,
    importance: Float[Tensor, " importances"] | None = None,
    iterations: int = 15,
    seed: int = 0,
) -> ProductWeight:
    """Store a matrix as codewords.

    Args:
        weight: The matrix.
        block_size: $d$, neighbours of a row that share a codeword; it divides the columns.
        centroids: $K$; a matrix of fewer blocks gets as many codewords as it has blocks.
        importance: $h_j$ of every column, above 0 somewhere; 1 where None.
        iterations: Rounds of k-means at most.
        seed: Seed of the first centres.

    Raises:
        ValueError: A block that does not divide the columns, less than one codeword, an importance
            of another length or below 0, or a weight that is not finite.
    """
    check_finite(weight, purpose="quantized")
    rows, columns = weight.shape
    if block_size < 1 or columns % block_size:
        raise ValueError(
            f"block_size is {block_size}, and a row has {columns} weights; it must divide them."
        )
    if centroids < 1:
        raise ValueError(f"centroids is {centroids}; it must be at least 1.")
    blocks = weight.detach().float().reshape(-1, block_size)
    h = None
    if importance is not None:
        if importance.shape != (columns,) or bool((importance < 0).any()):
            raise ValueError(
                f"importance has the shape {tuple(importance.shape)}; it must hold one number from "
                f"0 for each of the {columns} columns."
            )
        h = importance.float().reshape(-1, block_size).repeat(rows, 1)
    count = min(centroids, len(blocks))
    codebook, codes, objective = kmeans(
        blocks, count, importance=h, iterations=iterations, seed=seed
    )
    return ProductWeight(codebook, codes.view(rows, columns // block_size), tuple(objective))


class ProductLinear(nn.Module):
    r"""A linear layer whose weight is a dictionary and codes: $y = x\,C[I]^\top + b$.

    The codes stay; the codewords can be trained. As in Stock et al. 2020 a codeword's gradient is
    the mean, not the sum, of its blocks' gradients, so that common codewords do not run ahead.
    """

    def __init__(self, weight: ProductWeight, bias: nn.Parameter | None = None) -> None:
        """Take a stored weight and the original's bias."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.codebook = nn.Parameter(weight.codebook.clone())
        self.register_buffer("codes", weight.codes.clone())
        used = torch.bincount(weight.codes.flatten(), minlength=len(weight.codebook))
        self.register_buffer("uses", used.clamp(min=1).unsqueeze(1), persistent=False)
        self.bias = bias

    def matrix(self) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for."""
        # The codebook's own value; $\frac{1}{|J_c|} \sum_{b \in J_c} \partial L / \partial b$.
        own = self.codebook.detach()
        codebook = own + (self.codebook - own) / self.uses
        return codebook[self.codes].flatten(1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Look up and multiply."""
        return nn.functional.linear(x, self.matrix(), self.bias)

    @property
    def bytes(self) -> int:
        """Bytes of codes and codebook."""
        return stored_bytes(self.codes.numel(), *self.codebook.shape)

    def extra_repr(self) -> str:
        """Codewords and their length."""
        return f"codewords={self.codebook.shape[0]}, block_size={self.codebook.shape[1]}"
