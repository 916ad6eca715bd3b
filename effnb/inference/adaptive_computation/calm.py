r"""CALM: each token leaves the decoder at the first layer that is sure enough.

Token $t$ leaves at the first layer $i$ whose confidence reaches $\lambda_t$; its word is the
$\arg\max$ of the shared head on $d_t^i$. Later tokens attend to it in the layers that it skipped,
so each of those computes keys and values from the state the token left with (state copying).

Schuster, Fisch, Gupta, Dehghani, Bahri, Tran, Tay, Metzler, "Confident Adaptive Language Modeling",
2022, arXiv 2207.07061, sections 3.1 to 3.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.inference.adaptive_computation.confidence import (
    MEASURES,
    ExitClassifier,
    saturation,
    softmax_response,
    thresholds,
)
from effnb.inference.adaptive_computation.exits import check_decoder
from effnb.inference.adaptive_computation.layers import LayerStack, check_length, prompt_ids

COPYING = ("states", "projected")


@dataclass(frozen=True)
class EarlyText:
    """A text whose tokens left at layers of their own.

    Attributes:
        tokens: The new tokens.
        layers: The layer that each left at, 1 to the number of layers.
        confidences: What the layer was sure by; 1 at the last, which is not asked.
        seconds: Time to write them, the prompt not counted.
        of: Number of layers of the model.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    confidences: tuple[float, ...] = field(repr=False)
    seconds: float
    of: int

    @property
    def mean_layers(self) -> float:
        """Layers per token."""
        return fmean(self.layers)


def penalized(
    logits: Float[Tensor, " vocabulary"], seen: Int[Tensor, " tokens"], penalty: float
) -> Float[Tensor, " vocabulary"]:
    """Scores of tokens that were seen, made smaller."""
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def confidence_of(
    measure: str,
    stack: LayerStack,
    classifier: ExitClassifier | None,
    scores: Callable[[Tensor], Tensor],
) -> Callable[[Tensor, Tensor], tuple[float, Tensor | None]]:
    """From the states before and after a layer: its confidence, and its logits if it made them.

    Raises:
        ValueError: When there is no such measure, or the classifier is missing or of other width.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}; choose of {', '.join(MEASURES)}.")
    if measure == "classifier":
        if classifier is None:
            raise ValueError('measure "classifier" needs one, as `train_classifier` makes it.')
        width = stack.model.get_input_embeddings().weight.shape[1]
        if classifier.map.in_features != width:
            raise ValueError(
                f"the classifier reads {classifier.map.in_features} numbers; the model's states "
                f"have {width}."
            )
        return lambda before, after: (float(classifier(after[0, -1])), None)
    if measure == "saturation":
        return lambda before, after: (float(saturation(before[0, -1], after[0, -1])), None)

    def by_softmax(before: Tensor, after: Tensor) -> tuple[float, Tensor]:
        logits = scores(after)
        return float(softmax_response(logits)), logits

    return by_softmax


@torch.inference_mode()
def generate(
    model: nn.Module | LayerStack,
    prompt: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 32,
    threshold: float | Sequence[float] = 0.9,
    measure: str = "softmax",
    classifier: ExitClassifier | None = None,
    decay: float | None = None,
    form: str = "paper",
    copying: str = "states",
    first_exit: int = 1,
    repetition_penalty: float = 1.0,
    end: int | None = None,
) -> EarlyText:
    r"""Greedy decoding in which each token leaves at the first layer with $c_t^i \ge \lambda_t$.

    The prompt but for its last token passes through all layers, as does every token at a
    threshold of 1: the text is then that of ordinary greedy decoding, token for token.

    Args:
        model: A decoder laid out as Llama, or its `LayerStack`, which saves checking it again.
        prompt: One sequence of tokens, (time,) or (1, time).
        max_new_tokens: Tokens to write.
        threshold: $\lambda$ in [0, 1]; or one value for each new token.
        measure: "softmax", "saturation" or "classifier".
        classifier: For the third.
        decay: $\tau$ of a threshold that falls along the text, see `thresholds`.
        form: The paper's form of it or the code's.
        copying: "states" gives the skipped layers keys and values from the token's last state;
            "projected" copies the last layer's keys and values as they are, which is a mistake
            worth seeing.
        first_exit: The first layer that may be left from; saturation has none before 2.
        repetition_penalty: Scores of tokens that occurred before are divided by it where they are
            above 0 and multiplied below (CTRL, arXiv 1909.05858); confidences see what is left.
        end: A token that ends the text.

    Raises:
        ValueError: When something is out of range, or the model is laid out otherwise.
    """
    stack = model if isinstance(model, LayerStack) else LayerStack(model)
    ids = prompt_ids(prompt, stack.model)
    check_length(stack.model, ids.shape[1], max_new_tokens)
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be above 0.")
    if copying not in COPYING:
        raise ValueError(f"copying is {copying!r}; choose of {', '.join(COPYING)}.")
    if not 1 <= first_exit <= stack.count:
        raise ValueError(f"first_exit is {first_exit}; the model has layers 1 to {stack.count}.")
    if isinstance(threshold, Sequence):
        if len(threshold) != max_new_tokens:
            raise ValueError(f"{len(threshold)} thresholds for {max_new_tokens} new tokens.")
        lambdas = [thresholds(one, 1)[0] for one in threshold]
    else:
        lambdas = thresholds(threshold, max_new_tokens, decay, form)
    seen = ids[0].unique()

    def scores(state: Tensor) -> Tensor:
        logits = stack.head(state)[0, -1]
        return logits if repetition_penalty == 1 else penalized(logits, seen, repetition_penalty)

    sure = confidence_of(measure, stack, classifier, scores)
    first_exit = max(first_exit, 2) if measure == "saturation" else first_exit

    cache = stack.new_cache()
    if ids.shape[1] > 1:
        state = stack.embed(ids[:, :-1])
        stack.run(state, cache, 0, stack.count, stack.rotary(state, 0))
    token, position = ids[:, -1:], ids.shape[1] - 1
    tokens, layers, confidences = [], [], []
    began = time.perf_counter()
    for lambda_ in lambdas:
        state = stack.embed(token)
        rotary = stack.rotary(state, position)
        logits = None
        for layer in range(1, stack.count + 1):
            before, state = state, stack.run(state, cache, layer - 1, layer, rotary)
            if layer == stack.count or lambda_ >= 1 or layer < first_exit:
                continue
            confidence, logits = sure(before, state)
            if confidence >= lambda_:  # leave at the first i with c_t^i >= lambda_t
                break
        else:
            confidence, logits = 1.0, None
        if layer < stack.count:
            if copying == "states":  # d^k := d^j for every k > j
                stack.copy_state(state, cache, layer, rotary)
            else:
                _copy_projected(cache, layer, stack.count)
        logits = scores(state) if logits is None else logits
        token = logits.argmax()[None, None]
        seen = torch.cat([seen, token[0]])
        position += 1
        tokens.append(int(token))
        layers.append(layer)
        confidences.append(confidence)
        if tokens[-1] == end:
            break
    seconds = time.perf_counter() - began
    return EarlyText(tuple(tokens), tuple(layers), tuple(confidences), seconds, stack.count)


def _copy_projected(cache, layer: int, count: int) -> None:
    """The last keys and values of one layer, given to all layers after it."""
    keys, values = cache.layers[layer - 1].keys, cache.layers[layer - 1].values
    for index in range(layer, count):
        cache.update(keys[:, :, -1:], values[:, :, -1:], index)


# ------------------------------------------------------------------------------- read, not written


@dataclass(frozen=True)
class Exits:
    """What every exit says along given texts, whose earlier tokens passed through all layers.

    Attributes:
        confidences: Of every exit but the last, by measure, (exits - 1, targets).
        losses: Nats of every exit at every target, (exits, targets).
        agrees: Whether an exit's token is the full model's, (exits, targets).
    """

    confidences: dict[str, Float[Tensor, "inner targets"]] = field(repr=False)
    losses: Float[Tensor, "exits targets"] = field(repr=False)
    agrees: Tensor = field(repr=False)

    def layer(self, measure: str, threshold: float) -> Int[Tensor, " targets"]:
        """The layer that each token leaves at, from 1.

        Raises:
            ValueError: When the threshold is out of range or the measure was not taken.
        """
        thresholds(threshold, 1)
        if measure == "oracle":
            return oracle_exit(self.agrees)
        if measure not in self.confidences:
            raise ValueError(f"measure is {measure!r}; this has {', '.join(self.confidences)}.")
        leaves = self.confidences[measure] >= threshold
        if threshold >= 1:
            leaves = torch.zeros_like(leaves)
        return first_true(leaves) + 1

    def loss_at(self, layer: Int[Tensor, " targets"]) -> Float[Tensor, " targets"]:
        """Nats of every target when its token leaves there."""
        return self.losses.gather(0, layer[None] - 1)[0]


def first_true(leaves: Tensor) -> Int[Tensor, " tokens"]:
    """Index of the first True of each column; the number of rows where there is none."""
    last = torch.ones_like(leaves[:1])
    return torch.cat([leaves, last]).long().argmax(0)


def oracle_exit(agrees: Tensor) -> Int[Tensor, " tokens"]:
    """The first layer, from 1, whose prediction is the last layer's: no rule can leave earlier.

    Args:
        agrees: Whether each exit's prediction is the last one's, (exits, tokens).
    """
    return first_true(agrees[:-1]) + 1


@torch.inference_mode()
def read_exits(
    model: nn.Module, ids: Int[Tensor, "rows time"], classifier: ExitClassifier | None = None
) -> Exits:
    """Every exit's loss, token and confidence at every target of given texts.

    Args:
        model: The decoder.
        ids: Texts of equal length.
        classifier: For the third measure; left out when None.
    """
    check_decoder(model)
    found: dict[str, list[Tensor]] = {m: [] for m in MEASURES if m != "classifier" or classifier}
    losses, agrees = [], []
    for row in ids:
        out = model.model(input_ids=row[None], use_cache=False, output_hidden_states=True)
        raw = [state[0, :-1] for state in out.hidden_states[:-1]]
        heads = [model.lm_head(model.model.norm(state)) for state in raw[1:]]
        heads.append(model.lm_head(out.last_hidden_state[0, :-1]))
        logits = torch.stack(heads).float()
        losses.append(
            nn.functional.cross_entropy(
                logits.transpose(1, 2), row[1:].expand(len(heads), -1), reduction="none"
            )
        )
        best = logits.argmax(-1)
        agrees.append(best == best[-1])
        found["softmax"].append(softmax_response(logits[:-1]))
        near = saturation(torch.stack(raw[:-1]), torch.stack(raw[1:]))
        near[0] = 0  # undefined at the first exit
        found["saturation"].append(near)
        if classifier:
            found["classifier"].append(classifier(torch.stack(raw[1:])))
    return Exits(
        {m: torch.cat(parts, 1) for m, parts in found.items()},
        torch.cat(losses, 1),
        torch.cat(agrees, 1),
    )
