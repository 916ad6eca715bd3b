"""Train the twins of the workbook's language models: RetNet, RWKV-4 and Hyena, on the same tokens.

    python data/train_twins.py retnet-300k --steps 2500
    python data/train_twins.py rwkv-300k --steps 2500 --threads 1    # goes on from its checkpoint
    python data/train_twins.py retnet-1m --pause                     # keeps what it reached

A twin has the vocabulary, the width and the depth of its Transformer and, within 3 %, as many
parameters. Batches, seed, optimizers, rates, schedule and evaluations are those of
`data/train_models.py`, number for number; only the mixer of tokens differs.
"""

from __future__ import annotations

import torch
import train_models

from effnb.design.retention import (
    RWKVLM,
    CausalLM,
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


def build(name: str) -> CausalLM:
    """An untrained twin of the named model, its seed fixed."""
    config, kind = KINDS[name.split("-")[0]]
    shape, _ = train_models.SHAPES[transformer_of(name)]
    torch.manual_seed(0)
    return CausalLM(kind(config.twin_of(*shape)))


if __name__ == "__main__":
    train_models.main(NAMES, build, transformer_of, "data/train_twins.py")
