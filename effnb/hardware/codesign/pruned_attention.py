r"""The attention of pruned models: SpAtten's and Energon's choices, layer by layer, with a record.

`pruned_models` puts these in the place of a model's own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effnb.hardware.codesign.attention_pruning import (
    evict,
    filter_keys,
    head_importance,
    keep_top,
    local_values,
    probabilities,
    progressive,
    schedule,
    token_importance,
    top_recall,
)

RANDOM_POSITIONS = 8192
"""Positions for which a random choice is drawn, so that a longer text keeps its beginning's."""


@dataclass
class PruningRecord:
    """What the attention of a pruned model has done since its record was last cleared.

    Attributes:
        pairs: Pairs of query, key and head that the original would compute.
        pairs_kept: Pairs that were computed at full precision.
        values_kept: Pairs whose value was read.
        queries: Rows of attention: queries times heads, not counting pruned heads.
        all_queries: Rows that the original would compute.
        refetched: Rows for which the low bits were fetched (progressive quantization).
        round_pairs: Pairs that were multiplied in each of Energon's rounds.
        recall_sum: Shares of the true top keys that were among those kept, summed over rows.
        recall_rows: Rows that `recall_sum` is summed over.
    """

    pairs: int = 0
    pairs_kept: int = 0
    values_kept: int = 0
    queries: int = 0
    all_queries: int = 0
    refetched: int = 0
    round_pairs: list[int] = field(default_factory=list)
    recall_sum: float = 0.0
    recall_rows: int = 0

    @property
    def pair_share(self) -> float:
        """Of all pairs, those computed at full precision."""
        return self.pairs_kept / self.pairs if self.pairs else 1.0

    @property
    def value_share(self) -> float:
        """Of all pairs, those whose value was read."""
        return self.values_kept / self.pairs if self.pairs else 1.0

    @property
    def head_share(self) -> float:
        """Of all rows of attention, those of heads that were not pruned."""
        return self.queries / self.all_queries if self.all_queries else 1.0

    @property
    def refetch_share(self) -> float:
        """Of the computed rows, those that fetched the low bits."""
        return self.refetched / self.queries if self.queries else 0.0

    @property
    def round_shares(self) -> list[float]:
        """Of all pairs, those multiplied in each of Energon's rounds."""
        return [count / self.pairs if self.pairs else 1.0 for count in self.round_pairs]

    @property
    def recall(self) -> float:
        """Of each query's true top keys, the share that was kept, on average."""
        return self.recall_sum / self.recall_rows if self.recall_rows else 1.0


class Pruner:
    """What is common to both methods: which pairs count, and the record."""

    def __init__(self, layers: int, top_k: int, choose: str, seed: int) -> None:
        self.layers, self.top_k, self.choose, self.seed = layers, top_k, choose, seed
        self.record = PruningRecord()
        self.kept: list[Tensor] = []

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Outputs and probabilities of one layer; q, k and v are (batch, heads, tokens, dim)."""
        raise NotImplementedError

    def _random(self, shape: Sequence[int], device: torch.device, salt: int) -> Tensor:
        """Numbers that depend on seed, layer and place only, not on the length of the text."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        width = max(RANDOM_POSITIONS, shape[-1])
        return torch.rand(width, generator=generator)[: shape[-1]].to(device).expand(shape)

    def _count(
        self, scores: Tensor, selected: Tensor, visible: Tensor, rows: Tensor, real: Tensor
    ) -> None:
        """Add one layer: its pairs in `rows`, of those that the original computes in `real`."""
        record = self.record
        record.pairs += int((visible.sum(-1) * real).sum())
        record.pairs_kept += int((selected.sum(-1) * rows).sum())
        record.queries += int(rows.sum())
        record.all_queries += int(real.sum())
        recall, counts = top_recall(scores, selected, visible, self.top_k)
        counts = counts & real
        record.recall_sum += float((recall * rows)[counts].sum())
        record.recall_rows += int(counts.sum())


class SpAtten(Pruner):
    """Cascade pruning of tokens and heads, local value pruning, progressive quantization."""

    def __init__(self, settings: dict[str, Any], causal: bool, **common: Any) -> None:
        super().__init__(**common)
        self.causal = causal
        self.token_shares = schedule(self.layers, settings["token_keep"], settings["first_layer"])
        self.head_shares = schedule(self.layers, settings["head_keep"], settings["first_layer"])
        self.cascades = min(self.token_shares + self.head_shares) < 1
        self.value_keep = settings["value_keep"]
        self.bits = settings["bits"]
        self.average = settings["average"]
        self._forget()

    def _forget(self) -> None:
        """A new text begins."""
        # What a cache of keys and values needs beside it: per layer, what came before this step.
        self.past: dict[tuple[str, int], Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Attend with what the cascade has left, and decide what the next layer gets."""
        batch, heads, steps, _ = q.shape
        keys = k.shape[2]
        newest = torch.arange(keys - steps, keys, device=q.device)
        if layer == 0:
            self._begin(batch, heads, steps, keys, visible, newest)
        # Rows and keys that the cascade has left, (batch, heads, queries[, keys]).
        asks = self.real if self.causal else self.real & self.alive[:, 0]
        rows = asks[:, None] & self.heads.transpose(1, 2)
        mask = visible & self.alive[:, None]
        scores = q @ k.transpose(-1, -2) * scaling
        if self.bits is None:
            attention = probabilities(scores, mask)
        else:
            msb, lsb, threshold = self.bits
            attention, fetched = progressive(
                q, k, mask, msb_bits=msb, lsb_bits=lsb, threshold=threshold, scaling=scaling
            )
            self.record.refetched += int((fetched & rows).sum())
        read = attention
        if self.value_keep < 1:
            chosen = local_values(attention, self.value_keep, mask.expand_as(attention))
            read = attention * chosen
            self.record.values_kept += int((chosen.sum(-1) * rows).sum())
        else:
            self.record.values_kept += int((mask.sum(-1) * rows).sum())
        out = (read @ v) * self.heads.transpose(1, 2)[..., None]
        self._count(scores, mask, visible, rows, self.real[:, None].expand(batch, heads, steps))
        if layer + 1 < self.layers:
            attention_left = attention * self.heads.transpose(1, 2)[..., None]
            self._cascade(layer, attention_left, out, asks, visible, newest)
        return out, attention

    def _begin(
        self, batch: int, heads: int, steps: int, keys: int, visible: Tensor, newest: Tensor
    ) -> None:
        if steps == keys:
            self._forget()
        elif not self.causal or (self.past and self.past["tokens", 0].shape[1] != keys - steps):
            raise ValueError(
                "the model has been asked about another text since this cache was filled; begin "
                "again with an empty cache."
            )
        elif not self.past and self.layers > 1:
            raise ValueError("the cache was filled by another model; begin with an empty cache.")
        any_key = visible.any(1)
        if self.causal and self.cascades and (any_key[:, :-1] & ~any_key[:, 1:]).any():
            raise ValueError(
                "a token does not see what the one before it saw; cascade pruning reads one text "
                "after another, with neither sliding windows nor continuations side by side."
            )
        self.real = any_key.gather(-1, newest.expand(batch, steps)[..., None])[..., 0]
        if not self.causal:
            self.real = any_key.any(1)
        rows = steps if self.causal else 1
        self.alive = any_key if self.causal else self.real[:, None]
        self.heads = torch.ones(batch, rows, heads, dtype=torch.bool, device=visible.device)
        self.tokens_so_far = torch.zeros(batch, rows, keys, device=visible.device)
        self.heads_so_far = torch.zeros(batch, rows, heads, device=visible.device)
        self.kept = [self.alive[:, -1]]

    def _cascade(
        self,
        layer: int,
        attention: Tensor,
        out: Tensor,
        asks: Tensor,
        visible: Tensor,
        newest: Tensor,
    ) -> None:
        """Decide what the next layer still works on."""
        received = token_importance(attention, asks, causal=self.causal)
        size = head_importance(out, asks, causal=self.causal)
        if self.causal:
            received = self._continue("tokens", layer, received)
            size = self._continue("heads", layer, size)
        self.tokens_so_far = self.tokens_so_far + received
        self.heads_so_far = self.heads_so_far + size
        importance = self.tokens_so_far
        if self.average and self.causal:
            keys = torch.arange(importance.shape[-1], device=importance.device)
            importance = importance / (newest[:, None] - keys + 1).clamp(min=1)
        heads = self.heads_so_far
        if self.choose == "random":
            importance = self._random(importance.shape, importance.device, salt=0)
            heads = self._random(heads.shape, heads.device, salt=1)
        present = visible.any(1) if self.causal else self.real[:, None]
        count = (self.token_shares[layer + 1] * present.sum(-1)).ceil().long()
        if self.causal:
            before = self.past.get(("alive", layer))
            if before is not None:
                before = nn.functional.pad(before, (0, len(newest)))
            self.alive = evict(importance, count, self.alive, newest, before)
            self.past["alive", layer] = self.alive[:, -1]
        else:
            first = torch.zeros_like(self.real[:, None])
            first[torch.arange(len(first)), 0, self.real.int().argmax(-1)] = True
            self.alive = keep_top(importance, count, self.alive, first)
        wanted = self.head_shares[layer + 1] * heads.shape[-1]
        self.heads = keep_top(heads, max(1, -int(-wanted // 1)), self.heads)
        self.kept.append(self.alive[:, -1])

    def _continue(self, kind: str, layer: int, sums: Tensor) -> Tensor:
        """Add what the steps before these received, and remember the new total."""
        before = self.past.get((kind, layer))
        if before is not None:
            before = nn.functional.pad(before, (0, sums.shape[-1] - before.shape[-1]))
            sums = sums + before[:, None]
        self.past[kind, layer] = sums[:, -1]
        return sums


class Energon(Pruner):
    """Filtering in rounds of few bits, full precision for the survivors."""

    def __init__(self, rounds: tuple[int, ...], alpha: float, **common: Any) -> None:
        super().__init__(**common)
        self.rounds, self.alpha = rounds, alpha
        self.record = PruningRecord(round_pairs=[0] * len(rounds))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Filter, then attend to the survivors."""
        batch, heads, steps, _ = q.shape
        newest = torch.arange(k.shape[2] - steps, k.shape[2], device=q.device)
        any_key = visible.any(1)
        diagonal = any_key.gather(-1, newest.expand(batch, steps)[..., None])[..., 0]
        real = diagonal[:, None].expand(batch, heads, steps)
        left = filter_keys(q, k, visible, rounds=self.rounds, alpha=self.alpha)
        for number, pairs in enumerate((visible, *left[:-1])):
            self.record.round_pairs[number] += int((pairs.sum(-1) * real).sum())
        chosen = left[-1]
        if self.choose == "random":
            order = self._random(chosen.shape, q.device, salt=layer)
            chosen = keep_top(order, chosen.sum(-1), visible.expand_as(chosen))
        own = torch.zeros_like(visible).scatter(
            -1, newest.view(1, 1, -1, 1).expand(*visible.shape[:-1], 1), True
        )
        chosen = chosen | (own & visible)  # a token's own key is at hand anyway
        scores = q @ k.transpose(-1, -2) * scaling
        attention = probabilities(scores, chosen)
        self.record.values_kept += int((chosen.sum(-1) * real).sum())
        self._count(scores, chosen, visible, real, real)
        return attention @ v, attention
