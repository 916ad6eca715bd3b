"""The stored measurements of `notebooks/05_inference/7_adaptive_computation`.

    python data/sweeps/05_inference/7_adaptive_computation.py [part ...] [--resume]

exits        loss of every exit, and layers against loss for each measure, with and without
             training of exits (2 min)
sections     MiniLM with a head after each layer: accuracy against layers for each rule (2 min)
speed        time per token over the threshold, by measure, and of one layer and the head (2 min)
speculative  acceptance, tokens for each pass and speed over the length of the draft (3 min)
cascade      answers and confidences of four models to the same questions (4 min)
sequences    confidences of whole texts, summed up in several ways (1 min)
smollm2      how many layers SmolLM2 needs, token by token, and how sure it is (3 min)

Times are for one idle core. Models are those of the bench and `mini-5m-exits`.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import torch

from effnb.evaluation.quality import choice_likelihoods
from effnb.inference.adaptive_computation import (
    branchynet,
    calm,
    cascades,
    classifiers,
    confidence,
    layers,
    layerskip,
    pabee,
    speculative,
)
from effnb.lab import load, sweeps
from effnb.lab.bench import Bench
from effnb.lab.sweeps import run

BASE, EXITS = "mini-5m", "mini-5m-exits"
CHAPTER = "05_inference/7_adaptive_computation"
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
NEAR = (0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.98, 1.0)
"""Thresholds of saturation, which moves in another range."""
WINDOWS, CALIBRATION = 12, (6, 256)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 6, 24, 32, 5
TURNS = (1, 2, 3, 4, 6, 8)
"""Lengths of a draft."""


class Table(sweeps.Table):
    """Rows of this chapter."""

    chapter = CHAPTER


def claims():
    """The sweep behind the verdicts, whose data the parts on sections share."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        return importlib.import_module("7_adaptive_computation_claims")
    finally:
        sys.path.pop(0)


def thresholds_of(measure: str) -> tuple[float, ...]:
    """The thresholds that a measure is tried at."""
    return NEAR if measure == "saturation" else THRESHOLDS


# -------------------------------------------------------------------------------------- exits


def exits() -> None:
    """Loss of every exit, and of every threshold of every measure, read with all layers."""
    table = Table("exits", windows=WINDOWS)
    for name in (BASE, EXITS):
        bench = Bench(name, questions=0, windows=WINDOWS)
        found: list[calm.Exits] = []

        def seen(bench=bench, found=found) -> list[calm.Exits]:
            if not found:
                learner = confidence.train_classifier(
                    bench.model, bench.calibration(0, CALIBRATION)
                )
                found.extend(calm.read_exits(bench.model, w[None], learner) for w in bench.windows)
            return found

        count = bench.model.config.num_hidden_layers
        for exit_ in range(1, count + 1):

            def one(exit_=exit_, seen=seen) -> dict:
                losses = [float(s.losses[exit_ - 1].mean()) for s in seen()]
                agree = fmean(float(s.agrees[exit_ - 1].float().mean()) for s in seen())
                return {"loss": round(fmean(losses), 4), "agrees": round(agree, 4)}

            table.add({"model": name, "exit": exit_}, one)
        for measure in (*confidence.MEASURES, "oracle"):
            for at in (1.0,) if measure == "oracle" else thresholds_of(measure):

                def curve(measure=measure, at=at, seen=seen, count=count) -> dict:
                    left = [s.layer(measure, at) for s in seen()]
                    losses = [float(s.loss_at(x).mean()) for s, x in zip(seen(), left, strict=True)]
                    agree = fmean(
                        float(s.agrees.gather(0, x[None] - 1).float().mean())
                        for s, x in zip(seen(), left, strict=True)
                    )
                    every = torch.cat(left)
                    return {
                        "layers": round(float(every.float().mean()), 4),
                        "loss": round(fmean(losses), 4),
                        "agrees": round(agree, 4),
                        "share": [
                            round(float((every == i).float().mean()), 4)
                            for i in range(1, count + 1)
                        ],
                    }

                table.add({"model": name, "measure": measure, "threshold": at}, curve)


def sections() -> None:
    """Accuracy against layers for entropy, patience and the oracle; mean of the seeds."""
    table = Table("sections")
    shared = claims()
    data = shared.Sections()
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not made:
            labels = data.of("test")[1]
            made.extend((data.logits(data.trained(s), "test"), labels) for s in shared.SEEDS)
        return made

    def measured(rule: Callable[[torch.Tensor], classifiers.Left]) -> dict:
        left = [(rule(found), y) for found, y in logits()]
        return {
            "accuracy": round(fmean(float((x.classes == y).float().mean()) for x, y in left), 4),
            "layers": round(fmean(x.mean_layers for x, _ in left), 4),
        }

    for t in (0.0, *shared.ENTROPIES, 1.5, 1.8):
        table.add(
            {"rule": "entropy", "setting": t},
            lambda t=t: measured(lambda z: classifiers.leave(z, branchynet.by_entropy(t))),
        )
    for p in range(1, 7):
        table.add(
            {"rule": "patience", "setting": p},
            lambda p=p: measured(lambda z: classifiers.leave(z, pabee.by_patience(p))),
        )
    table.add({"rule": "oracle", "setting": 0}, lambda: measured(classifiers.oracle))


# -------------------------------------------------------------------------------------- speed


def beginnings(bench: Bench) -> list[torch.Tensor]:
    """Prompts from held-out windows."""
    return [row[None, :PROMPT_TOKENS] for row in bench.windows[:PROMPTS]]


def speed() -> None:
    """Time per token in turn with that of all layers, so that other work meets both alike."""
    table = Table("speed", tokens=NEW_TOKENS, prompts=PROMPTS)
    bench = Bench(EXITS, questions=0, windows=WINDOWS)
    stack = layers.LayerStack(bench.model)
    given = beginnings(bench)
    learner: list[confidence.ExitClassifier] = []

    def write(measure: str, at: float) -> list[calm.EarlyText]:
        if not learner:
            text = bench.calibration(0, CALIBRATION)
            learner.append(confidence.train_classifier(bench.model, text))
        return [
            calm.generate(
                stack, p, max_new_tokens=NEW_TOKENS, threshold=at, measure=measure,
                classifier=learner[0],
            )
            for p in given
        ]  # fmt: skip

    for measure in confidence.MEASURES:
        for at in (0.1, 0.2, 0.4, 0.6, 0.8) if measure != "saturation" else NEAR[1:6]:

            def ratio(measure=measure, at=at) -> dict:
                ratios = []
                for turn in range(ROUNDS + 1):
                    whole, early = write(measure, 1.0), write(measure, at)
                    if turn:
                        sums = [sum(t.seconds for t in one) for one in (whole, early)]
                        ratios.append(sums[0] / sums[1])
                same = [
                    fmean(a == b for a, b in zip(x.tokens, y.tokens))
                    for x, y in zip(early, whole, strict=True)
                ]
                return {
                    "layers": round(fmean(t.mean_layers for t in early), 3),
                    "times_faster": [round(r, 4) for r in ratios],
                    "same_tokens": round(fmean(same), 4),
                }

            table.add({"measure": measure, "threshold": at}, ratio)

    @torch.inference_mode()
    def parts() -> dict:
        """Milliseconds of one layer, of the head, and of copying a state, for one token."""
        cache = stack.new_cache()
        state = stack.embed(given[0])
        stack.run(state, cache, 0, stack.count, stack.rotary(state, 0))
        token = stack.embed(given[0][:, -1:])
        rotary = stack.rotary(token, PROMPT_TOKENS)
        calls = {
            "layer": lambda: stack.run(token, cache, 2, 3, rotary),
            "head": lambda: stack.head(token),
            "copy": lambda: stack.copy_state(token, cache, stack.count - 1, rotary),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(60):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if turn > 9:
                    found[name].append(time.perf_counter() - began)
        return {name: round(1e3 * median(values), 5) for name, values in found.items()}

    table.add({"measure": "parts", "threshold": 0.0}, parts)


# -------------------------------------------------------------------------------- speculative


def speculative_() -> None:
    """Pairs of models, and models that draft with their own first layers."""
    table = Table("speculative", tokens=NEW_TOKENS, prompts=PROMPTS)
    benches: dict[str, Bench] = {}

    def model(name: str) -> torch.nn.Module:
        if name not in benches:
            benches[name] = Bench(name, questions=0, windows=PROMPTS)
        return benches[name].model

    def alone(name: str, prompts: list[torch.Tensor]) -> float:
        """Seconds of a model that writes alone, in the same loop as speculation."""
        return sum(greedy(model(name), p) for p in prompts)

    def measured(target: str, write: Callable[[torch.Tensor, int], speculative.SpeculativeText]):
        def at(gamma: int, cost: Callable[[list[torch.Tensor]], float]) -> dict:
            model(target)
            prompts = beginnings(benches[target])
            ratios, costs = [], []
            for turn in range(ROUNDS + 1):
                whole = alone(target, prompts)
                found = [write(p, gamma) for p in prompts]
                if turn:
                    ratios.append(whole / sum(t.seconds for t in found))
                    costs.append(cost(prompts) / whole)
            accepted = sum(sum(t.accepted) for t in found)
            tested = sum(min(a + 1, d) for t in found for a, d in zip(t.accepted, t.drafted))
            return {
                "alpha": round(accepted / max(1, tested), 4),
                "tokens_per_pass": round(
                    sum(len(t.tokens) for t in found) / sum(t.passes for t in found), 4
                ),
                "times_faster": [round(r, 4) for r in ratios],
                "cost": round(median(costs), 4),
            }

        return at

    for target, draft in ((BASE, "mini-300k"), (BASE, "mini-1m"), (BASE, BASE)):
        for gamma in TURNS if draft != BASE else (4,):
            at = measured(
                target,
                lambda p, g, target=target, draft=draft: speculative.generate(
                    model(target), model(draft), p, max_new_tokens=NEW_TOKENS, draft_tokens=g
                ),
            )
            table.add(
                {"target": target, "draft": draft, "gamma": gamma},
                lambda at=at, gamma=gamma, draft=draft: at(
                    gamma, lambda prompts: alone(draft, prompts)
                ),
            )
    for target in (BASE, EXITS):
        for exit_layer in range(1, 6):
            for gamma in (2, 4):
                at = measured(
                    target,
                    lambda p, g, target=target, exit_layer=exit_layer: layerskip.self_speculative(
                        model(target), p, exit_layer=exit_layer, max_new_tokens=NEW_TOKENS,
                        draft_tokens=g,
                    ),
                )  # fmt: skip
                table.add(
                    {"target": target, "draft": f"first {exit_layer}", "gamma": gamma},
                    lambda at=at, gamma=gamma, exit_layer=exit_layer: (
                        at(gamma, lambda prompts: math.nan) | {"cost": round(exit_layer / 6, 4)}
                    ),
                )


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: torch.Tensor) -> float:
    """Seconds of plain greedy decoding, token by token, with a cache; the prompt not counted."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt[:, -1:]
    began = time.perf_counter()
    for _ in range(NEW_TOKENS):
        out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------ cascade

ASKED = 160


def cascade() -> None:
    """Which questions each model answers right, and how sure it is, summed up in several ways."""
    table = Table("cascade", questions=ASKED)
    for name in ("mini-300k", "mini-1m", "mini-5m", "smollm2-135m"):

        def answers(name=name) -> dict:
            bench = Bench(name, windows=1, questions=ASKED)
            began = time.perf_counter()
            found = choice_likelihoods(
                bench.model, bench.tokenizer, bench.questions, batch_size=16, start=bench.start,
                alone=True,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            right, lead = [], []
            for one, item in zip(found, bench.questions, strict=True):
                best = one.best(item.choices, "pmi")
                right.append(int(best == item.answer))
                gains = [a - b for a, b in zip(one.given_context, one.alone, strict=True)]
                p = torch.tensor(gains).softmax(0)
                lead.append(round(float(p[best]), 4))
            return {
                "right": right,
                "confidence": lead,
                "parameters": sum(p.numel() for p in bench.model.parameters()),
                "seconds": round(seconds, 2),
            }

        table.add({"model": name}, answers)


def sequences() -> None:
    """Confidences of three models in the tokens of held-out windows, and their losses."""
    table = Table("sequences")
    benches: dict[str, Bench] = {}

    def bench(name: str) -> Bench:
        return benches.setdefault(name, Bench(name, questions=0))

    for name in ("mini-300k", "mini-1m", "mini-5m"):

        @torch.inference_mode()
        def windows(name=name) -> dict:
            """Of 48 held-out windows: the loss, and confidences of the tokens it would write."""
            one = bench(name)
            losses, sure = [], {str(k): [] for k in ("mean", "sum", "min", 0.1, 0.25, 0.5)}
            for row in one.windows[:, :96]:
                log_p = one.model(input_ids=row[None]).logits[0].float().log_softmax(-1)
                losses.append(round(float(-log_p[:-1].gather(1, row[1:, None]).mean()), 4))
                top = log_p.max(-1).values
                for kind in sure:
                    given = kind if kind.isalpha() else float(kind)
                    sure[kind].append(round(cascades.sequence_confidence(top, given), 3))
            return {"losses": losses, "confidences": sure}

        table.add({"model": name}, windows)


# ------------------------------------------------------------------------------------ smollm2


def smollm2() -> None:
    """How deep SmolLM2's tokens must go, and how sure its layers are; nothing trained."""
    table = Table("smollm2", windows=8, length=128)

    def deep() -> dict:
        loaded = load("smollm2-135m", device="cpu")
        bench = Bench("smollm2-135m", questions=0, windows=8)
        seen = calm.read_exits(loaded.model, bench.windows[:, :128])
        count = len(seen.losses)
        oracle = seen.layer("oracle", 1.0)
        found = {
            "layers": count,
            "losses": [round(float(x), 4) for x in seen.losses.mean(1)],
            "agrees": [round(float(x), 4) for x in seen.agrees.float().mean(1)],
            "oracle": round(float(oracle.float().mean()), 3),
            "curve": [],
        }
        for at in THRESHOLDS:
            left = seen.layer("softmax", at)
            found["curve"].append(
                {
                    "threshold": at,
                    "layers": round(float(left.float().mean()), 3),
                    "loss": round(float(seen.loss_at(left).mean()), 4),
                }
            )
        head = loaded.model.lm_head.weight.numel()
        layer = sum(p.numel() for p in loaded.model.model.layers[0].parameters())
        return found | {"head_numbers": head, "layer_numbers": layer}

    table.add({"model": "smollm2-135m"}, deep)


PARTS = {
    "exits": exits,
    "sections": sections,
    "speed": speed,
    "speculative": speculative_,
    "cascade": cascade,
    "sequences": sequences,
    "smollm2": smollm2,
}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
