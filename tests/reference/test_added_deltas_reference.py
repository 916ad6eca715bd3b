"""(IA)^3, prefix and prompt tuning against the library peft: functions, gradients and files."""

import copy

import peft
import pytest
import torch
import transformers

from effnb.core.deltas import delta_parameters, delta_state_dict, load_delta, merge, set_trainable
from effnb.core.training import causal_lm_loss
from effnb.finetuning import ia3, prefix_tuning, prompt_tuning

FACTORS = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
METHODS = {"prefix": prefix_tuning, "prompt": prompt_tuning}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "LayerNorm.weight" in name else 0, 0.1)
    return model


def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def same(a, b, off=1e-5):
    torch.testing.assert_close(a, b, atol=off, rtol=1e-5)


# --- (IA)^3 ---------------------------------------------------------------------------------------


def theirs_with_factors(model, **settings):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.normal_(1, 0.3)
    return theirs


def test_factors_of_theirs_are_read_here(llama, ids, tmp_path):
    """Logits, gradients and merged weights to 1e-5."""
    theirs = theirs_with_factors(llama, **FACTORS)
    theirs.save_pretrained(tmp_path)
    ours = set_trainable(ia3.load_peft(llama, tmp_path, "task"), "task")
    same(ours(ids).logits, theirs(ids).logits)
    assert not torch.allclose(ours(ids).logits, llama(ids).logits, atol=0.1)
    for model in (ours, theirs):
        causal_lm_loss(model, ids).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = delta_parameters(ours, "task")
    assert len(found) == len(gradients) == 9
    for name, parameter in found.items():
        path = name.rpartition(".")[0]
        expected = gradients[f"base_model.model.{path}.ia3_l.default"].flatten()
        same(parameter.grad, expected)
    merged, expected = merge(ours, "task"), theirs.merge_and_unload()
    for (name, a), b in zip(merged.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_factors_of_ours_are_read_there(llama, ids, tmp_path):
    """And what is found by trying is what the paper has, and the library is told by name."""
    ours = ia3.attach(llama, "task")
    torch.manual_seed(2)
    state = {k: 1 + 0.3 * torch.randn_like(t) for k, t in delta_state_dict(ours, "task").items()}
    ours = load_delta(ours, "task", state)
    ia3.save_peft(ours, "task", tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    with torch.no_grad():
        same(ours(ids).logits, theirs(ids).logits)
    written = peft.get_peft_model_state_dict(theirs)
    again = ia3.from_peft(written, "|".join(f".*{k}" for k in ["down_proj"]))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_factors_of_bert_and_the_trap_of_names_by_their_end(ids, tmp_path):
    """Told "output.dense", the library rescales the input of attention's projection as well."""
    model = bert()
    exact = dict(
        target_modules=r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)$",
        feedforward_modules=r".*layer\.\d+\.output\.dense$",
    )
    theirs = theirs_with_factors(model, **exact)
    theirs.save_pretrained(tmp_path)
    ours = ia3.load_peft(model, tmp_path)
    assert delta_state_dict(ours, "default").keys() == delta_state_dict(
        ia3.attach(model), "default"
    ).keys()  # fmt: skip
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == 768 == sum(t.numel() for t in delta_state_dict(ours, "default").values())
    with torch.no_grad():
        same(ours(ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)
    default = dict(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    )
    more = theirs_with_factors(model, **default)
    more.save_pretrained(tmp_path)
    assert sum(p.numel() for p in more.parameters() if p.requires_grad) == 768 + 3 * 64
    with torch.no_grad():
        read = ia3.load_peft(model, tmp_path)
        same(read(ids).last_hidden_state, more(input_ids=ids).last_hidden_state)


# --- prefixes and prompts -------------------------------------------------------------------------


def config_of(method, task, **settings):
    made = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    return made(task_type=task, num_virtual_tokens=5, **settings)


def outputs(model, **given):
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", ["llama", gpt, bert])
def test_theirs_is_read_here_and_ours_there(llama, ids, tmp_path, make, method):
    """To 1e-5, without padding and with it on the right."""
    model = llama if make == "llama" else make()
    task = "FEATURE_EXTRACTION" if make is bert else "CAUSAL_LM"
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(method, task)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = METHODS[method].load_peft(model, tmp_path / "theirs", "task")
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        with torch.no_grad():
            expected = outputs(theirs, **given)
            expected = expected[:, 5:] if method == "prompt" else expected
            found = outputs(ours, **given)
        shown = given.get("attention_mask", torch.ones_like(ids)) == 1
        same(found[shown], expected[shown])
    METHODS[method].save_peft(ours, "task", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = outputs(again, input_ids=ids)
        same(outputs(ours, input_ids=ids), expected[:, 5:] if method == "prompt" else expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same(ids, tmp_path, method):
    model = gpt()
    theirs = peft.get_peft_model(copy.deepcopy(model), config_of(method, "CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path)
    ours = set_trainable(METHODS[method].load_peft(model, tmp_path, "task"), "task")
    labels = ids.clone()
    labels[:, 0] = -100  # the library lets the prompt foresee it; here nothing does
    for one in (ours, theirs):
        one(input_ids=ids, labels=labels).loss.backward()
    (expected,) = (p.grad for p in theirs.parameters() if p.grad is not None)
    (found,) = (p.grad for p in delta_parameters(ours, "task").values())
    same(found, expected)


def test_the_mlp_is_theirs(ids, tmp_path):
    """The same five tensors give the same prefix, and the same number of them is trained."""
    model = gpt()
    settings = dict(prefix_projection=True, encoder_hidden_size=32)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), config_of("prefix", "CAUSAL_LM", **settings)
    ).eval()
    encoder = theirs.prompt_encoder["default"]
    ours = prefix_tuning.attach(model, "task", length=5, hidden=32)
    names = {
        "table": encoder.embedding.weight,
        "W1": encoder.transform[0].weight,
        "b1": encoder.transform[0].bias,
        "W2": encoder.transform[2].weight,
        "b2": encoder.transform[2].bias,
    }
    assert sum(p.numel() for p in names.values()) == 15_072
    ours = load_delta(ours, "task", {f"transformer.{k}": t for k, t in names.items()})
    theirs.save_pretrained(tmp_path)
    read = prefix_tuning.load_peft(model, tmp_path)  # the prefix without the MLP
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        for one in (ours, prefix_tuning.drop_reparametrization(ours, "task"), read):
            same(one(ids).logits, expected)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_generation_is_theirs(llama, ids, tmp_path, method):
    llama.generation_config.eos_token_id = None
    theirs = peft.get_peft_model(copy.deepcopy(llama), config_of(method, "CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path)
    ours = METHODS[method].load_peft(llama, tmp_path)
    text = ids[:2, :8]
    options = dict(
        attention_mask=torch.ones_like(text), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    expected = theirs.generate(input_ids=text, **options)
    assert torch.equal(ours.generate(text, **options), expected)
