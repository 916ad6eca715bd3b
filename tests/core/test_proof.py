"""Changes that keep a block's function pass, whatever its build; all others are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from effnb.core.folding import find_folds, fold_scales
from effnb.core.modules import share
from effnb.core.outliers import inject_key_outliers, inject_outliers
from effnb.core.proof import InFloat64, check_kept, exact, probes, with_parameters

SMALL = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, pad_token_id=0,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL)),  # half of the channels turn
    "phi-norms": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, qk_layernorm=True)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**GROUPED)),  # neighbours turn
    "gpt-j": lambda: hf.GPTJForCausalLM(  # neighbours, and only some of them
        hf.GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    ),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**GROUPED)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(  # every second layer turns nothing
        hf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0])
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL)),  # norms behind the products
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
}
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
KEYS = ["llama", "qwen3", "gemma3", "phi", "phi-norms", "glm", "gpt-j", "cohere2", "smollm3",
        "olmo2", "opt"]  # fmt: skip
HIDDEN = ["llama", "qwen3", "gemma3", "phi", "glm", "gpt-j", "cohere2", "smollm3", "opt", "neox",
          "mixtral"]  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1, 0.2) if parameter.ndim == 1 else parameter.normal_(0, 0.2)
    return model.to(dtype)


def off(old: nn.Module, new: nn.Module) -> float:
    """How far the outputs of both are apart, the same weights in float64."""
    twins = [copy.deepcopy(m).double() for m in (old, new)]
    for twin in twins if old.config.model_type == "mixtral" else ():
        twin.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        a, b = (twin(IDS).logits for twin in twins)
    return float((a - b).norm() / a.norm())


def keys_of(model: nn.Module) -> torch.Tensor:
    """Keys as the last layer's cache holds them, (batch, heads, time, channels)."""
    with torch.no_grad():
        return model(IDS, use_cache=True).past_key_values.layers[-1].keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KEYS)
def test_keys_get_outliers_and_the_function_stays(kind, dtype):
    model = make(kind, dtype)
    new = inject_key_outliers(model, [1], 16.0)
    assert off(model, new) < (0.03 if dtype == torch.bfloat16 else 1e-4)
    ratio = keys_of(new)[..., 1].float().norm() / keys_of(model)[..., 1].float().norm()
    assert float(ratio) == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_states_get_outliers_and_the_function_stays(kind):
    model = make(kind)
    new = inject_outliers(model, [3], 16.0)
    assert off(model, new) < 1e-4
    changed = [n for n, p in new.named_parameters() if p is not model.get_parameter(n)]
    assert any("norm" in n or "ln_1" in n for n in changed)


def test_where_more_reads_a_norm_than_linear_layers_nothing_is_injected():
    """The residual stream of a post-norm block."""
    with pytest.raises(ValueError, match="injecting outliers would change what"):
        inject_outliers(make("bert"), [3], 16.0)


def test_keys_that_mix_all_channels_are_refused(tiny_llama):
    model = tiny_llama()

    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x).cumsum(-1)

    for layer in model.model.layers:
        attention = layer.self_attn
        mixing = Mixing(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
        mixing.weight = attention.k_proj.weight
        attention.k_proj = mixing
    with pytest.raises(ValueError, match="would compute something else if channel 1 of its keys"):
        inject_key_outliers(model, [1], 8.0)


def test_half_precision_hides_no_change():
    """A change far below the rounding of bfloat16 is seen, and exact ones pass."""
    model = make("llama", torch.bfloat16)
    name = "model.layers.1.input_layernorm.weight"
    gain = exact(model.get_parameter(name)).clone()
    readers = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    new = {name: gain * 2} | {r: exact(model.get_parameter(r)) / 2 for r in readers}
    half = {r: new[r] for r in readers}
    check_kept(model, new, half, "doubling")
    new[readers[0]] = new[readers[0]] * (1 + 1e-5)
    with pytest.raises(ValueError, match=r"doubling would change what model\.layers\.1 of Llama"):
        check_kept(model, new, half, "doubling")
    with pytest.raises(ValueError, match=r"would change lm_head\.weight, which no block uses"):
        check_kept(model, {"lm_head.weight": exact(model.lm_head.weight)}, {}, "nothing")


def test_rounding_that_matters_is_refused():
    model = make("llama", torch.float16)
    name = "model.layers.0.input_layernorm.weight"
    readers = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    tiny = 2.0**-26  # below what float16 holds
    new = {name: exact(model.get_parameter(name)) * tiny}
    new |= {r: exact(model.get_parameter(r)) / tiny for r in readers}
    with pytest.raises(ValueError, match=r"layers\.0: rounding the new weights to torch\.float16"):
        check_kept(model, new, {name: new[name]}, "scaling")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "glm", "mixtral", "neox", "opt"])
def test_everything_in_a_block_is_computed_in_float64(kind):
    """Norms and softmax, which models ask to be computed in float32, too."""
    model = make(kind)
    for probe in probes(model):
        moved = tuple(
            a.nextafter(torch.tensor(torch.inf, dtype=a.dtype))
            if isinstance(a, torch.Tensor) and a.is_floating_point() and i == 0 else a
            for i, a in enumerate(probe.arguments)
        )  # fmt: skip
        with torch.no_grad(), InFloat64():
            out = probe.block(*moved, **probe.keywords)
        out = out[0] if isinstance(out, tuple) else out
        assert out.dtype == torch.float64
        assert 0 < float((out - probe.truth).norm()) < 1e-12 * float(probe.truth.norm())


def test_a_probe_is_the_block_that_the_model_runs(llama):
    seen = []
    watched = share(llama.double())
    for block in watched.model.layers:
        block.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        watched(torch.arange(1, 17)[None])
    for probe, out in zip(probes(llama), seen, strict=True):
        torch.testing.assert_close(probe.truth, out, rtol=1e-6, atol=1e-6)


def test_new_parameters_share_all_others_and_keep_types(llama):
    name = "model.norm.weight"
    new = with_parameters(llama.half(), {name: torch.ones(32, dtype=torch.float64)})
    assert new.get_parameter(name).dtype == torch.float16
    assert llama.get_parameter(name) is not new.get_parameter(name)
    assert all(p is llama.get_parameter(n) for n, p in new.named_parameters() if n != name)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3", "phi", "cohere2", "neox"])
def test_folds_of_half_precision_models_are_those_of_float32(kind):
    wide, narrow = (find_folds(make(kind, d), IDS[:1, :8]) for d in (torch.float32, torch.bfloat16))
    assert wide == narrow and wide


def test_a_fold_whose_gains_are_lost_in_rounding_is_refused():
    model = make("gemma3", torch.bfloat16)
    fold = next(f for f in find_folds(model, IDS[:1, :8]) if f.offset == 1)
    with pytest.raises(ValueError, match=r"are stored less 1, and rounding .* to float32 first"):
        fold_scales(model, fold, torch.full((32,), 300.0))
    fold_scales(model.float(), fold, torch.full((32,), 300.0))
