"""Context extension against transformers: where its formulas are the papers', and where not."""

import copy

import pytest
import torch
import transformers as hf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from effnb.design.context import (
    attention_factor,
    dynamic_ntk,
    dynamic_ntk_frequencies,
    extend,
    ntk_aware,
    ntk_aware_frequencies,
    ntk_by_parts_frequencies,
    position_interpolation_frequencies,
    rope_frequencies,
    transformers_scale,
    yarn,
)
from effnb.kernels.rope import rope

ULP = 2.4e-7
"""Two units in the last place of a float32, relative."""


def config(dim=64, length=2048, base=10_000.0, **parameters):
    return hf.LlamaConfig(
        vocab_size=96, hidden_size=dim, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=length,
        rope_parameters={"rope_theta": base, **parameters},
    )  # fmt: skip


def theirs(kind, length=None, **options):
    said = config(rope_type=kind, **options)
    return ROPE_INIT_FUNCTIONS[kind](said, None, seq_len=length)


def test_rope_s_frequencies_and_rotation_bit_for_bit():
    for dim, base in ((8, 1e4), (64, 1e4), (128, 5e5)):
        module = LlamaRotaryEmbedding(config(dim, base=base, rope_type="default"))
        assert torch.equal(module.inv_freq, rope_frequencies(dim, base))
        q, k = torch.randn(2, 1, 3, 40, dim, generator=torch.Generator().manual_seed(0))
        positions = torch.arange(3000, 3040)
        cos, sin = module(q, positions[None])
        for a, b in zip(
            rope(q, k, rope_frequencies(dim, base), positions), apply_rotary_pos_emb(q, k, cos, sin)
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.7, 8.0])
def test_position_interpolation_is_linear_bit_for_bit(dim, factor):
    inv_freq, scale = theirs("linear", dim=dim, factor=factor)
    assert torch.equal(inv_freq, position_interpolation_frequencies(rope_frequencies(dim), factor))
    assert scale == 1


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0, 32.0])
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_s_published_ramp_bit_for_bit(dim, factor, truncate):
    inv_freq, scale = theirs(
        "yarn", dim=dim, factor=factor, original_max_position_embeddings=2048, truncate=truncate
    )
    plain = rope_frequencies(dim)
    found = ntk_by_parts_frequencies(plain, factor, 2048, base=1e4, truncate=truncate)
    assert torch.equal(inv_freq, found)
    assert scale == attention_factor(factor)
    paper = ntk_by_parts_frequencies(plain, factor, 2048, ramp="paper")
    assert not torch.allclose(inv_freq, paper, rtol=0.02, atol=0)  # the paper's is another


@settings(max_examples=60)
@given(
    st.integers(2, 64), st.floats(1.0, 64.0), st.integers(16, 65536),
    st.sampled_from([500.0, 1e4, 1e6]), st.floats(0.5, 4.0), st.floats(5.0, 64.0),
)  # fmt: skip
def test_yarn_with_any_numbers(half, factor, length, base, alpha, beta):
    """Up to the order of a division: 2 units in the last place."""
    inv_freq, scale = theirs(
        "yarn", dim=2 * half, base=base, factor=factor, beta_fast=beta, beta_slow=alpha,
        original_max_position_embeddings=length,
    )  # fmt: skip
    plain = rope_frequencies(2 * half, base)
    options = dict(alpha=alpha, beta=beta, base=base)
    found = ntk_by_parts_frequencies(plain, factor, length, **options)
    torch.testing.assert_close(inv_freq, found, rtol=ULP, atol=0)
    assert scale == attention_factor(factor)


def test_their_module_multiplies_cosines_and_sines():
    """cos² + sin² = 1.2965 at a scale of 4."""
    said = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)
    cos, sin = LlamaRotaryEmbedding(config(**said))(torch.ones(1), torch.arange(9)[None])
    squares = cos.square() + sin.square()
    torch.testing.assert_close(squares, torch.full_like(squares, 1.2965), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("length", [100, 2048, 3000, 16384])
def test_dynamic_with_a_factor_of_1_is_the_paper_s(dim, length):
    inv_freq, scale = theirs("dynamic", length, dim=dim, factor=1.0)
    found = dynamic_ntk_frequencies(rope_frequencies(dim), length, 2048)
    torch.testing.assert_close(inv_freq, found, rtol=1e-6, atol=0)
    assert scale == 1


@pytest.mark.parametrize(("factor", "effective"), [(1.0, 1.0), (4.0, 13.0), (8.0, 57.0)])
def test_dynamic_with_another_factor_is_not(factor, effective):
    """At f times the length it computes with a scale of f² - f + 1."""
    length = int(factor * 2048)
    inv_freq, _ = theirs("dynamic", length, factor=factor)
    assert transformers_scale(length, 2048, factor) == effective
    plain = rope_frequencies(64)
    torch.testing.assert_close(inv_freq, ntk_aware_frequencies(plain, effective), rtol=1e-6, atol=0)
    if factor > 1:
        ours = dynamic_ntk_frequencies(plain, length, 2048)
        assert not torch.allclose(inv_freq, ours, rtol=0.1, atol=0)


@pytest.mark.parametrize("method", ["ntk_aware", "position_interpolation", "ntk_by_parts", "yarn"])
@pytest.mark.parametrize("ramp", ["code", "paper"])
def test_the_tables_that_transformers_builds_from_our_configurations(method, ramp):
    """What a loaded model computes with: bit for bit with the code's ramp, to an ulp without."""
    model = hf.LlamaForCausalLM(config(64, 2048, rope_type="default"))
    options = dict(ramp=ramp) if method in ("ntk_by_parts", "yarn") else {}
    found = extend(model, method, 4.0, **options)
    ours = found.model.rotary_emb
    built = LlamaRotaryEmbedding(copy.deepcopy(found.config))
    assert built.attention_scaling == ours.attention_scaling
    if options.get("ramp") == "paper":
        torch.testing.assert_close(built.inv_freq, ours.inv_freq, rtol=ULP, atol=0)
        built(torch.ones(1), torch.arange(9000)[None])  # LongRoPE's choice by length: none here
        torch.testing.assert_close(built.inv_freq, ours.inv_freq, rtol=ULP, atol=0)
    else:
        assert torch.equal(built.inv_freq, ours.inv_freq)


# --- a key-value cache under dynamic NTK


LENGTH = 16


def their_dynamic(model):
    """The same weights with transformers' own dynamic NTK, factor 1."""
    said = copy.deepcopy(model.config)
    said.rope_parameters = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10_000.0}
    said.max_position_embeddings = LENGTH
    found = type(model)(said).to(model.dtype).eval()
    found.load_state_dict(model.state_dict())
    return found


def small(layers):
    torch.manual_seed(0)
    options = zoo._DECODER | dict(num_hidden_layers=layers, tie_word_embeddings=False)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.double()


@torch.no_grad()
def stepwise(model, ids):
    cache = DynamicCache()
    return torch.cat(
        [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
            for i in range(len(ids[0]))
        ],
        1,
    )


@torch.no_grad()
def test_their_cache_keeps_keys_of_old_bases():
    """Even with one layer, where nothing but the keys' angles can differ."""
    model, ids = small(1), zoo.words(1, 40)
    whole, steps = (
        their_dynamic(model)(ids, use_cache=False).logits,
        stepwise(their_dynamic(model), ids),
    )
    torch.testing.assert_close(
        steps[:, :LENGTH], stepwise(model, ids)[:, :LENGTH], rtol=0, atol=1e-5
    )
    assert float((steps - whole)[:, -1].abs().max()) > 0.01
    # Ours is equal in both, and the last token of their pass, which has the table of its length.
    ours = dynamic_ntk(model, trained_length=LENGTH)
    together = ours(ids, use_cache=False).logits
    torch.testing.assert_close(stepwise(ours, ids), together, rtol=0, atol=1e-12)
    torch.testing.assert_close(together[:, -1], whole[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_recomputing_for_every_pass_has_no_cache_that_agrees():
    """With two layers the hidden states differ too: a later token changes what earlier ones are."""
    model, ids = small(2), zoo.words(1, 40)
    long = their_dynamic(model)(ids, use_cache=False).logits
    short = their_dynamic(model)(ids[:, :30], use_cache=False).logits
    assert float((long[:, :30] - short).abs().max()) > 0.01
    ours = dynamic_ntk(model, trained_length=LENGTH)
    long, short = (ours(part, use_cache=False).logits for part in (ids, ids[:, :30]))
    torch.testing.assert_close(long[:, :30], short, rtol=0, atol=1e-12)


@torch.no_grad()
def test_their_texts_share_one_scale():
    """A long text in the batch changes what a short one computes; not here."""
    model, long, short = small(2), zoo.words(1, 40, 1), zoo.words(1, 12, 2)
    both = torch.cat([long, torch.cat([short, torch.full((1, 28), 2)], 1)])
    mask = torch.ones_like(both)
    mask[1, 12:] = 0
    positions = torch.arange(40)[None].expand(2, -1)
    for found, same in (
        (their_dynamic(model), False),
        (dynamic_ntk(model, trained_length=LENGTH), True),
    ):
        alone = found(short, use_cache=False).logits
        together = found(both, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert torch.allclose(together[1:, :12], alone, rtol=0, atol=1e-6) is same


@torch.no_grad()
def test_a_cast_rounds_their_table_and_not_ours():
    model = hf.LlamaForCausalLM(config(64, 2048, rope_type="default"))
    exact = rope_frequencies(64)
    cast = copy.deepcopy(model).bfloat16()
    cast(zoo.words(1, 4))
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    off = 2040 * (cast.model.rotary_emb.inv_freq.float() - exact)
    assert float(off.abs().max()) > 0.8  # radians, at the end of the trained context
    ours = ntk_aware(cast, 1.0)
    ours(zoo.words(1, 4))
    assert torch.equal(ours.model.rotary_emb.inv_freq, exact)
    again = yarn(model, 1.0).bfloat16()
    again(zoo.words(1, 4))
    assert torch.equal(again.model.rotary_emb.inv_freq, exact)
