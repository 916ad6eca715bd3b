"""Low rank against torch, scipy, scikit-learn, peft and tensorly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.linalg
import tensorly
import torch
from peft import LoraConfig, get_peft_model
from sklearn.decomposition import TruncatedSVD
from tensorly.decomposition import tensor_train as tensorly_train
from torch import nn
from torch.func import functional_call, grad, vmap

from effnb.core.modules import linears
from effnb.inference.low_rank import (
    break_even_rank,
    fisher,
    fwsvd_weight,
    importance,
    low_rank_plus_sparse,
    svd,
    svd_llm_weight,
    truncated_svd,
    tt_svd,
    whitening,
)
from effnb.inference.low_rank.losparse import _Splitting


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(m, n, seed=0):
    """A matrix with singular values 1, 1/2, 1/4, …: random ones are too flat for sketches."""
    U, _ = torch.linalg.qr(randn(m, min(m, n), seed=seed))
    V, _ = torch.linalg.qr(randn(n, min(m, n), seed=seed + 1))
    return U * 0.5 ** torch.arange(min(m, n), dtype=torch.float64) @ V.T


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("rank", [1, 8, 31])
def test_truncation_is_scipys(shape, rank):
    """Product and spectrum to 1e-12; scipy's other LAPACK driver (QR instead of divide)."""
    W = randn(*shape)
    U, sigma, Vh = scipy.linalg.svd(W.numpy(), full_matrices=False, lapack_driver="gesvd")
    factors = truncated_svd(W, rank)
    np.testing.assert_allclose(factors.singular_values, sigma, rtol=1e-12)
    np.testing.assert_allclose(
        factors.product(), U[:, :rank] * sigma[:rank] @ Vh[:rank], rtol=0, atol=1e-12
    )


def test_a_randomised_svd_agrees_only_with_room_to_spare():
    """torch.svd_lowrank with q far above the rank is exact; with q = rank its tail is not."""
    W, rank = spread(48, 32), 6
    exact = truncated_svd(W, rank)
    torch.manual_seed(0)
    U, sigma, V = torch.svd_lowrank(W, q=20, niter=4)
    roomy = (U[:, :rank] * sigma[:rank]) @ V[:, :rank].T
    torch.testing.assert_close(exact.product(), roomy, rtol=0, atol=1e-10)
    flat = randn(48, 32)
    U, sigma, V = torch.svd_lowrank(flat, q=rank, niter=2)
    worse = float((flat - (U * sigma) @ V.T).norm())
    assert worse > 1.001 * truncated_svd(flat, rank).error


def peft_model(model, rank, target):
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[target], init_lora_weights="pissa")
    return get_peft_model(copy.deepcopy(model), config).base_model.model


def test_factors_and_residual_are_those_of_pefts_pissa(llama):
    """peft starts LoRA from U √Σ and √Σ Vᵀ and freezes the residual: our factors and LoSparse's S.

    In float32, so to 1e-4 (singular values here reach about 5).
    """
    theirs = peft_model(llama, 5, "up_proj")
    ours = svd(llama, rank=5, layers="*.up_proj")
    for name, layer in linears(llama, "*.up_proj").items():
        other = theirs.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(ours.get_submodule(name).weight, B @ A, rtol=0, atol=1e-4)
        root = ours.get_submodule(name).u.weight
        torch.testing.assert_close(root.T @ root, B.T @ B, rtol=0, atol=1e-4)
        start = _Splitting(layer, 5)
        torch.testing.assert_close(start.sparse.weight, other.base_layer.weight, rtol=0, atol=1e-4)


def test_low_rank_plus_sparse_keeps_rows_of_pefts_residual(llama):
    name = "model.layers.1.mlp.up_proj"
    new = low_rank_plus_sparse(llama, 0.6, layers=name).get_submodule(name)
    residual = peft_model(llama, new.rank, "up_proj").get_submodule(name).base_layer.weight
    rows = residual.norm(dim=1).topk(len(new.rows)).indices.sort().values
    assert new.rows.tolist() == rows.tolist()
    torch.testing.assert_close(new.sparse.weight, residual[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_llm_is_the_principal_components_of_the_outputs(rank):
    """scikit-learn's TruncatedSVD of (W X)ᵀ, its components applied to W: to 1e-8."""
    W, X = randn(14, 20), randn(20, 20, seed=1) @ randn(20, 90, seed=2)
    peer = TruncatedSVD(rank, algorithm="arpack").fit((W @ X).T.numpy())
    components = torch.from_numpy(peer.components_.copy())
    factors = svd_llm_weight(W, X @ X.T, rank)
    torch.testing.assert_close(factors.product(), components.T @ components @ W, rtol=0, atol=1e-8)
    explained = float(np.square(peer.singular_values_).sum())
    whole = float((W @ X).square().sum())
    assert factors.error**2 == pytest.approx(whole - explained, rel=1e-8)


def test_whitening_is_scipys_lower_cholesky():
    X = randn(12, 50)
    np.testing.assert_allclose(
        whitening(X @ X.T), scipy.linalg.cholesky((X @ X.T).numpy(), lower=True), atol=1e-12
    )


def test_fisher_is_the_mean_square_of_torch_funcs_per_sample_gradients(tiny_llama, ids):
    """vmap(grad) over sequences, in float64: to 1e-9 relative."""
    model = tiny_llama(num_hidden_layers=1).double()
    model.config._attn_implementation = "eager"  # vmap knows its operations
    weights = {f"{name}.weight": m.weight.detach() for name, m in linears(model).items()}

    def loss(some, row):
        logits = functional_call(model, some, (row[None],), {"use_cache": False}).logits[0]
        return nn.functional.cross_entropy(logits[:-1].float(), row[1:])

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    found = fisher(model, ids)
    for name, gradients in per_sample.items():
        expected = gradients.square().mean(0).float()
        torch.testing.assert_close(found[name.removesuffix(".weight")].float(), expected)


def test_fwsvd_is_scipys_svd_of_the_scaled_weight():
    W, F = randn(10, 14), randn(10, 14, seed=1).square()
    I = importance(F, "outputs").numpy()[:, None]  # noqa: E741
    U, sigma, Vh = scipy.linalg.svd(I * W.numpy(), full_matrices=False)
    expected = (U[:, :4] * sigma[:4] @ Vh[:4]) / I
    found = fwsvd_weight(W, F, 4, axis="outputs").product()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((4, 6, 8), (2, 3)), ((4, 6, 8), (4, 8)), ((3, 3, 3, 3), (3, 5, 2)), ((6, 8), (4,))],
)
def test_tensor_trains_are_tensorlys(shape, ranks):
    """Each vector's train against `tensorly.decomposition.tensor_train`: to 1e-12."""
    tensorly.set_backend("numpy")
    x = randn(3, int(np.prod(shape)))
    ours = tt_svd(x, ranks, shape)
    for i, vector in enumerate(x):
        theirs = tensorly_train(vector.view(shape).numpy(), rank=[1, *ranks, 1])
        np.testing.assert_allclose(
            ours.vectors()[i].view(shape), theirs.to_tensor(), rtol=0, atol=1e-12
        )
        assert [core.shape for core in theirs.factors] == [tuple(c[i].shape) for c in ours.cores]


def test_break_even_is_where_torch_counts_equal_operations():
    """torch's FLOP counter on two thin layers and on one thick one."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(module):
        with FlopCounterMode(display=False) as counter:
            module(torch.ones(3, 96))
        return counter.get_total_flops()

    dense = nn.Sequential(nn.Linear(96, 64, bias=False))
    limit = break_even_rank(64, 96)
    for rank in (38, 39):
        assert (count(svd(dense, rank=rank, always=True)) < count(dense)) is (rank < limit)
