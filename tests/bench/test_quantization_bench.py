"""Speed of quantization, as ratios in one run (`make bench`); tests/shared/timing.py says how."""

from __future__ import annotations

import copy
import time

import pytest
import timing
import torch
from torch import nn
from torchao_gptq import torchao_gptq

from effnb.core.calibration import Hessian, layerwise
from effnb.core.modules import Layers, clone, map_linears
from effnb.inference.quantization import accelerate, fast, gptq, rtn
from effnb.inference.quantization.packed import machine
from effnb.lab import corpora, load

pytestmark = pytest.mark.bench
PROMPT = "The history of the town begins with a bridge over the river, which"


def smollm2(tokens):
    """The real model in float32, a short prompt, and that many tokens of a novel."""
    loaded = load("smollm2-135m")
    encode = loaded.tokenizer.encode
    text = "\n\n".join(corpora.documents("novels", "train")[:40])
    ids = encode(text[: 12 * tokens + 100], verbose=False)[:tokens]
    return loaded.model.eval(), torch.tensor([encode(PROMPT)]), torch.tensor([ids])


def decoding(model, prompt, tokens):
    """A function that goes on generating so many tokens greedily, one at a time."""
    with torch.inference_mode():
        out = [model(input_ids=prompt, use_cache=True)]

    def run():
        with torch.inference_mode():
            for _ in range(tokens):
                best = out[0].logits[:, -1:].argmax(-1)
                cache = out[0].past_key_values
                out[0] = model(input_ids=best, past_key_values=cache, use_cache=True)

    return run


# --- what is measured -----------------------------------------------------------------------------


def measure_packed():
    """Decoding and reading a prompt, with packed layers of several kinds."""
    model, prompt, ids = smollm2(512)
    models = {
        "float32": model,
        "int8": fast(model, 8),
        "int4": fast(model, 4),
        "int4, head in int4": fast(model, 4, head=True),
        "int4, head in float32": fast(model, 4, head=False),
    }

    def reading(m):
        def run():
            with torch.inference_mode():
                m(input_ids=ids, use_cache=False, logits_to_keep=1)

        return run

    return {
        "decoding": timing.in_turn({name: decoding(m, prompt, 8) for name, m in models.items()}, 9),
        "a prompt of 512 tokens": timing.in_turn(
            {name: reading(m) for name, m in models.items()}, 3
        ),
    }


def measure_torchao():
    """Decoding with the weight-only formats of torchao that run on a CPU.

    Its int4 layout for CPUs is a prototype there. With float32 inputs it takes a kernel that is not
    vectorized on x86, so both libraries are compared in bfloat16 as well.
    """
    from torchao.prototype.quantization.int4.inference_workflow import (
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, prompt, _ = smollm2(1)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        # The head gets a weight of its own, as in our models.
        own = map_linears(
            clone(model), lambda name, layer: copy.deepcopy(layer), layers=Layers(exclude=())
        )
        own = own.to(dtype)

        def theirs(config, own=own):
            copied = clone(own)
            quantize_(copied, config)
            return copied

        models = {
            "unquantized": own,
            "effnb int8": fast(own, 8),
            "torchao int8": theirs(Int8WeightOnlyConfig()),
            "effnb int4": fast(own, 4, head=True),
            "torchao int4": theirs(PrototypeInt4WeightOnlyConfig(group_size=64)),
        }
        runs = {name: decoding(m, prompt, 4) for name, m in models.items()}
        seconds[str(dtype).removeprefix("torch.")] = timing.in_turn(runs, 5)
    return seconds


def measure_stored():
    """Decoding with a model as it is stored, and after `accelerate`."""
    model, prompt, _ = smollm2(1)
    slow = rtn(model, 4, group_size=64)
    models = {"as stored": slow, "accelerated": accelerate(slow)}
    return {"decoding": timing.in_turn({n: decoding(m, prompt, 1) for n, m in models.items()}, 3)}


def measure_gptq():
    """All linear layers of SmolLM2 on 16 x 512 tokens, against reading those tokens once."""
    model, _, ids = smollm2(16 * 512)
    ids, columns, shares = ids.view(16, 512), [], []

    def ours():
        columns.clear()
        start = time.perf_counter()
        gptq(model, ids, 4, group_size=64, report=lambda _, result: columns.append(result.seconds))
        shares.append(sum(columns) / (time.perf_counter() - start))

    def by(core):
        def compress(name, layer, seen):
            new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            new.weight = nn.Parameter(core(layer.weight, seen.value), requires_grad=False)
            return new

        layerwise(model, ids, lambda _, layer: Hessian(layer.in_features), compress)

    def forward():
        with torch.inference_mode():
            for part in ids.split(8):
                model.model(input_ids=part, use_cache=False)

    functions = {
        "forward pass": forward,
        "gptq": ours,
        "plain": lambda: by(plain_gptq),
        "torchao": lambda: by(torchao_columns()),
    }
    seconds = {}
    for name, function in functions.items():
        start = time.process_time()
        function()
        seconds[name] = time.process_time() - start
    seconds["columns"] = shares[0] * seconds["gptq"]
    return {"gptq": seconds}


def plain_gptq(weight, hessian, bits=4, group_size=64, damping=0.01, block=128):
    """GPTQ as published (Frantar et al., 2022, algorithm 1), grids per group, one layer."""
    w, size = weight.clone(), weight.shape[1]
    h = hessian.clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rounded = torch.zeros_like(w)
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = torch.zeros(len(w), end - start)
        for i in range(start, end):
            if i % group_size == 0:
                group = w[:, i : i + group_size]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / (2**bits - 1)
                zero = (-low / scale).round()
            q = ((w[:, i] / scale).round() + zero).clamp(0, 2**bits - 1)
            rounded[:, i] = scale * (q - zero)
            errors[:, i - start] = (w[:, i] - rounded[:, i]) / upper[i, i]
            w[:, i:end] -= errors[:, i - start].unsqueeze(1) @ upper[i, i:end].unsqueeze(0)
        w[:, end:] -= errors @ upper[start:end, end:]
    return rounded


def torchao_columns():
    """torchao's GPTQ of one layer, as a function of the weight and the Hessian to new weights."""
    from torchao.prototype.gptq.api import _int4_row_dequantize_zp as read_back

    quantize, kept = torchao_gptq(group_size=64)

    def core(weight, hessian):
        found = quantize(weight, hessian)
        return read_back(kept["codes"], found.scale, found.zero_point, 64)

    return core


# --- what is promised -----------------------------------------------------------------------------


def measured(name):
    """The result of a function above, from a process of its own."""
    return timing.measured(__file__, name)


def speeds(title, seconds, of):
    """Print and return how many times as fast as one of them each is."""
    ratios = {name: seconds[of] / value for name, value in seconds.items()}
    print(f"\n{title}: times as fast as {of}")
    for name, ratio in ratios.items():
        print(f"  {name:24s} {ratio:6.2f}")
    return ratios


def test_packed_models_are_faster():
    results = measured("packed")
    decode, prompt = (
        speeds(f"SmolLM2-135M, {title}", seconds, "float32") for title, seconds in results.items()
    )
    if machine().dtype == torch.bfloat16:
        assert decode["int4"] >= 2
        assert decode["int8"] >= 1.3
    if machine().dense == torch.bfloat16:
        assert min(prompt.values()) >= 0.95


def test_packed_decoding_beside_torchao():
    for dtype, seconds in measured("torchao").items():
        ratios = speeds(f"SmolLM2-135M, decoding in {dtype}", seconds, "unquantized")
        for bits in ("int8", "int4"):
            assert ratios[f"effnb {bits}"] >= 0.9 * ratios[f"torchao {bits}"], (bits, dtype)


def test_accelerated_layers_beside_layers_that_read_back():
    seconds = measured("stored")["decoding"]
    ratios = speeds("SmolLM2-135M in 4 bits, decoding", seconds, "as stored")
    assert ratios["accelerated"] > 2


def test_gptq_beside_the_forward_passes_it_needs_and_beside_torchao():
    """No library of the test environment runs GPTQ on a CPU as it is: torchao's asserts CUDA.

    So torchao's walk through the columns runs without the lines that ask for CUDA, with our passes
    over the calibration data around it; beside it the published algorithm, written plainly.
    """
    seconds = measured("gptq")["gptq"]
    print("\nGPTQ, 4 bits, groups of 64, all layers of SmolLM2-135M on 16 x 512 tokens,")
    print("in forward passes over these tokens (torchao's runs with its CUDA lines taken out):")
    rest = seconds["gptq"] - seconds["columns"]
    for name, value in {
        "all of it": seconds["gptq"],
        "walking the columns": seconds["columns"],
        "the rest": rest,
        "written plainly": seconds["plain"],
        "with torchao's columns": seconds["torchao"],
    }.items():
        print(f"  {name:24s} {value / seconds['forward pass']:6.2f}")
    assert rest <= 3 * seconds["forward pass"]
    assert seconds["gptq"] <= 1.1 * seconds["plain"]
    assert seconds["gptq"] <= seconds["torchao"]


if __name__ == "__main__":
    timing.answer(globals())
