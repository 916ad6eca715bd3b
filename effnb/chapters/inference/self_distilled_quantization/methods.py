"""What the chapter runs: teachers, students of every method, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from effnb.chapters.inference.self_distilled_quantization import languages
from effnb.core.modules import clone
from effnb.core.training import TrainingSettings, train
from effnb.inference import self_distilled_quantization as sdq
from effnb.inference.quantization import dequantized, rtn
from effnb.lab import load
from effnb.lab._files import data_folder
from effnb.lab.models import LoadedEncoder, ModelUnavailable, sha256
from effnb.lab.results import NotMeasured
from effnb.lab.task_inputs import Classifier
from effnb.lab.tasks import TOPICS

MODEL = "mini-multi"
BITS = (8, 6, 4)
TAUGHT, STEPS = 300, 60
"""Steps that a teacher is fine-tuned for, and that a student trains after it."""
NOISE, BLOCK, ALPHA = 0.5, 8, 10.0
"""What SDQ is run with: the part of the blocks that is rounded, their size, attention's weight."""
METHODS: dict[str, dict[str, Any]] = {
    "QAT": {"noise": 1.0, "beta": 0.0},
    "QAT + output": {"noise": 1.0},
    "SDQ": {"noise": NOISE, "attention": "mse"},
}
"""The students that are trained, by name; rounding alone is "PTQ"."""
VARIANTS: dict[str, dict[str, Any]] = {
    "labels, noise": {"noise": NOISE, "beta": 0.0},
    "output": {"noise": NOISE},
    "attention, squared error": {"noise": NOISE, "attention": "mse"},
    "attention, divergence": {"noise": NOISE, "attention": "kl"},
    "hidden states": {"noise": NOISE, "hidden": 1.0},
    "attention and hidden": {"noise": NOISE, "attention": "mse", "hidden": 1.0},
    "attention, all rounded": {"noise": 1.0, "attention": "mse"},
}
"""Variants of the loss and of the noise, all at the same bits and steps."""


class NotTrained(NotMeasured):
    """The encoder is missing: a value that is false and says which command trains it."""

    def __init__(self, name: str = MODEL) -> None:
        super().__init__(name)
        self.command = "python data/train_multi.py"


def encoder() -> LoadedEncoder | NotTrained:
    """The multilingual encoder, or, where its training has not finished, a value that says so."""
    try:
        return load(MODEL, device="cpu")
    except ModelUnavailable:
        return NotTrained()


def shallow(model: nn.Module, layers: int) -> nn.Module:
    """A copy of a BERT encoder with its first blocks only.

    Raises:
        ValueError: When it does not have that many.
    """
    have = len(model.encoder.layer)
    if not 1 <= layers <= have:
        raise ValueError(f"{layers} blocks were asked for; the encoder has {have}.")
    copy = clone(model)
    copy.encoder.layer = nn.ModuleList(copy.encoder.layer[:layers])
    copy.config.num_hidden_layers = layers
    return copy


def settings(steps: int, rate: float, seed: int) -> TrainingSettings:
    """A short warm-up, then a rate that falls to 0."""
    return TrainingSettings(
        steps, rate, warmup_steps=min(10, steps // 4), schedule="linear", weight_decay=0.01,
        seed=seed,
    )  # fmt: skip


def fine_tuned(
    loaded: LoadedEncoder, seed: int, *, layers: int | None = None, steps: int = TAUGHT
) -> Classifier:
    """The teacher: the encoder, fine-tuned with a new classifier on three languages.

    It is kept in `build/`, so that the parts of a sweep share it.
    """
    key = f"{(sha256(loaded.name) or loaded.name)[:12]}-{layers or 'all'}-{steps}-{seed}"
    path = data_folder().parent / "build" / "teachers" / f"{key.replace('/', '_')}.safetensors"
    body = clone(loaded.model) if layers is None else shallow(loaded.model, layers)
    model = Classifier(body, len(TOPICS))
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(
        model,
        languages.batches(loaded.tokenizer, seed),
        settings(steps, 1e-3, seed),
        loss=sdq.sdq(Classifier(body, len(TOPICS)).eval(), beta=0.0),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model


def rounded(teacher: nn.Module, bits: int) -> nn.Module:
    """Rounding after training (PTQ): each row's weights to the nearest of an even grid."""
    return dequantized(rtn(teacher, bits, symmetric=True))


def student(
    teacher: nn.Module,
    tokenizer: Any,
    bits: int,
    seed: int,
    *,
    steps: int = STEPS,
    noise: float = NOISE,
    alpha: float = ALPHA,
    **loss: Any,
) -> nn.Module:
    """A quantized student of a teacher, trained with one of the methods' settings.

    Args:
        teacher: The fine-tuned model, in evaluation mode.
        tokenizer: The encoder's.
        bits: Bits of the student's weights.
        seed: Seed of noise and batches; these are others than the teacher's.
        steps: Steps to train.
        noise: Part of the blocks that is rounded.
        alpha: Weight of attention, where `attention` is given.
        loss: Further settings of `sdq`.
    """
    model = sdq.prepare_quant_noise(teacher, bits, noise=noise, block_size=BLOCK)
    train(
        model,
        languages.batches(tokenizer, 100 + seed),
        settings(steps, 5e-4, seed),
        loss=sdq.sdq(teacher, alpha=alpha, **loss),
    )
    return dequantized(sdq.convert_noise(model)).eval()


def trained(
    teacher: nn.Module, tokenizer: Any, method: str, bits: int, seed: int, **changed: Any
) -> nn.Module:
    """A model quantized by the named method: "PTQ", or one of `METHODS`."""
    if method == "PTQ":
        return rounded(teacher, bits)
    return student(teacher, tokenizer, bits, seed, **{**METHODS[method], **changed})


def role_errors(errors: Sequence[sdq.ModuleError]) -> dict[str, dict[str, list[float]]]:
    """Errors by role, text by text, of both kinds; the first and the last block by themselves."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("accumulated", "alone"):
        for role, values in sdq.by_role(errors, kind).items():
            found.setdefault(role, {})[kind] = [round(v, 5) for v in values]
    blocks = sorted((e for e in errors if e.role == "block"), key=lambda e: e.layer)
    for name, error in (("first block", blocks[0]), ("last block", blocks[-1])):
        found[name] = {
            "accumulated": [round(v, 5) for v in error.accumulated],
            "alone": [round(v, 5) for v in error.alone],
        }
    return found


def layer_means(errors: Sequence[sdq.ModuleError]) -> list[dict[str, Any]]:
    """The mean error of every module, a row each, for drawing."""
    return [
        {
            "role": e.role,
            "layer": e.layer,
            "accumulated": round(e.mean(), 5),
            "alone": round(e.mean("alone"), 5),
        }
        for e in errors
    ]


def codewords(
    teacher: nn.Module, tokenizer: Any, seed: int, steps: int, centroids: int = 64
) -> tuple[nn.Module, float]:
    """Iterative product quantization with SDQ's loss, and the bits that a weight takes."""
    found = sdq.iterative_product_quantization(
        teacher,
        languages.batches(tokenizer, 100 + seed),
        settings(steps, 5e-4, seed) if steps else None,
        loss=sdq.sdq(teacher, attention="mse", alpha=ALPHA),
        block_size=BLOCK,
        centroids=centroids,
    )
    layers = [m for m in found.model.modules() if isinstance(m, sdq.ProductLinear)]
    weights = sum(m.in_features * m.out_features for m in layers)
    return found.model, 8 * sum(m.bytes for m in layers) / weights


def linear_bytes(model: nn.Module, bits: int) -> int:
    """Bytes of the blocks' linear layers at some bits, a 16-bit scale for every row counted."""
    shapes = [m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)
              and "classifier" not in n]  # fmt: skip
    return sum(rows * columns * bits // 8 + 2 * rows for rows, columns in shapes)


def embedding_bytes(model: nn.Module) -> int:
    """Bytes of the embeddings in 16 bits: they are not quantized here."""
    return sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))


@torch.inference_mode()
def attention_of(model: nn.Module, batch: Mapping[str, Any], layer: int, head: int) -> Any:
    """The attention of one head over the first text of a batch, real tokens only."""
    reading = sdq.read(model, batch)
    real = reading.real[0]
    return sdq.log_attention(reading.attention[layer])[0, head].exp()[real][:, real]
