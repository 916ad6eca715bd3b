"""LoRA against the library peft: the same files, functions, gradients and merged weights."""

import copy

import peft
import pytest
import torch

from effnb.core.training import causal_lm_loss
from effnb.finetuning import lora, serving
from effnb.inference.quantization.qlora import qlora

LAYERS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = [f"*.{name}" for name in LAYERS]


def theirs_with_random_b(llama, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, **settings)
    model = peft.get_peft_model(copy.deepcopy(llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_theirs_is_read_here(llama, ids, tmp_path, rank_stabilized):
    """Logits, gradients and merged weights to 1e-5."""
    theirs = theirs_with_random_b(llama, use_rslora=rank_stabilized)
    theirs.save_pretrained(tmp_path)
    ours = lora.set_trainable(lora.load_peft(llama, tmp_path, "task"), "task")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(ids).logits, llama(ids).logits, atol=0.1)
    for model in (ours, theirs):
        causal_lm_loss(model, ids).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = lora.delta_parameters(ours, "task")
    assert len(found) == len(gradients) == 3 * 3 * 2
    for name, parameter in found.items():
        path, _, leaf = name.rpartition(".")
        expected = gradients[f"base_model.model.{path}.lora_{leaf}.default.weight"]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
    merged, expected = lora.merge(ours, "task"), theirs.merge_and_unload()
    for (name, a), b in zip(merged.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_ours_is_read_there(llama, ids, tmp_path, rank_stabilized):
    ours = lora.attach(
        llama, "task", rank=4, alpha=6, rank_stabilized=rank_stabilized, layers=PATTERNS
    )
    torch.manual_seed(1)
    state = {k: torch.randn_like(t) * 0.1 for k, t in lora.delta_state_dict(ours, "task").items()}
    ours = lora.load_delta(ours, "task", state)
    lora.save_peft(ours, "task", tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    again = lora.from_peft(peft.get_peft_model_state_dict(theirs))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_two_at_once(llama, ids, tmp_path):
    """Two summed there by add_weighted_adapter ("cat") are the two active here."""
    theirs = theirs_with_random_b(llama)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=LAYERS, init_lora_weights=False)
    theirs.add_adapter("second", config)
    for name in ("default", "second"):
        theirs.save_pretrained(tmp_path, selected_adapters=[name])
    ours = lora.load_peft(lora.load_peft(llama, tmp_path, "one"), tmp_path / "second", "two")
    theirs.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    with torch.no_grad():
        theirs.set_adapter("both")
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        theirs.set_adapter("second")
        torch.testing.assert_close(
            lora.set_active(ours, "two")(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_start_values_have_their_distribution(llama):
    """Both draw A with Kaiming's rule and a = sqrt(5); B is 0."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    torch.manual_seed(7)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config)
    expected = lora.from_peft(peft.get_peft_model_state_dict(theirs))
    ours = lora.attach(llama, rank=4, layers="*.q_proj", seed=7)
    for key, tensor in lora.delta_state_dict(ours, "default").items():
        if key.endswith(".B"):
            assert not tensor.any() and not expected[key].any()
        else:
            bound = 32**-0.5
            assert float(tensor.abs().max()) <= bound and float(expected[key].abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(float(expected[key].std()), rel=0.25)


@pytest.mark.parametrize("double", [False, True])
def test_qlora_is_bitsandbytes_with_peft(double):
    """Output, and gradients of the inputs, A and B, of a layer in NF4, to 1e-5."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    # Rows of whole blocks: for others its kernel for the processor (0.50.2) takes wrong scales.
    layer = torch.nn.Linear(128, 64)
    ours = qlora(torch.nn.Sequential(layer), rank=4, alpha=6, double=double)
    codes, state = bnb.functional.quantize_4bit(
        layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
    )
    theirs.bias = torch.nn.Parameter(layer.bias.detach().clone())
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(theirs), config)
    values = {"0.A": torch.randn(4, 128) * 0.1, "0.B": torch.randn(64, 4) * 0.1}
    ours = lora.load_delta(ours, "default", values)
    peft.set_peft_model_state_dict(theirs, lora.to_peft(values))
    upstream, inputs = torch.randn(5, 64), []
    for model in (ours, theirs):
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.backward(upstream)
        inputs.append((y.detach(), x.grad))
    for a, b in zip(*inputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for leaf in "AB":
        expected = gradients[f"base_model.model.0.lora_{leaf}.default.weight"]
        found = lora.delta_parameters(ours, "default")[f"0.{leaf}"].grad
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_every_start_that_is_read_is_the_same_function_and_every_other_is_refused(
    llama, ids, tmp_path, start
):
    """PiSSA and OLoRA take their matrices off the base weights; a file of the two is not enough."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, init_lora_weights=start)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # training
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
        expected = theirs(input_ids=ids).logits
        theirs.save_pretrained(tmp_path)
        if start in ("pissa", "olora"):
            with pytest.raises(ValueError, match=f'uses init_lora_weights = "{start}"'):
                lora.load_peft(llama, tmp_path)
        else:
            found = lora.load_peft(llama, tmp_path)(input_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_with_different_adapters_are_theirs(llama, ids, tmp_path):
    """One batch in which every row names its adapter, beside peft's `adapter_names`."""
    theirs = theirs_with_random_b(llama)
    torch.manual_seed(1)
    theirs.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=LAYERS[1:]))
    for name, parameter in theirs.named_parameters():
        if "lora_B.second" in name:
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = lora.load_peft(llama, tmp_path, "default")
    ours = serving.serve(lora.load_peft(ours, tmp_path / "second", "second"))
    batch = ids[:1].repeat(4, 1)
    who = ["second", None, "default", "second"]
    with serving.users(ours, who):
        found = ours(batch).logits
    expected = theirs.eval()(batch, adapter_names=[w or "__base__" for w in who]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=0.1)
