"""ELECTRA: masking with replacement, draws without a gradient, labels, both losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED

MASK = 39


def words(batch=3, time=12, seed=0):
    return torch.randint(2, 38, (batch, time), generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_fourteen_per_cent_of_512_tokens():
    ids = words(400, 512)
    example = objectives.electra_masking(ids, mask_token=MASK, generator=draws())
    chosen = (example.labels != IGNORED).float().mean(1)
    wanted = 1 - (1 - 1 / 512) ** 77  # 77 draws with replacement
    assert wanted == pytest.approx(0.140, abs=5e-4)
    assert float(chosen.mean()) == pytest.approx(wanted, abs=0.001)
    assert torch.equal(example.weights.sum(1), torch.full((400,), 77.0))
    # a position drawn once shows the mask token with probability 0.85
    once = example.weights == 1
    shown = float((example.inputs[once] == MASK).float().mean())
    assert shown == pytest.approx(0.85, abs=4 * math.sqrt(0.85 * 0.15 / int(once.sum())))
    # and twice with 1 - 0.15^2, since either draw covers it
    twice = example.weights == 2
    assert float((example.inputs[twice] == MASK).float().mean()) == pytest.approx(0.9775, abs=0.015)


def test_nothing_but_the_mask_token_is_shown():
    ids = words(8, 60)
    example = objectives.electra_masking(ids, 0.4, mask_token=MASK, generator=draws())
    chosen = example.labels != IGNORED
    assert torch.equal(chosen, example.weights > 0)
    assert torch.equal(example.labels[chosen], ids[chosen])
    assert set((example.inputs != ids).nonzero().unbind(1)[0].tolist()) <= set(range(8))
    assert (example.inputs[example.inputs != ids] == MASK).all()
    assert torch.equal(example.inputs[~chosen], ids[~chosen])


def test_padding_and_special_tokens_are_never_drawn():
    ids = words(8, 20)
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    example = objectives.electra_masking(
        ids, 0.9, mask_token=MASK, special=(0,), mask=mask, generator=draws()
    )
    chosen = example.labels != IGNORED
    assert chosen[:, 1:15].any(0).all()  # every candidate is drawn somewhere
    assert not chosen[:, 0].any()
    assert not chosen[:, 15:].any()
    assert (example.weights.sum(1) == round(0.9 * 15)).all()


def test_one_position_is_drawn_at_least():
    example = objectives.electra_masking(words(5, 2), 0.01, mask_token=MASK, generator=draws())
    assert example.weights.sum(1).tolist() == [1.0] * 5


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 50))
def test_labels_say_where_the_text_was_changed(batch, time, seed):
    ids = words(batch, time, seed)
    example = objectives.electra_masking(ids, 0.5, mask_token=MASK, generator=draws(seed))
    logits = torch.randn(example.targets, 40, generator=draws(seed))
    found = objectives.replace_tokens(ids, example, logits, generator=draws(seed))
    assert torch.equal(found.labels.bool(), found.inputs != ids)
    assert torch.equal(found.inputs[example.labels == IGNORED], ids[example.labels == IGNORED])
    assert not (found.labels.bool() & (example.labels == IGNORED)).any()
    assert found.counted.all()


def test_a_right_guess_counts_as_original():
    ids = words(2, 10)
    example = objectives.electra_masking(ids, 0.5, mask_token=MASK, generator=draws())
    sure = torch.full((example.targets, 40), -1e4)
    sure.scatter_(1, example.labels[example.labels != IGNORED][:, None], 1e4)
    found = objectives.replace_tokens(ids, example, sure, generator=draws())
    assert torch.equal(found.inputs, ids)
    assert found.labels.sum() == 0


def test_tokens_are_drawn_from_the_softmax():
    ids = torch.full((1, 20_000), 3)
    everywhere = objectives.Example(
        ids, ids, torch.ones(1, 1, 1).bool().expand(1, 20_000, 20_000), 20_000
    )
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for temperature in (1.0, 2.0):
        logits = temperature * p.log().expand(20_000, 4)
        found = objectives.replace_tokens(
            ids, everywhere, logits, temperature=temperature, generator=draws()
        )
        shares = found.inputs[0].bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, p, atol=0.015, rtol=0)


def test_no_gradient_passes_through_the_draw(llama):
    model = objectives.Electra(llama)
    ids = words(2, 16)
    example = objectives.electra_masking(ids, 0.3, mask_token=MASK, generator=draws())
    asked = example.labels != IGNORED
    logits = model.generator_logits(example, asked)
    found = objectives.replace_tokens(ids, example, logits, generator=draws())
    objectives.discriminator_loss(model.discriminate(found), found).backward()
    assert all(p.grad is None for p in model.small.parameters())
    assert all(p.grad is not None for p in model.output.parameters())


def test_the_loss_is_the_sum_of_both(llama):
    model = objectives.Electra(llama, seed=1)
    ids = words(2, 16)
    example = objectives.electra_masking(ids, 0.4, mask_token=MASK, generator=draws())
    asked = example.labels != IGNORED
    with torch.no_grad():
        whole = model.loss(ids, example, generator=draws(3))
        mlm = model.loss(ids, example, weight=0.0, generator=draws(3))
        logits = model.generator_logits(example, asked)
        found = objectives.replace_tokens(ids, example, logits, generator=draws(3))
        judged = objectives.discriminator_loss(model.discriminate(found), found)
        part = model.loss(ids, example, everywhere=False, generator=draws(3))
        few = objectives.discriminator_loss(model.discriminate(found), found, asked)
    torch.testing.assert_close(whole, mlm + 50 * judged)
    torch.testing.assert_close(part, mlm + 50 * few)
    # each position counts as often as it was drawn
    log_p = logits.log_softmax(-1).gather(1, example.labels[asked][:, None])[:, 0]
    times = example.weights[asked]
    assert times.max() > 1
    torch.testing.assert_close(mlm, -(times * log_p).sum() / times.sum())


def test_the_discriminators_loss_by_hand():
    replaced = objectives.Replaced(
        torch.zeros(1, 3, dtype=torch.long),
        torch.tensor([[0.0, 1.0, 1.0]]),
        torch.tensor([[True, True, False]]),  # the last is padding
        torch.ones(1, 3, 3).bool(),
    )
    logits = torch.tensor([[0.0, math.log(3), -100.0]])
    found = objectives.discriminator_loss(logits, replaced)
    assert float(found) == pytest.approx((math.log(2) - math.log(0.75)) / 2)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_both_networks_share_one_embedding_and_the_model_is_left_alone(llama, kind):
    model = llama
    if kind == "bert":
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = objectives.Electra(model, 0.5)
    ids = words(2, 12)
    example = objectives.electra_masking(ids, 0.3, mask_token=MASK, generator=draws())
    loss = made.loss(ids, example, generator=draws())
    loss.backward()
    assert torch.isfinite(loss)
    sizes = [tuple(p.shape) for p in made.parameters() if 40 in p.shape]
    assert sizes.count((40, 32)) == 1
    assert (40, 16) not in sizes
    assert made.embedding.weight.grad.abs().sum() > 0
    assert made.small.config.hidden_size == 16
    assert made.small.config.num_hidden_layers == 2
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    unused = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in unused if "pooler" not in n]


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda m: objectives.Electra(m, 0.0), "above 0"),
        (lambda m: objectives.Electra(m, 0.3), "does not divide"),
        (
            lambda m: objectives.electra_masking(words(), mask_token=MASK, shown_masked=1.5),
            "between 0 and 1",
        ),
        (
            lambda m: objectives.replace_tokens(
                words(), objectives.causal_lm(words()), torch.zeros(2, 40)
            ),
            "scores for 2 positions",
        ),
        (
            lambda m: objectives.replace_tokens(
                words(), objectives.causal_lm(words()), torch.zeros(33, 40), temperature=0.0
            ),
            "temperature is 0",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(llama, attempt, said):
    with pytest.raises(ValueError, match=said) as problem:
        attempt(llama)
    assert str(problem.value).endswith(".")


def test_a_loss_over_nothing_is_refused():
    replaced = objectives.Replaced(
        words(1, 3), torch.zeros(1, 3), torch.ones(1, 3).bool(), torch.ones(1, 3, 3).bool()
    )
    with pytest.raises(ValueError, match="no position counts"):
        objectives.discriminator_loss(torch.zeros(1, 3), replaced, torch.zeros(1, 3).bool())
    with pytest.raises(ValueError, match="logits have shape"):
        objectives.discriminator_loss(torch.zeros(1, 4), replaced)
