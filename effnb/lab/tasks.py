"""Small tasks from the corpora, for everything that fine-tunes.

    section = task("section")
    section.train[0].text, section.labels[section.train[0].label]
    train, validation = section.few_shot(shots=16, seed=0)

Seven tasks of three kinds, whose labels come from five sources:

| task | kind | what is asked | where the label comes from |
|---|---|---|---|
| section | classification | the topic of a description, six archive sections | Debian's archive |
| language | classification | the language of a short description, twelve | Debian's translators |
| work | classification | the book or manual that a passage is from, seven | the corpora |
| match | pair | does the short description belong to the long one? | the package's record |
| origin | pair | do two short descriptions come from one source package? | the source field |
| summary | generation | the short description, from the long one | the package's maintainer |
| expand | generation | the first sentence of the long description, from the short one | the same |

Splits are those of the corpora: all packages of a source, and all of a chapter, are on one side.
Many descriptions are near-duplicates across sources (`gcc-11-cross`, `gcc-12-cross`), so besides
that no two examples of a task are alike, within a split or between two (`distinct`).
Each example names its document, the unit over which to resample.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from effnb.lab import corpora
from effnb.lab._files import note_use
from effnb.lab.corpora import Package, Split

SIZES = {"train": 2048, "validation": 256, "test": 512}
"""Most examples of a task in each split."""
CHARACTERS = 200
"""About how much of a long text is given."""
ALIKE = 0.5
"""Texts that share at least this much of their pairs of adjacent words count as the same."""

TOPICS = {
    "system": ("admin",),
    "network": ("net", "web", "mail", "httpd"),
    "media": ("sound", "video", "graphics"),
    "science": ("science", "math", "electronics"),
    "text": ("text", "editors", "fonts", "localization"),
    "games": ("games",),
}
"""The coarse sections, and the archive sections that each holds."""
TONGUES = {
    "en": "English",
    "da": "Danish",
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pl": "Polish",
    "pt_BR": "Portuguese",
    "ru": "Russian",
    "zh_CN": "Chinese",
}
WORKS = {
    "Austen": "novel",
    "Bible": "bible",
    "Melville": "Moby-Dick",
    "PostgreSQL": "PostgreSQL documentation",
    "Python": "Python documentation",
    "SQLite": "SQLite documentation",
    "WordNet": "WordNet 3.0",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task.

    Attributes:
        document: The source package or chapter it is from; the unit of resampling.
        text: What is read.
        pair: The second text of a pair task, else empty.
        label: Index into the task's labels; -1 where text is to be written.
        target: What is to be written: the label's word, or a text.
    """

    document: str
    text: str
    pair: str
    label: int
    target: str


@dataclass(frozen=True, slots=True)
class Task:
    """A task with its three splits.

    Attributes:
        name: Its name.
        kind: "classification", "pair" or "generation".
        label_source: Who decided what is right.
        labels: The words for the labels, which a decoder is to write; none for generation.
        templates: Ways to put an example to a decoder, with `{text}` and `{pair}` in them. The
            answer follows after a space.
        train: Examples to train on, labels in turn.
        validation: Examples to choose settings by.
        test: Examples to report.
    """

    name: str
    kind: str
    label_source: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def prompt(self, example: Example, template: int = 0) -> str:
        """An example as a decoder reads it."""
        return self.templates[template].format(text=example.text, pair=example.pair)

    def few_shot(
        self, shots: int = 16, seed: int = 0
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """The low-resource setting: as many examples of each label to train and to validate on.

        Both are drawn from the training split, without overlap, as in Gao et al., "Making
        Pre-trained Language Models Better Few-shot Learners", 2021, arXiv 2012.15723. Where text is
        written, `shots` examples in all.

        Raises:
            ValueError: When a label has fewer than twice `shots` examples, or `shots` is below 1.
        """
        fewest = min(Counter(e.label for e in self.train).values())
        if not 1 <= shots <= fewest // 2:
            raise ValueError(
                f"shots is {shots}; {self.name} has {fewest} training examples of its rarest "
                f"label, so it must lie between 1 and {fewest // 2}."
            )
        order = random.Random(f"{self.name} {seed}").sample(self.train, len(self.train))
        train, validation = [], []
        taken: Counter[int] = Counter()
        for example in order:
            taken[example.label] += 1
            if taken[example.label] <= shots:
                train.append(example)
            elif taken[example.label] <= 2 * shots:
                validation.append(example)
        return tuple(train), tuple(validation)


def task(name: str) -> Task:
    """A task by its name, one of `NAMES`.

    Raises:
        ValueError: When there is none of that name.
    """
    if name not in _RECIPES:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(NAMES)}.")
    for corpus in _RECIPES[name].reads:
        note_use(f"corpus {corpus}", corpora.sha256(corpus))
    return _built(name)


# ------------------------------------------------------------------------------ what is alike


_WORDS = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]|[^\W\d_]+")
"""Words of letters; scripts that are written without spaces are read character by character."""


def shingles(text: str) -> frozenset[str]:
    """All pairs of adjacent words, without digits, so that versions do not count; or the words."""
    words = _WORDS.findall(text.lower())
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return frozenset(pairs or words or [""])


def alike(one: frozenset[str], other: frozenset[str]) -> float:
    r"""Jaccard similarity $|A \cap B| / |A \cup B|$."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def distinct(texts: Sequence[str], threshold: float = ALIKE) -> list[int]:
    r"""Indices of the texts to keep: those less than `threshold` alike to every earlier one kept.

    Exact. Two sets with $J(A, B) \ge t$ share at least $\lceil t |A| \rceil$ elements, so one of
    the first $|A| - \lceil t |A| \rceil + 1$ of $A$ in any fixed order is among the like part of
    $B$; with the rarest in front, few pairs have to be compared (Chaudhuri et al. 2006, "A
    primitive operator for similarity joins in data cleaning", prefix filtering).
    """
    sets = [shingles(text) for text in texts]
    frequency = Counter(s for group in sets for s in group)
    index: dict[str, list[int]] = {}
    kept = []
    for i, group in enumerate(sets):
        rare = sorted(group, key=lambda s: (frequency[s], s))
        rare = rare[: len(rare) - math.ceil(threshold * len(rare)) + 1]
        candidates = {j for s in rare for j in index.get(s, ())}
        if all(alike(group, sets[j]) < threshold for j in candidates):
            kept.append(i)
            for s in rare:
                index.setdefault(s, []).append(i)
    return kept


# ---------------------------------------------------------------------------------- the recipes


@dataclass(frozen=True)
class _Recipe:
    kind: str
    label_source: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    reads: tuple[str, ...]
    candidates: Callable[[Split, random.Random], Iterator[Example]]


@cache
def _built(name: str) -> Task:
    recipe = _RECIPES[name]
    pools = {
        split: _in_turn(recipe.candidates(split, random.Random(f"{name} {split}")), 3 * size // 2)
        for split, size in SIZES.items()
    }
    every = [(split, example) for split, pool in pools.items() for example in pool]
    kept: dict[str, list[Example]] = {split: [] for split in SIZES}
    for i in distinct([f"{e.text} {e.pair}" for _, e in every]):
        split, example = every[i]
        kept[split].append(example)
    splits = {split: tuple(_in_turn(iter(kept[split]), size)) for split, size in SIZES.items()}
    return Task(name, recipe.kind, recipe.label_source, recipe.labels, recipe.templates, **splits)


def _in_turn(examples: Iterator[Example], count: int) -> list[Example]:
    """The first `count` examples with the labels in turn, as long as each has some left."""
    queues: dict[int, list[Example]] = {}
    for example in examples:
        queues.setdefault(example.label, []).append(example)
    result: list[Example] = []
    turns = max((len(queue) for queue in queues.values()), default=0)
    for turn in range(turns):
        result += [queues[label][turn] for label in sorted(queues) if turn < len(queues[label])]
        if len(result) >= count:
            break
    return result[:count]


def clipped(text: str, characters: int = CHARACTERS) -> str:
    """The beginning of a text on one line, cut between two words."""
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    return text[:characters].rsplit(" ", 1)[0]


def _shuffled(rows: Sequence, rng: random.Random) -> list:
    return rng.sample(rows, len(rows))


def _one_per_source(split: Split, rng: random.Random) -> Iterator[Package]:
    """Packages in random order, the first of each source, with descriptions worth reading."""
    seen: set[str] = set()
    for package in _shuffled(corpora.packages(split), rng):
        if package.source not in seen and len(package.synopsis) >= 12 and len(package.text) >= 60:
            seen.add(package.source)
            yield package


def _section(split: Split, rng: random.Random) -> Iterator[Example]:
    coarse = {section: topic for topic, held in TOPICS.items() for section in held}
    names = list(TOPICS)
    # The rarer topics have few sources in the held-out splits: every package of a source counts.
    for package in _shuffled(corpora.packages(split), rng):
        topic = coarse.get(package.section)
        if topic is not None and len(package.text) >= 60:
            text = clipped(f"{package.synopsis}. {package.text}")
            yield Example(package.source, text, "", names.index(topic), topic)


def _language(split: Split, rng: random.Random) -> Iterator[Example]:
    rows = [(p.source, "en", p.synopsis) for p in _one_per_source(split, rng)][:400]
    for language in corpora.LANGUAGES:
        here = _shuffled(corpora.translations(language, split), rng)
        rows += [(t.original().source, language, t.synopsis) for t in here]
    names = list(TONGUES)
    for source, language, text in rows:
        if len(text) >= 8:
            yield Example(source, clipped(text), "", names.index(language), TONGUES[language])


def _work(split: Split, rng: random.Random) -> Iterator[Example]:
    texts = [(c.kind, f"{c.work} {c.chapter}", c.text) for c in corpora.novels(split)]
    texts += [(m.work, f"{m.work}: {m.document}", m.text) for m in corpora.manuals(split)]
    labels = {kind: i for i, kind in enumerate(WORKS.values())}
    names = list(WORKS)
    per_document = max(1, 4 * SIZES[split] // len(texts))
    for kind, document, text in _shuffled(texts, rng):
        if kind not in labels:
            continue
        # Passages begin where a sentence, a verse or an entry begins.
        starts = [m.end() for m in re.finditer(r"[.!?:;]\s+|\n+", text) if m.end() + 80 < len(text)]
        wanted = 8 * per_document if labels[kind] == names.index("Melville") else per_document
        for start in rng.sample(starts, min(wanted, len(starts))):
            passage = clipped(text[start : start + 2 * CHARACTERS], CHARACTERS)
            if len(passage) >= 80:
                yield Example(document, passage, "", labels[kind], names[labels[kind]])


def _match(split: Split, rng: random.Random) -> Iterator[Example]:
    chosen = list(_one_per_source(split, rng))
    by_section: dict[str, list[Package]] = {}
    for package in chosen:
        by_section.setdefault(package.section, []).append(package)
    for i, package in enumerate(chosen):
        label, short = i % 2, package.synopsis
        if not label:
            short = rng.choice(by_section[package.section]).synopsis
            if short == package.synopsis:
                continue
        yield Example(
            package.source, clipped(short), clipped(package.text), label, ("no", "yes")[label]
        )


def _origin(split: Split, rng: random.Random) -> Iterator[Example]:
    by_source: dict[str, list[Package]] = {}
    by_section: dict[str, list[Package]] = {}
    for package in _shuffled(corpora.packages(split), rng):
        if len(package.synopsis) >= 12:
            by_source.setdefault(package.source, []).append(package)
    first = [group[0] for group in by_source.values()]
    for package in first:
        by_section.setdefault(package.section, []).append(package)
    related = [group for group in by_source.values() if group[1:]]
    for i, group in enumerate(related):
        one, label = group[0], i % 2
        mates = [p for p in group[1:] if alike(*map(shingles, (one.synopsis, p.synopsis))) < ALIKE]
        if not mates:
            continue
        other = mates[0]
        if not label:  # like `other`, but of another source
            other = rng.choice(by_section.get(other.section, [one]))
            if other.source == one.source:
                continue
        texts = clipped(one.synopsis), clipped(other.synopsis)
        yield Example(one.source, *texts, label, ("no", "yes")[label])


def _summary(split: Split, rng: random.Random) -> Iterator[Example]:
    for package in _one_per_source(split, rng):
        yield Example(package.source, clipped(package.text), "", -1, package.synopsis)


def _expand(split: Split, rng: random.Random) -> Iterator[Example]:
    for package in _one_per_source(split, rng):
        first = re.split(r"(?<=[.!?])\s", " ".join(package.text.split()), maxsplit=1)[0]
        if 40 <= len(first) <= 160:
            yield Example(package.source, clipped(package.synopsis), "", -1, first)


_ENGLISH = ("packages",)
_YES_NO = ("no", "yes")
_RECIPES = {
    "section": _Recipe(
        "classification",
        "the archive's sections",
        tuple(TOPICS),
        (
            "{text}\n\nTopic:",
            "Package: {text}\nWhich of system, network, media, science, text and games?",
            "What is this about? {text}\nAnswer:",
        ),
        _ENGLISH,
        _section,
    ),
    "language": _Recipe(
        "classification",
        "the translators' languages",
        tuple(TONGUES.values()),
        (
            "{text}\n\nLanguage:",
            "Text: {text}\nIt is written in",
            "Which language? {text}\nAnswer:",
        ),
        ("packages", *(f"translations/{language}" for language in corpora.LANGUAGES)),
        _language,
    ),
    "work": _Recipe(
        "classification",
        "the corpora's books and manuals",
        tuple(WORKS),
        ("{text}\n\nFrom:", "Passage: {text}\nIt is taken from", "Which work? {text}\nAnswer:"),
        ("novels", "manuals"),
        _work,
    ),
    "match": _Recipe(
        "pair",
        "the package's record",
        _YES_NO,
        (
            "{text}\n\n{pair}\n\nMatch:",
            "Long: {pair}\nShort: {text}\nDo they describe one package?",
            'Is "{text}" a summary of this? {pair}\nAnswer:',
        ),
        _ENGLISH,
        _match,
    ),
    "origin": _Recipe(
        "pair",
        "the source field",
        _YES_NO,
        (
            "{text}\n{pair}\n\nSame source:",
            "One: {text}\nTwo: {pair}\nAre they built from one source?",
            'Does "{text}" belong with "{pair}"?\nAnswer:',
        ),
        _ENGLISH,
        _origin,
    ),
    "summary": _Recipe(
        "generation",
        "the maintainer's short description",
        (),
        (
            "{text}\n\nSummary:",
            "Long: {text}\nShort:",
            "In one line, what is this? {text}\nAnswer:",
        ),
        _ENGLISH,
        _summary,
    ),
    "expand": _Recipe(
        "generation",
        "the maintainer's long description",
        (),
        ("{text}\n\nDescription:", "Short: {text}\nLong:", "Say more about: {text}\nAnswer:"),
        _ENGLISH,
        _expand,
    ),
}
NAMES = tuple(_RECIPES)
"""All tasks."""
