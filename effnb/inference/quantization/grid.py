r"""What a uniform grid is: how many values, what shares one, and how much of the range it covers.

Public methods take these as keywords; inside the package they travel as one `Grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

from effnb.inference.quantization.stored import check_bits

Granularity = int | str
"""What shares one scale: "tensor", "row", or a number of neighbouring inputs of a row."""

CLIPS = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Grid:
    r"""A kind of uniform grid; scales and zero points come with the numbers.

    Attributes:
        bits: $b$, 2 to 8.
        group_size: What shares one scale: "tensor", "row", or a number of last-axis neighbours.
        symmetric: Whether the grid is centred on 0 and has no zero point.
        clip: What the grid covers: everything ("minmax"), a share of the numbers ("percentile"),
            or the range of least error ("mse"); see `clipping`.
        percentile: For "percentile": the share in per cent.
        exponent: For "mse": the power of the error that is summed.

    Raises:
        ValueError: When one of them does not exist, in a sentence that says what does.
    """

    bits: int
    group_size: Granularity = "row"
    symmetric: bool = False
    clip: str = "minmax"
    percentile: float = 99.9
    exponent: float = 2.0

    def __post_init__(self) -> None:
        """Refuse grids that do not exist."""
        check_bits(self.bits)
        check_granularity(self.group_size)
        if self.clip not in CLIPS:
            raise ValueError(f'clip is {self.clip!r}; it must be "minmax", "percentile" or "mse".')
        if not 0 < self.percentile <= 100:
            raise ValueError(
                f"percentile is {self.percentile!r}; it must lie above 0 and at most at 100."
            )
        if not self.exponent > 0:
            raise ValueError(f"exponent is {self.exponent!r}; it must be above 0.")

    @property
    def low(self) -> int:
        r"""The smallest code: $-(2^{b-1} - 1)$ if symmetric, else 0."""
        return 1 - 2 ** (self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        r"""The largest code: $2^{b-1} - 1$ if symmetric, else $2^b - 1$."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


def check_granularity(group_size: Granularity) -> None:
    """Refuse anything but "tensor", "row" and whole numbers from 1."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size not in ("tensor", "row") and not (whole and group_size >= 1):
        raise ValueError(
            f'group_size is {group_size!r}; it must be "tensor", "row" or a whole number from 1.'
        )
