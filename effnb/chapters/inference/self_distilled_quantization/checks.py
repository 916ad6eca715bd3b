"""Small things that the chapter runs on the spot: identities, sizes, codewords."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from effnb.chapters.inference.self_distilled_quantization import panels
from effnb.inference import quantization
from effnb.inference import self_distilled_quantization as sdq
from effnb.lab.tables import Table, table
from effnb.lab.task_inputs import Classifier


def tiny() -> tuple[Classifier, dict[str, torch.Tensor]]:
    """A classifier of two small blocks with random weights, and sixteen texts of random tokens."""
    draw = torch.Generator().manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(BertModel(config, add_pooling_layer=False), 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.2, generator=draw)
    ids = torch.randint(5, 100, (16, 12), generator=draw)
    mask = (torch.arange(12) < torch.randint(6, 13, (16, 1), generator=draw)).long()
    batch = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (16,), generator=draw),
    }
    return model.eval(), batch


def against_qat(teacher: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference between noise on all blocks and quantization-aware training."""
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    with torch.no_grad():
        noisy = sdq.prepare_quant_noise(teacher, 4, noise=1.0).eval()
        plain = quantization.prepare_qat(teacher, 4, symmetric=True).eval()
        return float((noisy(**given) - plain(**given)).abs().max())


SHAPE = {"vocabulary": 5_120, "hidden": 96, "feed-forward": 256, "blocks": 6, "positions": 128}
"""The encoder `mini-multi`."""
XLM_R = {
    "vocabulary": 250_002,
    "hidden": 768,
    "feed-forward": 3_072,
    "blocks": 12,
    "positions": 514,
}
"""XLM-R-Base, which the article quantizes, by its published configuration."""


def sizes_of(shape: dict[str, int]) -> dict[str, int]:
    """Numbers in the linear layers of the blocks, rows of these, and numbers in the embeddings."""
    d, f = shape["hidden"], shape["feed-forward"]
    return {
        "weights": shape["blocks"] * (4 * d * d + 2 * d * f),
        "rows": shape["blocks"] * (5 * d + f),
        "embeddings": (shape["vocabulary"] + shape["positions"]) * d,
    }


def sizes_table() -> Table:
    """Megabytes at each number of bits, for the small encoder and for the article's."""
    lines = []
    for name, shape in (("mini-multi", SHAPE), ("XLM-R-Base", XLM_R)):
        found = sizes_of(shape)
        line: dict[str, Any] = {"model": name, "embeddings": 4 * found["embeddings"] / 1e6}
        for bits in (32, 8, 4):
            scales = 0 if bits == 32 else 2 * found["rows"]
            line[str(bits)] = (found["weights"] * bits / 8 + scales) / 1e6
        lines.append(line)
    return table(
        lines,
        columns={"model": "", "32": ".2f", "8": ".2f", "4": ".2f", "embeddings": ".2f"},
        caption="Megabytes of the blocks' weights at 32, 8 and 4 bits, and of the embeddings in 32 "
        "bits, which are left as they are. Counted from the models' shapes.",
    )


def codewords_table(words: tuple[int, ...] = (16, 64, 256)) -> Table:
    """A real weight as codewords, beside rounding at about the same bits."""
    model, _ = panels.minilm()
    name = next(n for n, _ in model.named_modules() if n.endswith("layer.2.attention.self.value"))
    weight = model.get_submodule(name).weight.detach()

    def error(other: torch.Tensor) -> float:
        return float((other - weight).norm() / weight.norm())

    lines = [
        {
            "stored as": f"{count} codewords of 4",
            "bits": (found := sdq.product_quantize(weight, 4, count, iterations=8)).bits_per_weight,
            "error": error(found.dequantize()),
        }
        for count in words
    ]
    for bits in (2, 3):
        stored = quantization.quantize(weight, bits)
        lines.append({
            "stored as": f"integers of {bits} bits",
            "bits": stored.bits_per_weight,
            "error": error(stored.dequantize()),
        })  # fmt: skip
    return table(
        lines,
        columns={"stored as": "", "bits": ".2f", "error": ".0%"},
        caption="A value matrix of MiniLM: bits for each weight, everything counted, and relative "
        "error of the weight.",
    )


def minilm_step(bits: int = 4, noise: float = 0.5) -> str:
    """Prepare MiniLM with noise, and run it once in training mode and once as it will be stored."""
    model, batches = panels.minilm()
    began = time.perf_counter()
    noisy = sdq.prepare_quant_noise(model, bits, noise=noise)
    given = {key: tensor for key, tensor in batches[0].items() if key != "labels"}
    real = given["attention_mask"] != 0
    with torch.no_grad():
        exact = model(**given).last_hidden_state[real]
        torch.manual_seed(0)
        for module in noisy.modules():
            # Noise without dropout: only the noisy layers are in training mode.
            module.training = isinstance(module, sdq.NoisyLinear)
        drawn = noisy(**given).last_hidden_state[real]
        whole = noisy.eval()(**given).last_hidden_state[real]
    errors = [float((x - exact).norm() / exact.norm()) for x in (drawn, whole)]
    return (
        f"MiniLM in {bits} bits: its output is wrong by {errors[0]:.0%} in a step that rounds "
        f"{noise:.0%} of the blocks, and by {errors[1]:.0%} when all are rounded "
        f"({time.perf_counter() - began:.1f} s)."
    )
