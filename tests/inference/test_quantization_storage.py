"""Quantized models in files: bit for bit there and back, and one sentence where it cannot be."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from effnb.core.modules import Layers, map_linears
from effnb.evaluation import stored_bytes
from effnb.inference.quantization import QuantizedLinear, quantize, quantize_minimum, rtn
from effnb.inference.quantization.extreme import binarize, ternarize
from effnb.inference.quantization.formats import QuantizedTensor
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.storage import KEY, load_quantized, save_quantized
from effnb.inference.quantization.tables import quantize_table


def ordered(weight):
    """Four bits in groups of columns that are stored in another order."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    plain = quantize(weight[:, order], 4, group_size=8)
    return QuantizedTensor.from_codes(
        plain.integers(), plain.scales, plain.zero_points(), Grid(4, 8), order=order
    )


FORMATS = [
    lambda w: quantize(w, 3, group_size=16),
    lambda w: quantize(w, 4, symmetric=True),
    lambda w: quantize(w, 2, group_size="tensor"),
    ordered,
    lambda w: quantize_minimum(w, group_size=16),
    quantize_table,
    lambda w: quantize_table(w, "fp4", block_size=32, double=True),
    lambda w: quantize_table(w, "e5m2", block_size="row"),
    lambda w: quantize_table(w, torch.tensor([-1.0, 0.0, 0.5, 1.0]), flat=False),
    ternarize,
    lambda w: ternarize(w, packing="two_bits", group_size="row"),
    binarize,
]


def mixed(model):
    """Every format somewhere in the model, and one layer left as it was."""
    count = iter(range(1000))

    def replace(name, layer):
        return QuantizedLinear(FORMATS[next(count) % len(FORMATS)](layer.weight), layer.bias)

    return map_linears(model, replace, layers=Layers(exclude=("lm_head", "*.2.mlp.down_proj")))


@pytest.fixture
def saved(llama, tmp_path):
    """A model of all formats, and its file."""
    model = mixed(llama)
    path = tmp_path / "model.safetensors"
    save_quantized(model, path)
    return model, path


def test_every_format_survives_bit_for_bit(saved, tiny_llama, ids):
    model, path = saved
    other = tiny_llama(seed=7)  # the same architecture with other weights
    before = {name: t.clone() for name, t in other.state_dict().items()}
    loaded = load_quantized(other, path)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert loaded.get_submodule(name).quantized.describe() == module.quantized.describe()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name, tensor in other.state_dict().items():  # the given model is untouched
        assert torch.equal(tensor, before[name])


def test_all_formats_are_really_there(saved):
    model, _ = saved
    kinds = {
        json.dumps({k: v for k, v in m.description.items() if k not in ("shape", "block_size")})
        for m in model.modules()
        if isinstance(m, QuantizedLinear)
    }
    assert len(kinds) == len(FORMATS)


def test_tied_weights_are_stored_once_and_tied_again(saved, tiny_llama):
    _, path = saved
    assert "lm_head.weight" not in load_file(path)
    loaded = load_quantized(tiny_llama(seed=7), path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_file_is_as_small_as_the_model(saved):
    model, path = saved
    content = sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert content == stored_bytes(model)
    assert path.stat().st_size < content + 20_000  # names and descriptions


def test_layers_that_share_one_weight_share_it_again(tmp_path):
    stored = quantize(torch.randn(8, 8), 4)
    model = nn.Sequential(QuantizedLinear(stored), nn.ReLU(), QuantizedLinear(stored))
    save_quantized(model, tmp_path / "tied")
    loaded = load_quantized(
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False)),
        tmp_path / "tied",
    )
    assert stored_bytes(loaded) == stored_bytes(model) == stored.bytes
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))


def test_biases_buffers_and_types_are_kept(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()

    model = build()
    with torch.no_grad():
        model(torch.randn(5, 8))
        model[1].running_mean.normal_()
    model = rtn(model, 4).to(torch.bfloat16)
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(build(), tmp_path / "m")
    assert loaded[0].bias.dtype == torch.bfloat16 and loaded[0].scales.dtype == torch.float16
    assert torch.equal(loaded[1].running_mean, model[1].running_mean)
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(loaded(x), model(x))


# --- refusals -------------------------------------------------------------------------------------


class Louder(QuantizedLinear):
    """A layer whose stored weight does not say what it computes."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


def test_what_cannot_be_saved(llama, tmp_path):
    with pytest.raises(ValueError, match="has no quantized layer"):
        save_quantized(llama, tmp_path / "x")
    stored = quantize(torch.randn(4, 4), 4)
    with pytest.raises(ValueError, match="1 is a Louder, which does more than store a weight"):
        save_quantized(nn.Sequential(QuantizedLinear(stored), Louder(stored)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_and_damaged_files(saved, llama, tmp_path):
    _, path = saved
    with pytest.raises(ValueError, match="there is no file"):
        load_quantized(llama, tmp_path / "nothing")
    whole = path.read_bytes()
    cut = tmp_path / "cut"
    for damaged in (b"", whole[:5], whole[:2000], whole[:-10], b"pickle" + whole[6:]):
        cut.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut is no intact safetensors file"):
            load_quantized(llama, cut)
    save_file({"a": torch.ones(1)}, cut)
    with pytest.raises(ValueError, match="not written by save_quantized"):
        load_quantized(llama, cut)


def rewrite(path, target, tensors=None, description=None):
    """The file with some tensors or parts of the description changed."""
    with safe_open(path, framework="pt") as file:
        whole = json.loads(file.metadata()[KEY])
    text = description if isinstance(description, str) else json.dumps(whole | (description or {}))
    kept = {k: v for k, v in (load_file(path) | (tensors or {})).items() if v is not None}
    save_file(kept, target, metadata={"format": "pt", KEY: text})
    return target


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "layers": [], "aliases": {}}'])
def test_descriptions_that_cannot_be_read(text, saved, llama, tmp_path):
    path = rewrite(saved[1], tmp_path / "bad", description=text)
    with pytest.raises(ValueError, match="its description of the layers cannot be read"):
        load_quantized(llama, path)


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "description", "message"),
    [
        ({}, {"version": 2}, "is of version 2; this effnb reads version 1"),
        ({}, {"aliases": {"lm_head.weight": "head"}}, "lm_head.weight shares head, which is not"),
        ({f"{FIRST}.codes": None}, {}, f"is damaged: it has no '{FIRST}.codes'"),
        ({f"{FIRST}.scales": torch.ones(2, 2)}, {}, f"is damaged: {FIRST}: scales is of"),
        ({"more": torch.ones(1)}, {}, "of another architecture: it has more too"),
        ({"model.norm.weight": None}, {}, "it lacks model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, {}, r"has shape \(3,\) in it and \(32,\)"),
        ({}, {"layers": {"model.nowhere": {}}}, "the model has no linear layer model.nowhere"),
        ({}, {"layers": {FIRST: {}}}, "is damaged: it has no 'tensors'"),
        ({}, {"layers": {FIRST: {"tensors": ["codes", "scales"]}}}, "None is no stored format"),
        ({}, {"layers": {FIRST: {"tensors": 3}}}, f"is damaged: {FIRST}"),
    ],
)
def test_files_that_do_not_fit(tensors, description, message, saved, llama, tmp_path):
    path = rewrite(saved[1], tmp_path / "bad", tensors, description)
    with pytest.raises(ValueError, match=message):
        load_quantized(llama, path)


def test_models_that_do_not_fit(saved, tiny_llama):
    model, path = saved
    with pytest.raises(ValueError, match="quantized already"):
        load_quantized(model, path)
    with pytest.raises(ValueError, match=r"another architecture: .* is \(48, 32\) in it and \(64,"):
        load_quantized(tiny_llama(intermediate_size=64), path)
    with pytest.raises(ValueError, match="no linear layer model.layers.2"):
        load_quantized(tiny_llama(num_hidden_layers=2), path)
    with pytest.raises(ValueError, match="it lacks model.layers.3"):
        load_quantized(tiny_llama(num_hidden_layers=4), path)
