"""The factorised layer, what it saves, and which layers become one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.modules import Layers, linears
from effnb.evaluation import flops, parameter_count, stored_bytes
from effnb.finetuning import lora
from effnb.inference.low_rank import (
    LowRankLinear,
    break_even_rank,
    rank_for,
    ranks_of,
    svd,
    truncated_svd,
)
from effnb.inference.quantization import QuantizedLinear, gptq, rtn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- arithmetic -----------------------------------------------------------------------------------


def test_break_even_rank():
    assert break_even_rank(64, 96) == pytest.approx(38.4)
    assert break_even_rank(128, 128) == 64  # half the width: "rank 50 %" saves nothing
    assert break_even_rank(4 * 100, 100) == pytest.approx(80)


@settings(max_examples=30)
@given(st.integers(2, 300), st.integers(2, 300), st.floats(0.01, 1.0))
def test_the_rank_for_a_part_is_the_largest_that_fits(m, n, kept):
    rank = rank_for(kept, m, n)
    assert rank == 1 or rank * (m + n) <= kept * m * n + 1e-6
    assert (rank + 1) * (m + n) > kept * m * n - 1e-6
    assert rank <= min(m, n)


def test_whole_ranks_are_not_lost_to_rounding():
    for rank in range(1, 39):
        assert rank_for(rank * (64 + 96) / (64 * 96), 64, 96) == rank


# --- the layer ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
    st.data(),
)
def test_the_layer_computes_its_product(m, n, batch, bias, data):
    rank = data.draw(st.integers(1, min(m, n)))
    b = randn(m, seed=3) if bias else None
    layer = LowRankLinear(randn(m, rank), randn(rank, n, seed=1), b)
    x = randn(*batch, n, seed=2)
    expected = nn.functional.linear(x, randn(m, rank) @ randn(rank, n, seed=1), b)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense()(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.rank == rank


def test_it_costs_what_its_factors_cost():
    """r (m + n) numbers and as many multiplications, with the bias on top."""
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    new = svd(model, rank=10)
    assert parameter_count(new) == 10 * (64 + 96) + 64
    assert stored_bytes(new) == 4 * (10 * (64 + 96) + 64)
    x = randn(7, 96)
    assert flops(lambda: new(x)) == 2 * 7 * 10 * (64 + 96)
    assert flops(lambda: new(x)) / flops(lambda: model(x)) == pytest.approx(10 / 38.4)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 5\) have no product"):
        LowRankLinear(torch.ones(4, 2), torch.ones(3, 5))


# --- models ---------------------------------------------------------------------------------------


def test_layers_become_their_truncations(llama, ids):
    new = svd(llama, 0.5)
    assert ranks_of(new).keys() == linears(llama).keys()
    for name, rank in ranks_of(new).items():
        W = llama.get_submodule(name).weight
        assert rank == math.floor(0.5 * W.numel() / sum(W.shape))
        torch.testing.assert_close(
            new.get_submodule(name).weight, truncated_svd(W, rank).product().float()
        )
    assert new(ids).logits.shape == llama(ids).logits.shape


def test_the_rest_is_shared_and_the_original_untouched(llama, ids):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    new = svd(llama, rank=4)
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert new.lm_head.weight is llama.lm_head.weight  # a head is left alone
    new(ids).logits.sum().backward()
    assert all(p.grad is not None for n, p in new.named_parameters() if n.endswith(".u.weight"))
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_bias_is_shared_and_not_factorised():
    layer = nn.Linear(16, 12)
    new = svd(nn.Sequential(layer), rank=6)[0]
    assert new.bias is layer.bias
    x = randn(3, 16)
    expected = x @ truncated_svd(layer.weight, 6).product().float().T + layer.bias
    torch.testing.assert_close(new(x), expected)


def test_above_break_even_a_layer_stays_dense(llama):
    """q: 32 x 32, break-even 16; k: 16 x 32, 10.7; gate: 48 x 32, 19.2."""
    new = svd(llama, rank=16)
    assert {name.rpartition(".")[2] for name in ranks_of(new)} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    kept = new.model.layers[0].self_attn.q_proj
    assert kept.weight is llama.model.layers[0].self_attn.q_proj.weight
    assert parameter_count(new) < parameter_count(llama)


def test_unless_asked_otherwise(llama, ids):
    """At full rank the function is the same, and the model is larger."""
    new = svd(llama, rank=32, always=True)
    ranks = ranks_of(new)
    assert ranks["model.layers.0.self_attn.q_proj"] == 32
    assert ranks["model.layers.0.self_attn.k_proj"] == 16  # its own full rank
    assert parameter_count(new) > parameter_count(llama)
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, llama(ids).logits, rtol=1e-3, atol=1e-3)


def test_all_kept_is_the_model_itself(llama):
    assert ranks_of(svd(llama, 1.0)) == {}
    assert ranks_of(svd(llama, 1.0, always=True))["model.layers.0.self_attn.q_proj"] == 16


def test_ranks_by_name(llama):
    wanted = {"model.layers.2.mlp.up_proj": 3, "model.layers.0.self_attn.q_proj": 5}
    assert ranks_of(svd(llama, rank=wanted)) == wanted


def test_patterns(llama):
    assert len(ranks_of(svd(llama, 0.5, layers=Layers("*.mlp.*", "*.down_proj")))) == 6
    untied = svd(llama, 0.5, layers=Layers("lm_head", ()))
    assert list(ranks_of(untied)) == ["lm_head"]


def test_more_rank_less_error(llama, ids):
    with torch.no_grad():
        truth = llama(ids).logits
        errors = [
            float((svd(llama, k, always=True)(ids).logits - truth).norm())
            for k in (0.1, 0.3, 0.6, 1.0)
        ]
    assert errors == sorted(errors, reverse=True)


def test_types_and_trainability_stay(llama, ids):
    half = svd(llama.to(torch.bfloat16).requires_grad_(False), 0.5)
    layer = half.model.layers[0].mlp.up_proj
    assert layer.u.weight.dtype == torch.bfloat16
    assert not layer.u.weight.requires_grad
    assert half(ids).logits.dtype == torch.bfloat16


# --- with other methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [rtn, lambda m, b: gptq(m, torch.randint(1, 128, (4, 24)), b)])
def test_factors_are_quantized_as_any_linear_layers(llama, ids, method):
    new = svd(llama, 0.5)
    packed = method(new, 8)
    layer = packed.model.layers[1].mlp.gate_proj
    assert isinstance(layer, LowRankLinear)
    assert isinstance(layer.u, QuantizedLinear) and isinstance(layer.v, QuantizedLinear)
    assert parameter_count(packed) == parameter_count(new)
    assert stored_bytes(packed) < 0.6 * stored_bytes(new)
    assert ranks_of(packed) == ranks_of(new)
    with torch.no_grad():
        a, b = packed(ids).logits, new(ids).logits
    assert float((a - b).norm()) < 0.1 * float(b.norm())


def test_lora_sits_on_the_factors_and_merges_into_them(llama, ids):
    new = svd(llama, 0.5)
    tuned = lora.attach(new, "a", rank=2)
    assert len(lora.hosts(tuned)) == 2 * len(ranks_of(new))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.1)
        merged = lora.merge(tuned, "a")
        assert ranks_of(merged) == ranks_of(new)
        assert parameter_count(merged) == parameter_count(new)
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, new(ids).logits, atol=1e-2)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give either kept or rank"),
        ({"kept": 0.5, "rank": 4}, "give either kept or rank"),
        ({"kept": 0.0}, "kept is 0.0; it is the part of the parameters that stay"),
        ({"kept": -0.5}, "above 0 and at most 1"),
        ({"kept": 1.5}, "above 0 and at most 1"),
        ({"kept": math.nan}, "kept is nan"),
        ({"rank": 0}, "rank is 0; it must lie between 1 and the full rank, 32"),
        ({"rank": 33}, "rank is 33; it must lie between 1 and the full rank, 32"),
        ({"rank": {"model.layers.9.mlp.up_proj": 3}}, r"layers\.9.*none of the layers"),
        ({"rank": {"model.layers.0.mlp.up_proj": 99}}, r"up_proj: rank is 99; it must lie"),
        ({"kept": 0.5, "layers": "nothing"}, "no Linear fits the pattern nothing"),
    ],
)
def test_bad_settings_are_one_sentence(llama, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        svd(llama, **options)


def test_a_rank_is_a_whole_number(llama):
    with pytest.raises(TypeError, match="rank is True; it must be a whole number"):
        svd(llama, rank=True)


def test_a_quantized_model_is_refused(llama):
    with pytest.raises(ValueError, match="quantized already; factorise the original"):
        svd(rtn(llama, 8), 0.5)


def test_a_factorised_layer_is_refused(llama):
    once = svd(llama, 0.5, layers="*.mlp.*")
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.v is part of a layer that is fact"):
        svd(once, 0.5)
    both = svd(once, 0.5, layers="*.self_attn.*")
    assert len(ranks_of(both)) == 21


def test_weights_that_are_not_finite_are_refused(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the weight has 2 entries"):
        svd(llama, 0.5)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, 2)])
def test_only_matrices(weight):
    with pytest.raises(ValueError, match="only non-empty matrices"):
        truncated_svd(weight, 1)
