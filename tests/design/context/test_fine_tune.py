"""Fine-tuning on longer texts: the trainer's own losses, a copy that is trained, each text once."""

import copy

import pytest
import torch

from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.design.context import extend, fine_tune, yarn
from effnb.design.context.fine_tune import _place
from effnb.evaluation import position_losses


def texts(sequences=6, time=40):
    """Counting upwards: easy to learn at any length."""
    start = torch.arange(sequences)[:, None] * 17
    return (start + torch.arange(time)) % 127 + 1


def test_the_loss_falls_and_the_given_model_stays(llama):
    extended = yarn(llama, 4.0, trained_length=10)
    before = [p.clone() for p in llama.parameters()]
    settings = TrainingSettings(steps=25, learning_rate=1e-2, warmup_steps=2)
    found = fine_tune(extended, texts(), settings, batch_size=2)
    assert len(found.losses) == found.steps == 25 and found.tokens == 25 * 2 * 40
    assert sum(found.losses[-5:]) < 0.6 * sum(found.losses[:5])
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters()))
    assert not {id(p) for p in found.model.parameters()} & {id(p) for p in llama.parameters()}
    table = found.model.model.rotary_emb
    assert torch.equal(table.inv_freq, extended.model.rotary_emb.inv_freq)
    assert table.attention_scaling == extended.model.rotary_emb.attention_scaling
    losses = [position_losses(m, texts(), context=40).total for m in (extended, found.model)]
    assert losses[1].nats_per_token < 0.7 * losses[0].nats_per_token


def test_it_is_the_trainer_with_these_batches(llama):
    settings, ids = TrainingSettings(steps=4, learning_rate=1e-3, seed=3), texts()
    found = fine_tune(llama, ids, settings, batch_size=2)
    order = [[_place(2 * step + i, 6, 3) for i in range(2)] for step in range(4)]
    first = [place for places in order[:3] for place in places]
    assert sorted(first) == list(range(6)) != first  # each once before any is read again
    want = train(copy.deepcopy(llama), lambda step: ids[order[step]], settings, loss=causal_lm_loss)
    assert found.losses == pytest.approx(want.losses, abs=1e-6)
    parts = fine_tune(llama, ids, settings, batch_size=2, parts=2)
    assert parts.losses == pytest.approx(found.losses, abs=1e-4)
    assert fine_tune(llama, ids, settings, batch_size=2).losses == found.losses
    seen = fine_tune(llama, ids, settings, evaluate=lambda m: {"answer": 42.0}).training
    assert seen.evaluations == [{"step": 4, "answer": 42.0}]


@pytest.mark.parametrize("method", ["dynamic_ntk", "ntk_aware"])
def test_other_methods_train_too(llama, method):
    extended = extend(llama, method, 4.0 if method == "ntk_aware" else 1.0, trained_length=10)
    settings = TrainingSettings(steps=12, learning_rate=1e-2)
    found = fine_tune(extended, texts(4, 24), settings, batch_size=2)
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (torch.ones(4, dtype=torch.long), {}, "have shape"),
        (torch.ones(0, 9, dtype=torch.long), {}, "have shape"),
        (torch.ones(4, 1, dtype=torch.long), {}, "at least 2 tokens"),
        (torch.ones(4, 9, dtype=torch.long), dict(batch_size=0), "batch_size is 0"),
        (torch.ones(4, 9, dtype=torch.long), dict(batch_size=3, parts=2), "parts 2"),
    ],
)
def test_what_is_refused(llama, ids, options, said):
    with pytest.raises(ValueError, match=said):
        fine_tune(llama, ids, TrainingSettings(steps=1), **options)
