"""Stored rows, and how two settings of them differ: pick, average, compare, and say so in words.

    before, after = (mean_windows(pick(rows, method=name)) for name in ("SVD", "SVD-LLM"))
    Change.between(after, before).word()

What companions of chapters share to put sentences together from stored tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from statistics import fmean
from typing import Any

from effnb.lab.claims import interval
from effnb.lab.results import NotMeasured

Row = Mapping[str, Any]


def if_measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of stored rows give back a missing result, which says so, and not fail."""

    @wraps(function)
    def careful(*given: Any) -> Any:
        missing = [one for one in given if isinstance(one, NotMeasured)]
        return missing[0] if missing else function(*given)

    return careful


def tidy(value: float, digits: int = 3) -> float:
    """A number as it is printed, without the sign of a zero."""
    return round(value, digits) + 0.0


@dataclass(frozen=True)
class Change:
    """The mean of paired differences, with its 95 % interval.

    Attributes:
        mean: Mean difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def between(cls, after: Sequence[float], before: Sequence[float]) -> Change:
        """After minus before, pair by pair.

        Raises:
            ValueError: When the two do not pair up, or there are fewer than two pairs.
        """
        if len(after) != len(before):
            raise ValueError(f"{len(after)} numbers do not pair up with {len(before)}.")
        differences = [a - b for a, b in zip(after, before, strict=True)]
        low, high = interval(differences)
        return cls(fmean(differences), low, high)

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def number(self, digits: int = 3) -> str:
        """The difference and its interval."""
        mean, low, high = (
            f"{tidy(v, digits):+.{digits}f}" for v in (self.mean, self.low, self.high)
        )
        return f"{mean} [{low}, {high}]".replace("-", "−")

    def word(self, lower_is_better: bool = True) -> str:
        """Better, worse, or indistinguishable."""
        if not self.decided:
            return "indistinguishable"
        return "better" if (self.mean < 0) == lower_is_better else "worse"


def mean_windows(rows: Iterable[Row]) -> list[float]:
    """The loss of each window, averaged over the rows of several calibration seeds."""
    return [fmean(losses) for losses in zip(*(row["windows"] for row in rows), strict=True)]


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose entries are as wanted; entries that a row does not have are None."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def spoken(parts: Sequence[str]) -> str:
    """A list as English joins it: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
