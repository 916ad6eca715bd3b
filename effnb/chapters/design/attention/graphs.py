"""Sparsefinder on the heads of a model: predicted pairs, and how much of what is used they hold.

A curve is recall over sparsity. Two predictions are compared at one sparsity, by drawing a straight
line between the settings that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from effnb.chapters.design.attention.heads import Heads, heads_of
from effnb.design.attention import (
    Projections,
    add_window,
    bucket_graph,
    cluster_buckets,
    distance_graph,
    fit_projections,
    graph_quality,
    kmeans,
    quantization_buckets,
    window_pattern,
)
from effnb.lab import corpora, texts
from effnb.lab.models import LoadedModel

RANK, WINDOW, GLOBAL = 4, 3, 1
"""The paper's rank, and what is added to every prediction: a window and the first token."""
BUCKETS = (4, 8, 16, 32, 64)
CLUSTERS = (4, 8, 16, 32)
TOP = 2
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""For the distance rule: which share of pairs the threshold lets through."""
WINDOWS = (2, 4, 8, 16, 32, 64, 128, 256)
SETTINGS = {
    "quantization": BUCKETS,
    "clustering": CLUSTERS,
    "distance": SHARES,
    "window": WINDOWS,
    "random": SHARES,
}
TEXTS, TOKENS = 8, 128
"""Texts that projections are learned from, and tokens of each."""


@dataclass(frozen=True)
class Point:
    """One prediction judged: recall and sparsity of each text, means over the heads.

    Attributes:
        setting: Buckets, clusters, width of the window, or share let through.
        recall: Share of the pairs in use that it holds.
        sparsity: Share of the possible pairs that it leaves out.
    """

    setting: float
    recall: tuple[float, ...]
    sparsity: tuple[float, ...]


def learning_ids(loaded: LoadedModel, seed: int, tokens: int = TOKENS) -> Int[Tensor, "texts time"]:
    """What projections are learned from: texts of the training corpora."""
    ids = texts.calibration_sequences(loaded.tokenizer, seed, (TEXTS, tokens))
    return _begun(loaded, ids)


def judged_ids(loaded: LoadedModel, count: int, tokens: int = TOKENS) -> Int[Tensor, "texts time"]:
    """What they are judged on: the beginnings of chapters of a novel that nothing was learned from.

    Raises:
        ValueError: When there are fewer chapters of this length.
    """
    found = []
    for chapter in corpora.novels("test"):
        ids = loaded.tokenizer.encode(chapter.text, add_special_tokens=False, verbose=False)
        if chapter.kind == "novel" and len(ids) >= tokens:
            found.append(torch.tensor(ids[:tokens]))
    if len(found) < count:
        raise ValueError(f"only {len(found)} chapters have {tokens} tokens, {count} are wanted.")
    return _begun(loaded, torch.stack([found[i * len(found) // count] for i in range(count)]))


def _begun(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """An encoder's texts begin with its class token, which has the place of their first one."""
    start = getattr(loaded.tokenizer, "cls_token_id", None)
    if start is not None and hasattr(loaded, "encode"):
        ids = torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], 1)
    return ids


class Finder:
    """Projections of one layer's heads, and the centroids of what they project.

    Args:
        seen: The layer's heads on texts to learn from.
        rank: Width of the projections.
        seed: Of first values, triplets and centroids.
        steps: Steps of training.
    """

    def __init__(self, seen: Heads, *, rank: int = RANK, seed: int = 0, steps: int = 120) -> None:
        self.projections: Projections = fit_projections(
            seen.q, seen.k, seen.used, rank=rank, visible=seen.visible, steps=steps, seed=seed
        )
        q, k = self.projections(seen.q, seen.k)
        self.points = torch.cat([q, k], 2).transpose(0, 1).flatten(1, 2)
        self.seed = seed
        self.centroids: dict[int, Tensor] = {}
        possible = torch.cdist(q, k)[:, :, seen.visible].flatten()
        self.distances = possible[:: max(1, len(possible) // 50_000)].sort().values

    def graph(self, rule: str, setting: float, heads: Heads) -> Bool[Tensor, "batch heads q k"]:
        """The predicted pairs of other texts, window and first token among them."""
        time = heads.q.shape[2]
        if rule == "window":
            width = int(setting) if heads.causal or not setting % 2 else int(setting) + 1
            return window_pattern(
                time, min(width, 2 * time), global_tokens=GLOBAL, causal=heads.causal
            ).expand(heads.weights.shape)
        if rule == "random":
            draw = torch.Generator().manual_seed(self.seed)
            found = torch.rand(heads.weights.shape, generator=draw) < setting
        else:
            found = self._predicted(rule, setting, heads)
        return add_window(found, window=WINDOW, global_tokens=GLOBAL, causal=heads.causal)

    def _predicted(self, rule: str, setting: float, heads: Heads) -> Tensor:
        q, k = self.projections(heads.q, heads.k)
        if rule == "distance":
            threshold = float(self.distances[int(setting * (len(self.distances) - 1))])
            return distance_graph(q, k, threshold)
        if rule == "quantization":
            return bucket_graph(*quantization_buckets(q, k, int(setting)))
        count = int(setting)
        if count not in self.centroids:
            self.centroids[count] = kmeans(self.points, count, seed=self.seed)
        return bucket_graph(*cluster_buckets(q, k, self.centroids[count], top=min(TOP, count)))

    def judge(self, rule: str, setting: float, heads: Heads) -> Point:
        """Recall and sparsity on other texts."""
        found = graph_quality(self.graph(rule, setting, heads), heads.used, visible=heads.visible)
        return Point(setting, *(tuple(x.mean(1).tolist()) for x in (found.recall, found.sparsity)))

    def curve(self, rule: str, heads: Heads) -> list[Point]:
        """All settings of a rule."""
        return [self.judge(rule, setting, heads) for setting in SETTINGS[rule]]


def mean_points(layers: Sequence[Point]) -> Point:
    """The same setting in several layers, averaged text by text."""
    mean = [tuple(np.mean([getattr(p, n) for p in layers], 0)) for n in ("recall", "sparsity")]
    return Point(layers[0].setting, *mean)


def recall_at(curve: Sequence[Point], sparsity: Sequence[float]) -> list[float]:
    """The recall that a curve has at a sparsity of each text; beyond its ends, that of the end."""
    found = []
    for text, wanted in enumerate(sparsity):
        points = sorted((p.sparsity[text], p.recall[text]) for p in curve)
        # Nothing left out finds all, and all left out finds nothing.
        x, y = zip((0.0, 1.0), *points, (1.0, 0.0))
        found.append(round(float(np.interp(wanted, x, y)), 5))
    return found


def layers_of(loaded: LoadedModel, ids: Int[Tensor, "texts time"], which: Sequence[int]):
    """The heads of some layers."""
    seen = heads_of(loaded.model, ids)
    return [seen[layer] for layer in which]
