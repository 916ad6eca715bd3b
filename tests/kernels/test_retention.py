"""Retention: three forms that are one, against the written-out sum; the kernels against them."""

import importlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.kernels.retention import (
    retention,
    retention_chunkwise,
    retention_decay,
    retention_parallel,
    retention_recurrent,
    retention_step,
    retention_step_reference,
)

module = importlib.import_module("effnb.kernels.retention")
GPU = os.environ.get("EFFNB_GPU") == "1"
FORMS = [retention_parallel, retention_recurrent, retention_chunkwise]


def written_out(q, k, v, gamma, scale, state):
    """The double sum over queries and keys, term by term."""
    _, heads, tokens, _ = q.shape
    out = torch.zeros_like(v)
    final = state.clone()
    for h in range(heads):
        g = float(gamma[h])
        for n in range(tokens):
            for m in range(n + 1):
                weight = (q[:, h, n] * k[:, h, m]).sum(-1, keepdim=True)
                out[:, h, n] += scale * g ** (n - m) * weight * v[:, h, m]
            out[:, h, n] += scale * g ** (n + 1) * (q[:, h, n, None] @ state[:, h])[:, 0]
        final[:, h] = g**tokens * state[:, h] + sum(
            g ** (tokens - 1 - m) * k[:, h, m, :, None] * v[:, h, m, None] for m in range(tokens)
        )
    return out, final


def inputs(tokens=13, batch=2, heads=3, dim_k=4, dim_v=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, dim_k), (tokens, dim_k), (tokens, dim_v), (dim_k, dim_v)]
    q, k, v, state = (
        torch.randn(batch, heads, *size, generator=generator, dtype=dtype) for size in sizes
    )
    return q, k, v, torch.tensor([0.7, 0.9, 31 / 32], dtype=dtype)[:heads], state


def close(found, expected, atol=1e-12):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------- the three forms


def test_decay_of_the_paper():
    assert retention_decay(4).tolist() == [0.96875, 0.984375, 0.9921875, 0.99609375]
    memory = 1 / (1 - retention_decay(4).double())  # the sum of all powers of gamma
    assert memory.tolist() == [32, 64, 128, 256]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_form_is_the_written_out_sum(form, scale):
    q, k, v, gamma, state = inputs()
    expected = written_out(q, k, v, gamma, 4**-0.5 if scale is None else scale, state)
    close(form(q, k, v, gamma, scale=scale, initial_state=state), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 13, 64])
def test_chunks_of_any_size_give_the_same(chunk_size):
    q, k, v, gamma, state = inputs()
    expected = retention_recurrent(q, k, v, gamma, initial_state=state)
    close(retention_chunkwise(q, k, v, gamma, initial_state=state, chunk_size=chunk_size), expected)


def test_a_text_in_two_parts_is_one_text():
    q, k, v, gamma, state = inputs()
    whole = retention(q, k, v, gamma, initial_state=state)
    first = retention(q[:, :, :5], k[:, :, :5], v[:, :, :5], gamma, initial_state=state)
    second = retention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], gamma, initial_state=first[1])
    close((torch.cat([first[0], second[0]], 2), second[1]), whole)


def test_no_decay_is_linear_attention():
    q, k, v, _, _ = inputs()
    out, final = retention(q, k, v, torch.ones(3).double(), scale=1.0)
    close((out, final), ((q @ k.mT).tril() @ v, k.mT @ v))


def test_no_decay_overflows():
    """gamma^-4096 is infinite in float32; no form may compute it."""
    q, k, v, _, _ = inputs(tokens=4096, batch=1, heads=1, dtype=torch.float32)
    gamma = torch.tensor([0.97])
    exact = retention_chunkwise(q.double(), k.double(), v.double(), gamma.double())
    for form in (retention_parallel, retention_chunkwise):
        out, _ = form(q, k, v, gamma)
        assert float((out.double() - exact[0]).abs().max()) < 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form(form):
    values = [x.requires_grad_() for x in inputs(tokens=4, batch=1, heads=2, dim_k=2, dim_v=3)]

    def run(q, k, v, gamma, state):
        return form(q, k, v, gamma, initial_state=state)

    torch.autograd.gradcheck(run, values)


def test_gradient_is_three_retentions():
    """What the kernels' backward rests on, in float64 and plain PyTorch."""
    q, k, v, gamma, state = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    out, final = retention_parallel(q, k, v, gamma, initial_state=state)
    d_out, d_final = torch.randn_like(out), torch.randn_like(final)
    dq, dk, dv, d_state = torch.autograd.grad([out, final], leaves, [d_out, d_final])
    g, s = gamma[:, None, None], 4**-0.5

    def backwards(q, k, v, state):
        """Time reversed. Here a state is one step older than where it is read."""
        q, k, v = (x.flip(2) for x in (q, k, v))
        out, last = retention_recurrent(q, k, v, gamma, scale=1.0, initial_state=state / g)
        return out.flip(2), last * g

    close([retention_recurrent(d_out, v, k, gamma, scale=s, initial_state=state.mT)[0]], [dq])
    close([backwards(v, s * d_out, q, d_final.mT)[0]], [dk])
    close(backwards(k, s * q, d_out, d_final), [dv, d_state])


# ---------------------------------------------------------------- the kernels


def compare(proof, *arguments):
    """With room for a GPU's powers of 2, which may be off by two units in the last place."""
    return proof.compare(*arguments, factor=4.0)


def kernel(proof, **options):
    """Ours and the recurrent form, as functions of (q, k, v, gamma, state)."""

    def ours(q, k, v, gamma, state=None):
        return retention(q, k, v, gamma, initial_state=state, backend=proof.kernel, **options)

    def reference(q, k, v, gamma, state=None):
        scale = options.get("scale")
        return retention_recurrent(q, k, v, gamma, initial_state=state, scale=scale)

    return ours, reference


def tensors(proof, batch, heads, tokens, dim_k, dim_v, **options):
    """q, k, v, gamma, and a state in float32."""
    q, k = (proof.tensor(batch, heads, tokens, dim_k, seed=i, **options) for i in (0, 1))
    v = proof.tensor(batch, heads, tokens, dim_v, seed=2, **options)
    gamma = retention_decay(heads + 2)[2:].sub(0.1).to(proof.device)
    state = proof.tensor(batch, heads, dim_k, dim_v, seed=3, grad=options.get("grad", False))
    return q, k, v, gamma, state


@pytest.mark.parametrize(
    ("shape", "chunk_size", "layout"),
    [
        ((2, 1, 70, 20, 33), 32, "contiguous"),  # three chunks, the last one ragged
        ((1, 2, 64, 16, 16), 64, "transposed"),  # nothing ragged
        ((1, 2, 5, 3, 1), 16, "strided"),  # less than a chunk, than a block
    ],
)
def test_kernel(proof, dtype, shape, chunk_size, layout):
    values = tensors(proof, *shape, dtype=dtype, layout=layout, grad=True)
    ours, reference = kernel(proof, chunk_size=chunk_size)
    compare(proof, ours, reference, *values)


def test_kernel_with_heads_wider_than_a_block(proof):
    values = tensors(proof, 1, 1, 20, 72, 40, grad=True)
    ours, reference = kernel(proof, chunk_size=32, scale=0.05)
    compare(proof, ours, reference, *values)


@pytest.mark.unsanitized
@settings(max_examples=6)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 2),
    tokens=st.integers(0, 40),
    dim_k=st.integers(1, 20),
    dim_v=st.integers(1, 20),
    with_state=st.booleans(),
)
def test_kernel_on_any_shape(proof, batch, heads, tokens, dim_k, dim_v, with_state):
    *values, state = tensors(proof, batch, heads, tokens, dim_k, dim_v, grad=tokens > 0)
    ours, reference = kernel(proof, chunk_size=32)
    found = compare(proof, ours, reference, *values, *([state] if with_state else []))
    assert found[0].shape == (batch, heads, tokens, dim_v)
    assert found[1].shape == (batch, heads, dim_k, dim_v)


def test_kernel_does_not_depend_on_the_chunk_size(proof):
    q, k, v, gamma, state = tensors(proof, 1, 1, 50, 8, 8)
    found = [
        retention(q, k, v, gamma, initial_state=state, chunk_size=c, backend=proof.kernel)
        for c in (16, 128)
    ]
    close(found[0], found[1], atol=2e-5)


def test_kernel_reads_heads_where_a_projection_wrote_them(proof):
    """Heads side by side, values shared by all sequences, gradients that are one number for all."""
    packed = proof.tensor(2, 9, 3 * 16, grad=True)
    shared = proof.tensor(1, 3, 9, 5, seed=1, grad=True)
    gamma = retention_decay(3).to(proof.device)

    def run(backend):
        q = packed.view(2, 9, 3, 16).transpose(1, 2)
        out, final = retention(q, q, shared.expand(2, 3, 9, 5), gamma, backend=backend)
        return out, final, *torch.autograd.grad(out.sum() + final.sum(), (packed, shared))

    close(run(proof.kernel), run("torch"), atol=5e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "dim_k", "dim_v"), [(2, 3, 5, 7), (1, 1, 128, 40), (0, 2, 4, 4)]
)
def test_step_kernel(proof, dtype, batch, heads, dim_k, dim_v):
    q, k = (proof.tensor(batch, heads, dim_k, dtype=dtype, seed=i) for i in (0, 1))
    v = proof.tensor(batch, heads, dim_v, dtype=dtype, seed=2, layout="strided")
    gamma, state = retention_decay(heads).to(proof.device), proof.tensor(batch, heads, dim_k, dim_v)
    before = state.clone()

    def ours(*values):
        return retention_step(*values, backend=proof.kernel)

    compare(proof, ours, retention_step_reference, q, k, v, gamma, state)
    assert torch.equal(state, before)


def test_steps_continue_a_text(proof):
    """The whole text at once, and its last tokens one by one after the state of the first."""
    q, k, v, gamma, _ = tensors(proof, 1, 2, 20, 4, 4)
    whole, last = retention(q, k, v, gamma)
    parts = (x[:, :, :17] for x in (q, k, v))
    _, state = retention(*parts, gamma, chunk_size=16, backend=proof.kernel)
    for n in range(17, 20):
        token = (x[:, :, n] for x in (q, k, v))
        out, state = retention_step(*token, gamma, state, backend=proof.kernel)
        torch.testing.assert_close(out, whole[:, :, n], atol=1e-5, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_kernel_takes_tensors_that_are_not_contiguous(proof, layout):
    """Decays and states included, and in the step too."""
    q, k, v, _, _ = tensors(proof, 1, 2, 5, 3, 4, layout=layout, grad=True)
    state = proof.tensor(1, 2, 3, 4, seed=3, layout=layout, grad=True)
    gamma = retention_decay(2).sub(0.1).to(proof.device)
    gamma = gamma[:1].expand(2) if layout == "expanded" else torch.stack([gamma, -gamma], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (q, k, v, gamma, state))
    compare(proof, *kernel(proof, chunk_size=16), q, k, v, gamma, state)
    token = [x.detach()[:, :, 1] for x in (q, k, v)]

    def step(*values):
        return retention_step(*values, backend=proof.kernel)

    compare(proof, step, retention_step_reference, *token, gamma, state.detach())


def test_kernel_finds_places_beyond_32_bits(proof):
    q = proof.tensor(1, 1, 5, 3, dtype=torch.float16)
    gamma = torch.tensor([0.9], device=proof.device)
    near = retention(q, q, q, gamma, chunk_size=16, backend=proof.kernel)
    far = proof.far(q, axis=2)
    found = retention(far, far, far, gamma, chunk_size=16, backend=proof.kernel)
    for ours, expected in zip(found, near):
        assert torch.equal(ours, expected)


def test_kernel_takes_decays_in_float64(proof):
    q, k, v, gamma, state = tensors(proof, 1, 1, 5, 2, 2)
    token = [x[:, :, 0] for x in (q, k, v)]
    for g in (gamma, gamma.double()):
        found = retention(q, k, v, g, backend=proof.kernel)
        close(found, retention(q, k, v, g, backend="torch"), atol=1e-5)
        found = retention_step(*token, g, state, backend=proof.kernel)
        close(found, retention_step(*token, g, state, backend="torch"), atol=1e-5)


def test_what_has_no_kernel_takes_the_reference(proof):
    q, k, v, gamma, state = tensors(proof, 1, 1, 3, 2, 2)
    gamma.requires_grad_()
    with pytest.raises(ValueError, match="no gradient for gamma"):
        retention(q, k, v, gamma, backend=proof.kernel)
    assert torch.autograd.grad(retention(q, k, v, gamma)[0].sum(), gamma)[0].abs().sum() > 0
    token = [x[:, :, 0] for x in (q, k, v)]
    with pytest.raises(ValueError, match="step has no gradient"):
        retention_step(*token, gamma, state, backend=proof.kernel)
    with torch.no_grad():
        retention_step(*token, gamma, state, backend=proof.kernel)


# ---------------------------------------------------------------- sixteen bits


@pytest.fixture
def narrow(monkeypatch):
    """Float16 in the place of bfloat16, which the interpreter computes wrongly: the same lines."""
    monkeypatch.setattr(module, "_precision", lambda dtype: "narrow")
    monkeypatch.setattr(module, "_state_type", lambda dtype: dtype)


@pytest.mark.parametrize(
    ("shape", "chunk_size"), [((1, 2, 70, 20, 33), 32), ((1, 1, 140, 16, 140), None)]
)
def test_sixteen_bits_are_multiplied_as_they_are(proof, narrow, shape, chunk_size):
    """Sums, the last state and the gradient of the first one are as close as float32's."""
    values = tensors(proof, *shape, dtype=torch.float16, grad=True)
    ours, reference = kernel(proof, chunk_size=chunk_size)
    compare(proof, ours, reference, *values)


def test_heads_wider_than_a_block_in_sixteen_bits(proof, narrow, monkeypatch):
    monkeypatch.setitem(module.BLOCKS, "narrow", {"states": (16, 32), "outputs": (32, 16)})
    values = tensors(proof, 1, 1, 40, 72, 40, dtype=torch.float16, grad=True)
    ours, reference = kernel(proof, chunk_size=16)
    compare(proof, ours, reference, *values)


def test_three_numbers_of_bfloat16_hold_a_float32():
    """What the last state rests on: a weighted key is the sum of its three parts, exactly."""
    weighted = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.97**50
    rest, total = weighted.clone(), torch.zeros_like(weighted, dtype=torch.float64)
    for _ in range(3):
        part = rest.bfloat16()
        total += part.double()
        rest -= part.float()
    assert torch.equal(total, weighted.double())
    assert not bool(rest.any())


def test_states_in_bfloat16_cost_no_more_than_rounding_the_outputs():
    r"""The unit roundoff of bfloat16 is u = 2^-8. Rounding states and decayed scores once each
    changes an output by at most u (|q| S' + P' |v|), where S' and P' are the same sums over
    absolute values; on random inputs signs differ, and it is less than the output's own rounding.
    """
    q, k, v, _, _ = inputs(tokens=512, batch=1, heads=2, dim_k=32, dim_v=32)
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    gamma, chunk, scale, u = retention_decay(2).double(), 128, 32**-0.5, 2.0**-8
    exact, _ = retention_chunkwise(q, k, v, gamma, chunk_size=chunk)
    index = torch.arange(chunk)
    D = scale * (gamma[:, None, None] ** (index[:, None] - index).clamp(min=0)).tril()
    state = torch.zeros(1, 2, 32, 32).double()
    for start in range(0, 512, chunk):
        a, b, c = (x[:, :, start : start + chunk] for x in (q, k, v))
        P = (a @ b.mT) * D
        reads = scale * gamma[:, None, None] ** (index[:, None] + 1)
        found = P.bfloat16().double() @ c + reads * (a @ state.bfloat16().double())
        allowed = u * (P.abs() @ c.abs() + reads * (a.abs() @ state.abs()))
        right = exact[:, :, start : start + chunk]
        assert bool(((found - right).abs() <= allowed + 1e-12).all())
        assert float((found - right).abs().max()) < u * float(right.abs().max())
        weights = gamma[:, None, None] ** (chunk - 1 - index[:, None])
        state = gamma[:, None, None] ** chunk * state + (weights * b).mT @ c


def test_backward_reads_the_states_of_the_forward_pass(proof, monkeypatch):
    """Three outputs, but one set of new states: keys and values share it."""
    started = []

    def note(launch):
        def launched(function, grid, *arguments, **settings):
            started.append(function.fn.__name__)
            launch(function, grid, *arguments, **settings)

        return launched

    for name in ("launch", "launch_again"):
        monkeypatch.setattr(module, name, note(getattr(module, name)))
    q, k, v, gamma, state = tensors(proof, 1, 1, 20, 4, 4, grad=True)
    out, final = retention(q, k, v, gamma, initial_state=state, backend=proof.kernel)
    assert started == ["_states_kernel", "_outputs_kernel"]
    started.clear()
    torch.autograd.grad([out.sum() + final.sum()], (q, k, v, state))
    assert sorted(started) == ["_outputs_kernel"] * 3 + ["_states_kernel"]


# ---------------------------------------------------------------- what is moved


def test_heads_of_128_move_twice_the_least():
    """Keys and values are read once more for the states, which take half of that again."""
    dtype, tokens = torch.bfloat16, 4096
    moved = {
        name: module.bytes_moved(
            name, module._settings(name, 128, 128, 128, dtype, False, 64), tokens, dtype
        )
        for name in ("states", "outputs")
    }
    least = tokens * 2 * (128 + 128) * 2
    assert moved["states"] + moved["outputs"] == pytest.approx(2 * least, rel=0.1)
    assert moved["states"] + 3 * moved["outputs"] == pytest.approx(4.5 * least, rel=0.1)


def test_the_report_counts_what_is_moved():
    """The bytes that a bound rests on are those of the settings of the case."""
    for case in module.compile_cases():
        name = case.name.split()[1]
        if name == "step":
            continue
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            case.name.split()[2]
        ]
        texts = 1 if "one text" in case.name else 4
        one = module.bytes_moved(name, case.constants, 16384 // texts, dtype)
        assert case.work.bytes == 16 * texts * one


def test_chunks_are_longer_where_tensor_cores_multiply():
    assert module._chunk_size(torch.bfloat16) == module._chunk_size(torch.float16) == 128
    assert module._chunk_size(torch.float32) == module._chunk_size(torch.float64) == 64


# ---------------------------------------------------------------- bad input


def test_shapes_that_do_not_fit():
    q, k, v, gamma, state = inputs()
    with pytest.raises(
        ValueError, match=r"k has shape \(2, 3, 12, 4\).*q of shape \(2, 3, 13, 4\)"
    ):
        retention(q, k[:, :, 1:], v, gamma)
    with pytest.raises(ValueError, match=r"v has shape \(2, 2, 13, 6\).*\(2, 3, 13, 4\)"):
        retention(q, k, v[:, 1:], gamma)
    with pytest.raises(ValueError, match=r"gamma has shape \(2,\).*\(2, 3, 13, 4\).*\(3,\)"):
        retention(q, k, v, gamma[:2])
    with pytest.raises(ValueError, match=r"state has shape \(2, 3, 6, 4\).*must be \(2, 3, 4, 6\)"):
        retention(q, k, v, gamma, initial_state=state.mT)
    with pytest.raises(ValueError, match="batch, heads, time, dim"):
        retention(q[0], k[0], v[0], gamma)
    with pytest.raises(ValueError, match=r"\(batch, heads, dim\)"):
        retention_step(q, k, v, gamma, state)


def test_numbers_that_do_not_fit():
    q, k, v, gamma, state = inputs()
    with pytest.raises(ValueError, match="chunk_size is 48"):
        retention(q, k, v, gamma, chunk_size=48)
    for wrong in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="gamma must be above 0"):
            retention(q, k, v, gamma * 0 + wrong)
    with pytest.raises(TypeError, match="gamma is of bfloat16"):
        retention(q, k, v, gamma.bfloat16())
    with pytest.raises(TypeError, match="float32, float64; they must agree"):
        retention(q.float(), k, v, gamma)
    learned = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(TypeError, match="scale is a tensor; it must be a number"):
        retention(q, k, v, gamma, scale=learned)
    with pytest.raises(TypeError, match="scale is a tensor; it must be a number"):
        retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], gamma, state, scale=learned)
    with pytest.raises(TypeError, match="v is of int64"):
        retention(q, k, v.long(), gamma)
    with pytest.raises(ValueError, match="on cpu and meta; they must be on one device"):
        retention(q, k.to("meta"), v, gamma)
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], gamma, state, backend="gpu")
