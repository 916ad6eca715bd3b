"""Extended models: weights shared, caches and padding harmless, files loadable, others refused."""

import json

import pytest
import torch
import transformers as hf
import zoo
from transformers import AutoModelForCausalLM, DynamicCache

from effnb.design.context import (
    METHODS,
    extend,
    ntk_aware,
    ntk_aware_frequencies,
    ntk_by_parts,
    ntk_by_parts_frequencies,
    position_interpolation,
    rope_frequencies,
    rotary_table,
    yarn,
)
from effnb.kernels.rope import rope

TRAINED = 16
SETTINGS = {
    "position_interpolation": {},
    "ntk_aware": {},
    "dynamic_ntk": {},
    "ntk_by_parts": dict(alpha=0.5, beta=2.0),
    "yarn": dict(alpha=0.5, beta=2.0, ramp="paper"),
}
FAMILY = ["llama", "mistral", "qwen2 window", "qwen3", "mixtral"]


@pytest.fixture(scope="module", autouse=True)
def mistral():
    options = zoo._DECODER | dict(sliding_window=9)
    zoo.ZOO["mistral"] = lambda: hf.MistralForCausalLM(hf.MistralConfig(**options))
    yield
    del zoo.ZOO["mistral"]


def extended(model, method, factor=4.0, **options):
    return extend(model, method, factor, trained_length=TRAINED, **SETTINGS[method], **options)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def in_steps(model, ids, steps):
    """The logits of a text that is read in steps, with a cache."""
    cache, found, at = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for step in steps:
            out = model(input_ids=ids[:, at : at + step], past_key_values=cache, use_cache=True)
            found.append(out.logits)
            at += step
    return torch.cat(found, 1)


def test_the_methods_are_all_here():
    assert set(SETTINGS) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILY)
def test_with_a_cache_or_without(name, method):
    """Token by token, and in uneven steps across the trained length: the same logits."""
    model = zoo.make(name)
    found, ids = extended(model, method), zoo.words(2, 37)
    want = logits(found, ids)
    for steps in ([1] * 37, [11, 1, 1, 20, 4]):
        torch.testing.assert_close(in_steps(found, ids, steps), want, rtol=0, atol=1e-12)
    assert float((want - logits(model, ids))[:, -1].abs().max()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(method, side):
    found = extended(zoo.make("llama"), method)
    long, short = zoo.words(1, 37, 1), zoo.words(1, 25, 2)
    pad = torch.full((1, 12), 2)
    order = [pad, short] if side == "left" else [short, pad]
    mask = torch.cat([torch.zeros_like(part) if part is pad else part * 0 + 1 for part in order], 1)
    both = torch.cat([long, torch.cat(order, 1)])
    mask = torch.cat([torch.ones_like(long), mask])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(found, both, attention_mask=mask, position_ids=positions)
    at = slice(12, None) if side == "left" else slice(0, 25)
    torch.testing.assert_close(together[:1], logits(found, long), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[1:, at], logits(found, short), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_padded_texts_are_continued_as_alone(method):
    found = extended(zoo.make("llama"), method)
    found.generation_config.eos_token_id = None
    long, short = zoo.words(1, 20, 1), zoo.words(1, 13, 2)
    both = torch.cat([long, torch.cat([torch.full((1, 7), 2), short], 1)])
    mask = torch.ones_like(both)
    mask[1, :7] = 0
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=2)
    together = found.generate(both, attention_mask=mask, **options)
    for row, text in enumerate((long, short)):
        for use_cache in (True, False):
            alone = found.generate(
                text, attention_mask=torch.ones_like(text), use_cache=use_cache, **options
            )
            assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_shared_and_the_original_stays(method):
    model = zoo.make("llama")
    ids, config = zoo.words(2, 30), json.dumps(model.config.to_dict(), default=str)
    before, table = logits(model, ids), model.model.rotary_emb.inv_freq
    values = table.clone()
    found = extended(model, method)
    assert {id(p) for p in found.parameters()} == {id(p) for p in model.parameters()}
    assert model.model.rotary_emb.inv_freq is table and torch.equal(table, values)
    assert json.dumps(model.config.to_dict(), default=str) == config
    assert model.config._attn_implementation in ("sdpa", "eager")
    logits(found, ids)
    assert torch.equal(logits(model, ids), before)
    assert set(found.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_of_1_is_the_model_itself(method):
    model, ids = zoo.make("llama"), zoo.words(2, TRAINED)
    options = {} if method == "dynamic_ntk" else dict(factor=1.0)
    found = METHODS[method](model, trained_length=TRAINED, **options)
    if method == "dynamic_ntk":  # angles are exact there, in float32 in the model
        torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits(found, ids), logits(model, ids))
        assert torch.equal(logits(found, zoo.words(1, 90)), logits(model, zoo.words(1, 90)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3", torch.float32),
        ("llama", torch.float64),
        ("qwen3", torch.bfloat16),
        ("mixtral", torch.float32),  # its configuration leaves the size of heads open
    ],
)
def test_saved_and_loaded(method, name, dtype, tmp_path):
    model = zoo.make(name).to(dtype)
    found, ids = extended(model, method), zoo.words(2, 37)
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.config.rope_parameters == found.config.rope_parameters
    if method == "dynamic_ntk":  # transformers has no such method; the function gives it back
        assert not torch.equal(logits(loaded, ids), logits(found, ids))
        loaded = extended(loaded, method)
        assert torch.equal(logits(loaded, ids), logits(found, ids))
        return
    want, tolerance = logits(found, ids).float(), 1e-4 if dtype != torch.bfloat16 else 0.3
    torch.testing.assert_close(logits(loaded, ids).float(), want, rtol=0, atol=tolerance)
    table, again = found.model.rotary_emb, loaded.model.rotary_emb
    torch.testing.assert_close(again.inv_freq, table.inv_freq.float(), rtol=3e-7, atol=0)
    assert again.attention_scaling == table.attention_scaling


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("position_interpolation", {}, "linear"),
        ("ntk_aware", {}, "default"),
        ("dynamic_ntk", {}, "dynamic"),
        ("ntk_by_parts", {}, "yarn"),
        ("ntk_by_parts", dict(ramp="paper"), "longrope"),
        ("yarn", {}, "yarn"),
        ("yarn", dict(ramp="paper"), "longrope"),
    ],
)
def test_what_the_configuration_says(method, options, kind):
    model = zoo.make("llama")
    found = extend(model, method, 4.0, trained_length=TRAINED, **options)
    said = found.config.rope_parameters
    assert said["rope_type"] == kind
    assert found.config.max_position_embeddings == (TRAINED if kind == "dynamic" else 4 * TRAINED)
    assert (said["rope_theta"] == 10_000) is (method != "ntk_aware")
    found.config.validate_rope()
    json.dumps(said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_angles(dtype):
    """Whether the model is cast before or after, the table is the exact one."""
    model, ids = zoo.make("llama"), zoo.words(1, 90)
    want = yarn(model.float(), 4.0).model.rotary_emb.inv_freq
    for found in (yarn(zoo.make("llama").to(dtype), 4.0), yarn(zoo.make("llama"), 4.0).to(dtype)):
        rotary = found.model.rotary_emb
        positions = torch.arange(3000, 3090)[None]
        cos, _ = rotary(torch.zeros(1, dtype=torch.float32), positions)
        assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, want)
        angles = positions[..., None].float() * want
        scale = found.model.rotary_emb.attention_scaling
        torch.testing.assert_close(cos, torch.cat([angles, angles], -1).cos() * scale)
        assert logits(found, ids).dtype == dtype
    # What a rounded table would cost at these positions, for heads of 64: a good part of a turn.
    plain = rope_frequencies(64)
    off = positions[..., None].float() * (plain.to(dtype).float() - plain)
    assert float(off.abs().max()) > 0.2
    # The attention of dynamic NTK computes in float32 too.
    exact = logits(extended(zoo.make("llama"), "dynamic_ntk"), ids)
    found = logits(extended(zoo.make("llama").to(dtype), "dynamic_ntk"), ids)
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) < 0.1


def test_the_model_computes_with_the_method_s_table():
    """One layer, by hand: the kernel with our frequencies gives the scores of the model."""
    options = zoo._DECODER | dict(num_hidden_layers=1)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**options)).eval()
    found, ids = yarn(model, 4.0, alpha=0.5, beta=8.0), zoo.words(1, 40)
    found.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = found(input_ids=ids, output_attentions=True).attentions[0]
        layer = found.model.layers[0]
        x = layer.input_layernorm(found.model.embed_tokens(ids))
        q, k = (
            projection(x).view(1, 40, -1, 8).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
    inv_freq = ntk_by_parts_frequencies(rope_frequencies(8), 4.0, 128, alpha=0.5, beta=8.0)
    q, k = rope(q, k, inv_freq, scaling=0.1 * 1.3862943611 + 1)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["cohere2", "gemma2", "falcon", "qwen3-moe"])
def test_other_layouts_and_heads_take_fixed_tables(name):
    """Their own code turns: interleaved pairs, soft-capped scores, fused matrices."""
    model, ids = zoo.make(name), zoo.words(2, 24)
    found = position_interpolation(model, 2.0)
    double = model(input_ids=ids, position_ids=torch.arange(24)[None] / 2)  # positions by hand
    torch.testing.assert_close(logits(found, ids), double.logits.detach(), rtol=0, atol=1e-5)


def test_a_partly_rotated_head_keeps_its_other_part():
    options = zoo._ENCODER | dict(hidden_size=64)
    torch.manual_seed(0)
    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**options, rotary_pct=0.5)).eval()
    table = rotary_table(model)
    assert (table.dim, table.head_dim) == (8, 16)
    found = ntk_aware(model, 4.0)
    torch.testing.assert_close(
        found.gpt_neox.rotary_emb.inv_freq, ntk_aware_frequencies(table.inv_freq, 4.0)
    )
    assert found.config.rope_parameters["partial_rotary_factor"] == 0.5
    ntk_by_parts(model, 4.0, alpha=0.5, beta=8.0)
    assert yarn(model, 4.0, attention=False).gpt_neox.rotary_emb.attention_scaling == 1
    with pytest.raises(ValueError, match="rotates 8 of the 16 numbers of a head"):
        yarn(model, 4.0)
    dynamic = extend(model, "dynamic_ntk", trained_length=TRAINED)
    ids = zoo.words(1, 30)
    within = logits(dynamic, ids[:, :TRAINED])
    torch.testing.assert_close(within, logits(model, ids[:, :TRAINED]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(dynamic, ids)[:, :TRAINED], within, rtol=0, atol=1e-5)


def test_yarn_s_attention_can_be_left_out_or_given():
    model = zoo.make("llama")
    for attention, scale in ((True, 1.1386294), (False, 1.0), (1.3, 1.3), (1, 1.0)):
        found = yarn(model, 4.0, attention=attention).model.rotary_emb
        assert found.attention_scaling == pytest.approx(scale)
    parts = ntk_by_parts(model, 4.0).model.rotary_emb
    off = yarn(model, 4.0, attention=False).model.rotary_emb
    assert torch.equal(off.inv_freq, parts.inv_freq)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_weights_and_nothing_looks_ahead(method):
    found = extended(zoo.make("llama"), method)
    ids = zoo.words(1, 30)
    inputs = found.get_input_embeddings()(ids).detach().requires_grad_()
    out = found(inputs_embeds=inputs, use_cache=False).logits
    weights = torch.arange(96.0).double()
    (reach,) = torch.autograd.grad((out[0, 22] * weights).sum(), inputs, retain_graph=True)
    support = reach[0].abs().amax(-1) > 0
    assert bool(support[:23].all()) and not bool(support[23:].any())
    out.square().mean().backward()
    projection = found.model.layers[0].self_attn.q_proj.weight
    assert float(projection.grad.abs().max()) > 0
    projection.grad = None


# --- what is refused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2", "has no table of rotary frequencies"),
        ("gptj", "has no table of rotary frequencies"),
        ("bloom", "has no table of rotary frequencies"),
        ("opt", "has no table of rotary frequencies"),
        ("t5", "has no table of rotary frequencies"),
        ("bert", "has no table of rotary frequencies"),
        ("gemma3", "has a rotary table for each type of layer"),
        ("modernbert", "has a rotary table for each type of layer"),
        ("gpt-oss", "of rope_type 'yarn', scaled already"),
    ],
)
@pytest.mark.parametrize("method", ["none", *METHODS])
def test_models_without_one_plain_table(name, said, method):
    with pytest.raises(ValueError) as problem:
        extend(zoo.make(name), method, 2.0)
    assert said in str(problem.value) and str(problem.value).count(". ") == 0


@pytest.mark.parametrize("name", ["cohere2", "falcon"])
def test_dynamic_ntk_needs_half_split_heads_and_ordinary_attention(name):
    with pytest.raises(ValueError, match="half-split layout before ordinary attention"):
        extend(zoo.make(name), "dynamic_ntk")


def test_layers_without_positions_are_no_place_for_dynamic_ntk():
    options = zoo._DECODER | dict(no_rope_layers=[1, 0, 1], pad_token_id=0)
    torch.manual_seed(0)
    model = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**options)).eval()
    with pytest.raises(ValueError, match="every layer"):
        extend(model, "dynamic_ntk")
    found, ids = yarn(model, 4.0), zoo.words(1, 20)
    torch.testing.assert_close(in_steps(found, ids, [7, 1, 12]), logits(found, ids))


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_that_knows_longrope_only(method, tmp_path):
    """Phi-3's: every fixed table is written as that; nothing else could be saved."""
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**zoo._DECODER, pad_token_id=0)).eval()
    if method == "dynamic_ntk":
        with pytest.raises(ValueError, match="has no rope_type 'dynamic'"):
            extended(model, method)
        return
    found, ids = extended(model, method), zoo.words(2, 37)
    assert found.config.original_max_position_embeddings == TRAINED
    found.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(found, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(in_steps(found, ids, [9, 28]), logits(found, ids), rtol=0, atol=1e-5)


def test_vision_beside_text_is_refused():
    text = zoo._DECODER | dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2]))
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32)
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision)
    with pytest.raises(ValueError, match="rope_type 'axial'"):
        yarn(hf.Qwen2VLForConditionalGeneration(config), 2.0)


def test_positions_of_several_axes():
    config = hf.LlamaConfig(**zoo._DECODER)
    model = hf.LlamaForCausalLM(config)
    model.config.rope_parameters["mrope_section"] = [1, 1, 2]
    with pytest.raises(ValueError, match="several axes"):
        yarn(model, 2.0)


def test_heads_of_an_odd_size():
    options = zoo._DECODER | dict(head_dim=3)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**options))
    with pytest.raises(ValueError, match="heads with 3 rotated numbers"):
        yarn(model, 2.0)


def test_several_tables(llama):
    llama.model.second = hf.models.llama.modeling_llama.LlamaRotaryEmbedding(llama.config)
    assert position_interpolation(llama, 2.0) is not llama  # an equal copy is changed as well
    llama.model.second.inv_freq = llama.model.second.inv_freq * 2
    with pytest.raises(ValueError, match="several rotary tables"):
        yarn(llama, 2.0)


def test_a_table_that_is_not_rope_s(llama):
    llama.model.rotary_emb.inv_freq = llama.model.rotary_emb.inv_freq * 0.5
    with pytest.raises(ValueError, match="not those of its base"):
        yarn(llama, 2.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: extend(m, "alibi", 2.0), "method is 'alibi'"),
        (lambda m: extend(m, "yarn", 0.5), "factor is 0.5"),
        (lambda m: position_interpolation(m, float("nan")), "factor is nan"),
        (lambda m: ntk_aware(m, True), "factor is True"),
        (lambda m: extend(m, "yarn", 2.0, gamma=3), "no option 'gamma'"),
        (lambda m: extend(m, "none", 2.0, ramp="code"), "none has no option 'ramp'"),
        (lambda m: yarn(m, 2.0, trained_length=65), "table is for 64 tokens"),
        (lambda m: yarn(m, 2.0, trained_length=0), "trained_length is 0"),
        (lambda m: yarn(m, 2.0, ramp="cubic"), "ramp is 'cubic'"),
        (lambda m: yarn(m, 2.0, alpha=40.0), "alpha is 40.0"),
        (lambda m: yarn(m, 2.0, attention=0.0), "attention is 0.0"),
        (lambda m: yarn(yarn(m, 2.0), 2.0), "extended already"),
        (lambda m: extend(extend(m, "dynamic_ntk"), "dynamic_ntk"), "context is extended already"),
    ],
)
def test_settings_that_make_no_sense(llama, call, said):
    with pytest.raises(ValueError, match=said):
        call(llama)


def test_a_loaded_model_is_scaled_already(llama, tmp_path):
    yarn(llama, 2.0).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scaled already"):
        yarn(loaded, 2.0)


def test_weights_on_the_meta_device(llama):
    with pytest.raises(ValueError, match="meta device"):
        yarn(llama.to("meta"), 2.0)


def test_the_model_as_it_is(llama):
    assert extend(llama, "none", 4.0) is llama
