r"""Speculative decoding: a small model drafts, a large one checks, and not a word changes.

The draft model writes $x_1, \dots, x_\gamma$ from its distributions $q_i$. One pass of the target
gives its own $p_1, \dots, p_{\gamma + 1}$ after each of them. Token by token, $x_i$ is accepted
with probability $\min(1, p_i(x_i) / q_i(x_i))$; at the first rejection a token is drawn from
$\operatorname{norm}(\max(0, p_i - q_i))$; after $\gamma$ acceptances one more comes from
$p_{\gamma + 1}$. What comes out has exactly the target's distribution, because

$$q \min(1, p / q) + (1 - \beta) \frac{p - \min(p, q)}{1 - \beta} = p, \qquad
\beta = \sum_x \min(p(x), q(x)).$$

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2022, arXiv
2211.17192; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling",
2023, arXiv 2302.01318.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from effnb.inference.adaptive_computation.layers import check_length, prompt_ids

# ----------------------------------------------------------------------------- probabilities


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse a temperature or a nucleus that cannot be sampled from.

    Raises:
        ValueError: With what is allowed.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be at least 0 (0 is greedy).")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1].")


def probabilities(
    logits: Float[Tensor, "*batch vocabulary"], temperature: float = 1.0, top_p: float = 1.0
) -> Float[Tensor, "*batch vocabulary"]:
    """What a token is drawn from: the softmax at a temperature, cut to the most probable part.

    Draft and target must be treated alike: the acceptance rule compares these.

    Args:
        logits: Scores of all tokens.
        temperature: 0 puts everything on the best token.
        top_p: The smallest set of most probable tokens with at least this mass keeps it.

    Raises:
        ValueError: When one is out of range.
    """
    check_sampling(temperature, top_p)
    logits = logits.float()
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        behind = ordered.cumsum(-1) - ordered >= top_p  # enough mass lies before it
        p = p.masked_fill(behind.gather(-1, order.argsort(-1)), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def acceptance(
    p: Float[Tensor, "*batch vocabulary"], q: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, "*batch"]:
    r"""$\beta = \sum_x \min(p(x), q(x)) = 1 - \operatorname{TV}(p, q)$."""
    return torch.minimum(p, q).sum(-1)


def verify(
    p: Float[Tensor, "drafts_and_one vocabulary"],
    q: Float[Tensor, "drafts vocabulary"],
    drafted: Int[Tensor, " drafts"],
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """How many drafts are accepted, and the token that follows them.

    Args:
        p: The target's distributions, one more than drafts.
        q: The draft model's.
        drafted: Its tokens.
        generator: Where chance comes from.

    Raises:
        ValueError: When the shapes do not fit.
    """
    if len(p) != len(drafted) + 1 or len(q) != len(drafted):
        raise ValueError(
            f"{len(drafted)} drafts with {len(q)} distributions of the draft model and {len(p)} of "
            "the target; the target has one more than drafts."
        )
    chance = torch.rand(len(drafted), generator=generator, device=p.device)
    for i, x in enumerate(drafted.tolist()):
        # accept x_i with probability min(1, p_i(x_i) / q_i(x_i))
        if chance[i] * q[i, x] < p[i, x]:
            continue
        rest = (p[i] - q[i]).clamp(min=0)  # norm(max(0, p_i - q_i))
        return i, int(torch.multinomial(rest, 1, generator=generator))
    return len(drafted), int(torch.multinomial(p[-1], 1, generator=generator))


# ---------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class SpeculativeText:
    """A text that one model drafted and another checked.

    Attributes:
        tokens: The new tokens.
        accepted: Of each pass of the target, how many drafts it accepted.
        drafted: Of each pass, how many it was given.
        seconds: Time to write them, the prompt not counted.
    """

    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    drafted: tuple[int, ...] = field(repr=False)
    seconds: float

    @property
    def rate(self) -> float:
        r"""Estimate of $\alpha$: accepted over tested drafts; drafts after a rejection are not."""
        tested = sum(min(a + 1, d) for a, d in zip(self.accepted, self.drafted))
        return sum(self.accepted) / tested if tested else math.nan

    @property
    def passes(self) -> int:
        """Passes of the target."""
        return len(self.accepted)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and drafts are settled, alike for draft and target.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus.
        generator: Where chance comes from.

    Raises:
        ValueError: When a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)

    def draw(self, logits: Float[Tensor, " vocabulary"]) -> tuple[int, Tensor | None]:
        """A token, and the distribution that it was drawn from; greedy tokens need none."""
        if self.temperature == 0:
            return int(logits.argmax()), None
        q = probabilities(logits, self.temperature, self.top_p)
        return int(torch.multinomial(q, 1, generator=self.generator)), q

    def settle(
        self,
        logits: Float[Tensor, "drafts_and_one vocabulary"],
        guesses: Sequence[int],
        qs: Sequence[Tensor | None],
    ) -> tuple[int, int]:
        """How many drafts the target accepts, by its logits, and the token that follows them."""
        if self.temperature == 0:
            best = logits.argmax(-1).tolist()
            count = next((i for i, x in enumerate(guesses) if x != best[i]), len(guesses))
            return count, best[count]
        p = probabilities(logits, self.temperature, self.top_p)
        q = torch.stack(qs) if qs else p[:0]
        drafted = torch.tensor(guesses, dtype=torch.long, device=p.device)
        return verify(p, q, drafted, self.generator)


def in_turns(
    text: list[int],
    caches: Sequence[Cache],
    turn: Callable[[int], tuple[list[int], int, int]],
    max_new_tokens: int,
    draft_tokens: int,
    end: int | None,
) -> SpeculativeText:
    """Draft and check until the text is long enough; the caches forget what was not accepted.

    Args:
        text: The prompt's tokens, to which new ones are added.
        caches: They hold everything but the last token of the text when a turn begins.
        turn: From a number of drafts to drafts, how many are accepted, and the token after them.
        max_new_tokens: Tokens to write.
        draft_tokens: Most drafts of a turn.
        end: A token that ends the text.
    """
    start, accepted, drafted = len(text), [], []
    began = time.perf_counter()
    while len(text) < start + max_new_tokens:
        gamma = min(draft_tokens, start + max_new_tokens - len(text) - 1)
        guesses, count, following = turn(gamma)
        new = [*guesses[:count], following]
        accepted.append(count)
        drafted.append(gamma)
        if end in new:
            text += new[: new.index(end) + 1]
            break
        text += new
        for cache in caches:
            if (extra := cache.get_seq_length() - (len(text) - 1)) > 0:
                cache.crop(-extra)
    seconds = time.perf_counter() - began
    return SpeculativeText(tuple(text[start:]), tuple(accepted), tuple(drafted), seconds)


def check_pair(target: nn.Module, draft: nn.Module) -> None:
    """Refuse a draft model with another vocabulary.

    Raises:
        ValueError: With both sizes.
    """
    sizes = [len(m.get_input_embeddings().weight) for m in (target, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft model has {sizes[1]:,} tokens and the target {sizes[0]:,}; speculative "
            "decoding compares their probabilities token by token and needs one vocabulary."
        )


def check_drafts(draft_tokens: int) -> None:
    """Refuse a draft of no token.

    Raises:
        ValueError: With what is allowed.
    """
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens is {draft_tokens}; it must be at least 1.")


@torch.inference_mode()
def generate(
    target: nn.Module,
    draft: nn.Module,
    prompt: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 32,
    draft_tokens: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> SpeculativeText:
    r"""The target's text, drafted $\gamma$ tokens at a time by a smaller model.

    At temperature 0 it is the target's greedy text; otherwise a draw from its distribution at this
    temperature and nucleus.

    Args:
        target: The model whose text is wanted.
        draft: A faster one with the same vocabulary.
        prompt: One sequence of tokens, (time,) or (1, time).
        max_new_tokens: Tokens to write.
        draft_tokens: $\gamma$.
        temperature: Of both models.
        top_p: Of both models.
        generator: Where chance comes from.
        end: A token that ends the text.

    Raises:
        ValueError: When the vocabularies differ or something is out of range.
    """
    check_pair(target, draft)
    check_drafts(draft_tokens)
    sampling = Sampling(temperature, top_p, generator)
    ids = prompt_ids(prompt, target)
    start = ids.shape[1]
    for model in (target, draft):
        check_length(model, start, max_new_tokens)
    text = ids[0].tolist()
    caches = [DynamicCache(config=model.config) for model in (target, draft)]

    def logits_of(who: int, tokens: Sequence[int], keep: int) -> Tensor:
        given = torch.tensor([list(tokens)], device=ids.device)
        out = (target, draft)[who](
            input_ids=given, past_key_values=caches[who], use_cache=True, logits_to_keep=keep
        )
        return out.logits[0]

    if start > 1:  # the last token of the prompt is left for the first pass
        logits_of(0, text[:-1], 1)
        logits_of(1, text[:-1], 1)

    def turn(gamma: int) -> tuple[list[int], int, int]:
        guesses: list[int] = []
        qs = []
        for _ in range(gamma):
            held = caches[1].get_seq_length()
            token, q = sampling.draw(logits_of(1, (text + guesses)[held:], 1)[-1])
            guesses.append(token)
            qs.append(q)
        # p_1 ... p_{gamma+1}: after the last token of the text, and after each draft
        logits = logits_of(0, [text[-1], *guesses], gamma + 1)
        return guesses, *sampling.settle(logits, guesses, qs)

    return in_turns(text, caches, turn, max_new_tokens, draft_tokens, end)


# -------------------------------------------------------------------------------- prediction


def check_rate(alpha: float, cost: float, draft_tokens: int) -> None:
    """Refuse a rate outside of [0, 1] or a negative cost.

    Raises:
        ValueError: With what is allowed.
    """
    if not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"alpha is {alpha}; an acceptance rate lies in [0, 1].")
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"cost is {cost}; the draft's time over the target's is at least 0.")
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens is {draft_tokens}; it must be at least 0.")


def expected_tokens(alpha: float, draft_tokens: int) -> float:
    r"""Tokens for each pass of the target, $\frac{1 - \alpha^{\gamma + 1}}{1 - \alpha}$."""
    check_rate(alpha, 0.0, draft_tokens)
    if alpha == 1:
        return draft_tokens + 1.0
    return (1 - alpha ** (draft_tokens + 1)) / (1 - alpha)


def speed_up(alpha: float, draft_tokens: int, cost: float) -> float:
    r"""Predicted factor, $\frac{1 - \alpha^{\gamma + 1}}{(1 - \alpha)(\gamma c + 1)}$.

    It assumes independent acceptances, and that checking $\gamma + 1$ tokens takes the target as
    long as one.

    Args:
        alpha: Acceptance rate.
        draft_tokens: $\gamma$.
        cost: $c$, the draft's time for a token over the target's.

    Raises:
        ValueError: When one is out of range.
    """
    check_rate(alpha, cost, draft_tokens)
    return expected_tokens(alpha, draft_tokens) / (draft_tokens * cost + 1)


def best_draft_length(alpha: float, cost: float, most: int = 32) -> int:
    """The draft length with the largest predicted factor; 0 where none is faster than no draft."""
    return max(range(most + 1), key=lambda gamma: speed_up(alpha, gamma, cost))
