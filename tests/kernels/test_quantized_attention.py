"""Attention to a packed cache: against the cache read back, on caches that KIVI itself packed."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.inference.quantization.kv_layer import KiviLayer
from effnb.kernels import quantized_attention as module
from effnb.kernels.quantized_attention import (
    quantized_attention,
    quantized_attention_reference,
    read_back,
)


@dataclass
class Rows:
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    bits: int
    group_size: int


def rows(proof, batch, heads, count, columns, bits=2, group_size=32, seed=0):
    """Random codes, with groups about 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, count, columns * bits // 8)
    codes = torch.randint(256, shape, generator=generator).to(torch.uint8)
    scales = torch.rand(*shape[:3], columns // group_size, generator=generator) / 2**bits
    scales = scales.half()
    minima = (-(2 ** (bits - 1)) * scales.float() + 0.1).half()
    return Rows(*(x.to(proof.device) for x in (codes, scales, minima)), bits, group_size)


def cache(proof, tokens, late_keys, late_values, dtype=torch.float32, *, batch=1, heads=2,
          dim=64, value_dim=64, bits=2, group_size=32):  # fmt: skip
    packed_keys = rows(proof, batch, heads, dim, tokens - late_keys, bits, group_size)
    packed_values = rows(proof, batch, heads, tokens - late_values, value_dim, bits, group_size, 1)
    keys = proof.tensor(batch, heads, late_keys, dim, dtype=dtype, seed=2)
    values = proof.tensor(batch, heads, late_values, value_dim, dtype=dtype, seed=3)
    return packed_keys, packed_values, keys, values


# ---------------------------------------------------------------- the definition


def kivi(proof, tokens, **options):
    """A layer that has seen some tokens one by one, and what it would let attention read."""
    layer = KiviLayer(**options)
    for _ in range(tokens):
        key, value = (torch.randn(2, 2, 1, 64) for _ in range(2))
        layer.update(key, value)
    return layer


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_cache_of_kivi_is_read_as_kivi_reads_it(proof, bits):
    torch.manual_seed(0)
    layer = kivi(proof, 150, bits=bits, residual=64, group_size=32)
    q = torch.randn(2, 6, 1, 64)
    k, v = layer.read()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    given = layer.packed_keys, layer.packed_values, layer.keys, layer.values
    assert k.shape[2] == 150 and layer.packed_keys.codes.shape[3] * 8 // bits == 128
    torch.testing.assert_close(read_back(layer.packed_keys, torch.float32).mT, k[:, :, :128])
    for backend in ("torch", proof.kernel):
        found = quantized_attention(q, *given, backend=backend)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_by_hand(proof):
    """Codes 0, 1, 2, 3 in a byte, the first in its lowest bits, step 2 and smallest number −1."""
    packed = Rows(
        torch.full((1, 1, 1, 2), 0b11100100, dtype=torch.uint8),
        torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), 2, 8,
    )  # fmt: skip
    assert read_back(packed, torch.float32).flatten().tolist() == [-1, 1, 3, 5, -1, 1, 3, 5]


def test_gradients_lead_through_the_definition(proof):
    given = cache(proof, 40, 8, 8)
    q = proof.tensor(1, 4, 1, 64, grad=True)
    assert torch.autograd.grad(quantized_attention(q, *given).sum(), q)[0].shape == q.shape
    with pytest.raises(ValueError, match="it has no gradient"):
        quantized_attention(q, *given, backend="triton")


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize(
    ("tokens", "late_keys", "late_values", "options"),
    [
        (300, 44, 20, {}),  # two tiles of 128 tokens, keys packed further or less than values
        (300, 12, 40, {"bits": 4, "dim": 128}),
        (140, 12, 12, {"bits": 8, "batch": 2, "value_dim": 128}),
        (60, 28, 20, {}),  # less than a tile
        (5 * 128 + 9, 9, 9, {"group_size": 64, "heads": 1}),  # nothing packed beside the tiles
        (37, 37, 37, {}),  # nothing packed at all
    ],
)
def test_kernel(proof, dtype, tokens, late_keys, late_values, options):
    given = cache(proof, tokens, late_keys, late_values, dtype, **options)
    heads = given[2].shape[1]
    q = proof.tensor(given[2].shape[0], 3 * heads, 1, given[2].shape[3], dtype=dtype, seed=4)
    for packed in given[:2]:
        for name in ("codes", "scales", "minima"):
            setattr(packed, name, proof.guarded(getattr(packed, name)))
    latest = [proof.guarded(x) for x in given[2:]]

    def ours(q, *_):
        return quantized_attention(q, *given[:2], *latest, backend=proof.kernel)

    def definition(q, keys, values):
        return quantized_attention_reference(q, *given[:2], keys, values)

    proof.compare(ours, definition, q, *given[2:], factor=4.0)


def test_kernel_in_several_parts(proof, monkeypatch):
    given = cache(proof, 1200, 48, 48)
    q = proof.tensor(1, 4, 1, 64, seed=4)
    expected = quantized_attention_reference(q, *given)
    for parts in (1, 2, 4):
        monkeypatch.setattr(module, "PARTS", parts)
        found = quantized_attention(q, *given, backend=proof.kernel)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.unsanitized
@settings(max_examples=6)
@given(
    groups=st.integers(0, 9), late=st.integers(1, 40), further=st.integers(0, 3),
    shared=st.integers(1, 17), bits=st.sampled_from([2, 4, 8]),
)  # fmt: skip
def test_kernel_on_any_shape(proof, groups, late, further, shared, bits):
    tokens = 32 * (groups + further) + late
    given = cache(proof, tokens, late, late + 32 * further, heads=1, bits=bits)
    q = proof.tensor(1, shared, 1, 64, seed=4)
    found = quantized_attention(q, *given, backend=proof.kernel)
    expected = quantized_attention_reference(q, *given)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)


def executed(asm, *inputs, kind):
    """What a GPU's instructions leave in two registers, by their definition, one word at a time."""
    words = {f"${place + 2}": word for place, word in enumerate(inputs)}
    signed = {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}

    def value(name):
        return words[name] if name in words else int(name, 0)

    def halves(word):
        both = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16)
        return both.view(kind).double()

    lines = [line.strip(" ;") for line in asm.strip("{}\n ").splitlines()]
    for line in lines:
        name, *operands = line.replace(",", " ").split()
        if name.startswith((".reg", "}")):
            continue
        target, given = operands[0], [value(x) for x in operands[1:]]
        if name == "mov.b32":
            found = given[0]
        elif name == "shr.b32":
            found = given[0] >> given[1]
        elif name == "and.b32":
            found = given[0] & given[1]
        elif name == "prmt.b32":
            pool = (given[0] | given[1] << 32).to_bytes(8, "little")
            found = int.from_bytes(bytes(pool[given[2] >> 4 * i & 7] for i in range(4)), "little")
        elif name == f"fma.rn.{signed[kind]}":
            a, b, c = map(halves, given)
            low, high = (a * b + c).to(kind).view(torch.uint16).tolist()
            found = low | high << 16
        else:
            raise AssertionError(f"{name} is not known")
        words[target] = found
    return torch.cat([halves(words["$0"]), halves(words["$1"])])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_instructions_that_unpack_make_the_numbers(kind, bits):
    """All bytes, and steps and minima of several sizes: c s + m, rounded once."""
    found = module._unpacking(bits, kind)
    assert len(found) == 8 // bits
    if kind == torch.bfloat16 and bits == 8:
        assert found == ("",), "a bfloat16 has no 8 bits behind its first one"
        return
    draw = torch.Generator().manual_seed(0)
    for first in range(0, 256, 4):
        step, low = (torch.randn(4, generator=draw).to(kind) for _ in range(2))
        codes = [first + 3, first, first + 2, first + 1]
        word = int.from_bytes(bytes(codes), "little")
        pairs = [
            int(pair[0]) | int(pair[1]) << 16
            for x in (step, low)
            for pair in x.view(torch.uint16).view(2, 2)
        ]
        for j, asm in enumerate(found):
            c = torch.tensor([code >> bits * j & (1 << bits) - 1 for code in codes]).double()
            expected = (c * step.double() + low.double()).to(kind)
            made = executed(asm, word, *pairs, kind=kind)
            assert torch.equal(made, expected.double())


def test_types_without_such_instructions_are_unpacked_one_by_one():
    assert module._unpacking(2, torch.float32) == ("",) * 4


def test_kernel_with_large_scores(proof):
    given = cache(proof, 300, 44, 44)
    q = 300 * proof.tensor(1, 4, 1, 64, seed=4)
    found = quantized_attention(q, *given, backend=proof.kernel)
    expected = quantized_attention_reference(
        q.double(), *given[:2], *(x.double() for x in given[2:])
    )
    torch.testing.assert_close(found.double(), expected, atol=5e-3, rtol=1e-3)


# ---------------------------------------------------------------- bad input


def test_what_does_not_fit(proof):
    packed_keys, packed_values, keys, values = cache(proof, 100, 36, 36)
    q = torch.ones(1, 4, 1, 64)

    def call(**changes):
        names = ("packed_keys", "packed_values", "keys", "values")
        given = dict(zip(names, (packed_keys, packed_values, keys, values)), q=q) | changes
        return quantized_attention(**given)

    with pytest.raises(ValueError, match="keys of 99 tokens and values of 100; they must be as"):
        call(keys=keys[:, :, 1:])
    with pytest.raises(ValueError, match=r"must be \(batch, heads, 1, dim\)"):
        call(q=q.expand(1, 4, 2, 64))
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        call(q=q[:, :3])
    with pytest.raises(TypeError, match="float16, float32; they must agree"):
        call(q=q.half())
    three = Rows(packed_keys.codes, packed_keys.scales, packed_keys.minima, 3, 32)
    with pytest.raises(ValueError, match="codes of 3 bits; they must have 2, 4 or 8"):
        call(packed_keys=three)
    signed = Rows(packed_keys.codes.char(), packed_keys.scales, packed_keys.minima, 2, 32)
    with pytest.raises(TypeError, match="packed keys have codes of int8; they must be uint8"):
        call(packed_keys=signed)
    few = Rows(packed_keys.codes, packed_keys.scales[..., 1:], packed_keys.minima, 2, 32)
    with pytest.raises(ValueError, match=r"packed keys' scales has shape .*\(1, 2, 64, 1\)"):
        call(packed_keys=few)
    with pytest.raises(ValueError, match="packed values' rows has shape"):
        call(values=values[..., 1:])
    none = cache(proof, 0, 0, 0)
    with pytest.raises(ValueError, match="they must be as many, and not none"):
        quantized_attention(q, *none)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 96}, "it has no heads of 96, only of 64, 128 and 256"),
        ({"group_size": 24, "dim": 96, "value_dim": 96}, "it has no groups of 24"),
    ],
)
def test_what_has_no_kernel_takes_the_definition(proof, changes, sentence):
    given = cache(proof, 120, 24, 24, **changes)
    q = proof.tensor(1, 2, 1, given[2].shape[3])
    with pytest.raises(ValueError, match=sentence):
        quantized_attention(q, *given, backend="triton")
    torch.testing.assert_close(
        quantized_attention(q, *given), quantized_attention_reference(q, *given)
    )
