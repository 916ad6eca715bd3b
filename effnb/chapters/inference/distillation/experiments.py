"""The chapter's experiments on languages: noisy teachers, made inputs, complexity, deviations.

Each trains students of one seed and returns what the sweeps store of them: the share of right
answers of every document, with what the student's training cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.inference.distillation import languages as own
from effnb.chapters.inference.distillation.languages import FULL, STUDENT, TEACHER, Texts, net
from effnb.core.modules import clone
from effnb.inference import distillation

TEMPERATURE = 4.0
"""Of the teacher's answers, unless it is what is varied."""
HARD_LANGUAGES = (1, 3, 6, 9)
"""Languages about which a teacher with uneven noise errs often: Danish, Spanish, Japanese and
Portuguese."""
OFTEN, SELDOM = 0.45, 0.1
REFRESH = 16
"""Steps after which weights are estimated again."""

Found = dict[str, Any]


def judged(model: nn.Module, **about: Any) -> Found:
    """A student's right answers on new texts, document by document."""
    test = own.languages().test
    return {"documents": own.by_document(own.right(model, test), test), **about}


def few_of_each(texts: Texts, count: int | list[int], seed: int) -> Texts:
    """A few texts of each language, drawn at random; their numbers may differ."""
    generator = torch.Generator().manual_seed(2000 + seed)
    order = torch.randperm(len(texts), generator=generator)
    rows = []
    for language in range(int(texts.y.max()) + 1):
        here = order[texts.y[order] == language]
        rows.append(here[: count if isinstance(count, int) else count[language]])
    return texts.at(torch.cat(rows))


# ------------------------------------------------------------------------------- few labels


def few_labels(seed: int, count: int = 10, hidden: int = STUDENT) -> dict[str, Found]:
    """A few labelled texts, and many without labels that the teacher answers.

    Returns:
        By method: "teacher"; "distilled" from the teacher's answers to all texts; "labels alone" on
        the labelled ones in as many steps; "labels for longer", at the compute of "distilled".
    """
    data, taught_by = own.languages(), own.teacher(seed)
    labelled = few_of_each(data.transfer, count, seed)
    student = net(hidden, seed)
    more = own.longer(len(data.transfer), student, taught_by)
    made = {
        "teacher": taught_by,
        "distilled": own.on_teacher(
            student, data.transfer.x, own.scores_of(taught_by, data.transfer), steps=FULL,
            seed=seed, temperature=TEMPERATURE,
        ),
        "labels alone": own.on_labels(student, labelled, steps=FULL, seed=seed),
        "labels for longer": own.on_labels(student, labelled, steps=FULL + more, seed=seed),
    }  # fmt: skip
    return {
        name: judged(model, steps=FULL + more * (name == "labels for longer"))
        for name, model in made.items()
    }


# ----------------------------------------------------------------------------- noisy teachers


def swapped(
    scores: Float[Tensor, "texts classes"], probability: float | Tensor, seed: int
) -> Float[Tensor, "texts classes"]:
    """A teacher that often errs: its two best classes change places with this probability."""
    drawn = torch.rand(len(scores), generator=torch.Generator().manual_seed(3000 + seed))
    chosen = (drawn < probability).nonzero()[:, 0]
    top = scores[chosen].topk(2, -1)
    noisy = scores.clone()
    noisy[chosen] = noisy[chosen].scatter(1, top.indices, top.values.flip(-1))
    return noisy


def uneven(scores: Float[Tensor, "texts classes"]) -> Float[Tensor, " texts"]:
    """How often this teacher errs about each text: often in some languages."""
    hard = torch.isin(scores.argmax(1), torch.tensor(HARD_LANGUAGES))
    return torch.where(hard, OFTEN, SELDOM)


def _on_noisy(
    student: nn.Module, x: Tensor, noisy: Tensor, seed: int, how: str, known: Tensor
) -> nn.Module:
    """Train on a noisy teacher's labels: as they are, weighted, or by forward correction."""
    data = own.languages()
    labels = noisy.argmax(1)
    if how == "forward correction":
        alpha = distillation.estimate_alpha(
            noisy, known, data.known.y, neighbours=40, least=0.55
        ).float()

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            return distillation.slam_loss(model(x[rows]), noisy[rows], alpha[rows], 2)

    elif how == "weighted":
        state: dict[str, Any] = {"step": 0, "weights": torch.ones(len(x))}

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            if state["step"] and state["step"] % REFRESH == 0:
                with torch.no_grad():
                    state["weights"] = distillation.estimate_weights(
                        model(x), noisy, model(data.known.x), known, data.known.y, k=40
                    ).float()
            state["step"] += 1
            return distillation.weighted_loss(model(x[rows]), labels[rows], state["weights"][rows])

    else:

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(x[rows]), labels[rows])

    return own.fit(student, len(x), loss, steps=FULL, seed=seed)


METHODS = ("plain", "weighted", "forward correction")


def noisy_teacher(
    seed: int,
    noise: float | str = 0.4,
    hidden: int = STUDENT,
    budget: int | None = None,
    methods: tuple[str, ...] = METHODS,
) -> dict[str, Found]:
    """Students of a teacher that errs, evenly or about some languages.

    Args:
        seed: Of teacher, noise and student.
        noise: How often the teacher's two best classes change places; "uneven" depends on the
            language.
        hidden: The student's hidden units; 0 makes it linear.
        budget: How many texts the teacher answers; all of the transfer set when None.
        methods: Which of `METHODS`.

    Returns:
        By method; "labels for longer" are the true labels of the known texts alone, at the compute
        of the others.
    """
    data, taught_by = own.languages(), own.teacher(seed)
    asked = data.transfer.at(torch.arange(len(data.transfer) if budget is None else budget))
    clean, known = own.scores_of(taught_by, asked), own.scores_of(taught_by, data.known)
    p = [uneven(s) if noise == "uneven" else float(noise) for s in (clean, known)]
    noisy, known = swapped(clean, p[0], seed), swapped(known, p[1], 50 + seed)
    student = net(hidden, seed)
    found = {
        how: judged(_on_noisy(student, asked.x, noisy, seed, how, known), steps=FULL)
        for how in methods
    }
    steps = FULL + own.longer(len(asked), student, taught_by)
    alone = own.on_labels(student, data.known, steps=steps, seed=seed)
    return found | {"labels for longer": judged(alone, steps=steps)}


def asking(seed: int, budget: int = 120, labelled: int = 5) -> dict[str, Found]:
    """Which texts to send to a teacher that errs about the hard ones: three ways to choose.

    A first student learns from a few labels. Its margins say which of the other texts would teach
    it most; how often the teacher errs is estimated on the known texts. The next student learns
    from the labels and from the teacher's answers.
    """
    data, taught_by = own.languages(), own.teacher(seed)
    start = few_of_each(data.transfer, labelled, seed)
    first = own.on_labels(net(STUDENT, seed), start, steps=FULL // 3, seed=seed)
    gains = distillation.information_gain(own.scores_of(first, data.transfer))
    wrong = 1 - float(own.right(taught_by, data.known).mean())
    generator = torch.Generator().manual_seed(4000 + seed)
    game = distillation.robust_choice(gains, int(wrong * len(gains)))
    ways = {
        "robust": distillation.draw(game, budget, generator=generator),
        "random": torch.randperm(len(gains), generator=generator)[:budget],
        "hardest first": distillation.margin_sampling(gains, budget),
    }
    answers = own.scores_of(taught_by, data.transfer).argmax(1)
    found = {}
    for name, rows in ways.items():
        asked = data.transfer.at(rows)
        both = Texts(
            torch.cat([start.x, asked.x]),
            torch.cat([start.y, answers[rows]]),
            start.documents + asked.documents,
        )
        model = own.on_labels(net(STUDENT, seed), both, steps=FULL, seed=seed)
        errors = float((answers[rows] != asked.y).double().mean())
        found[name] = judged(model, budget=budget, teacher_errors=round(errors, 4))
    return found


# --------------------------------------------------------------------- a teacher that makes inputs

TAIL = [max(2, round(40 * 0.7**i)) for i in range(12)]
"""Texts of each language in long-tail data."""
LATENT, NOISE = 16, 0.5
"""Directions in which inputs are moved, and how far, in deviations."""


def made_inputs(seed: int, count: int | list[int], steps: int = FULL) -> dict[str, Found]:
    """Little data, and a teacher that labels more of it: made at random, by gradient, or none.

    The texts' features are encoded in their principal components; the noise moves them there.
    """
    data, taught_by = own.languages(), own.teacher(seed)
    few = few_of_each(data.transfer, count, seed)
    scores = own.scores_of(taught_by, few)
    space = distillation.PrincipalComponents.fit(few.x, LATENT)
    student = net(STUDENT, seed)

    def loss_of(by: str) -> Callable[[nn.Module, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(5000 + seed)

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            made = distillation.make_inputs(
                few.x[rows], space.encode, space.decode, model, taught_by,
                scale=NOISE, by=by, steps=3, generator=generator,
            )  # fmt: skip
            return distillation.teacher_guided_loss(
                model, few.x[rows], few.y[rows], scores[rows], made, temperature=TEMPERATURE
            )

        return loss

    def on_labels(model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(few.x[rows]), few.y[rows])

    found = {
        name: judged(own.fit(student, len(few), loss_of(by), steps=steps, seed=seed), steps=steps)
        for name, by in (("by gradient", "gradient"), ("at random", "random"))
    }
    distilled = own.on_teacher(
        student, few.x, scores, steps=steps, seed=seed, temperature=TEMPERATURE,
        labels=few.y, weight=0.5,
    )  # fmt: skip
    batch = torch.arange(own.BATCH) % len(few)
    more = distillation.steps_at_equal_compute(
        student, batch, steps, loss=loss_of("gradient"), instead=on_labels
    )
    return found | {
        "distilled": judged(distilled, steps=steps),
        "labels for longer": judged(own.on_labels(student, few, steps=more, seed=seed), steps=more),
    }


# --------------------------------------------------------------------------------- why it works

STATES = (5, 20, 60, own.TAUGHT)
"""Steps of a teacher's training at which it is looked at."""
KERNEL_TEXTS = 96
NARROW, WIDE = 4, 128


def states(seed: int, hidden: int = TEACHER) -> dict[int, nn.Module]:
    """A teacher at several steps of one run."""
    data = own.languages()
    kept: dict[int, nn.Module] = {}
    count = [0]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        if count[0] in STATES:
            kept[count[0]] = clone(model).eval()
        count[0] += 1
        return nn.functional.cross_entropy(model(data.taught.x[rows]), data.taught.y[rows])

    last = own.fit(net(hidden, 500 + seed), len(data.taught), loss, steps=STATES[-1],
                   seed=500 + seed)  # fmt: skip
    return kept | {STATES[-1]: last}


def complexity(
    seed: int, hidden: int, teachers: dict[int, nn.Module], temperature: float = 1.0
) -> list[Found]:
    """How complex a teacher's answers at each of its states are to a student at its start.

    "share_of_shuffled" is their complexity as a part of that of the same answers given to other
    texts at random, the mean of five shuffles.
    """
    texts = own.languages().transfer.at(torch.arange(KERNEL_TEXTS))
    kernel = distillation.tangent_kernel(net(hidden, seed), texts.x)
    found = []
    for step, model in teachers.items():
        answers = (own.scores_of(model, texts) / temperature).softmax(-1)
        real = distillation.supervision_complexity(kernel, answers)
        generator = torch.Generator().manual_seed(6000 + seed)
        shuffled = [
            distillation.supervision_complexity(
                kernel, answers[torch.randperm(len(answers), generator=generator)]
            ).value
            for _ in range(5)
        ]
        share = real.value / (math.fsum(shuffled) / len(shuffled))
        found.append(
            {"step": step, "complexity": round(real.adjusted, 6),
             "share_of_shuffled": round(share, 5),
             "accuracy": round(float(own.right(model, own.languages().test).mean()), 4)}
        )  # fmt: skip
    return found


def from_states(seed: int, hidden: int = STUDENT // 4) -> dict[str, Found]:
    """A narrow student that learns from a teacher's early states first, or from its last alone."""
    data, teachers = own.languages(), list(states(seed).values())
    every = torch.stack([own.scores_of(model, data.transfer) for model in teachers])

    def trained(early: bool) -> nn.Module:
        count = [0]

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            at = distillation.teacher_of_step(count[0], FULL, len(every)) if early else -1
            count[0] += 1
            return distillation.hinton_loss(
                model(data.transfer.x[rows]), every[at][rows], temperature=1.0, weight=1.0
            )

        return own.fit(net(hidden, seed), len(data.transfer), loss, steps=FULL, seed=seed)

    return {
        "early states first": judged(trained(True), steps=FULL),
        "last state": judged(trained(False), steps=FULL),
    }


@cache
def confidences(
    seed: int, hidden: int = STUDENT, temperature: float = 1.0
) -> distillation.Deviations:
    """How a distilled student's confidence follows its teacher's on new texts."""
    data, taught_by = own.languages(), own.teacher(seed)
    student = own.on_teacher(
        net(hidden, seed), data.transfer.x, own.scores_of(taught_by, data.transfer), steps=FULL,
        seed=seed, temperature=temperature,
    )  # fmt: skip
    return distillation.deviations(
        own.scores_of(student, data.test), own.scores_of(taught_by, data.test)
    )


def class_counts(texts: Texts) -> Int[Tensor, " classes"]:
    """How many texts there are of each language."""
    return torch.bincount(texts.y, minlength=len(own.languages().names))
