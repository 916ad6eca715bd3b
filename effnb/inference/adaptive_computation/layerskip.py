r"""LayerSkip: train a model to be its own draft, then let its first layers draft for the rest.

Training adds two things. *Layer dropout* skips layers at random, the deeper the more often, sample
by sample, so that early layers learn to do without late ones. An *early-exit loss* at every layer
through the shared head, with weights that grow with depth and a curriculum over the steps.

At inference the first $E$ layers and the head draft $\gamma$ tokens; the remaining layers check all
of them in one pass. The drafts' states and their keys and values in the first $E$ layers are used
again, so that nothing is computed twice.

Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", 2024,
arXiv 2404.16710; the loss weights and curricula follow torchtune's implementation. The shape of the
dropout's rise over the layers is one choice with the end points that the method asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.modules import Model, share
from effnb.inference.adaptive_computation.exits import check_decoder
from effnb.inference.adaptive_computation.layers import LayerStack, check_length, prompt_ids
from effnb.inference.adaptive_computation.speculative import (
    Sampling,
    SpeculativeText,
    check_drafts,
    in_turns,
)

# ---------------------------------------------------------------------------------- training


def dropout_rates(layers: int, most: float) -> Float[Tensor, " layers"]:
    r"""$p_l = p_{max} (2^{l / (L - 1)} - 1)$: 0 at the first layer, $p_{max}$ at the last.

    Raises:
        ValueError: When there are fewer than two layers, or the rate is outside of [0, 1).
    """
    if layers < 2 or not 0 <= most < 1:
        raise ValueError(
            f"layers is {layers} and most is {most}; dropout needs two layers and a rate in [0, 1)."
        )
    return most * (2.0 ** (torch.arange(layers) / (layers - 1)) - 1)


class DroppedLayer(nn.Module):
    """A layer that samples of a batch skip at random while training."""

    def __init__(self, layer: nn.Module, rate: float) -> None:
        """Wrap a layer; its weights are used, not copied."""
        super().__init__()
        self.layer, self.rate = layer, rate

    def forward(self, hidden_states: Float[Tensor, "batch time dim"], *args, **kwargs):
        """The layer's output, or its input for the samples that skip it."""
        out = self.layer(hidden_states, *args, **kwargs)
        if not self.training or self.rate == 0:
            return out
        state = out[0] if isinstance(out, tuple) else out
        keep = torch.rand(len(state), 1, 1, device=state.device) >= self.rate
        state = torch.where(keep, state, hidden_states)
        return (state, *out[1:]) if isinstance(out, tuple) else state


def with_layer_dropout(model: Model, most: float) -> Model:
    """The model with layer dropout in its blocks; it shares every weight.

    Raises:
        ValueError: When the model is laid out otherwise or the rate is out of range.
    """
    check_decoder(model)
    new = share(model)
    rates = dropout_rates(len(new.model.layers), most).tolist()
    new.model.layers = nn.ModuleList(
        DroppedLayer(layer, rate) for layer, rate in zip(new.model.layers, rates)
    )
    return new.train(model.training)


def loss_weights(
    layers: int, early: float, enabled: Bool[Tensor, " layers"] | None = None
) -> Float[Tensor, " layers"]:
    r"""Weights of the exits' losses: $e \sum_{i \le l} i$ before the last layer, and add up to 1.

    Args:
        layers: $L$; counted from 1 in the sum.
        early: $e$, the scale of all exits but the last.
        enabled: Exits that count at this step; all when None. The last always does.

    Raises:
        ValueError: When there is no layer or the scale is negative.
    """
    if layers < 1 or not early >= 0:
        raise ValueError(f"layers is {layers} and early is {early}; give at least 1 and 0.")
    raw = torch.arange(1, layers + 1, dtype=torch.float32).cumsum(0)
    raw[:-1] *= early
    if enabled is not None:
        raw[:-1] *= enabled[:-1]
    return raw / raw.sum()


def curriculum(kind: str, layers: int, step: int, steps: int, every: int = 3) -> Tensor:
    """Which exits count at a step.

    "rotational": every `every`-th exit, moved on by one with each step. "gradual": from the last
    exit downwards, all of them from half of the training on.

    Raises:
        ValueError: When there is no such curriculum.
    """
    index = torch.arange(layers)
    if kind == "rotational":
        found = index % every == step % every
    elif kind == "gradual":
        share_on = min(1.0, 2 * step / steps)
        found = index >= layers - 1 - math.floor(share_on * (layers - 1) + 1e-9)
    else:
        raise ValueError(f"kind is {kind!r}; choose rotational or gradual.")
    found[-1] = True
    return found


# --------------------------------------------------------------------------------- inference


@torch.inference_mode()
def self_speculative(
    model: nn.Module | LayerStack,
    prompt: Tensor | Sequence[int],
    *,
    exit_layer: int,
    max_new_tokens: int = 32,
    draft_tokens: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> SpeculativeText:
    r"""The model's own text, drafted by its first $E$ layers and checked by the others.

    Args:
        model: A decoder laid out as Llama, or its `LayerStack`.
        prompt: One sequence of tokens, (time,) or (1, time).
        exit_layer: $E$, from 1 to one less than the number of layers.
        max_new_tokens: Tokens to write.
        draft_tokens: $\gamma$.
        temperature: 0 is greedy.
        top_p: Nucleus.
        generator: Where chance comes from.
        end: A token that ends the text.

    Raises:
        ValueError: When something is out of range, or the model is laid out otherwise.
    """
    stack = model if isinstance(model, LayerStack) else LayerStack(model)
    ids = prompt_ids(prompt, stack.model)
    start = ids.shape[1]
    check_length(stack.model, start, max_new_tokens)
    check_drafts(draft_tokens)
    sampling = Sampling(temperature, top_p, generator)
    if not 1 <= exit_layer < stack.count:
        raise ValueError(
            f"exit_layer is {exit_layer}; of {stack.count} layers it may be 1 to {stack.count - 1}."
        )
    text = ids[0].tolist()
    cache = stack.new_cache()
    if start > 1:
        state = stack.embed(ids[:, :-1])
        stack.run(state, cache, 0, stack.count, stack.rotary(state, 0))

    def turn(gamma: int) -> tuple[list[int], int, int]:
        guesses: list[int] = []
        states, qs = [], []
        for i in range(gamma + 1):  # the last draft only passes the first layers
            token = torch.tensor([[(guesses or text)[-1]]], device=ids.device)
            state = stack.embed(token)
            rotary = stack.rotary(state, len(text) - 1 + i)
            states.append(stack.run(state, cache, 0, exit_layer, rotary))
            if i < gamma:
                guess, q = sampling.draw(stack.head(states[-1])[0, -1])
                guesses.append(guess)
                qs.append(q)
        state = torch.cat(states, 1)
        rotary = stack.rotary(state, len(text) - 1)
        logits = stack.head(stack.run(state, cache, exit_layer, stack.count, rotary))[0]
        return guesses, *sampling.settle(logits, guesses, qs)

    return in_turns(text, [cache], turn, max_new_tokens, draft_tokens, end)
