r"""One loop for every method that asks the loss what a weight is worth.

The loss of a batch is the mean over the tokens it counts. Batches keep their mask, their positions
and their boundaries: padding says nothing, the first token behind it is foreseen by nothing, and a
mean over a text is the same however it was cut into batches,

$$g = \frac{\sum_b n_b\, \partial L_b / \partial w}{\sum_b n_b}, \qquad
  F = \frac1S \sum_s \Bigl(\frac{\partial L_s}{\partial w}\Bigr)^2,$$

$n_b$ the tokens that batch $b$ counts and $s$ single sequences: the square of a batch's mean
gradient is something else, because gradients of different signs cancel before they are squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.calibration import Calibration, CalibrationLike, batches_of
from effnb.core.checks import check_loaded
from effnb.core.context import check_causal, context_limit
from effnb.core.modules import LayerChoice, linears, share
from effnb.core.training import Loss, next_token_loss, target_count

Batches = CalibrationLike | Sequence[Any]
"""Token ids (sequences, time), batches as keyword arguments, or whatever a given loss takes."""


def loss_batches(model: nn.Module, calibration: Batches, loss: Loss | None = None) -> list[Any]:
    """Calibration data as batches for a loss, on the model's device.

    Args:
        model: The model that will run on them.
        calibration: With a loss of one's own: the batches it takes, used as they are. Otherwise
            token ids (sequences, time), or keyword arguments per batch: mask, positions and all
            else are kept, and `labels` counted where there are any.
        loss: None for the language-modelling loss.

    Raises:
        ValueError: When there is nothing, or nothing that counts; a sequence beyond the context; or
            a model without a language-modelling loss (one that sees what it should foresee, or an
            encoder-decoder without `labels`).
    """
    check_loaded(model)
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.no_grad():
        if loss is not None:
            batches = [to_device(batch, device) for batch in Calibration.of(calibration).data]
            if not batches:
                raise ValueError("the calibration data is empty; give at least one batch.")
            return batches
        given = batches_of(calibration, context_limit(model))
        batches = [_complete(model, to_device(batch, device)) for batch in given]
    counted = [batch for batch in batches if target_count(batch)]
    if not counted:
        raise ValueError(
            "no token of the calibration data follows another one of its text; give sequences of "
            "at least two tokens without padding between them."
        )
    if not _encoder_decoder(model):
        check_causal(model, counted[0]["input_ids"])
    return counted


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _complete(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with what a gradient needs: no cache, and what an encoder-decoder's decoder reads.

    With a cache, transformers does not look for documents packed into one row.
    """
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        batch = {"use_cache": False, **batch}
    if not _encoder_decoder(model) or ("decoder_input_ids" in batch and "labels" in batch):
        return batch
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "labels" not in batch or make is None:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: every batch needs `labels`, the text "
            "that the decoder is to write, or give a `loss`."
        )
    return {**batch, "decoder_input_ids": make(labels=batch["labels"])}


def sequences_of(batches: Iterable[Any], loss: Loss | None = None) -> list[Any]:
    """Batches of keyword arguments cut into single sequences; anything else stays as it is.

    A tensor whose first size is the number of sequences is cut; one that all sequences share
    (positions of shape (1, time)) is kept whole. For the language-modelling loss, sequences in
    which no token counts are left out.
    """
    found = []
    for batch in batches:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found.append(batch)
            continue
        rows = len(batch["input_ids"])
        for i in range(rows):
            one = {
                key: value[i : i + 1]
                if isinstance(value, Tensor) and value.ndim and len(value) == rows
                else value
                for key, value in batch.items()
            }
            if loss is not None or target_count(one):
                found.append(one)
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, whatever it is made of, with its tensors on a device and fit for autograd."""
    if isinstance(batch, Tensor):
        batch = batch.to(device)
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(part, device) for part in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(part, device) for key, part in batch.items()}
    return batch


def each_gradient(
    model: nn.Module, leaves: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the loss of one batch after another.

    Args:
        model: The model, as it is to run.
        leaves: The tensors to derive by, by name; they require gradients, and the model uses them.
        batches: From `loss_batches` or `sequences_of`.
        loss: From (model, batch) to a scalar; None for language modelling.

    Yields:
        The gradient of each leaf.

    Raises:
        ValueError: When the loss or a gradient is not finite, or the loss does not depend on a
            leaf.
    """
    function = next_token_loss if loss is None else loss
    for number, batch in enumerate(batches):
        # A reader may call this where gradients are off altogether, as panels do.
        with torch.inference_mode(False), torch.enable_grad():
            value = function(model, batch)
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                raise ValueError(f"the loss does not depend on {name}; leave it out.")
            if not bool(torch.isfinite(gradient).all()):
                raise ValueError(
                    f"the loss of calibration sample {number} is {float(value.detach())}, and the "
                    f"gradient of {name} is not finite."
                )
        yield dict(zip(leaves, found, strict=True))


def weight_leaves(
    model: nn.Module, layers: LayerChoice = "*"
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A twin of a model in evaluation mode, and the weights of its linear layers to derive by.

    The twin's weights lie in the same memory, so that a frozen model has gradients too.
    """
    twin = share(model).eval()
    leaves: dict[str, Tensor] = {}
    with torch.inference_mode(False):
        for name, layer in linears(twin, layers).items():
            weight = layer.weight.detach()
            layer.weight = nn.Parameter(weight.clone() if weight.is_inference() else weight)
            leaves[name] = layer.weight
    return twin, leaves


def mean_gradients(
    model: nn.Module,
    calibration: Batches,
    *,
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    """Gradient of every fitting linear layer's weight, the mean over all tokens, in float32.

    Gradients are averaged *before* any absolute value is taken: the mean of $|w g|$ over batches
    would mostly measure their noise.

    Args:
        model: The model; it is not changed, and need not ask for gradients.
        calibration: See `loss_batches`.
        loss: From (model, batch) to a scalar, whose batches count equally; None for language
            modelling, where each token does.
        layers: Name patterns of the layers.

    Raises:
        ValueError: What `loss_batches` and `each_gradient` refuse, or no fitting layer.
    """
    batches, report = loss_batches(model, calibration, loss), Calibration.of(calibration).report
    twin, leaves = weight_leaves(model, layers)
    sums: dict[str, Tensor] = {}
    total = 0
    for done, found in enumerate(each_gradient(twin, leaves, batches, loss), 1):
        weight = target_count(batches[done - 1]) if loss is None else 1
        total += weight
        for name, gradient in found.items():
            kind = torch.promote_types(gradient.dtype, torch.float32)
            part = gradient.to(kind) * weight
            sums[name] = sums[name].add_(part) if name in sums else part
        report(done, len(batches))
    return {name: part / total for name, part in sums.items()}


def fisher_diagonal(
    model: nn.Module,
    calibration: Batches,
    *,
    loss: Loss | None = None,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    r"""$F_{qq} = \frac1N \sum_n g_{nq}^2$ over single sequences, an estimate of $H_{qq}$.

    It is the diagonal of the empirical Fisher matrix, which stands for the Hessian of a
    log-likelihood near a minimum. The gradients are those of single samples: the square of a
    batch's mean gradient is smaller.

    Args:
        model: The model; it is not changed, and need not ask for gradients.
        calibration: See `loss_batches`; keyword arguments are cut into their sequences. With a loss
            of one's own, anything else must be single samples.
        loss: From (model, sample) to a scalar; None for language modelling.
        layers: Name patterns of the layers.

    Raises:
        ValueError: What `loss_batches` and `each_gradient` refuse, or no fitting layer.
    """
    given = Calibration.of(calibration).one_by_one()
    samples, report = sequences_of(loss_batches(model, given, loss), loss), given.report
    twin, leaves = weight_leaves(model, layers)
    sums: dict[str, Tensor] = {}
    for done, found in enumerate(each_gradient(twin, leaves, samples, loss), 1):
        for name, gradient in found.items():
            kind = torch.promote_types(gradient.dtype, torch.float32)
            square = gradient.to(kind).square()
            sums[name] = sums[name].add_(square) if name in sums else square
        report(done, len(samples))
    return {name: total / len(samples) for name, total in sums.items()}
