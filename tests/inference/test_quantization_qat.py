"""Quantization-aware training: the made-up gradients, the layers, and what is packed in the end."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.evaluation import parameter_count, stored_bytes
from effnb.inference.quantization import QuantizedLinear, bits_per_weight, quantize, rtn
from effnb.inference.quantization.activations import QuantizedInputs
from effnb.inference.quantization.estimators import (
    FewValues,
    LearnedGrid,
    RangeGrid,
    TokenGrid,
    lsq_gradient_scale,
    lsq_quantize,
    lsq_start,
    quantize_ste,
    ste_round,
    straight_through,
)
from effnb.inference.quantization.extreme import TernaryTensor
from effnb.inference.quantization.grid import Grid
from effnb.inference.quantization.llm_qat import imitation_loss, self_generate, soft_cross_entropy
from effnb.inference.quantization.qat import FakeQuantLinear, SurroundedLinear, convert, prepare_qat

SIZES = st.one_of(st.sampled_from(["row", "tensor"]), st.integers(1, 20))


def batch(step):
    return torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step % 2))


def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


# --- the estimators -------------------------------------------------------------------------------


def test_rounding_is_exact_forward_and_the_identity_backward():
    x = torch.cat([torch.randn(1000) * 10**k for k in range(-3, 6)])
    assert torch.equal(ste_round(x), x.round())
    assert torch.equal(gradient(ste_round, x), torch.ones_like(x))
    value = torch.randn_like(x)
    assert torch.equal(straight_through(value, x), value)


def test_gradient_inside_and_outside_by_hand():
    """Step 1, codes -1 … 2: the ends pass the gradient on while the rounded code is on the grid."""
    x = torch.tensor([-2.0, -1.6, -1.4, 0.2, 2.4, 2.6])
    out = quantize_ste(x, torch.ones(()), 0, -1, 2)
    assert out.tolist() == [-1, -1, -1, 0, 2, 2]
    grad = gradient(lambda t: quantize_ste(t, torch.ones(()), 0, -1, 2), x)
    assert grad.tolist() == [0, 0, 1, 1, 1, 0]
    scale = torch.ones((), requires_grad=True)
    assert not quantize_ste(x, scale, 0, -1, 2).requires_grad  # nothing for the scale


def lsq_formula(x, s, low, high):
    ratio = x / s
    inside = (ratio > low) & (ratio < high)
    step = torch.where(
        ratio <= low, float(low), torch.where(ratio >= high, float(high), ratio.round() - ratio)
    )
    return inside.double(), step


@examples(max_examples=25)
@given(st.integers(2, 8), st.booleans(), st.floats(0.05, 2.0), st.integers(0, 99))
def test_lsq_gradients_are_the_papers(bits, unsigned, s, seed):
    """Autograd against the formula, to 1e-9, ends of the grid included."""
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, generator=generator, dtype=torch.float64) * s * high
    x[:4] = torch.tensor([low, high, low - 1, high + 1]) * s
    upstream = torch.randn(40, generator=generator, dtype=torch.float64)
    step = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    g = lsq_gradient_scale(40, high)
    assert g == pytest.approx((40 * high) ** -0.5)
    out = lsq_quantize(x, step, low, high, g)
    expected = (x / step).clamp(low, high).round() * step
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)
    out.backward(upstream)
    for_x, for_step = lsq_formula(x.detach(), step.detach(), low, high)
    torch.testing.assert_close(x.grad, for_x * upstream, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.grad, g * (for_step * upstream).sum(), rtol=1e-9, atol=1e-9)


def test_lsq_step_has_exactly_its_own_value():
    """g scales the gradient alone: the numbers of the forward pass do not depend on it."""
    x = torch.randn(500)
    step = torch.tensor(0.1234567, requires_grad=True)
    assert torch.equal(lsq_quantize(x, step, -8, 7, 1.0), lsq_quantize(x, step, -8, 7, 1e-3))


def test_lsq_start():
    x = torch.tensor([1.0, -3.0])
    assert float(lsq_start(x.abs().mean(), 7)) == pytest.approx(4 / math.sqrt(7))
    assert float(lsq_start(torch.zeros(()), 7)) == 1


def test_a_learned_step_descends_to_a_better_one():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    grid = LearnedGrid.of_weight(weight, 3, "row")
    error = lambda: (grid(weight) - weight).square().mean()  # noqa: E731
    before = float(error().detach())
    optimizer = torch.optim.Adam(grid.parameters(), lr=0.04)
    for _ in range(30):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error().detach()) < 0.8 * before


def test_a_step_below_zero_finds_its_way_back():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grid = LearnedGrid.of_weight(weight, 4, "tensor")
    with torch.no_grad():
        grid.step.fill_(-0.1)
    assert bool((grid.steps() > 0).all())
    optimizer = torch.optim.Adam(grid.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (grid(weight) - weight).square().mean().backward()
        optimizer.step()
    assert float(grid.step.detach()) > 0.05


@examples(max_examples=25)
@given(st.integers(2, 8), SIZES, st.integers(1, 5), st.integers(1, 33), st.booleans())
def test_grids_train_on_what_they_store(bits, group_size, rows, columns, symmetric):
    """The numbers of the forward pass are those read back from packed storage, bit for bit."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    for grid in (
        RangeGrid(Grid(bits, group_size, symmetric)),
        LearnedGrid.of_weight(weight, bits, group_size),
    ):
        assert torch.equal(grid(weight).detach(), grid.stored(weight).dequantize())
    plain = quantize(weight, bits, group_size=group_size, symmetric=symmetric)
    grid = RangeGrid(Grid(bits, group_size, symmetric))
    assert torch.equal(grid(weight), plain.dequantize())
    torch.testing.assert_close(gradient(grid, weight), torch.ones_like(weight))


@pytest.mark.parametrize("clip", ["percentile", "mse"])
def test_a_clipped_range_stops_the_gradient_outside(clip):
    weight = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 20.0
    grid = RangeGrid(Grid(3, "row", True, clip))
    assert torch.equal(grid(weight), grid.stored(weight).dequantize())
    grad = gradient(grid, weight)
    assert bool((grad[:, 0] == 0).all()) and float(grad[:, 1:].mean()) > 0.95


@pytest.mark.parametrize("method", ["bitnet", "binary"])
def test_few_values(method):
    torch.manual_seed(0)
    weight = torch.randn(30, 50)
    grid = FewValues(method)
    assert torch.equal(grid(weight), grid.stored(weight).dequantize())
    assert torch.equal(gradient(grid, weight), torch.ones_like(weight))
    levels = grid(weight).unique()
    mean = weight.abs().mean()
    if method == "bitnet":
        torch.testing.assert_close(levels, torch.stack([-mean, mean * 0, mean]))
        share = float((grid(weight) == 0).float().mean())
        assert share == pytest.approx(math.erf(1 / math.sqrt(4 * math.pi)), abs=0.03)  # 0.3101
    else:
        torch.testing.assert_close(grid(weight)[3].abs(), weight[3].abs().mean().expand(50))
    assert not FewValues("bitnet")(torch.zeros(3, 3)).any()


def test_tokens_have_their_own_range():
    x = torch.tensor([[[1.0, 0.5], [100.0, 50.4]]])
    out = TokenGrid(8)(x)
    expected = (x * 127 / x.abs().amax(-1, keepdim=True)).round()
    torch.testing.assert_close(out, expected * x.abs().amax(-1, keepdim=True) / 127)
    assert torch.equal(gradient(TokenGrid(4), x), torch.ones_like(x))


# --- models ---------------------------------------------------------------------------------------

METHODS = {
    "ste": {"bits": 3, "group_size": 16},
    "lsq": {"bits": 3},
    "bitnet": {"method": "bitnet"},
    "binary": {"method": "binary"},
    "W4A8KV4": {"bits": 4, "symmetric": True, "activation_bits": 8, "kv_bits": 4},
    "lsq W3A4": {"bits": 3, "group_size": "tensor", "activation_bits": 4},
    "sub-norm": {"method": "bitnet", "sub_norm": True},
}


def prepared(model, key, ids):
    settings = dict(METHODS[key])
    if key.startswith("lsq"):
        settings |= {"method": "lsq", "calibration": ids}
    return prepare_qat(model, **settings)


@pytest.mark.parametrize("key", METHODS)
def test_training_lowers_the_loss_and_conversion_keeps_the_function(llama, ids, key):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    model = prepared(llama, key, ids)
    result = train(model, batch, TrainingSettings(steps=8, learning_rate=5e-3))
    assert sum(result.losses[-2:]) < 0.9 * sum(result.losses[:2])
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    packed = convert(model)
    assert not any(isinstance(m, FakeQuantLinear) for m in packed.modules())
    assert sum(isinstance(m, QuantizedLinear) for m in packed.modules()) == 21
    with torch.no_grad():
        expected = model(ids).logits
        difference = (packed(ids).logits - expected).abs().max()
    # A number that lies on the border between two codes of a later layer may fall either way.
    allowed = 1e-4 if key in ("ste", "lsq", "binary") else 0.05
    assert float(difference) < allowed * float(expected.abs().max())
    assert any(isinstance(m, FakeQuantLinear) for m in model.modules())


def test_untrained_it_is_round_to_nearest(llama, ids):
    for settings in ({"bits": 2}, {"bits": 4, "group_size": 8, "symmetric": True}):
        model, rounded = prepare_qat(llama, **settings), rtn(llama, **settings)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, rounded(ids).logits)
            assert torch.equal(convert(model)(ids).logits, rounded(ids).logits)


def test_layer_by_layer_conversion_is_exact(llama, ids):
    """Within one layer nothing accumulates: every kind is equal to 1e-5 of its outputs."""
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
    for key in METHODS:
        model = prepared(llama, key, ids)
        layer = model.model.layers[0].self_attn.k_proj
        with torch.no_grad():
            expected = layer(x)
            torch.testing.assert_close(
                layer.converted()(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )


def test_what_is_packed(llama, ids):
    kinds = {key: convert(prepared(llama, key, ids)).model.layers[0] for key in METHODS}
    assert isinstance(kinds["bitnet"].mlp.up_proj, QuantizedInputs)
    assert isinstance(kinds["bitnet"].mlp.up_proj.layer.quantized, TernaryTensor)
    assert kinds["ste"].mlp.up_proj.quantized.bits == 3
    assert isinstance(kinds["W4A8KV4"].self_attn.v_proj, SurroundedLinear)
    assert isinstance(kinds["W4A8KV4"].self_attn.q_proj, QuantizedInputs)
    assert isinstance(kinds["lsq W3A4"].mlp.up_proj, SurroundedLinear)
    whole = convert(prepared(llama, "lsq", ids))
    assert parameter_count(whole) == parameter_count(llama)
    layer = whole.model.layers[0].mlp.up_proj.quantized
    assert layer.bits_per_weight == bits_per_weight(3, (48, 32), "row")
    assert stored_bytes(whole) < 0.5 * stored_bytes(llama)


def test_lsq_uses_the_codes_below(llama, ids):
    """Q_N is one larger than Q_P; the lowest code survives packing."""
    grid = LearnedGrid.of_weight(torch.ones(1, 1), 3, "row")
    weight = torch.tensor([[-100.0, 100.0]])
    step = float(grid.steps().detach())
    assert (
        grid(weight).tolist()
        == [[-4 * step, 3 * step]]
        == grid.stored(weight).dequantize().tolist()
    )


def test_steps_do_not_decay_and_gains_neither(llama, ids):
    model = prepared(llama, "lsq W3A4", ids)
    steps = [p for n, p in model.named_parameters() if n.endswith(".step")]
    assert len(steps) == 2 * 21 and all(p.ndim == 1 for p in steps)


def test_lsq_inputs_start_from_calibration(ids):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(128, 6)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.second(torch.relu(self.first(self.table(input_ids))))

    net = Net()
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    with torch.no_grad():
        net.table.weight[ids[0, 20]] = 1e6  # seen only in padding, unless it is drawn elsewhere
        net.table.weight[ids[:, :10].unique()] = torch.randn(len(ids[:, :10].unique()), 6)
    model = prepare_qat(
        net, 4, method="lsq", activation_bits=4,
        calibration=[{"input_ids": ids, "attention_mask": mask}],
    )  # fmt: skip
    with torch.no_grad():
        seen = net.table(ids[:, :10])
        hidden = torch.relu(net.first(seen))
    signed, unsigned = model.first.inputs, model.second.inputs
    assert (signed.low, signed.high) == (-8, 7) and (unsigned.low, unsigned.high) == (0, 15)
    for grid, x, high in ((signed, seen, 7), (unsigned, hidden, 15)):
        expected = 2 * float(x.abs().mean()) / math.sqrt(high)
        assert float(grid.step.detach()) == pytest.approx(expected, rel=1e-5)
    assert signed.gradient_scale == pytest.approx((6 * 7) ** -0.5)


def test_sub_norm_goes_first(llama):
    model = prepare_qat(llama, method="bitnet", sub_norm=True)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32) * 50
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = nn.functional.linear(TokenGrid(8)(normed), layer.weights(layer.weight))
    torch.testing.assert_close(layer(x), expected)
    assert prepare_qat(llama, method="bitnet").model.layers[0].mlp.up_proj.norm is None


def test_a_checkpoint_resumes(llama, tmp_path):
    settings = TrainingSettings(steps=5, learning_rate=1e-2)
    expected = train(prepare_qat(llama, 3, method="lsq"), batch, settings)

    def stop(step):
        if step == 3:
            raise InterruptedError
        return batch(step)

    path = tmp_path / "run"
    with pytest.raises(InterruptedError):
        train(prepare_qat(llama, 3, method="lsq"), stop, settings, checkpoint=path,
              checkpoint_seconds=0)  # fmt: skip
    again = train(prepare_qat(llama, 3, method="lsq"), batch, settings, checkpoint=path)
    assert again.losses == expected.losses


def test_half_precision_models(llama, ids):
    model = prepare_qat(llama.to(torch.bfloat16), 4, method="lsq")
    assert model.model.layers[0].mlp.up_proj.weights.step.dtype == torch.float32
    causal_lm_loss(model, ids).backward()
    assert convert(model)(ids).logits.dtype == torch.bfloat16


def test_frozen_models_become_trainable_and_stay_frozen(llama):
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    model = prepare_qat(llama, 4)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in llama.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bad_input_is_one_sentence(llama, ids):
    for settings, message in [
        ({"bits": 9}, "bits is 9"),
        ({"bits": None}, "the method 'ste' needs bits"),
        ({"bits": 4, "method": "magic"}, "method is 'magic'; it must be one of ste, lsq"),
        ({"bits": 2, "method": "bitnet"}, "bits is 2; the method 'bitnet' fixes them itself"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "clip": "no"}, "clip is 'no'"),
        ({"bits": 4, "activation_bits": 1}, "bits is 1"),
        ({"bits": 4, "kv_bits": 12}, "bits is 12"),
        ({"bits": 4, "kv_bits": 4, "kv": "x*"}, "no layer fits the patterns of keys and values"),
        ({"bits": 4, "method": "lsq", "activation_bits": 4}, "need calibration data"),
        ({"bits": 4, "layers": "nothing"}, "no Linear fits the pattern nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_qat(llama, **settings)
    with pytest.raises(ValueError, match="quantized already"):
        prepare_qat(rtn(llama, 4), 4)
    with pytest.raises(ValueError, match="prepared for training already"):
        prepare_qat(prepare_qat(llama, 4), 4)
    with pytest.raises(ValueError, match="no FakeQuantLinear fits"):
        convert(llama)


# --- data-free training ---------------------------------------------------------------------------


def test_the_loss_is_divergence_plus_entropy():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p = teacher.softmax(-1)
    divergence = nn.functional.kl_div(
        student.log_softmax(-1), p, reduction="none"
    ).sum(-1).mean()  # fmt: skip
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher), divergence + entropy)
    student.requires_grad_()
    soft_cross_entropy(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - p).detach() / 6)


class Counter(nn.Module):
    """Without a cache; after token t, t + 1 is the most likely, by a hair."""

    def __init__(self, size=50):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=size, max_position_embeddings=40)
        self.size = nn.Parameter(torch.zeros(size))

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        logits = self.size.expand(*input_ids.shape, -1).clone()
        best = ((input_ids + 1) % len(self.size)).unsqueeze(-1)
        return SimpleNamespace(logits=logits.scatter(-1, best, 0.01))


def test_text_begins_greedily_and_goes_on_at_random():
    ids = self_generate(Counter(), 200, 12, greedy=(3, 5), seed=1)
    assert ids.shape == (200, 12) and ids.dtype == torch.int64
    right = ids[:, 1:] == (ids[:, :-1] + 1) % 50
    runs = right.int().cumprod(1).sum(1)  # greedy tokens of each sequence, perhaps a lucky one more
    assert int(runs.min()) == 3 and int((runs > 6).sum()) <= 2
    assert all(int((runs == n).sum()) > 40 for n in (3, 4, 5))
    assert float(right[:, 6:].float().mean()) < 0.06
    assert len(ids[:, 0].unique()) > 40
    assert torch.equal(ids, self_generate(Counter(), 200, 12, seed=1, batch_size=7))
    assert not torch.equal(ids, self_generate(Counter(), 200, 12, seed=2))


def test_text_with_a_cache_is_text_without(llama):
    """A Llama reads one token at a time, from its cache, and the argument is left as it was."""
    llama.train()
    ids = self_generate(llama, 5, 20, seed=3)
    assert llama.training

    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            return SimpleNamespace(logits=self.model(input_ids=input_ids).logits)

    assert torch.equal(ids, self_generate(Plain(llama), 5, 20, seed=3))


def test_draws_follow_the_models_distribution():
    """Without greedy tokens, the second token of a peaked model is drawn from its softmax."""
    model = Counter(4)
    with torch.no_grad():
        model.size.copy_(torch.tensor([0.0, 2.0, -1.0, 1.0]))
    ids = self_generate(model, 3000, 3, greedy=(0, 0), first_tokens=torch.tensor([3]))
    assert bool((ids[:, 0] == 3).all())
    logits = model(torch.tensor([[3]])).logits[0, 0]
    found = torch.bincount(ids[:, 1], minlength=4) / 3000
    torch.testing.assert_close(found, logits.softmax(0).detach(), atol=0.03, rtol=0)


def test_imitation_without_data(llama):
    """Trained on its own text alone, the quantized student comes closer to its teacher."""
    seen = []
    text = self_generate(llama, 16, 24, progress=lambda *a: seen.append(a), batch_size=8)
    assert seen == [(8, 16), (16, 16)]
    student = prepare_qat(llama, 3, symmetric=True, activation_bits=8, kv_bits=8)
    settings = TrainingSettings(steps=15, learning_rate=3e-3)
    result = train(student, lambda s: text[s % 2 * 8 :][:8], settings, loss=imitation_loss(llama))
    with torch.no_grad():
        truth = llama(text).logits
    floor = float(soft_cross_entropy(truth, truth))
    first, last = (sum(part) / 2 - floor for part in (result.losses[:2], result.losses[-2:]))
    assert 0 < last < 0.7 * first
    assert all(p.grad is None for p in llama.parameters())


def test_bad_requests_for_text(llama):
    for settings, message in [
        ({"sequences": 0, "tokens": 4}, "sequences is 0"),
        ({"sequences": 1, "tokens": 0}, "tokens 0"),
        ({"sequences": 1, "tokens": 65}, "tokens is 65; the model's context is 64"),
        ({"sequences": 1, "tokens": 4, "greedy": (5, 3)}, r"greedy is \(5, 3\)"),
        (
            {"sequences": 1, "tokens": 4, "first_tokens": torch.tensor([], dtype=torch.long)},
            "first_tokens is empty",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            self_generate(llama, **settings)
    with pytest.raises(ValueError, match="does not say its vocabulary"):
        self_generate(nn.Linear(2, 2), 1, 4)
