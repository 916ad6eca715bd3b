"""Language models as students: mini-5m teaches mini-300k and mini-1m on text that it read once.

A step's time is mostly the teacher's. What it says of a batch depends on neither the student nor
the seed, so it is computed once for a pool of batches and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.losses import kl_rows
from effnb.core.training import TrainingSettings, causal_lm_loss
from effnb.inference import distillation
from effnb.inference.distillation import LayerAttention, run_recorded

POOL = 25
"""Batches that the teacher reads."""
SHAPE = (8, 128)
RATE = 3e-4
RELATION_HEADS = 4


@dataclass
class Pool:
    """Batches of text, and what a teacher says of each; computed once, when it is first wanted.

    Attributes:
        teacher: A language model in evaluation mode.
        batches: Token ids.
    """

    teacher: nn.Module
    batches: Sequence[Int[Tensor, "batch time"]]
    _scores: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _layers: dict[int, LayerAttention] = field(default_factory=dict, repr=False)

    def scores(self, index: int) -> Float[Tensor, "batch time vocabulary"]:
        """The teacher's scores of a batch, kept in 16 bits."""
        if index not in self._scores:
            with torch.no_grad():
                found = self.teacher(input_ids=self.batches[index], use_cache=False).logits
            self._scores[index] = (found - found.amax(-1, keepdim=True)).bfloat16()
        return self._scores[index].float()

    def last_layer(self, index: int) -> LayerAttention:
        """What the teacher's last layer computed with."""
        if index not in self._layers:
            with torch.no_grad():
                self._layers[index] = run_recorded(
                    self.teacher, input_ids=self.batches[index], use_cache=False
                )[1][-1]
        return self._layers[index]


def settings(steps: int) -> TrainingSettings:
    """Those of every run."""
    return TrainingSettings(
        steps, RATE, warmup_steps=min(10, steps), schedule="linear", weight_decay=0.01
    )


def learn(
    student: nn.Module, pool: Pool, steps: int, seed: int, *, temperature: float = 2.0,
    weight: float = 0.5, more: Sequence[Tensor] = (),
) -> nn.Module:  # fmt: skip
    """Train a copy of a student on a pool by Hinton's loss; with weight 0 on its text alone.

    Args:
        student: The student; it is not changed.
        pool: Text and teacher; its batches come in an order that the seed decides, over and over.
        steps: Steps.
        seed: The order of the batches.
        temperature: Of both distributions.
        weight: The teacher's share.
        more: Batches of other text, which follow after the first `steps - len(more)` steps.
    """
    order = orders(len(pool.batches), steps, seed)
    first = steps - len(more)

    def loss(model: nn.Module, step: int) -> Tensor:
        if step >= first:
            return causal_lm_loss(model, more[step - first])
        ids = pool.batches[order[step]]
        if weight == 0:
            return causal_lm_loss(model, ids)
        own = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return distillation.hinton_loss(
            own, pool.scores(order[step])[:, :-1], ids[:, 1:], temperature=temperature,
            weight=weight,
        )  # fmt: skip

    return distillation.distill(
        student, lambda step: step, settings(steps), loss=loss
    ).model.eval()  # fmt: skip


def learn_relations(student: nn.Module, pool: Pool, steps: int, seed: int) -> nn.Module:
    """Train a copy of a student on text and on the relations of the teacher's last layer."""
    order = orders(len(pool.batches), steps, seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        ids = pool.batches[order[step]]
        output, layers = run_recorded(model, input_ids=ids, use_cache=False)
        scores = output.logits[:, :-1]
        text = nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
        return text + distillation.minilm_v2_loss(
            layers[-1], pool.last_layer(order[step]), RELATION_HEADS
        )

    return distillation.distill(
        student, lambda step: step, settings(steps), loss=loss
    ).model.eval()  # fmt: skip


def orders(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in a random order, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(batches, generator=generator) for _ in range(-(-steps // batches))]
    return torch.cat(rounds)[:steps].tolist()


def steps_for_teacher(student: nn.Module, pool: Pool) -> int:
    r"""Steps on text alone that cost what the teacher's reading of the pool costs.

    Counted as $2 P_T$ operations a token against $6 P_S$, embeddings that only look up left out.
    """
    teacher, own = (matmul_parameters(m) for m in (pool.teacher, student))
    return round(len(pool.batches) * 2 * teacher / (6 * own))


def matmul_parameters(model: nn.Module) -> int:
    """Numbers that take part in multiplications: layers, and the head with its tied embedding."""
    inside = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    return inside + model.get_output_embeddings().weight.numel()


@torch.inference_mode()
def divergences(
    student: nn.Module, teacher: nn.Module, documents: Sequence[Tensor],
    context: Tensor | None = None,
) -> list[float]:  # fmt: skip
    """KL of the teacher from the student on each document, a mean over its tokens, in nats.

    Args:
        student: The student.
        teacher: The teacher, which reads the context first.
        documents: Token ids, one row each.
        context: Token ids that the student does not see.
    """
    found = []
    for ids in documents:
        given = ids if context is None else torch.cat([context, ids])
        taught = teacher(input_ids=given[None], use_cache=False).logits[0, -len(ids) :]
        own = student(input_ids=ids[None], use_cache=False).logits[0]
        rows = kl_rows(taught.log_softmax(-1), own.log_softmax(-1))
        found.append(round(float(rows[:-1].mean()), 5))
    return found


@torch.inference_mode()
def relation_divergences(
    student: nn.Module, teacher: nn.Module, documents: Sequence[Tensor]
) -> list[float]:
    """MiniLM's divergence of the last layers' relations, document by document."""
    found = []
    for ids in documents:
        own, taught = (
            run_recorded(m, input_ids=ids[None], use_cache=False)[1][-1] for m in (student, teacher)
        )
        value = distillation.minilm_v2_loss(own, taught, RELATION_HEADS)
        found.append(round(float(value), 5))
    return found


# ------------------------------------------------------------------------------ copied behaviour


def in_context(
    student: nn.Module, context: Tensor, batches: Sequence[Tensor], seed: int, taught: bool
) -> nn.Module:
    """Teach a model to act without a context as it acts with it; or train it on the text alone."""
    loss = distillation.context_distillation(student, context) if taught else causal_lm_loss
    order = orders(len(batches), len(batches), seed)
    return distillation.distill(
        student, lambda step: batches[order[step]], settings(len(batches)), loss=loss
    ).model.eval()


def sums(count: int, seed: int) -> list[distillation.Worked]:
    """Worked additions of numbers of two digits, all different, in a random order."""
    order = torch.randperm(90 * 90, generator=torch.Generator().manual_seed(seed))[:count]
    return [distillation.addition(10 + i // 90, 10 + i % 90) for i in order.tolist()]


WAYS: Mapping[str, Callable[[Sequence[distillation.Worked]], list[list[tuple[str, str]]]]] = {
    "answers alone": lambda items: [distillation.two_tasks(items)[0]],
    "predict and explain": lambda items: list(distillation.two_tasks(items)),
    "reasoning first": lambda items: [distillation.one_task(items)],
}
"""Three ways to teach sums, as the texts that a batch holds."""


def learn_sums(
    student: nn.Module, tokenizer: Any, items: Sequence[distillation.Worked], way: str,
    tokens: int, seed: int, size: int = 32,
) -> tuple[nn.Module, int]:  # fmt: skip
    """Train a copy of a student on worked sums until it has read this many tokens; its steps too.

    Args:
        student: The student.
        tokenizer: Its tokenizer.
        items: Worked sums.
        way: One of `WAYS`.
        tokens: Tokens to read, padding included.
        seed: Which sums come when.
        size: Sums in a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    batches, read = [], 0
    while read < tokens:
        rows = torch.randperm(len(items), generator=generator)[:size].tolist()
        parts = WAYS[way]([items[i] for i in rows])
        # A tuple: of a list, the trainer would take each element as a batch.
        batch = tuple(
            distillation.pair_batch(part, encode, eos=tokenizer.eos_token_id) for part in parts
        )
        batches.append(batch)
        read += sum(ids.numel() for ids, _ in batch)

    def loss(model: nn.Module, batch: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        if len(batch) == 2:
            return distillation.step_by_step()(model, (batch[0], batch[1]))
        return causal_lm_loss(model, batch[0])

    result = distillation.distill(
        student, lambda step: batches[step], settings(len(batches)), loss=loss
    )
    return result.model.eval(), len(batches)


def right_sums(
    model: nn.Module, tokenizer: Any, items: Sequence[distillation.Worked],
    write: Callable[..., list[str]],
) -> list[float]:  # fmt: skip
    """Whether the answer that a model writes to each sum is right; it writes its own reasoning."""
    prompts = [distillation.PREDICT + item.question for item in items]
    texts = write(model, tokenizer, prompts, most=48)
    return [float(distillation.final_answer(t) == i.answer) for t, i in zip(texts, items)]
