"""DoRA against the library peft: its files, functions, gradients and merged weights."""

import copy
import json

import peft
import pytest
import torch

from effnb.core.deltas import delta_parameters, merge, set_trainable
from effnb.core.training import causal_lm_loss
from effnb.finetuning import dora

LAYERS = ["q_proj", "v_proj", "down_proj"]


def theirs_trained(llama, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True, **settings)
    model = peft.get_peft_model(copy.deepcopy(llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model.eval()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_theirs_is_read_here(llama, ids, tmp_path, rank_stabilized):
    theirs = theirs_trained(llama, use_rslora=rank_stabilized)
    theirs.save_pretrained(tmp_path)
    ours = set_trainable(dora.load_peft(llama, tmp_path, "task"), "task")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(ids).logits, llama(ids).logits, atol=0.1)
    for model in (ours, theirs):
        causal_lm_loss(model, ids).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = delta_parameters(ours, "task")
    assert len(found) == len(gradients) == 3 * 3 * 3
    for name, parameter in found.items():
        path, _, leaf = name.rpartition(".")
        middle = "lora_magnitude_vector" if leaf == "m" else f"lora_{leaf}"
        expected = gradients[f"base_model.model.{path}.{middle}.default.weight"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
    merged, expected = merge(ours, "task"), theirs.merge_and_unload()
    for (name, a), b in zip(merged.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank_pattern", {"q_proj": 4}), ("init_lora_weights", "pissa"), ("bias", "all"),
     ("fan_in_fan_out", True), ("modules_to_save", ["lm_head"]), ("next_year", 1)],
)  # fmt: skip
def test_every_setting_that_is_not_understood_is_refused(llama, tmp_path, key, value):
    theirs_trained(llama).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {key: value}))
    with pytest.raises(ValueError, match=f"uses {key} = "):
        dora.load_peft(llama, tmp_path)
    config.write_text(json.dumps(about | {"r": 5}))
    with pytest.raises(ValueError, match="says r = 5, but its matrices have 4 rows"):
        dora.load_peft(llama, tmp_path)
