"""The baselines and the scripts that score models: right by hand, by sum, and by another way."""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effnb.lab import corpora, results
from effnb.lab.models import SHIPPED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    """The scripts of data/ by name; they import each other as plain modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "data"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def baselines(script):
    return script("baselines")


@pytest.fixture(scope="module")
def check_models(script):
    return script("check_models")


# ------------------------------------------------------------------------------ Kneser-Ney


def test_kneser_ney_by_hand(baselines):
    """The document "a b a" with 0 as its end, bigrams, every discount 0.5.

    Bigrams: 0a ab ba a0, once each. Tokens by the different tokens before them: a 2, b 1, end 1,
    so p(a) = 1.5/4 + (3 x 0.5/4)/3 = 0.5, p(b) = p(end) = 0.5/4 + 0.125 = 0.25. After a stood b and
    the end: p(b | a) = 0.5/2 + (2 x 0.5/2) x 0.25 = 0.375, p(a | a) = 0.5 x 0.5 = 0.25.
    """
    end, a, b = range(3)
    model = baselines.KneserNey([np.array([a, b, a])], 3, order=2, discounts=[0.5, 0.5, 0.5])

    def p(word: int, context: int) -> float:
        return float(model.probabilities(np.array([context << model.bits | word]))[0])

    assert [p(w, a) for w in (end, a, b)] == pytest.approx([0.375, 0.25, 0.375])
    assert [p(w, b) for w in (end, a, b)] == pytest.approx([0.5 * 0.25, 0.75, 0.5 * 0.25])
    expected = p(a, end) * p(b, a) * p(a, b) * p(end, a)
    found = model.likelihoods([np.array([a, b, a])])
    assert np.prod(found) == pytest.approx(expected)
    assert len(found) == 4


def by_definition(documents, vocabulary, order, discounts):
    """Interpolated modified Kneser-Ney from dictionaries, one probability at a time."""
    grams = [Counter() for _ in range(order + 1)]
    for document in documents:
        padded = [0] * (order - 1) + list(document) + [0]
        for i in range(order - 1, len(padded)):
            grams[order][tuple(padded[i - order + 1 : i + 1])] += 1
    for n in range(order - 1, 0, -1):
        grams[n] = Counter(gram[1:] for gram in grams[n + 1])
    after = [defaultdict(dict) for _ in range(order + 1)]
    for n in range(1, order + 1):
        for gram, count in grams[n].items():
            after[n][gram[:-1]][gram[-1]] = count

    def probability(word, context):
        n = len(context) + 1
        shorter = probability(word, context[1:]) if context else 1 / vocabulary
        counts = after[n].get(context)
        if not counts:
            return shorter
        total = sum(counts.values())
        taken = {w: discounts[min(c, 3) - 1] for w, c in counts.items()}
        kept = counts.get(word, 0) - taken.get(word, 0)
        return kept / total + sum(taken.values()) / total * shorter

    return probability


@given(
    documents=st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=6),
    order=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_kneser_ney_as_defined(baselines, documents, order, seed):
    discounts = [0.6, 1.1, 1.4]
    model = baselines.KneserNey(
        [np.array(d, dtype=np.int64) for d in documents], 6, order, discounts=discounts
    )
    expected = by_definition(documents, 6, order, discounts)
    rng = random.Random(seed)
    for _ in range(5):
        context = tuple(rng.choices(range(6), k=order - 1))
        packed = 0
        for token in context:
            packed = packed << model.bits | token
        windows = np.array([packed << model.bits | word for word in range(6)])
        found = model.probabilities(windows)
        assert found == pytest.approx([expected(word, context) for word in range(6)])
        assert found.sum() == pytest.approx(1)


def test_probabilities_sum_to_one_over_the_real_vocabulary(baselines):
    """On real text with discounts from its counts: contexts seen, unseen, and half seen."""
    tokenizer = baselines.load_tokenizer()
    texts = baselines.encode(tokenizer, corpora.documents("novels", "validation")[:20])
    model = baselines.KneserNey(texts, len(tokenizer))
    rng = random.Random(0)
    seen = model.windows(texts)
    contexts = [int(rng.choice(seen)) >> model.bits for _ in range(20)]
    contexts += [rng.getrandbits(4 * model.bits) for _ in range(20)]
    contexts += [c ^ (rng.getrandbits(model.bits) << 3 * model.bits) for c in contexts[:10]]
    words = np.arange(len(tokenizer))
    for context in contexts:
        probabilities = model.probabilities((context << model.bits) | words)
        assert probabilities.sum() == pytest.approx(1, abs=1e-9)
        assert (probabilities > 0).all()
    for grams in model.orders:
        assert ((grams.discounts > 0) & (grams.discounts < [1, 2, 3])).all()


def test_discounts_from_counts_of_counts(baselines):
    """With n1..n4 = 4, 2, 1, 1: Y = 4/8, D1 = 1 - 2Y 2/4, D2 = 2 - 3Y 1/2, D3 = 3 - 4Y 1/1."""
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 4, 9])
    assert baselines._discounts(counts) == pytest.approx([0.5, 1.25, 1.0])
    assert baselines._discounts(np.array([1])).tolist() == [1.0, 0.5, 0.5]


def test_no_count_reaches_across_documents(baselines):
    one = baselines.KneserNey([np.array([1, 2]), np.array([3, 4])], 5, order=3)
    other = baselines.KneserNey([np.array([3, 4]), np.array([1, 2])], 5, order=3)
    for first, second in zip(one.orders, other.orders):
        assert first.keys.tolist() == second.keys.tolist()


def test_too_long_an_n_gram_is_refused(baselines):
    with pytest.raises(ValueError, match="6 tokens of 12 bits do not fit"):
        baselines.KneserNey([np.array([1])], 4096, order=6)


def test_the_mixing_weights_are_the_best_ones(baselines):
    rng = np.random.default_rng(0)
    parts = [rng.random(200) + 0.01 for _ in range(3)]
    weights = baselines.mixing_weights(parts, steps=500)
    assert weights.sum() == pytest.approx(1)
    likelihood = lambda w: np.log(sum(x * part for x, part in zip(w, parts))).sum()  # noqa: E731
    grid = np.linspace(0, 1, 51)
    best = max(likelihood((a, b, 1 - a - b)) for a in grid for b in grid if a + b <= 1)
    assert likelihood(weights) >= best - 1e-6


# -------------------------------------------------------------------------------------- xz


def test_xz_counts_what_the_held_out_text_adds(baselines):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(3000)]
    training = " ".join(words).encode()
    known, new = training[2000:6000], "".join(rng.choices("abcdefgh", k=4000)).encode()
    assert baselines.xz_bytes(training, known) < 30, "a repetition costs next to nothing"
    assert baselines.xz_bytes(training, new) > 4000 * 3 / 8, "3 bits a letter cannot be saved"
    plain = len(lzma.compress(training + known, preset=9)) - len(lzma.compress(training, preset=9))
    assert baselines.xz_bytes(training, known) == plain, "the same as the command xz -9"


def test_xz_remembers_the_beginning_of_the_training_text(baselines):
    """What was read 20 MB ago is still in the window, and the whole of the corpora fits into it."""
    first = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    training = first + bytes(20_000_000)
    assert baselines.xz_bytes(training, first) < 100
    default = len(lzma.compress(training + first)) - len(lzma.compress(training))
    assert default > 49_000, "the default window of xz is 8 MiB, so the test can tell"
    size = sum(
        len(baselines.archive(corpora.documents(name, split)))
        for name, split in itertools.product(corpora.NAMES, ("train", "test"))
    )
    assert size < baselines.WINDOW
    with pytest.raises(ValueError, match="do not fit into the window"):
        baselines.xz_bytes(bytes(baselines.WINDOW), b"x")


# ------------------------------------------------------------------------------- reporting


def test_score_in_all_units(baselines):
    """100 tokens at 2 bits each, over 50 bytes: perplexity 4, and 4 bits a byte."""
    found = baselines.score(200 * math.log(2), 100, 50)
    assert found == {"nats_per_token": 1.3863, "perplexity": 4.0, "bits_per_byte": 4.0}


def test_the_held_out_texts(baselines):
    novel = baselines.held_out("novel")
    assert len(novel) == 24
    assert "Kellynch Hall" in novel[0]
    assert not set(novel) & set(corpora.documents("novels", "train"))
    assert baselines.held_out("packages") == corpora.documents("packages", "test")


def test_models_and_baselines_score_the_same_tokens(baselines, check_models):
    tokenizer = baselines.load_tokenizer()
    for name in baselines.HELD_OUT:
        texts = baselines.held_out(name)
        ids = check_models.stream(tokenizer, texts)
        scored = sum(len(d) + 1 for d in baselines.encode(tokenizer, texts))
        assert len(ids) - 1 == scored
        assert (ids == tokenizer.eos_token_id).sum() == len(texts) + 1
        assert results.read("baselines").data["held_out"][name]["tokens"] == scored


def test_stored_baselines_are_whole():
    stored = results.read("baselines")
    assert stored.provenance.command == "python data/baselines.py"
    for name in ("novel", "packages"):
        forms = stored.data["kneser_ney"][name]
        assert len(forms) == 3
        bits = {label: about["bits_per_byte"] for label, about in forms.items()}
        assert bits["mixture of one per corpus"] == min(bits.values())
        held = stored.data["held_out"][name]
        for about in forms.values():
            nats = about["nats_per_token"]
            assert about["perplexity"] == pytest.approx(math.exp(nats), rel=1e-3)
            assert about["bits_per_byte"] == pytest.approx(
                nats * held["tokens"] / math.log(2) / held["bytes"], rel=1e-3
            )
        xz = stored.data["xz"][name]
        assert xz["bits_per_byte"] == pytest.approx(8 * xz["added_bytes"] / held["bytes"], abs=1e-4)
        assert xz["bits_per_byte"] < xz["bits_per_byte_without_training_text"]


# ---------------------------------------------------------------------- scores of the models


def test_wilson_by_hand(check_models):
    """Wilson's interval for 8 of 10, from a table: 0.490 to 0.943; for 0 of 10: 0 to 0.278."""
    assert check_models.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert check_models.wilson(0, 10) == pytest.approx((0.0, 0.278), abs=5e-4)


class _Copier(torch.nn.Module):
    """Copies what followed the last two tokens where they stood before, `reach` back at most."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.device = reach, torch.device("cpu")

    def forward(self, ids, use_cache=False):
        logits = torch.zeros(*ids.shape, 4096)
        for row, tokens in enumerate(ids.tolist()):
            for at in range(len(tokens) - 8, len(tokens)):
                for back in range(1, min(self.reach, at - 1) + 1):
                    if tokens[at - back - 1 : at - back + 1] == tokens[at - 1 : at + 1]:
                        logits[row, at, tokens[at - back + 1]] = 1
                        break
        return SimpleNamespace(logits=logits)


def test_recall_is_counted_by_distance(check_models):
    """A perfect copier that sees 200 tokens back recalls nearer records and no farther ones."""
    from transformers import AutoTokenizer

    from effnb.lab.models import LoadedModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "tokenizer")
    found = check_models.recall_by_distance(
        LoadedModel(_Copier(200), tokenizer, "copier", ROOT), per_bin=16
    )
    assert [(part["from"], part["to"]) for part in found] == [
        (32, 95), (96, 159), (160, 223), (224, 287), (288, 351), (352, 415), (416, 479),
    ]  # fmt: skip
    accuracy = [part["accuracy"] for part in found]
    assert accuracy[:2] == [1.0, 1.0]
    assert 0 < accuracy[2] < 1
    assert accuracy[3:] == [0.0] * 4


def test_stored_scores_of_the_models_are_whole():
    """Every shipped model has been scored as it now is, and beats guessing by far."""
    scores = results.read("models").data
    manifest = json.loads((ROOT / "data" / "models" / "MANIFEST.json").read_text())
    # Twins of another architecture are compared on their chapter's own texts.
    real = scores.pop("smollm2-135m")
    assert set(scores) == {name for name in SHIPPED if name.startswith("mini-")}
    accuracy = [scores[f"mini-{n}"]["ranked_choice"]["accuracy"] for n in ("300k", "1m", "5m")]
    apart = [large - small for small, large in itertools.pairwise(accuracy)]
    assert min(apart) >= 0.05, f"neighbors lie at least five points apart: {accuracy}"
    # SmolLM2 never learned this archive: between the sizes that did, and far above guessing.
    answered = real["ranked_choice"]
    assert answered["questions"] >= 200
    assert answered["accuracy"] - 2 * answered["standard_error"] > 0.25 + 0.05
    for name, about in scores.items():
        assert about["weights_sha256"] == manifest[name]["model.safetensors"]["sha256"], (
            f"{name} was trained again since; run python data/check_models.py"
        )
        for text in ("novel", "packages"):
            assert about[text]["nats_per_token"] < math.log(4096) - 3
        assert len(about["recall"]) == 7
        assert all(part["sequences"] >= 100 for part in about["recall"])


def test_an_unknown_model_is_refused_in_one_sentence():
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "check_models.py"), "mini-6m"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no model 'mini-6m'; choose from mini-300k" in done.stderr
