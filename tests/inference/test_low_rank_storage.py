"""Factorised models in files: bit for bit, into a plain architecture that stays as it is."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from effnb.evaluation import parameter_count, stored_bytes
from effnb.inference.low_rank import (
    dense,
    describe,
    load_factorized,
    low_rank_plus_sparse,
    ranks_of,
    save_factorized,
    skeleton,
    svd,
    tensor_train,
)
from effnb.inference.quantization import load_quantized, rtn, save_quantized


def everything(model):
    """Factors, factors plus rows, trains and dense layers in one model."""
    model = svd(model, 0.5, layers="*.self_attn.*")
    model = low_rank_plus_sparse(model, 0.5, layers="*.layers.[01].mlp.*")
    return tensor_train(model, 2)


def test_a_file_brings_it_back_bit_for_bit(tiny_llama, ids, tmp_path):
    new, other = everything(tiny_llama()), tiny_llama(seed=9)
    size = save_factorized(new, tmp_path / "model.safetensors")
    assert stored_bytes(new) < size < 1.5 * stored_bytes(new) + 20_000
    untouched = {k: v.clone() for k, v in other.state_dict().items()}
    back = load_factorized(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(back(ids).logits, new(ids).logits)
    assert ranks_of(back) == ranks_of(new)
    assert describe(back) == describe(new)
    assert parameter_count(back) == parameter_count(new)
    assert stored_bytes(back) == stored_bytes(new)
    for key, value in other.state_dict().items():
        assert torch.equal(value, untouched[key])


def test_tied_tensors_are_written_once_and_stay_tied(llama, tiny_llama, tmp_path):
    new = svd(llama, 0.5)
    save_factorized(new, tmp_path / "model.safetensors")
    back = load_factorized(tiny_llama(seed=9), tmp_path / "model.safetensors")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert parameter_count(back) == parameter_count(new)


def test_types_come_from_the_file_and_flags_from_the_model(tiny_llama, ids, tmp_path):
    new = svd(tiny_llama().to(torch.bfloat16), 0.5)
    save_factorized(new, tmp_path / "model.safetensors")
    plain = tiny_llama(seed=9).requires_grad_(False)
    back = load_factorized(plain, tmp_path / "model.safetensors")
    assert back.model.layers[0].mlp.up_proj.u.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in back.parameters())


def test_multiplied_out_it_is_a_plain_hugging_face_model(llama, ids, tmp_path):
    new = everything(llama)
    plain = dense(new)
    assert parameter_count(plain) == parameter_count(llama)
    plain.save_pretrained(tmp_path / "plain")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, new(ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="nothing in this model is factorised"):
        dense(llama)


def test_quantized_factors_go_by_the_quantized_file(tiny_llama, ids, tmp_path):
    new = everything(tiny_llama())
    packed = rtn(new, 4)
    with pytest.raises(ValueError, match="the factors are quantized; save them with"):
        save_factorized(packed, tmp_path / "model.safetensors")
    save_quantized(packed, tmp_path / "packed.safetensors")
    frame = skeleton(tiny_llama(seed=9), describe(packed))
    back = load_quantized(frame, tmp_path / "packed.safetensors")
    with torch.no_grad():
        assert torch.equal(back(ids).logits, packed(ids).logits)


def test_bad_files_are_one_sentence(llama, tiny_llama, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="nothing in this model is factorised"):
        save_factorized(llama, path)
    with pytest.raises(FileNotFoundError):
        load_factorized(llama, path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_factorized(llama, path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no factorised model"):
        load_factorized(llama, path)
    save_factorized(svd(llama, 0.5), path)
    with pytest.raises(ValueError, match=r"layers\.2.*another architecture"):
        load_factorized(tiny_llama(num_hidden_layers=2), path)
    with pytest.raises(ValueError, match="does not fit in place of a Linear"):
        load_factorized(tiny_llama(intermediate_size=64), path)
    with pytest.raises(ValueError, match=r"does not fit this model: the file has no .*layers\.3"):
        load_factorized(tiny_llama(num_hidden_layers=4), path)
    with pytest.raises(ValueError, match="embed_tokens.weight is"):
        load_factorized(tiny_llama(vocab_size=90), path)
