"""Perplexity and ranked choice against the plainest possible computation."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnb.evaluation import perplexity, ranked_choice
from effnb.evaluation.quality import ChoiceLikelihoods, choice_likelihoods, token_losses


class Uniform(nn.Module):
    """A language model that knows nothing: every token is as likely as any other."""

    def __init__(self, vocabulary=10):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids, use_cache=None):
        logits = self.bias.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


@given(st.integers(2, 90), st.integers(2, 40), st.data())
def test_every_token_is_scored_once(n, context, data):
    stride = data.draw(st.integers(1, context))
    batch = data.draw(st.integers(1, 5))
    ids = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(n))
    found = perplexity(Uniform(), ids, context=context, stride=stride, batch_size=batch)
    assert found.tokens == n - 1
    assert found.perplexity == pytest.approx(10, rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 5), (64, 64)])
def test_windows_against_one_window_at_a_time(llama, context, stride):
    ids = torch.randint(1, 128, (61,), generator=torch.Generator().manual_seed(3))
    found = perplexity(llama, ids, context=context, stride=stride)
    done, total, width = 1, 0.0, min(context, 61)
    with torch.no_grad():
        for start in range(0, 61, min(stride, width - 1)):
            start = min(start, 61 - width)
            window = ids[start : start + width].unsqueeze(0)
            logs = llama(window).logits[0].log_softmax(-1)
            assert done > start  # no gap: the window can foresee the first token it scores
            for position in range(done, start + width):
                total -= float(logs[position - start - 1, ids[position]])
            done = max(done, start + width)
    assert found.nats_per_token == pytest.approx(total / 60, rel=1e-5)


def test_one_window_is_transformers_loss(llama, ids):
    with torch.no_grad():
        loss = float(llama(ids[:1], labels=ids[:1]).loss)
    assert perplexity(llama, ids[0]).nats_per_token == pytest.approx(loss, rel=1e-5)
    assert float(token_losses(llama, ids[:1]).mean()) == pytest.approx(loss, rel=1e-5)


def test_bits_per_byte():
    found = perplexity(Uniform(256), torch.zeros(101, dtype=torch.long))
    assert found.bits_per_byte(100) == pytest.approx(8)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, dtype=torch.long), {}, "at least 2 tokens"),
        (torch.zeros(2, 5, dtype=torch.long), {}, "one sequence"),
        (torch.zeros(9, dtype=torch.long), {"stride": 0}, "stride is 0"),
        (
            torch.zeros(9, dtype=torch.long),
            {"context": 8, "stride": 9},
            "between 1 and the context",
        ),
    ],
)
def test_bad_input(ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Uniform(), ids, **options)


@dataclass
class Question:
    context: str
    choices: tuple
    answer: int


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % 128 for c in text]


QUESTIONS = [
    Question("the cat", (" sat on", " flew", " a longer one than that"), 0),
    Question("a", (" b", " c", " d"), 2),
    Question("one more, and a longer context", (" x", " yes", " maybe so"), 1),
]


def plain(model, question, before=()):
    """The log-likelihood of each continuation, in a sequence of its own."""
    totals = []
    for choice in question.choices:
        context, tokens = Letters().encode(question.context), Letters().encode(choice)
        context = [*before, *context]
        with torch.no_grad():
            logs = model(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
        totals.append(sum(float(logs[len(context) - 1 + i, t]) for i, t in enumerate(tokens)))
    return totals


def best(scores):
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_shared_contexts_change_nothing(llama, batch_size):
    together = choice_likelihoods(llama, Letters(), QUESTIONS, batch_size=batch_size)
    expected = []
    for question, found in zip(QUESTIONS, together, strict=True):
        totals = plain(llama, question)
        assert found.given_context == pytest.approx(totals, rel=1e-4)
        assert found.alone is None
        scores = [t / len(c.encode()) for t, c in zip(totals, question.choices, strict=True)]
        expected.append(best(scores) == question.answer)
    found = ranked_choice(llama, Letters(), QUESTIONS, batch_size=batch_size)
    assert found.correct == tuple(expected) and found.questions == 3
    assert found.accuracy == sum(expected) / 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_what_a_context_gains_is_a_difference_of_two_likelihoods(llama, batch_size):
    how = {"batch_size": batch_size, "start": 5}
    together = choice_likelihoods(llama, Letters(), QUESTIONS, alone=True, **how)
    expected = []
    for question, found in zip(QUESTIONS, together, strict=True):
        given = plain(llama, question, before=[5])
        alone = plain(llama, Question("", question.choices, 0), before=[5])
        assert found.given_context == pytest.approx(given, rel=1e-4)
        assert found.alone == pytest.approx(alone, rel=1e-4)
        gains = [a - b for a, b in zip(given, alone, strict=True)]
        expected.append(best(gains) == question.answer)
    assert ranked_choice(llama, Letters(), QUESTIONS, scoring="pmi", **how).correct == tuple(
        expected
    )


def test_a_continuation_that_is_likely_anywhere_is_not_preferred():
    """The model says "the" anywhere, and "fish" a little oftener after "sea" than elsewhere."""
    one = ChoiceLikelihoods(given_context=(-1.0, -4.0), alone=(-1.0, -6.0))
    choices = (" the", " fish")
    assert one.best(choices, "per_byte") == 0
    assert one.best(choices, "pmi") == 1


def test_a_model_that_computes_all_logits_is_asked_the_same(llama):
    class All(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.inner(input_ids, attention_mask, position_ids, use_cache=use_cache)

    how = {"start": 5, "alone": True}
    few, every = (choice_likelihoods(m, Letters(), QUESTIONS, **how) for m in (llama, All()))
    for a, b in zip(few, every, strict=True):
        assert a.given_context == pytest.approx(b.given_context, rel=1e-5)
        assert a.alone == pytest.approx(b.alone, rel=1e-5)


def test_longer_continuations_are_not_punished():
    """Under a uniform model every byte costs the same, so lengths must not decide."""

    class Positional(Uniform):
        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return super().forward(input_ids)

    questions = [Question("c", (" aa", " aaaaaaaaaa"), 0)]
    assert ranked_choice(Positional(128), Letters(), questions).accuracy == 1.0


def test_standard_error_and_bad_input(llama):
    found = ranked_choice(llama, Letters(), QUESTIONS)
    a = found.accuracy
    assert found.standard_error == pytest.approx(math.sqrt(a * (1 - a) / 3))
    with pytest.raises(ValueError, match="no questions"):
        ranked_choice(llama, Letters(), [])
    with pytest.raises(ValueError, match="empty context or an empty continuation"):
        ranked_choice(llama, Letters(), [Question("", (" a", " b"), 0)])
    with pytest.raises(ValueError, match="scoring is 'best'"):
        ranked_choice(llama, Letters(), QUESTIONS, scoring="best")
    with pytest.raises(ValueError, match="needs a token that starts a text"):
        ranked_choice(llama, Letters(), QUESTIONS, scoring="pmi")
