r"""How sure is a layer? The three measures of CALM, and thresholds that decay along a text.

All lie in [0, 1], and a token leaves at the first layer whose confidence reaches the threshold:

- softmax response, $p_{(1)} - p_{(2)}$: the lead of the most probable token. It needs the output
  head at every layer, which in a small model costs more than the layer.
- saturation, $\cos(d^{i-1}, d^i)$: has the state stopped moving? Costs nothing, knows nothing of
  the vocabulary.
- a learned classifier, $\sigma(v^\top d^i + b)$: one linear map for all layers, trained to
  predict whether the layer's token is already that of the full model.

Schuster et al., "Confident Adaptive Language Modeling", 2022, arXiv 2207.07061, section 3.3 and
eq. 5; its released code (t5x/contrib/calm) decays thresholds in another form than the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.inference.adaptive_computation.exits import check_decoder

MEASURES = ("softmax", "saturation", "classifier")


def softmax_response(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch"]:
    r"""$p_{(1)} - p_{(2)}$, the difference of the two largest probabilities."""
    top = logits.float().softmax(-1).topk(2, -1).values
    return top[..., 0] - top[..., 1]


def saturation(
    before: Float[Tensor, "*batch dim"], after: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    r"""$\cos(d^{i-1}, d^i)$ of the states before and after a layer, 0 where it is negative."""
    return nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).clamp(0, 1)


class ExitClassifier(nn.Module):
    r"""$\sigma(v^\top d / \operatorname{rms}(d) + b)$: one linear map, shared by all layers.

    States grow from layer to layer, so their size is divided out; CALM's T5 does so in its norms.
    """

    def __init__(self, dim: int) -> None:
        """A map that starts undecided."""
        super().__init__()
        self.map = nn.Linear(dim, 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def scores(self, states: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The logit of "this layer already knows"."""
        states = states.float()
        return self.map(states * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt())[..., 0]

    def forward(self, states: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """The probability of it."""
        return self.scores(states).sigmoid()


@torch.inference_mode()
def agreement(
    model: nn.Module, ids: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, "exits tokens dim"], Float[Tensor, "exits tokens"]]:
    r"""States of every layer but the last, and 1 where its token is the full model's.

    The labels are $\mathbb 1[\arg\max p_i = \arg\max p_L]$.
    """
    check_decoder(model)
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    final = model.lm_head(out.last_hidden_state).argmax(-1)
    raw = torch.stack(out.hidden_states[1:-1]).flatten(1, 2)
    tokens = torch.stack(
        [model.lm_head(model.model.norm(s)).argmax(-1) for s in out.hidden_states[1:-1]]
    )
    return raw, (tokens == final).flatten(1).float()


def balanced_loss(
    scores: Float[Tensor, "exits tokens"], labels: Float[Tensor, "exits tokens"]
) -> Float[Tensor, ""]:
    """Cross-entropy, the two classes of each layer given equal weight, averaged over layers."""
    each = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    sides = []
    for wanted in (1.0, 0.0):
        mask = (labels == wanted).float()
        sides.append((each * mask).sum(1) / mask.sum(1).clamp(min=1))
    return (0.5 * (sides[0] + sides[1])).mean()


def train_classifier(
    model: nn.Module,
    ids: Int[Tensor, "sequences time"],
    *,
    steps: int = 200,
    learning_rate: float = 0.05,
) -> ExitClassifier:
    """CALM's classifier for a frozen model, trained on unlabelled text.

    Args:
        model: The decoder; it is not changed.
        ids: Text, one sequence a row.
        steps: Passes of Adam over all tokens.
        learning_rate: Its rate.

    Raises:
        ValueError: When there is no text.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids has the shape {tuple(ids.shape)}; give (sequences, time) of text.")
    parts = [agreement(model, row[None]) for row in ids]
    states = torch.cat([s for s, _ in parts], 1).clone()
    labels = torch.cat([y for _, y in parts], 1).clone()
    found = ExitClassifier(states.shape[-1]).to(states.device)
    optimizer = torch.optim.Adam(found.parameters(), lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            balanced_loss(found.scores(states), labels).backward()
            optimizer.step()
    return found.requires_grad_(False).eval()


def check_threshold(threshold: float) -> None:
    """Refuse a threshold outside of [0, 1].

    Raises:
        ValueError: With what is allowed.
    """
    if not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise ValueError(f"threshold is {threshold}; confidences lie in [0, 1], and so must it.")


def thresholds(
    threshold: float, tokens: int, decay: float | None = None, form: str = "paper"
) -> list[float]:
    r"""The threshold of each new token: constant, or falling from strict to lenient.

    The paper: $\lambda'_t = \operatorname{clip}_{[0, 1]}(0.9\,\lambda + 0.1\,e^{-\tau t / N})$.
    Its code: $\lambda'_t = \lambda\,(0.9 + 0.1\,e^{-\tau t / N})$, which never exceeds $\lambda$.
    Early tokens matter more, because all later ones read what was copied for them.

    A threshold of 1 stays 1 under the paper's form only at $t = 0$; where nothing may leave early,
    use no decay.

    Args:
        threshold: $\lambda$ in [0, 1].
        tokens: $N$, the longest text that is written.
        decay: $\tau$, typically 4; None keeps $\lambda$ for every token.
        form: "paper" or "code".

    Raises:
        ValueError: When one is out of range.
    """
    check_threshold(threshold)
    if form not in ("paper", "code"):
        raise ValueError(f"form is {form!r}; choose paper or code.")
    if decay is None:
        return [threshold] * tokens
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"decay is {decay}; it must be at least 0, or None for none.")
    falling = [math.exp(-decay * t / tokens) for t in range(tokens)]
    if form == "paper":
        return [min(1.0, max(0.0, 0.9 * threshold + 0.1 * e)) for e in falling]
    return [threshold * (0.9 + 0.1 * e) for e in falling]


def batch_confidence(confidences: Sequence[float] | Tensor) -> float:
    """What a batch that moves in step goes by: the least sure of its sequences."""
    return float(torch.as_tensor(confidences).min())
