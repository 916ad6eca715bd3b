"""The task of the chapter: the topic of a package description, in twelve languages.

A classifier is fine-tuned on three languages and asked about all. A document is a source package:
its descriptions in several languages are not independent, so they are resampled together.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from effnb.lab import corpora
from effnb.lab.task_inputs import batches_of, classify, encoder_batch
from effnb.lab.tasks import TONGUES, TOPICS, Example, clipped

SEEN = ("en", "de", "fr")
"""Languages of the fine-tuning; the other nine are judged without having been trained on."""
LANGUAGES = tuple(TONGUES)
UNSEEN = tuple(language for language in LANGUAGES if language not in SEEN)
TOKENS, BATCH = 64, 16
TRAINED_ON, JUDGED_ON = 900, 150
"""Most examples of a language to train on, and to be judged on."""
_TOPIC = {section: i for i, held in enumerate(TOPICS.values()) for section in held}


def _descriptions(language: str, split: corpora.Split) -> list[tuple[corpora.Package, str]]:
    """English packages of the topics, with their description in a language."""
    if language == "en":
        found = [(p, f"{p.synopsis}. {p.text}") for p in corpora.packages(split)]
    else:
        rows = corpora.translations(language, split)
        found = [(t.original(), f"{t.synopsis}. {t.text}") for t in rows]
    return [(p, text) for p, text in found if p.section in _TOPIC]


def _examples(language: str, split: corpora.Split) -> list[Example]:
    """One description of every source package, in an order that is random and the same always."""
    rows = _descriptions(language, split)
    if language == "en" and split != "train":
        # The English descriptions that others are translations of: all languages are judged on
        # the same kind of package.
        known = {p.name for other in LANGUAGES[1:] for p, _ in _descriptions(other, split)}
        rows = [(p, text) for p, text in rows if p.name in known]
    sources: dict[str, Example] = {}
    for package, text in random.Random(f"{language} {split}").sample(rows, len(rows)):
        label = _TOPIC[package.section]
        example = Example(package.source, clipped(text), "", label, tuple(TOPICS)[label])
        sources.setdefault(package.source, example)
    return list(sources.values())


@cache
def train_examples(languages: tuple[str, ...] = SEEN) -> tuple[Example, ...]:
    """Examples to fine-tune on, up to `TRAINED_ON` of each language."""
    rows = [e for language in languages for e in _examples(language, "train")[:TRAINED_ON]]
    return tuple(random.Random(0).sample(rows, len(rows)))


@cache
def held_out(language: str) -> tuple[Example, ...]:
    """Examples of packages that were not trained on: both held-out splits, no setting is chosen."""
    rows = _examples(language, "test") + _examples(language, "validation")
    return tuple(rows[:JUDGED_ON])


def majority(language: str) -> float:
    """The part of the most frequent topic: what a classifier reaches that reads nothing."""
    labels = [e.label for e in held_out(language)]
    return max(labels.count(label) for label in set(labels)) / len(labels)


def batches(tokenizer: Any, seed: int, size: int = BATCH) -> Callable[[int], dict[str, Tensor]]:
    """From a step's number to its batch of the seen languages."""
    chosen = batches_of(train_examples(), size, seed)
    return lambda step: encoder_batch(tokenizer, chosen(step), TOKENS)


def text_batches(tokenizer: Any, languages: Sequence[str], count: int) -> list[dict[str, Tensor]]:
    """`count` held-out texts of each language, a batch a language: to measure errors on."""
    return [encoder_batch(tokenizer, held_out(one)[:count], TOKENS) for one in languages]


def judge(model: nn.Module, tokenizer: Any) -> dict[str, dict[str, float]]:
    """For each language, whether the topic of each source package was right: 1.0 or 0.0."""
    found = {}
    for language in LANGUAGES:
        examples = held_out(language)
        chosen, _ = classify(model, tokenizer, examples, tokens=TOKENS)
        found[language] = {
            e.document: float(label == e.label) for e, label in zip(examples, chosen, strict=True)
        }
    return found


def accuracy(right: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The accuracy in each language."""
    return {language: fmean(rows.values()) for language, rows in right.items()}


def by_document(
    right: Mapping[str, Mapping[str, float]], languages: Sequence[str]
) -> dict[str, float]:
    """For each source package, the mean over those languages that it was judged in."""
    found: dict[str, list[float]] = defaultdict(list)
    for language in languages:
        for document, value in right[language].items():
            found[document].append(value)
    return {document: fmean(found[document]) for document in sorted(found)}


def measured(right: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a row stores: accuracies, and the documents that claims resample.

    "documents" are means over all languages, "seen" and "unseen" over their own, and "gap" is
    unseen minus seen of the packages that have both.
    """
    seen, unseen = by_document(right, SEEN), by_document(right, UNSEEN)
    both = sorted(set(seen) & set(unseen))

    def listed(values: Mapping[str, float]) -> list[float]:
        return [round(value, 3) for value in values.values()]

    return {
        "languages": {language: round(a, 4) for language, a in accuracy(right).items()},
        "documents": listed(by_document(right, LANGUAGES)),
        "seen": listed(seen),
        "unseen": listed(unseen),
        "gap": [round(unseen[d] - seen[d], 3) for d in both],
    }
