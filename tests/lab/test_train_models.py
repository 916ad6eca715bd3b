"""The script that trains the bench: recall that can be foreseen, and a pause that loses little."""

import lzma
import random
from pathlib import Path

import pytest
import torch

from effnb.core.training import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import train_models

    return train_models


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_counts_what_its_map_foretells(script, seed):
    """Six steps of seven follow the map; a token counts once its predecessor has been seen."""
    ids, weight = script.walk(random.Random(seed), script.ALL_TOKENS)
    assert len(ids) == len(weight) == script.CONTEXT and 1 <= len(set(ids.tolist())) <= 64
    after, right, counted = {}, 0, 0
    for here, follows, counts in zip(ids[:-1].tolist(), ids[1:].tolist(), weight[1:].tolist()):
        assert counts == (here in after)
        if counts:
            counted += 1
            right += max(set(after[here]), key=after[here].count) == follows
        after.setdefault(here, []).append(follows)
    assert counted > 300 and right / counted > 0.7


def test_a_span_counts_from_its_second_copy_on(script):
    ids, weight = script.repeated_span(random.Random(3))
    span = int(weight.argmax()) - 1
    assert (ids[span:] == ids[:-span]).all() and weight[: span + 1].sum() == 0
    assert weight[span + 1 :].all()


def test_the_same_step_has_the_same_batch(script, monkeypatch):
    from transformers import AutoTokenizer

    # A twentieth of each corpus: which window a step gets does not depend on how many there are.
    documents = script.corpora.documents
    monkeypatch.setattr(
        script.corpora, "documents", lambda name, split: list(documents(name, split))[::20]
    )
    tokenizer = AutoTokenizer.from_pretrained(script.MODELS / "tokenizer")
    device = torch.device("cpu")
    short, long = (script.Mixture(tokenizer, 0, device, steps, 4) for steps in (40, 80))
    for step in (0, 7, 39):
        for (a, v), (b, w) in zip(short(step), long(step), strict=True):
            assert torch.equal(a, b) and torch.equal(v, w)
            assert a.shape == (4, script.CONTEXT) and int(a.max()) < 4096


def test_a_paused_run_goes_on_from_its_weights(script, tmp_path, capsys):
    """It keeps the weights in bfloat16 and the history, and not the optimizers' moments."""
    settings = TrainingSettings(steps=8, learning_rate=1e-2, schedule="wsd")
    model = torch.nn.Linear(64, 64)

    def batches(step):
        return torch.randn(4, 64, generator=torch.Generator().manual_seed(step))

    def loss(model, x):
        return (model(x) - x).square().mean()

    def cut(step):
        if step == 4:
            raise KeyboardInterrupt
        return batches(step)

    full, kept = tmp_path / "full.safetensors", tmp_path / "training" / "kept.safetensors.xz"
    options = dict(loss=loss, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(model, cut, settings, checkpoint=full, **options)
    script.pause(full, kept)
    assert f"{kept.stat().st_size:,} bytes" in capsys.readouterr().out
    assert kept.stat().st_size < full.stat().st_size / 3
    unpacked = tmp_path / "unpacked.safetensors"
    unpacked.write_bytes(lzma.decompress(kept.read_bytes()))
    again = torch.nn.Linear(64, 64)
    result = train(again, batches, settings, checkpoint=unpacked, **options)
    whole = torch.nn.Linear(64, 64)
    expected = train(whole, batches, settings, checkpoint=full, **options)
    assert result.steps == 8 and result.losses[:4] == expected.losses[:4]
    assert result.losses[4] == pytest.approx(expected.losses[4], rel=0.01)
    assert result.losses[7] < result.losses[3]
