"""The corpora that ship with the workbook, as plain Python objects.

`data/DATASHEET.md` says where each comes from, under which licence, and what is wrong with it.
Everything here is read from the repository, checked against `data/corpora/MANIFEST.json`, in less
than a second; nothing is downloaded.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from effnb.lab._files import checked_bytes, data_folder, note_use, read_manifest

Split = Literal["train", "validation", "test"]
SPLITS = ("train", "validation", "test")
LANGUAGES = ("da", "de", "es", "fr", "it", "ja", "ko", "pl", "pt_BR", "ru", "zh_CN")
NAMES = ("novels", "packages", "manuals")
REMEDY = "git checkout -- data/corpora"


@dataclass(frozen=True, slots=True)
class Chapter:
    """One chapter of a novel or of a book of the Bible.

    Attributes:
        work: Title of the novel, or name of the book of the Bible.
        year: Year of publication.
        chapter: Number of the chapter within the work, from 1.
        kind: "novel" or "bible".
        split: "train", "validation" (every 25th chapter) or "test" (whole works).
        text: Paragraphs separated by blank lines; in the Bible one verse a line.
    """

    work: str
    year: int
    chapter: int
    kind: str
    split: str
    text: str


@dataclass(frozen=True, slots=True)
class Manual:
    """One document of packaged prose: a page of a manual, a book, a chapter, forty entries.

    Attributes:
        work: Title of the manual, the book or the dictionary.
        licence: Licence of the work, as an SPDX identifier where there is one.
        document: Name of the page, book, chapter or group of entries.
        split: "train", "validation" or "test"; whole documents are held out.
        text: Paragraphs separated by blank lines; verses and entries one a line.
    """

    work: str
    licence: str
    document: str
    split: str
    text: str


@dataclass(frozen=True, slots=True)
class Package:
    """The English description of one Debian package.

    Attributes:
        name: Name of the binary package.
        source: Source package; all packages of one source are in one split.
        section: Archive section, the label for classification.
        split: "train" (90 % of the sources), "validation" or "test" (5 % each).
        synopsis: The short description, one line.
        text: The long description.
    """

    name: str
    source: str
    section: str
    split: str
    synopsis: str
    text: str

    @property
    def document(self) -> str:
        """The form that language models are trained on: name, synopsis, long description."""
        return f"{self.name}: {self.synopsis}\n\n{self.text}"


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated description, linked by its name to the English original.

    Attributes:
        name: Name of the package; `original()` gives the English description.
        language: Code of the language, one of `LANGUAGES`.
        synopsis: The short description in that language.
        text: The long description in that language.
    """

    name: str
    language: str
    synopsis: str
    text: str

    def original(self) -> Package:
        """The English description this one translates."""
        return _packages_by_name()[self.name]


def sha256(name: str) -> str:
    """SHA-256 of a corpus's file, as the manifest has it: "novels", "translations/de".

    Raises:
        ValueError: When there is no such corpus.
        DamagedFile: When the manifest is missing or damaged.
    """
    manifest = read_manifest(data_folder() / "corpora" / "MANIFEST.json", REMEDY)
    if name not in manifest["files"]:
        raise ValueError(
            f"there is no corpus {name!r}; choose one of {', '.join(manifest['files'])}."
        )
    return manifest["files"][name]["sha256"]


def _columns(entry: str) -> dict[str, list]:
    folder = data_folder() / "corpora"
    manifest = read_manifest(folder / "MANIFEST.json", REMEDY)
    about = manifest["files"][entry]
    packed = checked_bytes(folder / about["file"], about["sha256"], about["bytes"], REMEDY)
    return json.loads(lzma.decompress(packed))


def _rows(kind: type, entry: str, **fixed: str) -> tuple:
    columns = _columns(entry)
    names = [n for n in kind.__dataclass_fields__ if n not in fixed]
    return tuple(
        kind(**dict(zip(names, row, strict=True)), **fixed)
        for row in zip(*(columns[n] for n in names), strict=True)
    )


def _all(entry: str) -> tuple:
    """Every record of a corpus; what is stored later says that this corpus was read."""
    note_use(f"corpus {entry}", sha256(entry))
    return _records(entry)


@cache
def _records(entry: str) -> tuple:
    if entry == "novels":
        return _rows(Chapter, entry)
    if entry == "packages":
        return _rows(Package, entry)
    if entry == "manuals":
        return _rows(Manual, entry)
    return _rows(Translation, entry, language=entry.partition("/")[2])


@lru_cache(maxsize=1)
def _packages_by_name() -> dict[str, Package]:
    return {package.name: package for package in _all("packages")}


def _chosen(rows: tuple, split: Split | None) -> list:
    if split is not None and split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return [row for row in rows if split is None or row.split == split]


def novels(split: Split | None = None) -> list[Chapter]:
    """Six novels by Jane Austen and the King James Bible, chapter by chapter."""
    return _chosen(_all("novels"), split)


def packages(split: Split | None = None) -> list[Package]:
    """English descriptions of Debian packages, in alphabetical order of their names."""
    return _chosen(_all("packages"), split)


def manuals(split: Split | None = None) -> list[Manual]:
    """Documentation, another Bible, Moby-Dick and a dictionary's entries, document by document."""
    return _chosen(_all("manuals"), split)


def translations(language: str, split: Split | None = None) -> list[Translation]:
    """Descriptions in another language; `split` is the one of the English original."""
    if language not in LANGUAGES:
        raise ValueError(
            f"there is no language {language!r}; choose one of {', '.join(LANGUAGES)}."
        )
    rows = _all(f"translations/{language}")
    if split is None:
        return list(rows)
    wanted = {package.name for package in packages(split)}
    return [row for row in rows if row.name in wanted]


def documents(name: str, split: Split | None = None) -> list[str]:
    """The texts of one corpus as language models read them: chapters, or whole descriptions."""
    if name == "novels":
        return [chapter.text for chapter in novels(split)]
    if name == "packages":
        return [package.document for package in packages(split)]
    if name == "manuals":
        return [manual.text for manual in manuals(split)]
    raise ValueError(f"there is no corpus {name!r}; choose one of {', '.join(NAMES)}.")


# -------------------------------------------------------------------------- ranked choice


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """One question of the ranked-choice task.

    Attributes:
        context: Name, synopsis and the first part of a long description.
        choices: Continuations; one is the true one, the others come from packages of the same
            section.
        answer: Index of the true continuation.
        section: Archive section of the package.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    section: str


def choice_items(
    count: int = 200,
    split: Split = "test",
    choices: int = 4,
    seed: int = 0,
    context_characters: int = 240,
    choice_characters: int = 120,
) -> tuple[ChoiceItem, ...]:
    """The ranked-choice task: which text continues this package's description?

    Each context is cut at a word boundary, and every choice has about the same length, so that
    neither length nor section gives the answer away. Distractors are what is at the same
    place in other descriptions of the section, from other source packages, no two alike.

    Args:
        count: Number of questions.
        split: Split to draw from.
        choices: Continuations per question; guessing scores 1 / `choices`.
        seed: Seed of the draw.
        context_characters: About how much of the document is given.
        choice_characters: About how long each continuation is.

    Raises:
        ValueError: When the split has too few long descriptions for `count` questions.
    """
    note_use("corpus packages", sha256("packages"))
    return _choice_items(count, split, choices, seed, context_characters, choice_characters)


@lru_cache(maxsize=16)
def _choice_items(
    count: int,
    split: Split,
    choices: int,
    seed: int,
    context_characters: int,
    choice_characters: int,
) -> tuple[ChoiceItem, ...]:
    """The same, computed once for each setting."""
    if choices < 2:
        raise ValueError(f"choices is {choices}; a ranked choice needs at least 2.")

    def cut(text: str, at: int) -> int:
        """The first word boundary from `at` on."""
        while at < len(text) and not text[at].isspace():
            at += 1
        return min(at, len(text))

    parts: dict[str, list[tuple[Package, str, str]]] = {}
    for package in packages(split):
        text = package.document
        middle = cut(text, context_characters)
        end = cut(text, middle + choice_characters)
        if end - middle >= choice_characters:
            parts.setdefault(package.section, []).append((package, text[:middle], text[middle:end]))
    rng = random.Random(seed)
    pool = [part for group in parts.values() for part in group]
    rng.shuffle(pool)
    items: list[ChoiceItem] = []
    seen: set[str] = set()
    for package, context, truth in pool:
        others: dict[str, str] = {}  # one continuation per other source, none seen twice
        for other, _, continuation in parts[package.section]:
            if other.source != package.source and continuation != truth:
                others.setdefault(continuation, other.source)
        sources: dict[str, str] = {source: text for text, source in others.items()}
        if len(sources) < choices - 1 or truth in seen:
            continue
        seen.add(truth)
        options = [truth, *(sources[s] for s in rng.sample(sorted(sources), choices - 1))]
        order = list(range(choices))
        rng.shuffle(order)
        items.append(
            ChoiceItem(context, tuple(options[i] for i in order), order.index(0), package.section)
        )
        if len(items) == count:
            return tuple(items)
    raise ValueError(
        f"the {split} split gives {len(items)} questions of this kind; ask for at most that many."
    )


# ---------------------------------------------------------------------- key-value recall


@lru_cache(maxsize=1)
def _whole_words() -> frozenset[str]:
    return frozenset(
        word for text in documents("novels", "train") for word in re.findall(r"[a-z]+", text)
    )


def recall_words(tokenizer) -> list[str]:
    """Whole words of four letters or more, one token each: the keys and values of recall."""
    single = [
        (i, token[1:])
        for token, i in tokenizer.get_vocab().items()
        if len(token) >= 5 and token[0] == "Ġ" and token[1:] in _whole_words()
    ]
    return [word for _, word in sorted(single)][:600]


@dataclass(frozen=True, slots=True)
class Recall:
    """A sequence in which values must be recalled from their keys.

    Attributes:
        ids: Token ids.
        answers: Positions in `ids` of the values that stood beside the same key before.
        distances: For each answer, how many tokens back its key last stood.
        text: Positions in `ids` of the running text, if there is any.
    """

    ids: list[int]
    answers: list[int]
    distances: list[int]
    text: tuple[int, ...] = ()


def dense_recall(tokenizer, rng: random.Random, length: int, pairs: int) -> Recall:
    """Records `[ key value]` drawn from `pairs` pairs again and again, until `length` tokens."""
    words = recall_words(tokenizer)
    keys, values = rng.sample(words, pairs), rng.choices(words, k=pairs)
    ids, answers, distances, last = [], [], [], {}
    while len(ids) < length:
        k = rng.randrange(pairs)
        record = tokenizer.encode(f"[ {keys[k]} {values[k]}]\n", add_special_tokens=False)
        position = len(ids) + 2  # after "[" and the key
        if k in last and position < length:
            answers.append(position)
            distances.append(position - last[k])
        last[k] = position
        ids += record
    return Recall(ids[:length], answers, distances)


def recall_at(
    tokenizer, rng: random.Random, length: int, depth: float, pairs: int = 12
) -> tuple[list[int], int]:
    """Records of `dense_recall`, of which one stands alone at a given depth and is asked for.

    All other pairs are drawn again and again. The last record repeats the key that was told once.

    Args:
        tokenizer: The tokenizer of the model.
        rng: Source of randomness.
        length: Tokens at most; as many whole records as fit.
        depth: Where the record stands: 0 for the first, 1 for the last before the question.
        pairs: Pairs of keys and values in all.

    Returns:
        The token ids, which end with the answer and its bracket, and the answer's place in them.

    Raises:
        ValueError: A depth outside 0 … 1, fewer than two pairs, or no room for two records.
    """
    words = recall_words(tokenizer)
    keys, values = rng.sample(words, pairs), rng.choices(words, k=pairs)
    records = [
        tokenizer.encode(f"[ {key} {value}]\n", add_special_tokens=False)
        for key, value in zip(keys, values)
    ]
    count = length // max(map(len, records))
    if not 0 <= depth <= 1 or pairs < 2 or count < 2:
        raise ValueError(
            f"depth is {depth}, with {pairs} pairs in {length} tokens; a depth lies between 0 and "
            "1, and at least two pairs and two records are needed."
        )
    order = [rng.randrange(1, pairs) for _ in range(count - 2)]
    order.insert(round(depth * (count - 2)), 0)
    ids = [token for number in [*order, 0] for token in records[number]]
    return ids, len(ids) - len(records[0]) + 2  # after "[" and the key


def planted_recall(
    tokenizer,
    rng: random.Random,
    filler: list[int],
    length: int,
    pairs: int = 1,
    distance: int | None = None,
) -> Recall:
    """Records planted in running text, and asked for at the end.

    Args:
        tokenizer: The tokenizer of the model.
        rng: Source of randomness.
        filler: Token ids of running text, at least `length` of them.
        length: Tokens in all.
        pairs: Number of records planted; the last record of the sequence repeats one of them.
        distance: Tokens between the planted value and its answer; drawn uniformly when None.

    Raises:
        ValueError: When the filler is too short, or the distance does not fit.
    """
    words = recall_words(tokenizer)
    keys, values = rng.sample(words, pairs), rng.choices(words, k=pairs)
    records = [
        tokenizer.encode(f"\n[ {key} {value}]\n", add_special_tokens=False)
        for key, value in zip(keys, values)
    ]
    size = len(records[0])
    room = length - size * (pairs + 1)
    if len(filler) < room or room < 0:
        raise ValueError(
            f"{len(filler)} tokens of filler do not fill a sequence of {length} with {pairs} "
            "records."
        )
    # The asked record has `ahead` tokens of filler after it. The others stand anywhere, but before
    # it when the distance is prescribed.
    latest = room
    if distance is None:
        ahead = rng.randint(0, room)
    elif size <= distance <= room + size:
        ahead = distance - size
        latest = room - ahead
    else:
        raise ValueError(f"distance is {distance}; it must lie between {size} and {room + size}.")
    cuts = sorted([(room - ahead, 0), *((rng.randint(0, latest), -i) for i in range(1, pairs))])
    ids, text, start, planted = [], [], 0, 0
    for cut, i in [*cuts, (room, 0)]:
        text += range(len(ids), len(ids) + cut - start)
        ids += filler[start:cut]
        start = cut
        if i == 0 and not planted:
            planted = len(ids) + 3
        ids += records[i]
    position = len(ids) - size + 3  # after the newline, "[" and the key
    return Recall(ids, [position], [position - planted], tuple(text))
