"""A model of this package with the calls of a Hugging Face causal language model.

What evaluates and trains Transformers calls `model(input_ids=ids, use_cache=False).logits`, or
`model.model(...)` and `model.lm_head`. With these calls a twin runs through the same code, line by
line, as the Transformer that it is compared with.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from jaxtyping import Int
from torch import Tensor, nn

from effnb.design.retention.language_model import RecurrentLM


class CausalLM(nn.Module):
    """The wrapper; parameters and weights are the model's.

    Args:
        twin: Any model of this package.
    """

    def __init__(self, twin: RecurrentLM) -> None:
        super().__init__()
        self.twin = twin

    @property
    def lm_head(self) -> nn.Linear:
        """The head, which has the embedding's matrix."""
        return self.twin.lm_head

    def model(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """What the head reads, as `last_hidden_state`."""
        hidden = self.twin.hidden(input_ids, mask=attention_mask)
        return SimpleNamespace(last_hidden_state=hidden)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """Logits of the next token at each position, as `logits`."""
        return SimpleNamespace(logits=self.twin(input_ids, mask=attention_mask))

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.twin.lm_head

    def num_parameters(self) -> int:
        """Numbers, the shared matrix once."""
        return self.twin.config.parameters

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors`."""
        self.twin.save_pretrained(folder)
