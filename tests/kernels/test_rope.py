"""Rotary embedding: against transformers, against its own algebra, and the kernel against both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from effnb.kernels.rope import rope, rope_reference


def frequencies(dim, base=10000.0):
    return base ** (-torch.arange(0, dim, 2) / dim)


def kernel(proof, positions=None, **options):
    """Ours and the reference, as functions of (q, k, inv_freq)."""

    def ours(q, k, inv_freq):
        return rope(q, k, inv_freq, positions, backend=proof.kernel, **options)

    def reference(q, k, inv_freq):
        return rope_reference(q, k, inv_freq, positions, **options)

    return ours, reference


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    "context",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda c: c["rope_type"],
)
def test_transformers_turns_the_same_way(context):
    """For each context method: its frequencies and its factor are all that changes."""
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **context},
    )
    embedding = LlamaRotaryEmbedding(config)
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    positions = torch.randint(0, 256, (2, 9))
    expected = apply_rotary_pos_emb(q, k, *embedding(q, positions))
    found = rope(q, k, embedding.inv_freq, positions, scaling=embedding.attention_scaling)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    if context["rope_type"] == "yarn":
        assert embedding.attention_scaling == pytest.approx(1.1386, abs=1e-4)


def test_layouts_differ_by_a_permutation():
    q, k, theta = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), frequencies(8)
    order = torch.arange(8).view(2, 4).T.flatten()  # half-split to interleaved
    halves = rope(q, k, theta)
    pairs = rope(q[..., order], k[..., order], theta, interleaved=True)
    for a, b in zip(halves, pairs):
        torch.testing.assert_close(a[..., order], b, atol=0, rtol=0)
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_by_hand(interleaved):
    """A quarter turn of the first pair (θ = 1), an eighth of the second, at position π/2."""
    x = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).view(1, 1, 1, 4)
    theta = torch.tensor([1.0, 0.5], dtype=torch.float64)
    position = torch.tensor([torch.pi / 2], dtype=torch.float64)
    half = 2**-0.5
    expected = (
        [-2, 1, half * (3 - 4), half * (4 + 3)]
        if interleaved
        else [-3, half * (2 - 4), 1, half * (4 + 2)]
    )
    found, _ = rope(x, x, theta, position, interleaved=interleaved)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected).double())


@pytest.mark.parametrize("interleaved", [False, True])
def test_inner_products_depend_on_the_distance_only(interleaved):
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    theta, products = frequencies(64).double(), []
    for m in (0, 10, 1000):
        turned = [
            rope(x, x, theta, torch.tensor([at]), interleaved=interleaved)[0]
            for x, at in ((q, m + 5), (k, m))
        ]
        products.append(float((turned[0] * turned[1]).sum()))
        torch.testing.assert_close(turned[0].norm(), q.norm())
    assert products[1:] == pytest.approx([products[0]] * 2, abs=1e-11)
    assert products[0] != pytest.approx(float((q * k).sum()), abs=1e-3)


def test_interpolated_positions_are_interpolated_frequencies():
    q, k, theta = torch.randn(1, 2, 7, 8), torch.randn(1, 1, 7, 8), frequencies(8)
    by_positions = rope(q, k, theta, torch.arange(7) / 4)
    for a, b in zip(by_positions, rope(q, k, theta / 4)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_the_reference(interleaved):
    q, k = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 1, 3, 4).double()
    theta = frequencies(4).double()
    inputs = [x.requires_grad_() for x in (q, k, theta)]
    torch.autograd.gradcheck(
        lambda q, k, theta: rope(q, k, theta, scaling=1.3, interleaved=interleaved), inputs
    )


# ---------------------------------------------------------------- the kernel


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 4, 2, 5, 8), "contiguous"),
        ((1, 3, 1, 3, 6), "transposed"),
        ((2, 1, 1, 1, 20), "strided"),
    ],
)
def test_kernel(proof, dtype, shape, layout, interleaved):
    batch, q_heads, k_heads, tokens, dim = shape
    q = proof.tensor(batch, q_heads, tokens, dim, dtype=dtype, layout=layout, grad=True)
    k = proof.tensor(batch, k_heads, tokens, dim, dtype=dtype, layout=layout, seed=1, grad=True)
    positions = torch.randint(0, 90, (batch, tokens), generator=torch.Generator().manual_seed(2))
    ours, reference = kernel(
        proof, positions.to(proof.device), scaling=1.2, interleaved=interleaved
    )
    proof.compare(ours, reference, q, k, frequencies(dim).to(proof.device))


@pytest.mark.unsanitized
@settings(max_examples=8)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 5),
    group=st.integers(1, 3),
    tokens=st.integers(0, 3),
    half=st.integers(1, 9),
    interleaved=st.booleans(),
)
def test_kernel_on_any_shape(proof, batch, heads, group, tokens, half, interleaved):
    q = proof.tensor(batch, heads * group, tokens, 2 * half, grad=True)
    k = proof.tensor(batch, heads, tokens, 2 * half, seed=1, grad=True)
    ours, reference = kernel(proof, interleaved=interleaved)
    found = proof.compare(ours, reference, q, k, frequencies(2 * half).to(proof.device))
    assert found[0].shape == q.shape and found[1].shape == k.shape


def test_kernel_with_more_heads_than_a_block(proof):
    """Heads of 4,096 pairs leave room for one head in a block: the loop over heads is taken."""
    q, k = proof.tensor(1, 3, 1, 8192), proof.tensor(1, 2, 1, 8192, seed=1)
    positions = torch.tensor([7], device=proof.device)
    ours, reference = kernel(proof, positions)
    proof.compare(ours, reference, q, k, frequencies(8192).to(proof.device))


def test_kernel_turns_heads_in_place_of_a_projection(proof):
    """Heads side by side, as a projection writes them, a part of each head, one text for all."""
    packed = proof.tensor(2, 3, 4 * 12)
    heads = packed.view(2, 3, 4, 12).transpose(1, 2)[..., :8]
    shared = proof.tensor(1, 2, 3, 8, seed=1).expand(2, 2, 3, 8)
    ours, reference = kernel(proof)
    proof.compare(ours, reference, heads, shared, frequencies(8).to(proof.device))


def test_kernel_far_out(proof):
    """At position 100,000 the angle keeps float32's digits, no more and no fewer."""
    q = proof.tensor(1, 1, 2, 16)
    positions = torch.tensor([99_999, 100_000], device=proof.device)
    theta = frequencies(16).to(proof.device)
    found, _ = rope(q, q, theta, positions, backend=proof.kernel)
    angles = (positions.float()[:, None] * theta).double()
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = q.double().chunk(2, -1)
    expected = q.double() * cos + torch.cat([-b, a], -1) * sin
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


def test_kernel_has_second_gradients(proof):
    """The gradient is a rotation too, and has one of its own."""
    q, k = proof.tensor(1, 1, 1, 4, grad=True), proof.tensor(1, 1, 1, 4, seed=1, grad=True)
    cotangent = proof.tensor(1, 1, 1, 4, seed=2, grad=True)
    positions = torch.tensor([3], device=proof.device)
    theta = frequencies(4).to(proof.device)
    turned, _ = rope(q, k, theta, positions, backend=proof.kernel)
    (grad,) = torch.autograd.grad(turned, q, cotangent, create_graph=True)
    direction = proof.tensor(1, 1, 1, 4, seed=3)
    (second,) = torch.autograd.grad(grad, cotangent, direction)
    expected, _ = rope_reference(direction, direction, theta, positions)
    torch.testing.assert_close(second, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("ndim", [1, 2])
def test_kernel_takes_lists_that_are_not_contiguous(proof, layout, ndim):
    q, k = proof.tensor(2, 2, 3, 8, grad=True), proof.tensor(2, 1, 3, 8, seed=1, grad=True)
    positions = proof.tensor(
        *(2, 3)[-ndim:], seed=2, layout=layout
    )  # fractions, as of some methods
    theta = proof.tensor(4, seed=3, layout=layout)
    assert not positions.is_contiguous() and not theta.is_contiguous()
    ours, reference = kernel(proof, proof.guarded(positions))
    proof.compare(ours, reference, q, k, theta)


@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel_finds_places_beyond_32_bits(proof, interleaved):
    q = proof.tensor(1, 2, 3, 6, dtype=torch.float16)
    theta = frequencies(6).to(proof.device)
    near, _ = rope(q, q, theta, interleaved=interleaved, backend=proof.kernel)
    for axis in (2, 3):
        far = proof.far(q, axis)
        found = rope(far, far, theta, interleaved=interleaved, backend=proof.kernel)
        assert torch.equal(found[0], near) and torch.equal(found[1], near)


def test_kernel_takes_frequencies_in_float64(proof):
    q, theta = proof.tensor(1, 1, 2, 4), frequencies(4).to(proof.device)
    exact = rope(q, q, theta.double(), backend=proof.kernel)
    assert torch.equal(exact[0], rope(q, q, theta, backend=proof.kernel)[0])


def test_learned_frequencies_take_the_reference(proof):
    q, theta = proof.tensor(1, 1, 2, 4), frequencies(4).to(proof.device).requires_grad_()
    with pytest.raises(ValueError, match="no gradient for frequencies"):
        rope(q, q, theta, backend=proof.kernel)
    turned, _ = rope(q, q, theta)
    assert torch.autograd.grad(turned.sum(), theta)[0].abs().sum() > 0
    with torch.no_grad():
        rope(q, q, theta, backend=proof.kernel)


# ---------------------------------------------------------------- bad input


def test_shapes_that_do_not_fit():
    q, k, theta = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8), frequencies(8)
    with pytest.raises(ValueError, match=r"k has shape \(2, 2, 5, 8\).*\(2, 4, 3, 8\)"):
        rope(q, torch.ones(2, 2, 5, 8), theta)
    with pytest.raises(ValueError, match=r"inv_freq has shape \(8,\).*\(2, 4, 3, 8\).*\(4,\)"):
        rope(q, k, torch.ones(8))
    with pytest.raises(ValueError, match=r"positions has shape \(4,\).*\(2, 4, 3, 8\)"):
        rope(q, k, theta, torch.arange(4))
    with pytest.raises(ValueError, match=r"positions has shape \(3, 3\).*\(2, 3\)"):
        rope(q, k, theta, torch.ones(3, 3))
    with pytest.raises(ValueError, match="even dim"):
        rope(torch.ones(2, 4, 3, 7), torch.ones(2, 2, 3, 7), theta)
    with pytest.raises(ValueError, match="heads, time, dim"):
        rope(torch.ones(4, 3, 8), k, theta)


def test_types_and_backends_that_do_not_fit():
    q, theta = torch.ones(1, 1, 2, 4), frequencies(4)
    with pytest.raises(TypeError, match="q is of float32 and k of float16"):
        rope(q, q.half(), theta)
    with pytest.raises(TypeError, match="q is of int64"):
        rope(q.long(), q.long(), theta)
    with pytest.raises(TypeError, match="scaling is a tensor; it must be a number"):
        rope(q, q, theta, scaling=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        rope(q, q, theta, backend="cuda")
    with pytest.raises(ValueError, match="on cpu and meta; they must be on one device"):
        rope(q, q, theta.to("meta"))
    with pytest.raises(ValueError, match="float64"):
        rope(q.double(), q.double(), theta, backend="triton")
