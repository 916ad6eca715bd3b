"""Siblings: a thin change of each weight of a shipped model, checked, loaded and trained."""

from pathlib import Path

import pytest
import torch

from effnb.finetuning import lora
from effnb.inference.adaptive_computation.exits import exit_losses
from effnb.lab import models

ROOT = Path(__file__).resolve().parents[2]


def test_a_sibling_is_its_base_and_a_thin_change():
    base, sibling = (models.load(name, device="cpu") for name in ("mini-5m", "mini-5m-exits"))
    assert sibling.name == "mini-5m-exits"
    changed = []
    for (name, a), (_, b) in zip(base.model.named_parameters(), sibling.model.named_parameters()):
        if torch.equal(a, b):
            continue
        changed.append(name)
        assert torch.linalg.matrix_rank((b - a).double(), rtol=1e-4) <= 16
    assert changed
    assert all("proj" in name for name in changed)
    assert models.sha256("mini-5m-exits") != models.sha256("mini-5m")


def test_its_early_exits_predict_and_those_of_its_base_do_not():
    from effnb.lab.texts import held_out_windows

    base, sibling = (models.load(name, device="cpu") for name in ("mini-5m", "mini-5m-exits"))
    windows = held_out_windows(base.tokenizer, 3)[0][:, :128]
    with torch.inference_mode():
        before, after = ([float(x) for x in exit_losses(m.model, windows)] for m in (base, sibling))
    assert all(b < a - 0.3 for a, b in zip(before[:-1], after[:-1]))
    assert after[-1] < before[-1] + 0.15


def test_a_sibling_that_is_not_trained_is_missing_and_not_damaged(monkeypatch):
    monkeypatch.setattr(models, "SIBLINGS", {"mini-1m-exits": "mini-1m"})
    assert models.sha256("mini-1m-exits") is None
    with pytest.raises(models.ModelUnavailable, match="train_exits"):
        models.load("mini-1m-exits", device="cpu")


def test_what_the_script_stores_is_what_it_trained(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import train_exits

    model = train_exits.attached()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".B"):
            parameter.data.normal_(0, 0.01, generator=generator)
    stored = train_exits.factors(model)
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 1.5 * 2**20
    merged = lora.merge(model, "exits").state_dict()
    base = models.load(train_exits.BASE, device="cpu").model.state_dict()
    for path in {key.rpartition(".")[0] for key in stored}:
        change = stored[f"{path}.B"].float() @ stored[f"{path}.A"].float()
        wanted = merged[f"{path}.weight"] - base[f"{path}.weight"]
        torch.testing.assert_close(change, wanted, atol=2e-3, rtol=0.02)
