r"""Training a quantized model without data: the model writes its own text and teaches itself.

LLM-QAT has three parts. The full-precision model *generates* the training text: a first token at
random, the next three to five the most likely ones, the rest drawn from its own distribution. The
student rounds weights per row, activations and the key-value cache per token
(`prepare_qat(model, 4, symmetric=True, activation_bits=8, kv_bits=4)`). And it learns to *imitate*
the teacher's distribution over the next token, not the token that was drawn.

Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023, arXiv
2305.17888.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.context import context_limit
from effnb.core.modules import share
from effnb.core.training import Loss


def self_generate(
    model: nn.Module,
    sequences: int,
    tokens: int,
    *,
    greedy: tuple[int, int] = (3, 5),
    first_tokens: Int[Tensor, "*candidates"] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "sequences tokens"]:
    """Let a causal language model write text to train on.

    The first token is drawn evenly from the vocabulary; then comes a number of most likely tokens,
    between the two ends of `greedy`, so that the sequence finds a subject; the rest is drawn from
    the model's own distribution.

    Args:
        model: A Hugging Face causal language model; its cache is used where it has one.
        sequences: How many to write.
        tokens: Length of each.
        greedy: Fewest and most of the greedy tokens; drawn evenly for each sequence.
        first_tokens: Token ids to draw the first from; the whole vocabulary by default.
        seed: Seed of all draws.
        batch_size: Sequences at a time. It does not change the draws, but the model's own rounding
            may differ between batch sizes.
        progress: Called with (sequences done, sequences).

    Raises:
        ValueError: A count below 1, a length beyond the model's context, an impossible range, or no
            vocabulary to draw from.
    """
    low, high = greedy
    if sequences < 1 or tokens < 1 or batch_size < 1:
        raise ValueError(
            f"sequences is {sequences}, tokens {tokens} and batch_size {batch_size}; each must be "
            "at least 1."
        )
    if not 0 <= low <= high:
        raise ValueError(f"greedy is {greedy}; it must be a range such as (3, 5).")
    config = getattr(model, "config", None)
    context = context_limit(model)
    if context is not None and tokens > context:
        raise ValueError(f"tokens is {tokens}; the model's context is {context}.")
    if first_tokens is None:
        if getattr(config, "vocab_size", None) is None:
            raise ValueError("the model does not say its vocabulary; give first_tokens.")
        first_tokens = torch.arange(config.vocab_size)
    if first_tokens.numel() == 0:
        raise ValueError("first_tokens is empty; give at least one token id.")
    device = next(model.parameters()).device
    # All draws are made on the CPU, one generator per sequence: the same text on every device, and
    # whatever the batch.
    draws = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(sequences)]
    candidates = first_tokens.flatten().cpu()
    writer = share(model).eval()
    rows = []
    for at in range(0, sequences, batch_size):
        part = draws[at : at + batch_size]
        rows.append(_continue(writer, part, candidates, tokens, (low, high), device))
        if progress:
            progress(min(at + batch_size, sequences), sequences)
    return torch.cat(rows)


def _continue(
    model: nn.Module,
    draws: list[torch.Generator],
    candidates: Tensor,
    tokens: int,
    greedy: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """One batch of sequences."""
    first = [candidates[torch.randint(len(candidates), (1,), generator=g)] for g in draws]
    counts = torch.cat([torch.randint(greedy[0], greedy[1] + 1, (1,), generator=g) for g in draws])
    ids = torch.stack(first).to(device)
    given, cache = ids, None
    with torch.inference_mode():
        for done in range(1, tokens):
            out = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            probabilities = out.logits[:, -1].double().softmax(-1).cpu()
            drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, draws)]
            best = probabilities.argmax(-1, keepdim=True)
            new = torch.where((counts >= done).unsqueeze(1), best, torch.stack(drawn)).to(device)
            ids = torch.cat([ids, new], 1)
            given = ids if cache is None else new
    return ids.clone()


def soft_cross_entropy(
    student: Float[Tensor, "*batch vocabulary"], teacher: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, ""]:
    r"""$-\frac1N \sum_t \sum_v p^T_{tv} \ln p^S_{tv}$, in nats, from the logits of both.

    It is the Kullback-Leibler divergence from teacher to student plus the teacher's own entropy,
    so its smallest value is that entropy, not 0.
    """
    truth = teacher.detach().float().softmax(-1)
    return -(truth * student.float().log_softmax(-1)).sum(-1).mean()


def imitation_loss(teacher: nn.Module) -> Loss:
    """A loss for `effnb.core.training.train`: imitate a teacher at every position of a batch.

    Args:
        teacher: A causal language model; it is not trained.
    """

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            truth = teacher(input_ids=batch, use_cache=False).logits
        return soft_cross_entropy(model(input_ids=batch, use_cache=False).logits, truth)

    return loss
