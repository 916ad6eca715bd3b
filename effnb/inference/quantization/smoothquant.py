r"""SmoothQuant: move the outliers of the activations into the weights, where they do little harm.

A linear layer does not notice if its input features are divided by factors and the columns of its
weight multiplied by them:

$$Y = \left(X \operatorname{diag}(s)^{-1}\right) \left(W \operatorname{diag}(s)\right)^\top,
  \qquad s_j = \frac{\max_t |X_{tj}|^{\alpha}}{\max_o |W_{oj}|^{1 - \alpha}}.$$

With $\alpha = 1/2$ inputs and weights of a feature get the same largest magnitude, and both are
easy to quantize. The division costs nothing: it is folded into the gain (and bias) of the
normalization layer that the features come from. So only layers that read a normalization layer are
smoothed, and all layers that read the same one share one $s$.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization
for Large Language Models", 2022, arXiv 2211.10438, eq. 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effnb.core.calibration import CalibrationLike, batches_of
from effnb.core.folding import Fold, scaled
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    find_blocks,
    refuse_encoder_decoder,
    share,
)
from effnb.core.outliers import norm_offset, norm_readers
from effnb.core.proof import check_kept, exact, with_parameters
from effnb.inference.quantization.activations import input_maxima, quantize_activations
from effnb.inference.quantization.formats import Granularity, check_bits
from effnb.inference.quantization.linear import refuse_quantized

FLOOR = 1e-5
"""Smallest factor, and smallest weight maximum that a factor is computed from."""

LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}
"""The paper's settings by name: what shares a scale of the inputs."""


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1.")


def smooth_scales(
    input_maxima: Float[Tensor, " in"],
    weights: Sequence[Float[Tensor, "_ in"]],
    alpha: float = 0.5,
) -> Float[Tensor, " in"]:
    r"""$s_j = \max|X_j|^{\alpha} / \max|W_{:j}|^{1 - \alpha}$, at least $10^{-5}$.

    Args:
        input_maxima: $\max_t |X_{tj}|$ over the calibration data.
        weights: The weights (out, in) of all layers that read these inputs; the maximum of a
            column is taken over all of them.
        alpha: How much of the difficulty moves into the weights. 0 does not mean off: it divides
            by the weights' maxima, and so moves *their* outliers into the activations. Off is
            $s = 1$.

    Returns:
        The factors. That of a feature that is 0 on all calibration data is 1.

    Raises:
        ValueError: `alpha` outside 0 … 1, no weights, or maxima that are negative or not finite.
    """
    _check_alpha(alpha)
    if not weights:
        raise ValueError("there is no weight that reads these inputs.")
    if not bool(((input_maxima >= 0) & input_maxima.isfinite()).all()):
        raise ValueError("the inputs' maxima must be finite numbers from 0.")
    top = torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0)
    if not bool(top.isfinite().all()):
        raise ValueError("a weight has entries that are NaN or infinite.")
    x = input_maxima.to(torch.promote_types(input_maxima.dtype, torch.float32))
    s = (x.pow(alpha) / top.to(x.dtype).clamp(min=FLOOR).pow(1 - alpha)).clamp(min=FLOOR)
    return torch.where(x > 0, s, 1)


class _Uses(TorchFunctionMode):
    """Notes which of some tensors are used by anything but a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[str, Tensor] = {}
        self.found: set[str] = set()

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        if self.watched and function is not nn.functional.linear:
            given = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            for name, tensor in self.watched.items():  # asking for a shape makes no tensor
                if any(t is tensor for t in given) and any(t is not tensor for t in made):
                    self.found.add(name)
        return result


def _used_elsewhere(model: nn.Module, ids: Tensor, norms: Iterable[str]) -> set[str]:
    """Those norms whose output something besides linear layers reads: a residual sum, say."""
    watched = share(model).eval()
    uses = _Uses()

    def hook_for(name: str):
        def hook(module, arguments, output):
            uses.watched[name] = output

        return hook

    for name in norms:
        watched.get_submodule(name).register_forward_hook(hook_for(name))
    with torch.no_grad(), uses:
        watched(input_ids=ids)
    return uses.found


@chooses_layers
def smoothable(
    model: nn.Module,
    *,
    layers: LayerChoice = "*",
) -> dict[str, list[str]]:
    """The normalization layers of a model's blocks that can take factors in, and their readers.

    A norm can if nothing but linear layers reads its output, and all of these fit the patterns.
    Norms of several blocks that one layer reads can do so together, or not at all.

    Raises:
        ValueError: When there is none.
    """
    prefix, _ = find_blocks(model)
    ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    readers = {n: r for n, r in norm_readers(model, ids).items() if n.startswith(f"{prefix}.")}
    shared = _used_elsewhere(model, ids, readers)
    wanted = Layers.of(layers).on(model)
    fitting = {
        norm: readers[norm]
        for norms in _together(readers)
        if not shared & set(norms)
        for norm in norms
        if all(wanted.fit(n) for other in norms for n in readers[other])
    }
    if not fitting:
        raise ValueError(
            "no normalization layer of this model's blocks feeds linear layers only, all of which "
            "fit the patterns; there is nothing to fold the factors into."
        )
    return fitting


def _together(readers: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Norms in groups: those that one layer reads, because it stands behind each of them."""
    groups: list[tuple[list[str], set[str]]] = []
    for norm, names in readers.items():
        alike = [group for group in groups if group[1] & set(names)]
        groups = [group for group in groups if group not in alike]
        norms = [other for group in alike for other in group[0]]
        groups.append(([*norms, norm], set(names).union(*(group[1] for group in alike))))
    return [norms for norms, _ in groups]


def check_same_function(model: nn.Module, changed: nn.Module) -> None:
    """Refuse a model that computes something else after a change that should not show.

    Some architectures have more to them than meets the eye: a gain stored as its distance from 1,
    a norm behind the attention. Eight tokens are enough to see it.

    Raises:
        ValueError: When outputs differ by more than rounding explains.
    """
    first = next(model.parameters())
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    ids = torch.arange(1, 9, device=first.device).remainder(min(sizes, default=1)).view(1, -1)
    with torch.no_grad():
        outputs = [share(m).eval()(input_ids=ids) for m in (model, changed)]
    before, after = (getattr(out, "logits", out).float() for out in outputs)
    tolerance = 1e-3 if first.dtype in (torch.float32, torch.float64) else 0.3
    if not float((after - before).norm()) <= tolerance * float(before.norm()):
        raise ValueError(
            f"{type(model).__name__} would compute something else; its architecture is not that of "
            "a plain pre-norm transformer."
        )


@chooses_layers
def smooth(
    model: Model,
    calibration: CalibrationLike,
    alpha: float = 0.5,
    *,
    layers: LayerChoice = "*",
) -> Model:
    r"""The same function with smoother activations; nothing is quantized yet.

    For every norm with gain $g$ (and bias $b$) and the weights $W$ that read it:
    $g \leftarrow g / s$, $b \leftarrow b / s$, $W \leftarrow W \operatorname{diag}(s)$. That the
    function stays is proven block by block in float64, also for gains stored less 1 (Gemma). Where
    several blocks use one layer, the norms in front of it get the same $s$, by the largest inputs
    of all places.

    Args:
        model: A transformer whose blocks normalize before their linear layers; it is not changed.
        calibration: Token ids (sequences, time), or batches of keyword arguments.
        alpha: 0 to 1; see `smooth_scales`.
        layers: Name patterns of the layers to smooth; a norm takes part if all its readers fit.

    Returns:
        A new model with the same outputs up to rounding, sharing all tensors but those scaled.

    Raises:
        ValueError: `alpha` outside 0 … 1, no or bad calibration data, or a model that is quantized
            already, has no norm that feeds linear layers only, or would compute something else, be
            it by rounding to its type.
    """
    _check_alpha(alpha)
    refuse_quantized(model)
    refuse_encoder_decoder(model, "smoothing")
    batches_of(calibration)  # says at once if there is none
    norms = smoothable(model, layers=layers)
    first = list(dict.fromkeys(readers[0] for readers in norms.values()))
    maxima = input_maxima(
        model,
        calibration,
        first,
    )
    new: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for group in _together(norms):  # one norm; several if a layer stands behind each of them
        readers = list(dict.fromkeys(itertools.chain(*(norms[name] for name in group))))
        weights = [model.get_submodule(reader).weight for reader in readers]
        most = torch.stack([maxima[norms[name][0]] for name in group]).amax(0)
        s = smooth_scales(most, weights, alpha)
        for name in group:
            norm = model.get_submodule(name)
            fold = Fold(name, tuple(readers), norm_offset(norm))
            stored |= scaled(model, fold, s)
            new[f"{name}.weight"] = (exact(norm.weight) + fold.offset) / exact(s) - fold.offset
            if getattr(norm, "bias", None) is not None:
                new[f"{name}.bias"] = exact(norm.bias) / exact(s)
        for reader, weight in zip(readers, weights, strict=True):
            new[f"{reader}.weight"] = exact(weight) * exact(s)
    undone = {f"{r}.weight": new[f"{r}.weight"] for r in itertools.chain(*norms.values())}
    check_kept(model, new, undone, "smoothing", stored)
    return with_parameters(model, stored)


@chooses_layers
def smoothquant(
    model: Model,
    calibration: CalibrationLike,
    alpha: float = 0.5,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    level: str = "O1",
    group_size: Granularity = "row",
    layers: LayerChoice = "*",
) -> Model:
    """Smooth, then quantize weights and inputs of all linear layers.

    Args:
        model: A transformer whose blocks normalize before their linear layers; it is not changed.
        calibration: Token ids (sequences, time), or batches of keyword arguments.
        alpha: 0 to 1; see `smooth_scales`.
        weight_bits: Bits of the weights, 2 to 8.
        activation_bits: Bits of the inputs, 2 to 8.
        level: "O1": a scale per token, found at run time. "O2": one scale for all tokens of a
            batch, found at run time. "O3": one scale, from the calibration data.
        group_size: What shares a scale of the weights. They are symmetric.
        layers: Name patterns of the layers to quantize.

    Returns:
        A new model that shares every tensor it did not change.

    Raises:
        ValueError: As `smooth` and `quantize_activations`; or an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(LEVELS)}.")
    check_bits(weight_bits)
    check_bits(activation_bits)
    smoothed = smooth(
        model,
        calibration,
        alpha,
        layers=layers,
    )
    return quantize_activations(
        smoothed,
        weight_bits,
        activation_bits,
        granularity=LEVELS[level],
        group_size=group_size,
        calibration=calibration if level == "O3" else None,
        layers=layers,
    )
