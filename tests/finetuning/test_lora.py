"""LoRA: the identity at the start, the merge at the end, and training in between."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from effnb.core.modules import Layers, linears
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.evaluation import parameter_count
from effnb.finetuning import lora
from effnb.finetuning.lora import LoRA
from effnb.inference.quantization import QuantizedLinear, dequantized, rtn
from effnb.kernels._launch import choose


def batch(step):
    return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))


def trained(model, name="default", seed=0, scale=0.1, **settings):
    """A LoRA whose B is not 0."""
    new = lora.attach(model, name, seed=seed, **settings)
    torch.manual_seed(seed)
    state = {
        key: torch.randn_like(t) * scale if key.endswith(".B") else t
        for key, t in lora.delta_state_dict(new, name).items()
    }
    return lora.load_delta(new, name, state)


@examples(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.floats(0.5, 32)
)  # fmt: skip
def test_the_equation(n_in, n_out, rank, rank_stabilized, alpha):
    rank = min(rank, n_in, n_out)
    torch.manual_seed(n_in)
    layer = nn.Linear(n_in, n_out).double()
    model = trained(nn.Sequential(layer), rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    A, B = (lora.delta_parameters(model, "default")[f"0.{key}"] for key in "AB")
    assert A.dtype == torch.float64 and A.shape == (rank, n_in) and B.shape == (n_out, rank)
    s = alpha / (math.sqrt(rank) if rank_stabilized else rank)
    x = torch.randn(2, 3, n_in, dtype=torch.float64)
    expected = layer(x) + s * (x @ A.T @ B.T)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    merged = lora.merge(model, "default")
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    change = merged[0].weight - layer.weight
    assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) <= rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_nothing_changes_bit_for_bit(llama, ids, dtype):
    model = llama.to(dtype)
    new = lora.attach(model, rank=4, dropout=0.3)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, model(ids).logits)
        assert torch.equal(new.train()(ids).logits, model(ids).logits)
    assert all(p.dtype == torch.float32 for p in lora.delta_parameters(new, "default").values())


def test_start_values_are_those_of_a_linear_layer():
    new = lora.attach(nn.Sequential(nn.Linear(64, 32)), rank=16, seed=5)
    A = lora.delta_parameters(new, "default")["0.A"].detach()
    assert float(A.abs().max()) <= 1 / 8 and float(A.abs().max()) > 0.12  # U(±1/sqrt(64))
    assert float(A.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    torch.manual_seed(5)
    expected = torch.empty(16, 64)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    assert torch.equal(A, expected)


def test_seeds_and_layers_differ(llama):
    state = [
        lora.delta_state_dict(lora.attach(llama, rank=2, seed=s), "default") for s in (0, 0, 1)
    ]
    key, other = "model.layers.0.mlp.up_proj.A", "model.layers.0.mlp.gate_proj.A"
    assert torch.equal(state[0][key], state[1][key])
    assert not torch.equal(state[0][key], state[2][key])
    assert not torch.equal(state[0][key], state[0][other])


def test_parameters_counted_in_closed_form(llama):
    """r (in + out) for each layer; q: 32 + 32, v: 32 + 16, three blocks."""
    new = lora.attach(llama, rank=4, layers=["*.q_proj", "*.v_proj"])
    expected = 3 * 4 * (64 + 48)
    assert sum(p.numel() for p in new.parameters() if p.requires_grad) == expected
    assert parameter_count(new) == parameter_count(llama) + expected
    assert "lm_head.A" not in lora.delta_parameters(lora.attach(llama), "default")
    whole = lora.attach(llama, rank=4, layers=Layers(exclude=()))
    assert "lm_head.A" in lora.delta_parameters(whole, "default")


def test_dropout_acts_on_the_inputs_of_a_in_training_only():
    layer = nn.Linear(400, 3, bias=False)
    nn.init.zeros_(layer.weight)
    model = trained(nn.Sequential(layer), rank=1, alpha=1.0, dropout=0.25)
    state = {"0.A": torch.ones(1, 400), "0.B": torch.ones(3, 1)}
    model = lora.load_delta(model, "default", state)
    x = torch.ones(50, 400)
    assert torch.equal(model.eval()(x), torch.full((50, 3), 400.0))
    torch.manual_seed(0)
    noisy = model.train()(x)
    assert float(noisy.mean().detach()) == pytest.approx(400, rel=0.02)  # 400 * 0.75 / 0.75
    kept = noisy[:, 0].detach() * 0.75
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert len(kept.round().unique()) > 5
    assert torch.equal(noisy[:, 0], noisy[:, 2])  # before A, so all outputs see one mask


def test_training_lowers_the_loss_and_touches_nothing_else(llama, ids, tmp_path):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    new = lora.attach(llama, rank=4, alpha=8)
    settings = TrainingSettings(steps=12, learning_rate=1e-2)
    result = train(new, batch, settings, checkpoint=tmp_path / "run")
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert (tmp_path / "run").stat().st_size < 3 * 4 * lora_size(new) + 50_000  # with Adam's two
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and parameter.requires_grad
    grads = {name for name, p in new.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in new.named_parameters() if p.requires_grad}
    assert all(".deltas.default." in name for name in grads) and len(grads) == 2 * 21
    with torch.no_grad():
        merged = lora.merge(new, "default")
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-5, rtol=1e-5)
    assert {type(m) for m in linears(merged).values()} == {nn.Linear}
    assert lora.attached(merged) == ()


def lora_size(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_resumed_run_is_the_run_itself(llama, tmp_path):
    settings = TrainingSettings(steps=6, learning_rate=1e-2, seed=1)
    whole = lora.attach(llama, rank=2, dropout=0.1)
    expected = train(whole, batch, settings)

    def stop(step):
        if step == 4:
            raise InterruptedError
        return batch(step)

    cut = lora.attach(llama, rank=2, dropout=0.1)
    path = tmp_path / "run"
    with pytest.raises(InterruptedError):
        train(cut, stop, settings, checkpoint=path, checkpoint_seconds=0)
    again = lora.attach(llama, rank=2, dropout=0.1, seed=9)
    assert train(again, batch, settings, checkpoint=path).losses == expected.losses


def test_frozen_layers_keep_no_activations(llama, ids):
    """Training a delta holds less memory for the backward pass than training everything."""

    def saved(model):
        """Bytes that autograd keeps, parameters not counted, each storage once."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = causal_lm_loss(model, ids)
        assert loss.requires_grad
        return sum(kept.values())

    narrow = lora.attach(llama, rank=1, layers="*.q_proj")
    assert saved(narrow) < 0.95 * saved(llama)


def test_several_are_summed_and_swapped(llama, ids):
    one = trained(llama, "one", seed=1, rank=2)
    two = trained(one, "two", seed=2, rank=3)
    alone = trained(llama, "two", seed=2, rank=3)
    assert two.model.layers[0].mlp.up_proj.active == ("one", "two")
    with torch.no_grad():
        same = lambda a, b: torch.testing.assert_close(a(ids).logits, b(ids).logits)  # noqa: E731
        same(lora.set_active(two, "two"), alone)
        same(lora.set_active(two, "one"), one)
        same(lora.set_active(two, "two", "one"), two)
        same(lora.detach(two, "one"), alone)
        same(lora.merge(lora.merge(two, "two"), "one"), two)
        assert torch.equal(lora.set_active(two)(ids).logits, llama(ids).logits)
        assert torch.equal(lora.detach(one, "one")(ids).logits, llama(ids).logits)
    weight = llama.model.layers[0].mlp.up_proj.weight
    summed = weight + sum(d.product() for d in two.model.layers[0].mlp.up_proj.deltas.values())
    merged = lora.merge(lora.merge(two, "one"), "two").model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged, summed)


def test_a_file_of_a_few_kilobytes(llama, ids, tmp_path):
    model = trained(llama, "task", rank=2, alpha=4, dropout=0.1, layers="*.q_proj")
    path = tmp_path / "task.safetensors"
    assert lora.save_delta(model, "task", path) < 4 * 3 * 2 * 64 + 1500
    again = lora.open_delta(llama, path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    host = again.model.layers[1].self_attn.q_proj
    assert host.deltas["task"].settings() == model.model.layers[1].self_attn.q_proj.deltas[
        "task"
    ].settings()  # fmt: skip
    assert host.deltas["task"].dropout == 0.1


def test_on_quantized_layers(llama, ids):
    base = rtn(llama, 4, group_size=16)
    codes = {n: b.clone() for n, b in base.named_buffers()}
    new = lora.attach(base, rank=4)
    with torch.no_grad():
        assert torch.equal(new(ids).logits, base(ids).logits)
    result = train(new, batch, TrainingSettings(steps=12, learning_rate=1e-2))
    assert result.losses[-1] < 0.9 * result.losses[0]
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, codes[name])
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ is stored quantized.*dequantize=True"):
        lora.merge(new, "default")
    merged = lora.merge(new, "default", dequantize=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, new(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, QuantizedLinear) for m in merged.modules())
    assert any(isinstance(m, QuantizedLinear) for m in new.modules())


def test_merging_into_half_precision_rounds_once(llama, ids):
    half = llama.to(torch.bfloat16)
    new = trained(half, rank=2)
    merged = lora.merge(new, "default")
    layer = new.model.layers[0].mlp.up_proj
    exact = layer.base.weight.float() + layer.deltas["default"].product()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, exact.bfloat16())
    quantized = lora.merge(trained(rtn(half, 8), rank=2), "default", dequantize=True)
    assert quantized(ids).logits.dtype == torch.bfloat16


def test_gradient_through_quantized_layers_is_that_of_their_weights(llama, ids):
    base = rtn(llama, 3)
    packed, plain = (
        lora.attach(base, rank=2, seed=3),
        lora.attach(dequantized(base), rank=2, seed=3),
    )
    for model in (packed, plain):
        causal_lm_loss(model, ids).backward()
    for a, b in zip(
        lora.delta_parameters(packed, "default").values(),
        lora.delta_parameters(plain, "default").values(),
        strict=True,
    ):
        torch.testing.assert_close(a.grad, b.grad)


def test_peft_names_go_there_and_back(llama):
    state = lora.delta_state_dict(trained(llama, rank=2), "default")
    theirs = lora.to_peft(state)
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in theirs
    assert lora.from_peft(theirs).keys() == state.keys()
    for key in ("base_model.model.x.lora_embedding_A", "x.lora_A.weight", "y"):
        with pytest.raises(ValueError, match="no matrix of a LoRA on a linear layer"):
            lora.from_peft({key: torch.ones(1)})


# --- layer and path in one pass -------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """The layers that went through the kernel, which runs here as it would on a GPU."""

    def interpreted(_, *tensors, obstacle=""):
        try:
            return choose("triton", *tensors, obstacle=obstacle)
        except ValueError:
            return "torch"

    def counted(x, weight, *rest):
        found.append(tuple(weight.shape))
        return one_pass(x, weight, *rest)

    found, one_pass = [], lora.layer_and_update
    monkeypatch.setattr("effnb.kernels.lora.choose", interpreted)
    monkeypatch.setattr("effnb.kernels.gathered_lora.choose", interpreted)
    monkeypatch.setattr(lora, "layer_and_update", counted)
    return found


def two_layers(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5, bias=False)).to(dtype)
    return trained(layers, rank=2, scale=0.5, **settings)


def results(model, x):
    """Output and gradients, of A, B and the inputs."""
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_one_pass_gives_what_two_give(request, dtype, off):
    model, x = two_layers(dtype), torch.randn(2, 3, 7).to(dtype)
    expected = results(model, x)  # on a CPU: the layer, then the path
    passes = request.getfixturevalue("passes")
    found = results(model, x)
    assert passes == [(6, 7), (5, 6)] and len(found) == 2 + 4
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=off * float(theirs.abs().max()))


def test_one_pass_starts_as_the_layer_and_merges_into_it(passes):
    layer, x = nn.Linear(7, 6), torch.randn(4, 7)
    model = lora.attach(nn.Sequential(layer), rank=2)
    torch.testing.assert_close(model(x), layer(x))
    model = trained(nn.Sequential(layer), rank=2)
    torch.testing.assert_close(model(x), lora.merge(model, "default")(x))
    assert len(passes) == 2  # none of them in the merged model


def test_a_cpu_takes_no_pass_for_two(monkeypatch):
    monkeypatch.setattr(lora, "layer_and_update", None)
    assert len(results(two_layers(), torch.randn(3, 7))) == 6


def with_hook(model):
    model[0].base.register_forward_hook(lambda module, inputs, output: None)
    return model


@pytest.mark.parametrize(
    ("why", "change", "expected"),
    [
        ("dropout that is off", lambda m: two_layers(dropout=0.5).eval(), 2),
        ("dropout", lambda m: two_layers(dropout=0.5).train(), 0),
        ("two that are active", lambda m: trained(m, "two", seed=1, rank=1), 0),
        ("one of two", lambda m: lora.set_active(trained(m, "two", rank=1), "two"), 2),
        ("none", lambda m: lora.set_active(m), 0),
        ("a hook that waits for one layer", with_hook, 1),
        ("a quantized layer", lambda m: trained(rtn(lora.detach(m, "default"), 8), rank=2), 0),
        ("what the kernel has no type for", lambda m: two_layers(torch.float64), 0),
    ],
)  # fmt: skip
def test_when_both_go_through_one_pass(passes, why, change, expected):
    model = change(two_layers())
    dtype = next(p.dtype for p in model.parameters())
    x = torch.randn(3, 7, dtype=dtype)
    torch.manual_seed(0)
    y = model(x)
    assert len(passes) == expected, why
    for host in lora.hosts(model).values():  # the same by two calls each
        host.base.register_forward_hook(lambda module, inputs, output: None)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), y)
    assert len(passes) == expected


def test_autocast_and_weights_of_a_kind_of_their_own_take_two_calls(passes):
    class Special(torch.Tensor):
        pass

    model, x = two_layers(), torch.randn(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    half = two_layers(torch.float16)
    with pytest.raises(RuntimeError):  # the layer's own refusal, as before
        half(x)
    for host in lora.hosts(model).values():
        host.base.weight = nn.Parameter(host.base.weight.detach().as_subclass(Special))
    model(x)
    assert not passes


def test_what_cannot_be_read_from_peft_is_said(llama, tmp_path):
    model = trained(llama, rank=2)
    lora.save_peft(model, "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    for old, new, message in [
        ('"LORA"', '"IA3"', "holds IA3, not LORA"),
        ('"bias": "none"', '"bias": "all"', "uses bias"),
        ('"bias": "none"', '"use_dora": true', "uses use_dora"),
    ]:
        config.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            lora.load_peft(llama, tmp_path)
    with pytest.raises(FileNotFoundError):
        lora.load_peft(llama, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("use_rslora", "yes"),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("alora_invocation_tokens", [5, 6]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("a_setting_of_next_year", 0.5),
    ],
)
def test_every_setting_that_is_not_understood_is_refused(llama, tmp_path, key, value):
    lora.save_peft(trained(llama, rank=2), "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {key: value}))
    with pytest.raises(ValueError, match=f"uses {key} = .*only a plain LORA is"):
        lora.load_peft(llama, tmp_path)
    # The same key without a meaning, as the library writes it, is no obstacle.
    config.write_text(json.dumps(about | {"a_setting_of_next_year": None, "rank_pattern": {}}))
    lora.load_peft(llama, tmp_path)


def test_a_file_whose_matrices_are_not_what_it_says(llama, tmp_path):
    lora.save_peft(trained(llama, rank=2), "default", tmp_path)
    config = tmp_path / "adapter_config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"r": 4}))
    with pytest.raises(ValueError, match="says r = 4, but its matrices have 2 rows"):
        lora.load_peft(llama, tmp_path)
    config.write_text(json.dumps({k: v for k, v in about.items() if k != "lora_alpha"}))
    with pytest.raises(ValueError, match="does not say lora_alpha"):
        lora.load_peft(llama, tmp_path)


def test_settings_of_another_release_are_refused(llama):
    state = lora.delta_state_dict(trained(llama, rank=2), "default")
    for settings in ({"alpha": 4.0, "direction": "both"}, {}):
        with pytest.raises(ValueError, match="are not those of a delta of kind 'lora' here"):
            lora.attach_state(llama, "x", "lora", settings, state)


def test_bad_input_is_one_sentence(llama, tmp_path):
    for settings, message in [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": 17}, r"k_proj: rank is 17; a layer of 32 inputs and 16 outputs has at most"),
        ({"alpha": 0}, "alpha is 0; it must be above 0"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"layers": "nothing"}, "no linear layer fits the pattern nothing; the model has model"),
        ({"name": "a.b"}, "cannot name a delta"),
    ]:
        with pytest.raises(ValueError, match=message):
            lora.attach(llama, **settings)
    with pytest.raises(ValueError, match="'default' is attached already"):
        lora.attach(lora.attach(llama), rank=2)
    with pytest.raises(TypeError, match="rank is True; it must be a whole number"):
        lora.attach(llama, rank=True)
    model = trained(llama, rank=2, layers="*.q_proj")
    state = lora.delta_state_dict(model, "default")
    key = "model.layers.0.self_attn.q_proj.A"
    with pytest.raises(ValueError, match=r"q_proj\.A has shape \(2, 31\), not \(2, 32\)"):
        lora.load_delta(model, "default", state | {key: torch.ones(2, 31)})
    settings = {"alpha": 1.0, "dropout": 0.0, "rank_stabilized": False}
    with pytest.raises(ValueError, match=r"q_proj: a LoRA consists of matrices A and B; found A"):
        lora.attach_state(llama, "x", "lora", settings, {key: torch.ones(2, 32)})
    norm = {f"model.norm.{k}": torch.ones(2, 2) for k in "AB"}
    with pytest.raises(ValueError, match="model.norm: a LoRA sits on linear layers"):
        lora.attach_state(llama, "x", "lora", settings, norm)
    save_file(state, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no delta"):
        lora.open_delta(llama, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no weight that the product can be added to"):
        LoRA(nn.Linear(4, 4), rank=1, alpha=1.0).merged(nn.ReLU())


def test_ranks_may_differ_in_a_state_but_not_in_a_file_of_peft(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {
        "0.A": torch.ones(1, 4), "0.B": torch.ones(4, 1),
        "1.A": torch.ones(3, 4), "1.B": torch.ones(4, 3),
    }  # fmt: skip
    settings = {"alpha": 3.0, "dropout": 0.0, "rank_stabilized": False}
    new = lora.attach_state(model, "x", "lora", settings, state)
    assert [host.deltas["x"].scaling for host in lora.hosts(new).values()] == [3.0, 1.0]
    with pytest.raises(ValueError, match="differ in rank"):
        lora.save_peft(new, "x", tmp_path)


def test_layers_that_only_look_linear_are_taken():
    """Anything with in_features and out_features: here, a layer without parameters."""

    class Fixed(nn.Module):
        in_features, out_features = 3, 2

        def forward(self, x):
            return x[..., :2] * 2

    model = lora.attach(nn.Sequential(Fixed()), rank=1)
    x = torch.randn(4, 3)
    assert torch.equal(model(x), x[:, :2] * 2)
    model(x).sum().backward()
    assert lora.delta_parameters(model, "default")["0.B"].grad is not None


@pytest.mark.parametrize("how", ["rounded", "LLM.int8()"])
def test_rounded_inputs_are_refused(llama, ids, how):
    from effnb.inference import quantization

    if how == "rounded":
        model = quantization.quantize_activations(llama, 8, 8)
    else:
        model = quantization.llm_int8(llama)
    with pytest.raises(ValueError, match=r"model\.layers\.0\..* rounds its inputs, which no grad"):
        lora.attach(model, rank=2)
