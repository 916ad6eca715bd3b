"""Which layer gets how many bits: the measures, the choice under a budget, and the result."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.calibration import Calibration
from effnb.core.modules import Layers, linears
from effnb.inference.quantization import QuantizedLinear, awq, gptq, quantize, rtn
from effnb.inference.quantization.allocation import (
    allocate,
    allocation_bytes,
    allocation_cost,
)
from effnb.inference.quantization.mixed import additivity, layer_bytes, mixed_precision
from effnb.inference.quantization.sensitivity import (
    HessianTrace,
    hessian_sensitivity,
    hessian_traces,
    loss_sensitivity,
    mean_loss,
    model_batches,
    output_sensitivity,
)

BITS = [2, 4, 8]

# --- the choice -----------------------------------------------------------------------------------


def problem(seed, layers=6, bits=(2, 4, 8)):
    """Random costs, not always falling, and sizes; with a budget somewhere in between."""
    draw = random.Random(seed)
    names = [f"layer{i}" for i in range(layers)]
    costs = {
        n: {b: draw.choice([1, 1, -0.2]) * draw.random() * 4.0**-b for b in bits} for n in names
    }
    sizes = {n: {b: draw.randint(1, 40) * b for b in bits} for n in names}
    ends = [sum(pick(table.values()) for table in sizes.values()) for pick in (min, max)]
    return costs, sizes, draw.randint(*ends)


def brute_force(costs, sizes, budget):
    allocations = (
        dict(zip(costs, choice, strict=True)) for choice in itertools.product(*costs.values())
    )
    return min(
        allocation_cost(costs, a) for a in allocations if allocation_bytes(sizes, a) <= budget
    )


@pytest.mark.parametrize("seed", range(40))
def test_exact_is_the_best_of_all_allocations(seed):
    costs, sizes, budget = problem(seed)
    best = allocate(costs, sizes, budget)
    assert allocation_bytes(sizes, best) <= budget
    assert allocation_cost(costs, best) == pytest.approx(
        brute_force(costs, sizes, budget), rel=1e-9
    )


@pytest.mark.parametrize("seed", range(8))
def test_exact_agrees_with_scipys_integer_program(seed):
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    costs, sizes, budget = problem(seed, layers=25)
    columns = [(name, bits) for name in costs for bits in costs[name]]
    one_each = [[float(name == n) for n, _ in columns] for name in costs]
    result = milp(
        [costs[n][b] * 1e3 for n, b in columns],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint([[sizes[n][b] for n, b in columns]], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert result.success
    best = allocate(costs, sizes, budget)
    assert allocation_bytes(sizes, best) <= budget
    assert allocation_cost(costs, best) == pytest.approx(result.fun / 1e3, rel=1e-6, abs=1e-9)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6), layers=st.integers(1, 12), scale=st.sampled_from([1e-12, 1, 1e9])
)
def test_exact_is_never_worse_and_all_keep_to_the_budget(seed, layers, scale):
    costs, sizes, budget = problem(seed, layers)
    costs = {name: {b: c * scale for b, c in table.items()} for name, table in costs.items()}
    exact, greedy = (allocate(costs, sizes, budget, m) for m in ("exact", "greedy"))
    for allocation in (exact, greedy):
        assert list(allocation) == list(costs)
        assert allocation_bytes(sizes, allocation) <= budget
    assert allocation_cost(costs, exact) <= allocation_cost(costs, greedy) + 1e-12 * scale
    most = sum(max(table.values()) for table in sizes.values())
    everything = allocate(costs, sizes, most)
    assert allocation_cost(costs, everything) == pytest.approx(
        math.fsum(min(table.values()) for table in costs.values())
    )


def test_a_real_models_size_takes_little_time():
    """210 layers of four shapes: many allocations take equally many bytes."""
    draw = random.Random(0)
    costs, sizes = {}, {}
    for i in range(210):
        weights = draw.choice([576 * 576, 192 * 576, 1536 * 576])
        base = 10 ** draw.uniform(-4, 0)
        costs[f"l{i}"] = {b: base * 4.0**-b * draw.uniform(0.7, 1.3) for b in (2, 3, 4, 8)}
        sizes[f"l{i}"] = {b: weights * b // 8 for b in (2, 3, 4, 8)}
    budget = allocation_bytes(sizes, dict.fromkeys(sizes, 4))
    found = {m: allocate(costs, sizes, budget, m) for m in ("exact", "greedy", "uniform")}
    assert set(found["uniform"].values()) == {4}
    costs_of = {m: allocation_cost(costs, a) for m, a in found.items()}
    assert costs_of["exact"] <= costs_of["greedy"] < costs_of["uniform"]


def test_greedy_on_paper():
    """Lowering a loses 3 for 10 bytes, b 2 for 20 and c 1 for 5: b goes first, then c, then a.

    When all three are down, 35 bytes, c comes back if there are 40.
    """
    costs = {"a": {4: 3.0, 8: 0.0}, "b": {4: 2.0, 8: 0.0}, "c": {4: 1.0, 8: 0.0}}
    sizes = {"a": {4: 10, 8: 20}, "b": {4: 20, 8: 40}, "c": {4: 5, 8: 10}}
    chosen = [allocate(costs, sizes, budget, "greedy") for budget in (70, 50, 49, 45, 44, 39)]
    assert [tuple(a.values()) for a in chosen] == [
        (8, 8, 8),
        (8, 4, 8),
        (8, 4, 4),
        (8, 4, 4),
        (4, 4, 8),
        (4, 4, 4),
    ]


def test_greedy_spends_what_the_last_step_saved_too_much():
    costs = {"a": {2: 1.0, 8: 0.0}, "b": {2: 1.5, 8: 0.0}}
    sizes = {"a": {2: 10, 8: 100}, "b": {2: 10, 8: 30}}
    # a is lowered first (1 per 90 bytes) and is enough; without it b would be lowered for nothing.
    assert allocate(costs, sizes, 40, "greedy") == {"a": 2, "b": 8}
    costs["b"][2] = 0.1  # now b goes first, then a, and b can come back
    assert allocate(costs, sizes, 40, "greedy") == {"a": 2, "b": 8}


def test_where_greedy_is_not_the_best():
    costs = {"a": {4: 1.0, 8: 0.0}, "b": {4: 1.1, 8: 0.0}, "c": {4: 2.0, 8: 0.0}}
    sizes = {"a": {4: 0, 8: 10}, "b": {4: 0, 8: 10}, "c": {4: 0, 8: 15}}
    # Per byte, a loses least, then c; both have to go before 20 bytes are enough.
    assert allocate(costs, sizes, 20, "greedy") == {"a": 4, "b": 4, "c": 8}
    assert allocate(costs, sizes, 20) == {"a": 8, "b": 8, "c": 4}


def test_a_negative_cost_is_worth_bytes():
    costs = {"a": {4: -1.0, 8: 0.0}, "b": {4: 0.5, 8: 0.0}}
    sizes = {"a": {4: 10, 8: 20}, "b": {4: 10, 8: 20}}
    for method in ("exact", "greedy"):
        assert allocate(costs, sizes, 40, method) == {"a": 4, "b": 8}


def test_bad_choices_are_one_sentence():
    costs, sizes, _ = problem(0)
    least, most = (sum(pick(t.values()) for t in sizes.values()) for pick in (min, max))
    with pytest.raises(ValueError, match=f"too small; the layers take at least {least}"):
        allocate(costs, sizes, least - 1)
    with pytest.raises(ValueError, match=f"too large; the layers take at most {most}"):
        allocate(costs, sizes, most + 1)
    with pytest.raises(ValueError, match="method is 'ilp'; choose exact, greedy or uniform"):
        allocate(costs, sizes, most, "ilp")
    with pytest.raises(ValueError, match="there is no layer"):
        allocate({}, {}, 1)
    with pytest.raises(ValueError, match=r"layer0 has costs for \[2, 4, 8\] bits and sizes for"):
        allocate(costs, sizes | {"layer0": {2: 1}}, most)
    with pytest.raises(ValueError, match=r"layer9 has costs for \[\] bits"):
        allocate(costs, sizes | {"layer9": {2: 1}}, most)
    with pytest.raises(ValueError, match="the cost of layer1 at 2 bits is nan"):
        allocate(costs | {"layer1": costs["layer1"] | {2: math.nan}}, sizes, most)
    apart = {"a": {2: 1.0}, "b": {4: 1.0}}
    with pytest.raises(ValueError, match="no bit-width fits all layers"):
        allocate(apart, {"a": {2: 1}, "b": {4: 1}}, 2, "uniform")


# --- the measures ---------------------------------------------------------------------------------


class Toy(nn.Module):
    """Inputs of a table through one or two linear layers."""

    def __init__(self, table, *layers):
        super().__init__()
        self.register_buffer("table", table)
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids):
        """Answers like a language model of Hugging Face."""
        x = self.table[input_ids]
        for i, layer in enumerate(self.layers):
            x = layer(torch.tanh(x) if i else x)
        return SimpleNamespace(logits=x)


def square_loss(model, batch):
    return model(**batch).logits.square().sum(-1).mean() / 2


def linear(*shape, seed=0):
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def test_the_trace_of_a_diagonal_hessian_is_exact():
    """y = W x with one-hot x: H is diagonal, so every sign vector gives the trace itself.

    A token has loss |y|^2 / 2, so H = I (one per output) times the mean of x x^T.
    """
    toy = Toy(torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 0.0]), linear(5, 4))
    ids = torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2]])
    (trace,) = hessian_traces(
        toy, ids, samples=3, loss=square_loss, layers=Layers(exclude=())
    ).values()
    assert trace.trace == pytest.approx(5 * (1 + 4 + 9 * 5) / 8)
    assert trace.standard_error == pytest.approx(0, abs=1e-5)
    assert (trace.samples, trace.weights) == (3, 20)
    assert toy.layers[0].weight.grad is None
    (single,) = hessian_traces(toy, ids, samples=1, loss=square_loss).values()
    assert single.standard_error == math.inf


@pytest.mark.parametrize("jointly", [True, False])
def test_the_trace_and_its_variance(jointly):
    """Against the whole Hessian of a small network, written out."""
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    toy = Toy(table, linear(4, 3, seed=1), linear(2, 4, seed=2)).double()
    ids = torch.arange(6).view(2, 3)
    sizes = [12, 8]

    def loss_of(flat):
        w1, w2 = flat.split(sizes)
        y = torch.tanh(table.double() @ w1.view(4, 3).T) @ w2.view(2, 4).T
        return y.square().sum(-1).mean() / 2

    flat = torch.cat([layer.weight.flatten() for layer in toy.layers]).detach()
    hessian = torch.func.hessian(loss_of)(flat)
    samples = 800
    traces = hessian_traces(
        toy, Calibration(ids, batch_size=2), samples=samples, jointly=jointly, loss=square_loss
    )
    starts = [0, 12]
    for (name, found), start, size in zip(traces.items(), starts, sizes, strict=True):
        rows = hessian[start : start + size]
        block = rows[:, start : start + size]
        exact = float(block.trace())
        assert abs(found.trace - exact) < 4 * found.standard_error, name
        variance = 2 * float(block.square().sum() - block.diagonal().square().sum())
        if jointly:
            variance += float(rows.square().sum() - block.square().sum())
        assert found.standard_error**2 * samples == pytest.approx(variance, rel=0.2), name


def test_traces_do_not_depend_on_the_batches(tiny_llama, ids):
    """The same signs in every batch: a sample is one quadratic form of the whole data."""
    model = tiny_llama(0, num_hidden_layers=1)
    ids = ids[:, :12]
    whole, split = (
        hessian_traces(model, Calibration(ids, batch_size=size), samples=2, layers="*.mlp.*")
        for size in (4, 1)
    )
    for name, trace in whole.items():
        assert split[name].trace == pytest.approx(trace.trace, rel=1e-3)
        assert split[name].standard_error == pytest.approx(trace.standard_error, rel=1e-3)


def test_the_trace_of_a_transformers_layer(tiny_llama, ids):
    """Against the diagonal of H, one unit vector at a time."""
    model = tiny_llama(0, num_hidden_layers=1, hidden_size=8, num_attention_heads=2).double()
    name = "model.layers.0.self_attn.k_proj"
    data = ids[:2, :8]

    def loss(run, batch):  # next_token_loss is in float32, too coarse for differences
        logits = run(**batch).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())

    found = hessian_traces(model, data, samples=60, layers=name, loss=loss)[name]
    weight = model.get_submodule(name).weight.detach()

    @torch.no_grad()
    def loss_of(w):
        def run(**keywords):
            return torch.func.functional_call(model, {f"{name}.weight": w}, (), keywords)

        return loss(run, {"input_ids": data})

    exact, step = 0.0, 1e-3  # second differences
    base = float(loss_of(weight))
    assert base == pytest.approx(mean_loss(model, [{"input_ids": data}]), rel=1e-5)
    for i, j in itertools.product(*map(range, weight.shape)):
        moved = weight.clone()
        moved[i, j] += step
        up = float(loss_of(moved))
        moved[i, j] -= 2 * step
        exact += (up + float(loss_of(moved)) - 2 * base) / step**2
    assert abs(found.trace - exact) < 4 * found.standard_error
    assert abs(exact) > 4 * found.standard_error, "the estimate says something"


def test_hawqs_cost_is_the_mean_trace_times_the_error(llama):
    name = "model.layers.1.mlp.up_proj"
    weight = llama.get_submodule(name).weight.detach()
    traces = {name: HessianTrace(3.0, 0.1, 4, weight.numel())}
    found = hessian_sensitivity(llama, traces, BITS)
    for bits in BITS:
        error = float((quantize(weight, bits).dequantize() - weight).square().sum())
        assert found[name][bits] == pytest.approx(3.0 / weight.numel() * error, rel=1e-5)
    saddle = {name: HessianTrace(-3.0, 0.1, 4, weight.numel())}
    assert hessian_sensitivity(llama, saddle, BITS)[name] == dict.fromkeys(BITS, 0.0)


def test_output_error_is_that_of_the_real_inputs(llama, ids):
    rounding = partial(quantize, group_size=16)
    found = output_sensitivity(llama, Calibration(ids, batch_size=2), BITS, rounding=rounding)
    assert list(found) == list(linears(llama))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        layer, seen = llama.get_submodule(name), []
        hook = layer.register_forward_pre_hook(lambda _, inputs, s=seen: s.append(inputs[0]))
        with torch.no_grad():
            llama(ids)
        hook.remove()
        x, weight = seen[0].flatten(0, 1), layer.weight.detach()
        for bits in BITS:
            change = rounding(weight, bits).dequantize() - weight
            expected = (x @ change.T).square().sum() / (x @ weight.T).square().sum()
            assert found[name][bits] == pytest.approx(float(expected), rel=1e-3)
    assert all(table[2] > table[4] > table[8] > 0 for table in found.values())


def test_loss_change_is_that_of_the_model_with_one_layer_rounded(llama, ids):
    batch = [{"input_ids": ids}]
    base = mean_loss(llama, batch)
    names = ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.gate_proj"]
    steps = []
    found = loss_sensitivity(
        llama,
        Calibration(ids, progress=lambda done, total: steps.append((done, total))),
        [3, 8],
        layers=names,
    )
    assert steps == [(1, 2), (2, 2)]
    assert list(found) == names
    for name, bits in itertools.product(names, (3, 8)):
        expected = mean_loss(rtn(llama, bits, layers=name), batch) - base
        assert found[name][bits] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-6


def test_padding_counts_neither_in_the_loss_nor_in_its_mean(llama, ids):
    """Two sequences padded to one length score as they do alone, each by its own tokens."""
    mask = torch.ones_like(ids[:2])
    mask[1, 10:] = 0
    padded = mean_loss(llama, [{"input_ids": ids[:2], "attention_mask": mask}])
    apart = [{"input_ids": ids[:1]}, {"input_ids": ids[1:2, :10]}]
    assert padded == pytest.approx(mean_loss(llama, apart), rel=1e-5)
    losses = [mean_loss(llama, [one]) for one in apart]
    assert padded == pytest.approx((23 * losses[0] + 9 * losses[1]) / 32, rel=1e-5)
    assert len(model_batches(llama, Calibration(ids, batch_size=3))) == 2


class Elsewhere(Executor):
    """Runs calls at once, after sending function and arguments through pickle, as processes do."""

    def submit(self, function, /, *arguments, **keywords):
        """Run it."""
        function, arguments, keywords = pickle.loads(pickle.dumps((function, arguments, keywords)))
        future = Future()
        future.set_result(function(*arguments, **keywords))
        return future


def test_any_executor_gives_the_same_tables(llama, ids):
    include = "*.1.mlp.*"
    traces = hessian_traces(llama, ids[:1], samples=1, layers=include)
    sweeps = [
        partial(loss_sensitivity, llama, ids[:2], [2, 4], layers=include),
        partial(output_sensitivity, llama, ids[:2], [2, 4], layers=include),
        partial(hessian_sensitivity, llama, traces, [2, 4]),
    ]
    with ThreadPoolExecutor(2) as threads:
        for sweep in sweeps:
            expected = sweep()
            assert len(expected) == 3
            for executor in (threads, Elsewhere()):
                found = sweep(executor=executor)
                assert found.keys() == expected.keys()
                for name in found:
                    assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_bad_measures_are_one_sentence(llama, ids):
    with pytest.raises(ValueError, match="bits is empty"):
        output_sensitivity(llama, ids, [])
    with pytest.raises(ValueError, match="bits is 16; the uniform formats have 2 to 8"):
        loss_sensitivity(llama, ids, [4, 16])
    with pytest.raises(ValueError, match="quantized already"):
        loss_sensitivity(rtn(llama, 8), ids, [4])
    with pytest.raises(ValueError, match="quantized already"):
        output_sensitivity(rtn(llama, 8), ids, [4])
    with pytest.raises(ValueError, match="samples is 0; at least 1"):
        hessian_traces(llama, ids, samples=0)
    with pytest.raises(ValueError, match="no Linear fits"):
        hessian_traces(llama, ids, layers="nothing")
    with pytest.raises(ValueError, match="the calibration data is empty"):
        loss_sensitivity(llama, ids[:0], [4])


# --- the result -----------------------------------------------------------------------------------


def test_sizes_are_those_of_the_stored_weights(llama):
    found = layer_bytes(llama, [2, 3, 8], group_size=16)
    for name, layer in linears(llama).items():
        for bits, size in found[name].items():
            assert size == quantize(layer.weight, bits, group_size=16).bytes


def test_each_layer_gets_its_bits(llama, ids):
    names = list(linears(llama))
    allocation = dict(zip(names, itertools.cycle(BITS), strict=False))
    del allocation[names[-1]]
    before = {name: p.clone() for name, p in llama.named_parameters()}
    new = mixed_precision(llama, allocation)
    for name, bits in allocation.items():
        layer = new.get_submodule(name)
        expected = quantize(llama.get_submodule(name).weight, bits)
        assert layer.quantized.bits == bits
        assert torch.equal(layer.weight, expected.dequantize())
    assert new.get_submodule(names[-1]).weight is llama.get_submodule(names[-1]).weight
    assert new.model.embed_tokens.weight is llama.model.embed_tokens.weight
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name])
    sizes = layer_bytes(llama, BITS)
    total = sum(m.quantized.bytes for m in new.modules() if isinstance(m, QuantizedLinear))
    assert total == allocation_bytes(sizes, allocation)


def test_other_quantizers(llama, ids):
    names = list(linears(llama))
    allocation = {names[0]: 3, names[5]: 8, "lm_head": 8}
    grouped = mixed_precision(llama, allocation, partial(rtn, group_size=16))
    assert grouped.get_submodule(names[0]).quantized.group_size == 16
    assert grouped.lm_head.quantized.bits == 8
    del allocation["lm_head"]
    calibrated = mixed_precision(llama, allocation, lambda m, b, **o: gptq(m, ids, b, **o))
    alone = gptq(llama, ids, 3, layers=names[0])
    assert torch.equal(
        calibrated.get_submodule(names[0]).weight, alone.get_submodule(names[0]).weight
    )
    assert calibrated.get_submodule(names[5]).quantized.bits == 8
    with pytest.raises(ValueError, match=r"the quantizer changed model\.layers\.0\..* as well"):
        mixed_precision(
            llama, dict.fromkeys(names, 4), lambda m, b, **o: awq(m, ids, b, group_size=16, **o)
        )
    with pytest.raises(ValueError, match="the allocation is empty"):
        mixed_precision(llama, {})
    with pytest.raises(ValueError, match=r"names 'model\.norm', which is no linear layer"):
        mixed_precision(llama, {"model.norm": 4})
    with pytest.raises(ValueError, match="bits is 1;"):
        mixed_precision(llama, {names[0]: 1})


class Sides(nn.Module):
    """Two layers side by side: the losses of their outputs add up by construction."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
        self.left, self.right = linear(6, 8, seed=1), linear(6, 8, seed=2)

    def forward(self, input_ids):
        """Answers like a language model of Hugging Face."""
        x = self.table[input_ids]
        return SimpleNamespace(logits=torch.cat([self.left(x), self.right(x)], -1))


def test_costs_that_add_up_and_costs_that_do_not(llama, ids):
    sides, data = Sides(), torch.arange(9).view(1, 9)
    table = loss_sensitivity(sides, data, [3], loss=square_loss)
    found = additivity(sides, {"left": 3, "right": 3}, table, data, loss=square_loss)
    assert found.predicted == pytest.approx(table["left"][3] + table["right"][3])
    assert found.ratio == pytest.approx(1, rel=1e-3)

    table = loss_sensitivity(llama, ids, [2], layers="*.0.*")
    found = additivity(llama, dict.fromkeys(table, 2), table, ids)
    together = rtn(llama, 2, layers="*.0.*")
    batch = [{"input_ids": ids}]
    assert found.measured == pytest.approx(
        mean_loss(together, batch) - mean_loss(llama, batch), abs=1e-5
    )
    assert abs(found.ratio - 1) > 0.02


@pytest.mark.parametrize("seed", range(3))
def test_measured_costs_beat_uniform_bits(tiny_llama, ids, seed):
    """The whole chain: in no more bytes than uniform bits, on text that measured no costs.

    What counts is how far the logits move, for all layers together. The solver knows only the
    sum of what each layer does alone, so that this can fail.
    """
    model, bits = tiny_llama(seed), [2, 3, 4, 5]
    other = torch.randint(1, 128, (4, 24), generator=torch.Generator().manual_seed(7))

    def moved(rounded, batch):
        return (rounded(**batch).logits - model(**batch).logits).square().mean()

    costs = loss_sensitivity(model, ids, bits, loss=moved)
    sizes = layer_bytes(model, bits)
    budget = allocation_bytes(sizes, dict.fromkeys(sizes, 3))
    chosen = {method: allocate(costs, sizes, budget, method) for method in ("exact", "uniform")}
    assert set(chosen["uniform"].values()) == {3}
    assert allocation_bytes(sizes, chosen["exact"]) <= budget
    found = {
        name: mean_loss(mixed_precision(model, allocation), [{"input_ids": other}], moved)
        for name, allocation in chosen.items()
    }
    assert 0 < found["exact"] < 0.8 * found["uniform"]
