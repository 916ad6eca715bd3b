r"""How a model reads long texts: its loss by position, its loss by context length, and recall.

Three questions, which have different answers. *Where does the loss rise?* `position_losses` scores
every token of a window and averages by place: a model that cannot go beyond its trained length
shows it there. *Does more context help?* `context_losses` scores the same tokens with more and more
text before them; only such numbers can be compared across lengths, since other tokens are easier
or harder. *Is far context used?* A flat loss does not prove it, since most tokens are foreseen from
near ones. `recall_grid` asks for something that was said once, at every depth of every length.

Windows that slide: Press, Smith, Lewis, "Train Short, Test Long", 2022, arXiv 2108.12409. Averages
here are over tokens. (YaRN's published script averages windows' means, so that the tokens of its
first window, which scores a whole window, count less than others.) Recall by depth and length
follows Mohtashami and Jaggi, "Landmark Attention", 2023, arXiv 2305.16300 (passkey retrieval).

Logits exist for a chunk of tokens at a time: of 8,192 tokens and 49,152 words all of them would
take 1.6 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.context import check_causal, check_context
from effnb.evaluation.quality import Perplexity, _logits

Maker = Callable[[int, float, int], tuple[Sequence[int] | Tensor, int | Sequence[int]]]
"""From (length, depth, seed) to token ids and the place, or places, of the answer in them."""


@dataclass(frozen=True)
class PositionLosses:
    r"""Loss of each place in a window.

    Attributes:
        nats: Mean $-\ln p$ of the tokens at places 1, 2, …, context - 1; NaN where none was scored.
        tokens: How many tokens were scored at each place.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def total(self) -> Perplexity:
        """All tokens together, each counted once."""
        total = sum(n * c for n, c in zip(self.nats, self.tokens) if c)
        count = sum(self.tokens)
        return Perplexity(total / count, count)

    def between(self, first: int, last: int) -> Perplexity:
        """The tokens at the places from `first` up to, and not including, `last`.

        Raises:
            ValueError: When no token was scored there.
        """
        places = range(max(first, 1), min(last, len(self.nats) + 1))
        count = sum(self.tokens[p - 1] for p in places)
        if not count:
            raise ValueError(f"no token was scored at the places {first} to {last - 1}.")
        total = sum(self.nats[p - 1] * self.tokens[p - 1] for p in places if self.tokens[p - 1])
        return Perplexity(total / count, count)


def position_losses(
    model: nn.Module,
    ids: Int[Tensor, "*tokens"],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 1,
    chunk: int = 512,
) -> PositionLosses:
    """Loss by place in windows that slide over a text, each token scored at most once.

    Windows of `context` tokens start every `stride` tokens; the first scores all its tokens but the
    first, every other one its last `stride`. With a stride of the context itself, the default,
    windows do not overlap, every place is scored equally often, and the curve shows where a model
    stops. With a short stride almost all tokens have almost a whole context before them, and the
    total is the sliding-window perplexity. Tokens behind the last whole window are left out.

    Args:
        model: A causal language model.
        ids: Token ids of one text, or of several, one in each row.
        context: Window length in tokens.
        stride: Tokens between two windows, up to the context.
        batch_size: Windows at a time.
        chunk: Tokens of a window whose logits exist at once.

    Raises:
        ValueError: No whole window, a stride outside 1 … context, a batch size or chunk below 1, a
            context longer than the model has positions, or a model that sees the tokens it is to
            foresee.
    """
    texts = torch.as_tensor(ids)
    texts = texts[None] if texts.ndim == 1 else texts
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(
            f"context is {context} and stride {stride}; a context has at least 2 tokens and a "
            "stride lies between 1 and the context."
        )
    _check_sizes(texts, context, batch_size, chunk)
    _check_model(model, texts, context)
    windows = [
        (row, start, 1 if start == 0 else max(context - stride, 1))
        for row in range(len(texts))
        for start in range(0, texts.shape[1] - context + 1, stride)
    ]
    total = torch.zeros(context - 1, dtype=torch.float64)
    count = torch.zeros(context - 1, dtype=torch.long)
    for part in _parts(windows, batch_size):
        rows = torch.stack([texts[row, start : start + context] for row, start, _ in part])
        losses = chunked_losses(model, rows, chunk).double().cpu()
        for loss, (_, _, first) in zip(losses, part, strict=True):
            total[first - 1 :] += loss[first - 1 :]
            count[first - 1 :] += 1
    return PositionLosses(tuple((total / count).tolist()), tuple(count.tolist()))


@dataclass(frozen=True)
class ContextLosses:
    r"""Loss of the same tokens with contexts of several lengths.

    Attributes:
        contexts: Tokens of each context, the scored ones included.
        nats: Mean $-\ln p$ of the scored tokens for each context.
        windows: For each context the mean of every window, in one order: for paired comparisons.
        tokens: How many tokens were scored for each context, the same ones.
    """

    contexts: tuple[int, ...]
    nats: tuple[float, ...]
    windows: tuple[tuple[float, ...], ...]
    tokens: int

    @property
    def perplexity(self) -> tuple[float, ...]:
        """The exponential of the nats of each context."""
        return tuple(Perplexity(one, self.tokens).perplexity for one in self.nats)


def context_losses(
    model: nn.Module,
    sequences: Int[Tensor, "*sequences time"],
    contexts: Sequence[int],
    *,
    targets: int = 32,
    batch_size: int = 1,
    chunk: int = 512,
) -> ContextLosses:
    """Loss of the last tokens of each sequence, with more and more of the text before them.

    Args:
        model: A causal language model.
        sequences: Token ids, at least as long as the longest context.
        contexts: Tokens given to the model, the scored ones included.
        targets: How many tokens are scored at the end of each sequence.
        batch_size: Sequences at a time.
        chunk: Tokens whose logits exist at once.

    Raises:
        ValueError: No context, one that is not longer than `targets` or longer than the sequences
            or the model's positions; numbers below 1; a model that sees what it is to foresee.
    """
    sequences = torch.as_tensor(sequences)
    if not contexts or min(contexts) <= targets or targets < 1:
        raise ValueError(
            f"contexts are {list(contexts)} and targets {targets}; there must be at least one "
            "context, each longer than the targets, of which there is at least 1."
        )
    _check_sizes(sequences, max(contexts), batch_size, chunk)
    _check_model(model, sequences, max(contexts))
    found = []
    for context in contexts:
        means = []
        for rows in sequences[:, -context:].split(batch_size):
            losses = chunked_losses(model, rows, chunk, last=targets)
            means += losses.double().mean(1).tolist()
        found.append(tuple(means))
    nats = tuple(sum(means) / len(means) for means in found)
    return ContextLosses(tuple(contexts), nats, tuple(found), len(sequences) * targets)


@dataclass(frozen=True)
class RecallGrid:
    r"""Recall by length and depth.

    Attributes:
        lengths: Tokens of the prompts.
        depths: Where the answer was told: 0 at the beginning, 1 at the end.
        correct: Prompts of each length (outer) and depth (inner) whose answer was the most likely
            continuation, every token of it.
        trials: Prompts of each cell.
        nats: Mean $-\ln p$ per token of the answers of each cell.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    correct: tuple[tuple[int, ...], ...]
    trials: int
    nats: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> tuple[tuple[float, ...], ...]:
        """Part of the prompts of each cell that were answered."""
        return tuple(tuple(c / self.trials for c in row) for row in self.correct)

    @property
    def by_length(self) -> tuple[float, ...]:
        """Accuracy of each length over all depths."""
        return tuple(sum(row) / (self.trials * len(row)) for row in self.correct)

    def standard_error(self, length: int, depth: float) -> float:
        r"""$\sqrt{a (1 - a) / n}$ of one cell.

        Raises:
            ValueError: When the grid has no such cell.
        """
        row, column = self.lengths.index(length), self.depths.index(depth)
        a = self.accuracy[row][column]
        return math.sqrt(a * (1 - a) / self.trials)


def recall_grid(
    model: nn.Module,
    make: Maker,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 8,
    batch_size: int = 8,
    seed: int = 0,
) -> RecallGrid:
    """Whether a model finds what was said once, at each depth of prompts of each length.

    An answer counts as recalled when each of its tokens is the model's first choice after all that
    comes before it; that is what greedy decoding would give.

    Args:
        model: A causal language model.
        make: From (length, depth, seed) to the token ids of a prompt with its answer, and the place
            of the answer's token in them, or the places of its tokens. A pure function.
        lengths: Tokens of the prompts; what `make` gives may be a little shorter.
        depths: Between 0 (told at the beginning) and 1 (told at the end).
        trials: Prompts of each cell; their seeds are `seed`, `seed` + 1, …
        batch_size: Prompts at a time.
        seed: Of the first prompt of each cell.

    Raises:
        ValueError: No length or depth, a depth outside 0 … 1, numbers below 1, a prompt whose
            answer is not inside it, prompts longer than the model has positions, or a model that
            sees the tokens it is to foresee.
    """
    if not lengths or not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"lengths are {list(lengths)} and depths {list(depths)}; there must be at least one of "
            "each, and depths lie between 0 and 1."
        )
    if trials < 1 or batch_size < 1:
        raise ValueError(
            f"trials is {trials} and batch_size {batch_size}; both must be at least 1."
        )
    check_loaded(model)
    correct, nats = [], []
    for length in lengths:
        check_context(model, length, "a length of the prompts")
        row: list[int] = []
        mean: list[float] = []
        for depth in depths:
            prompts = [_prompt(make, length, depth, seed + trial) for trial in range(trials)]
            if not correct and not row:
                check_causal(model, prompts[0][0][None])
            found = [one for part in _parts(prompts, batch_size) for one in _recalled(model, part)]
            row.append(sum(hit for hit, _ in found))
            mean.append(sum(loss for _, loss in found) / trials)
        correct.append(tuple(row))
        nats.append(tuple(mean))
    return RecallGrid(tuple(lengths), tuple(depths), tuple(correct), trials, tuple(nats))


def _prompt(make: Maker, length: int, depth: float, seed: int) -> tuple[Tensor, list[int]]:
    ids, answer = make(length, depth, seed)
    ids = torch.as_tensor(ids, dtype=torch.long)
    places = [answer] if isinstance(answer, int) else [int(place) for place in answer]
    if ids.ndim != 1 or not places or not all(1 <= place < len(ids) for place in places):
        raise ValueError(
            f"a prompt of {tuple(ids.shape)} tokens has its answer at {places}; it must be one "
            "sequence with every answer behind its first token."
        )
    return ids, places


def _recalled(model: nn.Module, part: list[tuple[Tensor, list[int]]]) -> list[tuple[bool, float]]:
    """Whether each answer was the first choice, and its mean loss.

    Shorter prompts are padded on the right, where causal attention does not look.
    """
    device = next(model.parameters()).device
    rows = nn.utils.rnn.pad_sequence([ids for ids, _ in part], batch_first=True).to(device)
    kept = sorted({place - 1 for _, places in part for place in places})
    with torch.inference_mode():
        logits = _logits(model, torch.tensor(kept, device=device), input_ids=rows, use_cache=False)
        logs = logits.float().log_softmax(-1)
    column = {place: at for at, place in enumerate(kept)}
    found = []
    for row, (ids, places) in enumerate(part):
        before = logs[row, [column[place - 1] for place in places]]
        wanted = ids[places].to(device)
        hit = bool((before.argmax(-1) == wanted).all())
        found.append((hit, float(-before.gather(1, wanted[:, None]).double().mean())))
    return found


# ---------------------------------------------------------------- losses in chunks


def chunked_losses(
    model: nn.Module, ids: Int[Tensor, "batch time"], chunk: int = 512, *, last: int | None = None
) -> Float[Tensor, "batch scored"]:
    r"""$-\ln p(x_{t+1} \mid x_{\le t})$ in nats, with logits of `chunk` places at a time.

    The model's blocks run once and its head on one chunk after another. Where the logits are more
    than the head makes of the hidden states (a soft cap, a scale), which a few tokens tell, the
    whole model runs once for each chunk instead, or once with all its logits if it cannot leave any
    out.

    Args:
        model: A causal language model.
        ids: Token ids.
        chunk: Places at a time.
        last: How many of the last tokens are scored; all but the first by default.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    time = ids.shape[1]
    first = 0 if last is None else time - 1 - last
    with torch.inference_mode():
        hidden = _hidden(model, ids)
        found = []
        for start in range(first, time - 1, chunk):
            places = torch.arange(start, min(start + chunk, time - 1), device=device)
            if hidden is None:
                logits = _logits(model, places, input_ids=ids, use_cache=False)
            else:
                logits = model.get_output_embeddings()(hidden[:, places])
            wanted = ids[:, places + 1]
            logs = logits.float().transpose(1, 2)
            found.append(nn.functional.cross_entropy(logs, wanted, reduction="none"))
    return torch.cat(found, 1)


def _hidden(model: nn.Module, ids: Tensor) -> Tensor | None:
    """What the head reads, where the head alone makes logits of it."""
    base = getattr(model, "base_model", None)
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(base, nn.Module) or base is model or not isinstance(head, nn.Module):
        return None
    try:
        probe = ids[:1, :4]
        want = model(input_ids=probe, use_cache=False).logits
        found = head(base(input_ids=probe, use_cache=False)[0])
        tolerance = 1e-4 if want.dtype in (torch.float32, torch.float64) else 1e-2
        same = found.shape == want.shape and torch.allclose(
            found, want, rtol=tolerance, atol=tolerance * float(want.abs().max())
        )
    except (TypeError, AttributeError, RuntimeError):
        return None
    return base(input_ids=ids, use_cache=False)[0] if same else None


def _parts(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _check_sizes(texts: Tensor, context: int, batch_size: int, chunk: int) -> None:
    if texts.ndim != 2 or not len(texts) or texts.shape[1] < context:
        raise ValueError(
            f"the ids have shape {tuple(texts.shape)}; they must hold at least one text of at "
            f"least {context} tokens."
        )
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"batch_size is {batch_size} and chunk {chunk}; both must be at least 1.")


def _check_model(model: nn.Module, texts: Tensor, context: int) -> None:
    check_loaded(model)
    check_context(model, context)
    check_causal(model, texts)
