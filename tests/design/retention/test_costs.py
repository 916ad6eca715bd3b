"""Closed-form costs against the states that models have and the operations that they do."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effnb.design.retention import (
    RWKVLM,
    GLAConfig,
    HyenaConfig,
    HyenaLM,
    RetNetConfig,
    RetNetLM,
    RWKVConfig,
    attention_decoding,
    break_even_tokens,
    break_even_work,
    chunkwise_multiply_adds,
    decays,
    decoding,
    fft_multiply_adds,
    hyena_decoding,
    parallel_multiply_adds,
    retention,
    retention_decoding,
    rwkv_decoding,
    wkv_step,
)
from effnb.design.retention.long_convolution import last_outputs


class Products(TorchDispatchMode):
    """Counts the numbers that element-wise products give."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if operation._schema.name == "aten::mul":
            self.count += result.numel()
        return result


def products(function):
    """Multiply-adds of matrix products."""
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flops:
        function()
    return flops.get_total_flops() // 2


def counted(function):
    """Multiply-adds of matrix products, and element-wise products."""
    with Products() as elementwise:
        matrices = products(function)
    return matrices, elementwise.count


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("tokens", [1, 9])
def test_states_have_the_bytes_of_the_closed_form(tokens):
    sizes = dict(hidden=12, layers=3, feed_forward=8, vocabulary=16)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for kind, config in (
        (RetNetLM, RetNetConfig(**sizes, heads=3)),
        (RetNetLM, RetNetConfig(**sizes, heads=2, value_factor=1)),
        (RWKVLM, RWKVConfig(**sizes)),
        (HyenaLM, HyenaConfig(**sizes, max_length=9, order=3)),
    ):
        _, state = kind(config).advance(ids)
        filters = sum(x["filters"].nbytes for x in state.layers if "filters" in x)
        assert state.bytes - filters == decoding(config, tokens).state_bytes


def test_a_cache_has_the_bytes_of_the_closed_form(llama):
    ids = torch.ones(1, 10, dtype=torch.long)
    cache = llama(input_ids=ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * attention_decoding(32, 10, heads=4, kv_heads=2).state_bytes


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("heads", [1, 4])
def test_a_step_of_retention_takes_three_passes_over_the_state(heads):
    size = 16 // heads
    q, k = torch.randn(2, 1, heads, 1, size)
    v, state = torch.randn(1, heads, 1, 2 * size), torch.zeros(1, heads, size, 2 * size)
    gamma = decays(heads).float()
    matrices, others = counted(
        lambda: retention(q, k, v, gamma, form="recurrent", initial_state=state)
    )
    expected = retention_decoding(16, heads=heads)
    # Besides the state, the scale of the queries is a product
    assert matrices + others - q.numel() == expected.multiply_adds
    assert expected.state_bytes == state.nbytes


def test_a_step_of_rwkv_takes_six_products_a_channel():
    w, u = torch.rand(2, 10)
    k, v, *state = torch.rand(5, 1, 10)
    assert counted(lambda: wkv_step(w, u, k, v, tuple(state))) == (
        0,
        rwkv_decoding(10).multiply_adds,
    )


@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_a_step_of_attention_reads_all_keys_and_values(tokens):
    q, k, v = torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 4, tokens, 8)
    matrices = products(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert matrices == attention_decoding(32, tokens, heads=4).multiply_adds


@pytest.mark.parametrize("order", [2, 3])
def test_a_step_of_hyena_multiplies_its_whole_past(order):
    u, h = torch.randn(2, 20, 6), torch.randn(25, 6)
    _, each = counted(lambda: last_outputs(u[:1], h, 1))
    short_and_gates = (3 * (order + 1) + 1 + 2 * (order - 1)) * 6
    expected = (order - 1) * each + short_and_gates
    assert hyena_decoding(6, 20, order=order).multiply_adds == expected


# ---------------------------------------------------------------- break-even


@settings(max_examples=20)
@given(
    size=st.sampled_from([16, 32, 64, 256]),
    factor=st.integers(1, 3),
    kv=st.sampled_from([1, 2, 4]),
    half=st.booleans(),
)
def test_break_even_is_where_the_cache_becomes_as_large_as_the_state(size, factor, kv, half):
    cache_bytes = 2 if half else 4
    state = retention_decoding(4 * size, heads=4, value_factor=factor).state_bytes
    even = break_even_tokens(
        size, value_factor=factor, heads=4, kv_heads=kv, cache_bytes_per_number=cache_bytes
    )

    def cache(tokens):
        return attention_decoding(
            4 * size, tokens, heads=4, kv_heads=kv, bytes_per_number=cache_bytes
        ).state_bytes

    assert cache(math.ceil(even)) >= state
    assert cache(max(1, math.ceil(even) - 1)) < state or even <= 1


def test_the_papers_heads_break_even_at_256_tokens_and_768_in_work():
    assert break_even_tokens(256) == 256
    assert break_even_work(256) == 768
    work = retention_decoding(2048, heads=8).multiply_adds
    assert attention_decoding(2048, 768).multiply_adds == work
    assert break_even_work(64, value_factor=1) == 96


# ---------------------------------------------------------------- training


def forms_counted(tokens, chunk, form="chunkwise", heads=2, dim_k=4, dim_v=6):
    q, k = torch.zeros(2, 1, heads, tokens, dim_k)
    v = torch.zeros(1, heads, tokens, dim_v)
    gamma = decays(heads).float()
    return products(lambda: retention(q, k, v, gamma, form=form, chunk_size=chunk))


@pytest.mark.parametrize(("tokens", "chunk"), [(64, 16), (50, 16), (7, 16), (12, 5)])
def test_chunkwise_work_is_the_closed_form(tokens, chunk):
    assert forms_counted(tokens, chunk) == chunkwise_multiply_adds(tokens, 2, 4, 6, chunk)


def test_chunkwise_work_grows_linearly_from_1k_to_8k_tokens_and_parallel_work_does_not():
    work = {tokens: forms_counted(tokens, 64) for tokens in (1024, 2048, 4096, 8192)}
    assert {count / tokens for tokens, count in work.items()} == {2 * (64 * 10 + 2 * 4 * 6)}
    parallel = [forms_counted(tokens, 1, "parallel") for tokens in (256, 512)]
    state = [2 * 2 * tokens * 4 * 6 for tokens in (256, 512)]  # of its initial and last state
    expected = [parallel_multiply_adds(tokens, 2, 4, 6) for tokens in (256, 512)]
    assert [a - b for a, b in zip(parallel, state)] == expected
    assert expected[1] == 4 * expected[0]


def test_a_whole_model_grows_linearly_too():
    config = RetNetConfig(hidden=8, layers=1, feed_forward=8, vocabulary=8, heads=2, chunk_size=256)
    with torch.device("meta"):
        model = RetNetLM(config)
        work = [
            products(lambda n=n: model.hidden(torch.zeros(1, n, dtype=torch.long)))
            for n in (1024, 8192)
        ]
    assert work[1] == 8 * work[0] > 0


def test_convolutions_by_fft_grow_a_little_faster_than_linearly():
    work = [fft_multiply_adds(2**i, 4) for i in range(8, 14)]
    ratios = [b / a for a, b in pairwise(work)]
    assert all(2 < ratio < 2.3 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)
    assert fft_multiply_adds(512, 4, order=3) == 2 * fft_multiply_adds(512, 4)
    # Term by term: T² / 2 per channel
    assert fft_multiply_adds(16, 1) > 16**2 / 2
    assert fft_multiply_adds(4096, 1) < 4096**2 / 2 / 10


# ---------------------------------------------------------------- what is refused


def test_sizes_that_cannot_be():
    for wrong in (
        lambda: attention_decoding(8, 0),
        lambda: retention_decoding(8, heads=0),
        lambda: rwkv_decoding(0),
        lambda: hyena_decoding(8, 4, order=1),
        lambda: fft_multiply_adds(8, 4, order=1),
        lambda: fft_multiply_adds(0, 4),
        lambda: break_even_tokens(0),
        lambda: break_even_work(8, value_factor=0),
        lambda: chunkwise_multiply_adds(8, 1, 4, 4, 0),
        lambda: parallel_multiply_adds(8, 1, 0, 4),
    ):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()
    with pytest.raises(ValueError, match="GLAConfig has no closed form"):
        decoding(GLAConfig(hidden=8, layers=1, feed_forward=8, heads=2))
