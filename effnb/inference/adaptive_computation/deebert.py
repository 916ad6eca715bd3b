r"""DeeBERT: put off-ramps on a fine-tuned encoder without touching it.

First the encoder and its last classifier are fine-tuned as usual. Then both are frozen, and the
off-ramps of the layers before are trained together, on the plain sum of their cross-entropies
(the last classifier excluded). An input leaves at the first off-ramp whose entropy in nats is below
the threshold, see `branchynet.by_entropy`.

Xin, Tang, Lee, Yu, Lin, "DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference", 2020,
arXiv 2004.12993; the order of the two stages follows its released code.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.inference.adaptive_computation.classifiers import exit_losses


def ramp_loss(
    logits: Float[Tensor, "exits items classes"], labels: Int[Tensor, " items"]
) -> Float[Tensor, ""]:
    r"""$\sum_{j=1}^{L-1} \mathcal L_j$: stage two, without the last classifier."""
    return sum(exit_losses(logits[:-1], labels))


def train_heads(
    heads: nn.ModuleList,
    pooled: Float[Tensor, "exits items dim"],
    labels: Int[Tensor, " items"],
    *,
    steps: int = 300,
    batch: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> nn.ModuleList:
    """Train heads on what a frozen encoder gives them; their inputs are computed only once.

    With a frozen encoder the heads share nothing, so the sum of their losses trains each alone. All
    of them are trained here, the last one included: it takes the part of stage one's classifier.

    Args:
        heads: One for each exit; they are copied, not changed.
        pooled: What each head reads.
        labels: Classes.
        steps: Optimizer steps (AdamW).
        batch: Items of a step.
        learning_rate: Its rate.
        seed: Of the batches.

    Raises:
        ValueError: When there is nothing to train on, or a head is missing.
    """
    if len(heads) != len(pooled) or not len(labels) or len(labels) != pooled.shape[1]:
        raise ValueError(
            f"{len(heads)} heads for {len(pooled)} exits, {len(labels)} labels for "
            f"{pooled.shape[1]} items; give a head for each exit and a label for each item."
        )
    new = copy.deepcopy(heads).requires_grad_(True)
    optimizer = torch.optim.AdamW(new.parameters(), lr=learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(labels), (min(batch, len(labels)),), generator=generator)
            logits = torch.stack([head(x[rows]) for head, x in zip(new, pooled)])
            loss = sum(exit_losses(logits, labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return new.requires_grad_(False).eval()
