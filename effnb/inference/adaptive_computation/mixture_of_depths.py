r"""Mixture-of-Depths: a block that only some tokens of a sequence pass through.

A router scores every token, $r_i = w^\top x_i$. The $k$ tokens with the highest scores of the
sequence pass through the block and attend only to each other; the others keep their state:

$$x_i' = x_i + r_i\, f(\tilde x)_i \ \text{ for chosen tokens}, \qquad x_i' = x_i \ \text{ else}.$$

Multiplying by $r_i$ gives the router a gradient. Because $k$ is fixed, so are all shapes. Choosing
the top $k$ of a sequence looks at later tokens; for sampling a small predictor of membership takes
its place, trained beside the model without changing it.

Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro, "Mixture-of-Depths: Dynamically allocating
compute in transformer-based language models", 2024, arXiv 2404.02258.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.modules import Model, share
from effnb.inference.adaptive_computation.exits import check_decoder


class DepthBlock(nn.Module):
    """A decoder layer with a router before it.

    Attributes:
        layer: The layer; it is used, not copied.
        capacity: Part of a sequence's tokens that pass through it.
        router: Gives every token its score.
        predictor: Foresees from a token alone whether it will be chosen.
    """

    def __init__(self, layer: nn.Module, dim: int, capacity: float) -> None:
        """Put a router before a layer.

        Raises:
            ValueError: When the capacity is outside of (0, 1].
        """
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity is {capacity}; it must lie in (0, 1].")
        self.layer, self.capacity = layer, capacity
        self.router = nn.Linear(dim, 1)
        nn.init.zeros_(self.router.bias)
        nn.init.normal_(self.router.weight, std=dim**-0.5)
        self.predictor = nn.Linear(dim, 1)
        self.chosen: Bool[Tensor, "batch time"] | None = None
        self.auxiliary: Float[Tensor, ""] | None = None

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time dim"],
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Float[Tensor, "batch time dim"]:
        """Send the highest-scored tokens through the layer; keeps who was chosen in `chosen`."""
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is not None:
            raise ValueError(
                "a block with a router reads whole sequences: its choice looks at later tokens, so "
                "call the model with use_cache=False."
            )
        x = hidden_states
        batch, time, dim = x.shape
        k = max(1, math.ceil(self.capacity * time - 1e-9))
        scores = self.router(x)[..., 0]
        index = scores.topk(k, 1).indices.sort(1).values  # in the order of the text
        rows = index[..., None].expand(-1, -1, dim)
        inside = x.gather(1, rows)
        rotary = None
        if position_embeddings is not None:  # chosen tokens keep their positions
            rotary = tuple(
                t.expand(batch, -1, -1).gather(1, index[..., None].expand(-1, -1, t.shape[-1]))
                for t in position_embeddings
            )
        causal = torch.ones(k, k, dtype=torch.bool, device=x.device).tril()[None, None]
        out = self.layer(inside, attention_mask=causal, position_embeddings=rotary, use_cache=False)
        out = out[0] if isinstance(out, tuple) else out
        r = scores.gather(1, index)[..., None]
        # x_i' = x_i + r_i f(x~)_i: the layer returns x~ + f(x~)
        result = x.scatter(1, rows, inside + r * (out - inside))
        self.chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)
        foreseen = self.predictor(x.detach())[..., 0]
        self.auxiliary = nn.functional.binary_cross_entropy_with_logits(
            foreseen, self.chosen.to(foreseen)
        )
        return result


def mixture_of_depths(
    model: Model, capacity: float = 0.125, *, every: int = 2, seed: int = 0
) -> Model:
    """A router before every second block; the model shares every weight it had.

    Args:
        model: A decoder laid out as Llama; it is not changed.
        capacity: Part of the tokens that a routed block takes.
        every: 2 routes every other block, the second first; 1 routes all.
        seed: Of the routers.

    Raises:
        ValueError: When the capacity or `every` is out of range, or the model laid out otherwise.
    """
    check_decoder(model)
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1.")
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity is {capacity}; it must lie in (0, 1].")
    new = share(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dim = model.get_input_embeddings().weight.shape[1]
        for i in range(every - 1, len(new.model.layers), every):
            new.model.layers[i] = DepthBlock(new.model.layers[i], dim, capacity)
    return new


def auxiliary_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The predictors' mean loss at the last pass; add it to the training loss.

    Raises:
        ValueError: When no routed block has run.
    """
    found = [m.auxiliary for m in model.modules() if isinstance(m, DepthBlock)]
    found = [loss for loss in found if loss is not None]
    if not found:
        raise ValueError("no block with a router has run; call the model first.")
    return torch.stack(found).mean()
