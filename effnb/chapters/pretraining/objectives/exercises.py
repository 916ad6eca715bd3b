"""The exercises of the chapter on objectives: references, cases, and mistakes with diagnoses."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from effnb.lab import Exercise


def prefix_mask(n: int, P: int) -> Bool[Tensor, "n n"]:
    r"""$M_{ij} = 1$ if $j \le \max(i, P - 1)$."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return j <= torch.maximum(i, torch.tensor(P - 1))


def _grid(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


def _one_too_far(n, P):
    i, j = _grid(n)
    return (j <= i) | (j <= P)


def _both_must(n, P):
    i, j = _grid(n)
    return (j <= i) & (j < P)


def _turned(n, P):
    return prefix_mask(n, P).T


masking = Exercise(
    "What each position may see",
    minutes=10,
    difficulty="easy",
    reference=prefix_mask,
    cases=[(5, 3), (6, 1), (4, 4), (7, 5)],
    wrong={
        "The prefix has P positions, 0 to P - 1: you let all see one more": _one_too_far,
        "A position sees the prefix or what came before: one of them is enough": _both_must,
        "Row i says what position i sees; you have rows and columns exchanged": _turned,
        "This is the causal mask: the prefix does not look ahead yet": (
            lambda n, P: prefix_mask(n, 1)
        ),
        "No position sees the future beyond the prefix": (
            lambda n, P: torch.ones(n, n, dtype=torch.bool)
        ),
    },
)


def targets_of(ids: list[int], noise: list[bool], sentinel: int, end: int) -> list[int]:
    """Sentinel and span in turn, counting down, and the end mark."""
    found, before = [], False
    for token, gone in zip(ids, noise, strict=True):
        if gone and not before:
            found.append(sentinel)
            sentinel -= 1
        if gone:
            found.append(token)
        before = gone
    return [*found, end]


def _with_last_sentinel(ids, noise, sentinel, end):
    found = targets_of(ids, noise, sentinel, end)
    spans = sum(a and not b for a, b in zip(noise, [False, *noise], strict=False))
    return [*found[:-1], sentinel - spans, end]


def _counting_up(ids, noise, sentinel, end):
    top = sentinel - 100
    return [2 * sentinel - t if t > top else t for t in targets_of(ids, noise, sentinel, end)]


def _one_each(ids, noise, sentinel, end):
    found = []
    for token, gone in zip(ids, noise, strict=True):
        if gone:
            found += [sentinel, token]
            sentinel -= 1
    return [*found, end]


def _same_mark(ids, noise, sentinel, end):
    top = sentinel - 100
    return [sentinel if t > top else t for t in targets_of(ids, noise, sentinel, end)]


def _inputs(ids, noise, sentinel, end):
    found, before = [], False
    for token, gone in zip(ids, noise, strict=True):
        if gone and not before:
            found.append(sentinel)
            sentinel -= 1
        if not gone:
            found.append(token)
        before = gone
    return [*found, end]


_text = list(range(10, 20))
_noise = [bool(int(x)) for x in "0011000111"]

spans = Exercise(
    "The targets of span corruption",
    minutes=15,
    difficulty="medium",
    reference=targets_of,
    cases=[
        (_text, _noise, 999, 1),
        (_text, [bool(int(x)) for x in "0101010101"], 999, 1),
        ([5, 6, 7], [False, True, True], 400, 0),
    ],
    wrong={
        "T5's code writes no sentinel after the last span": _with_last_sentinel,
        "Sentinels count down from the end of the vocabulary": _counting_up,
        "One sentinel stands for a whole span, not for each token": _one_each,
        "Each span has a sentinel of its own, or spans could not be told apart": _same_mark,
        "The end mark is missing": lambda *given: targets_of(*given)[:-1],
        "These are the inputs: the targets hold what was cut out": _inputs,
    },
)


def spend(C: float) -> tuple[float, float]:
    r"""$N = \sqrt{C / 120}$, $D = 20 N$."""
    N = math.sqrt(C / 120)
    return N, 20 * N


rule = Exercise(
    "Spend a budget by Chinchilla's rule",
    minutes=5,
    difficulty="easy",
    reference=spend,
    cases=[(1.2e14,), (4.8e13,), (5.88e23,)],
    wrong={
        "Training takes 6 operations for each parameter and token, not 2": (
            lambda C: (math.sqrt(C / 40), 20 * math.sqrt(C / 40))
        ),
        "Both are there, in the wrong order: parameters first": lambda C: spend(C)[::-1],
        "This gives each parameter one token; the rule gives it 20": (
            lambda C: (math.sqrt(C / 6), math.sqrt(C / 6))
        ),
        "N D is the compute divided by 6: take the root of C / (6 · 20)": (
            lambda C: (C / 120, C / 6)
        ),
    },
    atol=1e-3,
)
