"""What the chapter on low rank computes live: the panel's methods, errors layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.calibration import layerwise
from effnb.core.modules import Layers
from effnb.evaluation import latency
from effnb.inference import low_rank
from effnb.lab.bench import PANEL_WINDOWS, Bench
from effnb.lab.quality import Quality, Subject

METHODS = ("SVD", "ASVD", "SVD-LLM")
"""The methods that the chapter teaches, by what they know of the inputs."""

LAYERS: dict[str, str] = {"all": "*", "attention": "*.self_attn.*", "MLP": "*.mlp.*"}
"""The choices of layers in the panel."""

IDLE = {"TensorGPT": "TensorGPT factorizes the embedding, and sees no text"}
"""Why a method of the panel leaves a knob alone, where that is not plain."""

TEXTS = {256: (2, 128), 2048: (8, 256), 8192: (32, 256)}
"""Sequences and tokens of each calibration text of the panel, by all its tokens."""


# --- two inputs -----------------------------------------------------------------------------------

INPUTS: dict[str, Float[Tensor, "2 2"]] = {
    "alike": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    "one larger": torch.tensor([[1.0, 0.0], [0.0, 16.0]]),
    "opposed": torch.tensor([[1.0, -0.9], [-0.9, 1.0]]),
}
"""Three kinds of two inputs, as the matrix G of their products."""


def truncations(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], rank: int
) -> dict[str, Float[Tensor, "out in"]]:
    """The matrix of a smaller rank that each method puts in the place of a weight.

    Args:
        weight: The weight.
        gram: G of its inputs; the sizes that ASVD sees are the roots of its diagonal.
        rank: How many terms are kept.
    """
    found = {
        "SVD": low_rank.truncated_svd(weight, rank),
        "ASVD": low_rank.asvd_weight(weight, gram.diagonal().sqrt(), rank),
        "SVD-LLM": low_rank.svd_llm_weight(weight, gram, rank),
    }
    return {method: factors.product().float() for method, factors in found.items()}


def output_error(delta: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    r"""$\operatorname{tr}(\Delta G \Delta^\top)$, the squared error of the outputs."""
    return float((delta @ gram * delta).sum().clamp(min=0))


# --- layer by layer -------------------------------------------------------------------------------


def grams(model: nn.Module, calibration: Int[Tensor, "batch time"]) -> dict[str, Tensor]:
    r"""$G = X X^\top$ of every linear layer's inputs, by the layer's name."""
    seen: dict[str, Tensor] = {}

    def observe(_: str, layer: nn.Linear) -> low_rank.Gram:
        return low_rank.Gram(layer.in_features, layer.weight.device)

    def keep(name: str, _: nn.Linear, gram: low_rank.Gram) -> None:
        seen[name] = gram.value

    layerwise(model, calibration, observe, keep)
    return seen


class Inputs:
    """All inputs of a layer, one column for each token."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        self._parts.append(inputs.T.double().cpu())

    @property
    def value(self) -> Float[Tensor, "in tokens"]:
        """All of them so far."""
        return torch.cat(self._parts, 1)


def predicted_and_measured(
    model: nn.Module, calibration: Int[Tensor, "batch time"], name: str, shares: Sequence[float]
) -> list[tuple[float, float, float]]:
    """What SVD-LLM says it will do to one layer, and what it does.

    Returns:
        For each part kept: that part; the predicted error of the output, from singular values; and
        the measured one, from running the layer. Both as parts of the output's norm.
    """
    seen: dict[str, Inputs] = {}

    def observe(layer: str, _: nn.Linear) -> Inputs:
        return seen.setdefault(layer, Inputs())

    layerwise(model, calibration, observe, lambda *_: None, layers=Layers([name], ()))
    weight, inputs = model.get_submodule(name).weight.detach().double().cpu(), seen[name].value
    whole, found = (weight @ inputs).norm(), []
    full = low_rank.svd_llm_weight(weight, inputs @ inputs.T)
    for kept in shares:
        factors = full.truncated(low_rank.rank_for(kept, *weight.shape))
        measured = ((weight - factors.product()) @ inputs).norm()
        found.append((kept, float(factors.error / whole), float(measured / whole)))
    return found


# --- decompositions, made once --------------------------------------------------------------------


class Decompositions:
    """A model's layers, decomposed by each method when it is first asked for.

    Attributes:
        model: The model.
        texts: Calibration text by its number of tokens, as token ids.
        most: The largest of these numbers.
    """

    def __init__(self, model: nn.Module, texts: Mapping[int, Int[Tensor, "batch time"]]) -> None:
        self.model, self.texts, self.most = model, dict(texts), max(texts)
        self._made: dict[tuple[str, int], dict[str, low_rank.Factors]] = {}

    def of(self, method: str, tokens: int | None = None) -> dict[str, low_rank.Factors]:
        """The full decomposition of every layer.

        Args:
            method: One of `METHODS`, or "FWSVD".
            tokens: How much text it sees, one of the numbers of `texts`; the most when None.
        """
        tokens = self.most if tokens is None or method == "SVD" else tokens
        if (method, tokens) not in self._made:
            text = self.texts[tokens]
            makers: dict[str, Callable[[], dict[str, low_rank.Factors]]] = {
                "SVD": partial(low_rank.decompose, self.model),
                "ASVD": partial(low_rank.decompose_asvd, self.model, text),
                "SVD-LLM": partial(low_rank.decompose_svd_llm, self.model, text),
                "FWSVD": partial(low_rank.decompose_fwsvd, self.model, text),
            }
            self._made[method, tokens] = makers[method]()
        return self._made[method, tokens]

    def truncated(
        self, method: str, kept: float, layers: str = "all", tokens: int | None = None
    ) -> nn.Module:
        """The model with a part of the numbers of some layers."""
        chosen = low_rank.factors.choose_layers(self.model, LAYERS[layers])
        found = self.of(method, tokens)
        return low_rank.truncate(self.model, {name: found[name] for name in chosen}, kept)

    def nearer(self, gram: Mapping[str, Tensor], kept: float) -> dict[str, int]:
        """In how many layers ASVD and SVD-LLM keep the output nearer than plain SVD."""
        errors = {
            method: {name: self._output_error(name, g, method, kept) for name, g in gram.items()}
            for method in METHODS
        }
        plain = errors.pop("SVD")
        return {
            method: sum(error < plain[name] for name, error in found.items())
            for method, found in errors.items()
        }

    def _output_error(self, name: str, gram: Tensor, method: str, kept: float) -> float:
        weight = self.model.get_submodule(name).weight.detach().double().cpu()
        rank = low_rank.rank_for(kept, *weight.shape)
        product = self.of(method)[name].truncated(rank).product().double().cpu()
        return output_error(weight - product, gram.double().cpu())

    def spectrum(self, method: str, name: str) -> Float[Tensor, " full_rank"]:
        """A layer's singular values, the largest as 1."""
        sigma = self.of(method)[name].singular_values.cpu()
        return sigma / sigma[0]


def smaller_half(spectrum: Float[Tensor, " full_rank"]) -> float:
    """The part of the squares that lies in the smaller half of the singular values."""
    squares = spectrum.square()
    return float(squares[len(squares) // 2 :].sum() / squares.sum())


# --- the panel ------------------------------------------------------------------------------------


def panel_methods(made: Decompositions) -> dict[str, Callable[..., nn.Module]]:
    """Every method of the panel as a function of a model and of the knobs that it reads.

    The knobs are `kept`, in per cent; `layers`, a name of `LAYERS`; and `tokens`, the length of the
    calibration text.
    """

    def seeing(method: str) -> Callable[..., nn.Module]:
        def truncated(model: nn.Module, kept: int, layers: str, tokens: int) -> nn.Module:
            return made.truncated(method, kept / 100, layers, tokens)

        return truncated

    def plain(model: nn.Module, kept: int, layers: str) -> nn.Module:
        return made.truncated("SVD", kept / 100, layers)

    def with_rows(model: nn.Module, kept: int, layers: str) -> nn.Module:
        return low_rank.low_rank_plus_sparse(model, kept / 100, layers=LAYERS[layers])

    def train(model: nn.Module, kept: int) -> nn.Module:
        return low_rank.tensor_train(model, train_rank(model.config.hidden_size, kept / 100))

    return {
        "SVD-LLM": seeing("SVD-LLM"),
        "ASVD": seeing("ASVD"),
        "SVD": plain,
        "FWSVD": seeing("FWSVD"),
        "LoSparse": with_rows,
        "TensorGPT": train,
    }


def train_rank(features: int, kept: float) -> int:
    """The largest rank of a tensor train within a part of an embedding's numbers, at least 1."""
    fold = low_rank.balanced_shape(features)
    most = math.isqrt(features)
    fits = [r for r in range(1, most + 1) if low_rank.train_size(fold, r) <= kept * features]
    return max(fits, default=1)


def subject(bench: Bench) -> Subject:
    """The bench's model, and the panel's look at it."""

    def look(model: nn.Module) -> Quality:
        found = bench.look(model, panel=True)
        return Quality(found.window_nats_per_token, found.correct, found.bytes, found.text)

    return Subject(bench.model, look, documents=bench.documents[:PANEL_WINDOWS])


# --- time and real models -------------------------------------------------------------------------


def times_dense(
    layer: nn.Linear, factors: low_rank.Factors, ranks: Sequence[int], tokens: int
) -> dict[int, float]:
    """The time of two factors over that of the dense layer, at several ranks, on this machine."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.in_features, generator=draw).to(layer.weight.device)
    found = {}
    with torch.inference_mode():
        for rank in ranks:
            thin = low_rank.LowRankLinear.replacing(layer, factors.truncated(rank))
            dense = latency(partial(layer, x), runs=30).median_seconds
            found[rank] = latency(partial(thin, x), runs=30).median_seconds / dense
    return found


def smollm2_here(kept: float = 0.4, sequences: int = 8) -> str:
    """What SVD and SVD-LLM leave of SmolLM2 when its last six up-projections are factorized."""
    bench = Bench("smollm2-135m", windows=2, questions=0)
    last = "model.layers.2[4-9].mlp.up_proj"
    given = bench.calibration(seed=0, shape=(sequences, 256))
    found = {
        "plain SVD": low_rank.svd(bench.model, kept, layers=last),
        "SVD-LLM": low_rank.svd_llm(bench.model, given, kept, layers=last),
    }
    before = bench.losses(bench.model)
    parts = []
    for method, small in found.items():
        rise = sum(bench.losses(small)) / len(before) - sum(before) / len(before)
        parts.append(f"{rise:+.2f} nats with {method}")
    said = " and ".join(parts).replace("-", "−").replace("SVD−LLM", "SVD-LLM")
    return f"The last six up_proj at {kept:.0%} kept change SmolLM2's loss by {said}."
