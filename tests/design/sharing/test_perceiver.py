"""Perceiver and Perceiver IO against transformers: counts, outputs; order, padding, costs."""

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from effnb.design.sharing import (
    Perceiver,
    PerceiverConfig,
    PerceiverIO,
    PerceiverIOConfig,
    PerceiverMLM,
    latent_layer_multiply_adds,
    perceiver_io_multiply_adds,
    perceiver_multiply_adds,
    reading_multiply_adds,
    shared_places,
    transformer_multiply_adds,
)
from effnb.evaluation.cost import flops

SMALL = dict(inputs=6, latents=3, hidden=8, self_attends=2, heads=2, cross_heads=3)


def count(model):
    return sum(p.numel() for p in model.parameters())


def made(seed=0, **changes):
    torch.manual_seed(seed)
    model = Perceiver(PerceiverConfig(**(SMALL | changes))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def theirs_of(**changes):
    config = dict(
        num_latents=5, d_latents=16, d_model=12, num_blocks=2, num_self_attends_per_block=3,
        num_self_attention_heads=4, num_cross_attention_heads=4, self_attention_widening_factor=2,
        cross_attention_widening_factor=2, attention_probs_dropout_prob=0.0, vocab_size=20,
        max_position_embeddings=9,
    ) | changes  # fmt: skip
    return hf.PerceiverConfig(**config)


def copy_layer(ours, theirs):
    pairs = [
        (ours.norm, theirs.attention.self.layernorm1),
        (ours.attention.query, theirs.attention.self.query),
        (ours.attention.key, theirs.attention.self.key),
        (ours.attention.value, theirs.attention.self.value),
        (ours.attention.output, theirs.attention.output.dense),
        (ours.mlp_norm, theirs.layernorm),
        (ours.mlp[0], theirs.mlp.dense1),
        (ours.mlp[2], theirs.mlp.dense2),
    ]
    if ours.context_norm is not None:
        pairs.append((ours.context_norm, theirs.attention.self.layernorm2))
    for into, source in pairs:
        into.load_state_dict(source.state_dict())


def copy_encoder(ours, theirs):
    with torch.no_grad():
        ours.latents.copy_(theirs.embeddings.latents)
    copy_layer(ours.cross[0], theirs.encoder.cross_attention)
    for mine, other in zip(ours.towers[0], theirs.encoder.self_attends, strict=True):
        copy_layer(mine, other)


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


# --------------------------------------------------------------------------------- references


def test_the_default_of_transformers_has_as_many_parameters():
    with torch.device("meta"):
        theirs = hf.PerceiverModel(hf.PerceiverConfig())
    config = PerceiverConfig(768, 256, 1280, 26, heads=8, cross_heads=8)
    with torch.device("meta"):
        ours = Perceiver(config)
    assert count(theirs) == count(ours) == config.parameters


def test_the_encoder_is_that_of_transformers():
    torch.manual_seed(0)
    theirs = randomize(hf.PerceiverModel(theirs_of()))
    config = PerceiverConfig(12, 5, 16, 3, heads=4, cross_heads=4, repeats=2, widening=2)
    ours = Perceiver(config).double()
    copy_encoder(ours, theirs)
    assert count(theirs) == count(ours) == config.parameters
    x, mask = torch.randn(2, 7, 12, dtype=torch.float64), torch.ones(2, 7)
    mask[1, 5:] = 0
    for given_mask in (None, mask):
        expected = theirs(inputs=x, attention_mask=given_mask).last_hidden_state
        found = ours(x, None if given_mask is None else given_mask.bool())
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_the_masked_language_model_is_that_of_transformers():
    torch.manual_seed(0)
    encoder = PerceiverConfig(16, 5, 16, 3, heads=4, cross_heads=4, repeats=2, widening=2)
    decoder = PerceiverIOConfig(encoder, 16, heads=8, qk_width=256, query_residual=False)
    theirs = randomize(hf.PerceiverForMaskedLM(theirs_of(d_model=16)))
    ours = PerceiverMLM(decoder, 20, 9).double()
    assert count(ours) == count(theirs) == ours.parameters_by_formula
    text, basic = theirs.perceiver.input_preprocessor, theirs.perceiver.decoder
    with torch.no_grad():
        ours.embedding.load_state_dict(text.embeddings.state_dict())
        ours.position_embedding.load_state_dict(text.position_embeddings.state_dict())
        ours.query_embedding.weight.copy_(basic.output_position_encodings.position_embeddings)
        ours.bias.copy_(theirs.embedding_decoder.bias)
    copy_encoder(ours.model.encoder, theirs.perceiver)
    copy_layer(ours.model.decoder, basic.decoding_cross_attention)
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9)
    mask[1, 6:] = 0
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours(ids, mask), expected, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------- exact


@given(seed=st.integers(0, 99), length=st.integers(1, 9), readings=st.integers(1, 2))
def test_the_order_of_the_input_does_not_matter(seed, length, readings):
    """With their positions in them, rows may come in any order; without, it is a set function."""
    model = made(cross_attends=readings, shared=bool(seed % 2))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, 6, dtype=torch.float64, generator=generator)
    order = torch.randperm(length, generator=generator)
    torch.testing.assert_close(model(x[:, order]), model(x), atol=1e-12, rtol=0)


def test_without_positions_a_text_is_a_set_of_words():
    torch.manual_seed(0)
    model = PerceiverMLM(PerceiverIOConfig(PerceiverConfig(8, 3, 8, 1), 8), 20, 9).double()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        model.query_embedding.weight.normal_()
        assert not torch.allclose(model(ids), model(ids[:, [1, 0, 2, 3]]), atol=1e-9)
        model.position_embedding.weight.zero_()
        torch.testing.assert_close(model(ids), model(ids[:, [1, 0, 2, 3]]), atol=1e-12, rtol=0)
        assert not torch.allclose(model(ids)[0, 0], model(ids)[0, 1])
        model.query_embedding.weight.zero_()  # and queries without positions all ask the same
        torch.testing.assert_close(model(ids)[0, 0], model(ids)[0, 1], atol=1e-12, rtol=0)


def test_padding_is_not_read():
    model, x = made(cross_attends=2), torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    torch.testing.assert_close(model(x, mask)[1], model(x[1:, :4])[0], atol=1e-12, rtol=0)


def test_readings_and_towers_by_hand():
    model, x = made(cross_attends=2, repeats=2), torch.randn(1, 4, 6, dtype=torch.float64)
    z = model.latents[None]
    for _ in range(2):
        z = model.cross[0](z, x)
        for _ in range(2):
            for layer in model.towers[0]:
                z = layer(z)
    torch.testing.assert_close(model(x), z, atol=1e-12, rtol=0)
    assert model.cross[0] is model.cross[1] and shared_places(model)
    own = made(cross_attends=2, shared=False)
    assert own.cross[0] is not own.cross[1] and not shared_places(own)


def test_any_number_of_answers():
    torch.manual_seed(0)
    model = PerceiverIO(PerceiverIOConfig(PerceiverConfig(**SMALL), 4, heads=2)).double()
    x, queries = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((9, 6), (5, 4)))
    whole = model(x, queries)
    assert whole.shape == (2, 5, 4)
    torch.testing.assert_close(model(x, queries[:, 3:]), whole[:, 3:], atol=1e-12, rtol=0)
    plain = PerceiverIO(
        PerceiverIOConfig(PerceiverConfig(**SMALL), 4, heads=2, query_residual=False)
    )
    assert count(plain) == plain.config.parameters


# ------------------------------------------------------------------------------------- costs


def multiply_adds(function):
    return flops(function) // 2


@given(
    length=st.integers(1, 40),
    latents=st.integers(1, 5),
    depth=st.integers(0, 3),
    readings=st.integers(1, 2),
    shared=st.booleans(),
    widening=st.integers(1, 3),
)
def test_counts_by_formula_are_those_counted(length, latents, depth, readings, shared, widening):
    config = PerceiverConfig(
        6, latents, 8, depth, 2, 2, repeats=2, cross_attends=readings, shared=shared,
        widening=widening,
    )  # fmt: skip
    model = Perceiver(config)
    assert count(model) == config.parameters
    found = multiply_adds(lambda: model(torch.randn(1, length, 6)))
    assert found == perceiver_multiply_adds(length, config)
    io = PerceiverIOConfig(config, 4, heads=2, qk_width=6)
    whole = PerceiverIO(io)
    assert count(whole) == io.parameters
    found = multiply_adds(lambda: whole(torch.randn(1, length, 6), torch.randn(1, 7, 4)))
    assert found == perceiver_io_multiply_adds(length, 7, io)


def test_a_transformer_by_formula():
    config = hf.BertConfig(
        vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    found = multiply_adds(lambda: model(torch.ones(1, 11, dtype=torch.long)))
    assert found == transformer_multiply_adds(11, 8, 12, 3)


def test_depth_costs_the_same_at_any_length():
    config = PerceiverConfig(**SMALL)
    deeper = PerceiverConfig(**(SMALL | dict(self_attends=5)))
    added = [
        perceiver_multiply_adds(m, deeper) - perceiver_multiply_adds(m, config)
        for m in (1, 100, 10_000)
    ]
    assert set(added) == {3 * latent_layer_multiply_adds(config)}
    # The reading is linear in the length, a Transformer's layer is not.
    one, two, three = (reading_multiply_adds(m, config) for m in (100, 200, 300))
    assert two - one == three - two > 0
    one, two, three = (transformer_multiply_adds(m, 8, 16, 1) for m in (100, 200, 300))
    assert three - two > two - one


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(latents=0), "latents is 0; it must be at least 1"),
        (dict(latents=-2), "latents is -2"),
        (dict(inputs=0), "inputs is 0"),
        (dict(hidden=9), "multiple of the number of heads"),
        (dict(cross_heads=4), "multiple of the number of heads"),
        (dict(self_attends=-1), "self_attends is -1"),
        (dict(repeats=0), "repeats is 0"),
        (dict(cross_attends=0), "cross_attends is 0"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        PerceiverConfig(**(SMALL | changes))


def test_input_that_cannot_be():
    model = made()
    with pytest.raises(ValueError, match="they must be .batch, length, 6."):
        model(torch.randn(1, 4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one row"):
        model(torch.randn(1, 0, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="mask has shape"):
        model(torch.randn(1, 4, 6).double(), torch.ones(1, 3, dtype=torch.bool))
    encoder = PerceiverConfig(8, 3, 8, 1)
    with pytest.raises(ValueError, match="outputs is 4 and inputs 8"):
        PerceiverMLM(PerceiverIOConfig(encoder, 4), 20, 9)
    with pytest.raises(ValueError, match="outputs is 0"):
        PerceiverIOConfig(encoder, 0)
    mlm = PerceiverMLM(PerceiverIOConfig(encoder, 8), 20, 9)
    with pytest.raises(ValueError, match="10 tokens; the model has 9 positions"):
        mlm(torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="length is 0"):
        perceiver_multiply_adds(0, encoder)
