"""Tasks as models read them: encoders with a new classifier, and decoders that write the answer.

    classifier = Classifier(load("minilm-l6").model, labels=6)
    batch = encoder_batch(tokenizer, section.train[:16])
    classification_loss(classifier, batch)

    batch = decoder_batch(tokenizer, *as_texts(section, section.train[:16]))
    causal_lm_loss(model, batch)                                   # of effnb.core.training
    chosen = choose(model, tokenizer, section, section.test)       # by the labels' likelihood

Every function takes examples and gives one result for each, in their order, so that two methods can
be compared pair by pair and documents can be resampled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.lab.tasks import Example, Task

TOKENS = 64
"""Texts are cut to this many tokens."""


def batches_of(
    examples: Sequence[Example], size: int, seed: int = 0
) -> Callable[[int], list[Example]]:
    """From a step's number to its examples: every example once in random order, then again.

    Raises:
        ValueError: When there are no examples, or the size is below 1.
    """
    if not examples or size < 1:
        raise ValueError(f"there are {len(examples)} examples and size is {size}; both must be 1+.")

    def batch(step: int) -> list[Example]:
        chosen = []
        for place in range(step * size, (step + 1) * size):
            round_, index = divmod(place, len(examples))
            chosen.append(examples[_order(len(examples), seed, round_)[index]])
        return chosen

    return batch


def _order(count: int, seed: int, round_: int) -> list[int]:
    key = (count, seed, round_)
    if key not in _ORDERS:
        if len(_ORDERS) > 64:
            _ORDERS.clear()
        _ORDERS[key] = random.Random(f"{seed} {round_}").sample(range(count), count)
    return _ORDERS[key]


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


# ----------------------------------------------------------------- encoders with a classifier


class Classifier(nn.Module):
    r"""An encoder, the mean of its vectors over the text, and a new linear layer that starts at 0.

    $\ell = W \bar h + b$ with $\bar h = \frac{1}{|T|} \sum_{t \in T} h_t$, padding left out.
    Deltas are attached to the whole; `set_trainable(model, name, also="classifier.*")` trains the
    new layer beside them, as every method has to.
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        """Put a classifier of `labels` classes on an encoder, which is shared and not copied."""
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)
        self.classifier.to(next(encoder.parameters()).device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | None = None,
        token_type_ids: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch labels"]:
        """The logits of each text; without a mask, all tokens are text."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def encoder_batch(
    tokenizer: Any, examples: Sequence[Example], tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Ids, mask and segments, padded to the longest text of the batch, and the labels.

    Both texts of a pair are read in one row, `[CLS] text [SEP] pair [SEP]`; the longer one is cut.
    """
    texts = [e.text for e in examples]
    pairs = [e.pair for e in examples] if examples[0].pair else None
    batch = tokenizer(
        texts, pairs, padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    )
    return {**batch, "labels": torch.tensor([e.label for e in examples])}


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    r"""Mean cross-entropy, $-\frac1N \sum_n \ln p(y_n \mid x_n)$, in nats."""
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**given), batch["labels"])


@torch.inference_mode()
def classify(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    tokens: int = TOKENS,
    batch_size: int = 64,
) -> tuple[list[int], list[float]]:
    """The label that a classifier gives to each example, and its loss, in nats."""
    chosen, losses = [0] * len(examples), [0.0] * len(examples)
    for rows in _by_length(examples, batch_size):
        batch = encoder_batch(tokenizer, [examples[i] for i in rows], tokens)
        batch = {key: tensor.to(_device(model)) for key, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).float()
        found = nn.functional.cross_entropy(logits, labels, reduction="none")
        for i, label, value in zip(rows, logits.argmax(1).tolist(), found.tolist(), strict=True):
            chosen[i], losses[i] = label, value
    return chosen, losses


# ------------------------------------------------------------------------- decoders that write


def as_texts(
    task: Task, examples: Sequence[Example], template: int = 0
) -> tuple[list[str], list[str]]:
    """Prompts, and what is to be written behind each, with the space in front."""
    return [task.prompt(e, template) for e in examples], [f" {e.target}" for e in examples]


def decoder_batch(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], tokens: int = 2 * TOKENS
) -> dict[str, Tensor]:
    """Prompts with their targets, padded on the right; only targets and their ends are labelled.

    Prompt and target are cut into tokens apart, so that what is labelled is what is scored. A
    prompt that is too long loses its beginning, which keeps the question at its end. Padding and
    prompts have the label -100.
    """
    end = tokenizer.eos_token_id
    rows, labels = [], []
    for prompt, target in zip(prompts, targets, strict=True):
        answer = [*tokenizer.encode(target, add_special_tokens=False)[: tokens // 2], end]
        question = tokenizer.encode(prompt, add_special_tokens=False)
        question = question[max(0, len(question) - (tokens - len(answer))) :]
        rows.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))
    pad = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad(rows, batch_first=True, padding_value=end)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@torch.inference_mode()
def target_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    tokens: int = 2 * TOKENS,
    batch_size: int = 64,
) -> tuple[list[float], list[int]]:
    r"""$\ln p(\text{target} \mid \text{prompt})$ of each pair, in nats, and its number of tokens.

    The token that ends the target counts. Perplexity is $\exp(-\sum \ln p / \sum n)$.
    """
    logs, counts = [0.0] * len(prompts), [0] * len(prompts)
    for rows in _by_length([p + t for p, t in zip(prompts, targets, strict=True)], batch_size):
        batch = decoder_batch(
            tokenizer, [prompts[i] for i in rows], [targets[i] for i in rows], tokens
        )
        batch = {key: tensor.to(_device(model)) for key, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        found = zip(rows, losses.sum(1).tolist(), (labels != -100).sum(1).tolist(), strict=True)
        for i, loss, count in found:
            logs[i], counts[i] = -loss, count
    return logs, counts


def choose(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    template: int = 0,
    tokens: int = 2 * TOKENS,
    batch_size: int = 64,
) -> list[int]:
    """The label whose word a decoder finds most likely behind each example.

    Raises:
        ValueError: When the task has no labels.
    """
    if not task.labels:
        raise ValueError(f"{task.name} has no labels to choose from; its answers are texts.")
    prompts = [task.prompt(e, template) for e in examples]
    every = [prompt for prompt in prompts for _ in task.labels]
    words = [f" {label}" for _ in examples for label in task.labels]
    logs, _ = target_likelihoods(
        model, tokenizer, every, words, tokens=tokens, batch_size=batch_size
    )
    return torch.tensor(logs).view(len(examples), -1).argmax(1).tolist()


@torch.inference_mode()
def write(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    most: int = 32,
    tokens: int = TOKENS,
    batch_size: int = 64,
) -> list[str]:
    """What a decoder writes behind each prompt, the likeliest token each time, up to its end."""
    end, texts = tokenizer.eos_token_id, [""] * len(prompts)
    for rows in _by_length(prompts, batch_size):
        heads = [tokenizer.encode(prompts[i], add_special_tokens=False)[-tokens:] for i in rows]
        longest = max(map(len, heads))
        ids = torch.tensor([[end] * (longest - len(head)) + head for head in heads])
        mask = torch.tensor([[0] * (longest - len(head)) + [1] * len(head) for head in heads])
        device = _device(model)
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for i, row in zip(rows, found[:, longest:].tolist(), strict=True):
            kept = row[: row.index(end)] if end in row else row
            texts[i] = tokenizer.decode(kept).strip()
    return texts


def overlap(written: str, reference: str) -> float:
    r"""F1 of words, $2 |A \cap B| / (|A| + |B|)$ over multisets: what ROUGE-1 measures.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    one, other = Counter(written.lower().split()), Counter(reference.lower().split())
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0


# -------------------------------------------------------------------------------------- helpers


def _by_length(items: Sequence[Any], size: int) -> list[list[int]]:
    """Indices in groups of texts of like length, so that little is spent on padding."""

    def length(i: int) -> int:
        item = items[i]
        return len(item) if isinstance(item, str) else len(item.text) + len(item.pair)

    order = sorted(range(len(items)), key=length)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
