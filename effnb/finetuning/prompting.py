r"""Prompting: a task put to a language model in words, and its answer read off the words' odds.

A *pattern* puts an input into a text with a place for the answer, and a *verbalizer* says which
words stand for which label. Nothing is trained:

$$p(y \mid x) = \frac{\sum_{w \in v(y)} p_{LM}(w \mid P(x))}
                    {\sum_{y'} \sum_{w \in v(y')} p_{LM}(w \mid P(x))} .$$

Examples with their answers in front of the input show the model what is asked (*few-shot*, or
in-context learning); which they are and in which order they stand changes what it answers.

Schick, Schütze, "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language
Inference", 2020, arXiv 2001.07676; Brown et al., "Language Models are Few-Shot Learners", 2020,
arXiv 2005.14165.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Row = TypeVar("Row")


@dataclass(frozen=True)
class Verbalizer:
    """The words that stand for each label, in the labels' order.

    Attributes:
        words: For each label at least one word, without the space that comes before it in a text.
    """

    words: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, words: Sequence[str | Sequence[str]] | Mapping[Any, str | Sequence[str]]):
        """From one word, or several, for each label.

        Raises:
            ValueError: Fewer than two labels, a label without words, an empty word, or a word that
                stands for two labels.
        """
        given = list(words.values()) if isinstance(words, Mapping) else list(words)
        found = tuple((w,) if isinstance(w, str) else tuple(w) for w in given)
        every = list(itertools.chain.from_iterable(found))
        if len(found) < 2 or not all(found) or not all(word.strip() for word in every):
            raise ValueError("a verbalizer has at least two labels, each with at least one word.")
        twice = [word for word in every if every.count(word) > 1]
        if twice:
            raise ValueError(f"the word {twice[0]!r} stands for two labels, or twice for one.")
        return cls(found)

    def __len__(self) -> int:
        """How many labels there are."""
        return len(self.words)


@dataclass(frozen=True)
class Pattern:
    r"""How an input, with its answer or without, is put to a model.

    Attributes:
        text: With the word `{input}` where the input goes, and nothing behind the answer's place:
            "Review: {input}\nSentiment:". No space at its end: that belongs to the answer's word.
        instruction: What stands once in front of everything, such as a sentence and an empty line.
        between: What separates two examples.
    """

    text: str
    instruction: str = ""
    between: str = "\n\n"

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: A pattern without a place for the input, or with a space at its end.
        """
        if "{input}" not in self.text:
            raise ValueError("the pattern has no {input}, where the input goes.")
        if self.text != self.text.rstrip(" "):
            raise ValueError(
                "the pattern ends with a space; leave it out, since the answer's word brings one."
            )

    def one(self, text: str) -> str:
        """One input in the pattern."""
        return self.text.replace("{input}", text)

    def prompt(self, text: str, shots: Sequence[tuple[str, str]] = ()) -> str:
        """The instruction, examples with their answers' words, and the input.

        Args:
            text: The input.
            shots: Pairs of an input and the word for its answer.
        """
        shown = [f"{self.one(shot)} {word}" for shot, word in shots]
        return self.instruction + self.between.join([*shown, self.one(text)])


def orders(examples: Sequence[Row], most: int | None = None) -> Iterator[tuple[Row, ...]]:
    """The permutations of examples, all 24 of four; the first `most` if given.

    Raises:
        ValueError: When there are more than eight examples and no limit: 9! is 362,880.
    """
    if most is None and len(examples) > 8:
        raise ValueError(f"{len(examples)} examples have too many orders; say how many to take.")
    return itertools.islice(itertools.permutations(examples), most)


@torch.inference_mode()
def word_log_probs(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    words: Sequence[str],
    *,
    batch_size: int = 16,
) -> Float[Tensor, "prompts words"]:
    r"""$\log p(w \mid \text{prompt})$ of each word behind each prompt, in nats.

    A word of several tokens counts with all of them, the product of their conditional
    probabilities: comparing first tokens would confuse words that begin alike.

    Args:
        model: A decoder.
        tokenizer: The model's.
        prompts: What is read.
        words: What may follow, each after a space.
        batch_size: Most prompts of one pass.

    Raises:
        ValueError: No prompts or words, an empty prompt, or one that with the longest word is
            longer than the model's context.
    """
    if not prompts or not words:
        raise ValueError(f"there are {len(prompts)} prompts and {len(words)} words; give both.")
    tails = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    heads = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, heads)) + max(map(len, tails))
    if not all(heads):
        raise ValueError("a prompt has no tokens, so that nothing could follow it.")
    if context is not None and longest > context:
        raise ValueError(
            f"a prompt with its word takes {longest} tokens; the model reads {context} at most."
        )
    reader = _Reader(model, heads)
    found = torch.zeros(len(heads), len(tails))
    order = sorted(range(len(heads)), key=lambda i: len(heads[i]))
    # Words that are one token need no pass of their own: the prompt's last logits have them all.
    single = [k for k, tail in enumerate(tails) if len(tail) == 1]
    several = [k for k, tail in enumerate(tails) if len(tail) > 1]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        if single:
            last = reader.log_probs([heads[i] for i in rows], 1)
            tokens = torch.tensor([tails[k][0] for k in single])
            found[torch.tensor(rows)[:, None], torch.tensor(single)] = last[:, 0, tokens]
        for k in several:
            tail = torch.tensor(tails[k])
            logs = reader.log_probs([heads[i] + tails[k][:-1] for i in rows], len(tail))
            # $\log p(w \mid P) = \sum_t \log p(w_t \mid P, w_{<t})$
            found[rows, k] = logs.gather(2, tail.expand(len(rows), -1)[:, :, None]).sum((1, 2))
    return found


class _Reader:
    """A model that has read what all prompts begin with, once."""

    def __init__(self, model: nn.Module, heads: Sequence[Sequence[int]]) -> None:
        self.model, self.device = model, next(model.parameters()).device
        alike = (len(set(column)) == 1 for column in zip(*(head[:-1] for head in heads)))
        shared = len(list(itertools.takewhile(bool, alike)))
        self.shared = shared if len(heads) > 1 else 0  # every row keeps a token to read
        self.cache = None
        if self.shared:
            ids = torch.tensor([list(heads[0][: self.shared])], device=self.device)
            self.cache = model(input_ids=ids, use_cache=True).past_key_values
            if not hasattr(self.cache, "batch_repeat_interleave"):
                self.shared, self.cache = 0, None

    def log_probs(
        self, rows: list[list[int]], count: int
    ) -> Float[Tensor, "rows count vocabulary"]:
        """Of what follows the last `count` tokens of each row; padding is on the right."""
        parts = [torch.tensor(row[self.shared :]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        how = {"use_cache": False}
        if self.cache is not None:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
            how = {"past_key_values": cache, "use_cache": True}
            mask = torch.cat([torch.ones(len(rows), self.shared, dtype=torch.long), mask], 1)
        logits = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **how
        ).logits
        at = (lengths - count)[:, None] + torch.arange(count)
        chosen = logits[torch.arange(len(rows))[:, None], at.to(self.device)]
        return chosen.float().log_softmax(-1).cpu()


def label_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    verbalizer: Verbalizer,
    *,
    batch_size: int = 16,
) -> Float[Tensor, "prompts labels"]:
    r"""$p(y \mid x)$, the words of each label added and normalized over the labels.

    Raises:
        ValueError: As `word_log_probs`.
    """
    words = [word for own in verbalizer.words for word in own]
    logs = word_log_probs(model, tokenizer, prompts, words, batch_size=batch_size)
    sizes = [len(own) for own in verbalizer.words]
    # $\log \sum_{w \in v(y)} p_{LM}(w \mid P(x))$
    sums = torch.stack([part.logsumexp(1) for part in logs.split(sizes, 1)], 1)
    return sums.softmax(1)
