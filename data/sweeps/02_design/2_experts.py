"""The stored measurements of `notebooks/02_design/2_experts` (`make results`).

    python data/sweeps/02_design/2_experts.py            # every part
    python data/sweeps/02_design/2_experts.py grid       # this part

Each part is written to `data/results/02_design/2_experts/<part>.json`, row by row; `--resume` goes
on. Idle times on one core:

grid      twins with 1 to 16 experts, other routers, capacities and weights of the loss for balance:
          losses, loads and drops, three seeds, 33 trainings (20 min)
upcycled  `mini-1m` up-cycled into 4 experts and trained on, beside the dense model trained as long
          (4 min)
compressed  the same up-cycled model at 4 bits and at half of its weights, by three methods (2 min)
speed     a layer of experts and transformers' Mixtral block, forward and backward (half a minute)

The tables behind the verdicts are those of `2_experts_claims.py`.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from effnb.chapters.design.experts import methods, twins
from effnb.core.coverage import LeftOut
from effnb.design import experts
from effnb.inference.pruning import magnitude, wanda
from effnb.inference.quantization import gptq, rtn
from effnb.lab import load, sweeps
from effnb.lab._files import data_folder
from effnb.lab.sweeps import SEEDS, held_out_novel, run
from effnb.lab.texts import calibration_sequences, windows_of

DOCUMENTS = 24
COUNTS = (2, 4, 8, 16)
GRID: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    **{f"Switch {n}": {"method": "Switch", "count": n} for n in COUNTS},
    "GLaM 8": {"method": "GLaM"},
    "expert choice 8": {"method": "expert choice"},
    "entmax 8": {"method": "entmax"},
    "Switch 8, weight 0": {"method": "Switch", "auxiliary": 0.0},
    "Switch 8, weight 1": {"method": "Switch", "auxiliary": 1.0},
    "Switch 8, capacity 1": {"method": "Switch", "factor": 1.0},
}
UPCYCLED_STEPS, UPCYCLED_EXPERTS, UPCYCLED_RATE = 120, 4, 1e-3


class Table(sweeps.Table):
    """A table of this chapter."""

    chapter = "02_design/2_experts"


@cache
def tokenizer() -> Any:
    """The bench's; no model is loaded for it."""
    return AutoTokenizer.from_pretrained(data_folder() / "models" / "tokenizer")


@cache
def documents() -> list[Tensor]:
    """Windows of the held-out novel, as long as those of training."""
    return list(windows_of(tokenizer(), held_out_novel(), DOCUMENTS, twins.SHAPE[1]))


@cache
def read_by(seed: int, steps: int = twins.STEPS) -> list[Tensor]:
    """What every twin of a seed reads."""
    return twins.texts(tokenizer(), seed, steps)


def grid() -> None:
    """Losses, loads and drops over the knobs of the chapter."""
    table = Table("grid", steps=twins.STEPS, shape=list(twins.SHAPE), documents=DOCUMENTS)
    for seed in SEEDS:
        for name, one in GRID.items():

            def measure(seed: int = seed, one: dict[str, Any] = one) -> dict[str, Any]:
                batches = read_by(seed)
                model = twins.twin(
                    one["method"], one.get("count", 8), factor=one.get("factor", 1.25), seed=seed
                )
                history: list[tuple[float, float]] = []

                def watch(step: int, model: nn.Module) -> None:
                    if step % 20 == 0 and (found := twins.layers_of(model)):
                        history.append(
                            (round(sum(r.dropped for r in found) / len(found), 4),
                             round(sum(r.imbalance for r in found) / len(found), 3))
                        )  # fmt: skip

                began = time.process_time()
                weight = one.get("auxiliary", experts.AUXILIARY)
                twins.trained(model, batches, auxiliary=weight, seed=seed, watch=watch)
                seconds = round(time.process_time() - began, 1)
                found = twins.judged(model, documents()) | twins.sizes_of(model)
                found["loss"] = round(sum(found["documents"]) / DOCUMENTS, 5)
                if one["method"] == "expert choice":
                    found["prefixes"] = methods.prefix_losses(model, documents()[:4])
                return found | {"history": history, "seconds": seconds}

            table.add({"name": name, "seed": seed}, measure)


def upcycled_twin(seed: int, kind: str) -> nn.Module:
    """mini-1m trained on, dense or with experts."""
    model = load("mini-1m", device="cpu").model
    if kind != "dense":
        model = experts.upcycle(model, UPCYCLED_EXPERTS, experts.MIXTRAL, seed=seed)
    model = methods.copy_of(model)
    batches = read_by(50 + seed, UPCYCLED_STEPS)
    return methods.tuned(model, batches, UPCYCLED_RATE, seed)


def upcycled() -> None:
    """Up-cycling: what the copies gain by as much training as the dense model gets."""
    table = Table("upcycled", steps=UPCYCLED_STEPS, experts=UPCYCLED_EXPERTS)
    first = load("mini-1m", device="cpu").model
    start = {"dense": first, "up-cycled": experts.upcycle(first, UPCYCLED_EXPERTS)}
    for kind, model in start.items():
        table.add({"kind": kind, "steps": 0, "seed": 0}, lambda m=model: read(m))
    for seed in SEEDS:
        for kind in start:
            about = {"kind": kind, "steps": UPCYCLED_STEPS, "seed": seed}
            table.add(about, lambda seed=seed, kind=kind: read(upcycled_twin(seed, kind)))


def read(model: nn.Module) -> dict[str, Any]:
    """Losses of the held-out documents, and sizes."""
    found = twins.judged(model, documents()) | twins.sizes_of(model)
    found["loss"] = round(sum(found["documents"]) / DOCUMENTS, 5)
    return found


def compressed() -> None:
    """Fused experts under methods of compression: nothing is left out."""
    table = Table("compressed", experts=UPCYCLED_EXPERTS)
    model = upcycled_twin(0, "up-cycled")
    seen = calibration_sequences(tokenizer(), 0)
    ways = {
        "original": lambda m: m,
        "rounding to 4 bits": lambda m: rtn(m, 4, group_size=32),
        "GPTQ, 4 bits": lambda m: gptq(m, seen, 4, group_size=32),
        "magnitude, half": lambda m: magnitude(m, 0.5),
        "Wanda, half": lambda m: wanda(m, seen, 0.5),
    }
    for name, way in ways.items():

        def measure(way: Any = way) -> dict[str, Any]:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", LeftOut)
                small = way(model)
            left = sum(issubclass(w.category, LeftOut) for w in said)
            found = twins.judged(small, documents())
            return {
                "documents": found["documents"], "load": found["load"], "left_out": left,
                "loss": round(sum(found["documents"]) / DOCUMENTS, 5),
            }  # fmt: skip

        table.add({"way": name}, measure)


def speed() -> None:
    """A training step of the layer, beside transformers' block on the same weights."""
    table = Table("speed", tokens=512, hidden=128, width=256)
    for count in (4, 8, 16):
        config = MixtralConfig(
            hidden_size=128, intermediate_size=256, num_local_experts=count, num_experts_per_tok=2
        )
        theirs = MixtralSparseMoeBlock(config)
        ours = experts.ExpertLayer(128, 256, count, experts.MIXTRAL)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.05)
        ours.load_state_dict(methods.weights_of_block(theirs))
        x = torch.randn(1, 512, 128, requires_grad=True)

        def measure(ours: Any = ours, theirs: Any = theirs, x: Tensor = x) -> dict[str, Any]:
            seconds = methods.in_turn({"ours": ours, "transformers": theirs}, x, rounds=15)
            return {name: round(median(times), 6) for name, times in seconds.items()}

        table.add({"experts": count}, measure)


PARTS = {"grid": grid, "upcycled": upcycled, "compressed": compressed, "speed": speed}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
