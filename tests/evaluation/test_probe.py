"""Linear probes: their minimum, what they cannot do, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from effnb.evaluation import linear_probe


def clusters(count=60, dim=5, classes=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 2 * torch.randn(classes, dim, generator=draws)
    return centres[labels] + torch.randn(count, dim, generator=draws), labels


def test_the_minimum_has_no_slope():
    features, labels = clusters()
    probe = linear_probe(features, labels, c=0.7)
    x = (features.double() - probe.mean) / probe.scale
    p = probe.scores(features).softmax(1)
    slope = (p - torch.nn.functional.one_hot(labels, 3)).T @ x + probe.weight / 0.7
    assert slope.abs().max() < 1e-3
    assert (p - torch.nn.functional.one_hot(labels, 3)).sum(0).abs().max() < 1e-3


def test_size_and_place_of_the_features_do_not_matter():
    features, labels = clusters()
    features[:, 0] = 4.0  # constant: says nothing, and is no division by zero
    one = linear_probe(features, labels)
    other = linear_probe(100 * features - 7, labels)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    torch.testing.assert_close(
        one.scores(features), other.scores(100 * features - 7), atol=1e-3, rtol=1e-3
    )


def test_what_a_line_divides_and_what_it_does_not():
    corners = torch.tensor([[0.0, 0.0], [0, 1], [1, 0], [1, 1]]).repeat(10, 1)
    either, exactly_one = (corners.sum(1) > 0).long(), (corners.sum(1) == 1).long()
    assert linear_probe(corners, either, c=100.0).correct(corners, either).all()
    unlearnt = linear_probe(corners, exactly_one, c=100.0)
    assert unlearnt.loss == pytest.approx(40 * math.log(2), rel=1e-3)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda f, y: linear_probe(f, y[:-1]), "do not pair up"),
        (lambda f, y: linear_probe(f, y, c=0.0), "above 0"),
        (lambda f, y: linear_probe(f, torch.zeros_like(y)), "at least two classes"),
        (lambda f, y: linear_probe(f / 0, y), "NaN or infinite"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(attempt, said):
    with pytest.raises(ValueError, match=said):
        attempt(*clusters())
