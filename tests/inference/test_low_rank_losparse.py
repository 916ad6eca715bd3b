"""Low rank plus rows: budgets, the layer, and training that finds which rows are needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.modules import linears
from effnb.core.training import TrainingSettings
from effnb.evaluation import flops, parameter_count, stored_bytes
from effnb.inference.low_rank import (
    LowRankPlusSparse,
    cubic_schedule,
    losparse,
    low_rank_plus_sparse,
    rank_for,
    split_budget,
    svd,
    truncated_svd,
)
from effnb.inference.low_rank.losparse import _across, _RowPruner, _Splitting
from effnb.inference.quantization import QuantizedLinear, rtn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pieces(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankPlusSparse)}


# --- budgets and the layer ------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 200), st.integers(2, 200), st.floats(0.02, 0.99), st.floats(0, 1))
def test_a_budget_is_kept_and_used_up(m, n, kept, share):
    rank, rows = split_budget(kept, share, m, n)
    used, budget = rank * (m + n) + rows * n, kept * m * n
    assert rank + rows >= 1
    if rank + rows > 1:
        assert used <= budget + 1e-6
    if 0 < share < 1 and rows < m:
        assert used > budget - max(n, m + n * (rank + rows == 1))
    if share == 1:
        assert rank == rank_for(kept, m, n) and rows == 0


def test_budget_by_hand():
    """Half of 20 x 30 is 300: rank 3 takes 150, the other 150 are 5 rows of 30."""
    assert split_budget(0.5, 0.5, 20, 30) == (3, 5)
    assert split_budget(0.5, 0.0, 20, 30) == (0, 10)
    assert split_budget(0.5, 1.0, 20, 30) == (6, 0)
    assert split_budget(0.01, 0.0, 20, 30) == (0, 1)  # never nothing at all
    assert split_budget(0.01, 1.0, 20, 30) == (1, 0)


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), st.lists(st.integers(1, 3)), st.data())
def test_the_layer_computes_its_matrix(m, n, bias, batch, data):
    rank = data.draw(st.integers(0, min(m, n)))
    rows = data.draw(st.lists(st.integers(0, m - 1), unique=True, min_size=not rank))
    U, V, S = randn(m, rank), randn(rank, n, seed=1), randn(len(rows), n, seed=2)
    b = randn(m, seed=3) if bias else None
    layer = LowRankPlusSparse(U, V, torch.tensor(rows, dtype=torch.long), S, b)
    expected = U @ V
    for i, row in enumerate(rows):
        expected[row] += S[i]
    torch.testing.assert_close(layer.weight, expected)
    x = randn(*batch[:2], n, seed=4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_it_costs_what_its_parts_cost():
    model = nn.Sequential(nn.Linear(30, 20)).eval()
    new = low_rank_plus_sparse(model, 0.5)
    assert (new[0].rank, len(new[0].rows)) == (3, 5)
    assert parameter_count(new) == 3 * 50 + 5 * 30 + 20
    assert stored_bytes(new) == 4 * (3 * 50 + 5 * 30 + 20) + 4 * 5  # and where the rows belong
    x = randn(7, 30)
    assert flops(lambda: new(x)) == 2 * 7 * (3 * 50 + 5 * 30)


def test_the_rows_of_the_largest_residual_are_kept():
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    W = model[0].weight.detach()
    new = low_rank_plus_sparse(model, 0.5)[0]
    residual = W - truncated_svd(W, 3).product().float()
    norms = residual.norm(dim=1)
    assert set(new.rows.tolist()) == set(norms.topk(5).indices.tolist())
    left_out = [i for i in range(20) if i not in new.rows]
    assert float((W - new.weight.detach()).norm()) == pytest.approx(
        float(norms[left_out].norm()), rel=1e-4
    )
    torch.testing.assert_close(new.weight[new.rows.long()], W[new.rows.long()])


def test_a_row_whose_entries_cancel_is_still_a_row():
    """Rows are known by their place, not by a sum that may be 0."""
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[3.0, -3, 3, -3], [1, 1, 1, 1], [0.1, 0, 0, 0]]))
    new = low_rank_plus_sparse(nn.Sequential(layer), 0.34, low_rank_share=0.0)[0]
    assert new.rows.tolist() == [0]
    assert torch.equal(new.weight[0], layer.weight[0])


def test_ends_of_the_slider(llama):
    """All to the factors is truncated SVD."""
    new, plain = low_rank_plus_sparse(llama, 0.5, low_rank_share=1.0), svd(llama, 0.5)
    for name in linears(llama):
        torch.testing.assert_close(
            new.get_submodule(name).weight,
            plain.get_submodule(name).weight,
            rtol=1e-4,
            atol=1e-5,
        )
    assert pieces(low_rank_plus_sparse(llama, 1.0)) == {}


def test_its_parts_are_quantized_as_any_linear_layers(llama, ids):
    new = low_rank_plus_sparse(llama, 0.5)
    packed = rtn(new, 8)
    layer = packed.model.layers[0].mlp.up_proj
    assert all(isinstance(p, QuantizedLinear) for p in (layer.u, layer.v, layer.sparse))
    with torch.no_grad():
        a, b = packed(ids).logits, new(ids).logits
    assert float((a - b).norm()) < 0.1 * float(b.norm())


# --- training -------------------------------------------------------------------------------------


def test_the_cubic_schedule():
    part = [cubic_schedule(t, 100, 0.2, initial_steps=10, final_steps=30) for t in range(100)]
    assert part[:11] == [1.0] * 11
    assert part[70:] == [0.2] * 30
    assert part[40] == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert part == sorted(part, reverse=True)
    assert part[10] - part[11] > part[68] - part[69]  # fast at first


def test_training_starts_from_the_very_same_function():
    layer = nn.Linear(12, 9)
    x = randn(5, 12)
    for rank in (0, 1, 4, 9):
        torch.testing.assert_close(_Splitting(layer, rank)(x), layer(x), rtol=1e-5, atol=1e-5)
    half = _Splitting(nn.Linear(12, 9).bfloat16(), 4)  # rounding of the factors goes into S
    whole = (half.u.weight.float() @ half.v.weight.float()) + half.sparse.weight.float()
    old = nn.Linear(12, 9).bfloat16()
    again = _Splitting(old, 4)
    whole = again.u.weight.float() @ again.v.weight.float() + again.sparse.weight.float()
    torch.testing.assert_close(whole, old.weight.float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("uncertainty", [None, 0.9])
def test_importance_is_the_running_mean_of_weight_times_gradient(uncertainty):
    layer = nn.Linear(4, 3, bias=False)
    start = _Splitting(layer, 1)
    pruner = _RowPruner({"0": start}, {"0": 1}, 0.75, uncertainty, "layer")
    average = spread = torch.zeros(3, 4)
    for seed in range(3):
        x, y = randn(6, 4, seed=seed), randn(6, 3, seed=seed + 9)
        start.zero_grad()
        (start(x) - y).square().sum().backward()
        sensitivity = (start.sparse.weight * start.sparse.weight.grad).abs().detach()
        average = 0.75 * average + 0.25 * sensitivity
        if uncertainty:
            spread = uncertainty * spread + (1 - uncertainty) * (sensitivity - average).abs()
    expected = (average * spread if uncertainty else average).mean(1)
    torch.testing.assert_close(pruner.scores()["0"], expected)
    pruner.prune(lambda goal: goal)
    kept = int(expected.argmax())
    rows = start.sparse.weight.detach().abs().sum(1)
    assert rows[kept] > 0 and float(rows.sum()) == float(rows[kept])
    pruner.close()


def test_rows_of_all_layers_compete_for_the_numbers():
    """Wide rows cost more; the best come first, whichever layer they are of."""
    scores = {"a": torch.tensor([9.0, 1, 5]), "b": torch.tensor([8.0, 7, 0])}
    assert _across(scores, {"a": 10, "b": 100}, 120) == {"a": 1, "b": 1}
    assert _across(scores, {"a": 10, "b": 100}, 220) == {"a": 2, "b": 2}
    assert _across(scores, {"a": 10, "b": 100}, 5) == {"a": 0, "b": 0}


def target(rank, rows):
    """A matrix of low rank with a few rows of their own: what neither part alone can be."""
    W = randn(24, rank, seed=1) @ randn(rank, 24, seed=2)
    W[:rows] += 2 * randn(rows, 24, seed=3)
    return W


def regress(share, scope="model", **options):
    """Error after training a layer that computes the target to hold half its numbers."""
    layer = nn.Linear(24, 24, bias=False)
    layer.weight = nn.Parameter(target(3, 5))
    model = nn.Sequential(layer)

    def batches(step):
        x = randn(64, 24, seed=100 + step)
        return x, x @ target(3, 5).T

    new, result = losparse(
        model,
        batches,
        TrainingSettings(steps=80, learning_rate=0.03, schedule="linear"),
        0.5,
        low_rank_share=share,
        scope=scope,
        loss=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
        **options,
    )
    assert torch.equal(layer.weight, target(3, 5))
    assert len(result.losses) == 80
    return new[0], float((new[0].weight - target(3, 5)).norm() / target(3, 5).norm())


def test_both_together_beat_each_alone_at_equal_size():
    """Half of 576 numbers: rank 6, or 12 rows, or rank 3 and 6 rows."""
    both, error = regress(0.5)
    assert (both.rank, len(both.rows)) == (3, 6)
    assert {0, 1, 2, 3, 4} <= set(both.rows.tolist())  # the rows that have something of their own
    factors, by_factors = regress(1.0)
    rows, by_rows = regress(0.0)
    assert (factors.rank, len(factors.rows), rows.rank, len(rows.rows)) == (6, 0, 0, 12)
    assert error < 0.5 * min(by_factors, by_rows)


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"uncertainty": 0.9}])
def test_variants_learn_as_well(options):
    both, error = regress(0.5, **options)
    assert len(both.rows) == 6
    assert error < 0.1


def test_a_language_model_is_compressed_while_it_is_trained(llama, ids):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    run = TrainingSettings(steps=15, learning_rate=5e-3)
    new, _ = losparse(llama, lambda step: ids, run, 0.5)
    found = pieces(new)
    assert found.keys() == linears(llama).keys()
    whole = sum(m.weight.numel() for m in linears(llama).values())
    used = sum(p.numel() for m in found.values() for n, p in m.named_parameters() if n != "bias")
    assert 0.45 * whole < used <= 0.5 * whole
    assert len({len(m.rows) / m.out_size for m in found.values()}) > 3  # layers differ
    plain = low_rank_plus_sparse(llama, 0.5)
    with torch.no_grad():
        loss, other = (float(m(ids, labels=ids).loss) for m in (new, plain))
    assert loss < other
    assert new.lm_head.weight is llama.lm_head.weight
    assert all(p.requires_grad for p in new.parameters())
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])


def test_no_layer_vanishes(llama, ids):
    """With rows alone, every layer keeps at least its best one."""
    run = TrainingSettings(steps=4, learning_rate=1e-3)
    new, _ = losparse(llama, lambda step: ids, run, 0.03, low_rank_share=0.0)
    assert min(len(m.rows) for m in pieces(new).values()) >= 1
    assert torch.isfinite(new(ids).logits).all()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kept": 0.0}, "kept is 0.0"),
        ({"kept": 1.2}, "kept is 1.2"),
        ({"kept": 0.5, "low_rank_share": -0.1}, "low_rank_share is -0.1; it must lie between"),
        ({"kept": 0.5, "layers": "nothing"}, "no Linear fits"),
    ],
)
def test_bad_settings_are_one_sentence(llama, ids, options, sentence):
    run = TrainingSettings(steps=10)
    with pytest.raises(ValueError, match=sentence):
        low_rank_plus_sparse(llama, **options)
    with pytest.raises(ValueError, match=sentence):
        losparse(llama, lambda step: ids, run, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kept": 1.0}, "nothing to remove"),
        ({"scope": "block"}, "scope is 'block'"),
        ({"beta": 1.0}, r"beta is 1.0; it must lie in \[0, 1\)"),
        ({"uncertainty": -0.5}, "uncertainty is -0.5"),
        ({"initial_steps": 0}, "initial_steps is 0"),
        ({"initial_steps": 6, "final_steps": 5}, "at most the 10 steps"),
    ],
)
def test_bad_training_is_one_sentence(llama, ids, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        losparse(llama, lambda step: ids, TrainingSettings(steps=10), **({"kept": 0.5} | options))


def test_quantized_and_broken_models_are_refused(llama):
    with pytest.raises(ValueError, match="quantized already; factorise the original"):
        low_rank_plus_sparse(rtn(llama, 8), 0.5)
    with pytest.raises(ValueError, match="factorised already"):
        low_rank_plus_sparse(svd(llama, 0.5), 0.5)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"up_proj: the weight has 1 entries"):
        low_rank_plus_sparse(llama, 0.5)
