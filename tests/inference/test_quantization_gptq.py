"""GPTQ against the closed forms it rests on, and against a plain form of the same recursion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.calibration import Calibration, Hessian, layerwise
from effnb.core.hessian import damp_hessian
from effnb.core.modules import Layers, linears
from effnb.inference.quantization import QuantizedLinear, quantize, rtn
from effnb.inference.quantization.clipping import choose_grid, round_to_grid
from effnb.inference.quantization.gptq import gptq, gptq_columns, gptq_weight, invert_hessian
from effnb.inference.quantization.grid import Grid


def layer(rows=24, columns=96, tokens=400, seed=0):
    """A weight and correlated inputs of different strength, two of them large."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(tokens, columns) + randn(tokens, 8) @ randn(8, columns)
    x = x * (randn(columns).exp() / 2)
    x[:, :2] *= 5
    return randn(rows, columns), x


def hessian_of(x):
    return 2 / len(x) * x.T @ x


def plain(weight, hessian, bits, group_size="row", *, symmetric=False, order=None, static=False):
    """Optimal Brain Quantization in a fixed order: invert once, remove one input after another."""
    w = weight.clone()
    damped, dead = damp_hessian(hessian)
    w[:, dead] = 0
    inverse = torch.linalg.inv(damped)
    columns = w.shape[1]
    size = group_size if isinstance(group_size, int) else columns
    order = list(range(columns)) if order is None else order
    original, result = w.clone(), torch.zeros_like(w)
    grids = {}
    for place, i in enumerate(order):
        group = i // size if static else place // size
        if group not in grids:
            if group_size == "tensor":
                chosen = original.reshape(1, -1)
            elif static or group_size == "row":
                chosen = original[:, group * size : (group + 1) * size]
            else:
                chosen = w[:, order[place : place + size]]
            grids[group] = choose_grid(chosen, Grid(bits, symmetric=symmetric))
        scale, zero = grids[group]
        code = round_to_grid(w[:, i], scale, zero, bits)
        result[:, i] = scale * (code if zero is None else code - zero)
        w -= torch.outer((w[:, i] - result[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


SETTINGS = [
    dict(),
    dict(symmetric=True),
    dict(group_size="tensor"),
    dict(group_size=32),
    dict(group_size=20),  # the last group has 16
    dict(group_size=20, static_groups=True),
    dict(act_order=True),
    dict(group_size=20, act_order=True),
    dict(group_size=20, act_order=True, static_groups=True, symmetric=True),
    dict(group_size=1),
    dict(group_size=200),
]


def name_of(setting):
    return ",".join(f"{k}={v}" for k, v in setting.items()) or "default"


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_equals_the_plain_recursion(setting):
    weight, x = layer()
    x[:, 11] = 0  # a dead input
    hessian = hessian_of(x)
    options = dict(setting)
    order = None
    if options.pop("act_order", False):
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    group_size = options.pop("group_size", "row")
    static = options.pop("static_groups", False)
    expected = plain(weight, hessian, 3, group_size, order=order, static=static, **options)
    found = gptq_weight(weight, hessian, 3, **setting)
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=0, atol=0)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_the_error_is_known_exactly(setting):
    r"""$\sum \lVert e_i \rVert^2 = tr(\Delta W H_d \Delta W^T)$: any wrong update breaks it."""
    weight, x = layer()
    hessian = hessian_of(x)
    options = dict(setting)
    inverse = invert_hessian(hessian, act_order=options.pop("act_order", False))
    static_groups = options.pop("static_groups", False)
    grid = Grid(3, **options)
    result = gptq_columns(weight, inverse, grid, static_groups=static_groups, block_size=40)
    change = weight - result.tensor.dequantize(torch.float64)
    damped, _ = damp_hessian(hessian)
    assert result.error == pytest.approx(float((change @ damped * change).sum()), rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_the_block_size_changes_nothing(setting):
    weight, x = layer()
    results = [
        gptq_weight(weight, hessian_of(x), 3, block_size=size, **setting).dequantize()
        for size in (1, 7, 32, 96, 128)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_without_correlations_it_rounds_to_nearest(setting):
    weight = layer()[0].float()
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    found = gptq_weight(weight, diagonal.diag(), 3, **setting)
    simple = {k: v for k, v in setting.items() if k in ("group_size", "symmetric")}
    if setting.get("act_order") and "group_size" in setting and "static_groups" not in setting:
        order = diagonal.argsort(descending=True)
        assert torch.equal(found.order.long(), order)
        expected = quantize(weight[:, order], 3, **simple).dequantize()[:, order.argsort()]
    else:
        assert found.order is None
        expected = quantize(weight, 3, **simple).dequantize()
    assert torch.equal(found.dequantize(), expected)


@settings(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(2, 8), st.integers(1, 45),
    st.integers(1, 50), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(rows, columns, bits, group_size, block_size, symmetric, act_order, static):
    weight, x = layer(rows, columns, tokens=60)
    hessian = hessian_of(x)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    found = gptq_weight(
        weight, hessian, bits, group_size=group_size, symmetric=symmetric, act_order=act_order,
        static_groups=static, block_size=block_size,
    )  # fmt: skip
    assert found.shape == (rows, columns) and found.bits == bits
    expected = plain(
        weight, hessian, bits, group_size, symmetric=symmetric, static=static,
        order=None if order is None else order.tolist(),
    )  # fmt: skip
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=0, atol=0)


def test_weights_further_away_and_outputs_nearer():
    weight, x = layer(rows=64)
    exact = x @ weight.T

    def errors(quantized):
        w = quantized.dequantize(torch.float64)
        return float((w - weight).square().mean()), float((x @ w.T - exact).norm() / exact.norm())

    simple_weight, simple_output = errors(quantize(weight, 3))
    weight_error, output_error = errors(gptq_weight(weight, hessian_of(x), 3))
    assert simple_output == pytest.approx(0.2050, rel=0.01)
    assert weight_error > 2.5 * simple_weight
    assert output_error < 0.45 * simple_output  # a fifth of the squared error


def test_act_order_helps_where_inputs_differ_in_strength():
    weight, x = layer(rows=64)
    weak_first = hessian_of(x).diagonal().argsort()
    weight, x = weight[:, weak_first], x[:, weak_first]

    def error(**options):
        w = gptq_weight(weight, hessian_of(x), 3, **options).dequantize(torch.float64)
        return float((x @ (w - weight).T).norm())

    assert error(act_order=True) < 0.9 * error()


def test_clipped_grids():
    weight, x = layer()
    simple = quantize(weight.float(), 2, clip="mse", exponent=2.4)
    grid_only = gptq_weight(weight.float(), torch.eye(96), 2, clip="mse")
    assert torch.equal(grid_only.dequantize(), simple.dequantize())
    clipped = gptq_weight(weight, hessian_of(x), 2, clip="mse")
    torch.testing.assert_close(clipped.scales, simple.scales, rtol=2e-3, atol=0)
    assert not torch.equal(clipped.scales, gptq_weight(weight, hessian_of(x), 2).scales)


def test_dead_inputs_get_zero_weights():
    weight, x = layer()
    x[:, [3, 50]] = 0
    weight[:, 3] = 1000  # and must not widen the grid
    found = gptq_weight(weight, hessian_of(x), 4, act_order=True, group_size=24)
    assert float(found.dequantize()[:, [3, 50]].abs().max()) == 0
    rest = [i for i in range(96) if i not in (3, 50)]
    error = (found.dequantize(torch.float64) - weight)[:, rest].abs().max()
    assert float(error) < 2


def test_the_hessian_s_scale_does_not_matter_and_arguments_stay():
    weight, x = layer()
    hessian = hessian_of(x)
    copies = weight.clone(), hessian.clone()
    a = gptq_weight(weight, hessian, 4).dequantize()
    b = gptq_weight(weight, 1024 * hessian, 4).dequantize()
    assert torch.equal(a, b)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


# Whole models.


def hessians(model, ids, **options):
    found = {}
    layerwise(
        model,
        ids,
        lambda n, m: Hessian(m.in_features),
        lambda n, m, o: found.__setitem__(n, o.value),
        **options,
    )
    return found


def output_error(model, new, ids):
    with torch.no_grad():
        truth = model(ids).logits
        return float((new(ids).logits - truth).norm() / truth.norm())


def test_each_layer_is_rounded_by_its_own_inputs(llama, ids):
    new = gptq(llama, Calibration(ids, batch_size=3), 3, group_size=16)
    first = hessians(llama, Calibration(ids, batch_size=3), layers="*.0.*")
    for name, layer in linears(llama).items():
        module = new.get_submodule(name)
        assert isinstance(module, QuantizedLinear) and module.quantized.bits == 3
        if name in first:
            expected = gptq_weight(layer.weight, first[name], 3, group_size=16)
            assert torch.equal(module.weight, expected.dequantize())
    # What the last block was calibrated on is what the finished model gives it.
    name = "model.layers.2.self_attn.q_proj"
    seen = []
    hook = new.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        new(ids)
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    weight = llama.get_submodule(name).weight
    expected = gptq_weight(weight, 2 / len(x) * x.T @ x, 3, group_size=16).dequantize()
    agree = (expected == new.get_submodule(name).weight).float().mean()
    assert float(agree) > 0.99  # not all: the two ways to sum H differ in rounding


def test_better_than_rounding_to_nearest(llama, ids):
    for options in ({}, dict(group_size=16), dict(symmetric=True), dict(act_order=True)):
        simple = {k: v for k, v in options.items() if k != "act_order"}
        near = output_error(llama, rtn(llama, 5, **simple), ids)
        assert output_error(llama, gptq(llama, ids, 5, **options), ids) < 0.85 * near, options


def test_true_sequential_lets_layers_see_the_rounded_ones_before(llama, ids):
    plainly, truly = gptq(llama, ids, 3), gptq(llama, ids, 3, true_sequential=True)
    same = {
        name.split("layers.")[1]
        for name in linears(llama)
        if torch.equal(plainly.get_submodule(name).codes, truly.get_submodule(name).codes)
    }
    assert same == {f"0.self_attn.{n}_proj" for n in "qkv"}


def test_the_original_is_untouched_and_the_rest_shared(llama, ids):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    new = gptq(llama, ids, 2)
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    assert new.model.norm.weight is llama.model.norm.weight
    assert new.lm_head.weight is llama.lm_head.weight
    assert not any(m._forward_pre_hooks for m in (*llama.modules(), *new.modules()))


def test_report_and_progress(llama, ids):
    results, steps = {}, []
    gptq(
        llama,
        Calibration(ids, progress=lambda *step: steps.append(step)),
        4,
        report=results.__setitem__,
    )
    assert set(results) == set(linears(llama)) and steps == [(1, 3), (2, 3), (3, 3)]
    assert all(r.error > 0 and r.seconds > 0 for r in results.values())


def test_patterns(llama, ids):
    new = gptq(llama, ids, 4, layers=Layers("*.mlp.*", "*.1.*"))
    found = {n for n, m in new.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == {
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 2) for n in ("gate", "up", "down")
    }


def test_layers_that_no_token_reaches_are_rounded_to_nearest(llama, ids):
    llama.model.layers[1].spare = nn.Linear(16, 4)
    new = gptq(llama, ids, 4, group_size=8)
    expected = quantize(llama.model.layers[1].spare.weight, 4, group_size=8)
    assert torch.equal(new.model.layers[1].spare.weight, expected.dequantize())
    assert new.model.layers[1].spare.bias is llama.model.layers[1].spare.bias


def test_a_block_that_is_used_twice_is_rounded_once(llama, ids):
    llama.config.use_cache = False
    llama.model.layers[2] = llama.model.layers[1]
    new = gptq(llama, ids, 4, group_size=16)
    assert new.model.layers[2] is new.model.layers[1]
    layer = llama.model.layers[1].self_attn.q_proj
    seen = []  # the inputs of both uses decide
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        llama(input_ids=ids)
    hook.remove()
    assert len(seen) == 2
    X = torch.cat(seen)
    expected = gptq_weight(layer.weight, 2 / len(X) * X.T @ X, 4, group_size=16)
    found = new.model.layers[2].self_attn.q_proj.weight
    assert float((found == expected.dequantize()).float().mean()) > 0.99


def test_half_precision_and_padding(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    new = gptq(llama.to(torch.bfloat16), [{"input_ids": ids, "attention_mask": mask}], 4)
    assert new(ids).logits.dtype == torch.bfloat16
    assert output_error(llama, new, ids) < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=9), "bits is 9; the uniform formats have 2 to 8 bits"),
        (dict(bits=1), "bits is 1"),
        (dict(group_size=0), "group_size is 0"),
        (dict(block_size=0), "block_size is 0; it must be a whole number from 1"),
        (dict(damping=-1.0), "damping is -1.0"),
        (dict(clip="best"), "clip is 'best'"),
        (dict(weight=torch.ones(3)), "only non-empty matrices"),
        (dict(weight=torch.full((3, 4), torch.nan)), "12 entries that are NaN or infinite"),
        (dict(hessian=torch.eye(5)), r"shape \(5, 5\); a weight of 4 inputs needs \(4, 4\)"),
        (dict(hessian=torch.ones(4)), r"shape \(4,\); a weight of 4 inputs"),
        (dict(hessian=torch.full((4, 4), torch.inf)), "the Hessian has entries that are NaN"),
        (dict(hessian=torch.ones(4, 4), damping=0.0), "not positive definite"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    given = dict(weight=torch.randn(3, 4), hessian=torch.eye(4), bits=4) | change
    with pytest.raises(ValueError, match=message):
        gptq_weight(**given)


def test_bad_models_are_one_sentence(llama, ids):
    with pytest.raises(ValueError, match="calibration data is empty"):
        gptq(llama, ids[:0], 4)
    with pytest.raises(ValueError, match="90 tokens; the model's context is 64"):
        gptq(llama, torch.zeros(1, 90, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="bits is 16"):
        gptq(llama, ids, 16)
    with pytest.raises(ValueError, match="no linear layer inside the blocks"):
        gptq(llama, ids, 4, layers="nothing")
    with pytest.raises(ValueError, match="quantized already"):
        gptq(rtn(llama, 4, layers="*.0.*"), ids, 4)
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    started = []
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj: the weight has 1 entries"):
        gptq(llama, Calibration(ids, progress=lambda *step: started.append(step)), 4)
    assert not started


def test_activations_that_overflow_are_one_sentence(llama, ids):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the Hessian has entries"):
        gptq(llama, ids, 4)
