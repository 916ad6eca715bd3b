"""Deltas that change parameters: sums, sharing, nesting, half precision, files."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import attach_state, open_delta, save_delta
from effnb.core.delta_hosts import WithDeltas
from effnb.core.deltas import (
    attached,
    delta_parameters,
    delta_state_dict,
    detach,
    exchange_deltas,
    hosts,
    linear_layers,
    load_delta,
    merge,
    modules_by_name,
    set_active,
)
from effnb.core.differences import (
    Difference,
    SparseDifference,
    attach_differences,
    fitting_parameters,
    own_parameter,
    own_parameters,
)
from effnb.finetuning import bitfit, lora
from effnb.inference.quantization import rtn


class Nested(nn.Module):
    """A module with a parameter of its own around modules with theirs."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(5, 6)
        self.size = 6

    def forward(self, x):
        return self.inner(x) * self.gain


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Nested(), nn.LayerNorm(6), nn.Linear(6, 3))


def everything(model, name="a"):
    return attach_differences(model, name, own_parameters(model, lambda *_: True), Difference)


def randomized(model, name="a", seed=1, scale=0.3):
    torch.manual_seed(seed)
    state = {k: torch.randn_like(t) * scale for k, t in delta_state_dict(model, name).items()}
    return load_delta(model, name, state)


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def test_differences_start_at_zero_bear_the_parameters_names_and_share_what_is_frozen():
    model = small()
    new = everything(model)
    state = delta_state_dict(new, "a")
    assert state.keys() == model.state_dict().keys()
    assert not any(t.any() for t in state.values())
    assert torch.equal(new(X), model(X))
    assert all(p.requires_grad == ("deltas" in n) for n, p in new.named_parameters())
    pointers = {p.data_ptr() for p in new.parameters() if not p.requires_grad}
    assert pointers == {p.data_ptr() for p in model.parameters()}


def test_the_function_is_that_of_the_changed_parameters_and_so_is_the_gradient():
    model = small().double()
    new = randomized(everything(model))
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for key, difference in delta_state_dict(new, "a").items():
            plain.get_parameter(key).add_(difference)
    x = X.double()
    torch.testing.assert_close(new(x), plain(x), rtol=0, atol=1e-14)
    for one in (new, plain):
        one(x).square().sum().backward()
    for key, parameter in delta_parameters(new, "a").items():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad)
    assert all(p.grad is None for p in model.parameters())
    merged = merge(new, "a")
    assert attached(merged) == () and merged.state_dict().keys() == model.state_dict().keys()
    for key, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(key), rtol=0, atol=0)
        assert parameter.requires_grad
    back = detach(new, "a")
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(back.parameters(), model.parameters()))
    assert torch.equal(model[0].gain, torch.ones(6, dtype=torch.float64))


def test_nested_hosts_keep_the_names_of_the_model(tmp_path):
    new = randomized(everything(small()))
    assert set(hosts(new)) == {"0", "0.inner", "1", "2"}
    assert set(modules_by_name(new)) == set(dict(small().named_modules()))
    assert set(linear_layers(new)) == {"0.inner", "2"}
    assert new[0].size == 6  # read through the host
    save_delta(new, "a", tmp_path / "a")
    assert torch.equal(open_delta(small(), tmp_path / "a")(X), new(X))
    both = lora.attach(new, "l", rank=2)
    both = randomized(both, "l")
    one = merge(merge(both, "l"), "a")
    torch.testing.assert_close(one(X), both(X))
    torch.testing.assert_close(merge(merge(both, "a"), "l")(X), both(X))
    torch.testing.assert_close(detach(both, "l")(X), new(X))


def test_several_are_summed_in_any_order():
    model = small()
    two = randomized(everything(randomized(everything(model)), "b"), "b", seed=2)
    expected = {
        k: v + delta_state_dict(two, "a")[k] + delta_state_dict(two, "b")[k]
        for k, v in model.state_dict().items()
    }
    plain = small()
    plain.load_state_dict(expected)
    torch.testing.assert_close(two(X), plain(X))
    torch.testing.assert_close(set_active(two, "b", "a")(X), two(X))
    torch.testing.assert_close(merge(merge(two, "b"), "a")(X), two(X))
    assert torch.equal(set_active(two)(X), model(X))


def test_parameters_read_without_a_call_are_the_changed_ones():
    """nn.MultiheadAttention reads the weights of its output projection itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    new = randomized(everything(model), scale=0.5)
    with torch.no_grad():
        torch.testing.assert_close(new(x), merge(new, "a")(x))
    only = randomized(
        attach_differences(
            model,
            "o",
            own_parameters(model, lambda path, *_: path.endswith("out_proj")),
            Difference,
        ),
        "o",
    )
    with torch.no_grad():
        assert not torch.allclose(only(x), model(x), atol=1e-2)
        torch.testing.assert_close(only(x), merge(only, "o")(x))
    with pytest.raises(AttributeError):
        _ = hosts(only)["0.self_attn.out_proj"].no_such_thing


def test_half_precision_rounds_the_sum_once():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    new = randomized(everything(model), scale=1e-3)
    two = randomized(everything(new, "b"), "b", seed=5, scale=1e-3)
    states = [delta_state_dict(two, n) for n in "ab"]
    assert all(t.dtype == torch.float32 for state in states for t in state.values())
    exact = model[0].weight.float() + (states[0]["0.weight"] + states[1]["0.weight"])
    assert torch.equal(two[0].weight, exact.bfloat16())
    merged = merge(new, "a")[0].weight
    assert torch.equal(merged, (model[0].weight.float() + states[0]["0.weight"]).bfloat16())


@examples(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_sparse_differences(n_in, n_out, seed, bias):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n_in, n_out, bias=bias))
    new = everything(model)
    places = torch.randperm(n_in * n_out)[: seed % (n_in * n_out) + 1].sort().values
    values = torch.randn(len(places))
    sparse = exchange_deltas(new, "a", {"0": SparseDifference({"weight": (values, places)})})
    expected = model[0].weight.detach().clone()
    expected.view(-1)[places] += values
    x = torch.randn(3, n_in)
    plain = nn.functional.linear(x, expected, model[0].bias)
    torch.testing.assert_close(sparse(x), plain)
    torch.testing.assert_close(merge(sparse, "a")(x), plain)
    again = attach_state(model, "b", "sparse-difference", {}, delta_state_dict(sparse, "a"))
    assert torch.equal(again(x), sparse(x))
    sparse(x).sum().backward()
    assert delta_parameters(sparse, "a")["0.weight.values"].grad.shape == values.shape
    assert attached(new) == ("a",) and isinstance(new[0].deltas["a"], Difference)


def test_tied_parameters_are_refused_or_left_out_with_their_head(llama):
    with pytest.raises(ValueError, match=r"embed_tokens\.weight and lm_head\.weight are one tied"):
        everything(llama)
    found = fitting_parameters(llama)
    assert "model.embed_tokens" not in found and "lm_head" not in found
    new = attach_differences(llama, "a", found, Difference)
    assert new.lm_head.weight is new.model.embed_tokens.weight


def test_bias_of_a_quantized_layer():
    torch.manual_seed(0)
    model = rtn(nn.Sequential(nn.Linear(16, 8)), 4, group_size=8)
    new = randomized(bitfit.attach(model, "a"))
    x = torch.randn(3, 16)
    torch.testing.assert_close(new(x), model(x) + delta_state_dict(new, "a")["0.bias"])
    with pytest.raises(ValueError, match="0 is stored quantized"):
        merge(new, "a")
    torch.testing.assert_close(merge(new, "a", dequantize=True)(x), new(x))


def test_bad_input_is_one_sentence():
    model = small()
    with pytest.raises(ValueError, match="Linear has no floating-point parameter 'x'; it has wei"):
        own_parameter(nn.Linear(2, 2), "x")
    with pytest.raises(ValueError, match=r"no module with parameters fits the pattern z\*; the mo"):
        fitting_parameters(model, "z*")
    with pytest.raises(ValueError, match="gain belongs to the model itself"):
        everything(Nested())
    new = everything(model)
    with pytest.raises(ValueError, match="'a' is attached already"):
        everything(new)
    state = delta_state_dict(new, "a")
    with pytest.raises(ValueError, match=r"2\.weight has shape \(3, 5\), not \(3, 6\)"):
        attach_state(model, "b", "difference", {}, state | {"2.weight": torch.ones(3, 5)})
    with pytest.raises(ValueError, match=r"has 7\.weight, but the model has no such module"):
        attach_state(model, "b", "difference", {}, {"7.weight": torch.ones(3, 5)})
    with pytest.raises(ValueError, match="the settings x are not those of a delta of kind"):
        attach_state(model, "b", "difference", {"x": 1}, state)
    for tensors, message in [
        ({"2.weight.values": torch.ones(1)}, "2: a sparse difference has values and places"),
        (
            {"2.weight.values": torch.ones(1), "2.weight.places": torch.tensor([18])},
            "places of weight do not lie in its 18 entries",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            attach_state(model, "b", "sparse-difference", {}, tensors)
    with pytest.raises(ValueError, match="are not those that carry the delta 'a'"):
        exchange_deltas(new, "a", {"0": new[0].deltas["a"]})


def test_a_host_is_copied_and_asked_for_what_it_has_not():
    host = everything(small())[2]
    assert isinstance(copy.deepcopy(host), WithDeltas)
    assert not hasattr(host, "dequantized") and host.in_features == 6
