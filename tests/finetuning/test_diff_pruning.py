"""Diff pruning: the gates in closed form, the expected L0 by sampling, the exact sparsity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import open_delta, save_delta
from effnb.core.deltas import delta_parameters, delta_state_dict, load_delta, merge
from effnb.core.differences import SparseDifference
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.finetuning import bitfit, diff_pruning
from effnb.finetuning.diff_pruning import expected_gate, hard_concrete, open_probability

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def randomized(model, name="default", seed=1):
    torch.manual_seed(seed)
    state = {k: torch.randn_like(t) for k, t in delta_state_dict(model, name).items()}
    return load_delta(model, name, state)


@pytest.mark.parametrize(
    ("gamma", "zeta", "beta", "expected"),
    [(-1.5, 1.5, 1.0, 0.57444), (-0.1, 1.1, 2 / 3, 0.86973)],
)
def test_a_gate_is_open_as_often_as_it_says(gamma, zeta, beta, expected):
    """The two sets of constants at alpha = 0.3, in closed form and by 400,000 draws."""
    alpha = torch.full((400_000,), 0.3, dtype=torch.float64)
    numbers = {"gamma": gamma, "zeta": zeta, "beta": beta}
    assert float(open_probability(alpha[0], **numbers)) == pytest.approx(expected, abs=1e-5)
    u = torch.rand(len(alpha), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = hard_concrete(alpha, u, **numbers)
    assert float((z > 0).double().mean()) == pytest.approx(expected, abs=0.004)
    assert float(z.min()) == 0 and float(z.max()) == 1
    assert (z == 1).double().mean() > 0.05


def test_the_gate_s_equation_by_hand():
    # s = sigmoid((log 3 + 1) / 0.5), stretched to (-0.1, 1.1)
    s = 1 / (1 + math.exp(-(math.log(3) + 1) / 0.5))
    found = hard_concrete(torch.tensor(1.0), torch.tensor(0.75), gamma=-0.1, zeta=1.1, beta=0.5)
    assert float(found) == pytest.approx(min(1, s * 1.2 - 0.1), abs=1e-6)
    assert float(expected_gate(torch.tensor(0.0))) == 0 and float(expected_gate(torch.tensor(9.0)))


def test_the_expected_l0_is_the_mean_count_and_has_a_gradient():
    """With a common gate an entry counts where both gates are open."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    new = diff_pruning.attach(model, alpha=0.3)
    state = delta_state_dict(new, "default")
    state["0.gated.weight.w"] = torch.ones(3, 4, dtype=torch.float64)
    new = load_delta(new, "default", state).train()
    p = float(open_probability(torch.tensor(0.3, dtype=torch.float64)))
    expected = diff_pruning.expected_l0(new)
    assert float(expected.detach()) == pytest.approx(12 * p * p, abs=1e-10)
    expected.backward()
    found = delta_parameters(new, "default")
    assert (found["0.gated.weight.alpha"].grad > 0).all()
    delta = new[0].deltas["default"]
    torch.manual_seed(0)
    with torch.no_grad():
        counts = [int(delta.differences(model[0])["weight"].count_nonzero()) for _ in range(4000)]
    assert sum(counts) / 4000 == pytest.approx(12 * p * p, abs=0.2)


@pytest.mark.parametrize("structured", [True, False])
def test_nothing_changes_at_the_start_in_either_mode(llama, ids, structured):
    new = diff_pruning.attach(llama, structured=structured)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, llama(ids).logits)
        assert torch.equal(new.train()(ids).logits, llama(ids).logits)
    covered = sum(p.numel() for n, p in llama.named_parameters() if "embed" not in n)
    assert sum(p.numel() for p in new.parameters() if p.requires_grad) >= 2 * covered


def test_gates_are_noisy_in_training_only():
    new = randomized(diff_pruning.attach(small()))
    assert torch.equal(new.eval()(X), new(X))
    assert not torch.equal(new.train()(X), new(X))
    merged = merge(new, "default")
    torch.testing.assert_close(merged(X), new.eval()(X), atol=1e-5, rtol=1e-5)


@examples(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 99))
def test_a_projection_keeps_exactly_the_largest(n_in, n_out, sparsity, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n_in, n_out), nn.Linear(n_out, 2))
    new = randomized(diff_pruning.attach(model, structured=False), seed=seed).eval()
    total = sum(p.numel() for p in model.parameters())
    kept = round((1 - sparsity) * total)
    if kept == 0:
        with pytest.raises(ValueError, match="keeps none of"):
            diff_pruning.project(new, sparsity=sparsity)
        return
    full = torch.cat(
        [
            d.flatten()
            for host, base in ((new[0], model[0]), (new[1], model[1]))
            for d in host.deltas["default"].differences(base).values()
        ]
    )
    small_one = diff_pruning.project(new, sparsity=sparsity)
    parts = [h.deltas["default"] for h in (small_one[0], small_one[1])]
    assert all(isinstance(part, SparseDifference) for part in parts)
    found = torch.cat([d.flatten() for part, base in zip(parts, model)
                       for d in part.differences(base).values()])  # fmt: skip
    places = sum(len(t) for k, t in delta_state_dict(small_one, "default").items() if "places" in k)
    assert places == kept
    same = found == full
    assert same[full.abs() > full.abs().sort(descending=True).values[kept - 1]].all()
    assert (found[~same] == 0).all()
    if sparsity == 0:
        torch.testing.assert_close(small_one(torch.ones(1, n_in)), new(torch.ones(1, n_in)))


def test_the_three_stages(llama, ids, tmp_path):
    """Train with the penalty, project to 2 %, train what is left; the file holds that alone."""

    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    def penalized(model, x):
        return causal_lm_loss(model, x) + 1e-4 * diff_pruning.expected_l0(model)

    new = diff_pruning.attach(llama, layers="*_proj")
    before = float(diff_pruning.expected_l0(new).detach())
    train(new, batch, TrainingSettings(steps=6, learning_rate=1e-2), loss=penalized)
    assert float(diff_pruning.expected_l0(new).detach()) < before
    sparse = diff_pruning.project(new.eval(), sparsity=0.98)
    places = {k: v.clone() for k, v in delta_state_dict(sparse, "default").items() if "places" in k}
    result = train(sparse, batch, TrainingSettings(steps=6, learning_rate=1e-2))
    assert result.losses[-1] < result.losses[0]
    state = delta_state_dict(sparse, "default")
    assert all(torch.equal(state[k], v) for k, v in places.items())
    total = sum(p.numel() for n, p in llama.named_parameters() if "_proj" in n)
    merged = merge(sparse, "default")
    changed = sum(
        int((a != b).sum()) for a, b in zip(merged.parameters(), llama.parameters(), strict=True)
    )
    assert 0 < changed <= round(0.02 * total)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, sparse(ids).logits, atol=1e-5, rtol=1e-5)
        size = save_delta(sparse, "default", tmp_path / "x")
        assert size < 0.02 * total * 12 + 10_000
        assert torch.equal(open_delta(llama, tmp_path / "x")(ids).logits, sparse(ids).logits)


def test_gates_go_through_a_file(tmp_path):
    new = randomized(diff_pruning.attach(small(), gamma=-0.1, zeta=1.1, beta=2 / 3)).eval()
    save_delta(new, "default", tmp_path / "x")
    again = open_delta(small(), tmp_path / "x").eval()
    assert torch.equal(again(X), new(X))
    assert again[0].deltas["default"].settings() == new[0].deltas["default"].settings()


def test_bad_input_is_one_sentence():
    for settings, message in [
        ({"gamma": 0.1}, "gamma is 0.1; it must be below 0"),
        ({"zeta": 1.0}, "zeta is 1.0; it must be above 1"),
        ({"beta": 0}, "beta is 0; it must be above 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"layers": "q"}, "fits the pattern q; the model has parameters in 0, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            diff_pruning.attach(small(), **settings)
    new = diff_pruning.attach(small(), "a")
    with pytest.raises(ValueError, match="attached already"):
        diff_pruning.attach(new, "a")
    for sparsity in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"sparsity is {sparsity}; it must lie in \[0, 1\)"):
            diff_pruning.project(new, "a", sparsity=sparsity)
    with pytest.raises(ValueError, match="keeps none of 57 entries"):
        diff_pruning.project(new, "a", sparsity=0.999)
    with pytest.raises(ValueError, match="is of kind 'bitfit', which has no gates"):
        diff_pruning.expected_l0(bitfit.attach(small(), "b"), "b")
