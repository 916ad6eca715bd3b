"""What the chapter on adaptive computation computes live: texts that leave early."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.inference.adaptive_computation import calm, confidence, layers, speculative
from effnb.lab.bench import Bench

EXITS = "mini-5m-exits"
PROMPT = "This package provides the"
NEW_TOKENS = 34
PENALTY = 1.1
"""On repetition, of which a small model is fond."""
END = "■"
"""How the end of a text is shown."""
CALIBRATION = (6, 256)
"""Sequences and tokens of the text that the classifier of exits learns from."""


@dataclass(frozen=True)
class Early:
    """A text that left early, beside the full model's.

    Attributes:
        text: What was written, with the layer of each token.
        pieces: Each new token as it reads.
        full: The text of all layers.
        same: Part of the tokens that are the full model's, position by position.
        speed: The full model's time for a token over this one's.
    """

    text: calm.EarlyText
    pieces: tuple[str, ...]
    full: calm.EarlyText
    same: float
    speed: float


class Writer:
    """The exit-trained sibling of `mini-5m`, asked to write."""

    def __init__(self, name: str = EXITS, prompt: str = PROMPT, tokens: int = NEW_TOKENS) -> None:
        """Load the model.

        Args:
            name: The model.
            prompt: What it continues.
            tokens: How many tokens it writes at most.
        """
        self.bench = Bench(name, questions=0, windows=6)
        self.prompt, self.tokens = prompt, tokens
        self.stack = layers.LayerStack(self.bench.model)
        self._known: dict[tuple, calm.EarlyText] = {}

    @property
    def model(self) -> nn.Module:
        """The decoder."""
        return self.bench.model

    @cached_property
    def ids(self) -> Int[Tensor, "1 time"]:
        """The prompt's tokens, after the token that begins a text."""
        tokens = self.bench.tokenizer.encode(self.prompt, add_special_tokens=False)
        return torch.tensor([[self.bench.start, *tokens]])

    @cached_property
    def classifier(self) -> confidence.ExitClassifier:
        """Learns once from unlabelled text which layers already know."""
        return confidence.train_classifier(self.model, self.bench.calibration(0, CALIBRATION))

    def write(
        self, threshold: float, measure: str = "softmax", copying: str = "states", repeats: int = 1
    ) -> calm.EarlyText:
        """A text, written once for each setting; the fastest of several repeats."""
        key = (threshold, measure, copying)
        if key not in self._known:
            classifier = self.classifier if measure == "classifier" else None
            found = [
                calm.generate(
                    self.stack,
                    self.ids,
                    max_new_tokens=self.tokens,
                    threshold=threshold,
                    measure=measure,
                    classifier=classifier,
                    copying=copying,
                    repetition_penalty=PENALTY,
                    end=self.bench.tokenizer.eos_token_id,
                )
                for _ in range(repeats)
            ]
            self._known[key] = min(found, key=lambda text: text.seconds)
        return self._known[key]

    def early(self, threshold: float, measure: str = "softmax", copying: str = "states") -> Early:
        """A text that leaves early, beside that of all layers."""
        full = self.write(1.0, repeats=3)
        text = self.write(threshold, measure, copying, repeats=3)
        same = sum(a == b for a, b in zip(text.tokens, full.tokens)) / len(full.tokens)
        seconds = [one.seconds / len(one.tokens) for one in (full, text)]
        return Early(text, self.pieces(text.tokens), full, same, seconds[0] / seconds[1])

    def pieces(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Each token as it reads, line ends as spaces."""
        end, decode = self.bench.tokenizer.eos_token_id, self.bench.tokenizer.decode
        return tuple(END if t == end else decode([t]).replace("\n", " ") for t in tokens)


# ---------------------------------------------------------------------------- traced by hand


P = torch.tensor([0.5, 0.3, 0.15, 0.05])
Q = torch.tensor([0.1, 0.6, 0.2, 0.1])
"""What the target and the draft say of four words, in the example."""


def sampled(
    p: Float[Tensor, " words"], q: Float[Tensor, " words"], draws: int, seed: int = 0
) -> Float[Tensor, " words"]:
    """How often each word comes out of one step of speculation, as parts of all draws."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros_like(p)
    both = torch.stack([p, p])
    for x in torch.multinomial(q, draws, replacement=True, generator=generator):
        kept, following = speculative.verify(both, q[None], x[None], generator)
        counts[int(x) if kept else following] += 1
    return counts / draws


def pair_here(
    target: Bench, draft: Bench, draft_tokens: int, tokens: int = 32
) -> tuple[bool, float, float, float]:
    """Speculation on one prompt, here and now.

    Returns:
        Whether the text is the target's greedy text; the acceptance rate; tokens for each pass of
        the target; and the target's time over the pair's.
    """
    prompt = target.windows[:1, :24]
    with torch.inference_mode():
        wanted = target.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=target.tokenizer.eos_token_id,
        )[0, 24:].tolist()
    stack = layers.LayerStack(target.model)
    whole, pairs = [], []
    found = None
    for _ in range(4):
        alone = calm.generate(stack, prompt, max_new_tokens=tokens, threshold=1.0)
        whole.append(alone.seconds)
        found = speculative.generate(
            target.model, draft.model, prompt, max_new_tokens=tokens, draft_tokens=draft_tokens
        )
        pairs.append(found.seconds)
    return (
        list(found.tokens) == wanted,
        found.rate,
        len(found.tokens) / found.passes,
        min(whole) / min(pairs),
    )


def smollm2_here(tokens: int = 12, exit_layer: int = 15) -> str:
    """SmolLM2 drafts for itself with half of its layers, none of them trained as an exit."""
    from effnb.inference.adaptive_computation import layerskip

    bench = Bench("smollm2-135m", questions=0, windows=1)
    stack = layers.LayerStack(bench.model)
    prompt = bench.windows[:1, :24]
    began = time.perf_counter()
    found = layerskip.self_speculative(
        stack, prompt, exit_layer=exit_layer, max_new_tokens=tokens, draft_tokens=2
    )
    seconds = time.perf_counter() - began
    whole = calm.generate(stack, prompt, max_new_tokens=tokens, threshold=1.0)
    same = "the same" if found.tokens == whole.tokens else "another"
    return (
        f"SmolLM2 with its first {exit_layer} of {stack.count} layers as draft: {same} text, "
        f"{found.rate:.0%} of the drafts accepted, {found.passes} passes for {tokens} tokens, in "
        f"{seconds:.1f} s."
    )
