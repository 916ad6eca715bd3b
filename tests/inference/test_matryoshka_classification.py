"""Heads on prefixes, tied and not, and stopping early."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.inference import matryoshka as mat


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tied_heads_are_one_weight_cut():
    torch.manual_seed(0)
    heads = mat.MatryoshkaHeads(8, 3, (2, 4, 8), tied=True)
    z = randn(5, 8)
    W, b = heads.heads[0].weight, heads.heads[0].bias
    for m, logits in heads(z).items():
        torch.testing.assert_close(logits, z[:, :m] @ W[:, :m].T + b)
    free = mat.MatryoshkaHeads(8, 3, (2, 4, 8))
    numbers = [sum(p.numel() for p in h.parameters()) for h in (heads, free)]
    assert numbers == [8 * 3 + 3, (2 + 4 + 8) * 3 + 3 * 3]
    assert list(free(z)) == [2, 4, 8]


def test_the_loss_is_a_weighted_sum():
    logits = {2: randn(6, 3), 4: randn(6, 3, seed=1)}
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    parts = [nn.functional.cross_entropy(found, y) for found in logits.values()]
    torch.testing.assert_close(mat.matryoshka_cross_entropy(logits, y), parts[0] + parts[1])
    torch.testing.assert_close(mat.matryoshka_cross_entropy(logits, y, (0, 2)), 2 * parts[1])


def sure(*rows):
    """Logits whose softmax is given."""
    return torch.tensor(rows).log()


def test_it_stops_at_the_first_prefix_that_is_sure():
    logits = {
        1: sure([0.9, 0.1], [0.6, 0.4], [0.6, 0.4]),
        2: sure([0.1, 0.9], [0.2, 0.8], [0.3, 0.7]),
        4: sure([0.1, 0.9], [0.1, 0.9], [0.9, 0.1]),
    }
    found = mat.adaptive_classification(logits, (0.85, 0.75))
    assert found.labels.tolist() == [0, 1, 0]
    assert found.dims.tolist() == [1, 2, 4]
    assert found.mean_dims == pytest.approx(7 / 3)
    every = mat.adaptive_classification(logits, (1.0, 1.0))
    assert every.dims.tolist() == [4, 4, 4]
    assert mat.adaptive_classification(logits, (0.0, 0.0)).dims.tolist() == [1, 1, 1]


@given(seed=st.integers(0, 10_000), tolerance=st.sampled_from([0.0, 0.05]))
@settings(max_examples=40, deadline=None)
def test_tuned_thresholds_cost_no_accuracy_where_they_were_tuned(seed, tolerance):
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (60,), generator=draws)
    logits = {
        m: torch.randn(60, 4, generator=draws) + m * nn.functional.one_hot(y, 4) for m in (1, 2, 3)
    }
    found = mat.adaptive_classification(logits, mat.tune_thresholds(logits, y, tolerance=tolerance))
    accuracy = (found.labels == y).float().mean()
    last = (logits[3].argmax(1) == y).float().mean()
    assert accuracy >= last - 2 * tolerance - 1e-6
    assert found.mean_dims <= 3


REFUSED = {
    "do not nest": lambda: mat.MatryoshkaHeads(8, 3, (4, 2)),
    "1 classes": lambda: mat.MatryoshkaHeads(8, 1, (2, 4)),
    "1 weights for 2": lambda: mat.matryoshka_cross_entropy(
        {1: randn(2, 2), 2: randn(2, 2)}, torch.tensor([0, 1]), (1,)
    ),
    "for each but the last": lambda: mat.adaptive_classification({1: randn(2, 2)}, (0.5,)),
    r"in \[0, 1\]": lambda: mat.adaptive_classification({1: randn(2, 2), 2: randn(2, 2)}, (1.5,)),
    "no texts": lambda: mat.tune_thresholds({1: randn(0, 2)}, torch.zeros(0, dtype=torch.long)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()
