"""One interface for all cheap forms of attention: (q, k, v, budget) to outputs.

The budget is what a query pays for: how many keys it is compared with, or into how many numbers the
text is folded. With as many of them as there are tokens, exact attention would cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.attention import (
    bigbird_attention,
    full_shared_attention,
    gaussian_features,
    linear_attention,
    linformer_attention,
    lsh_attention,
    performer_attention,
)
from effnb.kernels.local_attention import local_attention

Heads = Float[Tensor, "batch heads time dim"]
BUDGETS = (16, 32, 64, 128)


def full(q: Heads, k: Heads, v: Heads, budget: int = 0) -> Heads:
    """Exact attention by PyTorch's fused kernel, which stores no table."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


def with_table(q: Heads, k: Heads, v: Heads, budget: int = 0) -> Heads:
    """Exact attention as its equation says it: the table of all scores is stored."""
    return (q @ k.mT / q.shape[3] ** 0.5).softmax(-1) @ v


def window(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """Half of the budget on either side."""
    return local_attention(q, k, v, window=budget)


def window_and_global(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """Half of the budget is a window, half of it the first tokens, which see everything."""
    first = torch.arange(q.shape[2], device=q.device) < budget // 2
    return local_attention(
        q, k, v, window=budget // 2, global_tokens=first.expand(len(q), -1).contiguous()
    )


def bigbird(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """Eight blocks: three around a query's own, the first and the last, three by chance."""
    return bigbird_attention(q, k, v, block=budget // 8, random=3)


def lsh(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """Two rounds of hashes, in each a chunk and the one before it. Keys serve as queries too."""
    chunk = budget // 4
    return lsh_attention(k, v, buckets=2 * k.shape[2] // chunk, chunk=chunk, rounds=2)


def performer(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """As many positive features as the budget."""
    return performer_attention(q, k, v, gaussian_features(budget, q.shape[3]))


def linformer(q: Heads, k: Heads, v: Heads, budget: int) -> Heads:
    """Means of neighbours, as many as the budget; a trained Linformer learns which to mix."""
    E = mean_pooling(k.shape[2], budget).to(k)
    return linformer_attention(q, k, v, E, E)


def linear(q: Heads, k: Heads, v: Heads, budget: int = 0) -> Heads:
    """Elu + 1; its state has the head's width, whatever the budget."""
    return linear_attention(q, k, v, causal=False)


def mean_pooling(tokens: int, count: int) -> Float[Tensor, "1 count tokens"]:
    """A projection of the length in which each row averages as many neighbouring tokens."""
    group = torch.arange(tokens) * count // tokens
    rows = nn.functional.one_hot(group, count).T.float()
    return (rows / rows.sum(1, keepdim=True))[None]


@dataclass(frozen=True)
class Form:
    """A cheap form of attention.

    Attributes:
        run: From (q, k, v, budget) to outputs.
        exact: What it stands for with any budget.
        unit: What its budget counts.
    """

    run: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    exact: Callable[[Tensor, Tensor, Tensor], Tensor] = full
    unit: str = "keys"


FORMS = {
    "window": Form(window),
    "window and global": Form(window_and_global),
    "BigBird": Form(bigbird),
    "LSH": Form(lsh, exact=lambda q, k, v: full_shared_attention(k, v)),
    "Linformer": Form(linformer, unit="mixed keys"),
    "Performer": Form(performer, unit="features"),
    "linear": Form(linear, unit="the head's width"),
}


@torch.inference_mode()
def error(name: str, q: Heads, k: Heads, v: Heads, budget: int) -> Float[Tensor, " heads"]:
    r"""$\lVert o - o^\star \rVert / \lVert o^\star \rVert$ of each head, against what is exact."""
    form = FORMS[name]
    exact = form.exact(q, k, v)
    gap = (form.run(q, k, v, budget) - exact).square().sum((0, 2, 3))
    return (gap / exact.square().sum((0, 2, 3))).sqrt()
