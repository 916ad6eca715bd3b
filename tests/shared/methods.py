"""Every method of the workbook as a function from (model, batch) to a new model, with its oracle.

A method is run at a setting strong enough that forgetting a layer shows. `Method.oracle` recomputes
in float64, from hooks in the model's own forward, what the method should have done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import delta_methods
import torch
from torch import Tensor, nn

from effnb.core.deltas import delta_parameters, delta_state_dict, merge
from effnb.core.linear_form import linear_form
from effnb.core.modules import find_blocks, linears
from effnb.core.training import TrainingSettings
from effnb.finetuning import lora
from effnb.inference import low_rank, pruning, quantization

Batch = dict[str, Tensor]
STEPS = TrainingSettings(steps=3, learning_rate=1e-2)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of what the model is for, padding left out, in nats."""
    logits = model(**batch).logits
    if "decoder_input_ids" in batch:
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["decoder_input_ids"][:, 1:].flatten()
        )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if not model.config.is_encoder_decoder and "ForMaskedLM" in type(model).__name__:
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
    visible = batch["attention_mask"][:, :-1] == 1  # nothing is scored from a position of padding
    labels = labels[:, 1:].masked_fill(~visible, -100)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100
    )


# ---------------------------------------------------------------------- oracles


def dense(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every layer that is not an output head, whatever it is stored as, in float64.

    Names are those of the linear form, so that experts and Conv1D are compared as well.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    if "QuantizedLinear" in kinds:
        model = quantization.dequantized(model)
    if "LowRankLinear" in kinds:
        model = low_rank.dense(model)
    plain, _ = linear_form(model)
    return {name: layer.weight.detach().double() for name, layer in linears(plain).items()}


def each_weight(function: Callable[[Tensor], Tensor]):
    """An oracle for methods that need no data: the weight alone decides."""

    def oracle(model: nn.Module, result: nn.Module, batch: Batch) -> None:
        found = dense(result)
        for name, weight in dense(model).items():
            want = function(weight.float()).double()
            assert (found[name] - want).norm() <= 2e-3 * weight.norm(), name

    return oracle


def inputs_of(model: nn.Module, names: list[str], batch: Batch) -> dict[str, Tensor]:
    """What reaches each layer in the model's own forward, tokens in rows; there is no padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def stacks(model: nn.Module) -> list[str]:
    """Every block of the model by name, in the order in which data passes them."""
    if model.config.is_encoder_decoder:
        return [
            f"{stack}.block.{i}"
            for stack in ("encoder", "decoder")
            for i in range(len(model.get_submodule(f"{stack}.block")))
        ]
    name, blocks = find_blocks(model)
    return [f"{name}.{i}" for i in range(len(blocks))]


def layer_by_layer(core: Callable[[Tensor, Tensor], Tensor], tolerance: float = 0.02):
    """An oracle for the layer-wise methods: (weight, inputs) decide, blocks before compressed.

    `tolerance` is the part of the output, on the data, in which ties may have fallen otherwise.
    """

    def oracle(model: nn.Module, result: nn.Module, batch: Batch) -> None:
        hybrid, _ = linear_form(model.double())
        found = dense(result)
        layers = linears(hybrid)
        for block in stacks(hybrid):
            names = [name for name in layers if name.startswith(f"{block}.")]
            seen = inputs_of(hybrid, names, batch)
            for name in names:
                weight = layers[name].weight.detach()
                if name not in seen:  # an expert that no token reached
                    continue
                want = core(weight, seen[name]).double()
                scale = (seen[name] @ weight.T).norm()
                wrong = (seen[name] @ (found[name] - want).T).norm()
                assert wrong <= tolerance * scale, (name, float(wrong / scale))
            with torch.no_grad():
                for name in names:
                    layers[name].weight.copy_(found[name])

    return oracle


def hessian(x: Tensor) -> Tensor:
    """$H = \\frac{2}{N} X^T X$."""
    return (2 / len(x)) * x.T @ x


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss's gradient for each layer, by autograd through the model's own forward."""
    twin, _ = linear_form(model.double())
    layers = linears(twin)
    for layer in layers.values():
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    with torch.enable_grad():
        loss(twin, batch).backward()
    return {
        name: torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
        for name, layer in layers.items()
    }


def global_scores(score: Callable[[Tensor, Tensor], Tensor], sparsity: float = 0.5):
    """An oracle for methods that compare the scores of all weights of a model."""

    def oracle(model: nn.Module, result: nn.Module, batch: Batch) -> None:
        grads = gradients(model, batch)
        weights, found = dense(model), dense(result)
        scores = torch.cat([score(weights[n], grads[n]).flatten() for n in weights])
        kept = torch.cat([(found[n] != 0).flatten() for n in weights])
        count = round(sparsity * scores.numel())
        want = torch.ones_like(kept)
        want[scores.argsort()[:count]] = False
        assert (want != kept).float().mean() < 0.01

    return oracle


def fisher_scores(model: nn.Module, result: nn.Module, batch: Batch) -> None:
    """An oracle for OBD: $w^2$ times the squared gradients, squared sequence by sequence."""
    rows = len(batch["input_ids"])
    squares: dict[str, Tensor] = {}
    for r in range(rows):
        one = {key: value[r : r + 1] for key, value in batch.items()}
        for name, gradient in gradients(model.float(), one).items():
            squares[name] = squares.get(name, 0) + gradient.square()
    weights, found = dense(model), dense(result)
    scores = torch.cat([(weights[n].square() * squares[n]).flatten() for n in weights])
    kept = torch.cat([(found[n] != 0).flatten() for n in weights])
    want = torch.ones_like(kept)
    want[scores.argsort()[: round(0.5 * scores.numel())]] = False
    assert (want != kept).float().mean() < 0.01


def same_function(model: nn.Module, result: nn.Module, batch: Batch) -> None:
    """An oracle for what must not change the function at all."""
    with torch.no_grad():
        torch.testing.assert_close(
            result(**batch).logits, model(**batch).logits, atol=2e-3, rtol=1e-3
        )


def close_function(bound: float):
    """An oracle for fine rounding: outputs move, but only a little."""

    def oracle(model: nn.Module, result: nn.Module, batch: Batch) -> None:
        with torch.no_grad():
            before, after = model(**batch).logits, result(**batch).logits
        moved = (after - before).norm() / before.norm()
        assert 0 < moved < bound, float(moved)

    return oracle


def smaller(model: nn.Module, result: nn.Module, batch: Batch) -> None:
    """An oracle for structured pruning: an ordinary model of the same class, with less in it."""
    assert type(result) is type(model)
    size = sum(p.numel() for p in result.parameters())
    assert size < sum(p.numel() for p in model.parameters())


def tuned(model: nn.Module) -> nn.Module:
    """A model with a LoRA that is not zero, as after training."""
    result = lora.attach(model, rank=4, alpha=8.0)
    for i, (_, parameter) in enumerate(delta_parameters(result, "default").items()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data = 0.1 * noise
    return result


def added(model: nn.Module, result: nn.Module, batch: Batch) -> None:
    """An oracle for LoRA: $W + \\frac{\\alpha}{r} B A$ in every layer, in float64."""
    state = delta_state_dict(tuned(model), "default")
    twin, _ = linear_form(model.double())
    layers = linears(twin)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = (next(v for k, v in state.items() if k == f"{name}.{end}")
                    for end in ("A", "B"))  # fmt: skip
            layer.weight.copy_(layer.weight + (8.0 / 4) * B.double() @ A.double())
        want, found = twin(**batch).logits, result(**batch).logits
    assert (found - want).norm() <= 1e-3 * want.norm()


# ---------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A method, its oracle, and what it depends on.

    Attributes:
        run: From (model, batch) to a new model.
        oracle: Asserts that (model, result, batch) fit together.
        data: Whether calibration or training data decides anything.
        trains: Whether an optimizer's steps decide.
        file: How the result is stored: as the "model" of its class, "quantized", "factorized", as a
            "delta", or "none" where it is made of a stored model again.
        cache_bound: How much a cache may move the output, relative to its norm: float32's rounding,
            or that of a method that rounds what is in the cache, or single tokens, otherwise.
    """

    run: Callable[[nn.Module, Batch], nn.Module]
    oracle: Callable[[nn.Module, nn.Module, Batch], None]
    data: bool = False
    trains: bool = False
    file: str = "model"
    cache_bound: float = 2e-3


def _steps(batch: Batch):
    return lambda step: batch


def nf4(weight: Tensor) -> quantization.TableTensor:
    """NF4 in blocks of 16."""
    return quantization.quantize_table(weight, block_size=16)


SCHEDULE = pruning.CubicSchedule(0.5, 0, 2)
METHODS: dict[str, Method] = {
    # pruning, single weights
    "magnitude": Method(
        lambda m, b: pruning.magnitude(m, 0.5),
        each_weight(lambda w: w * pruning.magnitude_mask(w, 0.5, "layer")),
    ),
    "Wanda": Method(
        lambda m, b: pruning.wanda(m, [b], 0.5),
        layer_by_layer(lambda w, x: w * pruning.wanda_mask(w, x.norm(dim=0), 0.5)),
        data=True,
    ),
    "SparseGPT": Method(
        lambda m, b: pruning.sparsegpt(m, [b], 0.5),
        layer_by_layer(lambda w, x: pruning.sparsegpt_weight(w, hessian(x), 0.5).weight, 0.1),
        data=True,
    ),
    "OBS": Method(
        lambda m, b: pruning.obs(m, [b], 0.25),
        layer_by_layer(lambda w, x: pruning.obs_weight(w, hessian(x), 0.25).weight, 0.1),
        data=True,
    ),
    "Taylor": Method(
        lambda m, b: pruning.taylor(m, [b], 0.5, loss=loss),
        global_scores(lambda w, g: (w * g).abs()),
        data=True,
    ),
    "SNIP": Method(
        lambda m, b: pruning.snip(m, b, 0.5, loss=loss),
        global_scores(lambda w, g: (w * g).abs()),
        data=True,
    ),
    "OBD": Method(
        lambda m, b: pruning.obd(m, [b], 0.5, loss=loss),
        fisher_scores,
        data=True,
    ),
    "gradual magnitude": Method(
        lambda m, b: pruning.gradual(m, _steps(b), STEPS, SCHEDULE, loss=loss).model,
        close_function(10.0),
        data=True,
        trains=True,
    ),
    "movement": Method(
        lambda m, b: pruning.movement(m, _steps(b), STEPS, SCHEDULE, loss=loss).model,
        close_function(10.0),
        data=True,
        trains=True,
    ),
    "soft movement": Method(
        lambda m, b: (
            pruning.soft_movement(m, _steps(b), STEPS, SCHEDULE, penalty=0.1, loss=loss).model
        ),
        close_function(10.0),
        data=True,
        trains=True,
    ),
    # pruning, structures
    "head pruning": Method(
        lambda m, b: pruning.prune_heads(m, [b], 0.5, loss=loss).model, smaller, data=True
    ),
    "LLM-Pruner": Method(
        lambda m, b: pruning.llm_pruner(m, [b], 0.5, loss=loss).model, smaller, data=True
    ),
    "ShortGPT": Method(lambda m, b: pruning.shortgpt(m, [b], 1).model, smaller, data=True),
    "LoRAPrune": Method(
        lambda m, b: pruning.lora_prune(m, _steps(b), STEPS, 0.5, rank=4, every=1, loss=loss).model,
        smaller,
        data=True,
        trains=True,
    ),
    "width": Method(lambda m, b: pruning.width(m, [b], neurons=0.5).model, smaller, data=True),
    # low rank
    "SVD": Method(
        lambda m, b: low_rank.svd(m, rank=8),
        each_weight(lambda w: low_rank.truncated_svd(w, 8).product()),
        file="factorized",
    ),
    "ASVD": Method(
        lambda m, b: low_rank.asvd(m, [b], rank=8),
        layer_by_layer(lambda w, x: low_rank.asvd_weight(w, x.abs().mean(0), 8).product(), 0.05),
        data=True,
        file="factorized",
    ),
    "SVD-LLM": Method(
        lambda m, b: low_rank.svd_llm(m, [b], rank=8),
        layer_by_layer(lambda w, x: low_rank.svd_llm_weight(w, x.T @ x, 8).product(), 0.05),
        data=True,
        file="factorized",
    ),
    "FWSVD": Method(
        lambda m, b: low_rank.fwsvd(m, [b], rank=8, loss=loss),
        close_function(10.0),
        data=True,
        file="factorized",
    ),
    "low rank plus sparse": Method(
        lambda m, b: low_rank.low_rank_plus_sparse(m, 0.6), close_function(10.0), file="none"
    ),
    "tensor train": Method(
        lambda m, b: low_rank.tensor_train(m, 8, always=True), close_function(10.0), file="none"
    ),
    # quantization
    "RTN": Method(
        lambda m, b: quantization.rtn(m, 4),
        each_weight(lambda w: quantization.quantize(w, 4).dequantize()),
        file="quantized",
    ),
    "NF4": Method(
        lambda m, b: quantization.quantize_linears(m, nf4),
        each_weight(lambda w: nf4(w).dequantize()),
        file="quantized",
    ),
    "ternary": Method(
        lambda m, b: quantization.quantize_linears(m, quantization.ternarize),
        each_weight(lambda w: quantization.ternarize(w).dequantize()),
        file="quantized",
    ),
    "mixed precision": Method(
        lambda m, b: quantization.mixed_precision(
            m, dict.fromkeys(quantization.layer_bytes(m, (8,)), 8)
        ),
        each_weight(lambda w: quantization.quantize(w, 8).dequantize()),
        file="quantized",
    ),
    "GPTQ": Method(
        lambda m, b: quantization.gptq(m, [b], 4),
        layer_by_layer(lambda w, x: quantization.gptq_weight(w, hessian(x), 4).dequantize(), 0.1),
        data=True,
        file="quantized",
    ),
    "AWQ": Method(
        lambda m, b: quantization.awq(m, [b], 8), close_function(0.1), data=True, file="quantized"
    ),
    "W8A8": Method(
        lambda m, b: quantization.quantize_activations(m),
        close_function(0.2),
        file="none",
        cache_bound=0.02,
    ),
    "SmoothQuant": Method(lambda m, b: quantization.smooth(m, [b]), same_function, data=True),
    "SmoothQuant, W8A8": Method(
        lambda m, b: quantization.smoothquant(m, [b]),
        close_function(0.3),
        data=True,
        file="none",
        cache_bound=0.05,
    ),
    "LLM.int8()": Method(
        lambda m, b: quantization.llm_int8(m), close_function(0.2), file="none", cache_bound=0.02
    ),
    "rotation": Method(lambda m, b: quantization.rotate(m), same_function),
    "QuaRot": Method(
        lambda m, b: quantization.quarot(m, 8, 8),
        close_function(0.3),
        file="none",
        cache_bound=0.05,
    ),
    "KIVI": Method(
        lambda m, b: quantization.kivi(m, 8, residual=8, group_size=8),
        close_function(0.1),
        file="none",
        cache_bound=0.1,
    ),
    "QAT": Method(
        lambda m, b: quantization.convert(quantization.prepare_qat(m, 8)),
        close_function(0.2),
        file="quantized",
    ),
    "PEQA": Method(lambda m, b: quantization.peqa(m, 8), close_function(0.2), file="none"),
    "packed": Method(
        lambda m, b: quantization.fast(m, 8, head=False),
        close_function(0.2),
        file="none",
        cache_bound=0.02,
    ),
    # fine-tuning
    "LoRA": Method(lambda m, b: tuned(m), added, file="delta"),
    "LoRA, merged": Method(lambda m, b: merge(tuned(m), "default"), added),
    "QLoRA": Method(
        lambda m, b: quantization.qlora(m, rank=4, block_size=16),
        close_function(0.5),
        file="none",
    ),
    **{name: Method(*row, file="delta") for name, row in delta_methods.ROWS.items()},
}
