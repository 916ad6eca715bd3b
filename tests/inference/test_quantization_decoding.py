"""The short way to the next token: the same numbers as the model's modules, or those modules."""

from __future__ import annotations

import copy
import gc
import platform
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from effnb.core.modules import share
from effnb.evaluation import stored_bytes
from effnb.inference.quantization import (
    KiviCache,
    QuantizedTensor,
    accelerate,
    compiled,
    decoding,
    dequantized,
    fast,
    packed,
    quantize,
    quantize_linears,
    quantize_minimum,
    rtn,
)
from effnb.inference.quantization.decoding import DecodingLlama, RoomyLayer, Step, step_for
from effnb.inference.quantization.grid import Grid

HAS_KERNEL = packed.machine().dtype is not None
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Sizes of whole panels, so that products are joined and the compiled function fits."""


@pytest.fixture
def plain_step(monkeypatch):
    """No compiled function: the step is computed by PyTorch."""
    monkeypatch.setattr(decoding, "library", lambda: None)


@pytest.fixture
def wide(tiny_llama):
    return tiny_llama(0, **WIDE)


def ordinary(model):
    """The same model and tensors, all of whose calls run through its modules."""
    twin = share(model)
    twin.__class__ = LlamaForCausalLM
    return twin


def decoded(model, prompt, tokens, **call):
    """Logits of each step when generating greedily, and the cache."""
    out, logits = model(prompt, use_cache=True, **call), []
    for _ in range(tokens):
        best = out.logits[:, -1:].argmax(-1)
        out = model(best, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1), out.past_key_values


def relative(a, b):
    return float((a - b).double().norm() / b.double().norm())


def on_minima(model, bits, *, group_size):
    return quantize_linears(model, partial(quantize_minimum, bits=bits, group_size=group_size))


FORMATS = {
    "4 bits": lambda m: fast(m, 4),
    "4 bits, groups of 32": lambda m: fast(m, 4, group_size=32, head=8),
    "4 bits, minima": lambda m: fast(m, 4, group_size=32, head=8, source=on_minima),
    "4 bits, rows": lambda m: fast(m, 4, group_size="row", head=4),
    "3 bits": lambda m: fast(m, 3),
    "8 bits": lambda m: fast(m, 8),
    "8 bits, groups": lambda m: fast(m, 8, group_size=64),
}


@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("sizes", [{}, WIDE], ids=["odd", "whole panels"])
def test_the_step_computes_what_the_modules_compute(plain_step, tiny_llama, ids, made, sizes):
    quick = FORMATS[made](tiny_llama(0, **sizes))
    assert isinstance(quick, DecodingLlama) == HAS_KERNEL
    for batch in (1, 3):
        with torch.inference_mode():
            got, cache = decoded(quick, ids[:batch, :7], 9)
            expected, plain = decoded(ordinary(quick), ids[:batch, :7], 9)
        assert relative(got, expected) < 1e-4
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert isinstance(cache.layers[0], RoomyLayer) == HAS_KERNEL
        assert cache.get_seq_length() == plain.get_seq_length() == 16
        for ours, theirs in zip(cache.layers, plain.layers):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "two int4"])
def test_eight_bits_by_either_kernel(plain_step, tiny_llama, ids, kind, monkeypatch):
    here = packed.machine()
    chosen = packed.Machine(here.dtype, kind, here.rows, here.dense)
    monkeypatch.setattr(packed, "machine", lambda: chosen)
    quick = fast(tiny_llama(0, **WIDE), 8)
    assert quick.lm_head.quantized.kind == kind
    with torch.inference_mode():
        got, expected = (decoded(m, ids[:1, :7], 5)[0] for m in (quick, ordinary(quick)))
    assert relative(got, expected) < 1e-4


def test_types_and_columns_in_an_order(plain_step, tiny_llama, ids):
    """bfloat16 models, and GPTQ's order of columns, which forbids to join products."""
    narrow = fast(tiny_llama(0, **WIDE).bfloat16(), 4)
    with torch.inference_mode():
        got, expected = (decoded(m, ids[:2, :7], 5)[0] for m in (narrow, ordinary(narrow)))
    assert got.dtype == torch.bfloat16
    assert relative(got, expected) < 1e-2

    def shuffled(model, bits, **options):
        new = rtn(model, bits, **options)
        for layer in new.modules():
            if hasattr(type(layer), "quantized"):
                w = layer.quantized
                order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
                parts = w.integers(), w.scales.float(), w.zero_points(), Grid(w.bits, w.group_size)
                layer.__init__(QuantizedTensor.from_codes(*parts, order=order))
        return new

    mixed = fast(tiny_llama(0, **WIDE), 4, source=shuffled)
    with torch.inference_mode():
        got, expected = (decoded(m, ids[:2, :7], 5)[0] for m in (mixed, ordinary(mixed)))
    assert relative(got, expected) < 1e-4


def test_layers_that_see_the_same_inputs_stand_side_by_side(wide):
    """One product for three layers, and no second copy: the layers are views."""
    alone = rtn(wide, 4)
    quick = accelerate(alone)
    if not HAS_KERNEL:
        assert type(quick) is LlamaForCausalLM
        return
    attention = quick.model.layers[0].self_attn
    weights = [attention.q_proj.quantized, attention.k_proj.quantized, attention.v_proj.quantized]
    one = decoding.joined(weights)
    assert one.shape == (256, 128)
    assert one.codes.data_ptr() == weights[0].codes.data_ptr()
    torch.testing.assert_close(one.dequantize(), torch.cat([w.dequantize() for w in weights]))
    expected = sum(w.bytes for w in weights)
    assert one.bytes == expected
    assert stored_bytes(quick) == stored_bytes(copy.deepcopy(quick))
    for changed in (copy.deepcopy(quick), share(quick)):  # views of one storage stay views
        a = changed.model.layers[0].self_attn
        parts = [getattr(a, f"{n}_proj").quantized for n in "qkv"]
        assert decoding.joined(parts) is not None
    assert decoding.joined(weights[::-1]) is None  # not in this order
    other = packed.PackedTensor.from_quantized(quantize(torch.randn(64, 128), 4, group_size=32))
    assert decoding.joined([weights[0], other]) is None
    assert decoding.side_by_side([weights[0], other]) is None


# --- the compiled function ------------------------------------------------------------------------

BUILT = (
    compiled.compiler() is not None
    and sys.platform.startswith("linux")
    and packed.native_layout() in compiled.VARIANTS
)
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("layout", compiled.VARIANTS)
def test_every_variant_compiles(layout):
    """On any x86 processor: to compile and load a variant is not to run it."""
    if sys.platform.startswith("linux") and compiled.compiler() is not None:
        assert (compiled.build(layout) is not None) == X86
    if not X86:
        assert compiled.library() is None


def test_other_layouts_have_no_function(wide, ids, monkeypatch):
    """As on Arm, or x86 before AVX2: nothing is built, and the step stays PyTorch's."""
    monkeypatch.setattr(compiled, "native_layout", lambda: "16 pairs")
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
        quick = fast(wide, 4)
        assert not compiled.fits(fast(wide, 4, head=4).lm_head.quantized)
        with torch.no_grad():
            decoded(quick, ids[:1, :5], 1)
        step = decoding._STEPS.get(quick)
        assert step is None or step.compiled is None
    finally:
        compiled.library.cache_clear()


KINDS = {  # bits, group size, symmetric, kind of 8 bits
    "int4": (4, 32, False, None),
    "int4, groups of 64": (4, 64, False, None),
    "int4, groups of 128": (3, 128, False, None),
    "int4, minima": (4, 32, None, None),
    "int4, rows": (4, "row", False, None),
    "two int4": (8, "row", True, "two int4"),
    "two int4, groups of 32": (8, 32, False, None),
    "int8": (8, "row", True, "int8"),
}


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 200),
    st.integers(1, 5),
    st.sampled_from([1e-32, 1e-3, 1.0, 1e4]),
    st.sampled_from(["normal", "one outlier", "zeros", "all at the top"]),
    st.integers(0, 2**16),
)
def test_a_product_is_exact_but_for_the_rounding_of_its_inputs(kind, rows, width, size, how, seed):
    r"""$|y - \hat W x| \le \sum_g a_g / 2 \cdot \sum_k |\hat w_k|$, and what float32 rounds.

    In every kind, with rows that do not fill panels, codes at both ends and inputs that fill all 16
    bits, where narrow sums would saturate.
    """
    if not BUILT:
        return
    bits, group, symmetric, eight = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    columns = 128 * width
    w = torch.randn(rows, columns, generator=generator).sign() * (1 if seed % 2 else 1e-3)
    w *= torch.rand(rows, columns, generator=generator).clamp_min(0.5 * (seed % 3))
    stored = (
        quantize_minimum(w, bits, group_size=group)
        if symmetric is None
        else quantize(w, bits, group_size=group, symmetric=symmetric)
    )
    weight = packed.PackedTensor.from_quantized(stored, eight)
    assert compiled.fits(weight)
    x = size * torch.randn(columns, generator=generator)
    if how == "one outlier":
        x[seed % columns] = 1e4 * size
    elif how == "zeros":
        x[: columns // 2] = 0
    elif how == "all at the top":
        x = size * x.sign()
    got, exact = compiled.product(weight, x).double(), weight.dequantize(torch.float64)
    unit = 32 if kind == "int8" else weight.kernel_group
    top = x.double().abs().view(-1, unit).amax(1, keepdim=True)
    half = torch.where(top > 1e-30, top / 65278, top)
    size_of = exact.abs().view(rows, -1, unit).sum(-1) @ half[:, 0]
    # float32 adds up s (d - 8 m) and t m, each of which may be larger than their sum.
    parts = (exact.abs() + 16 * step_of_codes(weight)).view(rows, -1, unit).sum(-1) @ top[:, 0]
    assert ((got - exact @ x.double()).abs() <= 1.001 * size_of + 2**-21 * parts).all()


def step_of_codes(weight):
    """The distance of neighbouring codes, for each row and column, in float64."""
    if weight.kind == "int8":
        return torch.zeros(weight.shape, dtype=torch.float64)
    s = weight.scales[..., 0].double().abs().repeat_interleave(weight.kernel_group, 0)
    if weight.kind == "two int4":
        s = s[: len(s) // 2] + s[len(s) // 2 :]
    s = s.T[: weight.shape[0], : weight.shape[1]]
    return s if weight.after is None else s * weight.after[: weight.shape[0], None].double()


def one_step(model, exact, ids, length):
    """The next logits of both models after the same keys and values, those of `exact`."""
    with torch.no_grad():
        cache = exact(ids[:1, :length], use_cache=True).past_key_values
        return tuple(
            m(ids[:1, length : length + 1], past_key_values=copy.deepcopy(cache)).logits
            for m in (model, exact)
        )


@pytest.mark.parametrize("made", FORMATS)
def test_the_compiled_function_is_nearer_to_the_exact_product(tiny_llama, ids, made, monkeypatch):
    """Inputs have 16 bits, where PyTorch's kernels have 8: less than a tenth of their error."""
    quick = FORMATS[made](tiny_llama(0, **WIDE))
    exact = dequantized(ordinary(quick))
    for length in (1, 15, 16, 23):  # the softmax takes sixteen scores at a time
        got, expected = one_step(quick, exact, ids, length)
        step = decoding._STEPS.get(quick)
        if step is None or step.compiled is None:  # no compiler, or a format without 4-bit codes
            assert not BUILT or packed.machine().eight == "int8"
            assert relative(got, expected) < 0.03
        else:
            assert relative(got, expected) < 1e-3
    monkeypatch.setattr(decoding, "library", lambda: None)
    narrow, _ = one_step(share(quick), exact, ids, 23)
    assert relative(narrow, expected) < 0.03
    if step is not None and step.compiled is not None:
        assert 10 * relative(got, expected) < relative(narrow, expected)


SIZES = {
    "rows that do not fill panels": WIDE | {"hidden_size": 96, "vocab_size": 130},
    "columns that do not fill groups": WIDE | {"hidden_size": 80},
    "heads of 80": WIDE | {"head_dim": 80, "num_key_value_heads": 4},
    "one head, long": WIDE | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 192},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_compiled_function_knows_other_sizes(tiny_llama, ids, sizes, bits):
    quick = fast(tiny_llama(0, **SIZES[sizes]), bits, group_size="row", head=8)
    got, expected = one_step(quick, dequantized(ordinary(quick)), ids, 9)
    step = decoding._STEPS.get(quick)
    if BUILT:
        assert step.compiled is not None
        assert relative(got, expected) < 1e-3
    assert relative(got, expected) < 0.03


def test_sizes_that_the_compiled_function_does_not_know(tiny_llama, ids):
    """Heads, or an inner layer, that are no whole registers: PyTorch computes the step."""
    odd_heads = {"head_dim": 24, "num_attention_heads": 8, "num_key_value_heads": 8}
    for changes, bits in ((odd_heads, 4), ({"intermediate_size": 200}, 8)):
        quick = fast(tiny_llama(0, **WIDE | changes), bits)
        got, expected = one_step(quick, dequantized(ordinary(quick)), ids, 9)
        step = decoding._STEPS.get(quick)
        assert step is None or step.compiled is None
        assert relative(got, expected) < 0.03


def test_threads_change_nothing(wide, ids):
    """Each row of a product and each head is computed by one thread, in the same way."""
    quick = fast(wide, 4)
    before, found = torch.get_num_threads(), []
    try:
        with torch.no_grad():
            cache = quick(ids[:1, :5], use_cache=True).past_key_values
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(quick(ids[:1, 5:6], past_key_values=copy.deepcopy(cache)).logits)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=0 if BUILT else 1e-4, rtol=0)


def test_the_time_of_each_part_is_counted(wide, ids):
    quick = fast(wide, 4)
    with torch.no_grad():
        _, cache = decoded(quick, ids[:1, :5], 1)
        step = decoding._STEPS.get(quick)
        if not BUILT:
            return
        with step.compiled.timed() as seconds:
            assert not seconds.any()
            quick(ids[:1, 5:6], past_key_values=cache)
            once = seconds.clone()
            quick(ids[:1, 5:6], past_key_values=cache)
        assert len(seconds) == len(compiled.PARTS)
        assert (once > 0).all()
        assert (seconds > once).all()
        kept = seconds.clone()
        quick(ids[:1, 5:6], past_key_values=cache)
        assert torch.equal(seconds, kept)  # outside nothing is counted


def test_generate_by_the_compiled_function(wide, ids):
    """The tokens are those of calling the model one by one; sampling draws among likely ones."""
    quick = fast(wide, 4)
    with torch.no_grad():
        logits, _ = decoded(quick, ids[:1, :5], 9)
        first = quick(ids[:1, :5]).logits[:, -1:].argmax(-1)
    tokens = torch.cat([first, logits.argmax(-1)], 1)
    options = {"max_new_tokens": 10, "pad_token_id": 0}
    assert torch.equal(quick.generate(ids[:1, :5], do_sample=False, **options)[:, 5:], tokens)
    torch.manual_seed(0)
    drawn = quick.generate(ids[:1, :5], do_sample=True, temperature=0.1, top_k=5, **options)
    assert drawn.shape == (1, 15)


def test_without_a_compiler_pytorch_computes_the_step(wide, ids, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.compiler() is None
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
        quick = fast(wide, 4)
        with torch.no_grad():
            decoded(quick, ids[:1, :5], 1)
        step = decoding._STEPS.get(quick)
        assert step is None or step.compiled is None
        monkeypatch.setenv("CXX", "false")  # one that fails
        compiled.library.cache_clear()
        assert compiled.library() is None
    finally:
        compiled.library.cache_clear()


# --- generate -------------------------------------------------------------------------------------


def test_generate_keeps_its_interface(plain_step, wide, ids, monkeypatch, capsys):
    """Greedy, sampled, stopped, by beams, streamed: the tokens of the model's modules."""
    quick = fast(wide, 4)
    twin = ordinary(quick)
    steps = []
    monkeypatch.setattr(
        Step, "__call__", lambda s, *a, f=Step.__call__: (steps.append(1), f(s, *a))[1]
    )
    ways = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(11)])},
    ]
    for way in ways:
        found = []
        for model in (quick, twin):
            torch.manual_seed(3)
            prompt = ids[:1, :5]
            found.append(model.generate(prompt, max_new_tokens=12, pad_token_id=0, **way))
        assert torch.equal(*found), way
        assert bool(steps) == HAS_KERNEL
        steps.clear()
    greedy = twin.generate(ids[:1, :5], max_new_tokens=12, do_sample=False, pad_token_id=0)
    stop = int(greedy[0, 8])
    ended = quick.generate(ids[:1, :5], max_new_tokens=12, eos_token_id=stop, pad_token_id=0,
                           do_sample=False)  # fmt: skip
    assert ended[0].tolist() == greedy[0, : 1 + greedy[0].tolist().index(stop, 5)].tolist()

    class Words:
        def decode(self, tokens, **_):
            return "".join(f"{int(t)} " for t in tokens)

    streamer = TextStreamer(Words())
    capsys.readouterr()
    quick.generate(
        ids[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, streamer=streamer
    )
    assert capsys.readouterr().out.split() == [str(t) for t in greedy[0, :11].tolist()]


def test_left_padding(plain_step, wide, ids):
    """Sentences of different lengths in one batch get what each gets alone."""
    quick = fast(wide, 4)
    twin = ordinary(quick)
    batch, mask = ids[:3, :8].clone(), torch.ones(3, 8, dtype=torch.long)
    for row, empty in enumerate((0, 3, 6)):
        batch[row, :empty], mask[row, :empty] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = quick.generate(batch, attention_mask=mask, **options)
    assert torch.equal(got, twin.generate(batch, attention_mask=mask, **options))
    alone = quick.generate(batch[1:2, 3:], **options)
    assert torch.equal(got[1, 3:], alone[0])


# --- the store ------------------------------------------------------------------------------------


def test_the_store_grows_and_stays_a_cache(plain_step, wide, ids, monkeypatch):
    """It doubles when it is full; crop, reorder, append and copy work as before."""
    monkeypatch.setattr(decoding, "ROOM", 2)
    quick = fast(wide, 4)
    if not HAS_KERNEL:
        assert type(quick) is LlamaForCausalLM
        return
    twin, rooms = ordinary(quick), set()
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for start, end in [(0, 5), *((i, i + 1) for i in range(5, 20))]:
            a, b = (m(ids[:2, start:end], past_key_values=c) for m, c in zip((quick, twin), caches))
            assert relative(a.logits, b.logits) < 1e-4
            if start:
                rooms.add(caches[0].layers[0].store.shape[2])
        assert rooms == {10, 20}
        kept = copy.deepcopy(caches[0])
        for cache in caches:
            cache.crop(-4)
            cache.reorder_cache(torch.tensor([1, 0]))
        for part in (ids[2:4, :1], ids[2:4, 1:4], ids[2:4, 4:5]):  # one, a few, one
            a, b = (m(part, past_key_values=c) for m, c in zip((quick, twin), caches))
            assert relative(a.logits, b.logits) < 1e-4
        for cache in caches:
            cache.batch_select_indices(torch.tensor([0]))
        a, b = (m(ids[:1, :1], past_key_values=c) for m, c in zip((quick, twin), caches))
        assert relative(a.logits, b.logits) < 1e-4
        assert kept.get_seq_length() == 20
        caches[0].reset()
        assert caches[0].get_seq_length() == 0


def test_a_prompt_in_inference_mode_may_be_continued_outside(wide, ids):
    quick = fast(wide, 4)
    with torch.inference_mode():
        _, cache = decoded(quick, ids[:1, :5], 2)
    with torch.no_grad():
        got = quick(ids[:1, :1], past_key_values=cache).logits
    assert got.isfinite().all()


# --- when the modules are asked -------------------------------------------------------------------


def refused(model, ids, **call):
    """Why a call after a prompt would take the ordinary path, and that it gives its logits."""
    twin = ordinary(model)
    with torch.no_grad():
        cache = model(ids[:1, :5], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        call = {"input_ids": ids[:1, :1], "past_key_values": cache} | call
        answer = step_for(model, **call)
        got, expected = model(**call), twin(**call | {"past_key_values": other})
    got, expected = (out[0] if isinstance(out, tuple) else out.logits for out in (got, expected))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    return answer


def test_what_the_step_does_not_know_goes_through_the_modules(plain_step, wide, ids):
    quick = fast(wide, 4)
    if not HAS_KERNEL:
        assert type(quick) is LlamaForCausalLM
        return
    assert isinstance(refused(quick, ids), Step)
    assert "one new token" in refused(quick, ids, input_ids=ids[:1, :2])
    assert "cache" in refused(quick, ids, use_cache=False)
    assert "labels" in refused(quick, ids, labels=ids[:1, :1])
    assert "states" in refused(quick, ids, output_hidden_states=True)
    assert "tuple" in refused(quick, ids, return_dict=False)
    assert "mask" in refused(quick, ids, attention_mask=torch.zeros(1, 1, 1, 6))
    cache = DynamicCache()
    with torch.no_grad():
        quick(ids[:1, :5], past_key_values=cache)
        call = {"input_ids": ids[:1, :1], "past_key_values": cache}
        assert "unusual given" in step_for(quick, unusual=1, **call)
    assert "gradients" in step_for(quick, input_ids=ids[:1, :1], past_key_values=cache)
    with torch.no_grad():
        assert "cache" in step_for(
            quick, input_ids=ids[:1, :1], past_key_values=KiviCache(quick.config, bits=4)
        )
    quick = fast(wide, 4)  # transformers leaves its hooks in a model that was asked for states
    many = ids[:1].expand(200, -1)
    with torch.no_grad():
        cache = quick(many[:, :3], use_cache=True).past_key_values
        assert "sequences" in step_for(quick, input_ids=many[:, :1], past_key_values=cache)


def test_a_model_that_changes_is_noticed(wide, ids):
    """Hooks, exchanged layers, other types and loaded weights, in the middle of a text."""
    quick = fast(wide, 4)
    if not HAS_KERNEL:
        assert type(quick) is LlamaForCausalLM
        return
    call = {"input_ids": ids[:1, :1], "use_cache": True}
    with torch.no_grad():
        _, cache = decoded(quick, ids[:1, :5], 2)
        first = step_for(quick, past_key_values=cache, **call)
        assert isinstance(first, Step)
        assert step_for(quick, past_key_values=cache, **call) is first
        seen = []
        hook = quick.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        quick(past_key_values=copy.deepcopy(cache), **call)
        assert seen == [1]
        hook.remove()
        assert isinstance(step_for(quick, past_key_values=cache, **call), Step)
        bias = fast(wide, 4).lm_head
        bias.bias = torch.nn.Parameter(torch.ones(bias.out_features))
        other = share(quick)
        other.lm_head = bias
        assert "bias" in step_for(other, past_key_values=cache, **call)
        other.lm_head = torch.nn.Linear(128, 128, bias=False)
        assert "not packed" in step_for(other, past_key_values=cache, **call)
        quick.lm_head = fast(wide, 4, head=4).lm_head
        assert step_for(quick, past_key_values=cache, **call) is not first
        before = quick(past_key_values=copy.deepcopy(cache), **call).logits
        quick.lm_head.scales.mul_(2)  # in place: the step reads the same memory
        after = quick(past_key_values=copy.deepcopy(cache), **call).logits
        assert relative(after, 2 * before) < 0.02
        assert "not packed" in step_for(dequantized(quick), past_key_values=cache, **call)
        quick.double()
        assert "float64" in step_for(quick, past_key_values=cache, **call)


def test_steps_do_not_keep_models(wide, ids):
    gc.collect()
    quick = fast(wide, 4)
    known = len(decoding._STEPS)
    with torch.no_grad():
        decoded(quick, ids[:1, :5], 2)
    assert len(decoding._STEPS) == known + HAS_KERNEL
    del quick
    gc.collect()
    assert len(decoding._STEPS) <= known
