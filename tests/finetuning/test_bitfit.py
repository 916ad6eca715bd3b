"""BitFit: exactly the biases, and nothing where there are none."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from zoo import make

from effnb.core.delta_files import attach_state, open_delta, save_delta
from effnb.core.deltas import delta_parameters, delta_state_dict, load_delta, set_trainable
from effnb.core.differences import own_parameters
from effnb.core.modules import Layers
from effnb.finetuning import bitfit

SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.randint(5, 96, (3, 9), generator=torch.Generator().manual_seed(0))


def bert(kind=BertModel, seed=0):
    torch.manual_seed(seed)
    model = kind(BertConfig(**SMALL, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3)
            if name.endswith("LayerNorm.weight"):
                p.add_(1)
    return model


def test_bert_base_has_exactly_the_paper_s_parameters():
    """102,912 of 109,482,240; query and intermediate biases are 46,080."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    found = own_parameters(model, lambda path, leaf, p: bitfit.is_bias(leaf))
    sizes = {path: sum(p.numel() for p in own.values()) for path, own in found.items()}
    assert sum(p.numel() for p in model.parameters()) == 109_482_240
    assert sum(sizes.values()) == 102_912
    smaller = Layers(["*.query", "*.intermediate.dense"])
    assert sum(n for path, n in sizes.items() if smaller.fit(path)) == 46_080


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification, BertForMaskedLM])
def test_the_parameter_set_is_exact(kind):
    model = bert(kind)
    new = bitfit.attach(model, "task")
    heads = ("classifier.bias", "cls.predictions.bias", "cls.predictions.decoder.bias")
    expected = {n for n, _ in model.named_parameters() if n.endswith("bias") and n not in heads}
    assert delta_state_dict(new, "task").keys() == expected
    # L (7 d + d_ff) + d for the embeddings; and d for a pooler or a head's transform and norm
    count = 2 * (7 * 32 + 64) + 32 + (64 if kind is BertForMaskedLM else 32)
    assert sum(p.numel() for p in new.parameters() if p.requires_grad) == count
    with torch.no_grad():
        assert torch.equal(new(IDS)[0], model(IDS)[0])


def test_the_smaller_variant():
    new = bitfit.attach(bert(), layers=["*.query", "*.intermediate.dense"])
    assert sum(p.numel() for p in new.parameters() if p.requires_grad) == 2 * (32 + 64)


def test_the_key_bias_gets_no_gradient():
    """q (k + b) adds the same to all scores of a query: softmax does not see it."""
    new = bitfit.attach(bert().double())
    new(IDS).last_hidden_state.square().sum().backward()
    found = delta_parameters(new, "default")
    for layer in range(2):
        place = f"encoder.layer.{layer}.attention.self"
        assert float(found[f"{place}.key.bias"].grad.abs().max()) < 1e-12
        assert float(found[f"{place}.query.bias"].grad.abs().max()) > 1e-4


def test_merged_is_unmerged_and_goes_through_a_file(tmp_path):
    model = bert()
    new = bitfit.attach(model)
    state = {k: torch.randn_like(t) * 0.3 for k, t in delta_state_dict(new, "default").items()}
    new = load_delta(new, "default", state)
    merged = bitfit.merge(new, "default")
    with torch.no_grad():
        want = new(IDS).last_hidden_state
        assert not torch.allclose(want, model(IDS).last_hidden_state, atol=0.05)
        torch.testing.assert_close(merged(IDS).last_hidden_state, want, atol=1e-5, rtol=1e-5)
        save_delta(new, "default", tmp_path / "x")
        assert torch.equal(open_delta(bert(), tmp_path / "x")(IDS).last_hidden_state, want)
    for key, tensor in state.items():
        torch.testing.assert_close(merged.get_parameter(key), model.get_parameter(key) + tensor)
    assert merged.state_dict().keys() == model.state_dict().keys()


def test_a_classifier_is_trained_beside():
    new = bitfit.attach(bert(BertForSequenceClassification), "t")
    new = set_trainable(new, "t", also="classifier.*")
    new(IDS).logits.sum().backward()
    assert new.classifier.weight.grad is not None
    assert delta_parameters(new, "t")["bert.encoder.layer.0.output.LayerNorm.bias"].grad is not None


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_decoders_with_biases(name):
    model = make(name)
    new = bitfit.attach(model)
    ids = IDS[:, :6]
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(new(ids).logits, want)
        state = {k: torch.randn_like(t) for k, t in delta_state_dict(new, "default").items()}
        new = load_delta(new, "default", state)
        assert not torch.allclose(new(ids).logits, want, atol=0.01)
        torch.testing.assert_close(bitfit.merge(new, "default")(ids).logits, new(ids).logits)
        two = new(ids[:, 4:], past_key_values=new(ids[:, :4], use_cache=True).past_key_values)
        torch.testing.assert_close(two.logits, new(ids).logits[:, 4:])


def test_bad_input_is_one_sentence(llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases.*BitFit has nothing to"):
        bitfit.attach(llama)
    with pytest.raises(ValueError, match=r"biases fits the pattern x; the model has biases in 0"):
        bitfit.attach(nn.Sequential(nn.Linear(2, 2)), layers="x")
    model = bitfit.attach(nn.Sequential(nn.Linear(2, 2)), "a")
    with pytest.raises(ValueError, match="'a' is attached already"):
        bitfit.attach(model, "a")
    with pytest.raises(ValueError, match="0: BitFit changes biases only; 'weight' is not one"):
        attach_state(model, "b", "bitfit", {}, {"0.weight": torch.ones(2, 2)})
