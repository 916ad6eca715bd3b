"""AWQ: the search against direct computation, the folding against the unscaled model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from effnb.core.calibration import Calibration
from effnb.core.folding import find_folds, fold_scales
from effnb.core.modules import Layers, linears
from effnb.core.outliers import inject_outliers
from effnb.inference.quantization import QuantizedLinear, quantize, rtn
from effnb.inference.quantization.awq import (
    awq,
    awq_clip,
    awq_scales,
    output_error,
    search_scales,
)


def layer(rows=24, columns=48, tokens=200, seed=0):
    """A weight and inputs of which a few are much stronger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, ::12] *= 20
    return torch.randn(rows, columns, generator=generator), x


def rounded(weight, bits, group_size):
    return quantize(weight, bits, group_size=group_size).dequantize()


# The search.


def test_search_tries_powers_of_the_magnitude():
    tried = []
    magnitude = torch.tensor([1.0, 4.0, 16.0])

    def loss(scales):
        tried.append(scales)
        return abs(float(scales[2]) - 2)

    search = search_scales(magnitude, loss, grid=4)
    assert len(tried) == len(search.losses) == 4  # r = 0, 1/4, 1/2, 3/4, and never 1
    for step, scales in enumerate(tried):
        torch.testing.assert_close(scales, magnitude ** (step / 4) / 4 ** (step / 4))
    assert search.exponent == 0.5 and torch.equal(search.scales, tried[2])


def test_search_with_dead_channels_and_ties():
    search = search_scales(torch.tensor([0.0, 1.0, 100.0]), lambda s: 1.0, grid=20)
    assert search.exponent == 0 and torch.equal(search.scales, torch.ones(3))
    last = search_scales(torch.tensor([0.0, 1.0, 100.0]), lambda s: -float(s.max()), grid=20)
    assert torch.isfinite(last.scales).all() and float(last.scales.min()) > 0
    assert float(last.scales.max() * last.scales.min()) == pytest.approx(1)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 40), st.integers(2, 8), st.booleans())
def test_scales_by_the_layer_s_own_output(rows, columns, group_size, bits, symmetric):
    weight, x = layer(rows, columns, tokens=30)
    search = awq_scales(weight, x, bits, group_size=group_size, symmetric=symmetric, grid=5)
    magnitude = x.abs().mean(0)
    for step, found in enumerate(search.losses):
        s = magnitude.pow(step / 5)
        s = s / (s.max() * s.min()).sqrt()
        new = quantize(weight * s, bits, group_size=group_size, symmetric=symmetric).dequantize()
        direct = ((x / s) @ new.T - x @ weight.T).square().mean()
        assert found == pytest.approx(float(direct), rel=1e-3)
    assert min(search.losses) == search.losses[round(search.exponent * 5)]


@pytest.mark.parametrize("seed", range(3))
def test_strong_inputs_get_large_scales_and_the_error_falls(seed):
    """One input channel times 60, three bits in groups of 64: below a quarter of the error."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 256, generator=generator)
    x[:, 7] *= 60
    weight = torch.randn(256, 256, generator=generator) / 16
    search = awq_scales(weight, x, 3, group_size=64)
    assert 0.4 <= search.exponent <= 0.5
    assert 0.15 < min(search.losses) / search.losses[0] < 0.21
    ratio = x[:, 7].abs().mean() / x[:, 8].abs().mean()
    expected = float(ratio) ** search.exponent
    assert float(search.scales[7] / search.scales[8]) == pytest.approx(expected, rel=1e-3)


def test_output_error_is_the_mean_over_tokens():
    weight, x = layer()
    change = weight * 0.1
    expected = (x @ change.T).square().mean(0)
    torch.testing.assert_close(output_error(change, 2 / len(x) * x.T @ x), expected)


# Clipping.


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 30), st.one_of(st.just("row"), st.integers(1, 40)))
def test_clipping_against_direct_computation(rows, columns, group_size):
    weight, x = layer(rows, columns, tokens=40)
    found = awq_clip(weight, 2 / len(x) * x.T @ x, 3, group_size=group_size)
    size = columns if group_size == "row" else group_size
    for row in range(rows):
        for start in range(0, columns, size):
            w, inputs = weight[row, start : start + size], x[:, start : start + size]
            errors = {}
            for step in range(10):
                limit = w.abs().max() * (1 - step / 20)
                new = rounded(w.clamp(-limit, limit)[None], 3, "row")[0]
                errors[float(limit)] = float((inputs @ (new - w)).square().mean())
            clipped = found[row, start : start + size]
            chosen = min(errors, key=lambda limit: abs(limit - float(clipped.abs().max())))
            torch.testing.assert_close(clipped, w.clamp(-chosen, chosen))
            assert errors[chosen] <= min(errors.values()) * 1.001 + 1e-9


def test_clipping_helps_where_one_weight_sticks_out():
    weight, x = layer()
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    weight[:, 5] = 6
    hessian = 2 / len(x) * x.T @ x
    clipped = awq_clip(weight, hessian, 2, group_size="row")
    assert float(clipped[:, 5].max()) < 6
    before, after = (
        output_error(rounded(w, 2, "row") - weight, hessian).mean() for w in (weight, clipped)
    )
    assert float(after) < 0.9 * float(before)


# Whole models.


def relative(model, new, ids):
    with torch.no_grad():
        truth = model(ids).logits
        return float((new(ids).logits - truth).norm() / truth.norm())


def test_without_scales_and_clipping_it_rounds_to_nearest(llama, ids):
    new, expected = (
        awq(llama, ids, 3, group_size=16, grid=1, clip=False),
        rtn(llama, 3, group_size=16),
    )
    for name in linears(llama):
        assert torch.equal(new.get_submodule(name).weight, expected.get_submodule(name).weight)
    for name, parameter in llama.named_parameters():
        if "norm" in name:
            assert torch.equal(new.get_parameter(name), parameter)


@pytest.mark.parametrize("heads", [2, 4])
def test_scales_are_folded_and_the_function_stays(tiny_llama, ids, heads):
    """With the quantizer taken away the scaled model equals the original to 1e-10 in float64."""
    model = tiny_llama(num_key_value_heads=heads, num_hidden_layers=2)
    searches = {}
    new = awq(model, ids, 3, group_size=16, grid=8, clip=False, report=searches.__setitem__)
    parts = ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]
    parts += ["self_attn.v_proj"] * (heads == 4)  # only as many value as query channels fit
    assert set(searches) == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}
    assert any(search.exponent > 0 for search in searches.values())

    folded, exact = model, model.double()
    for fold in find_folds(model, ids[:1]):
        folded = fold_scales(folded, fold, searches[fold.source].scales)
        exact = fold_scales(exact, fold, searches[fold.source].scales.double())
    with torch.no_grad():
        torch.testing.assert_close(exact(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
    expected = rtn(folded.float(), 3, group_size=16)
    for name in linears(folded):
        found, wanted = new.get_submodule(name).weight, expected.get_submodule(name).weight
        assert (
            float((found - wanted).abs().max()) < 1e-3
            or float((found == wanted).float().mean()) > 0.99
        )
    for name, parameter in folded.named_parameters():
        if "norm" in name:
            torch.testing.assert_close(new.get_parameter(name), parameter.float())


def test_query_key_and_value_are_judged_by_the_attention_s_output(llama, ids):
    searches, kept = {}, []
    awq(
        llama, Calibration(ids, batch_size=3), 3, group_size=16, grid=4, report=searches.__setitem__
    )
    attention = llama.model.layers[0].self_attn
    hook = attention.register_forward_hook(
        lambda m, a, k, out: kept.append((k, out[0])), with_kwargs=True
    )
    with torch.no_grad():
        llama(ids, use_cache=False)
        hook.remove()
        keywords, truth = kept[0]
        magnitude = keywords["hidden_states"].abs().mean((0, 1))
        originals = {n: getattr(attention, n).weight for n in ("q_proj", "k_proj", "v_proj")}
        for step, found in enumerate(searches["model.layers.0.input_layernorm"].losses):
            s = magnitude.pow(step / 4)
            s = s / (s.max() * s.min()).sqrt()
            for name, weight in originals.items():
                new = rounded(weight * s, 3, 16) / s
                getattr(attention, name).weight = nn.Parameter(new)
            direct = (attention(**keywords)[0] - truth).square().mean()
            assert found == pytest.approx(float(direct), rel=1e-3)


def test_padding_does_not_count(llama, ids):
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    padded, short = {}, {}
    batch = [{"input_ids": ids, "attention_mask": mask}]
    awq(llama, batch, 3, group_size=16, grid=3, layers="*.0.*", report=padded.__setitem__)
    awq(llama, ids[:, :12], 3, group_size=16, grid=3, layers="*.0.*", report=short.__setitem__)
    for name, search in short.items():
        assert padded[name].losses == pytest.approx(search.losses, rel=1e-3)


def test_everything_but_queries_and_keys_is_clipped(llama, ids):
    scaled = awq(llama, ids, 3, group_size=16, grid=3, clip=False, layers="*.0.*")
    clipped = awq(llama, ids, 3, group_size=16, grid=3, layers="*.0.*")
    same = {
        name.split(".")[-1]
        for name in linears(llama, "*.0.*")
        if torch.equal(scaled.get_submodule(name).codes, clipped.get_submodule(name).codes)
    }
    assert same == {"q_proj", "k_proj"}
    everything = awq(llama, ids, 3, group_size=16, grid=3, layers="*.0.*", unclipped=())
    q = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(everything.get_submodule(q).codes, clipped.get_submodule(q).codes)


def test_invariant_to_outliers_that_ruin_rounding_to_nearest(tiny_llama, ids):
    """Eight of 32 channels times 16, undone in the weights: the same function."""
    llama = tiny_llama(num_hidden_layers=2)
    injected = inject_outliers(llama, range(0, 32, 4), 16)
    assert relative(llama, injected, ids) < 1e-4
    near = relative(llama, rtn(llama, 4, group_size=16), ids)
    near_injected = relative(llama, rtn(injected, 4, group_size=16), ids)
    assert near_injected > 3 * near
    aware = relative(llama, awq(llama, ids, 4, group_size=16), ids)
    aware_injected = relative(llama, awq(injected, ids, 4, group_size=16), ids)
    assert aware_injected < 1.15 * aware
    assert aware_injected < 0.4 * near_injected


def test_the_original_is_untouched_and_the_rest_shared(llama, ids):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    steps = []
    new = awq(
        llama, Calibration(ids, progress=lambda *step: steps.append(step)), 4, group_size=16, grid=3
    )
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert new.model.norm.weight is llama.model.norm.weight
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert sum(isinstance(m, QuantizedLinear) for m in new.modules()) == 21
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in new.modules())


def test_a_layer_that_is_not_wanted_takes_the_scales_of_its_neighbours(llama, ids):
    new = awq(llama, ids, 8, group_size=16, grid=5, layers="*.q_proj")
    norms = {n: p for n, p in llama.named_parameters() if "norm" in n}
    changed = [n for n, p in norms.items() if not torch.equal(p, new.get_parameter(n))]
    assert changed == [f"model.layers.{i}.input_layernorm.weight" for i in range(3)]
    value = new.model.layers[0].self_attn.v_proj
    assert type(value) is nn.Linear
    assert not torch.equal(value.weight, llama.model.layers[0].self_attn.v_proj.weight)
    assert relative(llama, new, ids) < 0.02


def test_where_nothing_folds_it_clips_and_rounds():
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=24, max_position_embeddings=16)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 50, (4, 8))
    searches = {}
    new = awq(
        encoder,
        ids,
        8,
        group_size=8,
        grid=5,
        report=searches.__setitem__,
        layers=Layers(exclude="pooler*"),
    )
    assert {n.split(".")[-1] for n in searches} == {"value"}
    query = new.encoder.layer[0].attention.self.query
    plain = quantize(encoder.encoder.layer[0].attention.self.query.weight, 8, group_size=8)
    assert torch.equal(query.weight, plain.dequantize())
    with torch.no_grad():
        truth, found = encoder(ids)[0], new(ids)[0]
    assert float((truth - found).norm() / truth.norm()) < 0.01


def test_a_block_that_is_used_twice_is_scaled_once(llama, ids):
    llama.config.use_cache = False
    llama.model.layers[2] = llama.model.layers[1]
    new = awq(llama, ids, 8, group_size=16, grid=3)
    assert new.model.layers[2] is new.model.layers[1]
    assert relative(llama, new, ids) < 0.05


def test_half_precision(llama, ids):
    new = awq(llama.to(torch.bfloat16), ids, 4, group_size=16, grid=3)
    assert new.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    assert new(ids).logits.dtype == torch.bfloat16 and relative(llama, new, ids) < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=9), "bits is 9"),
        (dict(group_size=0), "group_size is 0"),
        (dict(group_size="tensor"), "AWQ chooses ranges row by row"),
        (dict(grid=0), "grid is 0; at least one exponent"),
        (dict(weight=torch.full((3, 4), torch.inf)), "12 entries that are NaN or infinite"),
        (dict(inputs=torch.randn(6, 5)), r"shape \(6, 5\); it must be \(tokens, 4\)"),
        (dict(inputs=torch.randn(0, 4)), r"shape \(0, 4\)"),
        (dict(inputs=torch.full((6, 4), torch.nan)), "inputs has 24 entries"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    given = dict(weight=torch.randn(3, 4), inputs=torch.randn(6, 4), bits=4) | change
    with pytest.raises(ValueError, match=message):
        awq_scales(**given)


def test_bad_hessians_are_one_sentence():
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"shape \(5, 5\); a weight of 4 inputs needs \(4, 4\)"):
        awq_clip(weight, torch.eye(5), 4)
    with pytest.raises(ValueError, match="the Hessian has 16 entries"):
        awq_clip(weight, torch.full((4, 4), math.nan), 4)


def test_bad_models_are_one_sentence(llama, ids):
    with pytest.raises(ValueError, match="calibration data is empty"):
        awq(llama, [], 4)
    with pytest.raises(ValueError, match="90 tokens; the model's context is 64"):
        awq(llama, torch.zeros(1, 90, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="bits is 1;"):
        awq(llama, ids, 1)
    with pytest.raises(ValueError, match="no linear layer inside the blocks"):
        awq(llama, ids, 4, layers="nothing")
    with pytest.raises(ValueError, match="quantized already"):
        awq(rtn(llama, 4, layers="*.0.*"), ids, 4)
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj: the weight has 1 entries"):
        awq(llama, ids, 4)
