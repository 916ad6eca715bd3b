"""Models whose weights stand in several places, on disk: each once, and one object again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import make, texts

from effnb.core.modules import clone
from effnb.design.sharing import (
    Perceiver,
    PerceiverConfig,
    UniversalConfig,
    UniversalTransformer,
    factorize_embedding,
    load_shared,
    load_weights,
    save_shared,
    save_weights,
    share_layers,
    shared_places,
    unshare_layers,
)
from effnb.inference.quantization import rtn


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("what", ["all", "attention"])
def test_what_is_loaded_is_what_was_saved(name, what, tmp_path):
    model, batch = share_layers(make(name), what), texts(name)[0]
    save_shared(model, tmp_path)
    again = load_shared(tmp_path)
    again.config._experts_implementation = "eager"
    assert shared_places(again) == shared_places(model)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(key), parameter), key
    with torch.no_grad():  # memory may be aligned otherwise, which changes the order of sums
        found, expected = again(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_file_holds_each_weight_once(llama, tmp_path):
    shared = factorize_embedding(share_layers(llama, initial="mean"), 8)
    save_shared(shared, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in shared.parameters())
    again = load_shared(tmp_path)
    assert again.lm_head.embedding is again.model.embed_tokens
    assert again.model.layers[0].mlp.up_proj is again.model.layers[2].mlp.up_proj


def test_what_was_loaded_trains_as_before(llama, ids, tmp_path):
    shared = clone(share_layers(llama))
    save_shared(shared, tmp_path)
    again = load_shared(tmp_path)
    for model in (shared, again):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, a), (_, b) in zip(shared.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_loading_keeps_the_random_state(llama, tmp_path):
    save_shared(share_layers(llama), tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_shared(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_transformers_itself_refuses_what_is_shared_and_loads_what_is_not(llama, ids, tmp_path):
    shared = share_layers(llama)
    with pytest.raises(RuntimeError, match="shared tensors"):
        shared.save_pretrained(tmp_path / "shared")
    unshare_layers(shared).save_pretrained(tmp_path / "plain")
    again = type(llama).from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, shared(ids).logits, atol=1e-6, rtol=0)


def test_modules_of_this_package(tmp_path):
    config = PerceiverConfig(6, 3, 8, 2, cross_attends=2)
    for make_one in (
        lambda: Perceiver(config),
        lambda: UniversalTransformer(UniversalConfig(8, 2, 16, 20, 3, halting=True)),
    ):
        torch.manual_seed(0)
        model, other = make_one(), make_one()
        save_weights(model, tmp_path / "w.safetensors")
        again = load_weights(other, tmp_path / "w.safetensors")
        before = {n: p.clone() for n, p in other.named_parameters()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name))
            assert torch.equal(other.get_parameter(name), before[name])
        assert shared_places(again) == shared_places(model)


def test_an_unshared_model_takes_a_file_that_shares(llama, tmp_path):
    save_weights(share_layers(llama), tmp_path / "w.safetensors")
    again = load_weights(llama, tmp_path / "w.safetensors")
    assert again.model.layers[0].mlp.up_proj is again.model.layers[2].mlp.up_proj
    assert llama.model.layers[0].mlp.up_proj is not llama.model.layers[2].mlp.up_proj


def test_what_is_refused(llama, tiny_llama, tmp_path):
    shared = share_layers(llama)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_shared(tmp_path)
    with pytest.raises(ValueError, match="UniversalTransformer is not a class of transformers"):
        save_shared(UniversalTransformer(UniversalConfig(8, 2, 16, 20, 3)), tmp_path)
    with pytest.raises(ValueError, match="is a QuantizedLinear, which is not built"):
        save_shared(rtn(shared, 4, group_size=16), tmp_path)
    save_shared(shared, tmp_path)
    with pytest.raises(ValueError, match="another shape than the model's"):
        load_weights(tiny_llama(hidden_size=64), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(llama, tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="does not say what is shared"):
        load_weights(llama, tmp_path / "plain.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="is damaged"):
        load_shared(tmp_path)
