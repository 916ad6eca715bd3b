"""The measurements behind the verdicts of `notebooks/05_inference/7_adaptive_computation`.

    python data/sweeps/05_inference/7_adaptive_computation_claims.py [read] [sections] [calm] ...

read      S-I4: exits by confidence on held-out text, against the same exits on other tokens (1 min)
sections  S-I4: MiniLM with a head after each layer, five draws of training data (3 min)
calm      G-6: texts at every threshold, and five calibrations on draws of their prompts (6 min)
time      G-6: time per token at the calibrated threshold, after calm (1 min)
defer     G-7: a base model and a specialist, five draws of training data (2 min)

Times are for one idle core. `mini-5m-exits` is what `data/train_exits.py` made of `mini-5m`.
"""

from __future__ import annotations

import random
from statistics import fmean

import torch
from torch import Tensor, nn

from effnb.inference.adaptive_computation import (
    branchynet,
    calm,
    cascades,
    classifiers,
    consistency,
    deebert,
    deferral,
    layers,
    learn_then_test,
    pabee,
)
from effnb.lab import claims_bench, corpora, load, results
from effnb.lab.claims_bench import SEEDS, Bench, Table
from effnb.lab.task_inputs import encoder_batch
from effnb.lab.tasks import Example, task

EXITS, BASE, ENCODER, SMALL = "mini-5m-exits", "mini-5m", "minilm-l6", "base of 256 units"
GRID = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Thresholds of texts, the safest first."""
READ_GRID = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Thresholds of reading; the most lenient where none passes as few layers as wanted."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, CALIBRATED = 200, 16, 20, 120
DELTA, EPSILON = 0.2, 0.05
COSTS = (0.0, 0.1, 0.2, 0.4, 0.6)
ITEMS = 256
"""Test texts of the classifiers."""
ROUNDS = 9


def short(values) -> list[float]:
    """Numbers as they are stored."""
    return [round(float(x), 4) for x in values]


# -------------------------------------------------------------------------------------- read


def read(table: Table) -> None:
    """Exits by confidence, and the same layers given to tokens at random."""
    bench = Bench(EXITS)
    found: list[calm.Exits] = []

    def documents() -> list[calm.Exits]:
        if not found:
            found.extend(calm.read_exits(bench.model, row[None]) for row in bench.documents)
        return found

    for seed in SEEDS:
        about = {"model": EXITS, "setting": "read", "seed": seed}
        lambda_: list[float] = []

        def threshold(seed=seed, lambda_=lambda_) -> float:
            """The safest threshold at which calibration text passes four of six layers or fewer."""
            if not lambda_:
                seen = calm.read_exits(bench.model, bench.calibration(seed)[:4])
                means = {x: float(seen.layer("softmax", x).float().mean()) for x in READ_GRID}
                lambda_.append(next((x for x in READ_GRID if means[x] <= 4), READ_GRID[-1]))
            return lambda_[0]

        def confident(threshold=threshold) -> dict:
            at = threshold()
            left = [one.layer("softmax", at) for one in documents()]
            return {
                "threshold": at,
                "layers": short(x.float().mean() for x in left),
                "documents": short(
                    one.loss_at(x).mean() for one, x in zip(documents(), left, strict=True)
                ),
            }

        def shuffled(threshold=threshold, seed=seed) -> dict:
            at = threshold()
            left = torch.cat([one.layer("softmax", at) for one in documents()])
            order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))
            counts = [one.losses.shape[1] for one in documents()]
            parts = left[order].split(counts)
            return {
                "threshold": at,
                "layers": short(x.float().mean() for x in parts),
                "documents": short(
                    one.loss_at(x).mean() for one, x in zip(documents(), parts, strict=True)
                ),
            }

        table.add(about | {"method": "confidence"}, confident)
        table.add(about | {"method": "shuffled"}, shuffled)

    def hard() -> dict:
        gaps = []
        for one in documents():
            left, loss = one.layer("softmax", 0.5).float(), one.losses[-1]
            above = loss > loss.median()
            gaps.append((left[above].mean() - left[~above].mean()) / len(one.losses))
        return {"threshold": 0.5, "documents": short(gaps)}

    table.add({"model": EXITS, "setting": "read", "method": "hard − easy"}, hard)


# ---------------------------------------------------------------------------------- sections


class Sections:
    """What every layer of MiniLM gives for the package sections, computed once."""

    def __init__(self) -> None:
        """Load the encoder; nothing is read before it is asked for."""
        self.loaded = load(ENCODER, device="cpu")
        self.task = task("section")
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def classes(self) -> int:
        """Number of sections."""
        return len(self.task.labels)

    def of(self, split: str) -> tuple[Tensor, Tensor]:
        """Pooled states of every layer, and the labels."""
        if split not in self._kept:
            examples = getattr(self.task, split)[: ITEMS if split != "train" else None]
            parts = [self._pooled(examples[i : i + 32]) for i in range(0, len(examples), 32)]
            labels = torch.tensor([e.label for e in examples])
            self._kept[split] = torch.cat(parts, 1), labels
        return self._kept[split]

    @torch.inference_mode()
    def _pooled(self, examples: tuple[Example, ...]) -> Tensor:
        batch = encoder_batch(self.loaded.tokenizer, examples)
        model = classifiers.ExitClassifiers(self.loaded.model, self.classes)
        return model.pooled(batch["input_ids"], batch["attention_mask"])

    def draw(self, seed: int, part: float = 0.75) -> Tensor:
        """Rows of the training split."""
        count = len(self.of("train")[1])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[: int(part * count)]

    def trained(self, seed: int) -> nn.ModuleList:
        """A head after each layer, trained on a draw."""
        pooled, labels = self.of("train")
        rows = self.draw(seed)
        heads = classifiers.ExitClassifiers(self.loaded.model, self.classes, seed=seed).heads
        return deebert.train_heads(heads, pooled[:, rows].clone(), labels[rows], seed=seed)

    def logits(self, heads: nn.ModuleList, split: str) -> Tensor:
        """Logits of all exits."""
        with torch.inference_mode():
            return torch.stack([head(x) for head, x in zip(heads, self.of(split)[0])])


ENTROPIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def sections(table: Table) -> None:
    """Entropy chosen on validation texts, patience at no more layers, and shuffled exits."""
    data: list[Sections] = []

    for seed in SEEDS:
        made: dict[str, dict] = {}

        def rows(seed=seed, made=made) -> dict[str, dict]:
            if made:
                return made
            if not data:
                data.append(Sections())
            one = data[0]
            heads = one.trained(seed)
            validation, labels = one.logits(heads, "validation"), one.of("validation")[1]
            right = lambda left, y: (left.classes == y).float()  # noqa: E731
            full = (validation[-1].argmax(-1) == labels).float().mean()
            tried = {t: classifiers.leave(validation, branchynet.by_entropy(t)) for t in ENTROPIES}
            good = [t for t in ENTROPIES if right(tried[t], labels).mean() >= full - 0.01]
            entropy = max(good, default=ENTROPIES[0])
            logits, labels = one.logits(heads, "test"), one.of("test")[1]
            count = len(logits)

            def said(left: classifiers.Left, **more) -> dict:
                return more | {
                    "documents": [int(x) for x in left.classes == labels],
                    "layers": short(left.exits / count),
                }

            by_entropy = classifiers.leave(logits, branchynet.by_entropy(entropy))
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            exits = by_entropy.exits[order]
            elsewhere = classifiers.Left(exits, logits.argmax(-1).gather(0, exits[None] - 1)[0])
            last = torch.full_like(exits, count)
            made |= {
                "entropy": said(by_entropy, threshold=entropy),
                "shuffled": said(elsewhere, threshold=entropy),
                "all layers": said(classifiers.Left(last, logits[-1].argmax(-1))),
            }
            waits = [
                (p, classifiers.leave(validation, pabee.by_patience(p))) for p in range(1, count)
            ]
            fits = [p for p, left in waits if left.mean_layers <= tried[entropy].mean_layers]
            if fits:
                left = classifiers.leave(logits, pabee.by_patience(max(fits)))
                made["patience"] = said(left, patience=max(fits))
            return made

        for method in ("entropy", "shuffled", "all layers", "patience"):
            about = {"model": ENCODER, "setting": "sections", "method": method, "seed": seed}
            if method != "patience" or "patience" in rows():
                table.add(about, lambda method=method, rows=rows: rows()[method])


# -------------------------------------------------------------------------------------- calm


def prompts(tokenizer) -> list[tuple[Tensor, list[int]]]:
    """Beginnings of held-out texts, novels and packages in turn, and how each goes on."""
    found = []
    length = PROMPT_TOKENS + NEW_TOKENS
    pools = []
    for name in ("novels", "packages"):
        texts = [*corpora.documents(name, "test"), *corpora.documents(name, "validation")]
        random.Random(f"prompts {name}").shuffle(texts)
        pools.append(iter(texts))
    while len(found) < PROMPTS:
        for pool in pools:
            for text in pool:
                ids = tokenizer.encode(text[:600], add_special_tokens=False)
                if len(ids) >= length:
                    found.append((torch.tensor([ids[:PROMPT_TOKENS]]), ids[PROMPT_TOKENS:length]))
                    break
    return found[:PROMPTS]


def texts(model: nn.Module, given, threshold: float) -> list[calm.EarlyText]:
    """The text after every prompt."""
    stack = layers.LayerStack(model)
    return [
        calm.generate(stack, prompt, max_new_tokens=NEW_TOKENS, threshold=threshold)
        for prompt, _ in given
    ]


def split(seed: int) -> tuple[list[int], list[int]]:
    """Prompts to calibrate on, and the others."""
    order = list(range(PROMPTS))
    random.Random(f"calibration {seed}").shuffle(order)
    return order[:CALIBRATED], order[CALIBRATED:]


def calm_(table: Table) -> None:
    """Texts at every threshold; then calibrations, which only read what is stored."""
    bench = Bench(EXITS)
    given = prompts(bench.loaded.tokenizer)
    full: list[calm.EarlyText] = []

    def measure(threshold: float) -> dict:
        if not full:
            full.extend(texts(bench.model, given, 1.0))
        early = texts(bench.model, given, threshold)
        distance, risk = [], []
        for one, whole, (_, reference) in zip(early, full, given, strict=True):
            distance.append(consistency.textual_distance(one.tokens, whole.tokens))
            risk.append(consistency.risk_difference(one.tokens, whole.tokens, reference))
        return {
            "distance": short(distance),
            "risk": short(risk),
            "layers": short(one.mean_layers / one.of for one in early),
        }

    for threshold in GRID:
        table.add(
            {"model": EXITS, "setting": "texts", "threshold": threshold},
            lambda threshold=threshold: measure(threshold),
        )
    stored = {r["threshold"]: r for r in table.rows if r["setting"] == "texts"}
    seen: list[calm.Exits] = []
    for seed in SEEDS:
        mine, others = split(seed)
        rows = [[stored[x]["distance"][i] for i in mine] for x in GRID]
        chosen = learn_then_test.calibrate(GRID, rows, DELTA, EPSILON).threshold
        about = {"model": EXITS, "setting": "calm", "seed": seed}

        def calibrated(chosen=chosen, others=others) -> dict:
            if chosen is None:  # the full model is used
                return {
                    "threshold": 1.0,
                    "distance": [0.0] * len(others),
                    "layers": [1.0] * len(others),
                }
            return {
                "threshold": chosen,
                "distance": [stored[chosen]["distance"][i] for i in others],
                "layers": [stored[chosen]["layers"][i] for i in others],
            }

        def read_at(chosen=chosen) -> dict:
            if not seen:
                seen.extend(calm.read_exits(bench.model, row[None]) for row in bench.documents)
            at = 1.0 if chosen is None else chosen
            return {
                "threshold": at,
                "documents": short(o.loss_at(o.layer("softmax", at)).mean() for o in seen),
            }

        table.add(about | {"method": "calibrated"}, calibrated)
        table.add(about | {"method": "calibrated, read"}, read_at)
    about = {"model": EXITS, "setting": "calm"}
    table.add(about | {"method": "all layers, read"}, lambda: bench.judged(bench.model))
    table.add(
        about | {"method": "not trained with exits, read"},
        lambda: {
            "documents": claims_bench.by_document(load(BASE, device="cpu").model, bench.documents)
        },
    )


def time_(table: Table) -> None:
    """Seconds per token, in turn: all layers, and exits at the first calibration's threshold."""
    stored = results.read(f"{table.name.rpartition('/')[0]}/calm")
    at = next(
        (
            r["threshold"]
            for r in (stored.data["table"] if stored else [])
            if r.get("method") == "calibrated" and r.get("seed") == 0
        ),
        0.9,
    )
    names = {"all layers": 1.0, "calibrated": at}
    times: dict[str, list[float]] = {name: [] for name in names}

    def measure(name: str) -> dict:
        if not times[name]:
            bench = Bench(EXITS)
            stack = layers.LayerStack(bench.model)
            given = prompts(bench.loaded.tokenizer)[:6]
            for turn in range(ROUNDS + 1):
                for one, threshold in names.items():
                    seconds = [
                        calm.generate(
                            stack, p, max_new_tokens=NEW_TOKENS, threshold=threshold
                        ).seconds
                        for p, _ in given
                    ]
                    if turn:  # the first warms up
                        times[one].append(fmean(seconds) / NEW_TOKENS)
        return {"threshold": names[name], "seconds": [round(x, 7) for x in times[name]]}

    for name in names:
        about = {"model": EXITS, "setting": "time", "method": name}
        table.add(about, lambda name=name: measure(name))


# ------------------------------------------------------------------------------------- defer


def network(inputs: int, outputs: int, seed: int) -> nn.Module:
    """The base model: one hidden layer of 256 units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, outputs))


def fit(model: nn.Module, loss, count: int, seed: int, steps: int = 300) -> nn.Module:
    """Train on batches of 128 rows; `loss` takes the model and the rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(count, (128,), generator=generator)
            optimizer.zero_grad()
            loss(model, rows).backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


def pair(data: Sections, seed: int) -> list[dict]:
    """All rows of one seed: the base reads the first layer, the specialist the last.

    The specialist is a head on all six layers that was trained on half of the sections only.
    """
    pooled, y = data.of("train")
    order = data.draw(seed, 1.0)
    learn, held = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
    test, labels = data.of("test")
    classes, half = data.classes, data.classes // 2
    known = learn[y[learn] < half]
    expert = fit(
        network(pooled.shape[-1], half, 100 + seed),
        lambda m, r: nn.functional.cross_entropy(m(pooled[-1, known[r]]), y[known[r]]),
        len(known), seed,
    )  # fmt: skip
    knows = {
        name: expert(x[-1]).argmax(-1) == target
        for name, x, target in (("learn", pooled[:, learn], y[learn]),
                                ("held", pooled[:, held], y[held]), ("test", test, labels))
    }  # fmt: skip
    x, target = pooled[0, learn].clone(), y[learn]
    base = fit(
        network(x.shape[1], classes, seed),
        lambda m, r: nn.functional.cross_entropy(m(x[r]), target[r]), len(learn), seed,
    )  # fmt: skip
    sure = {n: base(z).softmax(-1) for n, z in (("held", pooled[0, held]), ("test", test[0]))}
    features = {
        n: torch.cat([z, sure[n].log()], 1)
        for n, z in (("held", pooled[0, held]), ("test", test[0]))
    }
    right = {"held": sure["held"].argmax(-1) == y[held], "test": sure["test"].argmax(-1) == labels}

    def row(method: str, cost: float, good: Tensor, defer: Tensor) -> dict:
        loss = torch.where(defer, cost + (~knows["test"]).float(), (~good).float())
        found = {
            "model": SMALL, "setting": "defer", "method": method, "cost": cost, "seed": seed,
            "accuracy": round(float(good.float().mean()), 4),
            "expert": round(float(knows["test"].float().mean()), 4),
            "deferred": round(float(defer.float().mean()), 4),
            "mean_loss": round(float(loss.mean()), 4),
        }  # fmt: skip
        if method in ("plain", "CSS") and cost in (0.0, 0.4):
            found["right"] = [int(g) for g in good]
        if method != "plain" and cost in (0.1, 0.4):
            found["loss"] = [round(float(v), 2) for v in loss]
        return found

    rows = []
    nothing = torch.zeros(len(labels), dtype=torch.bool)
    for cost in COSTS:
        rows.append(row("plain", cost, right["test"], nothing))
        both = fit(
            network(x.shape[1], classes + 1, seed),
            lambda m, r, cost=cost: deferral.css_loss(m(x[r]), target[r], knows["learn"][r], cost),
            len(learn), seed,
        )  # fmt: skip
        logits = both(test[0])
        good = logits[:, :-1].argmax(-1) == labels
        rows.append(row("CSS", cost, good, logits.argmax(-1) == classes))
        rule = deferral.fit_rejector(
            features["held"], right["held"], knows["held"], cost, decay=0.01
        )
        rows.append(row("post hoc", cost, right["test"], rule(features["test"]) > 0))
        top = sure["held"].max(-1).values
        best = min(
            [-1.0, *torch.linspace(0.2, 1.0, 33).tolist(), 2.0],
            key=lambda t: deferral.deferral_loss(
                right["held"], knows["held"], cascades.chow(top, t), cost
            ),
        )
        by_confidence = cascades.chow(sure["test"].max(-1).values, best)
        rows.append(row("confidence", cost, right["test"], by_confidence))
    return rows


def defer(table: Table) -> None:
    """Every method at every cost, five draws."""
    data: list[Sections] = []
    for seed in SEEDS:
        made: list[dict] = []

        def rows(seed=seed, made=made) -> list[dict]:
            if not made:
                if not data:
                    data.append(Sections())
                made.extend(pair(data[0], seed))
            return made

        for cost in COSTS:
            for method in ("plain", "CSS", "post hoc", "confidence"):
                about = {"model": SMALL, "setting": "defer", "method": method}
                about |= {"cost": cost, "seed": seed}
                table.add(
                    about,
                    lambda about=about, rows=rows: next(
                        r for r in rows() if about.items() <= r.items()
                    ),
                )


PARTS = {"read": read, "sections": sections, "calm": calm_, "time": time_, "defer": defer}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
