"""The subject of a quality panel is the bench's model, with the panel's look at it."""

import pytest
import torch

from effnb.lab.bench import Bench, file_bytes
from effnb.lab.subjects import subject


@pytest.fixture(scope="module")
def bench():
    return Bench("mini-300k", windows=7, questions=30)


def test_a_look_is_the_panels_and_small(bench):
    made = subject(bench)
    found, whole = made.look(bench.model), bench.look(bench.model, panel=True)
    assert made.model is bench.model
    assert (found.losses, found.correct) == (whole.window_nats_per_token, whole.correct)
    assert len(found.losses) == len(made.documents) < len(bench.windows)
    assert found.bytes == file_bytes(bench.model)
    assert found.text.startswith(bench.prompt)


def test_what_is_evaluated_and_what_is_weighed_are_two_things(bench):
    other = torch.nn.Linear(1, 1)
    made = subject(bench, evaluated=lambda _: bench.model, size=lambda model: id(model))
    assert made.look(other).bytes == id(other)
    assert made.look(other).losses == subject(bench).look(bench.model).losses
