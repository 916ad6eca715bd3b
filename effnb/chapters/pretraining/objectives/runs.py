"""Short training runs: one network, the same text, and one objective or another.

The network has the shape of `mini-300k`. Its vocabulary has 65 more tokens: a mask token and 64
sentinels. What differs between runs is what is hidden, what is asked and what each position may
see; text, seeds, network, optimizers and steps are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from effnb.core.muon import Muon, hidden_matrices
from effnb.core.training import TrainingSettings, train
from effnb.lab import corpora
from effnb.lab._files import data_folder
from effnb.pretraining import objectives
from effnb.pretraining.objectives import Electra, Example, Work

WORDS = 4096
"""Tokens of the workbook's vocabulary; random tokens are drawn from these."""
MASK = WORDS
SENTINELS = 64
FIRST_SENTINEL = MASK + SENTINELS
VOCABULARY = FIRST_SENTINEL + 1
END = 0
STEPS, SHAPE = 600, (8, 128)
"""Optimizer steps of a run, and sequences and tokens of each: 614,400 tokens of text."""
MUON_RATE, ADAMW_RATE = 0.02, 4e-3
"""As the workbook's models are trained."""


@dataclass(frozen=True)
class Objective:
    """What a run asks.

    Attributes:
        name: As tables call it.
        make: From ids and a generator to an example.
        both_sides: Whether the trained network is read with every position seeing every other.
        electra: Whether a generator makes the task; "part" judges its positions only.
    """

    name: str
    make: Callable[[Tensor, torch.Generator], Example]
    both_sides: bool = True
    electra: str = ""


def mlm(rate: float) -> Objective:
    """Masked language modelling at a rate."""
    return Objective(
        f"MLM {rate:.0%}".replace("%", " %"),
        lambda ids, draws: objectives.masked_lm(
            ids, rate, mask_token=MASK, vocabulary=WORDS, generator=draws
        ),
    )


def spans(mean: float, rate: float = 0.15) -> Objective:
    """Span corruption with spans of a mean length."""
    return Objective(
        f"spans of {mean:g}",
        lambda ids, draws: objectives.span_corruption(
            ids, rate, mean, first_sentinel=FIRST_SENTINEL, end=END, sentinels=SENTINELS,
            generator=draws,
        ).example(),
    )  # fmt: skip


def _electra(ids: Tensor, draws: torch.Generator) -> Example:
    return objectives.electra_masking(ids, mask_token=MASK, generator=draws)


ALL: dict[str, Objective] = {
    one.name: one
    for one in (
        Objective("CLM", lambda ids, draws: objectives.causal_lm(ids), both_sides=False),
        Objective(
            "CLM, 15 % asked",
            lambda ids, draws: objectives.causal_lm(ids, share=0.15, generator=draws),
            both_sides=False,
        ),
        mlm(0.15),
        mlm(0.4),
        mlm(0.6),
        mlm(0.8),
        Objective("prefix LM", lambda ids, draws: objectives.prefix_lm(ids, generator=draws)),
        spans(1),
        spans(3),
        spans(10),
        Objective("ELECTRA", _electra, electra="all"),
        Objective("ELECTRA, 15 % asked", _electra, electra="part"),
    )
}
"""Every objective that is measured, by its name."""


# ------------------------------------------------------------------------------------------- text


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The bench's; no model is loaded for it."""
    return AutoTokenizer.from_pretrained(data_folder() / "models" / "tokenizer")


def text_windows(seed: int, count: int, length: int) -> Int[Tensor, "windows time"]:
    """Windows of training text, a third from each corpus, none twice while there is new text.

    Args:
        seed: Seed of the order of documents and windows.
        count: Number of windows.
        length: Tokens of each.
    """
    rows, draws = [], np.random.default_rng([seed, 17])
    for number, name in enumerate(corpora.NAMES):
        wanted = (count + len(corpora.NAMES) - 1 - number) // len(corpora.NAMES)
        texts = corpora.documents(name, "train")
        ids: list[int] = []
        waiting = list(draws.permutation(len(texts)))
        while len(ids) < wanted * length:
            if not waiting:
                waiting = list(draws.permutation(len(texts)))
            some, waiting = waiting[:32], waiting[32:]
            parts = tokenizer().backend_tokenizer.encode_batch(
                [texts[i] for i in some], add_special_tokens=False
            )
            for part in parts:
                ids += [*part.ids, END]
        rows += torch.tensor(ids[: wanted * length]).view(wanted, length).tolist()
    return torch.tensor([rows[i] for i in draws.permutation(len(rows))])


# --------------------------------------------------------------------------------------- training


def build(seed: int) -> LlamaForCausalLM:
    """The untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rms_norm_eps=1e-5, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        objective: What was asked.
        model: The network that is kept; of ELECTRA the discriminator's base.
        work: Text, positions and operations of the whole run.
        losses: Training loss of each step, which compares with no other objective's.
        steps: Optimizer steps.
    """

    objective: Objective
    model: nn.Module
    work: Work
    losses: list[float] = field(repr=False)
    steps: int


def draws_of(seed: int, step: int) -> torch.Generator:
    """What is hidden at a step; the same whenever it is asked for."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)


def trained(
    objective: Objective,
    seed: int = 0,
    *,
    steps: int = STEPS,
    windows: Int[Tensor, "windows time"] | None = None,
    examples: Sequence[Example] | None = None,
    progress: Any = False,
) -> Trained:
    """Train the network on an objective.

    Args:
        objective: What it is asked.
        seed: Seed of the weights, the text and what is hidden.
        steps: Optimizer steps.
        windows: Text, read from its beginning again where it ends; fresh text when None.
        examples: Fixed examples, read in turn: static masking.
        progress: As `effnb.core.training.train` takes it.
    """
    batch, length = SHAPE
    if windows is None:
        windows = text_windows(seed, steps * batch, length)
    groups = len(windows) // batch
    network: nn.Module = build(seed)
    if objective.electra:
        network = Electra(network, seed=seed)
    total: list[Work] = []

    def given(step: int) -> tuple[Tensor, Example, torch.Generator]:
        place = step % groups
        ids, draws = windows[place * batch : (place + 1) * batch], draws_of(seed, step)
        made = objective.make(ids, draws) if examples is None else examples[step % len(examples)]
        return ids, made, draws

    def loss(model: nn.Module, step_given: tuple) -> Tensor:
        ids, example, draws = step_given
        total.append(work(model, objective, example))
        if isinstance(model, Electra):
            everywhere = objective.electra == "all"
            return model.loss(ids, example, everywhere=everywhere, generator=draws)
        return objectives.example_loss(model, example)

    settings = TrainingSettings(
        steps=steps, learning_rate=MUON_RATE, warmup_steps=steps // 10, schedule="wsd",
        weight_decay=0.05, betas=(0.9, 0.95), seed=seed,
    )  # fmt: skip
    found = train(network, given, settings, loss=loss, optimizers=muon_and_adamw, progress=progress)
    kept = network.body if isinstance(network, Electra) else network
    return Trained(objective, kept, sum(total[1:], total[0]), found.losses, steps)


def muon_and_adamw(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the embedding, the norms and the biases."""
    inside = hidden_matrices(model)
    mine = {id(p) for p in inside}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    return [
        Muon(inside, lr=settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=settings.betas, weight_decay=0.0),
    ]


def work(model: nn.Module, objective: Objective, example: Example) -> Work:
    """What a step asks and takes."""
    if isinstance(model, Electra):
        return objectives.electra_work(model, example, objective.electra == "all")
    return objectives.work_of(model, example)


def step_work(objective: Objective, steps: int = 8) -> Work:
    """Mean work of a step, from a few random texts; no training."""
    network: nn.Module = build(0)
    if objective.electra:
        network = Electra(network)
    draws = torch.Generator().manual_seed(0)
    found = [
        work(network, objective, objective.make(torch.randint(1, WORDS, SHAPE), draws))
        for _ in range(steps)
    ]
    whole = sum(found[1:], found[0])
    return Work(*(round(v / steps) for v in (
        whole.text_tokens, whole.read_tokens, whole.text_targets, whole.flops
    )))  # fmt: skip


# ---------------------------------------------------------------------------------------- judging


@torch.inference_mode()
def features(
    model: nn.Module, texts: Sequence[Int[Tensor, " time"]], both_sides: bool, batch: int = 64
) -> Float[Tensor, "texts hidden"]:
    """The mean over a text of what the last layer makes of its tokens."""
    rows = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        ids = nn.utils.rnn.pad_sequence(list(some), batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in some], batch_first=True)
        hidden = objectives.hidden_states(model, plain(ids, mask, both_sides))
        weights = mask[..., None].to(hidden.dtype)
        rows.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.cat(rows).float()


@torch.inference_mode()
def pooled(
    model: nn.Module, texts: Sequence[Int[Tensor, " time"]], batch: int = 16
) -> Float[Tensor, "texts hidden"]:
    """The same of any Hugging Face model, which looks where it looks."""
    rows, base = [], getattr(model, "base_model", model)
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        ids = nn.utils.rnn.pad_sequence(list(some), batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in some], batch_first=True)
        hidden = base(input_ids=ids, attention_mask=mask)[0]
        weights = mask[..., None].to(hidden.dtype)
        rows.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.cat(rows).float()


def plain(ids: Tensor, mask: Tensor, both_sides: bool) -> Example:
    """A text with nothing hidden and nothing asked."""
    time, text = ids.shape[1], mask.bool()
    seen = torch.ones(time, time, dtype=torch.bool)
    seen = seen if both_sides else seen.tril()
    visible = (seen & text[:, None] & text[:, :, None]) | torch.eye(time, dtype=torch.bool)
    return Example(ids, torch.full_like(ids, objectives.IGNORED), visible, int(text.sum()))


@torch.inference_mode()
def losses_by_document(
    model: nn.Module,
    documents: Sequence[Int[Tensor, " time"]],
    make: Callable[[Tensor], Example],
) -> list[float]:
    """Mean loss of what is asked of each document, in nats."""
    found = []
    for ids in documents:
        found.append(round(float(objectives.example_loss(model, make(ids[None]))), 5))
    return found


def masked_alike(ids: Int[Tensor, "batch time"], copies: int = 4) -> Example:
    """The common test of masked models: 15 % of a text, masked in four ways, always the same."""
    draws = torch.Generator().manual_seed(int(ids.sum()))
    return objectives.masked_lm(
        ids.expand(copies, -1), 0.15, mask_token=MASK, vocabulary=WORDS, generator=draws
    )
