r"""BigBird: windows, global tokens and random pairs, all in blocks.

Tokens are cut into blocks of $b$. A block of queries sees three blocks around it, the first and the
last block (which themselves see everything), and $r$ random ones: a constant number of blocks for
each, so a cost linear in the length. Random pairs make any two tokens reach each other in few
steps; global ones make that two. Blocks are gathered and multiplied whole, which suits hardware
better than single pairs.

Random blocks are drawn once for each layer and head, and then fixed.

Zaheer, Guruganesh, Dubey, Ainslie, Alberti, Ontanon, Pham, Ravula, Wang, Yang, Ahmed, "Big Bird:
Transformers for Longer Sequences", 2020, arXiv 2007.14062.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnb.design.attention.checks import check_attention, check_count, check_mask


def random_blocks(
    blocks: int, count: int, *, heads: int = 1, seed: int = 0
) -> Int[Tensor, "heads blocks count"]:
    """For each head and block of queries, the blocks that it sees by chance.

    They are different from each other and from those that it sees anyway. The first and last block
    see everything; their rows hold no choice and are not used.

    Args:
        blocks: Blocks of the text.
        count: r, random blocks of each.
        heads: Heads, each with a choice of its own.
        seed: Of the choice; give each layer another one.

    Raises:
        ValueError: Fewer blocks than 5 + r, so that there is no choice.
    """
    check_count("count", count, least=0)
    if check_count("blocks", blocks) < 5 + count:
        raise ValueError(
            f"a text of {blocks} blocks is too short for {count} random ones beside the three of "
            f"the window and the two that are global; it needs {5 + count}, or dense attention."
        )
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(heads, blocks, blocks, generator=generator)
    n = torch.arange(blocks)
    known = ((n[:, None] - n).abs() <= 1) | (n == 0) | (n == blocks - 1)
    return chance.masked_fill(known, -1).topk(count, -1).indices.sort(-1).values


def bigbird_pattern(
    tokens: int, *, block: int = 64, random: int = 3, heads: int = 1, seed: int = 0
) -> Bool[Tensor, "heads tokens tokens"]:
    """Which pairs see each other, as a table: for short texts, and pictures.

    Raises:
        ValueError: A length that is no multiple of the block, or as `random_blocks`.
    """
    if tokens % check_count("block", block):
        raise ValueError(f"{tokens} tokens are no multiple of blocks of {block}; pad the text.")
    blocks = tokens // block
    chosen = random_blocks(blocks, random, heads=heads, seed=seed)
    n = torch.arange(blocks)
    ends = (n == 0) | (n == blocks - 1)
    table = ((n[:, None] - n).abs() <= 1) | ends | ends[:, None]
    table = table.repeat(heads, 1, 1)
    table[:, 1:-1] = table[:, 1:-1].scatter(2, chosen[:, 1:-1], True)
    return table.repeat_interleave(block, 1).repeat_interleave(block, 2)


def bigbird_attention(
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    *,
    block: int = 64,
    random: int = 3,
    seed: int = 0,
    padding: Bool[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads time value_dim"]:
    r"""Attention over BigBird's pairs, by gathered blocks. It is for encoders: not causal.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        block: b, tokens in a block; the length is a multiple of it.
        random: r, random blocks for each block of queries.
        seed: Of their choice; give each layer another one.
        padding: True at tokens that are none: nothing sees them, and their outputs are 0.
        scale: The factor on scores; $1 / \sqrt d$ by default.

    Raises:
        ValueError: Shapes that do not fit, a length that is no multiple of the block, or a text too
            short to be sparse (see `random_blocks`).
    """
    check_attention(q, k, v, same_length=True)
    batch, heads, time, dim = q.shape
    check_mask("padding", padding, (batch, time))
    if time % check_count("block", block):
        raise ValueError(f"{time} tokens are no multiple of blocks of {block}; pad the text.")
    blocks = time // block
    chosen = random_blocks(blocks, random, heads=heads, seed=seed).to(q.device)
    scale = dim**-0.5 if scale is None else scale
    if padding is None:
        unseen = torch.zeros(1, time, dtype=torch.bool, device=q.device)
    else:
        unseen = padding
        k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))

    def attend(queries, keys, values, hidden):
        scores = (scale * queries @ keys.mT).masked_fill(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)
        return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ values

    queries, keys, values = (x.unflatten(2, (blocks, block)) for x in (q, k, v))
    # The first and the last block see everything.
    ends = torch.cat([q[:, :, :block], q[:, :, -block:]], 2)
    first, last = attend(ends, k, v, unseen[:, None, None]).split(block, 2)

    # The others: both ends, three neighbours, random ones; a block that is there twice counts once.
    n = torch.arange(1, blocks - 1, device=q.device)
    fixed = torch.stack([0 * n, 0 * n + blocks - 1, n - 1, n, n + 1], 1)
    twice = torch.zeros_like(fixed, dtype=torch.bool)
    twice[0, 2] = twice[-1, 4] = True
    listed = torch.cat([fixed.expand(heads, -1, -1), chosen[:, 1:-1]], 2)
    twice = torch.nn.functional.pad(twice, (0, random))
    head = torch.arange(heads, device=q.device)[:, None, None]
    near_keys, near_values = (x[:, head, listed].flatten(3, 4) for x in (keys, values))
    hidden = unseen.unflatten(1, (blocks, block))[:, listed] | twice[None, None, :, :, None]
    middle = attend(queries[:, :, 1:-1], near_keys, near_values, hidden.flatten(3)[:, :, :, None])
    out = torch.cat([first, middle.flatten(2, 3), last], 2)
    return out if padding is None else out.masked_fill(padding[:, None, :, None], 0)
