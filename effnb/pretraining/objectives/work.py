r"""What an objective learns from and what it costs: targets, tokens read, operations.

Losses of different objectives are answers to different questions, and no two of them can be
compared. What can be compared is how many tokens of a text give a loss, and the work that this
takes. A training step of a matrix with $P$ numbers takes $6 P$ operations for each token that it
meets: 2 forward, 4 backward. The blocks meet every token that is read, the head meets the targets
only, and attention over $T$ positions adds $12\, L\, d\, T$ for each token:

$$F = 6\,\bigl(P_{\text{blocks}}\, n_{\text{read}} + V d\, n_{\text{asked}}\bigr)
    + 12\, L\, d\, T\, n_{\text{read}}$$

Kaplan et al., "Scaling Laws for Neural Language Models", 2020, arXiv 2001.08361, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effnb.pretraining.objectives.electra import Electra
from effnb.pretraining.objectives.examples import Example


@dataclass(frozen=True)
class Work:
    """What one batch asks and takes; batches can be added.

    Attributes:
        text_tokens: Tokens of text that the batch was made of.
        read_tokens: Positions that the model computes.
        text_targets: Tokens of text that give a loss: the loss-bearing tokens. For ELECTRA these
            are judgements of one bit at most, not words.
        flops: Floating-point operations of the step, forward and backward.
    """

    text_tokens: int
    read_tokens: int
    text_targets: int
    flops: int

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(
            self.text_tokens + other.text_tokens,
            self.read_tokens + other.read_tokens,
            self.text_targets + other.text_targets,
            self.flops + other.flops,
        )

    @property
    def share(self) -> float:
        """Loss-bearing tokens per token of text."""
        return self.text_targets / self.text_tokens

    @property
    def share_of_read(self) -> float:
        """Loss-bearing tokens per position that the model computes."""
        return self.text_targets / self.read_tokens


def work_of(model: nn.Module, example: Example) -> Work:
    r"""What one training step of a model on an example takes.

    Args:
        model: A Hugging Face model whose `config` names its layers and width.
        example: The batch.

    Source: Kaplan et al., 2020, section 2.1, with the head counted at the targets.
    """
    base = model.base_model
    numbers = _matrices(base)
    head = model.get_output_embeddings().weight.numel()
    flops = _blocks(base, numbers, example) + 6 * head * example.targets
    return Work(example.text_tokens, example.read_tokens, example.text_targets, flops)


def electra_work(model: Electra, example: Example, everywhere: bool = True) -> Work:
    """What one step of ELECTRA takes: both networks, and the head of the generator.

    Args:
        model: Generator and discriminator.
        example: What the generator is asked.
        everywhere: Whether every token is judged, or the generator's positions only.
    """
    head = model.embedding.weight.numel() + model.widen.weight.numel()
    flops = _blocks(model.body, _matrices(model.body), example)
    flops += _blocks(model.small, _matrices(model.small) + model.narrow.weight.numel(), example)
    judged = example.text_tokens if everywhere else example.text_targets
    judge = model.dense.weight.numel() + model.output.weight.numel()
    flops += 6 * (head * example.targets + judge * example.read_tokens)
    return Work(example.text_tokens, example.read_tokens, judged, flops)


def _matrices(base: nn.Module) -> int:
    """Numbers of a base model's matrices, its embeddings left out: those are looked up."""
    tables = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in base.parameters() if p.ndim >= 2 and id(p) not in tables)


def _blocks(base: nn.Module, numbers: int, example: Example) -> int:
    """Operations of the blocks: matrices and attention."""
    read, time = example.read_tokens, example.inputs.shape[1]
    width = base.config.num_hidden_layers * base.config.hidden_size
    return 6 * numbers * read + 12 * width * time * read
