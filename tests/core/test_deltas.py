"""The protocol of deltas: sharing, names, order, files, with deltas made here."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from effnb.core.delta_files import attach_state, open_delta, read_delta, save_delta
from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    attached,
    delta_parameters,
    delta_state_dict,
    detach,
    freeze,
    hosts,
    linear_layers,
    load_delta,
    merge,
    set_active,
    set_trainable,
    thaw,
)
from effnb.core.modules import Layers, share
from effnb.core.training import TrainingSettings, train
from effnb.evaluation import parameter_count, stored_bytes


class Offset(Delta):
    """y + v: additive and mergeable into the bias."""

    kind = "test-offset"
    additive = True

    def __init__(self, size):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))

    def forward(self, inputs, output, base):
        return output + self.v

    def merged(self, base):
        layer = share(base)
        layer.bias = nn.Parameter(base.bias.detach() + self.v.detach(), base.bias.requires_grad)
        return layer

    def settings(self):
        return {"note": "kept"}

    @classmethod
    def rebuild(cls, base, settings, tensors):
        if settings != {"note": "kept"}:
            raise ValueError("the settings were lost.")
        return cls(base.out_features)


class Gain(Delta):
    """g y: acts on what comes before it; has a buffer that is part of its state."""

    kind = "test-gain"

    def __init__(self, size):
        super().__init__()
        self.inner = nn.ParameterDict({"g": nn.Parameter(torch.ones(size))})
        self.register_buffer("fixed", torch.ones(1))

    def forward(self, inputs, output, base):
        return output * self.inner["g"] * self.fixed

    @classmethod
    def rebuild(cls, base, settings, tensors):
        return cls(base.out_features)


class Both(Offset):
    """y + v in one step with its module, where it is asked."""

    kind = "test-both"
    asked = 0

    def with_base(self, inputs, base):
        self.asked += 1
        return nn.functional.linear(inputs, base.weight, base.bias + self.v)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def with_offset(model, name="a", value=0.5):
    new = attach_deltas(model, name, {"0": Offset(6), "2": Offset(3)})
    state = {key: torch.full_like(t, value) for key, t in delta_state_dict(new, name).items()}
    return load_delta(new, name, state)


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def test_a_delta_may_do_its_module_s_part_too():
    """It is asked where it is alone and nothing waits for the calls that it saves."""
    new = attach_deltas(small(), "a", {"0": Both(6)})
    state = {"0.v": torch.full((6,), 0.5)}
    new = load_delta(new, "a", state)
    host = new[0]
    both = host.deltas["a"]

    def asked():
        before = both.asked
        torch.testing.assert_close(host(X), host.base(X) + 0.5)
        return both.asked - before

    assert asked() == 1
    calls = []
    for module in (host.base, both):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: calls.append(1))
            assert asked() == 0 and calls
            handle.remove()
            calls.clear()
        handle = module.register_full_backward_hook(lambda *_: None)
        assert asked() == 0
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert asked() == 0
    handle.remove()
    host.base.forward = lambda x: nn.functional.linear(x, host.base.weight, host.base.bias)
    assert asked() == 0
    del host.base.forward
    assert asked() == 1
    two = attach_deltas(new, "b", {"0": Offset(6)})
    torch.testing.assert_close(two[0](X), host.base(X) + 0.5)
    assert two[0].deltas["a"].asked == both.asked  # as often as when it was copied
    assert Offset(6).with_base(X, host.base) is None


def test_freezing_shares_memory_but_not_the_flag():
    model = small()
    model[0].bias.requires_grad_(False)
    frozen = freeze(model)
    for old, new in zip(model.parameters(), frozen.parameters(), strict=True):
        assert old.data_ptr() == new.data_ptr() and not new.requires_grad
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert [p.requires_grad for p in thaw(frozen).parameters()] == [True, False, True, True]
    assert [p.requires_grad for p in thaw(freeze(frozen)).parameters()] == [True, False, True, True]


def test_tied_weights_stay_tied(llama, ids):
    frozen = freeze(llama)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    back = thaw(frozen)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.lm_head.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(frozen(ids).logits, llama(ids).logits)


def test_running_statistics_are_not_shared():
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    before = model[1].running_mean.clone()
    new = attach_deltas(model, "a", {"0": Offset(5)}).train()
    new(X + 3)
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(new[1].running_mean, before)


def test_attached_is_the_only_thing_trained_and_nobody_else_changes():
    model = small()
    before = copy.deepcopy(model.state_dict())
    one = attach_deltas(model, "a", {"0": Offset(6)})
    two = attach_deltas(one, "b", {"0": Offset(6), "2": Offset(3)})
    assert attached(two) == ("a", "b") and attached(one) == ("a",) and attached(model) == ()
    assert [n for n, p in two.named_parameters() if p.requires_grad] == [
        "0.deltas.b.v",
        "2.deltas.b.v",
    ]
    settings = TrainingSettings(steps=3, learning_rate=0.1)
    train(two, lambda s: X, settings, loss=lambda m, x: m(x).square().mean())
    assert all(float(p.detach().abs().sum()) > 0 for p in delta_parameters(two, "b").values())
    assert all(float(p.detach().abs().sum()) == 0 for p in delta_parameters(two, "a").values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert attached(one) == ("a",) and not delta_parameters(one, "a")["0.v"].any()


def test_a_further_delta_costs_its_own_bytes_only():
    model = small()
    new = with_offset(with_offset(model), "b")
    assert stored_bytes(new) == stored_bytes(model) + 2 * 9 * 4
    assert parameter_count(new) == parameter_count(model) + 2 * 9
    assert new[0].base.weight.data_ptr() == model[0].weight.data_ptr()


def test_order_of_application_is_that_of_active():
    model = small()
    new = attach_deltas(with_offset(model), "g", {"2": Gain(3)})
    new = load_delta(new, "g", {"2.inner.g": torch.full((3,), 2.0), "2.fixed": torch.ones(1)})
    hidden = torch.tanh(model[0](X) + 0.5)
    with torch.no_grad():
        torch.testing.assert_close(new(X), 2 * (model[2](hidden) + 0.5))
        swapped = set_active(new, "g", "a")
        torch.testing.assert_close(swapped(X), 2 * model[2](hidden) + 0.5)
        assert torch.equal(set_active(new)(X), model(X))
    assert new[2].active == ("a", "g")  # the argument is as it was


def test_detaching_the_last_gives_the_model_back():
    model = small()
    new = detach(with_offset(model), "a")
    assert attached(new) == () and not any(isinstance(m, WithDeltas) for m in new.modules())
    assert torch.equal(new(X), model(X))
    assert all(p.requires_grad for p in new.parameters())
    two = with_offset(with_offset(model), "b", 1.0)
    rest = detach(two, "a")
    torch.testing.assert_close(rest(X), with_offset(model, "b", 1.0)(X))
    assert attached(two) == ("a", "b")


def test_merging_keeps_the_function():
    model = small()
    new = with_offset(with_offset(model), "b", 1.0)
    once = merge(new, "a")
    assert attached(once) == ("b",)
    torch.testing.assert_close(once(X), new(X))
    twice = merge(once, "b")
    assert attached(twice) == () and type(twice[0]) is nn.Linear
    torch.testing.assert_close(twice(X), new(X))
    assert all(p.requires_grad for p in twice.parameters())
    assert twice[0].weight.data_ptr() == model[0].weight.data_ptr()  # only the bias is new
    assert torch.equal(model[0].bias, small()[0].bias)


def test_merging_under_a_delta_that_would_see_it_is_refused():
    new = attach_deltas(small(), "g", {"0": Gain(6)})
    new = with_offset(new)
    with pytest.raises(ValueError, match="cannot be merged under 'g'"):
        merge(new, "a")
    with pytest.raises(ValueError, match="'test-gain' cannot be merged into the weights"):
        merge(new, "g")
    torch.testing.assert_close(merge(set_active(new, "a", "g"), "a")(X),
                               set_active(new, "a", "g")(X))  # fmt: skip
    with pytest.raises(ValueError, match="not active"):
        merge(set_active(new, "g"), "a")


def test_several_are_trained_at_once_on_copies():
    new = with_offset(with_offset(small()), "b", 1.0)
    both = set_trainable(new, "a", "b")
    assert sum(p.requires_grad for p in both.parameters()) == 4
    assert sum(p.requires_grad for p in new.parameters()) == 2
    settings = TrainingSettings(steps=2, learning_rate=0.1)
    train(both, lambda s: X, settings, loss=lambda m, x: m(x).square().mean())
    assert all(bool((p == 0.5).all()) for p in delta_parameters(new, "a").values())
    assert all(bool((p == 1.0).all()) for p in delta_parameters(new, "b").values())
    assert not any(p.requires_grad for p in set_trainable(new).parameters())


def test_a_classifier_is_trained_beside_a_delta():
    model = small()
    new = set_trainable(with_offset(model), "a", also="2.base.*")
    settings = TrainingSettings(steps=2, learning_rate=0.1)
    train(new, lambda s: X, settings, loss=lambda m, x: m(x).square().mean())
    assert torch.equal(model[2].weight, small()[2].weight)
    assert not torch.equal(new[2].base.weight, model[2].weight)
    with pytest.raises(ValueError, match=r"no parameter fits the pattern head\.\*"):
        set_trainable(new, also=["head.*"])


@examples(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_state_goes_out_and_in(n_in, n_out, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n_in, n_out))
    new = attach_deltas(model, "a", {"0": Gain(n_out)})
    state = {"0.inner.g": torch.randn(n_out), "0.fixed": torch.randn(1)}
    loaded = load_delta(new, "a", state)
    found = delta_state_dict(loaded, "a")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert all(bool((t == 1).all()) for t in delta_state_dict(new, "a").values())
    assert [p.requires_grad for p in loaded.parameters()] == [False, False, True]
    found["0.fixed"].zero_()  # a copy
    assert torch.equal(delta_state_dict(loaded, "a")["0.fixed"], state["0.fixed"])
    x = torch.randn(2, n_in)
    torch.testing.assert_close(
        loaded(x), model(x) * state["0.inner.g"] * state["0.fixed"], rtol=1e-6, atol=1e-6
    )


def test_a_file_is_small_and_brings_the_delta_to_another_copy(tmp_path):
    path = tmp_path / "delta.safetensors"
    new = with_offset(small())
    size = save_delta(new, "a", path)
    assert size == path.stat().st_size < 1000
    about, tensors = read_delta(path)
    assert about == {"name": "a", "kind": "test-offset", "settings": {"note": "kept"}}
    assert set(tensors) == {"0.v", "2.v"}
    other = open_delta(small(), path)
    assert attached(other) == ("a",) and torch.equal(other(X), new(X))
    renamed = open_delta(other, path, name="again")
    assert attached(renamed) == ("a", "again")


def test_modules_inside_a_delta_survive_a_file(tmp_path):
    path = tmp_path / "delta.safetensors"
    new = attach_deltas(small(), "g", {"0": Gain(6)})
    new = load_delta(new, "g", {"0.inner.g": torch.arange(6.0), "0.fixed": torch.ones(1)})
    save_delta(new, "g", path)
    assert torch.equal(open_delta(small(), path)(X), new(X))


def test_what_is_no_delta_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read_delta(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="holds tensors, but no delta"):
        read_delta(path)
    with pytest.raises(FileNotFoundError):
        read_delta(tmp_path / "missing.safetensors")
    about = {"name": "z", "kind": "unheard of", "settings": {}}
    save_file({"0.v": torch.ones(6)}, path, metadata={"effnb_delta": json.dumps(about)})
    with pytest.raises(ValueError, match=r"'unheard of' are not known; known: .*test-offset"):
        open_delta(small(), path)


def test_bad_input_is_one_sentence():
    model = with_offset(small())
    with pytest.raises(ValueError, match="'a' is attached already"):
        attach_deltas(model, "a", {"0": Offset(6)})
    for name in ("", "a.b", "keys", "training"):
        with pytest.raises(ValueError, match="cannot name a delta"):
            attach_deltas(small(), name, {"0": Offset(6)})
    with pytest.raises(ValueError, match="no layer to sit on"):
        attach_deltas(small(), "b", {})
    with pytest.raises(ValueError, match="no module named '7'"):
        attach_deltas(small(), "b", {"7": Offset(6)})
    for function in (detach, merge, delta_state_dict, delta_parameters, hosts, set_active):
        with pytest.raises(ValueError, match="no delta is named 'z'; attached: a"):
            function(model, "z")
    with pytest.raises(ValueError, match="named twice in a, a"):
        set_active(model, "a", "a")
    with pytest.raises(ValueError, match="attached: none"):
        detach(small(), "z")
    state = delta_state_dict(model, "a")
    with pytest.raises(ValueError, match=r"it lacks 2\.v"):
        load_delta(model, "a", {"0.v": state["0.v"]})
    with pytest.raises(ValueError, match=r"it has 9\.v, which"):
        load_delta(model, "a", state | {"9.v": state["0.v"]})
    with pytest.raises(ValueError, match=r"2\.v has shape \(4,\), not \(3,\)"):
        load_delta(model, "a", state | {"2.v": torch.ones(4)})
    with pytest.raises(ValueError, match=r"has 9\.v, but the model has no such module"):
        attach_state(small(), "b", "test-offset", {"note": "kept"}, {"9.v": torch.ones(6)})
    with pytest.raises(ValueError, match="0: the settings were lost"):
        attach_state(small(), "b", "test-offset", {}, {"0.v": torch.ones(6)})
    with pytest.raises(ValueError, match=r"0\.v has shape \(5,\), not \(6,\)"):
        attach_state(small(), "b", "test-offset", {"note": "kept"}, {"0.v": torch.ones(5)})


class Twice(Delta):
    """Runs its module on w times what it is given: in place, with a tensor of its own."""

    kind = "test-twice"
    in_place = True

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), 2.0))

    def around(self, run, base, x):
        return run(self.w * x)

    @classmethod
    def rebuild(cls, base, settings, tensors):
        return cls()


class Wrapped(nn.Module):
    """The small model as a module with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.inner = small()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("path", ["", "inner.2"])
def test_a_delta_in_place_leaves_every_name_as_it_was(tmp_path, path):
    model = Wrapped()
    new = attach_deltas(model, "t", {path: Twice()})
    host = new.get_submodule(path)
    assert type(host) is not type(model.get_submodule(path))
    assert isinstance(host, type(model.get_submodule(path)))
    assert [n for n, p in new.named_parameters() if "deltas" not in n] == [
        n for n, _ in model.named_parameters()
    ]
    key = f"{path}.w" if path else "w"
    assert list(delta_parameters(new, "t")) == list(delta_state_dict(new, "t")) == [key]
    assert list(hosts(new, "t")) == [path] and type(model) is Wrapped
    both = attach_deltas(load_delta(new, "t", {key: torch.full((1,), 3.0)}), "u", {path: Twice()})

    def expected(factor):
        inner = model.inner
        return inner(factor * X) if not path else inner[2](factor * torch.tanh(inner[0](X)))

    torch.testing.assert_close(both(X), expected(6.0))
    torch.testing.assert_close(set_active(both, "t")(X), expected(3.0))
    torch.testing.assert_close(detach(both, "t")(X), expected(2.0))
    back = detach(detach(both, "t"), "u")
    assert torch.equal(back(X), model(X)) and type(back.get_submodule(path)) is type(
        model.get_submodule(path)
    )  # fmt: skip
    assert [n for n, _ in back.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(p.requires_grad for p in back.parameters())
    save_delta(both, "t", tmp_path / "t")
    torch.testing.assert_close(open_delta(Wrapped(), tmp_path / "t")(X), expected(3.0))
    with pytest.raises(ValueError, match="'test-twice' cannot be merged"):
        merge(new, "t")
    new.get_submodule(path).deltas["t"].w.data.fill_(9)  # a copy's tensors are its own
    torch.testing.assert_close(set_active(both, "t")(X), expected(3.0))


def test_what_cannot_sit_together_is_refused():
    with pytest.raises(ValueError, match="no module named ''"):
        attach_deltas(small(), "a", {"": Offset(6)})
    with pytest.raises(ValueError, match="0 cannot carry a delta of kind 'test-twice'"):
        attach_deltas(with_offset(small()), "t", {"0": Twice()})
    with pytest.raises(ValueError, match="0 cannot carry a delta of kind 'test-offset'"):
        with_offset(attach_deltas(small(), "t", {"0": Twice()}))
    own = Wrapped()
    own.forward = lambda x: x
    with pytest.raises(ValueError, match="the model cannot carry"):
        attach_deltas(own, "t", {"": Twice()})
    with pytest.raises(ValueError, match="but the model has no such module"):
        attach_state(small(), "t", "test-twice", {}, {"9.w": torch.ones(1)})
    assert Twice().around.__func__ is not Delta.around
    with pytest.raises(NotImplementedError, match="does not say how it runs"):
        Delta().around(print, own)
    with pytest.raises(ValueError, match="the model is a Sequential, a plain list of modules"):
        attach_deltas(small(), "t", {"": Twice()})


def test_merging_what_acts_on_others_or_reads_the_weight():
    class Rescaled(Gain):
        def merged(self, base):
            layer = share(base)
            layer.bias = nn.Parameter(base.bias * self.inner["g"])
            layer.weight = nn.Parameter(base.weight * self.inner["g"][:, None])
            return layer

    class Reader(Offset):
        reads_base = True

    model = with_offset(small())
    over = attach_deltas(model, "g", {"0": Rescaled(6)})
    with pytest.raises(ValueError, match="under 'a', whose output it acts on"):
        merge(over, "g")
    torch.testing.assert_close(merge(merge(over, "a"), "g")(X), over(X))
    beside = attach_deltas(model, "r", {"0": Reader(6)})
    with pytest.raises(ValueError, match="beside 'r', which reads the weight"):
        merge(beside, "a")
    torch.testing.assert_close(merge(merge(beside, "r"), "a")(X), beside(X))


def test_tensors_inside_a_delta_are_no_layers():
    delta = Twice()
    delta.inner = nn.Linear(5, 5)
    new = attach_deltas(Wrapped(), "t", {"": delta})
    assert set(linear_layers(new)) == {"inner.0", "inner.2"}


def test_linear_layers_of_any_storage():
    class Odd(nn.Module):
        in_features, out_features = 4, 2

        def forward(self, x):
            return x[..., :2]

    model = nn.ModuleDict(
        {
            "a": nn.Linear(3, 2),
            "odd": Odd(),
            "attention": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm(3),
            "lm_head": nn.Linear(3, 5),
        }
    )
    assert set(linear_layers(model)) == {"a", "odd"}
    new = attach_deltas(model, "d", {"a": Offset(2)})
    assert set(linear_layers(new, layers=Layers(exclude=()))) == {"a", "odd", "lm_head"}
    assert isinstance(linear_layers(new)["a"], WithDeltas)
    with pytest.raises(
        ValueError, match=r"no linear layer fits the pattern b\*; the model has a, "
    ):
        linear_layers(model, layers="b*")
    with pytest.raises(ValueError, match="the model has none at all"):
        linear_layers(nn.Sequential(nn.ReLU()))


def test_a_host_shows_the_layer_under_it():
    host = with_offset(small())[0]
    assert (host.in_features, host.out_features) == (5, 6)
    assert host.weight is host.base.weight and host.bias is host.base.bias
    assert not hasattr(WithDeltas(nn.ReLU()), "weight")


@torch.no_grad()
def test_a_fused_path_of_pytorch_does_not_pass_over_a_delta():
    """In evaluation PyTorch's encoder layer may read weights in place of calling linear layers."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    model = attach_deltas(block, "a", {"linear1": Offset(16)})
    state = {key: tensor + 1 for key, tensor in delta_state_dict(model, "a").items()}
    model = set_trainable(load_delta(model, "a", state))
    expected = merge(model, "a")(x)
    assert not torch.allclose(block(x), expected, atol=1e-2)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks for m in detach(model, "a").modules())
