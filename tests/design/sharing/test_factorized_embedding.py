"""Two factors in place of a table: exact at full width, tied with the head, the best at less."""

import pytest
import torch
import transformers as hf
from zoo import make, texts

from effnb.design.sharing import (
    FactorizedEmbedding,
    FactorizedHead,
    factorize_embedding,
    factorized_parameters,
    shared_places,
)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_at_full_width_with_an_identity_it_is_a_plain_embedding():
    embedding = FactorizedEmbedding(11, 6, 6)
    with torch.no_grad():
        embedding.project.weight.copy_(torch.eye(6))
    ids = torch.arange(11)[None]
    assert torch.equal(embedding(ids), embedding.table(ids))
    hidden = torch.randn(2, 3, 6)
    torch.testing.assert_close(FactorizedHead(embedding)(hidden), hidden @ embedding.table.weight.T)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "roberta", "bart"])
def test_at_full_width_a_model_keeps_its_function(name):
    model, batch = make(name), texts(name)[0]
    if name in ("llama", "gemma2"):
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    if type(model.get_input_embeddings()) is not torch.nn.Embedding:
        with pytest.raises(ValueError, match="only a plain nn.Embedding"):
            factorize_embedding(model, 32)
        return
    new = factorize_embedding(model, 32)
    with torch.no_grad():
        torch.testing.assert_close(new(**batch).logits, model(**batch).logits, atol=1e-9, rtol=0)
    assert isinstance(new.get_output_embeddings(), FactorizedHead)


def test_the_head_is_factorized_with_the_embedding(llama, ids):
    new = factorize_embedding(llama, 8)
    embedding = new.model.embed_tokens
    assert new.lm_head.embedding is embedding
    assert count(llama) - count(new) == 128 * 32 - factorized_parameters(128, 8, 32)
    # logits = (h P^T) T^T, by the matrix that the factors stand for
    plain = factorize_embedding(llama, 32)
    with torch.no_grad():
        hidden = new.model(ids).last_hidden_state
        torch.testing.assert_close(new(ids).logits, hidden @ embedding.weight.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain(ids).logits, llama(ids).logits, atol=1e-4, rtol=0)


def test_both_uses_send_gradients_to_both_factors(llama, ids):
    new = factorize_embedding(llama, 8)
    new(input_ids=ids, labels=ids).loss.backward()
    embedding = new.model.embed_tokens
    # Tokens that are never read still get a gradient, from the head.
    unread = [t for t in range(128) if t not in set(ids.flatten().tolist())]
    assert unread and embedding.table.weight.grad[unread].abs().sum() > 0
    assert embedding.project.weight.grad.abs().sum() > 0


def test_the_matrix_that_the_factors_stand_for_keeps_its_type_under_autocast(llama):
    new = factorize_embedding(llama, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert new.lm_head.weight.dtype == new.model.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(new.lm_head.weight, new.model.embed_tokens.weight)


def test_an_untied_head_stays(tiny_llama):
    model = tiny_llama(tie_word_embeddings=False)
    new = factorize_embedding(model, 8)
    assert new.lm_head.weight is model.lm_head.weight


def test_the_factors_are_the_best_of_their_size(llama):
    weight = llama.model.embed_tokens.weight.detach().double()
    s = torch.linalg.svdvals(weight)
    for size in (1, 8, 31):
        new = factorize_embedding(llama, size).model.embed_tokens
        error = (new.weight.detach().double() - weight).norm()
        torch.testing.assert_close(error, s[size:].norm(), atol=1e-4, rtol=1e-4)


def test_random_factors_have_the_scale_of_the_table(llama):
    new = factorize_embedding(llama, 16, initial="random", seed=3).model.embed_tokens
    again = factorize_embedding(llama, 16, initial="random", seed=3).model.embed_tokens
    assert torch.equal(new.table.weight, again.table.weight)
    assert 0.7 < float(new.weight.std() / llama.model.embed_tokens.weight.std()) < 1.4


def test_fewer_tokens_than_channels():
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    new = factorize_embedding(model, 10)
    torch.testing.assert_close(
        new.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=1e-6, rtol=0
    )


def test_the_tables_of_an_encoder_decoder_stay_one():
    model = make("t5")
    new = factorize_embedding(model, 32)
    assert new.encoder.embed_tokens is new.decoder.embed_tokens is new.shared
    with torch.no_grad():
        batch = texts("t5")[0]
        torch.testing.assert_close(new(**batch).logits, model(**batch).logits, atol=1e-9, rtol=0)
    assert any("embed_tokens" in place for rest in shared_places(new).values() for place in rest)


def test_what_is_refused(llama):
    with pytest.raises(ValueError, match="size is 0"):
        factorize_embedding(llama, 0)
    with pytest.raises(ValueError, match="size is 33; it must be at most the width"):
        factorize_embedding(llama, 33)
    with pytest.raises(ValueError, match="initial is 'zeros'"):
        factorize_embedding(llama, 8, initial="zeros")
    with pytest.raises(ValueError, match="input embedding of Linear is missing"):
        factorize_embedding(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="a FactorizedEmbedding; only a plain"):
        factorize_embedding(factorize_embedding(llama, 8), 4)
