"""Costs against closed forms."""

import time

import pytest
import torch
from torch import nn

from effnb.evaluation import (
    decode_tokens_per_second,
    flops,
    latency,
    measure,
    parameter_count,
    peak_memory,
    stored_bytes,
)


def test_parameters_count_tied_weights_once(llama):
    assert parameter_count(llama) == llama.num_parameters()
    assert stored_bytes(llama) == 4 * llama.num_parameters()
    assert stored_bytes(llama.half()) == 2 * llama.num_parameters()


def test_flops_of_a_linear_layer():
    layer, x = nn.Linear(30, 20), torch.randn(7, 30)
    assert flops(lambda: layer(x)) == 2 * 7 * 30 * 20


def test_flops_of_a_llama_are_the_closed_form(llama, ids):
    """Twice the multiplications of every linear layer and the head, and attention in full."""
    batch, time_ = ids.shape
    tokens = ids.numel()
    linear = sum(m.weight.numel() for m in llama.modules() if isinstance(m, nn.Linear))
    attention = 3 * batch * 4 * time_**2 * 8 * 4  # layers, batch, QK and AV, head width, heads
    counted = flops(lambda: llama(ids))
    rotary = 2 * time_ * 4  # the outer product of positions and frequencies, once, 4 frequencies
    assert counted - 2 * tokens * linear - attention in (0, rotary, 2 * rotary, batch * rotary)


def test_latency_is_the_median_of_its_runs():
    calls = []
    timing = latency(lambda: calls.append(time.sleep(0.002)), warmup=2, runs=9)
    assert len(calls) == 11 and timing.runs == 9
    assert 0.002 <= timing.minimum_seconds <= timing.median_seconds <= timing.p95_seconds
    assert latency(lambda: time.sleep(0.01), warmup=0, runs=50, seconds=0.02).runs == 3
    with pytest.raises(ValueError, match="runs is 0"):
        latency(lambda: None, runs=0)


def test_peak_memory_is_the_most_held_at_once():
    """Two megabytes, then three more while the first are held, then one: five at the peak."""
    floats = 250_000  # one megabyte

    def work():
        a = torch.ones(2 * floats)
        b = torch.ones(3 * floats)
        del a, b
        torch.ones(floats)

    assert peak_memory(work) == 5_000_000
    assert peak_memory(lambda: None) == 0


def test_peak_memory_ignores_what_was_there(llama, ids):
    def read():
        with torch.inference_mode():
            llama(ids)

    first = peak_memory(read)
    assert first == peak_memory(read)
    logits = 4 * ids.numel() * 128
    assert logits <= first < 20 * logits


def test_cost_card_of_a_model(llama, ids):
    cost = measure(llama, ids[:1], decode_tokens=4, runs=3)
    assert cost.parameters == llama.num_parameters()
    assert cost.bytes == stored_bytes(llama) - 2 * llama.num_parameters()  # in 16 bits
    assert cost.flops_per_token > 2 * 0.9 * sum(
        m.weight.numel() for m in llama.modules() if isinstance(m, nn.Linear)
    )
    assert cost.prefill_seconds > 0 and cost.decode_tokens_per_second > 0
    assert cost.device == "cpu"
    with pytest.raises(ValueError, match="tokens is 0"):
        decode_tokens_per_second(llama, ids[:1], tokens=0)
