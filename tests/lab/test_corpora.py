"""The corpora: splits that do not leak, tasks that are fair, files that are checked."""

import collections
import json
import random
import re
import shutil
import unicodedata

import pytest

from effnb.lab import _files, corpora
from effnb.lab._files import DamagedFile


class Words:
    """A tokenizer with one token per word or mark, enough for the recall generators."""

    def __init__(self):
        self.words = sorted(set(re.findall(r"[a-z]{4,}", corpora.documents("novels")[0])))[:400]
        self.vocabulary = {f"Ġ{word}": i for i, word in enumerate(self.words)}
        for mark in ("[", "]", "Ċ"):
            self.vocabulary[mark] = len(self.vocabulary)

    def get_vocab(self):
        return self.vocabulary

    def encode(self, text, add_special_tokens=True):
        parts = re.findall(r"\[|\]|\n|[a-z]+", text)
        return [self.vocabulary[{"\n": "Ċ"}.get(p, p if p in "[]" else f"Ġ{p}")] for p in parts]


@pytest.fixture(scope="module")
def words():
    return Words()


# --------------------------------------------------------------------------------- the texts


def test_novels_and_bible_are_whole():
    chapters = corpora.novels()
    works = collections.Counter(c.work for c in chapters)
    assert works["Emma"] == 55 and works["Pride and Prejudice"] == 61 and works["Persuasion"] == 24
    assert works["Genesis"] == 50 and works["Psalms"] == 150 and works["Revelation"] == 22
    bible = {c.work for c in chapters if c.kind == "bible"}
    assert len(bible) == 66
    assert sum(len(c.text.split("\n")) for c in chapters if c.kind == "bible") == 31_102
    genesis = next(c for c in chapters if c.work == "Genesis")
    assert genesis.text.startswith("In the beginning God created the heaven and the earth.\n")
    assert all(c.text.strip() == c.text and len(c.text) > 30 for c in chapters)


def test_paragraphs_are_unwrapped():
    """A hard line break inside a sentence of a novel would be one the model has to learn."""
    for chapter in corpora.novels():
        if chapter.kind == "novel":
            assert not re.search(r"[a-z,]\n[a-z]", chapter.text), chapter.work


def test_whole_works_are_held_out():
    test = {c.work for c in corpora.novels("test")}
    assert test == {"Persuasion", "Ruth", "Ecclesiastes", "Jonah", "John", "James"}
    for split in ("train", "validation"):
        assert not test & {c.work for c in corpora.novels(split)}
    assert corpora.novels("validation") and sum(
        len(corpora.novels(s)) for s in corpora.SPLITS
    ) == len(corpora.novels())


def test_no_source_package_straddles_splits():
    splits = collections.defaultdict(set)
    for package in corpora.packages():
        splits[package.source].add(package.split)
    assert all(len(found) == 1 for found in splits.values())
    share = collections.Counter(p.split for p in corpora.packages())
    assert 0.85 < share["train"] / share.total() < 0.95
    assert 55_000 < share.total() < 70_000


def test_packages_have_labels_and_texts():
    packages = corpora.packages()
    sections = collections.Counter(p.section for p in packages)
    assert len(sections) > 30 and min(sections.values()) > 100
    assert len({p.name for p in packages}) == len(packages)
    assert all(p.synopsis and len(p.text) >= 40 for p in packages)
    assert not any(re.search(r"^ \.$", p.text, re.M) for p in packages)
    package = next(p for p in packages if p.name == "gimp")
    assert package.document.startswith("gimp: GNU Image Manipulation Program\n\nGIMP is")


@pytest.mark.parametrize("language", corpora.LANGUAGES)
def test_translations_are_linked_and_translated(language):
    rows = corpora.translations(language)
    assert len(rows) > 900
    for row in rows:
        original = row.original()
        assert original.name == row.name and row.language == language
        assert row.text != original.text
    scripts = {"ru": "CYRILLIC", "ja": "CJK", "zh_CN": "CJK", "ko": "HANGUL"}
    if language in scripts:
        joined = "".join(row.text for row in rows[:50])
        assert any(unicodedata.name(c, "").startswith(scripts[language]) for c in joined)
    train = corpora.translations(language, "train")
    assert train and all(row.original().split == "train" for row in train)


# ---------------------------------------------------------------------------------- the tasks


def test_ranked_choice_is_fair():
    items = corpora.choice_items(200)
    held_out = {p.name: p for p in corpora.packages("test")}
    for item in items:
        assert len(item.choices) == len(set(item.choices)) == 4
        name = item.context.split(":")[0]
        assert held_out[name].document.startswith(item.context + item.choices[item.answer])
        lengths = [len(choice) for choice in item.choices]
        assert max(lengths) < min(lengths) + 60
        assert held_out[name].section == item.section
    answers = collections.Counter(item.answer for item in items)
    assert all(30 < answers[i] < 70 for i in range(4))
    assert len({item.choices[item.answer] for item in items}) == 200


def test_distractors_come_from_other_sources_of_the_section():
    by_text = collections.defaultdict(set)
    for package in corpora.packages("test"):
        by_text[package.document[: 400 + 600]].add((package.section, package.source))
    for item in corpora.choice_items(60):
        own = {p.source for p in corpora.packages("test") if p.document.startswith(item.context)}
        for i, choice in enumerate(item.choices):
            homes = {h for text, found in by_text.items() if choice in text for h in found}
            if i != item.answer:
                assert any(s == item.section and source not in own for s, source in homes)


def test_ranked_choice_does_not_depend_on_chance():
    assert corpora.choice_items(20, seed=3) == corpora.choice_items(20, seed=3)
    assert corpora.choice_items(20, seed=3) != corpora.choice_items(20, seed=4)
    with pytest.raises(ValueError, match="gives [0-9]+ questions of this kind"):
        corpora.choice_items(100_000)
    with pytest.raises(ValueError, match="needs at least 2"):
        corpora.choice_items(5, choices=1)


@pytest.mark.parametrize("seed", range(20))
def test_answers_stood_before(words, seed):
    rng = random.Random(seed)
    for recall in (
        corpora.dense_recall(words, rng, 200, pairs=6),
        corpora.planted_recall(words, rng, list(range(150)), 120, pairs=1 + seed % 5),
    ):
        assert recall.answers and len(recall.answers) == len(recall.distances)
        for answer, distance in zip(recall.answers, recall.distances, strict=True):
            assert recall.ids[answer] == recall.ids[answer - distance]
            assert recall.ids[answer - 1] == recall.ids[answer - distance - 1]


@pytest.mark.parametrize("distance", [5, 20, 60, 109])
def test_planted_recall_keeps_its_distance(words, distance):
    for pairs in (1, 2):
        if pairs == 2 and distance > 100:
            continue
        found = corpora.planted_recall(
            words, random.Random(1), list(range(200)), 120, pairs, distance + 1
        )
        assert found.distances == [distance + 1] and len(found.ids) == 120
        assert [found.ids[i] for i in found.text] == list(range(len(found.text)))


def test_planted_recall_refuses_what_does_not_fit(words):
    rng = random.Random(0)
    with pytest.raises(ValueError, match="distance is 119; it must lie between"):
        corpora.planted_recall(words, rng, list(range(200)), 120, 1, 119)
    with pytest.raises(ValueError, match="do not fill a sequence of 120"):
        corpora.planted_recall(words, rng, list(range(20)), 120)


# ---------------------------------------------------------------------------------- the files


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the corpora in a folder that a test may damage."""
    shutil.copytree(_files.data_folder() / "corpora", tmp_path / "corpora")
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path))
    _files.data_folder.cache_clear()
    corpora._records.cache_clear()
    yield tmp_path / "corpora"
    monkeypatch.undo()
    _files.data_folder.cache_clear()
    corpora._records.cache_clear()


def flip(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "has the right size but another content"),
        (lambda content: content[:1000], "has 1,000 bytes instead of"),
        (lambda content: b"", "has 0 bytes instead of"),
        (None, "is missing"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy(copied, damage, message):
    path = copied / "packages.json.xz"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(DamagedFile) as caught:
        corpora.packages()
    sentence = str(caught.value)
    assert message in sentence and "\n" not in sentence
    assert sentence.startswith("packages.json.xz is") and "git checkout -- data/corpora" in sentence
    path.write_bytes(content)
    assert len(corpora.packages()) > 50_000  # nothing of the failure was kept


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "MANIFEST.json is damaged"), (None, "MANIFEST.json is missing")],
)
def test_a_damaged_manifest_is_named(copied, content, message):
    path = copied / "MANIFEST.json"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(DamagedFile, match=message):
        corpora.novels()


def test_a_missing_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path / "nowhere"))
    _files.data_folder.cache_clear()
    try:
        with pytest.raises(DamagedFile, match="does not exist: run from a clone"):
            _files.data_folder()
    finally:
        monkeypatch.undo()
        _files.data_folder.cache_clear()


# ------------------------------------------------------------------------------------- manuals

LICENCES = {
    "Python documentation": "PSF-2.0",
    "PostgreSQL documentation": "PostgreSQL",
    "SQLite documentation": "public domain",
    "World English Bible": "public domain",
    "Moby-Dick": "public domain",
    "WordNet 3.0": "WordNet-3.0",
}


def test_manuals_are_whole_and_each_says_its_licence():
    manuals = corpora.manuals()
    assert {m.work: m.licence for m in manuals} == LICENCES
    chapters = [m.document for m in manuals if m.work == "Moby-Dick"]
    assert len(chapters) > 130 and len(set(chapters)) == len(chapters)
    first = next(m.text for m in manuals if m.document == "chapter 1" and m.work == "Moby-Dick")
    assert first.startswith("Call me Ishmael.")
    books = {m.document for m in manuals if m.work == "World English Bible"}
    assert len(books) == 80 and any("Genesis" in book for book in books)
    assert len({(m.work, m.document) for m in manuals}) == len(manuals)
    assert sum(len(m.text) for m in manuals) > 20_000_000
    assert corpora.documents("manuals", "test") == [m.text for m in corpora.manuals("test")]


def test_manuals_are_prose():
    for manual in corpora.manuals():
        assert len(manual.text) >= 400 and manual.text.strip() == manual.text
        assert not set(manual.text) & set("‘’“”–—…\xa0")
        if manual.work.endswith("documentation"):
            letters = sum(c.isalpha() or c == " " for c in manual.text)
            assert letters > 0.8 * len(manual.text), manual.document
    marked = [m for m in corpora.manuals() if re.search(r"</(?:p|div|li|span|code)>", m.text)]
    assert len(marked) < 10  # those that write about HTML


def test_documents_of_manuals_are_held_out_whole():
    counts = collections.Counter(m.split for m in corpora.manuals())
    for split in ("validation", "test"):
        assert 0.03 < counts[split] / len(corpora.manuals()) < 0.07
    held = {m.document for m in corpora.manuals("test") if m.work == "World English Bible"}
    bible = {c.work for c in corpora.novels("test") if c.kind == "bible"}
    assert len(held) == len(bible) == 5
    for book in bible:  # each in another translation, under a longer title
        assert any(book in title for title in held), book


def test_no_held_out_paragraph_of_manuals_is_trained_on():
    """Not in the manuals' own training text, nor in that of the other corpora."""

    def paragraphs(texts):
        return {
            re.sub(r"\W+", " ", part.lower()).strip()
            for text in texts
            for part in text.split("\n")
            if len(part) > 40
        }

    held = paragraphs(corpora.documents("manuals", "test"))
    assert len(held) > 3_000
    for name in corpora.NAMES:
        shared = held & paragraphs(corpora.documents(name, "train"))
        assert len(shared) <= 0.001 * len(held), (name, sorted(shared)[:3])


def test_the_held_out_text_of_one_corpus_is_not_trained_on_in_another():
    """The two Bibles tell the same; verse by verse they must not be the same words."""
    held = {line for c in corpora.novels("test") for line in c.text.split("\n") if len(line) > 60}
    for name in ("packages", "manuals"):
        training = {line for text in corpora.documents(name, "train") for line in text.split("\n")}
        assert len(held & training) <= 0.001 * len(held), name


def test_the_notices_that_must_stay_with_the_texts_do():
    notices = (_files.data_folder() / "corpora" / "NOTICES.txt").read_text(encoding="utf-8")
    said = " ".join(notices.split())
    for words in (
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        "Copyright (c) 2001-2023 Python Software Foundation",
        "PostgreSQL Global Development Group",
        "The Regents of the University of California",
        "provided that the above copyright notice and this paragraph and the following two",
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.",
        "The name of Princeton University or Princeton may not be used in advertising",
    ):
        assert words in said
    sheet = (_files.data_folder() / "DATASHEET.md").read_text(encoding="utf-8")
    assert "`corpora/NOTICES.txt`" in sheet
    for licence in ("PSF-2.0", "PostgreSQL", "WordNet-3.0"):
        assert licence in sheet


def test_the_manifest_counts_what_is_there():
    manifest = json.loads((_files.data_folder() / "corpora" / "MANIFEST.json").read_text())
    files = manifest["files"]
    assert files["novels"]["records"] == len(corpora.novels())
    assert files["packages"]["records"] == len(corpora.packages())
    assert files["manuals"]["records"] == len(corpora.manuals())
    assert sum(entry["bytes"] for entry in files.values()) < 16 * 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corpora.novels("dev"), "there is no split 'dev'; choose one of train, validation"),
        (lambda: corpora.documents("poems"), "there is no corpus 'poems'; choose one of novels"),
        (lambda: corpora.translations("en"), "there is no language 'en'; choose one of da, de"),
    ],
)
def test_unknown_names_list_the_known_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_record_stands_once_at_its_depth_and_is_asked_for(words, depth):
    ids, answer = corpora.recall_at(words, random.Random(0), 300, depth)
    assert 280 < len(ids) <= 300
    key = ids[answer - 1]
    told = [at for at in range(answer - 1) if ids[at] == key and ids[at - 1] == ids[answer - 2]]
    assert len(told) == 1
    assert ids[told[0] + 1] == ids[answer]
    size = len(ids) - answer + 2
    last = len(ids) - 2 * size
    assert (told[0] - 1) / last == pytest.approx(depth, abs=0.03)


def test_records_without_room_are_refused(words):
    for length, depth, pairs in ((6, 0.5, 12), (300, 1.5, 12), (300, 0.5, 1)):
        with pytest.raises(ValueError, match="at least two pairs"):
            corpora.recall_at(words, random.Random(0), length, depth, pairs)
