"""The triangular factor of the inverse Hessian, against the inverses it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.core.hessian import damp_hessian, inverse_cholesky


def hessian_of(features, tokens=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * features, features, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.3, 2, features, dtype=torch.float64)
    return (2 / len(x) * x.T @ x).to(dtype)


def test_rows_are_those_of_the_inverses_of_what_is_left():
    """U_ii U[i, i:] is the first row of the inverse of H without its first i inputs."""
    hessian = hessian_of(20)
    damped, _ = damp_hessian(hessian)
    upper, _ = inverse_cholesky(hessian)
    for i in range(20):
        rest = torch.linalg.inv(damped[i:, i:])
        torch.testing.assert_close(upper[i, i] ** 2, rest[0, 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(upper[i, i] * upper[i, i:], rest[0], rtol=1e-10, atol=1e-13)


@settings(max_examples=25)
@given(st.integers(1, 150), st.sampled_from([1e-4, 0.01, 1.0]))
def test_factor_of_the_inverse(features, damping):
    hessian = hessian_of(features)
    damped, _ = damp_hessian(hessian, damping)
    upper, dead = inverse_cholesky(hessian, damping)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    assert not dead.any()
    whole = torch.eye(features, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ damped, whole, rtol=0, atol=1e-10)
    # The published way: factorize, invert, factorize again.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-12)


def test_damping_is_a_share_of_the_mean_diagonal():
    hessian = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    damped, dead = damp_hessian(hessian, 0.1)
    assert damped.dtype == torch.float64 and not dead.any()
    expected = torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64)
    torch.testing.assert_close(damped.diagonal(), expected)
    upper, _ = inverse_cholesky(hessian, 0.1)
    torch.testing.assert_close(upper, expected.rsqrt().diag().float())


def test_dead_inputs_stand_alone():
    hessian = hessian_of(6)
    hessian[2], hessian[:, 2] = 0, 0
    before = hessian.clone()
    damped, dead = damp_hessian(hessian)
    assert dead.tolist() == [False, False, True, False, False, False]
    assert torch.equal(hessian, before)
    strength = 0.01 * (hessian.trace() + 1) / 6
    torch.testing.assert_close(damped[2, 2], 1 + strength)
    upper, dead = inverse_cholesky(hessian)
    assert dead[2] and float(upper[2].abs().sum() + upper[:2, 2].abs().sum()) == float(upper[2, 2])


def test_types():
    assert inverse_cholesky(hessian_of(5))[0].dtype == torch.float64
    for kind in (torch.float32, torch.bfloat16):
        assert inverse_cholesky(hessian_of(5, dtype=kind))[0].dtype == torch.float32


def test_float32_input_is_factorized_in_float64():
    """A condition number near 10^7, at which a factorization in float32 is worthless."""
    hessian = hessian_of(40, tokens=41).float()
    damped, _ = damp_hessian(hessian, 1e-6)
    upper = inverse_cholesky(hessian, 1e-6)[0].double()
    error = (upper.T @ upper @ damped - torch.eye(40)).abs().max()
    assert float(error) < 0.05


def test_fewer_tokens_than_inputs_need_damping():
    hessian = hessian_of(12, tokens=4)
    assert torch.isfinite(inverse_cholesky(hessian)[0]).all()
    with pytest.raises(ValueError, match="not positive definite with damping 0"):
        inverse_cholesky(hessian - 1e-9 * torch.eye(12), 0)


@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (torch.ones(3, 4), 0.01, r"shape \(3, 4\); it must be a square matrix"),
        (torch.ones(3), 0.01, "square matrix"),
        (torch.ones(0, 0), 0.01, "square matrix"),
        (torch.full((2, 2), torch.nan), 0.01, "entries that are NaN or infinite"),
        (-torch.eye(2), 0.01, "negative entries on its diagonal"),
        (torch.eye(2), -0.1, "damping is -0.1; it must be a number from 0"),
        (torch.eye(2), float("nan"), "damping is nan"),
    ],
)
def test_bad_input_is_one_sentence(hessian, damping, message):
    for function in (damp_hessian, inverse_cholesky):
        with pytest.raises(ValueError, match=message):
            function(hessian, damping)
