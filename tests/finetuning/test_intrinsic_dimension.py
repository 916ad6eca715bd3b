"""Intrinsic dimension: Fastfood is its dense matrix, d numbers are the delta, d90."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import open_delta, read_delta, save_delta
from effnb.core.deltas import (
    attached,
    delta_parameters,
    delta_state_dict,
    detach,
    load_delta,
    merge,
    set_active,
)
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import intrinsic_dimension
from effnb.finetuning.intrinsic_dimension import DenseProjection, Fastfood, smallest_dimension
from effnb.inference.quantization.hadamard import hadamard_matrix

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def moved(model, name="default", seed=1):
    torch.manual_seed(seed)
    state = {k: torch.randn_like(t) for k, t in delta_state_dict(model, name).items()}
    return load_delta(model, name, state)


@examples(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_fastfood_is_its_dense_matrix(size, d, seed):
    """1/c [H G Pi H B v_pad] of the matrices themselves, and of unit vectors one by one."""
    fast = Fastfood(size, d, seed=seed)
    n = len(fast.signs)
    assert n == 2 ** math.ceil(math.log2(max(size, d))) and n & (n - 1) == 0
    H = hadamard_matrix(n)
    Pi = torch.eye(n, dtype=torch.float64)[fast.order]
    P = H @ fast.gauss.diag() @ Pi @ H @ fast.signs.diag()
    P = P[:size, :d] / math.sqrt(size * float(fast.gauss.square().sum()))
    v = torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fast(v), v @ P.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast(torch.eye(d, dtype=torch.float64)).T, P, rtol=1e-9, atol=1e-9)
    v.requires_grad_()
    upstream = torch.randn(3, size, dtype=torch.float64)
    fast(v).backward(upstream)
    torch.testing.assert_close(v.grad, upstream @ P, rtol=1e-9, atol=1e-9)


def test_fastfood_keeps_the_norm():
    """D = 3000, d = 100: the ratio is 1 up to a few per cent for each v, and 1 on average."""
    v = torch.randn(20, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = torch.cat(
        [Fastfood(3000, 100, seed=s)(v).norm(dim=1) / v.norm(dim=1) for s in range(10)]
    )
    assert float(ratios.mean()) == pytest.approx(1, abs=0.01)
    assert float(ratios.std()) < 0.04


def test_columns_of_a_dense_projection_have_norm_1_over_all_tensors():
    parts = [DenseProjection(size, 7, seed=s, total=90).matrix for s, size in ((0, 30), (1, 60))]
    torch.testing.assert_close(torch.cat(parts).norm(dim=0), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
@pytest.mark.parametrize("scales", [False, True])
def test_one_vector_moves_every_parameter(projection, scales, tmp_path):
    model = small()
    new = intrinsic_dimension.attach(model, dimension=9, projection=projection, scales=scales)
    assert torch.equal(new(X), model(X))
    trained = [p for p in new.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 9  # with scales, 4 of them are the scales
    assert len(trained) == (3 if scales else 1)
    new = moved(new)
    merged = merge(new, "default")
    torch.testing.assert_close(merged(X), new(X), atol=1e-5, rtol=1e-5)
    assert all((a != b).any() for a, b in zip(merged.parameters(), model.parameters()))
    assert attached(merged) == () and torch.equal(detach(new, "default")(X), model(X))
    # The stacked projection of a unit vector has norm about 1: the change is as long as v.
    v = delta_state_dict(new, "default")["0.v"]
    if not scales:
        change = torch.cat(
            [(a - b).flatten() for a, b in zip(merged.parameters(), model.parameters())]
        )
        assert float(change.detach().norm() / v.norm()) == pytest.approx(1, abs=0.4)
    save_delta(new, "default", tmp_path / "x")
    about, tensors = read_delta(tmp_path / "x")
    assert sum(t.numel() for t in tensors.values()) == 9 and "matrix" not in about["settings"]
    again = open_delta(small(), tmp_path / "x")
    assert torch.equal(again(X), new(X))
    again(X).sum().backward()
    assert delta_parameters(again, "default")["0.v"].grad.abs().sum() > 0


def test_the_gradient_is_the_projected_one():
    """dL/dv = P^T dL/dtheta, with the dense matrix of each tensor."""
    model = small().double()
    new = moved(intrinsic_dimension.attach(model, dimension=4))
    new(X.double()).square().sum().backward()
    plain = merge(new, "default")
    plain(X.double()).square().sum().backward()
    expected = torch.zeros(4, dtype=torch.float64)
    for path in ("0", "2"):
        for leaf, projection in new.get_submodule(path).deltas["default"].projections.items():
            P = projection(torch.eye(4, dtype=torch.float64)).T
            expected += P.T @ plain.get_submodule(path).get_parameter(leaf).grad.flatten()
    torch.testing.assert_close(delta_parameters(new, "default")["0.v"].grad, expected)


def test_v_is_one_tensor_in_every_copy(llama, ids):
    new = intrinsic_dimension.attach(llama, "a", dimension=20)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, llama(ids).logits)
    new = moved(new, "a")
    two = moved(intrinsic_dimension.attach(new, "b", dimension=10, seed=5), "b")
    assert sum(p.numel() for p in delta_parameters(two, "a").values()) == 20
    with torch.no_grad():
        torch.testing.assert_close(set_active(two, "a")(ids).logits, new(ids).logits)
        torch.testing.assert_close(detach(two, "b")(ids).logits, new(ids).logits)
        both = merge(merge(two, "a"), "b")
        torch.testing.assert_close(both(ids).logits, two(ids).logits, atol=1e-4, rtol=1e-4)
        changed = load_delta(two, "a", {k: t * 0 for k, t in delta_state_dict(two, "a").items()})
        assert not torch.allclose(changed(ids).logits, two(ids).logits, atol=1e-3)
        torch.testing.assert_close(
            changed(ids).logits, set_active(two, "b")(ids).logits, atol=1e-5, rtol=1e-5
        )
    first = delta_state_dict(new, "a")
    other = intrinsic_dimension.attach(llama, "a", dimension=20, seed=1)
    assert not torch.equal(load_delta(other, "a", first)(ids).logits, new(ids).logits)


def test_training_d_numbers_lowers_the_loss(llama):
    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    before = {n: p.detach().clone() for n, p in llama.named_parameters()}
    new = intrinsic_dimension.attach(llama, dimension=50)
    result = train(new, batch, TrainingSettings(steps=12, learning_rate=0.3))
    assert result.losses[-1] < result.losses[0]
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())


def test_a_larger_dimension_fits_a_quadratic_better():
    """In D dimensions the subspace is everything: the target is reached; below, the rest stays."""
    target = nn.Sequential(nn.Linear(3, 2)).double()
    model = nn.Sequential(nn.Linear(3, 2)).double()
    left = []
    for d in (2, 5, 8):
        new = intrinsic_dimension.attach(model, dimension=d, projection="dense")
        parts = new[0].deltas["default"].projections
        P = torch.cat([p.matrix for p in parts.values()])
        goal = torch.cat(
            [(a - b).flatten() for a, b in zip(target.parameters(), model.parameters())]
        ).detach()
        v = torch.linalg.lstsq(P, goal[:, None]).solution[:, 0]
        merged = merge(load_delta(new, "default", {"0.v": v}), "default")
        left.append(sum(float((a - b).square().sum().detach())
                        for a, b in zip(merged.parameters(), target.parameters())))  # fmt: skip
    assert left[0] > left[1] > left[2] and left[2] < 1e-20


def test_d90():
    scores = {2: 0.656, 5: 0.786, 10: 0.865, 25: 0.903, 50: 0.94}
    assert smallest_dimension(scores, 0.970) == 25  # 0.873
    assert smallest_dimension(scores, 0.970, 0.8) == 5
    assert smallest_dimension({2: 0.1}, 0.9) is None
    for bad in (({}, 1.0, 0.9), (scores, 0.0, 0.9), (scores, 1.0, 1.5)):
        with pytest.raises(ValueError, match="must not be empty"):
            smallest_dimension(*bad)


def test_bad_input_is_one_sentence(tmp_path):
    total = 57
    for settings, message in [
        ({"dimension": 0}, "dimension is 0; for 4 tensors of 57 parameters it must lie in 1 to 57"),
        ({"dimension": total + 1}, "dimension is 58"),
        ({"dimension": 4, "scales": True}, "it must lie in 5 to 57"),
        ({"dimension": 4, "projection": "sparse"}, "projection is 'sparse'; it must be one of"),
        ({"dimension": 4, "layers": "zz"}, "fits the pattern zz; the model has parameters in 0, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            intrinsic_dimension.attach(small(), **settings)
    with pytest.raises(TypeError, match="dimension is True"):
        intrinsic_dimension.attach(small(), dimension=True)
    with pytest.raises(ValueError, match="more than 2\\^28 entries; use projection='fastfood'"):
        intrinsic_dimension.attach(
            nn.Sequential(nn.Linear(600, 600)), dimension=1000, projection="dense"
        )
    new = intrinsic_dimension.attach(small(), "a", dimension=3)
    with pytest.raises(ValueError, match="attached already"):
        intrinsic_dimension.attach(new, "a", dimension=3)
    save_delta(new, "a", tmp_path / "x")
    wide = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"moves 0\.weight of shape \(6, 5\); the model's has \(7"):
        open_delta(wide, tmp_path / "x")
    with pytest.raises(ValueError, match=r"moves 2\.weight, but the model has no 2"):
        open_delta(small()[:1], tmp_path / "x")
