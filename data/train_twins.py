"""Train the twins of the workbook's language models: RetNet, RWKV-4 and Hyena, on the same tokens.

    python data/train_twins.py retnet-300k --steps 2500
    python data/train_twins.py rwkv-300k --steps 2500 --threads 1    # goes on from its checkpoint
    python data/train_twins.py retnet-1m --pause                     # keeps what it reached

A twin has the vocabulary, the width and the depth of its Transformer and, within 3 %, as many
parameters. Batches, seed, optimizers, rates, schedule and evaluations are those of
`data/train_models.py`, number for number; only the mixer of tokens differs.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import train_models
from torch import Tensor, nn

from effnb.design.retention import (
    RWKVLM,
    HyenaConfig,
    HyenaLM,
    LMConfig,
    RecurrentLM,
    RetNetConfig,
    RetNetLM,
    RWKVConfig,
)

KINDS: dict[str, tuple[type[LMConfig], type[RecurrentLM]]] = {
    "retnet": (RetNetConfig, RetNetLM),
    "rwkv": (RWKVConfig, RWKVLM),
    "hyena": (HyenaConfig, HyenaLM),
}
NAMES = ("retnet-300k", "retnet-1m", "rwkv-300k", "hyena-300k")


def transformer_of(name: str) -> str:
    """The Transformer that a twin is compared with: `mini-300k` of `retnet-300k`."""
    return f"mini-{name.split('-')[1]}"


class Trainable(nn.Module):
    """A twin with the calls that the recipe makes of a Llama: `model`, `lm_head` and logits.

    Args:
        twin: Any model of `effnb.design.retention`.
    """

    def __init__(self, twin: RecurrentLM) -> None:
        super().__init__()
        self.twin = twin

    @property
    def lm_head(self) -> nn.Linear:
        """The head, which has the embedding's matrix."""
        return self.twin.lm_head

    def model(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """What the head reads."""
        return SimpleNamespace(last_hidden_state=self.twin.hidden(input_ids))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits of the next token."""
        return SimpleNamespace(logits=self.twin(input_ids))

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which Muon leaves alone."""
        return self.twin.lm_head

    def num_parameters(self) -> int:
        """Numbers, the shared matrix once."""
        return self.twin.config.parameters

    def save_pretrained(self, folder) -> None:
        """`config.json` and `model.safetensors`."""
        self.twin.save_pretrained(folder)


def build(name: str) -> Trainable:
    """An untrained twin of the named model, its seed fixed."""
    config, kind = KINDS[name.split("-")[0]]
    shape, _ = train_models.SHAPES[transformer_of(name)]
    torch.manual_seed(0)
    return Trainable(kind(config.twin_of(*shape)))


if __name__ == "__main__":
    train_models.main(NAMES, build, transformer_of, "data/train_twins.py")
