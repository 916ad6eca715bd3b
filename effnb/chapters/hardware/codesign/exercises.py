"""The exercises of the chapter on co-design: references, cases, and mistakes with diagnoses.

The third one, a GPU kernel, is in `tile_loop`.
"""

from __future__ import annotations

from collections.abc import Sequence

from effnb.lab import Exercise

RATES = ((2e12, 300e12), (1e10, 1e11))
"""Bytes and operations per second of a GPU and of a processor."""


def least_time(m: int, bits: int, width: int, memory: float, arithmetic: float) -> float:
    r"""Microseconds, $10^6 \max(D / B, F / P)$; inputs and results have 16 bits."""
    moved = (bits * width**2 + 16 * 2 * m * width) / 8
    return 1e6 * max(moved / memory, 2 * m * width**2 / arithmetic)


time = Exercise(
    "Predict before you measure",
    minutes=10,
    difficulty="easy",
    reference=least_time,
    cases=[
        (1, 16, 4096, *RATES[0]),
        (1, 4, 4096, *RATES[0]),
        (1024, 4, 4096, *RATES[0]),
        (8, 32, 512, *RATES[1]),
    ],
    wrong={
        "The two times overlap: take the larger one, not their sum": lambda m, b, w, B, P: (
            1e6 * ((b * w * w + 32 * m * w) / 8 / B + 2 * m * w * w / P)
        ),
        "A multiplication and an addition are two operations": lambda m, b, w, B, P: (
            1e6 * max((b * w * w + 32 * m * w) / 8 / B, m * w * w / P)
        ),
        "These are bits, not bytes: divide by eight": lambda m, b, w, B, P: (
            1e6 * max((b * w * w + 32 * m * w) / B, 2 * m * w * w / P)
        ),
        "Inputs and results move too, in 16 bits each": lambda m, b, w, B, P: (
            1e6 * max(b * w * w / 8 / B, 2 * m * w * w / P)
        ),
    },
    atol=1e-6,
)


def places(choices: Sequence[int], experts: int, room: int) -> list[int]:
    """How many earlier tokens want the same expert, or -1 where `room` is used up."""
    asked, found = [0] * experts, []
    for expert in choices:
        found.append(asked[expert] if asked[expert] < room else -1)
        asked[expert] += 1
    return found


seats = Exercise(
    "A place before the expert",
    minutes=10,
    difficulty="medium",
    reference=places,
    cases=[([0, 1, 0, 0, 1], 2, 2), ([2, 2, 2, 0, 1, 2], 3, 1), ([1, 0, 1, 1, 0], 2, 5)],
    wrong={
        "A token whose expert is full is dropped: its place is -1": lambda c, e, r: [
            c[:i].count(x) for i, x in enumerate(c)
        ],
        "Places are counted for each expert, not over all tokens": lambda c, e, r: [
            i if i < r else -1 for i in range(len(c))
        ],
        "Places begin at 0": lambda c, e, r: [
            c[: i + 1].count(x) if c[:i].count(x) < r else -1 for i, x in enumerate(c)
        ],
    },
)
