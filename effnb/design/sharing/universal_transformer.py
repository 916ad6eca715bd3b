r"""The Universal Transformer: one block applied again and again, as often as a position needs.

With $P^s$ the sum of a sinusoid of the position and one of the step,

$$A^s = \text{LN}\big((H^{s-1} + P^s) + \text{MHSA}(H^{s-1} + P^s)\big), \qquad
  H^s = \text{LN}\big(A^s + \text{Transition}(A^s)\big), \qquad s = 1, \dots, S.$$

The weights of one block serve any number of steps, so $S$ can be chosen when the model runs. With
adaptive computation time each position halts by itself.

Dehghani, Gouws, Vinyals, Uszkoreit, Kaiser, "Universal Transformers", ICLR 2019, arXiv 1807.03819,
section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.design.attention.checks import check_count, check_heads
from effnb.design.sharing.adaptive_computation_time import (
    Halting,
    adaptive_computation_time,
    check_epsilon,
)
from effnb.design.sharing.cross_attention import Attention
from effnb.design.sharing.inputs import check_ids


@dataclass(frozen=True)
class UniversalConfig:
    """Sizes and settings.

    Attributes:
        hidden: Width d of the stream, even.
        heads: Attention heads, which divide the width.
        feed_forward: Neurons of the transition.
        vocabulary: Number of tokens.
        steps: S, or the most steps where positions halt by themselves.
        halting: Whether they do.
        epsilon: Of adaptive computation time.
        causal: Whether a position reads only what precedes it.
    """

    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    steps: int
    halting: bool = False
    epsilon: float = 0.01
    causal: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for name in ("hidden", "feed_forward", "vocabulary", "steps"):
            check_count(name, getattr(self, name))
        check_heads(self.hidden, self.heads)
        if self.hidden % 2:
            raise ValueError(f"hidden is {self.hidden}; sinusoids come in pairs, so it is even.")
        check_epsilon(self.epsilon)

    @property
    def parameters(self) -> int:
        r"""$V d + 4 (d^2 + d) + 2 d f + f + d + 4 d$, and $d + 1$ for halting; head tied."""
        d, f = self.hidden, self.feed_forward
        block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
        return self.vocabulary * d + block + self.halting * (d + 1)


@dataclass(frozen=True)
class UniversalOutput:
    """What a pass gives.

    Attributes:
        logits: Scores of every token at each position.
        hidden: What the head reads.
        halting: Steps and weights where positions halt by themselves; None otherwise.
    """

    logits: Float[Tensor, "batch time vocabulary"]
    hidden: Float[Tensor, "batch time dim"]
    halting: Halting | None


class UniversalBlock(nn.Module):
    """One step, without the coordinates: post-norm attention and a transition.

    Args:
        config: Sizes and settings.
    """

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__()
        d = config.hidden
        self.attention = Attention(d, d, config.heads)
        self.attention_norm = nn.LayerNorm(d)
        self.transition = nn.Sequential(
            nn.Linear(d, config.feed_forward), nn.ReLU(), nn.Linear(config.feed_forward, d)
        )
        self.norm = nn.LayerNorm(d)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        mask: Bool[Tensor, "batch time"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch time dim"]:
        """H^s from H^{s-1} + P^s."""
        a = self.attention_norm(x + self.attention(x, x, mask, causal))  # A = LN(x + MHSA(x))
        return self.norm(a + self.transition(a))  # H = LN(A + Transition(A))


def sinusoid(
    places: Float[Tensor, " places"] | Int[Tensor, " places"], width: int
) -> Float[Tensor, "places width"]:
    r"""$\sin(m \theta_j)$ in the even channels, $\cos(m \theta_j)$ in the odd ones.

    $\theta_j = 10000^{-2j/d}$. In float32 at least, whatever the model computes in.
    """
    j = torch.arange(width // 2, device=places.device, dtype=torch.float32)
    angles = places.float()[:, None] * 10000 ** (-2 * j / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class UniversalTransformer(nn.Module):
    """Embedding, one block applied S times, and a head tied to the embedding.

    Args:
        config: Sizes and settings. Weights are random, by PyTorch's global seed.
    """

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.block = UniversalBlock(config)
        self.halt = nn.Linear(config.hidden, 1) if config.halting else None
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=config.hidden**-0.5)
        if self.halt is not None:
            nn.init.ones_(self.halt.bias)  # most positions begin by halting early

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        *,
        mask: Tensor | None = None,
        steps: int | None = None,
    ) -> UniversalOutput:
        """Logits at each position.

        Args:
            ids: Token ids.
            mask: True or 1 where a token is text.
            steps: S for this pass; the configuration's where None.

        Raises:
            ValueError: Ids or a mask that do not fit, or no step.
        """
        mask = check_ids(ids, self.config.vocabulary, mask)
        steps = check_count("steps", self.config.steps if steps is None else steps)
        x = self.embedding(ids)
        if self.halt is None:
            for s in range(steps):
                x = self.step(x, s, mask)
            return UniversalOutput(self.lm_head(x), x, None)
        halt = self.halt
        found = adaptive_computation_time(
            x,
            lambda state, s: self.step(state, s, mask),
            lambda state: halt(state)[..., 0].sigmoid(),  # p = sigma(w h + b)
            max_steps=steps,
            epsilon=self.config.epsilon,
        )
        return UniversalOutput(self.lm_head(found.output), found.output, found)

    def step(
        self,
        x: Float[Tensor, "batch time dim"],
        s: int,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """H^{s+1} from H^s, with s from 0."""
        return self.block(x + coordinates(x, s), mask, self.config.causal)


def coordinates(x: Float[Tensor, "batch time dim"], s: int) -> Float[Tensor, "time dim"]:
    r"""$P^{s+1}$: the sinusoid of each position plus that of the step, which counts from 1."""
    places = torch.arange(x.shape[1], device=x.device)
    moment = torch.full_like(places[:1], s + 1)
    return (sinusoid(places, x.shape[-1]) + sinusoid(moment, x.shape[-1])).to(x.dtype)
