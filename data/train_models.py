"""Train the workbook's language models from scratch (`make models`).

    python data/train_models.py mini-1m                   # on whatever is here: CPU, CUDA or MPS
    python data/train_models.py mini-5m --threads 1       # goes on from its checkpoint
    python data/train_models.py mini-5m --steps 4000      # decays earlier: ends after 4,000 steps
    python data/train_models.py mini-5m --pause           # keeps what it reached, for any machine

Each model reads whole sequences of 512 tokens drawn from seven sources: novels and the Bible,
package descriptions, prose of manuals, and four kinds of recall (a map from token to token that is
walked along, a span of words repeated, records `[ key value]` that come back, records planted in
text). Muon trains the matrices, AdamW the
embedding and the norms. A step's batch depends on the seed and the step's number only, and the
rate is constant until the last quarter: a run that was cut off goes on as if it had not been, and
may be given another length until it decays. A paused run keeps its weights in bfloat16 in
`data/training/`, without the optimizers' moments, and goes on from there where it finds nothing
better; the first steps after that gather the moments again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from effnb.core.losses import linear_cross_entropy
from effnb.core.muon import Muon, hidden_matrices
from effnb.core.training import TrainingSettings, train
from effnb.lab import corpora

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
CONTEXT = 512
BATCH = {"mini-300k": 16, "mini-1m": 16, "mini-5m": 8}
"""Sequences of a step. The largest model sees the fewest tokens, and needs its steps more."""
PART = 4
"""Sequences whose activations exist at once; on a CPU, small parts stay in its caches."""
TEXTS = ("novels", "packages", "manuals")
ALL_TOKENS = range(1, 4096)
MIX = {
    "novels": 0.33,
    "packages": 0.25,
    "manuals": 0.21,
    "walk": 0.10,
    "repeated span": 0.04,
    "dense recall": 0.05,
    "planted recall": 0.02,
}
"""The probability that a sequence of the batch comes from each source, in the whole run."""
ANSWER_WEIGHT = 4.0
"""How much the answer of a recall counts beside a token of text. Much more would be noise: the
gradient of one answer is as long as that of hundreds of tokens of text together."""

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads; steps
    "mini-300k": ((64, 128, 2, 4, 2), 2_500),
    "mini-1m": ((128, 344, 4, 4, 2), 5_000),
    "mini-5m": ((256, 688, 6, 8, 4), 24_400),
}
MUON_RATE, ADAMW_RATE = 0.02, 4e-3


def build(name: str) -> LlamaForCausalLM:
    """An untrained Llama-architecture decoder of the given size, its seed fixed."""
    (hidden, feed_forward, layers, heads, kv_heads), _ = SHAPES[name]
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
        """Cut `stream` into windows of `length` tokens, with other starts in each epoch."""
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

    def __init__(self, tokenizer, seed: int, device: torch.device, steps: int, batch: int) -> None:
        """Tokenise the corpora; the sequence at (step, row) is then fixed by the seed."""
        self.tokenizer, self.seed, self.device, self.batch = tokenizer, seed, device, batch
        self.windows = {
            name: Windows(stream(tokenizer, corpora.documents(name, "train")), CONTEXT, seed)
            for name in TEXTS
        }
        self.words = [
            tokenizer.encode(f" {word}", add_special_tokens=False)[0]
            for word in corpora.recall_words(tokenizer)
        ]
        # Which source each sequence has, and so which window of it: known for all steps at once.
        drawn = np.random.default_rng([seed, 1]).random(steps * batch)
        bounds = np.cumsum(list(MIX.values())) / sum(MIX.values())
        self.source = bounds.searchsorted(drawn, side="right")
        self.number = np.zeros_like(self.source)
        for i in range(len(MIX)):
            mine = self.source == i
            self.number[mine] = np.arange(mine.sum())

    def __call__(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of the batch: ids, and the weight of each token in the loss; both (4, 512)."""
        ids, weights = [], []
        for row in range(self.batch):
            at = step * self.batch + row
            name = tuple(MIX)[self.source[at]]
            number = int(self.number[at])
            rng = random.Random(self.seed * 1_000_003 + at)
            if name in self.windows:
                tokens, weight = self.windows[name][number], np.ones(CONTEXT)
            elif name == "repeated span":
                tokens, weight = repeated_span(rng)
            elif name == "walk":
                tokens, weight = walk(rng, self.words if rng.random() < 0.5 else ALL_TOKENS)
            else:
                if name == "dense recall":
                    pairs = round(4 * 16 ** rng.random())
                    recall = corpora.dense_recall(self.tokenizer, rng, CONTEXT, pairs)
                else:
                    other = self.windows[rng.choice(TEXTS)]
                    filler = other[rng.randrange(other.count)].tolist()
                    pairs = rng.randint(1, 6)
                    recall = corpora.planted_recall(self.tokenizer, rng, filler, CONTEXT, pairs)
                tokens, weight = np.array(recall.ids), np.zeros(CONTEXT)
                weight[list(recall.text)] = 1  # new keys and values cannot be foreseen: not counted
                weight[recall.answers] = ANSWER_WEIGHT
            ids.append(tokens.astype(np.int64))
            weights.append(weight.astype(np.float32))
        both = [torch.from_numpy(np.stack(x)).to(self.device) for x in (ids, weights)]
        return list(zip(*(x.split(PART) for x in both)))


def walk(rng: random.Random, tokens) -> tuple[np.ndarray, np.ndarray]:
    """A walk along a random map from token to token, in which what follows a token is learnt.

    2 to 64 tokens, each with one successor; every seventh step or so goes anywhere instead. The
    way to the rule is a gentle slope: knowing which tokens the text uses is worth something, and
    knowing what followed them more. A token counts where its predecessor has been seen before.
    """
    pool = rng.sample(tokens, round(2 * 32 ** rng.random()))
    after = {token: rng.choice(pool) for token in pool}
    ids, weight, seen, here = [], [], set(), rng.choice(pool)
    for _ in range(CONTEXT):
        weight.append(float(bool(ids) and ids[-1] in seen))
        seen.update(ids[-1:])
        ids.append(here)
        here = rng.choice(pool) if rng.random() < 0.15 else after[here]
    return np.array(ids), np.array(weight)


def repeated_span(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, repeated until the sequence is full; only the repetitions count."""
    span = round(8 * 25 ** rng.random())  # 8 to 200 tokens, short ones as often as long ones
    tokens = [rng.choice(ALL_TOKENS) for _ in range(span)]
    ids = (tokens * (CONTEXT // span + 1))[:CONTEXT]
    weight = np.ones(CONTEXT)
    weight[: span + 1] = 0  # the first copy cannot be foreseen, nor where it ends
    return np.array(ids), weight


def mixture_loss(model, batch) -> torch.Tensor:
    r"""Weighted next-token cross-entropy, $\sum_t w_t \ell_t / \sum_t w_t$ over the batch."""
    ids, weights = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=faster_in_bfloat16(ids.device)):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            ids[:, 1:].flatten(),
            weights[:, 1:].flatten(),
        )


@cache
def faster_in_bfloat16(device: torch.device) -> bool:
    """Whether a product of the models' size takes less time in bfloat16; always on a GPU."""
    if device.type != "cpu":
        return device.type == "cuda"
    times = {torch.bfloat16: [], torch.float32: []}
    for _ in range(7):
        for dtype, taken in times.items():
            a, b = torch.ones(PART * CONTEXT, 256, dtype=dtype), torch.ones(256, 688, dtype=dtype)
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            taken.append(time.perf_counter() - began)
    return median(times[torch.bfloat16]) < 0.7 * median(times[torch.float32])


def muon_and_adamw(model, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = hidden_matrices(model)
    mine = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in mine]
    return [
        Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            dtype=torch.bfloat16 if faster_in_bfloat16(matrices[0].device) else None,
        ),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=settings.betas, weight_decay=0.0),
    ]


def evaluator(tokenizer, device: torch.device, sequences: int = 24):
    """Held-out loss on both corpora (fixed windows) and recall accuracy near and far."""
    held = {}
    for name in TEXTS:
        tokens = stream(tokenizer, corpora.documents(name, "validation"))
        starts = np.linspace(0, len(tokens) - CONTEXT, sequences).astype(int)
        held[name] = torch.from_numpy(np.stack([tokens[s : s + CONTEXT] for s in starts])).long()
    rng = random.Random(7)
    dense = [corpora.dense_recall(tokenizer, rng, CONTEXT, pairs=12) for _ in range(8)]
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
        best = model(
            input_ids=torch.tensor([r.ids for r in dense], device=device), use_cache=False
        ).logits.argmax(-1)
        right = [int(best[i, a - 1]) == r.ids[a] for i, r in enumerate(dense) for a in r.answers]
        found["dense recall"] = sum(right) / len(right)
        return found

    return evaluate


def pause(checkpoint: Path, kept: Path) -> None:
    """Keep the weights of a checkpoint and its history, a fifth of its bytes."""
    with safe_open(checkpoint, "pt") as file:
        names = [name for name in sorted(file.keys()) if name.startswith("model.")]
        weights = {name: file.get_tensor(name).to(torch.bfloat16) for name in names}
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(lzma.compress(save(weights, metadata=file.metadata())))
    print(f"{kept.name} holds {kept.stat().st_size:,} bytes; go on with the same command.")


def main(
    names: Sequence[str] = tuple(SHAPES),
    make: Callable[[str], nn.Module] = build,
    recipe_of: Callable[[str], str] = str,
    script: str = "data/train_models.py",
) -> None:
    """Train one model and save it as a folder in bfloat16.

    Args:
        names: Models that can be asked for on the command line.
        make: From a name to an untrained model.
        recipe_of: From a name to the one of `SHAPES` whose batches and steps it gets.
        script: What the model's history names as the command.
    """
    parser = argparse.ArgumentParser(description="Train one model of the workbook.")
    parser.add_argument("name", choices=sorted(names))
    parser.add_argument("--steps", type=int, help="optimizer steps of 16 or 8 sequences")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "training")
    parser.add_argument("--log", action="store_true", help="print a line now and then, no bar")
    parser.add_argument("--pause", action="store_true", help="only keep what a run has reached")
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.name)
    checkpoint = arguments.work / f"{arguments.name}.safetensors"
    kept = HERE / "training" / f"{checkpoint.name}.xz"
    if arguments.pause:
        pause(checkpoint, kept)
        return
    if kept.exists() and not checkpoint.exists():
        arguments.work.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(lzma.decompress(kept.read_bytes()))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = arguments.steps or SHAPES[recipe][1]
    settings = TrainingSettings(
        steps=steps, learning_rate=MUON_RATE, warmup_steps=50, schedule="wsd", decay_fraction=0.25,
        weight_decay=0.05, betas=(0.9, 0.95), clip_norm=1.0, seed=0,
        evaluate_every=1_600 // BATCH[recipe],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    model = make(arguments.name).to(device)
    print(f"{arguments.name}: {model.num_parameters():,} parameters, {steps:,} steps", flush=True)
    mixture = Mixture(tokenizer, 0, device, steps, BATCH[recipe])
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
        checkpoint=checkpoint,
        progress=log if arguments.log else True,
        optimizers=muon_and_adamw,
    )
    folder = MODELS / arguments.name
    model.to(torch.bfloat16).save_pretrained(folder)
    if recipe == arguments.name:  # twins take the tokenizer of `data/models/tokenizer`
        tokenizer.save_pretrained(folder)
    history = {
        "command": f"python {script} {arguments.name} --steps {steps}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "bfloat16 autocast": faster_in_bfloat16(device),
        "versions": {"effnb": version("effnb"), "torch": torch.__version__},
        "parameters": model.num_parameters(),
        "tokens": result.steps * BATCH[recipe] * CONTEXT,
        "seconds": round(result.seconds),
        "settings": settings.__dict__,
        "mix": MIX,
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
