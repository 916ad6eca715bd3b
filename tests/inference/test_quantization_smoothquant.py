"""SmoothQuant moves outliers into the weights and leaves the function alone."""

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from effnb.core.modules import Layers
from effnb.core.outliers import inject_outliers
from effnb.inference.quantization.activations import (
    QuantizedInputs,
    activation_codes,
    input_maxima,
    quantize_activations,
    quantized_matmul,
)
from effnb.inference.quantization.formats import quantize
from effnb.inference.quantization.rtn import rtn
from effnb.inference.quantization.smoothquant import (
    smooth,
    smooth_scales,
    smoothable,
    smoothquant,
)

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class Block(nn.Module):
    """Pre-norm by default; post-norm adds what the norm gives to the stream."""

    def __init__(self, post=False):
        super().__init__()
        self.post, self.norm = post, nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        h = self.norm(x)
        assert h.shape[-1] == h.size(-1) == 8  # asking for the shape is no use of the numbers
        return (h if self.post else x) + self.a(h) * self.b(h)


class Net(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(post), Block(post)])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@settings(max_examples=30)
@given(
    features=st.integers(1, 12),
    rows=st.integers(1, 12),
    alpha=st.sampled_from(ALPHAS),
    seed=st.integers(0, 99),
)
def test_scales_are_those_of_the_equation(features, rows, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(7, features, generator=generator, dtype=torch.float64)
    W = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    s = smooth_scales(X.abs().amax(0), [W], alpha)
    for j in range(features):
        x, w = float(X[:, j].abs().max()), max(float(W[:, j].abs().max()), 1e-5)
        assert float(s[j]) == pytest.approx(max(x**alpha / w ** (1 - alpha), 1e-5))
    torch.testing.assert_close((X / s) @ (W * s).T, X @ W.T, rtol=1e-12, atol=1e-12)


def test_at_one_half_both_sides_have_the_same_maxima():
    X, A, B = torch.randn(9, 6) * torch.logspace(-1, 2, 6), torch.randn(4, 6), torch.randn(5, 6)
    s = smooth_scales(X.abs().amax(0), [A, B], 0.5)
    heavier = torch.cat([A, B]) * s  # both read X, so the larger of the two counts
    torch.testing.assert_close((X / s).abs().amax(0), heavier.abs().amax(0))


def test_features_that_never_fire_are_left_alone():
    s = smooth_scales(torch.tensor([0.0, 2.0]), [torch.ones(3, 2)], 0.5)
    assert s[0] == 1 and s[1] == pytest.approx(2**0.5)


GOLDEN = {
    "token": (0.0352, (0.0424, 0.0146, 0.0065, 0.0122, 0.0349)),
    "tensor": (0.109, (0.131, 0.046, 0.0226, 0.040, 0.113)),
}


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_the_curve_over_alpha(granularity):
    """Golden values of the toy (one channel times 60, W8A8), within 15% on average over seeds."""
    group_size = {"token": "row", "tensor": "tensor"}[granularity]
    errors = torch.zeros(6)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(512, 256, generator=generator)
        X[:, 7] *= 60
        W = torch.randn(256, 256, generator=generator) / 16
        for i, alpha in enumerate((None, *ALPHAS)):
            s = 1 if alpha is None else smooth_scales(X.abs().amax(0), [W], alpha)
            codes = activation_codes(X / s, 8, granularity)
            weight = quantize(W * s, 8, group_size=group_size, symmetric=True)
            errors[i] += relative(quantized_matmul(*codes, weight), X @ W.T) / 6
    plain, curve = GOLDEN[granularity]
    torch.testing.assert_close(errors, torch.tensor([plain, *curve]), rtol=0.15, atol=0)
    assert errors[1] > 0.9 * errors[0], "alpha 0 is not off: it is no better than no smoothing"
    assert errors.argmin() == 3, "the best is one half"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_function_stays(llama, ids, alpha):
    llama = inject_outliers(llama.double(), [3, 17], 30.0)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    new = smooth(llama, ids, alpha)
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, llama(ids).logits, rtol=1e-10, atol=1e-10)
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not torch.allclose(
        new.model.layers[0].input_layernorm.weight, llama.model.layers[0].input_layernorm.weight
    )


def test_a_layer_norms_bias_is_smoothed_too(ids):
    torch.manual_seed(0)
    net, ids = Net().double(), ids % 10
    new = smooth(net, ids)
    torch.testing.assert_close(new(ids), net(ids), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(new.blocks[0].norm.bias, net.blocks[0].norm.bias)


def test_only_layers_that_read_a_norm_change(llama, ids):
    new = smooth(llama, ids)
    changed = {
        name.split(".", 3)[-1]
        for (name, a), (_, b) in zip(new.named_parameters(), llama.named_parameters(), strict=True)
        if a is not b
    }
    assert changed == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }


def test_layers_with_one_input_share_one_scale(llama, ids):
    new = smooth(llama, ids, 0.5)
    old_block, block = llama.model.layers[1].self_attn, new.model.layers[1].self_attn
    ratios = [
        getattr(block, n).weight / getattr(old_block, n).weight
        for n in ("q_proj", "k_proj", "v_proj")
    ]
    for ratio in ratios:
        torch.testing.assert_close(ratio, ratios[0][:1].expand_as(ratio))
    name = "model.layers.1.self_attn.q_proj"
    top = torch.cat([getattr(old_block, n).weight for n in ("q_proj", "k_proj", "v_proj")])
    expected = (input_maxima(llama, ids, [name])[name] / top.abs().amax(0)) ** 0.5
    torch.testing.assert_close(ratios[0][0], expected)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_injected_outliers_vanish_without_trace(llama, ids, alpha):
    """Inputs times k and weights divided by k give scales times k, whatever alpha is."""
    llama = llama.double()
    plain, injected = (smooth(m, ids, alpha) for m in (llama, inject_outliers(llama, [5], 40.0)))
    for (name, a), (_, b) in zip(
        plain.named_parameters(), injected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_smoothing_rescues_quantized_activations(llama, ids):
    injected = inject_outliers(llama, [3], 40.0)
    with torch.no_grad():
        truth = llama(ids).logits
        for level, granularity in (("O1", "token"), ("O2", "tensor"), ("O3", "static")):
            plain = quantize_activations(
                injected, granularity=granularity, calibration=ids if level == "O3" else None
            )
            smoothed = smoothquant(injected, ids, level=level)
            kinds = {m.granularity for m in smoothed.modules() if isinstance(m, QuantizedInputs)}
            assert kinds == {granularity}
            assert relative(smoothed(ids).logits, truth) < 0.5 * relative(plain(ids).logits, truth)


def test_bits_and_patterns(llama, ids):
    new = smoothquant(llama, ids, weight_bits=4, activation_bits=6, layers="*.mlp.*")
    found = {n: m for n, m in new.named_modules() if isinstance(m, QuantizedInputs)}
    assert len(found) == 9 and all(".mlp." in name for name in found)
    assert {(m.bits, m.layer.quantized.bits) for m in found.values()} == {(6, 4)}
    assert (
        new.model.layers[0].input_layernorm.weight is llama.model.layers[0].input_layernorm.weight
    )


def test_a_norm_with_another_reader_is_left_alone(llama):
    """Without the values among the layers, queries and keys cannot be smoothed either."""
    assert len(smoothable(llama)) == 6
    fitting = smoothable(llama, layers=Layers(exclude=("*.v_proj", "lm_head")))
    assert all(name.endswith("post_attention_layernorm") for name in fitting)


def test_post_norm_models_are_refused(ids):
    with pytest.raises(ValueError, match="feeds linear layers only"):
        smooth(Net(post=True), ids % 10)


def gemma_of(size: float, dtype: torch.dtype):
    """A Gemma with weights of a size, whose gains are stored less 1."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = GemmaConfig(vocab_size=128, hidden_size=16, intermediate_size=24, **sizes)
    gemma = GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in gemma.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim == 1 else size)
    return gemma.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.2, 0.002])
def test_a_gain_that_is_stored_less_one(ids, size, dtype):
    """(1 + w) / s - 1 is near -1 where s is large, and half precision has few numbers there."""
    gemma = gemma_of(size, dtype)
    if dtype == torch.bfloat16 and size < 0.1:
        with pytest.raises(ValueError, match="convert the model to float32 first"):
            smooth(gemma, ids)
        return
    new = smooth(gemma, ids)
    with torch.no_grad():
        a, b = (copy.deepcopy(m).double()(ids).logits for m in (gemma, new))
    assert float((a - b).norm() / a.norm()) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "phi", "opt", "neox", "cohere2", "mixtral"])
def test_the_function_stays_on_many_architectures(ids, kind, dtype):
    torch.manual_seed(0)
    small = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    small |= dict(num_attention_heads=4, pad_token_id=0)
    grouped = small | dict(num_key_value_heads=2, head_dim=8)
    model = {
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**grouped)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**grouped)),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**small)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32)),
        "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**small)),
        "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**grouped)),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2)
        ),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1, 0.2) if parameter.ndim == 1 else parameter.normal_(0, 0.2)
    model = model.eval().to(dtype)
    new = smooth(model, ids)
    with torch.no_grad():
        twins = [copy.deepcopy(m).double() for m in (model, new)]
        for twin in twins if kind == "mixtral" else ():
            twin.set_experts_implementation("eager")  # grouped products have no float64
        a, b = (twin(ids).logits for twin in twins)
    assert float((a - b).norm() / a.norm()) < (0.03 if dtype == torch.bfloat16 else 1e-4)


def test_bad_input_is_one_sentence(llama, ids):
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha is .*; it must lie between 0 and 1"):
            smooth(llama, ids, alpha)
    with pytest.raises(ValueError, match="level is 'O4'; it must be one of O1, O2, O3"):
        smoothquant(llama, ids, level="O4")
    with pytest.raises(ValueError, match="bits is 16"):
        smoothquant(llama, ids, weight_bits=16)
    with pytest.raises(ValueError, match="calibration data is empty"):
        smooth(llama, ids[:0])
    with pytest.raises(ValueError, match="quantized already"):
        smooth(rtn(llama, 4), ids)
    with pytest.raises(ValueError, match="there is nothing to fold"):
        smooth(llama, ids, layers="nothing")
    with pytest.raises(ValueError, match="finite numbers from 0"):
        smooth_scales(torch.tensor([torch.nan]), [torch.ones(2, 1)])
    with pytest.raises(ValueError, match="NaN or infinite"):
        smooth_scales(torch.ones(1), [torch.full((2, 1), torch.inf)])
    with pytest.raises(ValueError, match="no weight that reads"):
        smooth_scales(torch.ones(1), [])
    with torch.no_grad():
        llama.model.embed_tokens.weight[int(ids[0, 0])] = torch.nan
    with pytest.raises(ValueError, match="are NaN or infinite on the calibration data"):
        smooth(llama, ids)
