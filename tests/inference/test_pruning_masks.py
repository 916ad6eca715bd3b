"""Patterns, masks on models, and what sparse weights take to store."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from effnb.core.modules import linears, share
from effnb.evaluation import stored_bytes
from effnb.inference.pruning import (
    Pattern,
    apply_masks,
    choose_masks,
    encode,
    encode_model,
    follows,
    keep_mask,
    load_masks,
    magnitude,
    mask_storage,
    masks_of,
    save_masks,
    storage_of,
    summarize,
)
from effnb.inference.pruning.storage import pack_bits, unpack_bits
from effnb.inference.quantization import rtn


def scores(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs()


# --- where weights compete ------------------------------------------------------------------------


def test_a_mask_by_hand():
    score = torch.tensor([[4.0, 1, 3, 2], [8, 7, 6, 5]])
    assert keep_mask(score, 0.5, "layer").int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert keep_mask(score, 0.5, "row").int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert keep_mask(score, None, "1:2").int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert keep_mask(score, None, "1:4").int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert keep_mask(score, 0.25, "3:4").int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]


@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    sparsity=st.floats(0, 0.85),
    pattern=st.sampled_from(["layer", "row", "1:4", "2:4", "3:4", "4:8"]),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_exactly_so_many_go_and_they_are_the_smallest(
    rows, groups, sparsity, pattern, levels, seed
):
    """Also where most scores are equal."""
    columns = 8 * groups
    score = (scores(rows, columns, seed) * levels).floor()
    fixed = Pattern.parse(pattern).sparsity
    mask = keep_mask(score, sparsity if fixed is None else None, pattern)
    if fixed is not None:
        assert follows(mask, pattern)
    size = {"layer": rows * columns, "row": columns}.get(pattern) or Pattern.parse(pattern).group
    removed = round((sparsity if fixed is None else fixed) * size)
    for kept, values in zip(mask.view(-1, size), score.view(-1, size), strict=True):
        assert int((~kept).sum()) == removed
        if removed:
            worst = values[~kept].max()
            assert worst <= values[kept].min()
            ties = kept[values == worst].int()  # of equal scores the first ones go
            assert torch.equal(ties, ties.sort().values)


def test_one_threshold_for_all_layers():
    parts = {"a": scores(4, 6), "b": scores(3, 8, seed=1) * 0.5, "c": scores(5, 2, seed=2)}
    masks = choose_masks(parts, 0.4, "global")
    together = torch.cat([part.flatten() for part in parts.values()]).sort().values
    threshold = together[round(0.4 * len(together)) - 1]
    for name, part in parts.items():
        assert torch.equal(masks[name], part > threshold)


def test_a_sparsity_for_each_layer():
    parts = {"a": scores(4, 5), "b": scores(4, 5, seed=1)}
    masks = choose_masks(parts, {"a": 0.2, "b": 0.6}, "row")
    assert masks["a"].sum(1).tolist() == [4] * 4 and masks["b"].sum(1).tolist() == [2] * 4


def test_half_precision_scores_lose_exactly_as_many():
    score = torch.rand(64, 64).to(torch.bfloat16)  # only a few hundred different values
    assert int(keep_mask(score, 0.3).sum()) == 4096 - round(0.3 * 4096)


def test_a_pattern_on_its_way():
    assert [str(Pattern.parse("2:8").at(s)) for s in (0, 0.1, 0.125, 0.5, 0.74, 0.75)] == [
        "8:8", "8:8", "7:8", "4:8", "3:8", "2:8",
    ]  # fmt: skip
    assert Pattern.parse("row").at(0.3) == Pattern("row")
    assert Pattern.parse("1:4").sparsity == 0.75 and Pattern.parse("layer").sparsity is None


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 2, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match="it must be at least 0 and below 1"):
        keep_mask(scores(4, 8), sparsity, "layer")


@pytest.mark.parametrize("pattern", ["rows", "0:4", "5:4", "2:", "2:4:8", "", "-1:4", "2.0:4"])
def test_unknown_patterns(pattern):
    with pytest.raises(ValueError, match='must be "layer", "row", "global" or "N:M"'):
        keep_mask(scores(4, 8), 0.5, pattern)


@pytest.mark.parametrize(
    ("score", "sparsity", "pattern", "message"),
    [
        (scores(4, 6), None, "2:4", "has 6 inputs, which the groups of 4 of the pattern 2:4 do"),
        (scores(4, 8), 0.3, "2:4", "the pattern 2:4 removes 0.5 of the weights, but sparsity is"),
        (scores(4, 8), None, "row", 'sparsity is missing; only "N:M" patterns fix it'),
        (scores(4, 8), 0.99, "row", "rounds to all 8 weights of a row; at least one must stay"),
        (scores(4, 8), 0.999, "layer", "rounds to all 32 weights of a layer"),
        (scores(4, 8), 0.5, "global", 'one weight has "layer"'),
        (scores(4, 8) / 0, 0.5, "layer", "has 32 entries that are NaN or infinite"),
        (torch.zeros(0, 4), 0.5, "layer", r"has shape \(0, 4\); only matrices are pruned"),
    ],
)
def test_masks_that_cannot_be(score, sparsity, pattern, message):
    with pytest.raises(ValueError, match=message):
        keep_mask(score, sparsity, pattern)


def test_allocations_that_do_not_fit():
    parts = {"a": scores(4, 8), "b": scores(4, 8, seed=1)}
    with pytest.raises(ValueError, match="the sparsity per layer has no layer b"):
        choose_masks(parts, {"a": 0.5}, "row")
    with pytest.raises(ValueError, match="names a layer that is not pruned: c"):
        choose_masks(parts, {"a": 0.5, "b": 0.5, "c": 0.5}, "row")
    with pytest.raises(ValueError, match="sparsity is 1.5"):
        choose_masks(parts, {"a": 0.5, "b": 1.5}, "row")
    with pytest.raises(ValueError, match="takes one sparsity, not one per layer"):
        choose_masks(parts, {"a": 0.5, "b": 0.5}, "global")
    with pytest.raises(ValueError, match="sparsity is given per layer; leave it out"):
        choose_masks(parts, {"a": 0.5, "b": 0.5}, "2:4")
    with pytest.raises(ValueError, match="would remove the whole layer b"):
        choose_masks({"a": parts["a"] + 9, "b": parts["b"]}, 0.6, "global")


# --- masks on models ------------------------------------------------------------------------------


def test_masks_are_applied_and_read_back(llama, ids):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    masks = {n: scores(*m.weight.shape, seed=i) > 0.5 for i, (n, m) in enumerate(
        linears(llama, "*.mlp.*").items()
    )}  # fmt: skip
    pruned = apply_masks(llama, masks)
    found = masks_of(pruned)
    for name, layer in linears(llama).items():
        new = pruned.get_submodule(name)
        assert type(new) is nn.Linear
        if name in masks:
            assert torch.equal(found[name], masks[name])
            assert torch.equal(new.weight, layer.weight * masks[name])
            assert new.weight.requires_grad and not new.weight.is_inference()
        else:
            assert new.weight is layer.weight
    assert pruned.model.embed_tokens.weight is llama.model.embed_tokens.weight
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])


def test_masks_travel_with_the_model(llama, tmp_path):
    """Through sharing, a file in Hugging Face's format, and quantization on either grid."""
    pruned = magnitude(llama, 0.6, pattern="row")
    expected = masks_of(pruned)
    pruned.save_pretrained(tmp_path)
    travelled = {
        "shared": share(pruned),
        "loaded": LlamaForCausalLM.from_pretrained(tmp_path),
    }
    for name, model in travelled.items():
        masks = masks_of(model)
        assert masks.keys() == expected.keys()
        assert all(torch.equal(masks[n], expected[n]) for n in masks), name
    for symmetric in (True, False):
        for group_size in ("row", 16):
            quantized = rtn(pruned, 4, group_size=group_size, symmetric=symmetric)
            for name, mask in masks_of(quantized).items():
                assert not (mask & ~expected[name]).any()  # every zero is still 0
                assert int(mask.sum()) > 0.5 * int(expected[name].sum())


def test_a_bias_is_shared_and_kept():
    layer = nn.Linear(8, 4)
    pruned = magnitude(nn.Sequential(layer), 0.5)
    assert pruned[0].bias is layer.bias


def test_a_frozen_weight_stays_frozen():
    layer = nn.Linear(8, 4).requires_grad_(False)
    assert not magnitude(nn.Sequential(layer), 0.5)[0].weight.requires_grad


def test_masks_made_while_evaluating_can_be_trained_on(llama, ids):
    """A panel evaluates in inference mode; what it pruned must still be good for training."""
    with torch.inference_mode():
        pruned = magnitude(llama, 0.5)
    pruned(ids).logits.sum().backward()
    assert pruned.model.layers[0].mlp.up_proj.weight.grad is not None


def test_masks_that_do_not_fit_the_model(llama):
    name = "model.layers.0.mlp.up_proj"
    mask = torch.ones(48, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="no linear layer 'model.norm'"):
        apply_masks(llama, {"model.norm": mask})
    with pytest.raises(ValueError, match="no linear layer 'nothing'"):
        apply_masks(llama, {"nothing": mask})
    with pytest.raises(ValueError, match=r"is \(32, 48\) of torch.bool; it must be \(48, 32\)"):
        apply_masks(llama, {name: mask.T})
    with pytest.raises(ValueError, match=r"of torch.float32; it must be"):
        apply_masks(llama, {name: mask.float()})
    with pytest.raises(ValueError, match="quantized already; prune the original"):
        apply_masks(rtn(llama, 4), {})
    with pytest.raises(ValueError, match="no linear layer that fits"):
        masks_of(nn.ReLU())


def test_summary():
    masks = {
        "a": torch.tensor([[True, False], [False, False]]),
        "b": torch.tensor([[True, True, False, True]]),
    }
    found = summarize(masks)
    assert found.layers == {"a": 0.75, "b": 0.25}
    assert (found.weights, found.kept, found.sparsity) == (8, 4, 0.5)
    assert (found.empty_rows, found.sparsest) == (1, "a")
    with pytest.raises(ValueError, match="no masks"):
        summarize({})


def test_following_a_pattern():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0]]).bool()
    assert follows(mask, "2:4") and follows(mask, "3:4") and not follows(mask, "1:4")
    assert follows(mask, "4:8") and not follows(mask[:, :6], "2:4")
    with pytest.raises(ValueError, match='only "N:M" can be checked'):
        follows(mask, "row")


# --- storage --------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=20)
def test_bits_come_back(n, seed):
    bits = torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_bits(bits)
    assert len(packed) == -(-n // 8) and torch.equal(unpack_bits(packed, n), bits)


def test_masks_in_a_file(llama, tmp_path):
    masks = masks_of(magnitude(llama, 0.3))
    path = tmp_path / "masks.safetensors"
    save_masks(masks, path)
    back = load_masks(path)
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[n], masks[n]) for n in masks)
    weights = sum(mask.numel() for mask in masks.values())
    assert weights / 8 <= path.stat().st_size < weights / 8 + 200 * len(masks)


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    form=st.sampled_from(["bitmap", "csr", "2:4", "1:4", "4:8", "3:4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_every_form_gives_the_weight_back(rows, groups, form, dtype, seed):
    weight = torch.randn(rows, 8 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    pattern = form if ":" in form else "layer"
    mask = keep_mask(weight.float().abs(), None if ":" in form else 0.6, pattern)
    if seed % 2:
        mask[:, :2] = False  # groups that keep fewer than they may
    weight = weight * mask
    stored = encode(weight, form)
    assert torch.equal(stored.decode(), weight)
    counted = mask_storage(weight != 0, bits=8 * weight.element_size())
    if form in ("bitmap", "csr", "2:4"):
        name = {"bitmap": "bitmap_bytes", "csr": "csr_bytes", "2:4": "two_four_bytes"}[form]
        assert stored.bytes == getattr(counted, name)


def test_wide_rows_take_wider_indices():
    weight = torch.zeros(2, 300)
    weight[1, 299] = 1.0
    stored = encode(weight, "csr")
    assert stored.bytes == 4 + 2 + 4 * 3 == mask_storage(weight != 0, 32).csr_bytes
    assert torch.equal(stored.decode(), weight)


def test_the_arithmetic_of_the_forms():
    """128 x 256 weights of 16 bits, half of them gone in 2:4."""
    mask = keep_mask(scores(128, 256), None, "2:4")
    n = 128 * 256
    found = mask_storage(mask, 16)
    assert found.dense_bytes == 2 * n
    assert found.bitmap_bytes == n // 8 + n  # 56.25 % of dense, as 2:4
    assert found.two_four_bytes == found.dense_bytes * 9 // 16
    assert found.csr_bytes == n // 2 * 3 + 4 * 129
    assert found.bytes == min(found.bitmap_bytes, found.two_four_bytes)
    assert mask_storage(mask, 8).two_four_bytes == n * 5 // 8
    assert mask_storage(mask, 4).two_four_bytes == n // 2 * 3 // 4


def test_zeros_pay_only_from_the_break_even_on():
    for sparsity, smallest in ((0.0, "dense"), (0.03, "dense"), (0.1, "bitmap"), (0.99, "csr")):
        mask = keep_mask(scores(64, 64), sparsity, "layer")
        assert mask_storage(mask, 16).smallest == smallest
    at = keep_mask(scores(64, 64), 1 / 16, "layer")
    assert mask_storage(at, 16).bitmap_bytes == mask_storage(at, 16).dense_bytes


def test_storage_of_a_model(llama):
    half = magnitude(llama, pattern="2:4")
    found = storage_of(half, 32)
    dense = sum(m.weight.numel() * 4 for m in linears(llama).values())
    assert found.dense_bytes == dense and found.two_four_bytes == dense * 34 // 64
    encoded = encode_model(half, "2:4")
    assert sum(e.bytes for e in encoded.values()) == found.two_four_bytes
    assert all(torch.equal(e.decode(), half.get_submodule(n).weight) for n, e in encoded.items())
    assert stored_bytes(half) == stored_bytes(llama)  # kept dense, zeros take what they took
    assert storage_of(magnitude(llama, 0.5), 32).two_four_bytes is None


def test_forms_that_do_not_fit(llama):
    with pytest.raises(ValueError, match="keeps more than 2 of some 4"):
        encode(torch.ones(2, 8), "2:4")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the weight keeps more"):
        encode_model(llama, "2:4")
    with pytest.raises(ValueError, match='must be "bitmap", "csr" or "N:M"'):
        encode(torch.ones(2, 8), "row")
    with pytest.raises(ValueError, match="bits is 0"):
        mask_storage(torch.ones(2, 8, dtype=torch.bool), 0)
