"""Ranks per layer under one budget, against every other possible choice."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.evaluation import parameter_count
from effnb.inference.low_rank import (
    allocate_by_loss,
    allocate_by_spectrum,
    decompose,
    decompose_svd_llm,
    ranks_of,
    svd,
    truncate,
)
from effnb.inference.low_rank.allocate import Option, choose


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the knapsack ---------------------------------------------------------------------------------


def best(options, budget):
    """Least damage of all choices within a budget, by trying them all."""
    return min(
        sum(o.damage for o in some)
        for some in itertools.product(*options.values())
        if sum(o.parameters for o in some) <= budget
    )


layer_options = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 5)), min_size=1, max_size=4).map(
    lambda some: [Option(p, d, i) for i, (p, d) in enumerate(some)]
)


@settings(max_examples=30)
@given(st.lists(layer_options, min_size=1, max_size=4), st.integers(0, 30))
def test_a_choice_fits_and_no_choice_of_its_size_is_much_better(layers, extra):
    options = {str(i): some for i, some in enumerate(layers)}
    smallest = sum(min(o.parameters for o in some) for some in layers)
    budget = smallest + extra
    found = choose(options, budget)
    assert all(found[name] in some for name, some in options.items())
    used = sum(o.parameters for o in found.values())
    damage = sum(o.damage for o in found.values())
    assert used <= budget
    # What greedy steps on the hull can miss is less than one step of one layer.
    step = max(max(o.damage for o in some) - min(o.damage for o in some) for some in layers)
    assert best(options, budget) <= damage + 1e-9
    assert damage <= best(options, budget) + step + 1e-9
    if budget >= sum(max(o.parameters for o in some) for some in layers):
        assert damage == pytest.approx(sum(min(o.damage for o in some) for some in layers))


def test_budgets_that_the_steps_use_up_are_spent_in_the_best_way():
    """Two layers with falling returns: at each such budget the choice is the best of all."""
    options = {
        "a": [Option(10 * r, (10, 6, 3, 1, 0)[r - 1], r) for r in range(1, 6)],
        "b": [Option(20 * r, (9, 4, 2, 1, 0)[r - 1], r) for r in range(1, 6)],
    }
    for budget in (30, 40, 50, 70, 80, 100, 110, 130, 150):
        found = choose(options, budget)
        assert sum(o.damage for o in found.values()) == best(options, budget)


def test_a_bad_step_on_the_way_is_no_obstacle():
    """The middle option lies above the hull: the jump over it is bought whole."""
    options = {"a": [Option(1, 10, 1), Option(2, 9.9, 2), Option(3, 0, None)],
               "b": [Option(1, 5, 1), Option(2, 4, 2)]}  # fmt: skip
    found = choose(options, 4)
    assert (found["a"].rank, found["b"].rank) == (None, 1)
    found = choose(options, 3)  # the jump does not fit: the best single steps instead
    assert (found["a"].rank, found["b"].rank) == (1, 2)


def test_a_budget_below_the_smallest_options():
    with pytest.raises(ValueError, match="the budget is 3 parameters, and the smallest options"):
        choose({"a": [Option(4, 1.0, 1)]}, 3)


# --- by spectrum ----------------------------------------------------------------------------------


def two_layers():
    """One layer of rank 3 and one of full rank, both 24 x 24."""
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False))
    model[0].weight = nn.Parameter(randn(24, 3, seed=1) @ randn(3, 24, seed=2))
    model[1].weight = nn.Parameter(randn(24, 24, seed=3))
    return model


def test_rank_goes_where_the_spectrum_is_long():
    """3 x 48 numbers make the first layer exact; the rest, 576, keep the second dense."""
    model = two_layers()
    found = allocate_by_spectrum(decompose(model), 0.63)
    assert found.ranks == {"0": 3}
    assert found.damage == pytest.approx(0, abs=1e-9)
    assert found.parameters == 3 * 48 + 576
    assert found.kept == found.parameters / (2 * 576) <= 0.63
    x = randn(5, 24)
    torch.testing.assert_close(svd(model, rank=found.ranks)(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_within_the_budget_and_better_than_uniform(llama, ids, kept, relative):
    for parts in (decompose(llama), decompose_svd_llm(llama, ids)):
        found = allocate_by_spectrum(parts, kept, relative=relative)
        new = truncate(llama, parts, rank=found.ranks)
        assert ranks_of(new) == found.ranks
        rest = parameter_count(llama) - sum(
            llama.get_submodule(name).weight.numel() for name in parts
        )
        assert parameter_count(new) == found.parameters + rest
        assert 0.95 * kept < found.kept <= kept

        def damage(name, rank, parts=parts):
            squares = parts[name].singular_values.square()
            unit = squares.sum() if relative else 1.0
            return float(squares[rank:].sum() / unit)

        mine = sum(damage(name, rank) for name, rank in found.ranks.items())
        assert found.damage == pytest.approx(mine, rel=1e-6)
        uniform = ranks_of(truncate(llama, parts, kept))
        assert mine < sum(damage(name, rank) for name, rank in uniform.items())


def test_everything_kept_is_everything_dense(llama):
    found = allocate_by_spectrum(decompose(llama), 1.0)
    assert found.ranks == {} and found.kept == 1 and found.damage == 0


def test_relative_and_absolute_differ():
    """Ten times the weights: absolute energies give that layer all, relative ones half."""
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(2)))
    W = randn(24, 24)
    model[0].weight, model[1].weight = nn.Parameter(W), nn.Parameter(10 * W)
    parts = decompose(model)
    absolute = allocate_by_spectrum(parts, 0.5, relative=False).ranks
    assert absolute["0"] < 3 and absolute.get("1", 24) > 8
    # Alike, so either both get a half or one stays whole: the same damage in both cases.
    swapped = {"0": parts["1"], "1": parts["0"]}
    one, other = (allocate_by_spectrum(p, 0.5) for p in (parts, swapped))
    assert sorted(one.ranks.values()) == sorted(other.ranks.values())


# --- by loss --------------------------------------------------------------------------------------


def test_rank_goes_where_the_loss_needs_it(llama, ids):
    """A loss that looks at one block only: the others are given up."""
    parts = decompose(llama, layers="*.mlp.*")

    def evaluate(model):
        change = 0.0
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = llama.model.layers[1].mlp.get_submodule(name).weight
            new = model.model.layers[1].mlp.get_submodule(name).weight
            change += float((new - old).detach().square().sum())
        return 3.0 + change

    calls = []
    found = allocate_by_loss(
        llama, parts, evaluate, 0.5, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert found.kept <= 0.5
    assert not any("layers.1." in name for name in found.ranks)  # dense
    assert found.damage == pytest.approx(0, abs=1e-6)


def test_by_loss_measures_the_models_loss(llama, ids):
    """The sum of the rises is what the found ranks do, one layer at a time."""
    parts = decompose(llama, layers="*.self_attn.*")

    def evaluate(model):
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    found = allocate_by_loss(llama, parts, evaluate, 0.6, candidates=(0.3, 0.6, 0.9))
    rises = [
        evaluate(truncate(llama, parts, rank={name: rank})) - evaluate(llama)
        for name, rank in found.ranks.items()
    ]
    assert found.damage == pytest.approx(sum(rises), abs=1e-5)
    assert found.kept <= 0.6


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(llama):
    parts = decompose(llama, layers="*.mlp.*")
    for kept in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"kept is {kept}"):
            allocate_by_spectrum(parts, kept)
        with pytest.raises(ValueError, match=f"kept is {kept}"):
            allocate_by_loss(llama, parts, lambda m: 0.0, kept)
    with pytest.raises(ValueError, match="no layers to allocate"):
        allocate_by_spectrum({}, 0.5)
    with pytest.raises(ValueError, match="the smallest options take"):
        allocate_by_spectrum(parts, 0.001)
    for candidates in ((), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="give parts above 0 and below 1"):
            allocate_by_loss(llama, parts, lambda m: 0.0, 0.5, candidates=candidates)
