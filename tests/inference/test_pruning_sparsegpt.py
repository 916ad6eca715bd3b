"""SparseGPT and Optimal Brain Surgeon: updates that are known exactly."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.core.calibration import Hessian
from effnb.core.hessian import damp_hessian, inverse_cholesky
from effnb.core.modules import linears
from effnb.inference.pruning import (
    follows,
    keep_mask,
    least_squares_weight,
    magnitude_mask,
    masks_of,
    obd_saliency,
    obs,
    obs_saliency,
    obs_step,
    obs_weight,
    sparsegpt,
    sparsegpt_weight,
    wanda_mask,
)
from effnb.inference.quantization import QuantizedLinear
from effnb.inference.quantization.gptq import gptq_weight


def problem(rows=6, columns=16, tokens=60, seed=0, dtype=torch.float64):
    """A weight, and the Hessian of correlated inputs with two large channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=dtype) @ mixing
    inputs[:, :2] *= 5
    return weight, 2 / tokens * inputs.T @ inputs


def damage(weight, new, hessian, damping=0.0):
    change = weight - new
    return float((change @ damp_hessian(hessian, damping)[0].to(change) * change).sum())


# --- SparseGPT ------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    pattern=st.sampled_from(["layer", "row", "2:4", "1:4"]),
    block=st.sampled_from([1, 3, 4, 7, 128]),
    bits=st.sampled_from([None, 3, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(max_examples=30)
def test_the_errors_add_up_to_the_damage(rows, groups, pattern, block, bits, symmetric, seed):
    """The exact invariant: sum |e_i|^2 = tr(dW H dW^T), whatever was pruned and rounded."""
    weight, hessian = problem(rows, 4 * groups, seed=seed)
    sparsity = None if ":" in pattern else 0.4
    found = sparsegpt_weight(
        weight, hessian, sparsity, pattern=pattern, block_size=block, bits=bits, symmetric=symmetric
    )
    assert found.error == pytest.approx(damage(weight, found.weight, hessian, 0.01), rel=1e-9)
    assert bool((found.weight[~found.mask] == 0).all())
    if pattern == "layer":
        assert int((~found.mask).sum()) == round(0.4 * weight.numel())
    elif pattern == "row":
        assert set((~found.mask).sum(1).tolist()) == {round(0.4 * weight.shape[1])}
    else:
        assert follows(found.mask, pattern)
    if bits:
        assert torch.equal(found.tensor.dequantize(torch.float64), found.weight)


def by_definition(weight, hessian, mask, damping=0.01):
    """OBS column by column, each inverse computed afresh from the columns that are left."""
    damped = damp_hessian(hessian, damping)[0]
    w = weight.clone()
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(damped[i:, i:])
        error = torch.where(mask[:, i], 0, w[:, i])
        w[:, i:] -= torch.outer(error / inverse[0, 0], inverse[0])
        w[:, i] = torch.where(mask[:, i], w[:, i], 0)
    return w


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4:8"])
@pytest.mark.parametrize("block", [5, 8, 128])
def test_the_walk_is_optimal_brain_surgeon(pattern, block):
    weight, hessian = problem()
    found = sparsegpt_weight(
        weight, hessian, None if ":" in pattern else 0.5, pattern=pattern, block_size=block
    )
    torch.testing.assert_close(found.weight, by_definition(weight, hessian, found.mask))


def test_masks_are_chosen_on_weights_that_have_moved():
    """Two of four by definition, each group from the weights as they are when it is reached."""
    weight, hessian = problem(columns=24)
    damped, w = damp_hessian(hessian, 0.01)[0], weight.clone()
    keep = torch.ones_like(w, dtype=torch.bool)
    for i in range(24):
        if i % 4 == 0:
            cost = torch.stack(
                [w[:, j] ** 2 / torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(i, i + 4)], 1
            )
            keep[:, i : i + 4] = keep_mask(cost, None, "2:4")
        inverse = torch.linalg.inv(damped[i:, i:])
        error = torch.where(keep[:, i], 0, w[:, i])
        w[:, i:] -= torch.outer(error / inverse[0, 0], inverse[0])
    for block in (4, 6, 128):
        found = sparsegpt_weight(weight, hessian, None, pattern="2:4", block_size=block)
        assert torch.equal(found.mask, keep)
    first = sparsegpt_weight(weight, hessian, None, pattern="2:4", compensate=False)
    assert not torch.equal(first.mask, keep)


def test_smaller_blocks_see_more_of_the_updates():
    weight, hessian = problem(64, 96, 2000)
    fine, coarse = (sparsegpt_weight(weight, hessian, 0.5, block_size=b).error for b in (16, 96))
    assert fine < coarse


def test_better_than_masks_alone_and_no_better_than_least_squares():
    """The order of the methods on a layer with correlated inputs; the last is a lower bound."""
    weight, hessian = problem(64, 96, 2000)
    norm = hessian.diagonal().sqrt()
    magnitude = damage(weight, weight * magnitude_mask(weight, 0.5), hessian)
    wanda = damage(weight, weight * wanda_mask(weight, norm, 0.5), hessian)
    found = sparsegpt_weight(weight, hessian, 0.5)
    ours = damage(weight, found.weight, hessian)
    best = damage(weight, least_squares_weight(weight, found.mask, hessian), hessian)
    assert best < ours < wanda < magnitude
    still = sparsegpt_weight(weight, hessian, 0.5, compensate=False)
    assert still.error == pytest.approx(damage(weight, still.weight, hessian, 0.01))
    assert torch.equal(still.weight, weight * still.mask) and still.error > found.error


def test_without_correlation_it_is_wanda():
    """A diagonal H leaves nothing to make up for, and the scores are Wanda's squared."""
    weight, hessian = problem(8, 24)
    diagonal = torch.diag(hessian.diagonal())
    for pattern, sparsity in (("layer", 0.5), ("row", 0.5), ("2:4", None)):
        found = sparsegpt_weight(weight, diagonal, sparsity, pattern=pattern, damping=0.0)
        mask = wanda_mask(weight, hessian.diagonal().sqrt(), sparsity, pattern)
        assert torch.equal(found.mask, mask) and torch.equal(found.weight, weight * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", ["row", "tensor", 8])
def test_without_sparsity_it_is_gptq_bit_for_bit(dtype, symmetric, group_size):
    weight, hessian = problem(10, 24, dtype=dtype)
    ours = sparsegpt_weight(
        weight, hessian, 0.0, bits=3, group_size=group_size, symmetric=symmetric, block_size=7
    ).tensor
    theirs = gptq_weight(
        weight, hessian, 3, group_size=group_size, symmetric=symmetric, block_size=7,
        static_groups=True,
    )  # fmt: skip
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
    assert symmetric or torch.equal(ours.zeros, theirs.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pruning_and_rounding_in_one_walk(symmetric):
    """Zeros stay 0, kept weights lie on the grid of the original, and errors are made up for."""
    weight, hessian = problem(32, 48, 500)
    joint = sparsegpt_weight(weight, hessian, 0.5, bits=4, symmetric=symmetric)
    first = sparsegpt_weight(weight, hessian, 0.5)
    back = joint.tensor.dequantize(torch.float64)
    assert bool((back[~joint.mask] == 0).all()) and int((~joint.mask).sum()) == 32 * 24
    rounded = gptq_weight(weight, hessian, 4, symmetric=symmetric)
    assert torch.equal(joint.tensor.scales, rounded.scales)
    nearest = first.weight / joint.tensor.scales.double()
    nearest = nearest.round().clamp(-7, 7) * joint.tensor.scales.double()
    if symmetric:  # the same grid, but rounded afterwards and not made up for
        assert damage(weight, back, hessian) < damage(weight, nearest, hessian)


def test_dead_inputs_lose_their_weights():
    weight, hessian = problem()
    hessian[:, 3] = hessian[3] = 0
    found = sparsegpt_weight(weight, hessian, 0.25)
    assert not found.mask[:, 3].any() and not found.weight[:, 3].any()
    assert int((~found.mask).sum()) == round(0.25 * weight.numel())


def test_no_dead_weight_goes_beyond_the_sparsity():
    """A text that was not in the calibration data may reach what was silent there."""
    weight, hessian = problem()
    hessian[:, [3, 5]] = hessian[[3, 5]] = 0
    one = 1 / weight.shape[1]
    for found in (
        sparsegpt_weight(weight, hessian, one),
        obs_weight(weight, hessian, one),
        obs_weight(weight, hessian, one, pattern="layer"),
    ):
        assert int((~found.mask).sum()) == len(weight)
        assert bool((found.weight[~found.mask] == 0).all())
        assert found.loss < 1e-9 if hasattr(found, "loss") else found.error < 1e-9
        untouched = found.mask[:, [3, 5]]
        assert torch.equal(found.weight[:, [3, 5]][untouched], weight[:, [3, 5]][untouched])
    for found in (sparsegpt_weight(weight, hessian, 0.0), obs_weight(weight, hessian, 0.0)):
        assert bool(found.mask.all()) and torch.equal(found.weight, weight)
    everything = torch.ones_like(weight, dtype=torch.bool)
    best = least_squares_weight(weight, everything, hessian)
    torch.testing.assert_close(best, weight, rtol=1e-9, atol=1e-9)


def test_a_model_is_pruned_layer_by_layer(llama, ids):
    """The first block's layers are those of the weight-level core on the same inputs."""
    pruned = sparsegpt(llama, ids, 0.5, block_size=16)
    seen = Hessian(32)
    hook = llama.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, arguments: seen.update(arguments[0].flatten(0, -2))
    )
    with torch.no_grad():
        llama(ids)
    hook.remove()
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = llama.get_submodule(f"model.layers.0.self_attn.{name}")
        expected = sparsegpt_weight(layer.weight, seen.value, 0.5, block_size=16)
        found = pruned.get_submodule(f"model.layers.0.self_attn.{name}").weight
        torch.testing.assert_close(found, expected.weight, rtol=1e-4, atol=1e-5)


def test_a_model_pruned_and_quantized_at_once(llama, ids):
    reported = {}
    new = sparsegpt(llama, ids, pattern="2:4", bits=4, group_size=16, report=reported.__setitem__)
    assert reported.keys() == linears(llama).keys()
    for name, result in reported.items():
        layer = new.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.weight, result.weight)
    assert all(follows(mask, "2:4") for mask in masks_of(new).values())
    assert new(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size is 0; it must be a whole number from 1"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"bits": 1}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"pattern": "global"}, 'has no pattern "global"'),
    ],
)
def test_settings_that_cannot_be(llama, ids, changes, message):
    weight, hessian = problem()
    with pytest.raises(ValueError, match=message):
        sparsegpt_weight(weight, hessian, 0.5, **changes)
    with pytest.raises(ValueError, match=message):
        sparsegpt(llama, ids, 0.5, **changes)


def test_shapes_and_hessians_that_do_not_fit():
    weight, hessian = problem()
    for function in (sparsegpt_weight, obs_weight):
        with pytest.raises(ValueError, match="a weight of 16 inputs needs"):
            function(weight, hessian[:8, :8], 0.5)
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(weight, hessian * torch.nan, 0.5)
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(weight * torch.nan, hessian, 0.5)
        with pytest.raises(ValueError, match="groups of 3 of the pattern 2:3 do not divide"):
            function(weight, hessian, None, pattern="2:3")


# --- Optimal Brain Surgeon ------------------------------------------------------------------------


def test_a_step_is_the_best_move_there_is():
    """Against the constrained problem solved directly: min 1/2 d^T H d with d_q = -w_q."""
    weight, hessian = problem(3, 10)
    inverse = torch.linalg.inv(hessian)
    which = torch.tensor([4, 0, 9])
    moved, smaller, losses = obs_step(weight, inverse.expand(3, -1, -1), which)
    for row, q in enumerate(which.tolist()):
        others = [j for j in range(10) if j != q]
        best = torch.zeros(10, dtype=torch.float64)
        best[q] = -weight[row, q]
        best[others] = torch.linalg.solve(
            hessian[others][:, others], weight[row, q] * hessian[others, q]
        )
        torch.testing.assert_close(moved[row], weight[row] + best, rtol=1e-9, atol=1e-12)
        assert float(losses[row]) == pytest.approx(float(best @ hessian @ best) / 2, rel=1e-9)
        left = torch.linalg.inv(hessian[others][:, others])
        torch.testing.assert_close(smaller[row][others][:, others], left, rtol=1e-7, atol=1e-9)
        assert not smaller[row, q].any() and not smaller[row, :, q].any()
    expected = obs_saliency(weight, inverse)[torch.arange(3), which]
    torch.testing.assert_close(losses, expected)


def test_without_correlation_surgeon_is_damage():
    weight, hessian = problem()
    diagonal = hessian.diagonal()
    torch.testing.assert_close(
        obs_saliency(weight, torch.diag(1 / diagonal)), obd_saliency(weight, diagonal)
    )
    found = obs_weight(weight, torch.diag(diagonal), 0.5, damping=0.0)
    mask = wanda_mask(weight, diagonal.sqrt(), 0.5)
    assert torch.equal(found.mask, mask) and torch.equal(found.weight, weight * mask)
    lost = obd_saliency(weight, diagonal)[~mask].sum()
    assert found.loss == pytest.approx(float(lost))


def greedy(weight, damped, counts=None, total=None, allowed=lambda gone, q: True):
    """By definition: after each removal the best weights left, solved for from the start."""

    def cost(row, gone):
        if not gone:
            return 0.0
        inverse = torch.linalg.inv(damped)[gone][:, gone]
        lost = weight[row, gone]
        return float(lost @ torch.linalg.solve(inverse, lost)) / 2

    gone = [[] for _ in weight]
    rows = range(len(weight))
    for _ in range(total if counts is None else max(counts)):
        choices = {
            (row, q): cost(row, [*gone[row], q]) - cost(row, gone[row])
            for row in rows
            if counts is None or len(gone[row]) < counts[row]
            for q in range(weight.shape[1])
            if q not in gone[row] and allowed(gone[row], q)
        }
        if counts is None:
            best = [min(choices, key=choices.get)]
        else:
            best = [
                min((c for c in choices if c[0] == row), key=choices.get)
                for row in rows if any(c[0] == row for c in choices)
            ]  # fmt: skip
        for row, q in best:
            gone[row].append(q)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for row in rows:
        mask[row, gone[row]] = False
    return mask, sum(cost(row, gone[row]) for row in rows)


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_one_weight_after_another_by_definition(pattern):
    weight, hessian = problem(3, 8, seed=2)
    damped = damp_hessian(hessian, 0.01)[0]
    if pattern == "row":
        expected, loss = greedy(weight, damped, counts=[4] * 3)
    elif pattern == "layer":
        expected, loss = greedy(weight, damped, total=12)
    else:
        free = lambda gone, q: sum(g // 4 == q // 4 for g in gone) < 2  # noqa: E731
        expected, loss = greedy(weight, damped, counts=[4] * 3, allowed=free)
    found = obs_weight(weight, hessian, None if ":" in pattern else 0.5, pattern=pattern)
    assert torch.equal(found.mask, expected)
    assert found.loss == pytest.approx(loss, rel=1e-9)
    assert found.loss == pytest.approx(damage(weight, found.weight, hessian, 0.01) / 2, rel=1e-9)


def test_a_cheap_weight_behind_a_dear_one_has_to_wait():
    """Of two like inputs one costs 0.015, the other then next to nothing: 0.005 comes first."""
    weight = torch.tensor([[1.0, -1, 5, 5], [5, 5, 0.1, 5]], dtype=torch.float64)
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 0.99
    expected, loss = greedy(weight, damp_hessian(hessian, 0.01)[0], total=1)
    found = obs_weight(weight, hessian, 1 / 8, pattern="layer")
    assert torch.equal(found.mask, expected) and not found.mask[1, 2]
    assert found.loss == pytest.approx(loss)


@given(st.integers(1, 5), st.integers(2, 10), st.floats(0, 0.7), st.integers(0, 50))
@settings(max_examples=15)
def test_step_by_step_is_least_squares_on_what_is_left(rows, columns, sparsity, seed):
    weight, hessian = problem(rows, columns, seed=seed)
    if round(sparsity * columns) == columns:
        return
    found = obs_weight(weight, hessian, sparsity)
    best = least_squares_weight(weight, found.mask, hessian)
    torch.testing.assert_close(found.weight, best, rtol=1e-6, atol=1e-9)


def test_least_squares_by_normal_equations():
    weight, hessian = problem(4, 12)
    mask = magnitude_mask(weight, 0.5)
    found = least_squares_weight(weight, mask, hessian, damping=0.0)
    assert not found[~mask].any()
    gradient = (found - weight) @ hessian  # 0 on what is kept: no better weights there
    assert float(gradient[mask].abs().max()) < 1e-9 * float(hessian.abs().max())
    with pytest.raises(ValueError, match="the mask is"):
        least_squares_weight(weight, mask[:2], hessian)


def test_many_rows_are_done_in_parts(monkeypatch):
    weight, hessian = problem(7, 8)
    whole = {p: obs_weight(weight, hessian, 0.5, pattern=p) for p in ("row", "layer")}
    module = import_module("effnb.inference.pruning.obs")  # the package has a function `obs`
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 8 * 64)
    for pattern, expected in whole.items():
        part = obs_weight(weight, hessian, 0.5, pattern=pattern)
        torch.testing.assert_close(part.weight, expected.weight)
        mask = expected.mask
        torch.testing.assert_close(
            least_squares_weight(weight, mask, hessian), expected.weight, rtol=1e-6, atol=1e-9
        )


def test_surgeon_on_a_model(llama, ids):
    new = obs(llama, ids, 0.5, layers="*.1.mlp.*", true_sequential=True)
    seen = Hessian(32)
    hook = llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(
        lambda module, arguments: seen.update(arguments[0].flatten(0, -2))
    )
    with torch.no_grad():
        llama(ids)
    hook.remove()
    name = "model.layers.1.mlp.up_proj"
    expected = obs_weight(llama.get_submodule(name).weight, seen.value, 0.5)
    torch.testing.assert_close(
        new.get_submodule(name).weight, expected.weight, rtol=1e-3, atol=1e-4
    )
    assert sum(not mask.all() for mask in masks_of(new).values()) == 3


def test_the_factor_holds_the_costs_of_a_walk():
    """U_ii^2 is the pivot that a weight has once all columns before it are gone."""
    weight, hessian = problem()
    upper, _ = inverse_cholesky(hessian, 0.01)
    inverse = torch.linalg.inv(damp_hessian(hessian, 0.01)[0]).expand(6, -1, -1)
    for i in range(5):
        pivot = float(inverse[0, i, i])
        assert float(upper[i, i] ** 2) == pytest.approx(pivot, rel=1e-9)
        _, inverse, _ = obs_step(weight, inverse, torch.full((6,), i))
