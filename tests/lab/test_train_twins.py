"""The script that trains twins: equal size, the Transformers' recipe, and a loss that falls."""

from pathlib import Path

import pytest
import torch

from effnb.core.training import TrainingSettings, train
from effnb.lab import models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """Both scripts as modules."""
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import train_models
    import train_twins

    return train_models, train_twins


@pytest.mark.parametrize("name", models.TWINS)
def test_a_twin_has_the_size_of_its_transformer(scripts, name):
    train_models, train_twins = scripts
    assert set(train_twins.NAMES) == set(models.TWINS)
    like = train_models.build(train_twins.transformer_of(name))
    twin = train_twins.build(name)
    assert twin.num_parameters() == sum(p.numel() for p in twin.parameters())
    assert twin.num_parameters() == pytest.approx(like.num_parameters(), rel=0.03)


@pytest.mark.parametrize("name", ["retnet-300k", "rwkv-300k", "hyena-300k"])
def test_the_recipe_lowers_the_loss(scripts, name):
    """The Transformers' loss and optimizers, on one batch that repeats itself."""
    train_models, train_twins = scripts
    twin = train_twins.build(name)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    settings = TrainingSettings(
        steps=12, learning_rate=train_models.MUON_RATE, warmup_steps=2, schedule="wsd"
    )
    result = train(
        twin,
        lambda step: [(ids, torch.ones(ids.shape))],
        settings,
        loss=train_models.mixture_loss,
        optimizers=train_models.muon_and_adamw,
    )
    assert result.losses[-1] < result.losses[0] - 1
    muon, adamw = train_models.muon_and_adamw(twin, settings)
    count = sum(len(group["params"]) for one in (muon, adamw) for group in one.param_groups)
    assert count == len(list(twin.parameters()))
    assert not any(p is twin.lm_head.weight for g in muon.param_groups for p in g["params"])


def test_the_command_line_is_that_of_the_models(scripts, monkeypatch, tmp_path, capsys):
    """`--pause` keeps a twin's weights as it keeps a Transformer's."""
    train_models, train_twins = scripts
    monkeypatch.setattr(train_models, "HERE", tmp_path)
    twin = train_twins.build("rwkv-300k")
    ids = torch.zeros(1, 8, dtype=torch.long)
    train(
        twin,
        lambda step: [(ids, torch.ones(ids.shape))],
        TrainingSettings(steps=1),
        loss=train_models.mixture_loss,
        checkpoint=tmp_path / "rwkv-300k.safetensors",
    )
    monkeypatch.setattr("sys.argv", ["x", "rwkv-300k", "--pause", "--work", str(tmp_path)])
    train_models.main(train_twins.NAMES, train_twins.build, train_twins.transformer_of, "x")
    kept = tmp_path / "training" / "rwkv-300k.safetensors.xz"
    assert "rwkv-300k.safetensors.xz holds" in capsys.readouterr().out
    assert 100_000 < kept.stat().st_size < 2 * twin.num_parameters()
