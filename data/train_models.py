"""Train the workbook's language models from scratch (`make models`).

    python data/train_models.py mini-1m              # on whatever is here: CPU, CUDA or MPS
    python data/train_models.py mini-5m --threads 1  # goes on from its checkpoint if there is one

Each model reads whole sequences of 512 tokens drawn from three sources: novels and the Bible,
package descriptions, and synthetic key-value recall (records `[ key value]` that come back later).
A step's batch depends on the seed and the step's number only, so a run that was cut off goes on
as if it had not been. Steps are chosen for a CPU; `--steps` takes more on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effnb.core.training import TrainingSettings, train
from effnb.lab import corpora

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
CONTEXT = 512
BATCH = 8
SOURCES = ("novels", "packages", "dense recall", "planted recall")
MIX = {0: (0.43, 0.37, 0.10, 0.10), 800: (0.60, 0.30, 0.05, 0.05)}
"""From a step on, the probability that a sequence of the batch comes from each source.

Recall did not emerge in 800 steps; text gets its share from there on. Another 360 steps with one
sequence in four made of repeated spans, which teach copying directly, left recall at chance and
cost a quarter of a nat on the novels.
"""
ANSWER_WEIGHT = 4.0
"""How much the answer of a recall counts beside a token of text. Much more would be noise: the
gradient of one answer is as long as that of hundreds of tokens of text together."""

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads; peak rate; steps
    "mini-300k": ((64, 128, 2, 4, 2), 4e-3, 2000),
    "mini-1m": ((128, 344, 4, 4, 2), 3e-3, 2000),
    "mini-5m": ((256, 688, 6, 8, 4), 2e-3, 2000),
}


def build(name: str) -> LlamaForCausalLM:
    """An untrained Llama-architecture decoder of the given size, its seed fixed."""
    (hidden, feed_forward, layers, heads, kv_heads), *_ = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Windows:
    """Windows of a token stream, each once per epoch, in an order fixed by the seed."""

    def __init__(self, stream: np.ndarray, length: int, seed: int) -> None:
        """Cut `stream` into windows of `length` tokens, anew in each epoch."""
        self.stream, self.length, self.seed = stream, length, seed
        self.count = len(stream) // length - 1
        self._epoch, self._starts = -1, None

    def __getitem__(self, index: int) -> np.ndarray:
        """Window number `index`, counting on over the epochs."""
        epoch, within = divmod(index, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shift = int(rng.integers(self.length))
            self._starts = shift + self.length * rng.permutation(self.count)
            self._epoch = epoch
        start = int(self._starts[within])
        return self.stream[start : start + self.length]


def stream(tokenizer, texts: list[str], seed: int = 0) -> np.ndarray:
    """All texts in a seeded order, an end-of-text token after each, as one array of ids."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*e.ids, end], dtype=np.int32) for e in encoded])


class Mixture:
    """From a step's number to its batch of ids and labels; a pure function of (seed, step)."""

    def __init__(self, tokenizer, seed: int, device: torch.device, steps: int) -> None:
        """Tokenise both corpora; the sequence at (step, row) is then fixed by the seed."""
        self.tokenizer, self.seed, self.device = tokenizer, seed, device
        self.windows = {
            name: Windows(stream(tokenizer, corpora.documents(name, "train")), CONTEXT, seed)
            for name in ("novels", "packages")
        }
        # Which source each sequence has, and so which window of it: known for all steps at once.
        drawn = np.random.default_rng([seed, 1]).random(steps * BATCH)
        self.source = np.zeros(len(drawn), dtype=int)
        for begin, shares in sorted(MIX.items()):
            bounds = np.cumsum(shares) / sum(shares)
            later = slice(begin * BATCH, None)
            self.source[later] = bounds.searchsorted(drawn[later], side="right")
        self.number = np.zeros_like(self.source)
        for i in range(len(SOURCES)):
            mine = self.source == i
            self.number[mine] = np.arange(mine.sum())

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, and the weight of each token in the loss; both (8, 512)."""
        ids, weights = [], []
        for row in range(BATCH):
            at = step * BATCH + row
            name = SOURCES[self.source[at]]
            number = int(self.number[at])
            rng = random.Random(self.seed * 1_000_003 + at)
            if name in self.windows:
                tokens, weight = self.windows[name][number], np.ones(CONTEXT)
            else:
                if name == "dense recall":
                    pairs = round(4 * 16 ** rng.random())
                    recall = corpora.dense_recall(self.tokenizer, rng, CONTEXT, pairs)
                else:
                    other = self.windows[rng.choice(["novels", "packages"])]
                    filler = other[rng.randrange(other.count)].tolist()
                    pairs = rng.randint(1, 6)
                    recall = corpora.planted_recall(self.tokenizer, rng, filler, CONTEXT, pairs)
                tokens, weight = np.array(recall.ids), np.zeros(CONTEXT)
                weight[list(recall.text)] = 1  # new keys and values cannot be foreseen: not counted
                weight[recall.answers] = ANSWER_WEIGHT
            ids.append(tokens.astype(np.int64))
            weights.append(weight.astype(np.float32))
        return tuple(torch.from_numpy(np.stack(x)).to(self.device) for x in (ids, weights))


def mixture_loss(model, batch) -> torch.Tensor:
    r"""Weighted next-token cross-entropy, $\sum_t w_t \ell_t / \sum_t w_t$ over the batch."""
    ids, weights = batch
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * weights[:, 1:]).sum() / weights[:, 1:].sum()


def evaluator(tokenizer, device: torch.device, sequences: int = 24):
    """Held-out loss on both corpora (fixed windows) and recall accuracy near and far."""
    held = {}
    for name in ("novels", "packages"):
        tokens = stream(tokenizer, corpora.documents(name, "validation"))
        starts = np.linspace(0, len(tokens) - CONTEXT, sequences).astype(int)
        held[name] = torch.from_numpy(np.stack([tokens[s : s + CONTEXT] for s in starts])).long()
    rng = random.Random(7)
    filler = stream(tokenizer, corpora.documents("novels", "validation")).tolist()
    planted = []
    for _ in range(64):
        at = rng.randrange(len(filler) - CONTEXT)
        planted.append(
            corpora.planted_recall(tokenizer, rng, filler[at : at + CONTEXT], CONTEXT, pairs=4)
        )

    def evaluate(model) -> dict[str, float]:
        found = {}
        for name, rows in held.items():
            losses = []
            for part in rows.to(device).split(8):
                logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
                losses.append(
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), part[:, 1:].flatten()
                    ).item()
                )
            found[name] = sum(losses) / len(losses)
        hits = 0
        for start in range(0, len(planted), 8):
            part = planted[start : start + 8]
            ids = torch.tensor([r.ids for r in part], device=device)
            best = model(input_ids=ids, use_cache=False).logits.argmax(-1).cpu()
            hits += sum(
                int(best[i, r.answers[0] - 1]) == r.ids[r.answers[0]] for i, r in enumerate(part)
            )
        found["recall"] = hits / len(planted)
        return found

    return evaluate


def main() -> None:
    """Train one model and save it as a Hugging Face folder in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--steps", type=int, help="optimiser steps of 4,096 tokens")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "training")
    parser.add_argument("--log", action="store_true", help="print a line now and then, no bar")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, rate, steps = SHAPES[arguments.name]
    steps = arguments.steps or steps
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=100, schedule="wsd", decay_fraction=0.35,
        weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0, evaluate_every=100, seed=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    model = build(arguments.name).to(device)
    print(f"{arguments.name}: {model.num_parameters():,} parameters, {steps:,} steps", flush=True)
    mixture = Mixture(tokenizer, 0, device, steps)
    assess = evaluator(tokenizer, device)
    began = time.time()

    def log(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}/{total} loss {loss:.3f} {time.time() - began:.0f} s", flush=True)

    def assess_and_print(model) -> dict[str, float]:
        found = assess(model)
        print({key: round(value, 4) for key, value in found.items()}, flush=True)
        return found

    result = train(
        model,
        mixture,
        settings,
        loss=mixture_loss,
        evaluate=assess_and_print,
        checkpoint=arguments.work / f"{arguments.name}.safetensors",
        progress=log if arguments.log else True,
    )
    folder = MODELS / arguments.name
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    history = {
        "command": f"python data/train_models.py {arguments.name} --steps {steps}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"effnb": version("effnb"), "torch": torch.__version__},
        "parameters": model.num_parameters(),
        "tokens": result.steps * BATCH * CONTEXT,
        "seconds": round(result.seconds),
        "settings": settings.__dict__,
        "mix": {f"from step {b}": dict(zip(SOURCES, shares)) for b, shares in MIX.items()},
        "training loss, mean of 20 steps": [
            round(math.fsum(result.losses[i : i + 20]) / len(result.losses[i : i + 20]), 4)
            for i in range(0, len(result.losses), 20)
        ],
        "held out": result.evaluations,
    }
    (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n")
    print(f"saved {folder.name}: {result.evaluations[-1]}")


if __name__ == "__main__":
    main()
