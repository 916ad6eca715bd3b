"""What the chapter on pruning measures live: the panel's methods, errors of a layer, movement."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.inference.quantization.methods import evaluated, output_error
from effnb.core.calibration import Hessian, layerwise
from effnb.core.outliers import inject_outliers
from effnb.core.training import TrainingSettings
from effnb.evaluation import latency, perplexity
from effnb.inference import pruning
from effnb.lab import corpora, load, subjects
from effnb.lab.bench import Bench, file_bytes
from effnb.lab.models import LoadedModel
from effnb.lab.quality import Subject
from effnb.lab.tables import Table, table

# --- the panel ------------------------------------------------------------------------------------

Method = Callable[..., nn.Module]
OUTLIERS = 16
"""One channel in this many is enlarged."""
TWO_OF_FOUR = ("magnitude", "SparseGPT")
"""The methods that the panel also has with the pattern 2:4."""


def with_outliers(model: nn.Module, factor: float) -> nn.Module:
    """The same function with every sixteenth channel enlarged; a factor of 0 leaves it alone."""
    if not factor:
        return model
    return inject_outliers(model, range(0, model.config.hidden_size, OUTLIERS), float(factor))


def single_weights(calibration: Int[Tensor, "batch time"]) -> dict[str, Method]:
    """Methods that set single weights to zero, as functions of (model, share, pattern)."""
    few = calibration[: max(1, len(calibration) // 2)]  # gradients take longer than activations

    def at_random(model: nn.Module, share: float | None, pattern: str) -> nn.Module:
        like = pruning.masks_of(pruning.magnitude(model, share, pattern=pattern))
        return pruning.apply_masks(model, pruning.random_masks(like))

    def wanda(model: nn.Module, share: float | None, pattern: str) -> nn.Module:
        return pruning.wanda(
            model, calibration, share, pattern="row" if pattern == "layer" else pattern
        )

    def sparsegpt(model: nn.Module, share: float | None, pattern: str, **grid: Any) -> nn.Module:
        return pruning.sparsegpt(model, calibration, share, pattern=pattern, **grid)

    return {
        "magnitude": lambda model, share, pattern: pruning.magnitude(model, share, pattern=pattern),
        "Wanda": wanda,
        "SparseGPT": sparsegpt,
        "SparseGPT, 4 bits": partial(sparsegpt, bits=4, group_size=64),
        "Taylor": lambda model, share, pattern: pruning.taylor(model, few, share, pattern=pattern),
        "OBD": lambda model, share, pattern: pruning.obd(model, few, share, pattern=pattern),
        "random": at_random,
    }


def structure_scores(calibration: Int[Tensor, "batch time"]) -> dict[str, Callable[..., Any]]:
    """What scores whole structures, as functions of a model."""
    few = calibration[: max(1, len(calibration) // 2)]

    def active(model: nn.Module, *kinds: str) -> dict[str, Tensor]:
        found = pruning.activation_importance(model, calibration)
        return {kind: found[kind] for kind in kinds}

    def chance(model: nn.Module) -> dict[str, Tensor]:
        found = pruning.random_scores(model)
        return {kind: found[kind] for kind in ("heads", "neurons")}

    return {
        "LLM-Pruner": lambda model: pruning.llm_pruner_scores(model, few),
        "heads": lambda model: {"heads": pruning.head_importance(model, few)},
        "width": lambda model: active(model, "heads", "neurons"),
        "channels": lambda model: active(model, "channels"),
        "ShortGPT": lambda model: {"layers": pruning.block_influence(model, calibration)},
        "random structures": chance,
    }


def remove_structures(model: nn.Module, scores: dict[str, Tensor], share: float) -> nn.Module:
    """Remove a share of each kind, rounded where there are few; at least one of each stays."""
    sizes = {
        "heads": getattr(model.config, "num_key_value_heads", 1),
        "layers": model.config.num_hidden_layers,
    }
    remove = {
        kind: min(round(share * sizes[kind]), sizes[kind] - 1) if kind in sizes else share
        for kind in scores
    }
    return pruning.prune_structures(model, scores, remove).model


def panel_methods(calibration: Int[Tensor, "batch time"]) -> dict[str, Method]:
    """Every method of the panel as a function of a model and of the knobs that it reads.

    The knobs are `sparsity` in per cent and `outliers`, the factor by which every sixteenth channel
    is enlarged before the model is pruned; 0 leaves it alone.

    Args:
        calibration: Token ids for the methods that look at data.
    """
    known: dict[tuple[str, float], dict[str, Tensor]] = {}

    def sparse(prune: Method) -> Method:
        def pruned(model: nn.Module, sparsity: float, outliers: float) -> nn.Module:
            return prune(with_outliers(model, outliers), sparsity / 100, "layer")

        return pruned

    def two_of_four(prune: Method) -> Method:
        def pruned(model: nn.Module, outliers: float) -> nn.Module:
            return prune(with_outliers(model, outliers), None, "2:4")

        return pruned

    def structured(name: str, score: Callable[..., Any]) -> Method:
        def pruned(model: nn.Module, sparsity: float, outliers: float) -> nn.Module:
            model = with_outliers(model, outliers)
            if (name, outliers) not in known:
                known[name, outliers] = score(model)
            return remove_structures(model, known[name, outliers], sparsity / 100)

        return pruned

    single = single_weights(calibration)
    return (
        {name: sparse(prune) for name, prune in single.items()}
        | {f"{name}, 2:4": two_of_four(single[name]) for name in TWO_OF_FOUR}
        | {name: structured(name, score) for name, score in structure_scores(calibration).items()}
    )


IDLE = {f"{name}, 2:4": "2:4 always removes half" for name in TWO_OF_FOUR}
"""Why a method of the panel leaves the sparsity alone."""


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a pruned model: its linear layers in their smallest form, the rest in 16 bits.

    Where what was kept is rounded to 4 bits in groups of 64, scales and zero points count too.
    """
    plain = evaluated(model)
    packed = plain is not model
    linear = sum(layer.weight.numel() for layer in pruning.masks.linears(plain).values())
    scales = linear * (16 + 4) // (64 * 8) if packed else 0
    rest = file_bytes(plain) - 2 * linear
    return pruning.storage_of(model, bits=4 if packed else 16).bytes + scales + rest


def subject(bench: Bench) -> Subject:
    """The bench's model and the panel's look at it; zeros are stored in the smallest form."""
    return subjects.subject(bench, evaluated, stored_bytes)


# --- one layer ------------------------------------------------------------------------------------


def hessian_of(model: nn.Module, calibration: Int[Tensor, "batch time"], name: str) -> Tensor:
    r"""$H = \frac2N X X^\top$ of one linear layer's inputs, in float64."""
    seen: list[Hessian] = []

    def observe(_: str, layer: nn.Linear) -> Hessian:
        seen.append(Hessian(layer.in_features, layer.weight.device))
        return seen[-1]

    layerwise(model, calibration, observe, lambda *_: None, layers=name)
    return seen[0].value.double().cpu()


def layer_errors(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], sparsity: float = 0.5
) -> dict[str, float]:
    r"""What each method does to the output: $\lVert \Delta W X \rVert^2 / \lVert W X \rVert^2$.

    The last two are slow: surgery weight by weight, and the best weights on SparseGPT's own choice.
    """
    found = pruning.sparsegpt_weight(weight, hessian, sparsity)
    norms = hessian.diagonal().sqrt()
    pruned = {
        "magnitude": weight * pruning.keep_mask(weight.abs(), sparsity, "row"),
        "Wanda": weight * pruning.wanda_mask(weight, norms, sparsity),
        "SparseGPT": found.weight,
        "SparseGPT, 16 columns at a time": pruning.sparsegpt_weight(
            weight, hessian, sparsity, block_size=16
        ).weight,
        "the best weights on its choice": pruning.least_squares_weight(weight, found.mask, hessian),
        "Optimal Brain Surgeon": pruning.obs_weight(weight, hessian, sparsity).weight,
    }
    whole = output_error(weight, hessian)
    return {name: output_error(new - weight, hessian) / whole for name, new in pruned.items()}


def errors_table(errors: dict[str, float]) -> Table:
    """What `layer_errors` found."""
    return table(
        [{"method": name, "of the output's energy": error} for name, error in errors.items()],
        {"method": "", "of the output's energy": ".1%"},
        caption="Half of the weights of one layer removed: the squared change of its output, as a "
        "part of the output's square.",
    )


def products(model: nn.Module) -> dict[str, float]:
    """Multiplications that half of all weights take: an update for each weight, or one walk."""
    shapes = [layer.weight.shape for layer in pruning.masks.linears(model).values()]
    return {
        "surgery": sum(n_out * n_in // 2 * n_in**2 for n_out, n_in in shapes),
        "SparseGPT": sum(n_out * n_in**2 // 2 for n_out, n_in in shapes),
    }


def outlier_masks(
    model: nn.Module, calibration: Int[Tensor, "batch time"], factor: float = 8.0
) -> dict[str, tuple[float, float, bool]]:
    """How magnitude and Wanda treat the columns that read enlarged channels, at half sparsity.

    The factor is a power of two, so that nothing is rounded and masks can be compared.

    Returns:
        For each method, the share of these columns' weights that stays without and with outliers,
        and whether both masks are the same.
    """
    columns = slice(0, None, OUTLIERS)
    prune: dict[str, Method] = {
        "magnitude": lambda m: pruning.magnitude(m, 0.5),
        "Wanda": lambda m: pruning.wanda(m, calibration, 0.5),
    }
    found = {}
    for name, method in prune.items():
        plain, changed = (
            pruning.masks_of(method(m), layers=["*.q_proj", "*.up_proj"])
            for m in (model, with_outliers(model, factor))
        )
        shares = [
            torch.cat([mask[:, columns].flatten() for mask in masks.values()]).float().mean().item()
            for masks in (plain, changed)
        ]
        found[name] = (*shares, all(torch.equal(plain[n], changed[n]) for n in plain))
    return found


# --- learning -------------------------------------------------------------------------------------


def german_batches(loaded: LoadedModel, tokens: int = 30_000) -> Callable[[int], Tensor]:
    """Eight random pieces of German package descriptions for every step of training."""
    ids: list[int] = []
    for one in corpora.translations("de", "train"):
        ids += loaded.tokenizer.encode(one.text, add_special_tokens=False, verbose=False)
        if len(ids) > tokens:
            break
    stream = torch.tensor(ids)

    def batch(step: int) -> Tensor:
        draw = random.Random(step)
        starts = [draw.randrange(len(stream) - 64) for _ in range(8)]
        return torch.stack([stream[start : start + 64] for start in starts])

    return batch


@dataclass(frozen=True)
class Learned:
    """One layer of a model that was pruned while it learned.

    Attributes:
        before: Its weights before training, flat.
        kept: For each way of pruning, which of them are left.
    """

    before: Float[Tensor, " n"]
    kept: dict[str, Tensor]

    def small_kept(self, way: str) -> float:
        """Which part of the smaller half of the weights a way keeps."""
        small = self.before.abs() < self.before.abs().median()
        return float(self.kept[way][small].float().mean())


def learn(loaded: LoadedModel, layer: str, sparsity: float = 0.5, steps: int = 40) -> Learned:
    """Fine-tune on German and prune meanwhile: by size, little by little, and by movement."""
    batches = german_batches(loaded)
    settings = TrainingSettings(
        steps=steps, learning_rate=1e-3, warmup_steps=steps // 10, schedule="cosine"
    )
    schedule = pruning.CubicSchedule(sparsity, begin=steps // 10, end=steps * 4 // 5)
    runs = {
        "magnitude": pruning.gradual(loaded.model, batches, settings, schedule),
        "movement": pruning.movement(
            loaded.model, batches, settings, schedule, score_learning_rate=3e-2
        ),
    }
    before = loaded.model.get_submodule(layer).weight.detach().flatten()
    return Learned(before, {name: run.masks[layer].flatten() for name, run in runs.items()})


def whole_share(pruned: nn.Module) -> float:
    """Which part of the removed weights lies in rows or columns that are gone as a whole."""
    masks = pruning.masks_of(pruned).values()
    whole = sum(int((~(mask.any(1, keepdim=True) & mask.any(0))).sum()) for mask in masks)
    return whole / sum(int((~mask).sum()) for mask in masks)


# --- time -----------------------------------------------------------------------------------------


def product_times(rounds: int = 9, runs: int = 5) -> Table:
    """How long one product takes here: dense, with zeros, as PyTorch's sparse matrix, smaller.

    All take their turns in every round, and a ratio is the median of the rounds' own: what else the
    machine does meets all of them alike.
    """
    draw = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(1536, 576, generator=draw), torch.randn(576, 64, generator=draw)
    half, rare = (weight * pruning.keep_mask(weight.abs(), share) for share in (0.5, 0.95))
    with warnings.catch_warnings():  # PyTorch notes that its sparse matrices are in beta
        warnings.simplefilter("ignore")
        products = {
            "dense": weight,
            "half zeros, dense kernel": half,
            "half zeros, CSR kernel": half.to_sparse_csr(),
            "95 % zeros, CSR kernel": rare.to_sparse_csr(),
            "half of the rows, dense kernel": weight[: len(weight) // 2].contiguous(),
        }
    ratios: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        seconds = {
            name: latency(partial(torch.matmul, one, tokens), runs=runs).minimum_seconds
            for name, one in products.items()
        }
        for name, found in ratios.items():
            found.append(seconds[name] / seconds["dense"])
    return table(
        [{"weight": name, "time / dense": median(found)} for name, found in ratios.items()],
        {"weight": "", "time / dense": ".2f"},
        caption="One weight of SmolLM2's size (1536 × 576) times 64 tokens, on this machine.",
    )


# --- the real model -------------------------------------------------------------------------------


def shorter_here(blocks: int = 3) -> str:
    """SmolLM2 without its least influential blocks: perplexity and time on this machine."""
    real = load("smollm2-135m", device="cpu")
    text = real.tokenizer(corpora.documents("novels", "test")[0], return_tensors="pt").input_ids
    calibration, held_out = text[:, :256], text[0, 256:768]
    said = []
    models = {
        "The original": real.model,
        f"Without {blocks} blocks SmolLM2": pruning.shortgpt(real.model, calibration, blocks).model,
    }
    for name, model in models.items():
        with torch.inference_mode():
            time = latency(partial(model, input_ids=calibration), warmup=1, runs=3)
        said.append(
            f"{name} has perplexity {perplexity(model, held_out).perplexity:.1f} and reads 256 "
            f"tokens in {time.median_seconds:.2f} s."
        )
    return " ".join(said)
