"""8-bit Adam: map and codes against torchao, steps against AdamW, the kernel against both."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap

from effnb.inference.quantization.tables import dynamic_levels
from effnb.kernels import adam8bit as module
from effnb.kernels.adam8bit import Adam8bitState, adam8bit, dynamic_map

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def gradients(*shape, seed=0):
    """Normal numbers over five decades."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-5 * torch.rand(shape, generator=generator))
    return size * torch.randn(shape, generator=generator)


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_torchao_and_of_our_tables(signed):
    found = dynamic_map(signed)
    torch.testing.assert_close(
        found, torch.tensor(create_dynamic_map(signed)).float(), atol=1e-7, rtol=0
    )
    assert len(found) == 256 and bool((found.diff() > 0).all())
    if signed:
        torch.testing.assert_close(found, dynamic_levels(), atol=1e-7, rtol=0)
        assert found[module.ZERO] == 0 and found[-1] == 1 and found[0] > -1
        assert float(found[module.ZERO + 1]) == pytest.approx(5.5e-7)
        assert float(found[-2]) == pytest.approx(0.99296875)
        edges = 10.0 ** torch.arange(-7, 1)
        decades = torch.histogram(found[module.ZERO + 1 : -1], edges).hist.int().tolist()
        assert decades == [1, 2, 4, 8, 16, 32, 64]
    else:
        assert float(found[1]) == pytest.approx(3.25e-7)
        assert float(found[-2]) == pytest.approx(0.996484375)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed):
    x = gradients(1024)
    x = x if signed else x.abs()
    codes, scale = module._encode(x, signed)
    blocks = x.view(-1, module.BLOCK)
    assert torch.equal(scale, blocks.abs().amax(1))
    expected = quantize_8bit_with_qmap(blocks / scale[:, None], dynamic_map(signed)).flatten()
    moved = (expected == module.ZERO) & (x < 0) if signed else torch.zeros(1024) > 0
    assert torch.equal(codes[~moved], expected[~moved])
    assert bool((codes[moved] == module.ZERO - 1).all())


def test_the_error_of_rounding_is_the_published_one():
    """Mean absolute error of a million normal numbers, in blocks of 256."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    again = module._decode(*module._encode(x, True), True)
    assert float((again - x).abs().mean()) == pytest.approx(0.00853, abs=5e-5)


# ---------------------------------------------------------------- the step


def test_by_hand():
    """The first step from nothing is one of size lr, against the sign of the gradient."""
    w, g = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -0.5, 0.0])
    state = Adam8bitState.zeros(w)
    adam8bit(w, g, state, step=1, lr=0.1)
    torch.testing.assert_close(w, torch.tensor([0.9, 2.1, 3.0]))
    m, v = state.moments()
    torch.testing.assert_close(m, torch.tensor([0.05, -0.05 * 0.99296875, 0.0]))
    torch.testing.assert_close(v, torch.tensor([0.00025, 0.00025, 0.0]))


@pytest.mark.parametrize("shared", [True, False], ids=["from the same moments", "on its own"])
def test_fifty_steps_beside_adamw(shared):
    """From the same moments a step is the same one; on its own, rounding adds up to little."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    start, other = w.clone(), torch.nn.Parameter(w.clone())
    options = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    optimizer, state = torch.optim.AdamW([other], **options), Adam8bitState.zeros(w)
    for step in range(1, 51):
        other.grad = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        adam8bit(w, other.grad, state, step=step, **options)
        optimizer.step()
        if shared:
            torch.testing.assert_close(w, other.detach(), atol=2e-6, rtol=0)
            for name, moment in zip(("exp_avg", "exp_avg_sq"), state.moments()):
                optimizer.state[other][name].copy_(moment.view(64, 64))
            other.data.copy_(w)
    difference, moved = (w - other.detach()).abs().mean(), (w - start).abs().mean()
    assert float(difference) < 0.03 * float(moved)


def test_a_quadratic_is_minimized():
    w = torch.full((300,), 3.0)
    state = Adam8bitState.zeros(w)
    for step in range(1, 301):
        adam8bit(w, w - 1, state, step=step, lr=0.05)
    torch.testing.assert_close(w, torch.ones(300), atol=0.02, rtol=0)


def test_the_state_takes_a_quarter():
    state = Adam8bitState.zeros(torch.empty(4096, 64))
    held = sum(t.numel() * t.element_size() for t in state.tensors().values())
    assert held / (2 * 4 * 4096 * 64) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_not_finite_moves_nothing(proof, backend):
    w, g = torch.ones(5, device=proof.device), torch.ones(5, device=proof.device)
    state = Adam8bitState.zeros(w)
    adam8bit(w, g, state, step=1, lr=0.1, backend=backend)
    before = w.clone()
    g[1], g[3] = torch.nan, -torch.inf
    adam8bit(w, g, state, step=2, lr=0.1, weight_decay=0.5, backend=backend)
    assert [bool(x) for x in w == before] == [False, True, False, True, False]
    for moment in state.moments():
        assert [bool(x) for x in moment == 0] == [False, True, False, True, False]


# ---------------------------------------------------------------- the kernel


def steps(proof, weights, *, count=3, seed=0):
    """Some steps by the kernel and by the definition, from the same start, in guarded memory."""
    ours, theirs = proof.guarded(weights), weights.clone()
    states = [Adam8bitState.zeros(theirs) for _ in range(2)]
    for name, tensor in states[0].tensors().items():
        setattr(states[0], name, proof.guarded(tensor))
    for step in range(1, count + 1):
        g = gradients(*weights.shape, seed=seed + step).to(weights.dtype).to(proof.device)
        adam8bit(ours, proof.guarded(g), states[0], step=step, backend=proof.kernel, **OPTIONS)
        adam8bit(theirs, g, states[1], step=step, backend="torch", **OPTIONS)
    return ours, theirs, *states


def agree(ours, theirs, mine, other):
    """Weights agree to the last digit; a code may be its neighbor where the share is half way."""
    digit = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, atol=4 * digit, rtol=2 * digit)
    for name in ("m", "v"):
        apart = (getattr(mine, name).int() - getattr(other, name).int()).abs()
        assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.002
        mine_scale, other_scale = (getattr(s, f"{name}_scale") for s in (mine, other))
        torch.testing.assert_close(mine_scale, other_scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(4, 256), (3, 700), (1,), (2048,)])
def test_kernel(proof, dtype, shape):
    agree(*steps(proof, proof.tensor(*shape, dtype=dtype)))


@pytest.mark.parametrize("signed", [True, False])
def test_kernel_codes_every_entry_as_itself_and_what_lies_between_as_the_nearest(proof, signed):
    """A step with betas of 0 stores the gradient, or its square."""
    levels = dynamic_map(signed).double()
    middles = (levels[:-1] + levels[1:]) / 2
    near = torch.stack([middles * (1 - 1e-5), middles * (1 + 1e-5)]).T.flatten()
    values = torch.cat([levels, near, levels[-1:]])[: 3 * 256].float()
    values = torch.nn.functional.pad(values, (0, 3 * 256 - len(values))).view(3, 256)
    values[:, 0] = 1.0  # the largest of each block
    g = (values if signed else values.abs().sqrt()).flatten().to(proof.device)
    for backend in ("torch", proof.kernel):
        w = torch.zeros_like(g)
        state = Adam8bitState.zeros(w)
        adam8bit(w, g, state, step=1, lr=0.0, betas=(0.0, 0.0), backend=backend)
        found = (state.m if signed else state.v).long().cpu()
        shares = (g if signed else g * g).double().cpu()
        distance = (shares[:, None] - levels).abs()
        error = distance[torch.arange(len(found)), found] - distance.min(1).values
        moved = (found == module.ZERO - 1) if signed else torch.zeros(len(found)) > 0
        assert float(error[~moved].max()) < 1e-9, backend
        assert bool((shares[moved] < 0).all())


@pytest.mark.unsanitized
@settings(max_examples=8)
@given(count=st.integers(1, 1500), seed=st.integers(0, 9))
def test_kernel_on_any_shape(proof, count, seed):
    agree(*steps(proof, proof.tensor(count, seed=seed), count=2, seed=seed))


def test_kernel_writes_nothing_beside_its_tensors(proof):
    memory = torch.full((64 + 300 + 64,), torch.nan, device=proof.device)
    codes = [torch.full((64 + 300 + 64,), 77, dtype=torch.uint8, device=proof.device) for _ in "mv"]
    scales = [torch.full((64 + 2 + 64,), torch.nan, device=proof.device) for _ in "mv"]
    for x, start in zip((memory, *codes, *scales), (1.0, module.ZERO, 0, 0.0, 0.0)):
        x[64:-64] = start
    state = Adam8bitState(codes[0][64:-64], scales[0][64:-64], codes[1][64:-64], scales[1][64:-64])
    gradient = gradients(300).to(proof.device)
    adam8bit(memory[64:-64], gradient, state, step=1, lr=0.1, backend=proof.kernel)
    assert bool((memory[64:-64] != 1).all())
    for x in (memory, *codes, *scales):
        edges = torch.cat([x[:64], x[-64:]])
        assert bool((edges.isnan() if edges.is_floating_point() else edges == 77).all())


def test_no_weights(proof):
    w = torch.empty(0, 4, device=proof.device)
    state = Adam8bitState.zeros(w)
    for backend in ("torch", proof.kernel):
        adam8bit(w, w.clone(), state, step=1, lr=0.1, backend=backend)
    assert w.shape == (0, 4) and state.m_scale.shape == (0,)


def test_float64_takes_the_definition():
    w, g = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    state = Adam8bitState.zeros(w)
    with pytest.raises(ValueError, match="the kernel has no float64"):
        adam8bit(w, g, copy.deepcopy(state), step=1, lr=0.1, backend="triton")
    adam8bit(w, g, state, step=1, lr=0.1)
    torch.testing.assert_close(w, torch.full((4,), 0.9, dtype=torch.float64))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": 0}, "step is 0; steps are counted from 1"),
        ({"lr": -1.0}, "lr is -1.0; it must not be negative"),
        ({"eps": -1e-8}, "eps is -1e-08; it must not be negative"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\); both must be from 0 and below 1"),
        ({"backend": "cuda"}, 'backend is .*; it must be "triton", "torch" or None'),
    ],
)
def test_settings_that_cannot_be(changes, sentence):
    w = torch.ones(4)
    state = Adam8bitState.zeros(w)
    with pytest.raises(ValueError, match=sentence):
        adam8bit(w, w.clone(), state, **{"step": 1, "lr": 0.1, **changes})
    assert bool((w == 1).all()) and bool((state.m == module.ZERO).all())


def test_tensors_that_do_not_fit():
    w = torch.ones(4, 3)
    state = Adam8bitState.zeros(w)
    options = dict(step=1, lr=0.1)
    with pytest.raises(ValueError, match=r"gradient has shape \(3, 4\).*\(4, 3\)"):
        adam8bit(w, w.T, state, **options)
    with pytest.raises(ValueError, match=r"the state's m has shape \(12,\).*must be \(4,\)"):
        adam8bit(torch.ones(4), torch.ones(4), state, **options)
    with pytest.raises(ValueError, match="must lie in one piece"):
        adam8bit(w.T, torch.ones(3, 4), state, **options)
    with pytest.raises(TypeError, match="gradient is of int64"):
        adam8bit(w, torch.ones(4, 3, dtype=torch.int64), state, **options)
    with pytest.raises(TypeError, match="step is 1.5; it must be a whole number"):
        adam8bit(w, w.clone(), state, step=1.5, lr=0.1)
