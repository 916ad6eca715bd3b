"""Black-box tuning by the library cma: the search of the method itself."""

import cma
import numpy as np
import pytest
import torch

from effnb.finetuning.black_box import black_box, cma_es


def test_it_is_their_ask_and_tell():
    """The same candidates, losses and best point as a loop written with the library alone."""
    goal = torch.tensor([[0.5, -1.0, 0.3]], dtype=torch.float64)
    ours = black_box(
        lambda p: (p - goal).square().sum(),
        torch.zeros(1, 3, dtype=torch.float64),
        std=1.0, dimension=2, budget=200, population=10, sigma=0.7, seed=3,
    )  # fmt: skip
    theirs = cma.CMAEvolutionStrategy([0.0, 0.0], 0.7, {"popsize": 10, "seed": 4, "verbose": -9})
    from effnb.finetuning.black_box import random_projection

    A = random_projection(3, 2, std=1.0, sigma=0.7, seed=3).numpy()
    best = []
    for _ in range(20):
        candidates = theirs.ask()
        losses = [float(np.square(A @ z - goal.numpy()[0]).sum()) for z in candidates]
        theirs.tell(candidates, losses)
        best.append(min([*best[-1:], *losses]))
    np.testing.assert_allclose(ours.losses, best, rtol=1e-9)
    assert ours.calls == 200


def test_a_quadratic_is_solved_to_1e_8():
    found = black_box(
        lambda p: (p - 0.3).square().sum(),
        torch.zeros(2, 3, dtype=torch.float64),
        std=1.0, dimension=6, budget=6000,
    )  # fmt: skip
    assert found.loss < 1e-8
    torch.testing.assert_close(found.prompt, torch.full((2, 3), 0.3, dtype=torch.float64),
                               atol=1e-3, rtol=0)  # fmt: skip
    assert found.calls < 6000  # the strategy said that it had converged


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds(seed):
    one, two = (cma_es(4, 1.0, 6, seed).ask() for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, cma_es(4, 1.0, 6, seed + 1).ask())
