"""Train the exit-trained sibling of `mini-5m`: the same tokens, a loss at every layer.

    python data/train_exits.py                     # 600 steps, goes on from its checkpoint
    python data/train_exits.py --steps 300         # shorter: decays earlier

A LoRA of rank 16 beside every linear layer of the blocks is trained on CALM's loss, the weighted
sum over all exits with weights i / (1 + ... + L); embedding, norms and output head stay those of
`mini-5m`. Batches are drawn from the mixture that trained `mini-5m`, two sequences of 512 tokens a
step. What ships is the change of each weight as two factors (`data/models/mini-5m-exits`, under
1 MB); `effnb.lab.load("mini-5m-exits")` adds it to `mini-5m`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import train_models
from safetensors.torch import save_file
from transformers import AutoTokenizer

from effnb.core.training import TrainingSettings, train
from effnb.finetuning import lora
from effnb.inference.adaptive_computation.exits import exit_loss, exit_losses, exit_weights
from effnb.lab import load
from effnb.lab.models import sha256

NAME, BASE = "mini-5m-exits", "mini-5m"
RANK, SEQUENCES = 16, 2
RATE = 2e-3


def attached() -> torch.nn.Module:
    """`mini-5m` with an untrained LoRA beside every linear layer of its blocks."""
    model = load(BASE, device="cpu").model
    return lora.attach(model, "exits", rank=RANK, alpha=2 * RANK, layers="*proj", seed=0)


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changed: for every weight, thin A and B whose product is added to it."""
    found = {}
    for path, host in lora.hosts(model, "exits").items():
        delta = host.deltas["exits"]
        found[f"{path}.A"] = delta.A.detach().bfloat16().contiguous()
        found[f"{path}.B"] = (delta.scaling * delta.B.detach()).bfloat16().contiguous()
    return found


def main() -> None:
    """Train, evaluate every exit on held-out windows, and write the folder of the sibling."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint", type=Path, default=Path("exits.safetensors"))
    arguments = parser.parse_args()
    settings = TrainingSettings(
        steps=arguments.steps, learning_rate=RATE, warmup_steps=20, schedule="wsd",
        decay_fraction=0.3, weight_decay=0.0, betas=(0.9, 0.99), clip_norm=1.0, seed=0,
        evaluate_every=100,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(train_models.MODELS / "tokenizer")
    model = attached()
    layers = model.config.num_hidden_layers
    omega = exit_weights(layers, "linear")
    mixture = train_models.Mixture(
        tokenizer, 1, torch.device("cpu"), max(arguments.steps, 2_000), SEQUENCES
    )
    held = {
        name: torch.from_numpy(
            train_models.stream(tokenizer, train_models.corpora.documents(name, "validation"))
        )[: 4 * 512].long().view(4, 512)
        for name in ("novels", "packages")
    }  # fmt: skip
    began = time.time()
    fast = train_models.faster_in_bfloat16(torch.device("cpu"))

    def loss(model, batch):
        ids, weights = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            return exit_loss(model, ids, omega, weights)

    def evaluate(model) -> dict[str, float]:
        found = {}
        for name, ids in held.items():
            for i, value in enumerate(exit_losses(model, ids), 1):
                found[f"{name} exit {i}"] = round(float(value), 4)
        print(found, flush=True)
        return found

    def log(step: int, total: int, value: float) -> None:
        if step % 10 == 0:
            print(f"step {step}/{total} loss {value:.3f} {time.time() - began:.0f} s", flush=True)

    print("before:", end=" ")
    with torch.inference_mode():
        before = evaluate(model)
    result = train(
        model, mixture, settings, loss=loss, evaluate=evaluate, progress=log,
        checkpoint=arguments.checkpoint, checkpoint_seconds=60,
    )  # fmt: skip
    folder = train_models.MODELS / NAME
    folder.mkdir(exist_ok=True)
    temporary = folder / f"model.safetensors.{os.getpid()}"
    save_file(factors(model), temporary, metadata={"base": BASE, "base_sha256": sha256(BASE)})
    os.replace(temporary, folder / "model.safetensors")
    history = {
        "command": f"python data/train_exits.py --steps {arguments.steps}",
        "date": date.today().isoformat(),
        "device": platform.machine(),
        "bfloat16 autocast": fast,
        "versions": {"effnb": version("effnb"), "torch": torch.__version__},
        "base": BASE,
        "rank": RANK,
        "weights of the exits": [round(float(w), 5) for w in omega],
        "tokens": result.steps * SEQUENCES * train_models.CONTEXT,
        "seconds": round(result.seconds),
        "settings": settings.__dict__,
        "training loss, mean of 20 steps": [
            round(math.fsum(result.losses[i : i + 20]) / len(result.losses[i : i + 20]), 4)
            for i in range(0, len(result.losses), 20)
        ],
        "before": before,
        "held out": result.evaluations,
    }
    (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n")
    print(f"saved {NAME}: {result.evaluations[-1]}")


if __name__ == "__main__":
    main()
