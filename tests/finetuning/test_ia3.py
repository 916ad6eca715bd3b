"""(IA)^3: ones at the start, exact merges, and which layers are found."""

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.delta_files import attach_state, open_delta, save_delta
from effnb.core.deltas import delta_parameters, delta_state_dict, detach, hosts, load_delta, merge
from effnb.core.training import TrainingSettings, train
from effnb.finetuning import ia3, lora
from effnb.inference.quantization import rtn


def moved(model, name="default", seed=0):
    """Vectors as training could leave them."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        k: 1 + 0.5 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for k, t in delta_state_dict(model, name).items()
    }
    return load_delta(model, name, state)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "LayerNorm.weight" in name else 0, 0.1)
    return model


@examples(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), st.sampled_from(["outputs", "inputs"]))
def test_the_equations_and_their_merges(n_in, n_out, bias, side):
    torch.manual_seed(n_in)
    layer = nn.Linear(n_in, n_out, bias=bias).double()
    new = moved(ia3.attach(nn.Sequential(layer), **{side: "*"}))
    (scale,) = delta_parameters(new, "default").values()
    x = torch.randn(3, n_in, dtype=torch.float64)
    if side == "outputs":
        expected = scale * layer(x)  # the bias too
    else:
        expected = nn.functional.linear(scale * x, layer.weight, layer.bias)
    torch.testing.assert_close(new(x), expected, rtol=1e-12, atol=1e-12)
    merged = merge(new, "default")
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    if side == "inputs" and bias:
        assert torch.equal(merged[0].bias, layer.bias)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_is_found_and_counted(llama, ids, kind, tmp_path):
    """L (d_k + d_v + d_ff); of BERT 3 (64 + 64 + 128) = 768."""
    model = llama if kind == "llama" else bert()
    new = ia3.attach(model)
    state = delta_state_dict(new, "default")
    total = sum(t.numel() for t in state.values())
    assert total == (3 * (16 + 16 + 48) if kind == "llama" else 768)
    ends = {key.split(".", 3)[3] for key in state}
    assert ends == (
        {"self_attn.k_proj.output", "self_attn.v_proj.output", "mlp.down_proj.input"}
        if kind == "llama"
        else {"attention.self.key.output", "attention.self.value.output", "output.dense.input"}
    )
    read = lambda m: m(input_ids=ids % 96)[0]  # noqa: E731
    with torch.no_grad():
        assert torch.equal(read(new), read(model))
        trained = moved(new)
        assert not torch.allclose(read(trained), read(model), atol=0.01)
        torch.testing.assert_close(
            read(merge(trained, "default")), read(trained), atol=1e-4, rtol=1e-4
        )
        assert torch.equal(read(detach(trained, "default")), read(model))
        save_delta(trained, "default", tmp_path / "a")
        assert torch.equal(read(open_delta(model, tmp_path / "a")), read(trained))
    assert sum(p.numel() for p in new.parameters() if p.requires_grad) == total


def test_parts_and_patterns(llama):
    only = ia3.attach(llama, parts="values")
    assert all(path.endswith("v_proj") for path in hosts(only))
    same = ia3.attach(llama, outputs="*.v_proj")
    assert hosts(same).keys() == hosts(only).keys()
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ).eval()
    new = ia3.attach(t5, outputs=["*.k", "*.v"], inputs="*.wo")
    # L_enc (2 d + d_ff) + L_dec (4 d + d_ff)
    assert sum(t.numel() for t in delta_state_dict(new, "default").values()) == 2 * (
        2 * 16 + 24
    ) + 2 * (4 * 16 + 24)
    words = torch.randint(1, 40, (2, 5))
    with torch.no_grad():
        a, b = (m(input_ids=words, decoder_input_ids=words).logits for m in (t5, new))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        ia3.attach(t5)


def test_training_moves_the_vectors_only(llama):
    new = ia3.attach(llama)

    def batch(step):
        return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))

    result = train(new, batch, TrainingSettings(steps=8, learning_rate=3e-2))
    assert result.losses[-1] < result.losses[0]
    assert all(bool((p != 1).any()) for p in delta_parameters(new, "default").values())
    assert all(p.grad is None for p in llama.parameters())


def test_merging_beside_others(llama, ids):
    """A merge is right or refused: here each allowed one keeps the function."""
    down = dict(layers="*.down_proj")
    base = lora.attach(llama, "lora", rank=2, **down)
    state = {k: 0.1 * torch.randn_like(t) for k, t in delta_state_dict(base, "lora").items()}
    base = load_delta(base, "lora", state)
    both = moved(ia3.attach(base, "ia3", inputs="*.down_proj"), "ia3")
    with torch.no_grad():
        for model in (merge(both, "ia3"), merge(merge(both, "ia3"), "lora")):
            torch.testing.assert_close(model(ids).logits, both(ids).logits, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="beside 'ia3', which reads the weight"):
        merge(both, "lora")
    out = moved(ia3.attach(base, "ia3", outputs="*.down_proj"), "ia3")
    with pytest.raises(ValueError, match="cannot be merged under 'lora', whose output it acts on"):
        merge(out, "ia3")
    with torch.no_grad():
        done = merge(merge(out, "lora"), "ia3")
        torch.testing.assert_close(done(ids).logits, out(ids).logits, atol=1e-3, rtol=1e-3)


def test_on_quantized_layers(llama, ids):
    base = rtn(llama, 8, group_size=16)
    new = moved(ia3.attach(base))
    with pytest.raises(ValueError, match="stored quantized"):
        merge(new, "default")
    merged = merge(new, "default", dequantize=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-3, rtol=1e-3)


def test_half_precision(llama, ids):
    model = llama.to(torch.bfloat16)
    new = ia3.attach(model)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, model(ids).logits)
    assert merge(moved(new), "default")(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("a_setting_of_next_year", 0.5),
        ("init_ia3_weights", "pissa"),
        ("bias", "all"),
    ],
)
def test_every_setting_that_is_not_understood_is_refused(llama, tmp_path, key, value):
    ia3.save_peft(moved(ia3.attach(llama)), "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {key: value}))
    with pytest.raises(ValueError, match=f"uses {key} = "):
        ia3.load_peft(llama, tmp_path)
    config.write_text(json.dumps(about | {"modules_to_save": None, "revision": None}))
    ia3.load_peft(llama, tmp_path)
    config.write_text(json.dumps(about | {"feedforward_modules": []}))
    with pytest.raises(ValueError, match=r"shape \(1, 48\), but the settings say .* outputs"):
        ia3.load_peft(llama, tmp_path)
    config.write_text(json.dumps(about | {"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="holds LORA, not IA3"):
        ia3.load_peft(llama, tmp_path)


def test_bad_input_is_one_sentence(llama, tiny_llama, tmp_path):
    for settings, message in [
        ({"parts": "queries"}, "choose of keys, values, feedforward"),
        ({"parts": []}, "parts is empty"),
        ({"outputs": "nothing"}, "no linear layer fits the pattern nothing; the model has model"),
        ({"outputs": "*", "inputs": "*.v_proj"}, "fits the patterns of outputs and of inputs"),
        ({"name": ""}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            ia3.attach(llama, **settings)
    once = ia3.attach(llama)
    with pytest.raises(ValueError, match="attached already"):
        ia3.attach(once)
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )
    with pytest.raises(ValueError, match=r"could be told to be its keys; .*c_attn"):
        ia3.attach(gpt)
    save_delta(once, "default", tmp_path / "a")
    with pytest.raises(ValueError, match=r"down_proj\.input has shape \(48,\), not \(40,\)"):
        open_delta(tiny_llama(intermediate_size=40), tmp_path / "a")
    with pytest.raises(ValueError, match=r"model\.layers: .*; found 2\.mlp\.down_proj"):
        open_delta(tiny_llama(num_hidden_layers=2), tmp_path / "a")
    with pytest.raises(ValueError, match="one vector, input or output"):
        attach_state(llama, "x", "ia3", {}, {"model.layers.0.mlp.up_proj.A": torch.ones(3)})
    with pytest.raises(ValueError, match="sits on linear layers"):
        attach_state(llama, "x", "ia3", {}, {"model.norm.output": torch.ones(32)})
