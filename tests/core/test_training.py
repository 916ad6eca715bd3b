"""The trainer: exact resumption, schedules, early stop, divergence."""

import math

import pytest
import torch
from torch import nn

from effnb.core.muon import Muon, hidden_matrices
from effnb.core.training import TrainingDiverged, TrainingSettings, causal_lm_loss, train


def batches(step):
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(step))


SETTINGS = TrainingSettings(steps=8, learning_rate=1e-2, warmup_steps=2, schedule="cosine", seed=3)


def test_loss_is_transformers_own(llama, ids):
    torch.testing.assert_close(causal_lm_loss(llama, ids), llama(ids, labels=ids).loss)
    labels = ids.clone()
    labels[:, :10] = -100
    torch.testing.assert_close(causal_lm_loss(llama, (ids, labels)), llama(ids, labels=labels).loss)


def test_it_learns(llama):
    one = batches(0)
    result = train(llama, lambda step: one, TrainingSettings(steps=40, learning_rate=1e-2))
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.steps == 40 and not llama.training


def test_same_seed_same_run(llama, tiny_llama):
    a = train(llama, batches, SETTINGS)
    b = train(tiny_llama(), batches, SETTINGS)
    assert a.losses == b.losses


def test_steps_equal_a_plain_torch_loop():
    """The loop is AdamW with clipping and nothing else."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    ours, plain = nn.Linear(4, 1), nn.Linear(4, 1)
    plain.load_state_dict(ours.state_dict())
    settings = TrainingSettings(steps=5, learning_rate=0.1, weight_decay=0.1, clip_norm=0.5)
    train(ours, lambda s: (x, y), settings, loss=lambda m, b: (m(b[0]) - b[1]).square().mean())
    optimizer = torch.optim.AdamW(
        [{"params": [plain.weight], "weight_decay": 0.1},
         {"params": [plain.bias], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.999)
    )  # fmt: skip
    for _ in range(5):
        optimizer.zero_grad()
        (plain(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(ours.bias, plain.bias)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_run_itself(tmp_path, dropout, tiny_llama):
    def stop(step):
        if step == 5:
            raise Interrupted
        return batches(step)

    whole = tiny_llama(attention_dropout=dropout)
    expected = train(whole, batches, SETTINGS)
    path = tmp_path / "run.safetensors"
    cut = tiny_llama(attention_dropout=dropout)
    with pytest.raises(Interrupted):
        train(cut, stop, SETTINGS, checkpoint=path, checkpoint_seconds=0)
    torch.rand(7)  # the state of the global generator must not matter
    again = tiny_llama(seed=9, attention_dropout=dropout)
    result = train(again, batches, SETTINGS, checkpoint=path)
    assert result.losses == expected.losses
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_keeps_the_best_weights(tmp_path):
    """Early stopping counts, and returns, across an interruption."""
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    settings = TrainingSettings(steps=20, learning_rate=0.1, evaluate_every=1, patience=4)
    kept = []

    def loss(model, step):
        if step == 3 and not kept:
            kept.append("interrupted once")
            raise Interrupted
        return model.weight.square().sum()

    def evaluate(model):
        snapshots.append(model.weight.detach().clone())
        return {"loss": next(scores)}

    snapshots = []
    torch.manual_seed(0)
    model, path = nn.Linear(2, 1, bias=False), tmp_path / "run"
    options = dict(loss=loss, evaluate=evaluate, checkpoint=path, checkpoint_seconds=0)
    with pytest.raises(Interrupted):
        train(model, lambda s: s, settings, **options)
    result = train(nn.Linear(2, 1, bias=False), lambda s: s, settings, **options)
    assert result.stopped_early and result.steps == 6
    fresh = nn.Linear(2, 1, bias=False)
    finished = train(fresh, lambda s: s, settings, **options)  # all is done: only read back
    assert finished.stopped_early and finished.losses == result.losses
    assert torch.equal(fresh.weight, snapshots[1])


def test_another_setting_is_not_resumed(llama, tmp_path):
    path = tmp_path / "run.safetensors"
    train(llama, batches, SETTINGS, checkpoint=path)
    other = TrainingSettings(steps=8, learning_rate=2e-2, warmup_steps=2, schedule="cosine", seed=3)
    with pytest.raises(ValueError, match="made with another learning_rate"):
        train(llama, batches, other, checkpoint=path)


def test_early_stop_puts_the_best_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    seen = []

    def evaluate(model):
        seen.append(float(model.weight))
        return {"loss": abs(float(model.weight) - 0.5)}

    settings = TrainingSettings(steps=100, learning_rate=0.1, evaluate_every=1, patience=3)
    result = train(
        model, lambda s: None, settings, loss=lambda m, b: m.weight.sum(), evaluate=evaluate
    )
    assert result.stopped_early and result.steps == len(seen) < 100
    assert float(model.weight) == min(seen, key=lambda w: abs(w - 0.5))


def test_divergence_is_one_sentence():
    model = nn.Linear(1, 1)
    settings = TrainingSettings(steps=5, learning_rate=0.1)
    with pytest.raises(TrainingDiverged, match=r"diverged at step 2: the loss is nan.*lower rate"):
        train(
            model,
            lambda s: s,
            settings,
            loss=lambda m, s: m.weight.sum() * (math.nan if s == 2 else 1.0),
        )


def test_callbacks_with_gradients_off(llama):
    """A widget's thread may have switched gradients off; training works all the same."""
    with torch.no_grad():
        assert train(llama, batches, TrainingSettings(steps=2)).steps == 2


def test_the_global_generator_is_left_alone(llama):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(llama, batches, TrainingSettings(steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_stay(llama):
    llama.model.embed_tokens.weight.requires_grad_(False)
    before = llama.model.embed_tokens.weight.clone()
    train(llama, batches, TrainingSettings(steps=2, learning_rate=0.1))
    assert torch.equal(llama.model.embed_tokens.weight, before)
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(llama, batches, TrainingSettings(steps=2))


def test_schedules():
    make = lambda s: TrainingSettings(steps=10, learning_rate=1.0, warmup_steps=2, schedule=s)  # noqa: E731
    assert [make("constant").rate(t) for t in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    assert [make("linear").rate(t) for t in (2, 6)] == [1, 0.5]
    assert make("cosine").rate(6) == pytest.approx(0.5)
    wsd = TrainingSettings(steps=10, learning_rate=1.0, schedule="wsd", decay_fraction=0.5)
    assert [wsd.rate(t) for t in (0, 5, 6, 9)] == pytest.approx([1, 1, 0.8, 0.2])


def test_progress_is_reported(llama):
    seen = []
    train(llama, batches, TrainingSettings(steps=3), progress=lambda *a: seen.append(a[:2]))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup_steps": 9}, "between 0 and steps"),
        ({"schedule": "magic"}, "choose constant, linear"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"patience": -1}, "patience is -1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**({"steps": 5} | change))


def test_patience_needs_an_evaluation(llama):
    with pytest.raises(ValueError, match="needs `evaluate`"):
        train(llama, batches, TrainingSettings(steps=2, patience=1))
    with pytest.raises(ValueError, match='named "loss"'):
        train(llama, batches, TrainingSettings(steps=2, patience=1), evaluate=lambda m: {"x": 1.0})


def two_optimizers(model, settings):
    return [
        Muon(hidden_matrices(model), lr=settings.learning_rate, momentum=0.9),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=0.001),
    ]


def linear_pair():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def squares(model, batch):
    return (model(batch) - batch.flip(-1)).square().mean()


def rows(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def test_every_optimizer_follows_the_schedule_in_proportion():
    settings = TrainingSettings(steps=6, learning_rate=0.02, warmup_steps=2, schedule="linear")
    ours, plain = linear_pair(), linear_pair()
    train(ours, rows, settings, loss=squares, optimizers=two_optimizers)
    muon, adamw = two_optimizers(plain, settings)
    for step in range(6):
        muon.param_groups[0]["lr"] = settings.rate(step)
        adamw.param_groups[0]["lr"] = 0.001 * settings.rate(step) / 0.02
        plain.zero_grad()
        squares(plain, rows(step)).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        muon.step()
        adamw.step()
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)


def test_a_batch_in_parts_averages_gradients():
    settings = TrainingSettings(steps=3, learning_rate=0.01)
    whole, parts = linear_pair(), linear_pair()
    a = train(whole, rows, settings, loss=squares)
    b = train(parts, lambda step: list(rows(step).split(4)), settings, loss=squares)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    for x, y in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(x, y)


def test_two_optimizers_resume_exactly(tmp_path):
    settings = TrainingSettings(steps=6, learning_rate=0.02)
    whole = linear_pair()
    train(whole, rows, settings, loss=squares, optimizers=two_optimizers)

    def cut(step, total, loss):
        if step == 3:
            raise Interrupted

    part = linear_pair()
    arguments = dict(loss=squares, optimizers=two_optimizers, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(Interrupted):
        train(part, rows, settings, progress=cut, checkpoint_seconds=0, **arguments)
    again = linear_pair()
    train(again, rows, settings, **arguments)
    for a, b in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(a, b)


def test_another_length_goes_on_while_the_rate_is_the_same(tmp_path):
    def settings(steps):
        return TrainingSettings(
            steps=steps, learning_rate=0.02, warmup_steps=2, schedule="wsd", decay_fraction=0.5
        )

    path = tmp_path / "c.safetensors"
    whole = train(linear_pair(), rows, settings(20), loss=squares)

    def cut(step, total, loss):
        if step == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(linear_pair(), rows, settings(40), loss=squares, checkpoint=path,
              checkpoint_seconds=0, progress=cut)  # fmt: skip
    found = train(linear_pair(), rows, settings(20), loss=squares, checkpoint=path)
    assert found.losses == pytest.approx(whole.losses, rel=1e-6)
    # Half of those steps decayed: a longer run would have done them otherwise.
    with pytest.raises(ValueError, match="steps"):
        train(linear_pair(), rows, settings(40), loss=squares, checkpoint=path)


def test_a_parameter_without_an_optimizer_is_refused():
    def one(model, settings):
        return [torch.optim.AdamW([model[0].weight], lr=settings.learning_rate)]

    with pytest.raises(ValueError, match="no optimizer has"):
        train(linear_pair(), rows, TrainingSettings(steps=1), loss=squares, optimizers=one)
