"""Last layers: which parameters, and where the backward pass ends."""

import pytest
import torch
from torch import nn
from zoo import make

from effnb.core.delta_files import open_delta, save_delta
from effnb.core.deltas import attached, delta_parameters, delta_state_dict, load_delta, merge
from effnb.core.training import causal_lm_loss
from effnb.finetuning import last_layers

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def randomized(model, name="default", scale=0.1):
    torch.manual_seed(2)
    state = {k: torch.randn_like(t) * scale for k, t in delta_state_dict(model, name).items()}
    return load_delta(model, name, state)


def test_exactly_the_last_blocks(llama, ids):
    new = last_layers.attach(llama, count=2)
    expected = {n for n, _ in llama.named_parameters() if ".layers.1." in n or ".layers.2." in n}
    assert delta_state_dict(new, "default").keys() == expected
    with torch.no_grad():
        assert torch.equal(new(ids).logits, llama(ids).logits)


def test_the_backward_pass_ends_where_the_blocks_begin(llama, ids):
    new = last_layers.attach(llama, count=1)
    seen = []
    for block in new.model.layers:
        block.register_forward_hook(
            lambda m, inputs, output: seen.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    causal_lm_loss(new, ids).backward()
    assert seen == [False, False, True]
    assert all(p.grad is not None for p in delta_parameters(new, "default").values())
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("name", ["gpt2", "bert", "gpt-oss", "mixtral"])
def test_other_architectures(name, tmp_path):
    model = make(name)
    new = randomized(last_layers.attach(model))
    with torch.no_grad():
        want = new(IDS).logits
        assert not torch.allclose(want, model(IDS).logits, atol=0.01)
        merged = merge(new, "default")
        torch.testing.assert_close(merged(IDS).logits, want, atol=1e-10, rtol=1e-10)
        save_delta(new, "default", tmp_path / "x")
        assert torch.equal(open_delta(make(name), tmp_path / "x")(IDS).logits, want)
    assert attached(merged) == () and merged.state_dict().keys() == model.state_dict().keys()


def test_bad_input_is_one_sentence(llama):
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count is {count}; the model has 3 blocks"):
            last_layers.attach(llama, count=count)
    with pytest.raises(TypeError, match="must be a whole number"):
        last_layers.attach(llama, count=True)
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        last_layers.attach(make("t5"))
    with pytest.raises(ValueError, match="no list of equal blocks"):
        last_layers.attach(nn.Sequential(nn.Linear(2, 2)))
    block = nn.Sequential(nn.Linear(2, 2))
    shared = nn.ModuleDict({"blocks": nn.ModuleList([block, block])})
    with pytest.raises(ValueError, match="is used by several blocks"):
        last_layers.attach(shared)
    with pytest.raises(ValueError, match="cannot name a delta"):
        last_layers.attach(llama, "a.b")
