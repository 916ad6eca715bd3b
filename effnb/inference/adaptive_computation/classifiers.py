r"""Classifiers with an exit after every layer, and the rules by which an input leaves.

`ExitClassifiers` holds the layers of an encoder and one head for each. `classify` runs them one by
one on a batch and *compacts* it: inputs that have left are taken out, so that later layers compute
on fewer rows, and the batch gets faster for real.

A rule looks at the logits of all exits so far and says which inputs leave. Rules for given logits
are applied by `leave`; `branchynet`, `deebert` and `pabee` hold the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Rule = Callable[[Float[Tensor, "exits items classes"]], Bool[Tensor, " items"]]
"""From the logits of all exits so far (the newest last) to which inputs leave here."""


@dataclass(frozen=True)
class Left:
    """Where each input left, and what it was taken for.

    Attributes:
        exits: The exit of each input, from 1.
        classes: Its class.
    """

    exits: Int[Tensor, " items"]
    classes: Int[Tensor, " items"]

    @property
    def mean_layers(self) -> float:
        """Layers per input."""
        return float(self.exits.float().mean())


def leave(logits: Tensor, rule: Rule) -> Left:
    """Apply a rule to the logits of all exits; what never leaves early takes the last.

    Args:
        logits: (exits, items, classes).
        rule: Which items leave.

    Raises:
        ValueError: When there is no exit.
    """
    if logits.ndim != 3 or not len(logits):
        raise ValueError(
            f"logits has the shape {tuple(logits.shape)}; give (exits, items, classes)."
        )
    count = len(logits)
    exits = torch.full((logits.shape[1],), count, device=logits.device)
    for i in range(1, count):
        leaves = rule(logits[:i]) & (exits == count)
        exits[leaves] = i
    best = logits.argmax(-1)
    return Left(exits, best.gather(0, exits[None] - 1)[0])


def oracle(logits: Float[Tensor, "exits items classes"]) -> Left:
    """Leave at the first exit whose class is the last exit's: no rule leaves earlier."""
    best = logits.argmax(-1)
    exits = (best == best[-1]).long().argmax(0) + 1
    return Left(exits, best[-1])


class Head(nn.Module):
    """An off-ramp: a pooled vector through a dense layer with tanh, and a linear map to classes."""

    def __init__(self, dim: int, classes: int) -> None:
        """Start as `nn.Linear` does."""
        super().__init__()
        self.pooler = nn.Linear(dim, dim)
        self.classes = nn.Linear(dim, classes)

    def forward(self, pooled: Float[Tensor, "*items dim"]) -> Float[Tensor, "*items classes"]:
        """Logits."""
        return self.classes(torch.tanh(self.pooler(pooled)))


class ExitClassifiers(nn.Module):
    """An encoder of BERT's layout with a head after every layer.

    Attributes:
        encoder: The encoder; it is used, not copied.
        heads: One for each layer.
    """

    def __init__(self, encoder: nn.Module, classes: int, *, mean: bool = True, seed: int = 0):
        """Give every layer an untrained head.

        Args:
            encoder: An encoder with `embeddings` and `encoder.layer`, such as BERT or MiniLM.
            classes: Number of classes.
            mean: Whether the mean of a text's states is classified, or its first state.
            seed: Of the heads.

        Raises:
            ValueError: When the encoder is laid out otherwise or there are fewer than two classes.
        """
        super().__init__()
        if not hasattr(encoder, "embeddings") or not hasattr(
            getattr(encoder, "encoder", None), "layer"
        ):
            raise ValueError(
                f"{type(encoder).__name__} is laid out otherwise: exits are put on encoders with "
                "embeddings and encoder.layer, such as BERT's."
            )
        if classes < 2:
            raise ValueError(f"classes is {classes}; there must be at least 2.")
        self.encoder, self.mean = encoder, mean
        dim = encoder.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(dim, classes) for _ in encoder.encoder.layer)

    def pool(
        self, states: Float[Tensor, "items time dim"], mask: Int[Tensor, "items time"]
    ) -> Float[Tensor, "items dim"]:
        """One vector for each text."""
        if not self.mean:
            return states[:, 0]
        weight = mask[..., None].to(states)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _layer(self, layer: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
        seen = (mask[:, None, None, :] != 0).expand(-1, 1, mask.shape[1], -1)
        out = layer(states, attention_mask=seen)
        return out[0] if isinstance(out, tuple) else out

    def pooled(
        self, ids: Int[Tensor, "items time"], mask: Int[Tensor, "items time"]
    ) -> Float[Tensor, "exits items dim"]:
        """What every head reads."""
        states = self.encoder.embeddings(input_ids=ids)
        found = []
        for layer in self.encoder.encoder.layer:
            states = self._layer(layer, states, mask)
            found.append(self.pool(states, mask))
        return torch.stack(found)

    def forward(
        self, ids: Int[Tensor, "items time"], mask: Int[Tensor, "items time"]
    ) -> Float[Tensor, "exits items classes"]:
        """The logits of all exits."""
        return self.logits(self.pooled(ids, mask))

    def logits(
        self, pooled: Float[Tensor, "exits items dim"]
    ) -> Float[Tensor, "exits items classes"]:
        """The heads alone."""
        return torch.stack([head(x) for head, x in zip(self.heads, pooled, strict=True)])

    @torch.inference_mode()
    def classify(
        self, ids: Int[Tensor, "items time"], mask: Int[Tensor, "items time"], rule: Rule
    ) -> Left:
        """Classify a batch layer by layer; inputs that leave are taken out of it.

        Raises:
            ValueError: When there is no input.
        """
        if not len(ids):
            raise ValueError("there is nothing to classify: ids has no row.")
        count = len(self.heads)
        exits = torch.full((len(ids),), count, device=ids.device)
        classes = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        active = torch.arange(len(ids), device=ids.device)
        states = self.encoder.embeddings(input_ids=ids)
        history: Tensor | None = None
        for i, (layer, head) in enumerate(zip(self.encoder.encoder.layer, self.heads), 1):
            states = self._layer(layer, states, mask)
            logits = head(self.pool(states, mask))[None]
            history = logits if history is None else torch.cat([history, logits])
            leaves = (
                rule(history)
                if i < count
                else torch.ones(len(active), dtype=torch.bool, device=ids.device)
            )
            exits[active[leaves]] = i
            classes[active[leaves]] = logits[0].argmax(-1)[leaves]
            if bool(leaves.all()):
                break
            if bool(leaves.any()):  # compaction: go on with those that stay
                stay = ~leaves
                active, states, mask = active[stay], states[stay], mask[stay]
                history = history[:, stay]
        return Left(exits, classes)


def exit_losses(
    logits: Float[Tensor, "exits items classes"], labels: Int[Tensor, " items"]
) -> list[Float[Tensor, ""]]:
    """Cross-entropy of every exit."""
    return [nn.functional.cross_entropy(one, labels) for one in logits]


def weighted(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""$\sum_n w_n \mathcal L_n$.

    Raises:
        ValueError: When there is not one weight for each exit.
    """
    if len(losses) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(losses)} exits; give one for each.")
    return sum(w * loss for w, loss in zip(weights, losses))
