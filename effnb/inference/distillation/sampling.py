"""Text that a model writes itself: drawn, or searched for.

On-policy methods train a student on its own text, so that it learns to go on from its own mistakes;
no gradient passes through the drawing.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.core.losses import check_share, check_temperature
from effnb.core.modules import share


def check_prompts(prompts: Tensor, max_new_tokens: int, *models: nn.Module) -> None:
    """Refuse prompts that nothing can follow.

    Raises:
        ValueError: No token to write or to begin with, or more than a model's positions.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if prompts.ndim != 2 or not prompts.numel():
        raise ValueError(
            f"the prompts have shape {tuple(prompts.shape)}; give (batch, time) with at least one "
            "token each."
        )
    total = prompts.shape[1] + max_new_tokens
    for model in models:
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and total > limit > 0:
            raise ValueError(
                f"prompt and answer take {total} tokens; {type(model).__name__} has {limit} "
                "positions."
            )


def sample(
    model: nn.Module,
    prompts: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    eos: int | None = None,
    teacher: nn.Module | None = None,
    teacher_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch total"], Int[Tensor, "batch total"]]:
    r"""Let a causal language model go on from prompts; return (ids, labels).

    Labels are -100 in the prompt and behind the first `eos`, which itself counts. With a teacher,
    every token is drawn from $\alpha p + (1 - \alpha) q$ of the two.

    Args:
        model: The model that writes, in evaluation mode whatever its own mode is.
        prompts: Token ids, all of one length.
        max_new_tokens: How many to write.
        temperature: Divides the scores before drawing.
        eos: The token that ends a text.
        teacher: A second model to mix in, or None.
        teacher_share: $\alpha$.
        generator: Where the draws come from; torch's own, which `train` seeds by step, when None.

    Raises:
        ValueError: A temperature of 0 or below, a share outside [0, 1], or prompts that do not fit.
    """
    check_temperature(temperature)
    check_share("teacher_share", teacher_share)
    writers = [model] if teacher is None or teacher_share == 0 else [model, teacher]
    check_prompts(prompts, max_new_tokens, *writers)
    quiet = [share(writer).eval() for writer in writers]
    shares = [1.0] if len(quiet) == 1 else [1 - teacher_share, teacher_share]
    ids, done = prompts, torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    labels = torch.full_like(prompts, -100)
    caches: list = [None] * len(quiet)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            mixed = 0.0
            for i, (writer, part) in enumerate(zip(quiet, shares)):
                given = ids if caches[i] is None else ids[:, -1:]
                out = writer(input_ids=given, past_key_values=caches[i], use_cache=True)
                caches[i] = getattr(out, "past_key_values", None)
                last = out.logits[:, -1].cpu().double()  # drawn on the CPU: alike on every device
                mixed = mixed + part * (last / temperature).softmax(-1)
            new = torch.multinomial(mixed, 1, generator=generator).to(ids.device)
            labels = torch.cat([labels, new.masked_fill(done[:, None], -100)], 1)
            if eos is not None:
                new = new.masked_fill(done[:, None], eos)
                done = done | (new[:, 0] == eos)
            ids = torch.cat([ids, new], 1)
            if bool(done.all()):
                break
    return ids, labels


def beam_search(
    model: nn.Module,
    prompt: Int[Tensor, " prompt"],
    beams: int,
    max_new_tokens: int,
    *,
    eos: int | None = None,
    length_penalty: float = 0.0,
) -> list[tuple[list[int], float]]:
    r"""The likeliest continuations of one prompt: (token ids, score), best first.

    The score is $\ln p(y \mid x) / |y|^a$ with a the length penalty; 0 gives the probability of the
    sequence. A text ends at `eos`, which belongs to it, or at the last token allowed.

    Args:
        model: A causal language model.
        prompt: Token ids.
        beams: How many beginnings are kept at every step, and texts given back.
        max_new_tokens: The longest continuation.
        eos: The token that ends a text.
        length_penalty: $a$.

    Raises:
        ValueError: A count of beams below 1, or a prompt that does not fit.
    """
    if beams < 1:
        raise ValueError(f"beams is {beams}; it must be at least 1.")
    check_prompts(prompt[None], max_new_tokens, model)
    quiet = share(model).eval()
    open_, ended = [([], 0.0)], []
    given, cache = prompt[None], None
    with torch.no_grad():
        for _ in range(max_new_tokens):
            out = quiet(input_ids=given, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            log_p = out.logits[:, -1].cpu().double().log_softmax(-1)
            best = (log_p + log_p.new_tensor([s for _, s in open_])[:, None]).flatten()
            top = best.topk(min(2 * beams, len(best)))
            parents = [i // log_p.shape[1] for i in top.indices.tolist()]
            words = [i % log_p.shape[1] for i in top.indices.tolist()]
            grown = [
                (parent, [*open_[parent][0], word], score)
                for parent, word, score in zip(parents, words, top.values.tolist())
            ]
            ended += [(y, s) for _, y, s in grown[:beams] if y[-1] == eos]
            kept = [item for item in grown if item[1][-1] != eos][:beams]
            open_ = [(y, s) for _, y, s in kept]
            if not open_:
                break
            if hasattr(cache, "reorder_cache"):  # each text goes on from its own beginning
                cache.reorder_cache(torch.tensor([p for p, _, _ in kept], device=prompt.device))
                given = prompt.new_tensor([[y[-1]] for y, _ in open_])
            else:
                cache = None
                given = torch.stack([torch.cat([prompt, prompt.new_tensor(y)]) for y, _ in open_])
    scored = [(y, s / len(y) ** length_penalty) for y, s in (*ended, *open_)]
    return sorted(scored, key=lambda pair: -pair[1])[:beams]
