"""One small trainer for every chapter that trains.

The loop is the ordinary one: AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
2019, arXiv 1711.05101), a learning rate that warms up, stays and decays, gradients clipped by
their global norm, an optional early stop, and a checkpoint from which a run goes on as if it had
never stopped. What it trains is up to the caller: a model, a function from step to batch, and a
function from (model, batch) to a loss.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine", "wsd"]
Batches = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], Tensor]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being a finite number."""


@dataclass(frozen=True)
class TrainingSettings:
    """What a run does; everything that a result depends on besides the data and the model.

    Attributes:
        steps: Number of optimiser steps.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which the rate rises linearly from 0 to its peak.
        schedule: What the rate does after the warm-up. "constant" stays; "linear" and "cosine"
            fall to 0 at the last step; "wsd" (warm-up, stable, decay) stays, then falls linearly
            to 0 over the last `decay_fraction` of the steps.
        decay_fraction: Part of the steps that "wsd" decays over.
        weight_decay: Decoupled weight decay, on tensors of two dimensions or more only.
        betas: Decay rates of AdamW's moment estimates.
        clip_norm: Largest global norm of the gradient; longer gradients are scaled down to it.
        evaluate_every: Steps between calls of `evaluate`; 0 evaluates at the end only.
        patience: Stop after this many evaluations without a new best; 0 never stops early.
        seed: Seed of everything random inside the model (dropout), step by step.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    decay_fraction: float = 0.3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    evaluate_every: int = 0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must lie between 0 and steps ({self.steps})."
            )
        if self.schedule not in ("constant", "linear", "cosine", "wsd"):
            raise ValueError(
                f"schedule is {self.schedule!r}; choose constant, linear, cosine or wsd."
            )
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; it must lie in (0, 1].")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be above 0.")

    def rate(self, step: int) -> float:
        r"""Learning rate of step 0, 1, …, `steps` - 1.

        With peak rate $\eta$, $w$ warm-up steps and $n$ steps, $\eta \, (t + 1) / w$ while $t < w$;
        then $\eta \cdot r(p)$ with $p = (t - w) / (n - w)$ and $r = 1$, $1 - p$,
        $(1 + \cos \pi p) / 2$ or $\min(1, (1 - p) / d)$ for the four schedules in turn.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        p = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1 - p,
            "cosine": (1 + math.cos(math.pi * p)) / 2,
            "wsd": min(1.0, (1 - p) / self.decay_fraction),
        }[self.schedule]
        return self.learning_rate * factor


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        losses: Training loss of every step.
        evaluations: What `evaluate` returned, each with the key "step" (steps done before it).
        steps: Steps done, fewer than asked for after an early stop.
        seconds: Time spent, over all resumed parts.
        stopped_early: Whether patience ran out.
    """

    losses: list[float] = field(repr=False)
    evaluations: list[dict[str, float]]
    steps: int
    seconds: float
    stopped_early: bool = False


def causal_lm_loss(model: nn.Module, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    r"""Mean next-token cross-entropy, $-\frac1N \sum_t \log p(x_{t+1} \mid x_{\le t})$, in nats.

    `batch` holds token ids of shape (batch, time), or a pair (ids, labels) of that shape in which
    a label of -100 is not counted. Labels are aligned with the ids; the shift happens here.
    """
    ids, labels = batch if isinstance(batch, tuple) else (batch, batch)
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )


def adamw(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; vectors (gains, biases) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train.")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def train(
    model: nn.Module,
    batches: Batches,
    settings: TrainingSettings,
    *,
    loss: Loss = causal_lm_loss,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 180.0,
    progress: bool | Callable[[int, int, float], None] = False,
) -> TrainingResult:
    """Train the parameters of `model` that require gradients, in place.

    This is the one place where a model is changed in place: methods copy first.

    Args:
        model: The model; it is left in evaluation mode.
        batches: From the step's number to its batch. A pure function, so that a resumed run sees
            the same batches.
        settings: Steps, rates, seeds.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers; "loss" among them decides early stopping, and
            the weights with the lowest are put back at the end when `patience` is above 0.
        checkpoint: A file to save to, at most every `checkpoint_seconds`, and to go on from when
            it exists. Written atomically, as safetensors.
        checkpoint_seconds: Least time between two saves.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        TrainingDiverged: When the loss or the gradient is not finite; says at which step.
        ValueError: When nothing requires a gradient, or the checkpoint is of other settings.
    """
    optimizer = adamw(model, settings)
    losses: list[float] = []
    evaluations: list[dict[str, float]] = []
    spent = 0.0
    best: dict[str, Tensor] | None = None
    since_best = 0
    path = Path(checkpoint) if checkpoint else None
    if path and path.exists():
        losses, evaluations, spent = _resume(path, model, optimizer, settings)
    report, close = _progress(progress, settings.steps)
    device = next(model.parameters()).device
    began = saved = time.perf_counter()
    stopped = False
    if settings.patience and evaluate is None:
        raise ValueError("patience needs `evaluate`, which was not given.")

    def assess(step: int) -> bool:
        """Evaluate; return whether patience has run out."""
        nonlocal best, since_best
        model.eval()
        with torch.inference_mode():
            found = {"step": step, **evaluate(model)}
        evaluations.append(found)
        if not settings.patience:
            return False
        if "loss" not in found:
            raise ValueError('patience needs `evaluate` to return a number named "loss".')
        if found["loss"] <= min(e["loss"] for e in evaluations):
            best, since_best = {k: v.clone() for k, v in model.state_dict().items()}, 0
        else:
            since_best += 1
        return since_best >= settings.patience

    # Callbacks of widgets run in threads of their own, where gradients may be switched off.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for step in range(len(losses), settings.steps):
            # Seeded by step, so that a resumed run draws the same dropout masks.
            torch.manual_seed(settings.seed * 1_000_003 + step)
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            value = loss(model, batches(step))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], settings.clip_norm
            )
            number = float(value.detach())
            if not (math.isfinite(number) and math.isfinite(float(norm))):
                close()
                raise TrainingDiverged(
                    f"training diverged at step {step}: the loss is {number} and the gradient's norm "
                    f"{float(norm)} at learning rate {settings.rate(step):.3g}; try a lower rate."
                )
            optimizer.step()
            losses.append(number)
            report(step + 1, settings.steps, number)
            if evaluate and settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                stopped = assess(step + 1)
            if path and (time.perf_counter() - saved > checkpoint_seconds):
                seconds = spent + time.perf_counter() - began
                _save(path, model, optimizer, settings, losses, evaluations, seconds)
                saved = time.perf_counter()
            if stopped:
                break
        if evaluate and (not evaluations or evaluations[-1]["step"] != len(losses)):
            assess(len(losses))
    close()
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    seconds = spent + time.perf_counter() - began
    if path:
        _save(path, model, optimizer, settings, losses, evaluations, seconds)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return TrainingResult(losses, evaluations, len(losses), seconds, stopped)


def _progress(progress: bool | Callable, steps: int) -> tuple[Callable, Callable]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return (lambda *_: None), (lambda: None)
    from tqdm.auto import tqdm

    bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def report(done: int, _: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(done - bar.n)

    return report, bar.close


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _save(path, model, optimizer, settings, losses, evaluations, seconds) -> None:
    tensors = {}
    for name, parameter in _trainable(model):
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
    about = {
        "settings": asdict(settings),
        "losses": losses,
        "evaluations": evaluations,
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"effnb": json.dumps(about)})
    os.replace(temporary, path)  # atomic: a run cut off while saving leaves the last one whole


def _resume(path, model, optimizer, settings) -> tuple[list[float], list[dict], float]:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["effnb"])
        wanted, found = json.loads(json.dumps(asdict(settings))), about["settings"]
        changed = sorted(key for key in wanted if wanted[key] != found.get(key))
        if changed:
            raise ValueError(
                f"the checkpoint {path.name} was made with another {', '.join(changed)}; "
                "delete it to start again, or use its settings."
            )
        names = set(file.keys())
        with torch.no_grad():
            for name, parameter in _trainable(model):
                parameter.copy_(file.get_tensor(f"model.{name}"))
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {
                    key: file.get_tensor(f"optimizer.{key}.{name}")
                    for key in keys
                    if f"optimizer.{key}.{name}" in names
                }
                # AdamW keeps its step counter on the CPU, its moments beside the parameter.
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }
    return about["losses"], about["evaluations"], about["seconds"]
