"""Who sees whom in local attention: pairs of tokens, and the tiles that the kernels visit.

A schedule says for each tile of queries which tiles of keys share a visible pair with it. Of these,
some are full: all of their pairs are visible, so that nothing is masked. With a window of 1,024 and
tiles of 64 these are fifteen of seventeen.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int8, Int64
from torch import Tensor

from effnb.kernels._launch import check_whole

LOCAL, GLOBAL, PADDING = 0, 1, 2  # the kinds of tokens


def reach_of(window: int, causal: bool, tokens: int) -> tuple[int, int]:
    """How many of the tokens to the left and to the right of its own a token sees.

    Raises:
        ValueError: A window that is not positive, or not even where it has two sides.
        TypeError: A window that is no whole number.
    """
    window = check_whole("window", window)
    if window < 1 or (not causal and window % 2):
        raise ValueError(
            f"window is {window}; it must be positive and, where it has two sides, even."
        )
    left, right = (window - 1, 0) if causal else (window // 2, window // 2)
    return min(left, tokens), min(right, tokens)  # further away there is nothing to see


def kinds_of(
    tokens: int,
    device: torch.device | str,
    global_tokens: Tensor | None,
    padding: Tensor | None,
) -> Int8[Tensor, "sequences time"]:
    """The kind of each token: one row per sequence, or one for all where all are alike."""
    kinds = torch.full((1, check_whole("tokens", tokens)), LOCAL, dtype=torch.int8, device=device)
    if global_tokens is not None:
        kinds = torch.where(torch.atleast_2d(global_tokens), GLOBAL, kinds)
    if padding is not None:
        kinds = torch.where(torch.atleast_2d(padding), PADDING, kinds)
    return kinds.to(torch.int8).contiguous()


def visible_kinds(i, j, kind_i, kind_j, left, right, causal):
    """Which pairs are visible, for indices and kinds that broadcast against each other."""
    near = (i - j <= left) & (j - i <= right)
    far = (kind_i == GLOBAL) | (kind_j == GLOBAL)
    if causal:
        far = far & (j <= i)
    return (near | far) & (kind_i != PADDING) & (kind_j != PADDING)


def visible_pairs(
    tokens: int,
    *,
    window: int,
    causal: bool = False,
    global_tokens: Tensor | None = None,
    padding: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, "sequences time time"]:
    """The whole table of visible pairs, for one sequence or a batch: for short texts, and pictures.

    Arguments are those of `local_attention`.
    """
    kinds = kinds_of(tokens, device, global_tokens, padding)
    i = torch.arange(tokens, device=device)
    reach = reach_of(window, causal, tokens)
    return visible_kinds(i[:, None], i, kinds[:, :, None], kinds[:, None, :], *reach, causal)


def count_pairs(
    tokens: int,
    *,
    window: int,
    causal: bool = False,
    global_tokens: Tensor | None = None,
    padding: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Int64[Tensor, " sequences"]:
    """How many entries of that table are true, without the table.

    This is the work: a pair costs a head `4 * dim` operations forward.
    """
    kinds = kinds_of(tokens, device, global_tokens, padding)
    left, right = reach_of(window, causal, tokens)
    i = torch.arange(tokens, device=device)
    first, last = (i - left).clamp(min=0), (i + right).clamp(max=tokens - 1)
    end = i if causal else torch.full_like(i, tokens - 1)

    def tokens_before(chosen):  # entry n counts the chosen ones among the first n tokens
        return torch.nn.functional.pad(chosen.cumsum(1), (1, 0))

    real, far = tokens_before(kinds != PADDING), tokens_before(kinds == GLOBAL)
    near = real[:, last + 1] - real[:, first]
    beyond = far[:, end + 1] - (far[:, last + 1] - far[:, first])
    seen = torch.where(kinds == GLOBAL, real[:, end + 1], near + beyond)
    return (seen * (kinds != PADDING)).sum(1)


def _cut(kinds: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each tile begins and ends, and its kinds; what is beyond the end is padding."""
    start = torch.arange(0, kinds.shape[1], block, device=kinds.device)
    beyond = len(start) * block - kinds.shape[1]
    padded = torch.nn.functional.pad(kinds, (0, beyond), value=PADDING)
    return start, start + block - 1, padded.unflatten(1, (-1, block))


def tile_schedule(
    kinds: Tensor, left: int, right: int, causal: bool, block_q: int, block_k: int
) -> Tensor:
    """Which tiles of queries and keys share a visible pair: (batch or 1, query tiles, key tiles).

    Without padding the answer is exact. Tiles of nothing but padding are left out; where padding
    only thins a tile out, the tile stays.
    """
    last = kinds.shape[1] - 1

    def tiles(block):
        start, end, kind = _cut(kinds, block)
        return start, end.clamp(max=last), (kind == GLOBAL).any(-1), (kind != PADDING).any(-1)

    q_start, q_end, q_global, q_real = tiles(block_q)
    k_start, k_end, k_global, k_real = tiles(block_k)
    near = (k_end >= q_start[:, None] - left) & (k_start <= q_end[:, None] + right)
    far = q_global[:, :, None] | k_global[:, None, :]
    if causal:
        far = far & (k_start <= q_end[:, None])
    return (near | far) & q_real[:, :, None] & k_real[:, None, :]


def full_tiles(
    kinds: Tensor, left: int, right: int, causal: bool, block_q: int, block_k: int
) -> Tensor:
    """Tiles of which every pair is visible, in the form of `tile_schedule`.

    Tiles that the end of the sequence cuts are none.
    """

    def tiles(block):
        start, end, kind = _cut(kinds, block)
        return start, end, (kind == GLOBAL).all(-1), (kind != PADDING).all(-1)

    q_start, q_end, q_global, q_real = tiles(block_q)
    k_start, k_end, k_global, k_real = tiles(block_k)
    # The pairs furthest apart decide: the last query with the first key, and the other way round.
    near = (q_end[:, None] - k_start <= left) & (k_end - q_start[:, None] <= right)
    far = q_global[:, :, None] | k_global[:, None, :]
    if causal:
        far = far & (k_end <= q_start[:, None])
    return (near | far) & q_real[:, :, None] & k_real[:, None, :]


@dataclass(frozen=True)
class Visits:
    """What a kernel reads: the tiles that come by, for each tile that it holds.

    Attributes:
        counts: (batch or 1, tiles, 2) int32: how many are masked, and how many there are in all.
        tiles: (batch or 1, tiles, tiles) int32: which ones, masked ones first, then full ones.
    """

    counts: Tensor
    tiles: Tensor

    @property
    def held(self) -> int:
        """Tiles that the programs of a sequence hold, one each."""
        return self.tiles.shape[1]

    @property
    def passing(self) -> int:
        """Tiles that may come by."""
        return self.tiles.shape[2]

    @property
    def batch_stride(self) -> int:
        """How far apart the lists of two sequences lie, in tiles; 0 where all share one."""
        return 0 if len(self.counts) == 1 else self.counts.shape[1]


def list_visits(schedule: Tensor, full: Tensor) -> Visits:
    """The lists of a schedule; of its transpose they are those of the tiles of keys."""
    masked = schedule & ~full
    counts = torch.stack([masked.sum(-1), schedule.sum(-1)], -1).to(torch.int32)
    order = 2 * masked.to(torch.int8) + full.to(torch.int8)
    tiles = order.argsort(dim=-1, descending=True, stable=True)
    return Visits(counts.contiguous(), tiles.to(torch.int32).contiguous())


KEPT, LARGEST = 8, 2**20
"""Schedules that are kept, and pairs of tiles of the largest one that is (4 MiB): all layers of a
model ask for the same few."""
_kept: OrderedDict[tuple, tuple[Visits, Masks]] = OrderedDict()


class Masks:
    """The masks of one call, and in which state they were.

    Attributes:
        tensors: Global tokens and padding; kept, so that their ids are not given to others.
        state: What tells them from other masks and later writes; None where nothing does.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        """Note the state of these tensors."""
        self.tensors = tensors
        made = [t for t in tensors if t is not None]
        known = not any(t.is_inference() or t.device.type == "meta" for t in made)
        self.state: tuple | None = None
        if known:
            self.state = tuple(None if t is None else (id(t), t._version) for t in tensors)


def visits_of(
    kinds: Tensor,
    masks: Masks,
    left: int,
    right: int,
    causal: bool,
    blocks: tuple[int, int],
    *,
    by_keys: bool = False,
) -> Visits:
    """The visits of a kernel that holds tiles of queries, or of keys; made once for equal masks.

    Args:
        kinds: The kind of each token.
        masks: From which these kinds were made: the same ones, not written to since, give the same
            visits.
        left: Reach to the left, in tokens.
        right: Reach to the right.
        causal: Whether no token sees a later one.
        blocks: Queries and keys of a tile.
        by_keys: Whether tiles of keys are held.
    """
    key = (kinds.shape, str(kinds.device), left, right, causal, blocks, by_keys, masks.state)
    if masks.state is not None and key in _kept:
        _kept.move_to_end(key)
        return _kept[key][0]
    schedule = tile_schedule(kinds, left, right, causal, *blocks)
    full = full_tiles(kinds, left, right, causal, *blocks)
    found = list_visits(schedule.mT, full.mT) if by_keys else list_visits(schedule, full)
    lasting = masks.state is not None and kinds.device.type != "meta"
    if lasting and found.tiles.numel() <= LARGEST:
        _kept[key] = found, masks
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return found
