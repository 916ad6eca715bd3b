"""Black-box tuning: asks for losses only, ranks fairly, keeps the best; with a strategy of ours."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.finetuning.black_box import black_box, cma_es, random_projection


class Evolution:
    """A plain (mu, lambda) evolution strategy with a falling step: what `black_box` needs, no more.

    The search of the method is CMA-ES; tests/reference runs it.
    """

    def __init__(self, dimension, sigma, population, seed):
        self.random = np.random.default_rng(seed)
        self.mean, self.sigma, self.population = np.zeros(dimension), sigma, population
        self.told = []

    def ask(self):
        noise = self.random.standard_normal((self.population, len(self.mean)))
        return list(self.mean + self.sigma * noise)

    def tell(self, candidates, losses):
        self.told.append(list(losses))
        best = np.argsort(losses)[: max(1, self.population // 4)]
        self.mean = np.mean([candidates[i] for i in best], axis=0)
        self.sigma *= 0.97


def search(loss, initial=None, **settings):
    options = dict(std=1.0, dimension=4, budget=1200, population=20, strategy=Evolution)
    initial = torch.zeros(3, 2, dtype=torch.float64) if initial is None else initial
    return black_box(loss, initial, **(options | settings))


def test_it_finds_the_minimum_in_the_subspace():
    goal = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = search(lambda p: (p - goal).square().sum())
    A = random_projection(6, 4, std=1.0)
    z = torch.linalg.lstsq(A, goal.flatten()[:, None]).solution[:, 0]
    least = float((A @ z - goal.flatten()).square().sum())
    assert least <= found.loss < least + 0.02
    torch.testing.assert_close(found.prompt.flatten(), A @ found.z)
    assert found.calls == 1200 and len(found.losses) == 60
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert found.losses[-1] == found.loss
    again = search(lambda p: (p - goal).square().sum(), budget=60)
    assert again.losses == found.losses[:3]
    assert search(lambda p: (p - goal).square().sum(), budget=60, seed=1).losses != again.losses


@examples(max_examples=10)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 7), st.integers(1, 4))
def test_shapes_and_budget(tokens, dim, population, generations):
    calls = []

    def loss(prompt):
        calls.append(prompt.shape)
        return prompt.square().mean()

    initial = torch.randn(tokens, dim)
    budget = population * generations + population - 1
    found = search(loss, initial, dimension=1, population=population, budget=budget)
    assert set(calls) == {(tokens, dim)} and len(calls) == found.calls == population * generations
    assert found.prompt.shape == initial.shape and found.prompt.dtype == initial.dtype
    assert found.loss == min(float(x) for x in found.losses)
    torch.testing.assert_close(float(loss(found.prompt)), found.loss)


def test_no_gradient_is_taken_and_nothing_is_changed():
    layer = torch.nn.Linear(2, 1).double()
    initial = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)

    def loss(prompt):
        assert not torch.is_grad_enabled() and not prompt.requires_grad
        return layer(prompt).square().sum()

    found = search(loss, initial, budget=40)
    assert layer.weight.grad is None and initial.grad is None and not initial.any()
    assert not found.prompt.requires_grad


def test_all_candidates_of_a_generation_see_the_same_noise():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    noise = []

    def loss(prompt):
        noise.append(float(torch.rand(())))
        return prompt.square().sum()

    search(loss, budget=60)
    rows = [set(noise[i : i + 20]) for i in (0, 20, 40)]
    assert all(len(row) == 1 for row in rows) and len(set.union(*rows)) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


def test_prompts_of_the_first_population_are_as_large_as_words():
    A = random_projection(2000, 50, std=0.02, alpha=1.5, sigma=0.7)
    z = 0.7 * torch.randn(50, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float((A @ z).std()) == pytest.approx(1.5 * 0.02, rel=0.05)


def test_a_strategy_that_has_converged_is_left():
    class Done(Evolution):
        def stop(self):
            return {"tolfun": 1} if len(self.told) == 2 else {}

    assert search(lambda p: p.square().sum(), strategy=Done).calls == 40


def test_a_prompt_of_a_model_is_tuned(llama, ids):
    """The loss of a language model with a soft prompt in front, by forward passes alone."""
    table = llama.get_input_embeddings().weight.detach()
    words = table[ids[:2, :6]]

    def loss(prompt):
        inputs = torch.cat([prompt.expand(2, -1, -1), words], 1)
        logits = llama(inputs_embeds=inputs).logits[:, len(prompt) - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:2, :6].flatten())

    initial = table[ids[2, :3]]
    with torch.no_grad():
        before = float(loss(initial))
    found = search(loss, initial, std=float(table.std()), dimension=10, budget=200)
    assert found.loss < before


def test_without_cma_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match="package cma, which is not installed: pip install cma"):
        cma_es(3, 1.0, 4, 0)


def test_bad_input_is_one_sentence():
    for settings, message in [
        ({"dimension": 0}, "dimension is 0; a prompt of 6 numbers allows 1 to that"),
        ({"dimension": 7}, "dimension is 7"),
        ({"population": 1}, "population is 1; it must be at least 2"),
        ({"budget": 19}, "budget is 19 calls; one generation takes 20"),
        ({"std": 0.0}, "std is 0.0; it must be above 0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"initial": torch.full((3, 2), torch.nan)}, "the initial prompt has 6 entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(lambda p: p.sum(), **settings)
    with pytest.raises(ValueError, match="the loss of candidate 1 is nan, not a finite number"):
        search(lambda p: p.sum() * torch.nan)
