"""Outlier injection changes activations and not the function."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from effnb.core.outliers import inject_key_outliers, inject_outliers, norm_readers


def largest_ratio(model, ids, name="model.layers.1.self_attn.q_proj"):
    """Largest channel over the median channel of what a layer reads."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(ids)
    hook.remove()
    sizes = seen[0].abs().mean((0, 1))
    return float(sizes.max() / sizes.median())


def test_the_function_stays_and_the_activations_grow(llama, ids):
    llama = llama.double()
    with torch.no_grad():
        new = inject_outliers(llama, [3, 17], 40.0)
        torch.testing.assert_close(new(ids).logits, llama(ids).logits, rtol=1e-10, atol=1e-10)
        assert largest_ratio(new, ids) > 10 * largest_ratio(llama, ids)
        back = inject_outliers(new, [3, 17], 1 / 40)
    for (name, a), (_, b) in zip(back.named_parameters(), llama.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_only_norms_and_readers_change(llama):
    new = inject_outliers(llama, [0], 8.0)
    changed = {
        n for (n, a), (_, b) in zip(new.named_parameters(), llama.named_parameters(), strict=True)
        if a is not b
    }  # fmt: skip
    kinds = {name.split(".", 3)[-1] for name in changed}
    assert kinds == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }


def test_readers_are_found_by_running(llama, ids):
    readers = norm_readers(llama, ids)
    assert readers["model.layers.0.post_attention_layernorm"] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]


def test_a_norm_that_adds_one_to_its_weight(ids):
    """Gemma stores the gain minus one; multiplying what is stored would change the function."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=int(ids.max()) + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    gemma = GemmaForCausalLM(config).eval().double()
    for name, parameter in gemma.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, -0.5, 0.5)
    new = inject_outliers(gemma, [3], 40.0)
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, gemma(ids).logits, rtol=1e-6, atol=1e-6)
        assert largest_ratio(new, ids) > 10 * largest_ratio(gemma, ids)


@pytest.mark.parametrize("inject", [inject_outliers, inject_key_outliers])
def test_made_in_inference_mode_and_trained_later(llama, ids, inject):
    """A panel computes in inference mode; what it made can be fine-tuned all the same."""
    with torch.inference_mode():
        new = inject(llama, [3], 8.0)
    new(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_layer_norm_bias_is_scaled_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    net, ids = Net().double(), torch.arange(10).view(2, 5)
    torch.testing.assert_close(inject_outliers(net, [1, 2], 30.0)(ids), net(ids))


def test_key_outliers_keep_the_function(llama, ids):
    llama = llama.double()
    with torch.no_grad():
        new = inject_key_outliers(llama, [1], 20.0)
        torch.testing.assert_close(new(ids).logits, llama(ids).logits, rtol=1e-9, atol=1e-9)
    k = "model.layers.0.self_attn.k_proj.weight"
    ratio = new.get_parameter(k) / llama.get_parameter(k)
    rows = (ratio[:, 0] > 1.5).nonzero().flatten().tolist()
    assert rows == [1, 5, 9, 13]  # channel 1 and its rotary partner 5, in both key heads of 8


@pytest.mark.parametrize("inject", [inject_outliers, inject_key_outliers])
def test_bad_input(llama, inject):
    with pytest.raises(ValueError, match="channels must name some of"):
        inject(llama, [99], 2.0)
    with pytest.raises(ValueError, match="channels must name some of"):
        inject(llama, [], 2.0)
    with pytest.raises(ValueError, match="factor is 0.0"):
        inject(llama, [1], 0.0)


def test_a_model_without_such_norms_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="no norm of this model's blocks"):
        inject_outliers(gpt2, [0], 2.0)  # its layers are Conv1D, not Linear
    with pytest.raises(ValueError, match="no attention module with q_proj"):
        inject_key_outliers(gpt2, [0], 2.0)
