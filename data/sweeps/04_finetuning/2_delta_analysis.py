"""The stored measurements of `notebooks/04_finetuning/2_delta_analysis` (`make results`).

    python data/sweeps/04_finetuning/2_delta_analysis.py                 # every part
    python data/sweeps/04_finetuning/2_delta_analysis.py serve --resume  # what is missing of a part

Each part is written to `data/results/04_finetuning/2_delta_analysis/<part>.json`, row by row:

serve       `mini-5m` for 1 to 16 users with a LoRA each: one batch, and loops (1 minute)
smollm2     the same for SmolLM2-135M and four users, a few times (1 minute)
times       a training step of `minilm-l6`: full tuning, LoRA and an adapter (1 minute)
tuned       `mini-1m` tuned on topics in four ways: answers, what it forgets, and how its weights
            and its function change, five seeds (2 minutes)
templates   `mini-1m` on topics by a template and by the bare text, with 0, 16 and 2,048 examples,
            by LoRA, and by a prompt and an adapter, at once and in sequence, five seeds (4
            minutes)
black_box   `mini-1m` on topics: a prompt found by 200 losses and no gradient, five seeds (2
            minutes)
transfer    `mini-1m`: a LoRA of each of six tasks, judged on all six, five seeds (3 minutes)
control     `mini-1m`: vectors behind its blocks, by back-propagation and by the method of
            successive approximations, five sets of examples (5 minutes)
together    `minilm-l6` on topics, 16 examples of each: eight sets of three methods trained at
            once, and full tuning, five seeds (7 minutes)
sequence    the same three methods one after the other, all six orders, five seeds (8 minutes)
scale       three sizes of decoder on topics, six methods, five seeds (8 minutes)

Minutes are those of one idle core, 42 in all. The chapter also reads the grid of the chapter before
it, which is measured there. Seeds are the outer loop, so that a part that was interrupted has whole
seeds. Answers are stored as strings of 0 and 1, one for each document; every test text is of a
document of its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from effnb.chapters.finetuning.delta_analysis import methods, steering, users
from effnb.chapters.finetuning.delta_analysis.methods import Decoder, one_per_document, said
from effnb.chapters.finetuning.delta_tuning import methods as before
from effnb.core.training import TrainingSettings
from effnb.lab import claims_bench, load
from effnb.lab.sweeps import Table as Rows
from effnb.lab.sweeps import chapter_of, held_out_novel, run
from effnb.lab.task_inputs import as_texts, classification_loss, target_likelihoods
from effnb.lab.tasks import Example, task

SEEDS = (0, 1, 2, 3, 4)
SHOTS = 16
DOCUMENTS = 96
"""Test documents, and training texts that are judged."""
STEPS = 32
"""Steps of a decoder, of 8 texts each."""
TOGETHER, STAGE = 48, 24
"""Steps of the encoder: with methods trained at once, and for each of those in sequence."""
POINTS = (8, 32)
SCALED = ("full", "LoRA", "adapter", "prompt", "last layers", "random modules")
SIZES = ("mini-300k", "mini-1m", "mini-5m")
TRANSFER = {
    "section": "classes", "language": "classes", "match": "pairs", "origin": "pairs",
    "summary": "writing", "expand": "writing",
}  # fmt: skip
"""The tasks between which deltas are moved, and their kinds."""
JUDGED = 40
"""Test documents of each of these."""
COMBINED = ("prompt", "adapter")
"""What is trained at once where templates are judged; a decoder has no biases."""
AT_ONCE, IN_LINE = said(COMBINED), ", then ".join(COMBINED)
USERS = (1, 2, 4, 8, 16)
TURNS = 24
LOGS = 32
"""Test texts of which the log-probabilities of all labels are stored."""
STEERED = 12
"""Examples that vectors behind the blocks are found with; searches without gradients have as many
twice."""


class Table(Rows):
    """Rows of this chapter."""

    chapter = chapter_of(__file__)


def bits(correct: Sequence[float]) -> str:
    """Answers as a string of 0 and 1."""
    return "".join("01"[int(one)] for one in correct)


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    """Numbers as they are stored."""
    return [round(float(v), digits) for v in values]


# ------------------------------------------------------------------------------- many users, time


def serve() -> None:
    """Seconds of answering one text of each user, in four ways that take turns, on one thread."""
    torch.set_num_threads(1)
    table = Table("serve", tokens=16, rank=8)
    model = load("mini-5m", device="cpu").model
    for count in USERS:
        made: dict[str, list[float]] = {}
        for way in ("batch", "loop", "merged", "frozen"):

            def measure(way: str = way, count: int = count, made: dict = made) -> dict[str, Any]:
                if not made:
                    made.update(users.in_turn(users.ways("mini-5m", count), TURNS))
                held = users.stored_bytes(model, count)
                return {"seconds": rounded(made[way], 6), "bytes": held.get(way, held["batch"])}

            table.add({"model": "mini-5m", "method": way, "users": count}, measure)


def smollm2() -> None:
    """One batch and loops on a larger model, for four users."""
    torch.set_num_threads(1)
    table = Table("smollm2", tokens=16, rank=8)
    made: dict[str, list[float]] = {}
    for way in ("batch", "loop", "merged"):

        def measure(way: str = way) -> dict[str, Any]:
            if not made:
                functions = users.ways("smollm2-135m", 4)
                made.update(users.in_turn(functions, 4))
            return {"seconds": rounded(made[way], 4)}

        table.add({"model": "smollm2-135m", "method": way, "users": 4}, measure)


def times() -> None:
    """Seconds of a training step on one thread, and what each method stores for a task."""
    torch.set_num_threads(1)
    table = Table("times", batch=before.BATCH, tokens=before.TOKENS)
    subject = methods.encoder()
    batch = subject.batch(subject.task.train[: before.BATCH])
    names = ("full", "LoRA", "adapter")
    made: dict[str, list[float]] = {}

    def stepper(model: nn.Module) -> Callable[[], None]:
        settings = TrainingSettings(steps=1, learning_rate=1e-6)
        (optimizer,) = before.optimizers(model, settings)

        def step() -> None:
            with torch.enable_grad():
                classification_loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()

        return step

    ready = {name: before.prepared(subject.base, name) for name in names}
    for name in names:

        def measure(name: str = name) -> dict[str, Any]:
            if not made:
                steps = {n: stepper(one.model) for n, one in ready.items()}
                made.update(users.in_turn(steps, TURNS))
            return {"seconds": rounded(made[name], 6), "bytes": ready[name].bytes}

        table.add({"model": subject.name, "method": name}, measure)


# ----------------------------------------------------------------------------- decoders on topics


def tuned() -> None:
    """What tuning on topics changes in a decoder, and what the decoder forgets."""
    decoder = Decoder()
    table = Table("tuned", steps=STEPS, documents=DOCUMENTS)
    test = one_per_document(decoder.task.test, DOCUMENTS)
    novel = claims_bench.documents_of(decoder.loaded, held_out_novel(), 24, 256)

    def judged(model: nn.Module) -> dict[str, Any]:
        correct = decoder.right(model, test)
        logs = decoder.label_log_probs(model, test[:LOGS])
        return {
            "accuracy": round(fmean(correct), 4),
            "answers": bits(correct),
            "logs": [rounded(row, 2) for row in logs.tolist()],
            "novel_documents": rounded(claims_bench.by_document(model, novel)),
        }

    def measure(method: str, seed: int) -> dict[str, Any]:
        found = decoder.tuned(method, decoder.task.train, steps=STEPS, seed=seed)
        row = {"parameters": found.parameters} | judged(found.model)
        if method == "full":
            row["energy"] = rounded(methods.changed_energy(decoder.model, found.model))
        return row

    table.add({"model": decoder.name, "method": "untuned"}, lambda: judged(decoder.model))
    for seed in SEEDS:
        for method in ("full", "LoRA", "adapter", "prompt"):
            table.add(
                {"model": decoder.name, "method": method, "seed": seed},
                lambda method=method, seed=seed: measure(method, seed),
            )


def templates() -> None:
    """A hand-written template against the bare text, by the number of examples."""
    table = Table("templates", steps=STEPS, documents=DOCUMENTS)
    asked = {"template": Decoder(), "bare text": Decoder(bare=True)}
    test = one_per_document(asked["template"].task.test, DOCUMENTS)

    def measure(decoder: Decoder, shots: int, seed: int, combined: str = "") -> dict[str, Any]:
        if not shots:
            return {"answers": bits(decoder.right(decoder.model, test))}
        every = decoder.task.train
        train = every if shots == len(every) else decoder.task.few_shot(shots, seed)[0]
        if combined == AT_ONCE:
            model = methods.together(
                decoder.model, COMBINED, decoder.batch, train, steps=STEPS, seed=seed
            )
        elif combined:
            model = decoder.model
            for place, name in enumerate(COMBINED):  # each for half of the steps
                model = methods.next_in_line(
                    model, name, decoder.batch, train, steps=STEPS // 2, seed=seed + 10 * place
                )
        else:
            model = decoder.tuned("LoRA", train, steps=STEPS, seed=seed).model
        old = decoder.right(model, list(train)[:DOCUMENTS])
        return {"answers": bits(decoder.right(model, test)), "train_answers": bits(old)}

    for way, decoder in asked.items():
        table.add(
            {"model": decoder.name, "method": way, "shots": 0},
            lambda decoder=decoder: measure(decoder, 0, 0),
        )
    for seed in SEEDS:
        for shots in (SHOTS, len(asked["template"].task.train)):
            for way, decoder in asked.items():
                about = {"model": decoder.name, "method": way, "shots": shots, "seed": seed}
                table.add(about, lambda d=decoder, n=shots, s=seed: measure(d, n, s))
        for combined, (way, decoder) in itertools.product((AT_ONCE, IN_LINE), asked.items()):
            about = {"model": decoder.name, "method": f"{way}, {combined}", "shots": SHOTS}
            table.add(
                about | {"seed": seed},
                lambda d=decoder, s=seed, how=combined: measure(d, SHOTS, s, how),
            )


def black_box() -> None:
    """A prompt from losses alone, and one by gradients from about as many passes."""
    decoder = Decoder()
    budget = 200
    table = Table("black_box", budget=budget, examples=2 * STEERED)
    test = one_per_document(decoder.task.test, DOCUMENTS)

    def judged(model: nn.Module) -> dict[str, Any]:
        losses = steering.answer_losses(decoder, model, test)
        return {"documents": rounded(losses), "answers": bits(decoder.right(model, test))}

    def measure(method: str, seed: int) -> dict[str, Any]:
        train, _ = decoder.task.few_shot(SHOTS, seed)
        train = train[: 2 * STEERED]
        if method == "black box":
            model, found = steering.search(decoder, train, budget=budget, seed=seed)
            return {"calls": found.calls, "losses": rounded(found.losses)} | judged(model)
        steps = budget // 4  # a fourth of the calls: a step also goes backward
        run = decoder.tuned("prompt", train, steps=steps, seed=seed, size=steering.LENGTH)
        return {"steps": steps} | judged(run.model)

    table.add({"model": decoder.name, "method": "untuned"}, lambda: judged(decoder.model))
    for seed in SEEDS:
        for method in ("black box", "gradients"):
            table.add(
                {"model": decoder.name, "method": method, "seed": seed},
                lambda method=method, seed=seed: measure(method, seed),
            )


def transfer() -> None:
    """The loss on every task of a LoRA of every task."""
    loaded = load("mini-1m", device="cpu")
    table = Table("transfer", steps=STEPS, documents=JUDGED, kinds=TRANSFER)
    tasks = {name: task(name) for name in TRANSFER}
    tests = {name: one_per_document(one.test, JUDGED) for name, one in tasks.items()}

    def judged(model: nn.Module) -> dict[str, list[float]]:
        found = {}
        for name, own in tests.items():
            texts = as_texts(tasks[name], own)
            logs, counts = target_likelihoods(model, loaded.tokenizer, *texts)
            found[name] = rounded([-a / n for a, n in zip(logs, counts, strict=True)], 3)
        return found

    def measure(name: str, seed: int) -> dict[str, Any]:
        subject = before.Subject(tasks[name], "mini-1m")
        found = before.tune(
            loaded.model, "LoRA", subject.batch, tasks[name].train, steps=STEPS, seed=seed,
            rate=methods.RATES["LoRA"],
        )  # fmt: skip
        return judged(found.model)

    table.add({"model": loaded.name, "source": "untuned"}, lambda: judged(loaded.model))
    for seed in SEEDS:
        for name in TRANSFER:
            table.add(
                {"model": loaded.name, "source": name, "seed": seed},
                lambda name=name, seed=seed: measure(name, seed),
            )


def control() -> None:
    """Vectors behind the blocks, found in two ways, on what was not seen."""
    decoder = Decoder()
    table = Table("control", weight=steering.WEIGHT, examples=STEERED)
    test = one_per_document(decoder.task.test, DOCUMENTS // 2)

    def measure(way: str, seed: int) -> dict[str, Any]:
        train, _ = decoder.task.few_shot(SHOTS, seed)
        found = steering.solve(decoder, train[:STEERED], [way], rounds=steering.ROUNDS)
        solution = found.by[way]
        with steering.steered(decoder.model, solution.controls) as model:
            losses = steering.answer_losses(decoder, model, test)
        return {
            "free": round(found.free, 5),
            "costs": rounded(solution.costs, 5),
            "residual": solution.residual,
            "sizes": rounded([float(u.norm()) for u in solution.controls]),
            "documents": rounded(losses, 6),
        }

    table.add(
        {"model": decoder.name, "method": "untouched"},
        lambda: {"documents": rounded(steering.answer_losses(decoder, decoder.model, test), 6)},
    )
    for seed in SEEDS:
        for way in steering.WAYS:
            table.add(
                {"model": decoder.name, "method": way, "seed": seed},
                lambda way=way, seed=seed: measure(way, seed),
            )


def scale() -> None:
    """Six methods on decoders of three sizes."""
    table = Table("scale", steps=STEPS, points=POINTS, documents=DOCUMENTS)
    decoders = [Decoder(name) for name in SIZES]
    test = one_per_document(decoders[0].task.test, DOCUMENTS)

    def measure(decoder: Decoder, method: str, seed: int) -> dict[str, Any]:
        share = methods.last_layer_share(decoder.model)
        size = {"last layers": 1, "random modules": share}.get(method)
        found = decoder.tuned(
            method, decoder.task.train, steps=STEPS, seed=seed, size=size, points=POINTS,
            watch=lambda model: {"answers": bits(decoder.right(model, test))},
        )  # fmt: skip
        curve = [point["answers"] for point in found.seen]
        return {"parameters": found.parameters, "answers": curve[-1], "curve": curve}

    for seed in SEEDS:
        for decoder in decoders:
            for method in SCALED:
                table.add(
                    {"model": decoder.name, "method": method, "seed": seed},
                    lambda d=decoder, m=method, s=seed: measure(d, m, s),
                )


# ------------------------------------------------------------------- several deltas on an encoder


def judged_classifier(
    model: nn.Module, test: Sequence[Example], train: Sequence[Example]
) -> dict[str, Any]:
    """Answers and mean losses on new texts and on those of training."""
    subject = methods.encoder()
    new, old = (subject.judged(model, list(own)) for own in (test, train))
    return {
        "accuracy": round(fmean(new["correct"]), 4),
        "train_accuracy": round(fmean(old["correct"]), 4),
        "loss": round(fmean(new["losses"]), 4),
        "train_loss": round(fmean(old["losses"]), 4),
        "answers": bits(new["correct"]),
        "train_answers": bits(old["correct"]),
    }


def together() -> None:
    """Sets of methods trained at once, with few examples."""
    subject = methods.encoder()
    table = Table("together", shots=SHOTS, steps=TOGETHER, documents=DOCUMENTS)
    test = one_per_document(subject.task.test, DOCUMENTS)

    def measure(names: Sequence[str] | None, seed: int) -> dict[str, Any]:
        train, _ = subject.task.few_shot(SHOTS, seed)
        if names is None:
            model = before.tune(
                subject.base, "full", subject.batch, train, steps=TOGETHER, seed=seed
            ).model
        else:
            model = methods.together(
                subject.base, names, subject.batch, train, steps=TOGETHER, seed=seed
            )
        return judged_classifier(model, test, train)

    for seed in SEEDS:
        for names in (*methods.SUBSETS, None):
            method = "full" if names is None else said(names)
            table.add(
                {"model": subject.name, "method": method, "seed": seed},
                lambda names=names, seed=seed: measure(names, seed),
            )


def sequence() -> None:
    """One method after the other, earlier ones frozen; and one of them for as long."""
    subject = methods.encoder()
    table = Table("sequence", shots=SHOTS, steps=STAGE, documents=DOCUMENTS)
    test = one_per_document(subject.task.test, DOCUMENTS)
    orders = [*itertools.permutations(methods.PARTS), ("adapter",) * 3]

    for seed in SEEDS:
        train, _ = subject.task.few_shot(SHOTS, seed)
        # What two orders begin with alike is trained once.
        known: dict[tuple[str, ...], tuple[nn.Module, str]] = {}

        def stage(
            done: tuple[str, ...], seed: int = seed, train: Any = train, known: dict = known
        ) -> tuple[nn.Module, str]:
            if done not in known:
                model = stage(done[:-1])[0] if done[1:] else subject.base
                model = methods.next_in_line(
                    model, done[-1], subject.batch, train, steps=STAGE, seed=seed + 10 * len(done)
                )
                known[done] = model, bits(subject.judged(model, test)["correct"])
            return known[done]

        for order in orders:

            def measure(order: tuple[str, ...] = order, stage: Any = stage) -> dict[str, Any]:
                return {"stages": [stage(order[:n])[1] for n in (1, 2, 3)]}

            table.add({"model": subject.name, "method": ", ".join(order), "seed": seed}, measure)


PARTS: dict[str, Callable[[], dict | None]] = {
    "serve": serve,
    "smollm2": smollm2,
    "times": times,
    "tuned": tuned,
    "templates": templates,
    "black_box": black_box,
    "transfer": transfer,
    "control": control,
    "together": together,
    "sequence": sequence,
    "scale": scale,
}


if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
