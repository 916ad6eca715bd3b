"""Causal, masked and prefix objectives: labels, masks, rates, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED
from effnb.pretraining.objectives.examples import check_ids

MASK, VOCABULARY = 50, 40
SPECIAL = (0, 1)


def words(batch=3, time=12, seed=0):
    return torch.randint(
        2, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed)
    )


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def masked(ids, rate=0.15, **more):
    settings = {"mask_token": MASK, "vocabulary": VOCABULARY, "special": SPECIAL} | more
    return objectives.masked_lm(ids, rate, **settings)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


# --- causal ---------------------------------------------------------------------------------------


def test_causal_labels_are_the_next_tokens():
    ids = words()
    example = objectives.causal_lm(ids)
    assert torch.equal(example.labels[:, :-1], ids[:, 1:])
    assert (example.labels[:, -1] == IGNORED).all()
    assert example.targets == example.text_targets == 3 * 11  # T - 1 of T
    assert torch.equal(example.visible[0], torch.ones(12, 12).tril().bool())


def test_padding_neither_asks_nor_answers():
    ids = words(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    example = objectives.causal_lm(ids, mask=mask)
    assert example.labels[0].tolist() == [*ids[0, 1:4].tolist(), *[IGNORED] * 3]
    assert example.labels[1].tolist() == [IGNORED, IGNORED, *ids[1, 3:].tolist(), IGNORED]
    assert example.text_tokens == 8
    others = example.visible & ~torch.eye(6).bool()
    assert not others[0, :, 4:].any()
    assert not others[1, :, :2].any()
    assert example.visible.diagonal(0, 1, 2).all()  # a row of nothing would be no softmax


def test_a_share_of_the_positions_is_asked_and_nothing_else_changes():
    ids = words(64, 100)
    whole = objectives.causal_lm(ids)
    part = objectives.causal_lm(ids, share=0.15, generator=draws())
    asked = part.labels != IGNORED
    assert torch.equal(part.inputs, whole.inputs)
    assert torch.equal(part.visible, whole.visible)
    assert torch.equal(part.labels[asked], whole.labels[asked])
    n = whole.targets
    assert abs(part.targets / n - 0.15) < 4 * math.sqrt(0.15 * 0.85 / n)


def test_the_causal_loss_is_the_one_of_transformers(llama):
    ids = words()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    example = objectives.causal_lm(ids, mask=mask)
    found = objectives.example_loss(llama, example)
    wanted = llama(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORED)
    ).loss
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-6, rtol=1e-6)


# --- masked ---------------------------------------------------------------------------------------


def test_labels_are_ignored_exactly_off_the_mask():
    ids = words(20, 50)
    example = masked(ids, 0.3, generator=draws())
    chosen = example.labels != IGNORED
    assert torch.equal(example.labels[chosen], ids[chosen])
    assert torch.equal(example.inputs[~chosen], ids[~chosen])
    assert example.visible.all()


def test_the_rates_of_bert():
    n = 400 * 500
    ids = torch.randint(1000, 2000, (400, 500), generator=draws(1))
    example = objectives.masked_lm(ids, mask_token=5000, vocabulary=1000, generator=draws(2))
    chosen = example.labels != IGNORED
    shown = example.inputs[chosen]
    for found, wanted in (
        (int(chosen.sum()), 0.15),
        (int((shown == 5000).sum()), 0.12),
        (int((shown < 1000).sum()), 0.015),
        (int((shown == ids[chosen]).sum()), 0.015),
    ):
        assert abs(found / n - wanted) < 3.5 * math.sqrt(wanted * (1 - wanted) / n)


def test_padding_and_special_tokens_are_never_chosen():
    ids = words(8, 30)
    ids[:, 0], ids[:, 20] = SPECIAL
    mask = torch.ones_like(ids)
    mask[:, 25:] = 0
    example = masked(ids, 0.9, mask=mask, generator=draws())
    chosen = example.labels != IGNORED
    assert chosen.any()
    assert not chosen[:, [0, 20]].any()
    assert not chosen[:, 25:].any()
    assert not example.visible[:, :25, 25:].any()


def test_dynamic_masking_masks_anew_and_static_masking_does_not():
    ids = words(4, 60)
    settings = {"mask_token": MASK, "vocabulary": VOCABULARY}
    going_on = draws()
    seen = [masked(ids, generator=going_on).inputs for _ in range(3)]
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    fixed = objectives.static_masking(ids, 3, seed=4, **settings)
    again = objectives.static_masking(ids, 3, seed=4, **settings)
    assert len(fixed) == 3
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(fixed, again, strict=True))
    assert not torch.equal(fixed[0].inputs, fixed[1].inputs)


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_text_can_be_put_back_together(batch, time, rate, seed):
    ids = words(batch, time, seed)
    example = masked(ids, rate, generator=draws(seed))
    chosen = example.labels != IGNORED
    assert torch.equal(torch.where(chosen, example.labels, example.inputs), ids)
    assert 0 <= example.targets <= ids.numel() == example.text_tokens == example.read_tokens


# --- prefix ---------------------------------------------------------------------------------------


def test_the_prefix_mask_by_its_formula():
    prefix = torch.tensor([1, 3, 6])
    found = objectives.prefix_visible(prefix, 6)
    for row, p in zip(found, prefix.tolist(), strict=True):
        for i in range(6):
            for j in range(6):
                assert bool(row[i, j]) == (j <= max(i, p - 1))
    assert torch.equal(found[0], torch.ones(6, 6).tril().bool())
    assert found[2].all()


def test_only_what_follows_the_prefix_is_asked():
    ids = words(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    example = objectives.prefix_lm(ids, torch.tensor([3, 2]), mask=mask)
    assert example.labels[0].tolist() == [IGNORED, IGNORED, *ids[0, 3:].tolist(), IGNORED]
    assert example.labels[1].tolist() == [IGNORED, *ids[1, 2:6].tolist(), *[IGNORED] * 3]


def test_half_of_the_tokens_are_asked_on_average():
    example = objectives.prefix_lm(words(4000, 33), generator=draws())
    # the prefix is 1 … 32, so 1 … 32 tokens are left: 16.5 of 33
    assert abs(example.targets / example.text_tokens - 0.5) < 0.01


@pytest.mark.parametrize("prefix", [1, 4, 9])
def test_no_output_depends_on_what_its_position_may_not_see(llama, prefix):
    example = objectives.prefix_lm(words(1, 10), torch.tensor([prefix]))
    vectors = llama.get_input_embeddings()(example.inputs).detach().requires_grad_()
    out = llama(inputs_embeds=vectors, attention_mask=example.bias(torch.float64)).logits
    weights = torch.arange(out.shape[-1], dtype=out.dtype)
    for t in range(10):
        gradient = torch.autograd.grad((out[0, t] * weights).sum(), vectors, retain_graph=True)[0]
        reached = gradient[0].abs().sum(-1) > 0
        assert torch.equal(reached, example.visible[0, t])


# --- the loss and its parts -----------------------------------------------------------------------


def test_the_head_runs_at_the_targets_only(llama):
    example = masked(words(4, 20), 0.3, generator=draws())
    asked = example.labels != IGNORED
    logits = llama(input_ids=example.inputs, attention_mask=example.bias(torch.float64)).logits
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.shape[0]))
    found = objectives.asked_logits(llama, example, asked)
    hook.remove()
    assert seen == [example.targets]
    torch.testing.assert_close(found, logits[asked])
    wanted = torch.nn.functional.cross_entropy(logits[asked], example.labels[asked])
    loss = objectives.example_loss(llama, example)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)


def test_weights_make_a_weighted_mean(llama):
    ids = words(2, 9)
    plain = objectives.causal_lm(ids)
    twice = objectives.Example(
        plain.inputs, plain.labels, plain.visible, 18, weights=torch.full((2, 9), 2.0)
    )
    first = torch.zeros(2, 9)
    first[:, 0] = 1
    one = objectives.Example(plain.inputs, plain.labels, plain.visible, 18, weights=first)
    torch.testing.assert_close(
        objectives.example_loss(llama, plain), objectives.example_loss(llama, twice)
    )
    alone = llama(input_ids=ids[:, :1]).logits[:, 0]
    wanted = torch.nn.functional.cross_entropy(alone, ids[:, 1])
    found = objectives.example_loss(llama, one).double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_inputs_are_left_alone():
    ids = words()
    before = ids.clone()
    masked(ids, 0.5, generator=draws())
    objectives.causal_lm(ids, share=0.5, generator=draws())
    objectives.prefix_lm(ids, generator=draws())
    assert torch.equal(ids, before)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, math.inf, True])
def test_a_mask_rate_outside_0_and_1_is_refused(rate):
    said = "between 0 and 1, both excluded"
    with pytest.raises(ValueError, match=said):
        masked(words(), rate)
    with pytest.raises(ValueError, match=said):
        objectives.electra_masking(words(), rate, mask_token=MASK)
    with pytest.raises(ValueError, match=said):
        objectives.span_corruption(words(), rate, first_sentinel=99, end=98)
    with pytest.raises(ValueError, match=said):
        objectives.static_masking(words(), 2, rate, mask_token=MASK, vocabulary=VOCABULARY)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: masked(words(), masked=0.8, random=0.3), "at most 1"),
        (lambda: masked(words(), masked=-0.1), "neither may be negative"),
        (lambda: masked(words(), vocabulary=0), "at least 1 to draw from"),
        (lambda: check_ids(words().float()), "whole numbers"),
        (lambda: check_ids(words()[0]), "of shape"),
        (lambda: masked(words(), mask=torch.ones(2, 2)), "says of each token"),
        (lambda: masked(torch.zeros(1, 4, dtype=torch.long)), "nothing can be hidden"),
        (lambda: masked(words(), mask=torch.zeros(3, 12)), "0 tokens of text"),
        (lambda: objectives.static_masking(words(), 0), "at least one masking"),
        (lambda: objectives.causal_lm(words(), share=0.0), "above 0"),
        (lambda: objectives.causal_lm(words(2, 1)), "at least 2 tokens"),
        (lambda: objectives.prefix_lm(words(), torch.tensor([0, 1, 1])), "less than the whole"),
        (lambda: objectives.prefix_lm(words(), torch.tensor([12, 1, 1])), "than the whole text"),
        (lambda: objectives.prefix_lm(words(), torch.tensor([1, 1])), "one for each text"),
        (lambda: objectives.prefix_visible(torch.tensor([7]), 6), "between 0 and the 6"),
        (
            lambda: objectives.prefix_lm(words(1, 4), mask=torch.tensor([[0, 1, 1, 1]])),
            "on the right",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(attempt, said):
    with pytest.raises(ValueError, match=said) as problem:
        attempt()
    assert str(problem.value).endswith(".")


def test_an_example_without_targets_has_no_loss(llama):
    plain = objectives.causal_lm(words())
    empty = objectives.Example(
        plain.inputs, torch.full_like(plain.labels, IGNORED), plain.visible, 36
    )
    with pytest.raises(ValueError, match="no position is asked"):
        objectives.example_loss(llama, empty)
