"""One small trainer for every chapter that trains.

The loop is the ordinary one: AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
2019, arXiv 1711.05101) or the optimizers given in its place, a learning rate that warms up, stays
and decays, gradients clipped by their global norm, an optional early stop, and a checkpoint from
which a run goes on as if it had never stopped. What it trains is up to the caller: a model, a
function from step to batch, and a function from (model, batch) to a loss.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Batches = Callable[[int], Any]
Optimizers = list[torch.optim.Optimizer]
Loss = Callable[[nn.Module, Any], Tensor]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being a finite number."""


@dataclass(frozen=True)
class TrainingSettings:
    """What a run does; everything that a result depends on besides the data and the model.

    Attributes:
        steps: Number of optimizer steps.
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
    schedule: str = "constant"
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
                f"warmup_steps is {self.warmup_steps}; it must lie between 0 and steps "
                f"({self.steps})."
            )
        if self.schedule not in ("constant", "linear", "cosine", "wsd"):
            raise ValueError(
                f"schedule is {self.schedule!r}; choose constant, linear, cosine or wsd."
            )
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; it must lie in (0, 1].")
        if self.patience < 0 or self.evaluate_every < 0:
            raise ValueError(
                f"patience is {self.patience} and evaluate_every {self.evaluate_every}; "
                "both must be at least 0."
            )
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
    evaluations: list[dict[str, Any]]
    steps: int
    seconds: float
    stopped_early: bool = False


def causal_lm_loss(
    model: nn.Module, batch: Tensor | tuple[Tensor, Tensor] | Mapping[str, Any]
) -> Tensor:
    r"""Mean next-token cross-entropy, $-\frac1N \sum_t \log p(x_{t+1} \mid x_{\le t})$, in nats.

    `batch` holds token ids of shape (batch, time), or a pair (ids, labels) of that shape in which
    a label of -100 is not counted, or keyword arguments for the model as `next_token_loss` takes
    them. Labels are aligned with the ids; the shift happens here.
    """
    if isinstance(batch, Mapping):
        return next_token_loss(model, batch)
    ids, labels = batch if isinstance(batch, tuple) else (batch, batch)
    return _next_token(model(input_ids=ids, use_cache=False).logits, labels)


def next_token_loss(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
    """`causal_lm_loss` of a batch of keyword arguments, over the tokens that `targets` says.

    `batch` holds `input_ids` of shape (batch, time) and whatever else the model takes; all of it
    but `labels` is passed on.
    """
    losses, counted = target_losses(model, batch)
    return losses.sum() / counted.sum()


def target_losses(
    model: Callable[..., Any], batch: Mapping[str, Any]
) -> tuple[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    r"""$-\log p$ of every target of a batch, 0 where there is none, and where there is one.

    With `decoder_input_ids` in the batch (an encoder-decoder) position t of the logits foresees
    label t, otherwise label t + 1.
    """
    labels = targets(batch)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if "decoder_input_ids" not in batch:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none"
    )
    return losses, labels != -100


def targets(batch: Mapping[str, Any]) -> Int[Tensor, "batch time"]:
    """The labels of a batch, aligned with its ids; -100 for what says nothing of the text.

    A token is left out when it is padding, and when what precedes it is not its own text, from
    which it could be foreseen: padding, or another document in the same row (there positions do not
    go on by one, or a mask of four dimensions hides it). Where the batch has `labels`, these count,
    and are thinned out in the same way; with `decoder_input_ids` they are of another text, and stay
    as they are.

    Raises:
        ValueError: When there is not one label for each token.
    """
    decoder = batch.get("decoder_input_ids")
    ids = batch["input_ids"] if decoder is None else decoder
    labels = batch.get("labels", ids)
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, the ids {tuple(ids.shape)}; a next-token "
            "loss needs one label for each token, so give a `loss` for anything else."
        )
    if decoder is not None:
        return labels
    follows = torch.ones_like(labels[:, 1:], dtype=torch.bool)
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim == 2:
        follows = follows & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    elif mask is not None and mask.ndim == 4 and mask.shape[-1] == mask.shape[-2]:
        # Of the heads any one; an additive mask is 0 where a token is seen.
        seen = mask[:, 0] > -1 if mask.is_floating_point() else mask[:, 0] != 0
        follows = follows & seen.diagonal(-1, 1, 2) & seen.diagonal(0, 1, 2)[:, 1:]
    if positions is not None and positions.ndim == 2:
        follows = follows & (positions[:, 1:] == positions[:, :-1] + 1)
    first = labels[:, :1]  # nothing foresees it
    return torch.cat([first, labels[:, 1:].masked_fill(~follows, -100)], 1)


def target_count(batch: Mapping[str, Any]) -> int:
    """How many tokens `next_token_loss` averages over."""
    labels = targets(batch)
    return int(((labels if "decoder_input_ids" in batch else labels[:, 1:]) != -100).sum())


def _next_token(logits: Tensor, labels: Tensor) -> Tensor:
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
    optimizers: Callable[[nn.Module, TrainingSettings], Optimizers] | None = None,
) -> TrainingResult:
    """Train the parameters of `model` that require gradients, in place.

    This is the one place where a model is changed in place: methods copy first.

    Args:
        model: The model; it is left in evaluation mode.
        batches: From the step's number to its batch. A pure function, so that a resumed run sees
            the same batches. A list is a batch in parts: their gradients are averaged.
        settings: Steps, rates, seeds.
        loss: From (model, batch) to a scalar.
        evaluate: From the model to named numbers; "loss" among them decides early stopping, and
            the weights with the lowest are put back at the end when `patience` is above 0.
        checkpoint: A file to save to, at most every `checkpoint_seconds`, and to go on from when
            it exists. Written atomically, as safetensors.
        checkpoint_seconds: Least time between two saves.
        progress: True for a progress bar; or a function of (steps done, steps, loss).
        optimizers: From (model, settings) to the optimizers, each over its own parameters;
            AdamW over all of them where None. A group's rate follows the schedule in proportion.

    Raises:
        TrainingDiverged: When the loss or the gradient is not finite; says at which step.
        ValueError: When nothing requires a gradient, or the checkpoint is of other settings. Only
            `steps` may differ, as long as the schedule gives every step done the same rate.
    """
    if settings.patience and evaluate is None:
        raise ValueError("patience needs `evaluate`, which was not given.")
    chosen = optimizers(model, settings) if optimizers else [adamw(model, settings)]
    run = _Run(model, chosen, settings)
    path = Path(checkpoint) if checkpoint else None
    if path and path.exists():
        run.resume(path)
    report, close = _progress(progress, settings.steps)
    began = saved = time.perf_counter()
    earlier = run.seconds

    # Callbacks of widgets run in separate threads, where gradients may be switched off.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        while len(run.losses) < settings.steps and not run.out_of_patience:
            step = len(run.losses)
            # Seeded by step, so that a resumed run draws the same dropout masks.
            torch.manual_seed(settings.seed * 1_000_003 + step)
            try:
                run.losses.append(run.step(loss, batches(step)))
            except TrainingDiverged:
                close()
                raise
            report(step + 1, settings.steps, run.losses[-1])
            if evaluate and settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                run.assess(evaluate)
            if path and time.perf_counter() - saved > checkpoint_seconds:
                run.seconds = earlier + time.perf_counter() - began
                run.save(path)
                saved = time.perf_counter()
        if evaluate and (not run.evaluations or run.evaluations[-1]["step"] != len(run.losses)):
            run.assess(evaluate)
    close()
    run.seconds = earlier + time.perf_counter() - began
    if path:
        run.save(path)
    if run.best is not None:
        with torch.no_grad():
            for name, parameter in run.trainable:
                parameter.copy_(run.best[name])
    model.eval()
    return TrainingResult(
        run.losses, run.evaluations, len(run.losses), run.seconds, run.out_of_patience
    )


class _Run:
    """The state of a run: all that a checkpoint has to hold."""

    def __init__(
        self, model: nn.Module, optimizers: Optimizers, settings: TrainingSettings
    ) -> None:
        self.model, self.optimizers, self.settings = model, optimizers, settings
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.shares = [(group, group["lr"] / settings.learning_rate) for group in groups]
        self.owner = {
            id(parameter): optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        left_out = [name for name, p in self.trainable if id(p) not in self.owner]
        if left_out:
            raise ValueError(
                f"no optimizer has {left_out[0]} ({len(left_out)} parameters in all); freeze it or "
                "give it to one."
            )
        self.losses: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self.seconds = 0.0

    def step(self, loss: Loss, batch: Any) -> float:
        """One optimizer step; returns the loss before it."""
        number = len(self.losses)
        rate = self.settings.rate(number)
        self.model.train()
        for group, share in self.shares:
            group["lr"] = rate * share
        for _, parameter in self.trainable:
            parameter.grad = None
        parts = batch if isinstance(batch, list) else [batch]
        found = 0.0
        for part in parts:
            value = loss(self.model, part) / len(parts)
            value.backward()
            found += float(value.detach())
        norm = float(
            nn.utils.clip_grad_norm_([p for _, p in self.trainable], self.settings.clip_norm)
        )
        if not (math.isfinite(found) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"training diverged at step {number}: the loss is {found} and the gradient's norm "
                f"{norm} at learning rate {rate:.3g}; try a lower rate."
            )
        for optimizer in self.optimizers:
            optimizer.step()
        return found

    def assess(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        """Evaluate; with patience, keep a copy of the weights if they are the best so far."""
        self.model.eval()
        with torch.inference_mode():
            found = {"step": len(self.losses), **evaluate(self.model)}
        self.evaluations.append(found)
        if self.settings.patience:
            if "loss" not in found:
                raise ValueError('patience needs `evaluate` to return a number named "loss".')
            if self._since_best() == 0:
                self.best = {name: p.detach().clone() for name, p in self.trainable}

    def _since_best(self) -> int:
        """Evaluations since the best one."""
        scores = [e["loss"] for e in self.evaluations]
        return len(scores) - 1 - scores.index(min(scores))

    @property
    def out_of_patience(self) -> bool:
        """Whether too many evaluations have passed without a new best."""
        patience = self.settings.patience
        return bool(patience and self.evaluations) and self._since_best() >= patience

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically: a run cut off while saving leaves the last one whole."""
        tensors = {}
        for name, parameter in self.trainable:
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            state = self.owner[id(parameter)].state.get(parameter, {})
            for key, value in state.items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
            if self.best is not None:
                tensors[f"best.{name}"] = self.best[name].contiguous()
        about = {
            "settings": asdict(self.settings),
            "losses": self.losses,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, metadata={"effnb": json.dumps(about)})
        os.replace(temporary, path)

    def _same_so_far(self, found: dict[str, Any], done: int) -> bool:
        """Whether a run of another length would have done the same steps until now."""
        try:
            earlier = TrainingSettings(**{**found, "betas": tuple(found["betas"])})
        except (TypeError, ValueError):
            return False
        return done <= self.settings.steps and all(
            earlier.rate(step) == self.settings.rate(step) for step in range(done)
        )

    def resume(self, path: Path) -> None:
        """Go back to the state of a checkpoint.

        Raises:
            ValueError: When it was made with other settings.
        """
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["effnb"])
            wanted, found = json.loads(json.dumps(asdict(self.settings))), about["settings"]
            changed = sorted(key for key in wanted if wanted[key] != found.get(key))
            if changed == ["steps"] and self._same_so_far(found, len(about["losses"])):
                changed = []
            if changed:
                raise ValueError(
                    f"the checkpoint {path.name} was made with another {', '.join(changed)}; "
                    "delete it to start again, or use its settings."
                )
            names = set(file.keys())
            with torch.no_grad():
                for name, parameter in self.trainable:
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    self.owner[id(parameter)].state[parameter] = {
                        # AdamW keeps its counter on the CPU, its moments beside the parameter.
                        key: file.get_tensor(f"optimizer.{key}.{name}").to(
                            "cpu" if key == "step" else parameter.device
                        )
                        for key in ("step", "exp_avg", "exp_avg_sq", "momentum")
                        if f"optimizer.{key}.{name}" in names
                    }
            if any(name.startswith("best.") for name in names):
                self.best = {
                    name: file.get_tensor(f"best.{name}").to(p.device) for name, p in self.trainable
                }
        self.losses, self.evaluations = about["losses"], about["evaluations"]
        self.seconds = about["seconds"]


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
