"""Score the baselines that the workbook's models must be measured against, on the same bytes.

    python data/baselines.py        # about four minutes on one core; writes results/baselines.json

Two baselines, both given the text that the models were trained on:

- an interpolated, modified Kneser-Ney 5-gram over the same 4,096 tokens: three discounts per
  order, from the counts of counts. It is scored in three forms: counted on all corpora together;
  on the corpus of the held-out text alone; and, the strongest, one counted on each corpus, mixed
  with the weight that suits the validation split best. Chen and Goodman, "An Empirical Study of
  Smoothing Techniques for Language Modeling", Computer Speech and Language 13, 1999;
- `xz -9`: the bytes that the held-out text adds to an archive of the training text, whose window
  covers all of that text.

The held-out texts are one whole novel and the test split of the package descriptions. Every
document ends with an end-of-text token, which is predicted and scored like any other, and starts
from nothing but such tokens: no count reaches across documents.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from effnb.lab import corpora, results
from effnb.lab._files import data_folder

ORDER = 5
NOVEL = "Persuasion"
HELD_OUT = {"novel": "novels", "packages": "packages"}
"""Name of each held-out text, and the corpus it belongs to."""
WINDOW = 64 * 2**20
"""Bytes that `xz -9` looks back; a longer training text would be forgotten in part."""


def held_out(name: str) -> list[str]:
    """The documents of a held-out text: the chapters of one novel, or the packages test split."""
    if name == "novel":
        return [c.text for c in corpora.novels("test") if c.work == NOVEL]
    return corpora.documents("packages", "test")


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The workbook's tokenizer, as it ships."""
    return AutoTokenizer.from_pretrained(
        data_folder() / "models" / "tokenizer", local_files_only=True
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without an end-of-text token."""
    ids = []
    for start in range(0, len(texts), 2_000):  # the encodings of all at once take gigabytes
        part = list(texts[start : start + 2_000])
        batch = tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False)
        ids += [np.array(e.ids, dtype=np.int64) for e in batch]
    return ids


# ------------------------------------------------------------------------------ Kneser-Ney


@dataclass(frozen=True)
class _Grams:
    """All n-grams of one order, packed into integers and sorted.

    Attributes:
        keys: The n-grams seen, ascending; `bits` bits a token, the last token lowest.
        counts: Of each, how often it was seen (highest order) or how many different tokens were
            seen before it (lower orders).
        contexts: Their first n - 1 tokens, each once, ascending.
        totals: Sum of the counts after each context.
        backoff: The mass that the discounts leave to the shorter context.
        discounts: What is taken from a count of 1, of 2, and of 3 or more.
    """

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray
    discounts: np.ndarray


def _discounts(counts: np.ndarray) -> np.ndarray:
    r"""$D_i = i - (i + 1) Y n_{i+1} / n_i$ with $Y = n_1 / (n_1 + 2 n_2)$; 0.5 where undefined.

    $n_i$ is how many n-grams have the count i. Text too small to have all four kinds, or so odd
    that a discount falls outside [0, i], takes 0.5.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    found = np.full(3, 0.5)
    for i in (1, 2, 3):
        if n[1] and n[i]:
            value = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i]
            found[i - 1] = value if 0 <= value <= i else 0.5
    return found


class KneserNey:
    r"""An interpolated n-gram model with modified Kneser-Ney smoothing.

    $$p(w \mid h) = \frac{\max(c(hw) - D(c(hw)), 0)}{\sum_v c(hv)} + \gamma(h)\, p(w \mid h')$$

    h' is the context h without its oldest token; the shortest distribution backs off to the
    uniform one. A context that was never seen passes on to the shorter one.
    """

    def __init__(
        self,
        documents: Iterable[np.ndarray],
        vocabulary: int,
        order: int = ORDER,
        boundary: int = 0,
        discounts: Sequence[float] | None = None,
    ) -> None:
        """Count.

        Args:
            documents: Token ids of each document, without its end.
            vocabulary: Number of different tokens.
            order: Longest n-gram.
            boundary: The token that ends a document, and that fills the context before its first.
            discounts: Three discounts for every order, instead of those from the counts.

        Raises:
            ValueError: When an n-gram does not fit into 63 bits.
        """
        self.vocabulary, self.order, self.boundary = vocabulary, order, boundary
        self.bits = max(1, math.ceil(math.log2(vocabulary)))
        if self.bits * order > 63:
            raise ValueError(f"{order} tokens of {self.bits} bits do not fit into 63 bits.")
        keys, counts = np.unique(self.windows(documents), return_counts=True)
        self.orders: list[_Grams] = []
        for n in range(order, 0, -1):
            if n < order:  # a shorter n-gram counts the different n-grams it ends
                keys, counts = np.unique(keys & self._mask(n), return_counts=True)
            contexts, starts = np.unique(keys >> self.bits, return_index=True)
            totals = np.add.reduceat(counts, starts)
            taken = np.asarray(discounts, float) if discounts is not None else _discounts(counts)
            backoff = np.add.reduceat(taken[np.minimum(counts, 3) - 1], starts) / totals
            self.orders.insert(0, _Grams(keys, counts, contexts, totals, backoff, taken))

    def _mask(self, n: int) -> int:
        return (1 << (self.bits * n)) - 1

    def windows(self, documents: Iterable[np.ndarray]) -> np.ndarray:
        """For every token of every document and its end: it and the `order` - 1 before, packed."""
        padding = np.full(self.order - 1, self.boundary, dtype=np.int64)
        parts, predicted = [], []
        for ids in documents:
            parts += [padding, np.asarray(ids, dtype=np.int64), padding[:1]]
            predicted.append((self.order - 1, len(ids) + 1))
        if self.order == 1:  # no padding to borrow the end from
            parts = [np.append(part, self.boundary) for part in parts[1::3]]
        stream = np.concatenate(parts)
        wanted = np.repeat(
            np.tile([False, True], len(predicted)), np.array(predicted, dtype=np.int64).ravel()
        )
        packed = np.zeros_like(stream)
        for back in range(self.order):
            packed[back:] |= stream[: len(stream) - back] << (self.bits * back)
        return packed[wanted]

    def probabilities(self, windows: np.ndarray) -> np.ndarray:
        """The probability of the last token of each window, given those before it."""
        found = np.full(len(windows), 1 / self.vocabulary)
        for n, grams in enumerate(self.orders, 1):
            keys = windows & self._mask(n)
            contexts = keys >> self.bits
            at = np.minimum(np.searchsorted(grams.contexts, contexts), len(grams.contexts) - 1)
            known = grams.contexts[at] == contexts
            place = np.minimum(np.searchsorted(grams.keys, keys), len(grams.keys) - 1)
            counts = np.where(grams.keys[place] == keys, grams.counts[place], 0)
            kept = counts - np.where(counts > 0, grams.discounts[np.clip(counts, 1, 3) - 1], 0.0)
            found = np.where(known, kept / grams.totals[at] + grams.backoff[at] * found, found)
        return found

    def likelihoods(self, documents: Iterable[np.ndarray]) -> np.ndarray:
        """The probability of every token of every document, its end included."""
        return self.probabilities(self.windows(documents))


def mixing_weights(parts: Sequence[np.ndarray], steps: int = 50) -> np.ndarray:
    """The weights of several models in the mixture that makes the same tokens most likely.

    Expectation-maximisation: each new weight is the mean share of its model in each probability.

    Args:
        parts: The probabilities that each model gives to the same tokens.
        steps: Rounds, from equal weights.
    """
    stacked = np.stack(parts)
    weights = np.full(len(parts), 1 / len(parts))
    for _ in range(steps):
        shares = weights[:, None] * stacked
        weights = (shares / shares.sum(0)).mean(1)
    return weights


# -------------------------------------------------------------------------------------- xz


def archive(texts: Iterable[str]) -> bytes:
    """Documents as one run of bytes, a zero byte after each: the end-of-text token of xz."""
    return b"".join(text.encode() + b"\0" for text in texts)


def xz_bytes(training: bytes, held: bytes) -> int:
    """Bytes that `held` adds to what `xz -9` makes of `training`.

    Raises:
        ValueError: When the window does not cover both.
    """
    if len(training) + len(held) > WINDOW:
        raise ValueError(
            f"{len(training) + len(held):,} bytes do not fit into the window of xz, "
            f"which is {WINDOW:,} bytes."
        )
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": WINDOW}]
    compress = lambda data: len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))  # noqa: E731
    return compress(training + held) - compress(training)


# ------------------------------------------------------------------------------- reporting


def score(nats: float, tokens: int, size: int) -> dict[str, float]:
    """What is reported of a model that scored `tokens` tokens, which are `size` bytes of text."""
    return {
        "nats_per_token": round(nats / tokens, 4),
        "perplexity": round(math.exp(nats / tokens), 2),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def main() -> None:
    """Score both baselines on both held-out texts, print a line each, and store them."""
    began = time.perf_counter()
    tokenizer = load_tokenizer()
    vocabulary, end = len(tokenizer), tokenizer.eos_token_id
    texts = {name: corpora.documents(name, "train") for name in corpora.NAMES}
    ids = {name: encode(tokenizer, texts[name]) for name in texts}
    held = {name: held_out(name) for name in HELD_OUT}
    sizes = {name: sum(len(t.encode()) for t in held[name]) for name in held}
    data: dict = {"held_out": {}, "kneser_ney": {}, "xz": {}}

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s  {line}", flush=True)

    def keep(name: str, label: str, probabilities: np.ndarray, **about: float) -> None:
        tokens = len(probabilities)
        nats = float(-np.log(probabilities).sum())
        data["held_out"][name] = {
            "documents": len(held[name]), "bytes": sizes[name], "tokens": tokens,
        }  # fmt: skip
        data["kneser_ney"].setdefault(name, {})[label] = score(nats, tokens, sizes[name]) | about
        say(f"Kneser-Ney on {name}, {label}: {score(nats, tokens, sizes[name])}")

    encoded = {name: encode(tokenizer, held[name]) for name in held}
    every = [document for name in ids for document in ids[name]]
    about = {"training_tokens": sum(len(document) + 1 for document in every)}
    model = KneserNey(every, vocabulary, ORDER, end)
    for name in HELD_OUT:
        keep(name, "counted on all corpora", model.likelihoods(encoded[name]), **about)
    del model
    single = {name: KneserNey(ids[name], vocabulary, ORDER, end) for name in ids}
    for name, corpus in HELD_OUT.items():
        keep(name, "counted on its own corpus", single[corpus].likelihoods(encoded[name]))
        validation = encode(tokenizer, corpora.documents(corpus, "validation"))
        weights = mixing_weights([one.likelihoods(validation) for one in single.values()])
        mixed = sum(
            weight * one.likelihoods(encoded[name])
            for weight, one in zip(weights, single.values(), strict=True)
        )
        own = round(float(weights[list(single).index(corpus)]), 3)
        keep(name, "mixture of one per corpus", mixed, weight_of_its_own=own, **about)

    for name, corpus in HELD_OUT.items():
        # The corpus of the held-out text comes last: xz adapts to what it read most recently.
        order = sorted(texts, key=lambda other: other == corpus)
        added = xz_bytes(b"".join(archive(texts[n]) for n in order), archive(held[name]))
        alone = xz_bytes(b"", archive(held[name]))
        data["xz"][name] = {
            "bits_per_byte": round(8 * added / sizes[name], 4),
            "bits_per_byte_without_training_text": round(8 * alone / sizes[name], 4),
            "added_bytes": added,
        }
        say(f"xz -9 on {name}: {data['xz'][name]}")
    results.store("baselines", data, command="python data/baselines.py")


if __name__ == "__main__":
    main()
