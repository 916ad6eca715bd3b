"""Adapters: their equations at every placement, the identity at the start, and refusals."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import open_delta, save_delta
from effnb.core.deltas import (
    attached,
    delta_parameters,
    delta_state_dict,
    detach,
    hosts,
    load_delta,
    merge,
    set_active,
    set_trainable,
)
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.finetuning import adapters, lora
from effnb.finetuning.adapters import HoulsbyAdapter, PfeifferAdapter

WAYS = [
    dict(placement="houlsby"),
    dict(placement="pfeiffer"),
    dict(placement="parallel"),
    dict(placement="parallel", sublayers="attention", scale=2.0),
]


def bert(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.normal_(0, 0.2)
    return model


def hidden(model, ids):
    out = model(input_ids=ids % 96)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def disturbed(model, name="default", seed=0):
    """The same delta with random tensors, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: t + 0.2 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for key, t in delta_state_dict(model, name).items()
    }
    return load_delta(model, name, state)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_from_the_start_to_detaching(llama, ids, tmp_path, kind, way):
    model = llama if kind == "llama" else bert()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        plain = hidden(model, ids)
        new = adapters.attach(model, size=5, **way)
        assert torch.equal(hidden(new, ids), plain)  # bit for bit
        moved = disturbed(new)
        changed = hidden(moved, ids)
        assert not torch.allclose(changed, plain, atol=1e-2)
        save_delta(moved, "default", tmp_path / "a")
        assert torch.equal(hidden(open_delta(model, tmp_path / "a"), ids), changed)
        assert torch.equal(hidden(set_active(moved), ids), plain)
        back = detach(moved, "default")
        assert torch.equal(hidden(back, ids), plain)
    assert [name for name, _ in back.named_parameters()] == names
    assert type(back) is type(model) and all(p.requires_grad for p in back.parameters())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()}
    trained = set(delta_parameters(new, "default").values())
    assert all(p.data_ptr() in shared for p in new.parameters() if p not in trained)
    assert {p for p in new.parameters() if p.requires_grad} == trained
    with pytest.raises(ValueError, match="nonlinearity inside"):
        merge(moved, "default")
    n = model.config.num_hidden_layers * (2 if way["placement"] == "houlsby" else 1)
    assert sum(p.numel() for p in trained) == n * (2 * 32 * 5 + 32 + 5)


def test_parameters_of_two_adapters_per_layer_of_bert_base():
    """24 (2 · 768 · 64 + 768 + 64), as the paper's bottleneck of 64 has them."""
    one = HoulsbyAdapter(nn.Linear(768, 768, device="meta"), width=768, size=64, activation="gelu")
    assert 24 * sum(p.numel() for p in one.parameters()) == 2_379_264


@examples(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(list(adapters.ACTIVATIONS)))
def test_the_bottleneck_s_equation(width, size, activation):
    torch.manual_seed(width)
    layer = nn.Linear(3, width).double()
    delta = HoulsbyAdapter(layer, width=width, size=size, activation=activation)
    for parameter in delta.parameters():
        assert parameter.dtype == torch.float64
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    h = layer(x)
    inner = adapters.ACTIVATIONS[activation](h @ delta.down.T + delta.down_bias)
    torch.testing.assert_close(
        delta(x, h, layer), h + inner @ delta.up.T + delta.up_bias, rtol=1e-12, atol=1e-12
    )
    grads = torch.autograd.grad(delta(x, h, layer).sum(), list(delta.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads)


def test_pfeiffer_in_a_post_norm_block_by_hand(ids):
    """y = LN(r + h + B(LN(r + h))): the adapter sits behind the norm, its sum before it."""
    new = disturbed(adapters.attach(bert(), placement="pfeiffer", size=4))
    norm = new.encoder.layer[0].output.LayerNorm
    stream = torch.randn(2, 3, 32)
    plain = nn.functional.layer_norm(stream, (32,), norm.weight, norm.bias, norm.eps)
    d = norm.deltas["default"]
    assert isinstance(d, PfeifferAdapter)
    change = torch.relu(plain @ d.down.T + d.down_bias) @ d.up.T + d.up_bias
    expected = nn.functional.layer_norm(stream + change, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(stream), expected)


def test_pfeiffer_in_a_pre_norm_block_by_hand(llama, ids):
    """y = p + B(p) for the p that the block puts out without its delta."""
    new = disturbed(adapters.attach(llama, placement="pfeiffer", size=4))
    block, d = new.model.layers[1], new.model.layers[1].deltas["default"]
    seen = []
    block.register_forward_hook(lambda m, inputs, output: seen.append(output))
    with torch.no_grad():
        new(ids)
        block.active = ()
        new(ids)
        y, p = seen
        change = torch.relu(p @ d.down.T + d.down_bias) @ d.up.T + d.up_bias
        torch.testing.assert_close(y, p + change)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_parallel_adds_what_it_makes_of_the_sublayer_s_input(llama, ids, kind):
    model = llama if kind == "llama" else bert()
    new = disturbed(adapters.attach(model, placement="parallel", size=4, scale=3.0))
    path, host = next(iter(hosts(new).items()))
    d = host.deltas["default"]
    first, last = host.get_submodule(d.reads), host.get_submodule(d.adds)
    assert (path.endswith(".mlp"), kind) in ((True, "llama"), (False, "bert"))
    seen = {}
    first.register_forward_pre_hook(lambda m, inputs: seen.update(x=inputs[0]))
    last.register_forward_hook(lambda m, inputs, h: seen.update(h=h))  # before the delta's hook
    with torch.no_grad():
        found = []
        make = d.bottleneck
        d.bottleneck = lambda z: found.append(z) or make(z)
        hidden(new, ids)
        assert torch.equal(found[0], seen["x"])
        z = torch.randn(2, 32)
        expected = torch.relu(z @ d.down.T + d.down_bias) @ d.up.T + d.up_bias
        torch.testing.assert_close(make(z), expected)
    assert not last._forward_hooks or len(last._forward_hooks) == 1  # the delta's own are gone


def test_half_precision_starts_as_the_model_too(llama, ids):
    model = llama.to(torch.bfloat16)
    for way in WAYS:
        new = adapters.attach(model, size=4, **way)
        with torch.no_grad():
            assert torch.equal(new(ids).logits, model(ids).logits)
        assert all(p.dtype == torch.float32 for p in delta_parameters(new, "default").values())


def test_training_starts_although_one_matrix_is_zero(llama, ids):
    new = adapters.attach(llama, size=8)

    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    result = train(new, batch, TrainingSettings(steps=8, learning_rate=1e-2))
    assert result.losses[-1] < result.losses[0]
    assert all(float(p.detach().abs().sum()) > 0 for p in delta_parameters(new, "default").values())
    assert all(p.grad is None for p in llama.parameters())


def test_with_a_cache_as_without_and_later_tokens_change_nothing(llama, ids):
    for way in WAYS:
        new = disturbed(adapters.attach(llama, size=4, **way))
        with torch.no_grad():
            whole = new(ids).logits
            out = new(ids[:, :10], use_cache=True)
            rest = new(ids[:, 10:], past_key_values=out.past_key_values)
            together = torch.cat([out.logits, rest.logits], 1)
            torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(out.logits, whole[:, :10], atol=1e-5, rtol=1e-4)


def test_beside_other_deltas_and_the_norms(llama, ids):
    one = disturbed(adapters.attach(llama, "a", placement="pfeiffer", size=4), "a")
    two = lora.attach(one, "b", rank=2)
    three = adapters.attach(two, "c", placement="pfeiffer", size=3)
    assert set(attached(three)) == {"a", "b", "c"}
    assert "model.layers.0.self_attn.q_proj.A" in delta_state_dict(three, "b")  # names stay
    with torch.no_grad():
        assert torch.equal(three(ids).logits, one(ids).logits)
        assert torch.equal(detach(detach(three, "b"), "a")(ids).logits, llama(ids).logits)
    norms = set_trainable(three, "c", also="*norm*")
    assert sum(p.requires_grad for n, p in norms.named_parameters() if "norm" in n) == 7
    causal_lm_loss(norms, ids).backward()


def test_bad_input_is_one_sentence(llama):
    for settings, message in [
        ({"placement": "serial"}, "choose one of houlsby, pfeiffer, parallel"),
        ({"sublayers": "both"}, "choose one of feedforward, attention"),
        ({"size": 0}, "size is 0"),
        ({"activation": "sine"}, "choose one of gelu, relu, silu, tanh"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"name": "a.b"}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.attach(llama, **settings)
    once = adapters.attach(llama)
    with pytest.raises(ValueError, match="attached already"):
        adapters.attach(once)
    with pytest.raises(ValueError, match="no list of equal blocks"):
        adapters.attach(nn.Sequential(nn.Linear(3, 3)))


def test_a_file_of_another_model(llama, tiny_llama, tmp_path):
    path = tmp_path / "a"
    for way in WAYS[:3]:
        save_delta(adapters.attach(llama, "a", size=4, **way), "a", path)
        wider = tiny_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=1)
        with pytest.raises(ValueError, match="is for 32 channels, and nothing"):
            open_delta(wider, path)
        with pytest.raises(ValueError, match="the model has no such module"):
            open_delta(nn.Sequential(nn.Linear(32, 32)), path)
