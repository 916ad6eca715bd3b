"""Methods on architectures of many kinds: right, or refused in one sentence."""

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from zoo import ZOO, make, texts, words

from effnb.core.delta_hosts import WithDeltas
from effnb.core.deltas import detach
from effnb.core.linear_form import linear_form
from effnb.core.modules import Layers, linears
from effnb.finetuning import lora
from effnb.inference.low_rank import (
    dense,
    load_factorized,
    save_factorized,
    svd,
    svd_llm,
    tensor_train,
)
from effnb.inference.pruning import magnitude, masks_of, sparsegpt, wanda, wanda_mask, wanda_scores
from effnb.inference.quantization import (
    QuantizedLinear,
    awq,
    dequantized,
    gptq,
    kivi,
    load_quantized,
    quantize_activations,
    rtn,
    save_quantized,
)
from effnb.inference.quantization.activations import input_maxima

pytestmark = pytest.mark.filterwarnings("ignore::effnb.core.coverage.LeftOut")

NOT_LINEAR = ["gpt2", "mixtral", "gpt-oss"]  # Conv1D, fused experts, and transposed ones


CLOSE = dict(rtol=1e-6, atol=1e-6)  # Gemma's embedding is scaled in float32


def logits(model, name):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, -2) for batch in texts(name)])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def reloaded(model: PreTrainedModel, folder):
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    again.config._experts_implementation = "eager"  # the grouped kernels know no float64
    return again


@pytest.mark.parametrize("name", ["gpt-neox", "gemma3", "mixtral", "gpt2", "t5", "bart", "opt"])
def test_wanda_prunes_by_the_inputs_that_the_pruned_model_reads(name):
    """The first layers of each block read what the pruned blocks before them make."""
    model = make(name)
    pruned = wanda(model, texts(name), 0.5)
    form, dense_form = linear_form(pruned)[0], linear_form(model)[0]
    squares = {}

    def hook(key):
        def add(module, arguments):
            found = arguments[0].flatten(0, -2).square().sum(0)
            squares[key] = squares.get(key, 0) + found

        return add

    first = [
        key for key in linears(form)
        if key.endswith(("self_attn.q_proj", "query_key_value", "c_attn", "SelfAttention.q"))
    ]  # fmt: skip
    for key in first:
        form.get_submodule(key).register_forward_pre_hook(hook(key))
    logits(form, name)
    assert len(first) >= 2
    for key in first:
        mask = wanda_mask(dense_form.get_submodule(key).weight, squares[key].sqrt().float(), 0.5)
        assert torch.equal(form.get_submodule(key).weight != 0, mask), key


@pytest.mark.parametrize("name", NOT_LINEAR)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "magnitude", "wanda", "sparsegpt"])
def test_weights_in_every_form_are_compressed(name, method):
    model, data = make(name), texts(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    new = {
        "rtn": lambda: rtn(model, 8),
        "gptq": lambda: gptq(model, data, 8),
        "awq": lambda: awq(model, data, 8, group_size=16),
        "magnitude": lambda: magnitude(model, 0.25),
        "wanda": lambda: wanda(model, data, 0.25),
        "sparsegpt": lambda: sparsegpt(model, data, 0.25),
    }[method]()
    layers = linears(linear_form(model)[0])
    if method in ("rtn", "gptq", "awq"):
        assert all(isinstance(new.get_submodule(key), QuantizedLinear) for key in layers)
        assert distance(logits(new, name), logits(model, name)) < 0.3
        if method != "awq":  # which scales weights
            for key, layer in layers.items():
                assert distance(new.get_submodule(key).weight, layer.weight) < 0.02
    else:
        masks = masks_of(new)
        assert masks.keys() == layers.keys()
        assert all(abs(float((~mask).double().mean()) - 0.25) < 0.02 for mask in masks.values())
        assert new.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*NOT_LINEAR, "t5", "bert", "bloom"])
def test_pruned_models_save_and_load_as_their_class_does(name, tmp_path):
    pruned = magnitude(make(name), 0.5)
    again = reloaded(pruned, tmp_path)
    assert all(float((mask == 0).double().mean()) > 0.4 for mask in masks_of(again).values())
    torch.testing.assert_close(logits(again, name), logits(pruned, name), **CLOSE)


@pytest.mark.parametrize("name", [*NOT_LINEAR, "t5"])
def test_quantized_and_factorized_models_save_and_load(name, tmp_path):
    model, other = make(name), make(name, seed=7)
    rounded = gptq(model, texts(name), 4)
    save_quantized(rounded, tmp_path / "rounded")
    loaded = load_quantized(other, tmp_path / "rounded")
    torch.testing.assert_close(logits(loaded, name), logits(rounded, name), **CLOSE)
    few = svd(model, rank=8, layers=["*.0.*", "*.c_attn"])
    save_factorized(few, tmp_path / "few")
    loaded = load_factorized(other, tmp_path / "few")
    torch.testing.assert_close(logits(loaded, name), logits(few, name), **CLOSE)
    # Half of the layers only: the others stand in the file in their old form.
    some = rtn(model, 8, layers=["*.1.*"])
    save_quantized(some, tmp_path / "some")
    loaded = load_quantized(other, tmp_path / "some")
    torch.testing.assert_close(logits(loaded, name), logits(some, name), **CLOSE)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_dense_again_has_the_old_form(name, tmp_path):
    model = make(name)
    for new in (dequantized(rtn(model, 8)), dense(svd(model, rank=31, always=True))):
        assert new.state_dict().keys() == model.state_dict().keys()
        again = reloaded(new, tmp_path)
        torch.testing.assert_close(logits(again, name), logits(new, name), **CLOSE)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_lora_lies_beside_weights_in_every_form(name, tmp_path):
    model = make(name)
    tuned = lora.attach(model, rank=2)
    hosts = [key for key, m in tuned.named_modules() if isinstance(m, WithDeltas)]
    assert set(hosts) == set(linears(linear_form(model)[0]))
    torch.testing.assert_close(logits(tuned, name), logits(model, name), **CLOSE)
    for key, parameter in tuned.named_parameters():
        if key.endswith(".B"):
            parameter.data.normal_(0, 0.1)
    free = detach(tuned, "default")
    old = dict(model.named_parameters())
    assert dict(free.named_parameters()).keys() == old.keys()
    for key, parameter in free.named_parameters():
        assert torch.equal(parameter, old[key]) and parameter.requires_grad
    merged = lora.merge(tuned, "default")
    assert distance(logits(merged, name), logits(model, name)) > 0.01
    torch.testing.assert_close(logits(merged, name), logits(tuned, name), **CLOSE)
    again = reloaded(merged, tmp_path)
    torch.testing.assert_close(logits(again, name), logits(merged, name), **CLOSE)


def test_scores_name_modules_of_the_model_and_say_what_has_none():
    model = make("mixtral")
    with pytest.warns(UserWarning, match="experts"):
        scores = wanda_scores(model, texts("mixtral"))
    assert all(isinstance(model.get_submodule(key), nn.Linear) for key in scores)


@pytest.mark.parametrize("name", ["opt", "mixtral", "gpt2"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(name, padding):
    model, _ = linear_form(make(name))
    alone, padded = texts(name), texts(name, padding)
    for a, b in (
        (wanda_scores(model, alone), wanda_scores(model, padded)),
        (input_maxima(model, alone, linears(model)), input_maxima(model, padded, linears(model))),
    ):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-9)
    static = [
        quantize_activations(model, 8, 8, granularity="static", calibration=data)
        for data in (alone, padded)
    ]
    torch.testing.assert_close(logits(static[0], name), logits(static[1], name))


METHODS = {
    "rtn": lambda model: rtn(model, 4),
    "gptq": lambda model: gptq(model, words(4, 12), 4),
    "awq": lambda model: awq(model, words(4, 12), 4, group_size=16, grid=4),
    "magnitude": lambda model: magnitude(model, 0.5),
    "wanda": lambda model: wanda(model, words(4, 12), 0.5),
    "sparsegpt": lambda model: sparsegpt(model, words(4, 12), 0.5),
    "svd": lambda model: svd(model, rank=4),
    "svd_llm": lambda model: svd_llm(model, words(4, 12), rank=4),
    "lora": lambda model: lora.attach(model, rank=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_in_two_blocks_is_one_layer_afterwards(method):
    model = make("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj = shared = layers[0].mlp.up_proj
    new = METHODS[method](model)
    first, last = (new.model.layers[i].mlp.up_proj for i in (0, 2))
    assert first is last and first is not shared
    assert type(first) is type(new.model.layers[1].mlp.up_proj)
    if method == "lora":
        assert not any(isinstance(m, WithDeltas) for m in detach(new, "default").modules())


def test_tensor_trains_take_the_place_of_every_embedding_on_the_table(tmp_path):
    model = make("t5")
    new = tensor_train(model, 2, always=True)
    table = model.shared.weight
    assert not any(getattr(m, "weight", None) is table for m in new.modules())
    assert new.encoder.embed_tokens is new.decoder.embed_tokens is new.shared
    save_factorized(new, tmp_path / "trains")
    loaded = load_factorized(make("t5", seed=3), tmp_path / "trains")
    torch.testing.assert_close(logits(loaded, "t5"), logits(new, "t5"), **CLOSE)
    back = dense(new)
    assert back.shared.weight is back.lm_head.weight is back.encoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("name", "head"),
    [("gpt2", "lm_head"), ("gemma3", "lm_head"), ("t5", "lm_head"), ("bloom", "lm_head"),
     ("bert", "cls.predictions.decoder"), ("distilbert", "vocab_projector")],
)  # fmt: skip
def test_a_head_compressed_on_purpose_is_untied_for_good(name, head, tmp_path):
    model = make(name)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table, "tied at first"
    for index, new in enumerate(
        (
            magnitude(model, 0.5, layers=Layers(head, ())),
            dense(svd(model, rank=4, layers=Layers(head, ()))),
            dequantized(rtn(model, 2, layers=Layers(head, ()))),
        )
    ):
        assert not new.config.tie_word_embeddings and model.config.tie_word_embeddings
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is table
        again = reloaded(new, tmp_path / str(index))
        torch.testing.assert_close(logits(again, name), logits(new, name), **CLOSE)
        wide = copy.deepcopy(new)  # resizing writes into tensors
        wide.resize_token_embeddings(104)
        wider = torch.cat([wide(**b).logits[..., :96].flatten(0, -2) for b in texts(name)])
        torch.testing.assert_close(wider, logits(again, name), **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_stacks_of_an_encoder_decoder_are_compressed(name):
    model, data = make(name), texts(name)
    for new in (
        gptq(model, data, 8),
        awq(model, data, 8, group_size=16),
        dequantized(rtn(model, 8)),
        wanda(model, data, 0.1),
        sparsegpt(model, data, 0.1),
    ):
        changed = [
            key for key, layer in linears(model).items()
            if not torch.equal(new.get_submodule(key).weight.double(), layer.weight)
        ]  # fmt: skip
        assert set(changed) == set(linears(model))
        assert distance(logits(new, name), logits(model, name)) < 0.5


REFUSED = {
    "gptq": lambda model: gptq(model, words(2, 8), 4),
    "awq": lambda model: awq(model, words(2, 8), 4, group_size=16),
    "wanda": lambda model: wanda(model, words(2, 8), 0.5),
    "kivi": lambda model: kivi(model, 8, group_size=8, residual=64),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_does_not_fit_an_encoder_decoder_is_one_sentence(method):
    with pytest.raises(ValueError, match="encoder-decoder") as caught:
        REFUSED[method](make("t5"))
    assert str(caught.value).count(".") == 1


def test_heads_stay_as_they_are_by_default():
    for name in ("bert", "roberta", "distilbert", "electra", "modernbert", "gpt-neox", "t5"):
        assert name in ZOO
        model = make(name)
        head = model.get_output_embeddings().weight
        for new in (rtn(model, 4), magnitude(model, 0.5), svd(model, rank=2)):
            assert new.get_output_embeddings().weight is head
