"""T-Few's three losses: the worked example, plain computations, and training that uses them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from zoo import make

from effnb.core.training import TrainingSettings, train
from effnb.finetuning import ia3
from effnb.finetuning.t_few import (
    LOSSES,
    Choices,
    answer_log_probs,
    choices_of,
    length_normalized_loss,
    lm_loss,
    rank,
    scores,
    t_few_loss,
    unlikelihood_loss,
)
from effnb.lab import load


def worked():
    """Right answer with log-probabilities -0.1, -0.2; wrong ones -1, -2, -0.5 and -3."""
    choices = Choices.of([[5]], [[[6, 7], [8, 9, 10], [11]]], [0])
    logs = torch.tensor([[0, -0.1, -0.2, 0], [0, -1.0, -2.0, -0.5], [0, -3.0, 0, 0]])
    return logs, choices


def test_the_worked_example():
    logs, choices = worked()
    assert float(lm_loss(logs, choices)) == pytest.approx(0.15, abs=1e-6)
    assert float(length_normalized_loss(logs, choices)) == pytest.approx(0.35041, abs=5e-6)
    assert float(unlikelihood_loss(logs, choices)) == pytest.approx(0.39698, abs=5e-6)
    total = sum(f(logs, choices) for f in (lm_loss, length_normalized_loss, unlikelihood_loss))
    assert float(total) == pytest.approx(0.15 + 0.35041 + 0.39698, abs=2e-5)
    assert scores(logs, choices).tolist() == pytest.approx([-0.15, -3.5 / 3, -3.0])


def test_layout():
    _, choices = worked()
    assert choices.ids.tolist() == [[5, 6, 7, 0], [5, 8, 9, 10], [5, 11, 0, 0]]
    assert choices.mask.sum(1).tolist() == [3, 4, 2]
    assert choices.answer.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert choices.right.tolist() == [True, False, False]


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=2, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 99),
)
@examples(max_examples=25, deadline=None)
def test_losses_against_a_plain_loop(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 9, (n,), generator=generator).tolist()  # noqa: E731
    inputs = [draw(length) for length, _ in shape]
    answers = [[draw(n) for n in options] for _, options in shape]
    right = [seed % len(options) for _, options in shape]
    choices = Choices.of(inputs, answers, right)
    logs = torch.where(choices.answer, -torch.rand(choices.ids.shape, generator=generator) * 4, 0)
    logs = logs.double()
    row, lm, wrong, normalized = 0, [], [], []
    for i, own in enumerate(answers):
        beta = []
        for k, option in enumerate(own):
            begin = len(inputs[i])
            values = logs[row, begin : begin + len(option)].tolist()
            beta.append(sum(values) / len(values))
            lm += values if k == right[i] else []
            wrong += [] if k == right[i] else [math.log(1 - math.exp(v)) for v in values]
            row += 1
        normalized.append(math.log(sum(map(math.exp, beta))) - beta[right[i]])
    assert float(lm_loss(logs, choices)) == pytest.approx(-sum(lm) / len(lm))
    assert float(unlikelihood_loss(logs, choices)) == pytest.approx(-sum(wrong) / len(wrong))
    expected = sum(normalized) / len(normalized)
    assert float(length_normalized_loss(logs, choices)) == pytest.approx(expected)


def test_extremes_stay_finite():
    choices = Choices.of([[5]], [[[6], [7]]], [1])
    logs = torch.tensor([[0.0, 0.0], [0.0, -1e4]], requires_grad=True)
    losses = [f(logs, choices) for f in (lm_loss, unlikelihood_loss, length_normalized_loss)]
    sum(losses).backward()
    assert all(bool(loss.isfinite()) for loss in losses) and bool(logs.grad.isfinite().all())


def test_log_probabilities_are_the_model_s_and_padding_does_not_count():
    model = make("llama")
    choices = Choices.of([[5, 6, 7], [8]], [[[9, 10], [11]], [[12], [13, 14, 15]]], [0, 1])
    found = answer_log_probs(model, choices)
    for row, begin, end in [(0, 3, 5), (1, 3, 4), (2, 1, 2), (3, 1, 4)]:
        ids = choices.ids[row, :end].unsqueeze(0)
        logs = model(input_ids=ids).logits.log_softmax(-1)[0]
        want = [float(logs[t - 1, ids[0, t]]) for t in range(begin, end)]
        assert found[row, begin:end].tolist() == pytest.approx(want, abs=1e-4)
        assert not bool(found[row, end:].any()) and not bool(found[row, :begin].any())
    total = t_few_loss(model, choices)
    parts = sum(t_few_loss(model, choices, name) for name in LOSSES)
    torch.testing.assert_close(total, parts)


def test_few_examples_teach_a_choice():
    """With (IA)³ on a random model, the right answers come to rank first."""
    model = ia3.attach(make("llama"))
    inputs = [[5, 6], [7, 8], [9, 10], [11, 12]]
    choices = Choices.of(inputs, [[[20], [21, 22]]] * 4, [0, 1, 0, 1])
    before = t_few_loss(model, choices)
    settings = TrainingSettings(steps=60, learning_rate=0.05)
    train(model, lambda step: choices, settings, loss=t_few_loss)
    assert float(t_few_loss(model, choices)) < float(before) - 0.1
    assert rank(model, choices).tolist() == [0, 1, 0, 1]


def test_ranking_with_and_without_lengths():
    class Fixed(torch.nn.Module):
        """Gives every token the same probability: long answers are unlikely, not unlike."""

        def forward(self, input_ids, attention_mask, use_cache):
            from types import SimpleNamespace

            logits = torch.zeros(*input_ids.shape, 30)
            logits[..., 21] = 0.5
            return SimpleNamespace(logits=logits)

    choices = Choices.of([[5], [5]], [[[20], [21, 21]], [[21, 21], [20]]], [0, 0])
    assert rank(Fixed(), choices).tolist() == [1, 0]  # 21 is likelier, token by token
    assert rank(Fixed(), choices, normalize=False).tolist() == [0, 1]


def test_texts():
    loaded = load("mini-300k", device="cpu")
    choices = choices_of(
        loaded.tokenizer, ["a long prompt " * 30, "Is it?"], [["yes", "no"], ["no", "perhaps not"]],
        [0, 1], tokens=32,
    )  # fmt: skip
    assert choices.ids.shape[0] == 4 and choices.ids.shape[1] <= 32
    decode = loaded.tokenizer.decode
    assert [decode(row[keep]) for row, keep in zip(choices.ids, choices.answer)] == [
        " yes", " no", " no", " perhaps not",
    ]  # fmt: skip
    assert rank(loaded.model, choices).shape == (2,)
    with pytest.raises(ValueError, match="fills all of the 2 tokens"):
        choices_of(loaded.tokenizer, ["x"], [["a very long answer", "b"]], [0], tokens=2)


def test_bad_input():
    for inputs, answers, right, message in [
        ([], [], [], "there are 0 inputs"),
        ([[1]], [[[2], [3]]], [0, 1], "1 lists of answers and 2 right ones"),
        ([[]], [[[2], [3]]], [0], "input 0 needs tokens"),
        ([[1]], [[[2]]], [0], "at least two answers"),
        ([[1]], [[[2], []]], [0], "at least two answers with tokens"),
        ([[1]], [[[2], [3]]], [2], "none is number 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Choices.of(inputs, answers, right)
    _, choices = worked()
    for losses, message in [((), "there is none"), ("nll", "'nll' is unknown")]:
        with pytest.raises(ValueError, match=message):
            t_few_loss(make("llama"), choices, losses)
