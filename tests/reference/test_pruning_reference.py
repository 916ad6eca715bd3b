"""Pruning against PyTorch's own pruning and sparsity tools, and torchao's.

Masks must be identical, not close: there is nothing to round. Where a library computes something
else than the paper it names, the test says what.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from effnb.core.modules import linears
from effnb.inference.pruning import (
    encode,
    keep_mask,
    magnitude,
    magnitude_mask,
    masks_of,
    sparsegpt,
    taylor,
    taylor_scores,
    wanda,
    wanda_mask,
)
from effnb.inference.pruning.storage import unpack_bits


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- torch.nn.utils.prune -------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.777, 0.95])
def test_magnitude_per_layer_is_l1_unstructured(llama, sparsity):
    found = masks_of(magnitude(llama, sparsity))
    for name, layer in linears(llama).items():
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(found[name], layer.weight_mask.bool()), name


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.777, 0.95])
def test_global_magnitude_is_global_unstructured(llama, sparsity):
    found = masks_of(magnitude(llama, sparsity, pattern="global"))
    layers = linears(llama)
    prune.global_unstructured(
        [(m, "weight") for m in layers.values()], prune.L1Unstructured, amount=sparsity
    )
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.weight_mask.bool()), name


def test_global_scores_of_any_kind(llama, ids):
    """torch takes importance scores; ours are Taylor's."""
    found = masks_of(taylor(llama, ids, 0.6))
    scores, layers = taylor_scores(llama, ids), linears(llama)
    prune.global_unstructured(
        [(m, "weight") for m in layers.values()],
        prune.L1Unstructured,
        importance_scores={(m, "weight"): scores[n] for n, m in layers.items()},
        amount=0.6,
    )
    for name, layer in layers.items():
        assert torch.equal(found[name], layer.weight_mask.bool()), name


def test_a_pruned_model_is_torchs_pruned_model(llama, ids):
    ours = magnitude(llama, 0.5)
    for layer in linears(llama).values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.remove(layer, "weight")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, llama(ids).logits)


# --- N:M ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8)])
def test_magnitude_in_groups_is_the_weight_norm_sparsifier(keep, group):
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    model[0].weight = nn.Parameter(randn(24, 32))
    expected = masks_of(magnitude(model, pattern=f"{keep}:{group}"))["0"]
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, group), zeros_per_block=group - keep
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model[0].weight != 0, expected)


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
def test_two_of_four_fits_the_layout_of_sparse_tensor_cores(method, tiny_llama, ids):
    """CUTLASS's form holds the weights without loss, in as many bytes as ours."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    llama = tiny_llama(intermediate_size=64, num_key_value_heads=4)  # the form works by 32 x 32
    pruned = method(llama, *([] if method is magnitude else [ids]), pattern="2:4")
    for name, layer in linears(pruned).items():
        weight = layer.weight.detach().half()
        values, places = sparse_semi_structured_from_dense_cutlass(weight)
        back = sparse_semi_structured_to_dense_cutlass(values, places)
        assert torch.equal(back, weight), name
        stored = encode(weight, "2:4")
        theirs = sum(t.numel() * t.element_size() for t in (values, places))
        assert stored.bytes == theirs == weight.numel() * 2 * 9 // 16
        assert torch.equal(stored.values, values.flatten())


def test_a_mask_of_a_whole_row_does_not_fit_that_layout():
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = randn(32, 32).half()
    weight = weight * magnitude_mask(weight.float(), 0.5, "row")
    back = sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(weight)
    )
    assert not torch.equal(back, weight)  # torch drops what has no room, and says nothing
    with pytest.raises(ValueError, match="keeps more than 2 of some 4"):
        encode(weight, "2:4")


# --- storage --------------------------------------------------------------------------------------


def test_csr_holds_what_torchs_csr_holds():
    weight = randn(20, 300) * keep_mask(randn(20, 300, seed=1).abs(), 0.9)
    ours = encode(weight, "csr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR a beta
        theirs = weight.to_sparse_csr()
    assert torch.equal(ours.values, theirs.values())
    assert torch.equal(ours.places.long(), theirs.col_indices())
    assert torch.equal(ours.rows.long(), theirs.crow_indices())


def test_the_bitmap_is_numpys_packing():
    weight = randn(5, 13) * keep_mask(randn(5, 13, seed=1).abs(), 0.5)
    ours = encode(weight, "bitmap")
    packed = np.packbits((weight != 0).numpy().flatten(), bitorder="little")
    assert ours.places.tolist() == packed.tolist()
    assert torch.equal(unpack_bits(ours.places, 65), (weight != 0).flatten())


# --- torchao --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 4])
def test_torchaos_wanda_ranks_the_whole_layer_by_the_squared_norm(block):
    """Its masks are ours for that ranking, and not those of the paper."""
    from torchao.sparsity import WandaSparsifier

    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    weight = randn(24, 32)
    model[0].weight = nn.Parameter(weight.clone())
    inputs = randn(50, 32, seed=1) * torch.linspace(0.2, 3, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = WandaSparsifier(0.5, semi_structured_block_size=block)
        sparsifier.prepare(model, None)
        model(inputs)
        sparsifier.step()
        sparsifier.squash_mask()
    theirs = model[0].weight != 0
    norm = inputs.norm(dim=0)
    pattern, sparsity = ("layer", 0.5) if block is None else ("2:4", None)
    assert torch.equal(theirs, wanda_mask(weight, norm.square(), sparsity, pattern))
    paper = wanda_mask(weight, norm, sparsity, "row" if block is None else pattern)
    assert not torch.equal(theirs, paper)
