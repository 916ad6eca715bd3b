r"""A simulated accelerator: bytes fetched and cycles spent for bits, sparsity, pruned attention.

**This is arithmetic, not measurement.** No such chip is in the reader's machine. What goes in may
be measured (how much SpAtten or Energon prunes on a real model, `PruningRecord`); what comes out is
the cost model below, and no more true than its assumptions:

- the chip has $M$ multipliers of 4 by 4 bits. A product of $a$ by $b$ bits takes
  $\lceil a/4 \rceil \lceil b/4 \rceil$ of them, as in designs that fuse small multipliers;
- memory delivers a fixed number of bytes per cycle, at any access pattern;
- fetching, multiplying and selecting overlap perfectly: the slowest of them decides;
- a key is fetched bit plane by bit plane, so that 2 bits of it cost 2 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from effnb.hardware.codesign.pruned_attention import PruningRecord
from effnb.hardware.codesign.roofline import Shape

SKIPS = ("none", "2:4", "any")


@dataclass(frozen=True)
class Accelerator:
    """The knobs of the simulated chip.

    Attributes:
        multipliers: Products of 4 by 4 bits per cycle: the size of the array.
        bytes_per_cycle: What memory delivers.
        comparisons_per_cycle: Numbers that the selecting unit (top-k, thresholds) takes in.
        hertz: Cycles per second.
    """

    multipliers: int = 4096
    bytes_per_cycle: float = 64.0
    comparisons_per_cycle: int = 16
    hertz: float = 1e9

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        for name in ("multipliers", "bytes_per_cycle", "comparisons_per_cycle", "hertz"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name.replace('_', ' ')} is {getattr(self, name)}; it has to be above 0."
                )


@dataclass(frozen=True)
class Simulated:
    """What the cost model says; nothing of it was measured.

    Attributes:
        dram_bytes: Bytes fetched from memory.
        multiply_cycles: Cycles that the multipliers need.
        memory_cycles: Cycles that the fetching needs.
        select_cycles: Cycles that the selecting needs.
        seconds: The slowest of the three, at the chip's rate.
    """

    dram_bytes: float
    multiply_cycles: float
    memory_cycles: float
    select_cycles: float
    seconds: float

    @property
    def cycles(self) -> float:
        """The slowest of the three decides."""
        return max(self.multiply_cycles, self.memory_cycles, self.select_cycles)

    @property
    def bound(self) -> str:
        """What decides: "multipliers", "memory" or "selection"."""
        names = {
            "multipliers": self.multiply_cycles,
            "memory": self.memory_cycles,
            "selection": self.select_cycles,
        }
        return max(names, key=names.get)


def product_units(a_bits: int, b_bits: int) -> int:
    r"""Small multipliers that one product takes: $\lceil a/4 \rceil \lceil b/4 \rceil$."""
    if a_bits < 1 or b_bits < 1:
        raise ValueError(f"a product of {a_bits} by {b_bits} bits; each needs at least 1.")
    return math.ceil(a_bits / 4) * math.ceil(b_bits / 4)


def _result(chip: Accelerator, fetched: float, units: float, compared: float) -> Simulated:
    cycles = (
        units / chip.multipliers,
        fetched / chip.bytes_per_cycle,
        compared / chip.comparisons_per_cycle,
    )
    return Simulated(fetched, *cycles, seconds=max(cycles) / chip.hertz)


def simulate_matmul(
    chip: Accelerator,
    m: int,
    n: int,
    k: int,
    *,
    weight_bits: int = 16,
    activation_bits: int = 16,
    sparsity: float = 0.0,
    skip: str = "none",
) -> Simulated:
    """A product of (m, k) and (k, n) with quantized and sparse weights.

    Args:
        chip: The chip.
        m: Tokens.
        n: Outputs.
        k: Inputs.
        weight_bits: Bits of a weight that is stored.
        activation_bits: Bits of inputs and results.
        sparsity: Share of the weights that are 0.
        skip: What the hardware can use. "none": zeros are stored and multiplied like anything else.
            "2:4": two of four neighbours are stored, with 2 bits of position each, and only those
            are multiplied; sparsity beyond a half gains nothing more. "any": what is not 0 is
            stored with a bitmap of 1 bit per weight, and only that is multiplied.

    Raises:
        ValueError: A size that is not above 0, a sparsity outside of [0, 1), or a form of
            skipping that does not exist or does not fit.
    """
    for name, value in (("m", m), ("n", n), ("k", k)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity is {sparsity}; it has to be from 0 to below 1.")
    if skip not in SKIPS:
        raise ValueError(f"skip is {skip!r}; choose {', '.join(SKIPS)}.")
    if skip == "2:4" and sparsity < 0.5:
        raise ValueError(f"the sparsity is {sparsity}; the 2:4 pattern needs at least a half.")
    stored, position = {
        "none": (1.0, 0.0),
        "2:4": (0.5, 1.0),  # 2 bits for each of the two kept of four
        "any": (1 - sparsity, 1.0),
    }[skip]
    weights = n * k * (stored * weight_bits + position) / 8
    fetched = weights + (m * k + m * n) * activation_bits / 8
    return _result(
        chip, fetched, m * n * k * stored * product_units(activation_bits, weight_bits), 0
    )


@dataclass(frozen=True)
class Kept:
    """What pruned attention still fetches and computes; shares of what full attention would.

    Attributes:
        keys: Pairs of query and key computed at full precision, pruned heads counting as not.
        values: Pairs whose value is read.
        bits: Bits of a key or value.
        high_bits: Bits read of every kept key at first; None reads all of them.
        refetched: Share of the queries that fetch the rest.
        rounds: For Energon: bits of each round, and the share of pairs that enter it.
        selects: Whether keys are ranked or compared at all.
    """

    keys: float = 1.0
    values: float = 1.0
    bits: int = 12
    high_bits: int | None = None
    refetched: float = 0.0
    rounds: tuple[tuple[int, float], ...] = ()
    selects: bool = False

    @classmethod
    def measured(
        cls,
        record: PruningRecord,
        *,
        bits: int = 12,
        high_bits: int | None = None,
        rounds: tuple[int, ...] = (),
    ) -> Kept:
        """The shares that a pruned model's record holds.

        Raises:
            ValueError: When the record has another number of rounds than `rounds`.
        """
        if len(rounds) != len(record.round_pairs):
            raise ValueError(
                f"{len(rounds)} rounds are given, and the record has {len(record.round_pairs)}."
            )
        return cls(
            record.pair_share,
            record.value_share,
            bits,
            high_bits,
            record.refetch_share if high_bits is not None else 0.0,
            tuple(zip(rounds, record.round_shares)),
            selects=True,
        )


def simulate_decode_attention(
    chip: Accelerator, shape: Shape, context: int, kept: Kept | None = None
) -> Simulated:
    """The attention of one decoded token over a cache of `context` tokens, all layers.

    Keys and values come from memory; the query is on the chip. With several query heads for one
    key head, each fetches its own: pruning is by query head.

    Args:
        chip: The chip.
        shape: The model's sizes.
        context: Tokens in the cache.
        kept: What is left of keys, values and bits; everything at 12 bits when None.

    Raises:
        ValueError: A context below 1, or more high bits than bits.
    """
    kept = Kept() if kept is None else kept
    if context < 1:
        raise ValueError(f"the context is {context} tokens; it has to be at least 1.")
    if kept.high_bits is not None and not 1 <= kept.high_bits <= kept.bits:
        raise ValueError(f"{kept.high_bits} high bits of {kept.bits}; take 1 to {kept.bits}.")
    numbers = shape.layers * shape.heads * context * shape.head_dim
    rows = shape.layers * shape.heads * context
    key_bits, units, compared, before = 0.0, 0.0, 0.0, 0
    for bits, share in kept.rounds:
        key_bits += share * max(bits - before, 0)
        units += numbers * share * product_units(bits, bits)
        compared += rows * share
        before = max(before, bits)
    first = kept.bits if kept.high_bits is None else kept.high_bits
    key_bits += kept.keys * max(first - before, 0)
    units += numbers * kept.keys * product_units(first, first)
    again = kept.keys * kept.refetched
    key_bits += again * (kept.bits - first)
    units += numbers * again * product_units(kept.bits, kept.bits)
    units += numbers * kept.values * product_units(kept.bits, kept.bits)
    if kept.selects and not kept.rounds:
        compared += 2 * rows * kept.keys  # tokens by importance, values by probability
    fetched = numbers * (key_bits + kept.values * kept.bits) / 8
    return _result(chip, fetched, units, compared)
