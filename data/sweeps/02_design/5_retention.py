"""The stored measurements of `notebooks/02_design/5_retention` (`make results`).

    python data/sweeps/02_design/5_retention.py                  # every part
    python data/sweeps/02_design/5_retention.py twins positions  # these parts

twins      held-out loss by document of the trained twins and their Transformers, in the domains of
           their training and out of them (a minute and a half on one idle core)
positions  loss by place up to 2,048 tokens, where training saw 512 (a minute)
smollm2    bytes kept and seconds per token of SmolLM2-135M, beside an untrained RetNet of its size
           (a minute)

Twins whose training has not finished are left out, and measured when this is run again. What the
verdicts rest on is measured by `5_retention_claims.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from effnb.chapters.design.retention import twins
from effnb.chapters.design.retention.methods import after, processor_seconds, weight_bytes
from effnb.design.retention import CausalLM, RetNetConfig, RetNetLM
from effnb.evaluation import position_losses
from effnb.lab import corpora, load
from effnb.lab._files import data_folder
from effnb.lab.bench import Bench
from effnb.lab.claims_bench import by_document, documents_of
from effnb.lab.sweeps import Table, held_out_novel, run, windows_of

DOCUMENTS, LENGTH = 48, 256
LONGEST, TRAINED = 2048, 512


def models(size: str | None = None) -> dict[str, nn.Module]:
    """The trained models that there are, by name, each with the calls of a Hugging Face model."""
    found: dict[str, nn.Module] = {}
    for name in twins.NAMES:
        twin, transformer = twins.load(name), twins.transformer_of(name)
        if size not in (None, name.split("-")[1]):
            continue
        if transformer not in found:
            found[transformer] = load(transformer, device="cpu").model
        if twin:
            found[name] = CausalLM(twin.model)
    return found


def domains(loaded: Any) -> dict[str, list[torch.Tensor]]:
    """Documents of what the models were trained on (novels, packages, manuals), and of what not."""
    texts = {
        "novel": held_out_novel(),
        "packages": corpora.documents("packages", "test"),
        "manuals": corpora.documents("manuals", "test"),
        "German": [t.text for t in corpora.translations("de", "test")],
        "Spanish": [t.text for t in corpora.translations("es", "test")],
    }
    return {name: documents_of(loaded, some, DOCUMENTS, LENGTH) for name, some in texts.items()}


def trained() -> dict:
    """The loss of each document of each domain, and answers to ranked-choice questions."""
    documents, rows = domains(load("mini-300k", device="cpu")), []
    bench = Bench("mini-300k", windows=1)
    for name, model in models().items():
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "domains": {domain: by_document(model, some) for domain, some in documents.items()},
        }
        path = data_folder() / "models" / name / "training.json"
        history = json.loads(path.read_text(encoding="utf-8"))
        row |= {key: history[key] for key in ("tokens", "seconds", "settings", "mix")}
        row["answers"] = "".join("01"[one] for one in bench.answers(model))
        row["recall"] = history["held out"][-1].get("dense recall")
        rows.append(row)
        print(name, flush=True)
    return {"table": rows}


def positions() -> dict:
    """Loss by place in texts four times as long as those of training."""
    loaded, rows = load("mini-300k", device="cpu"), []
    ids = windows_of(loaded, held_out_novel(), 8, LONGEST)
    for name, model in models("300k").items():
        if name == "hyena-300k":  # its filters end at the length that it was made for
            continue
        found = position_losses(model, ids, context=LONGEST)
        rows.append({"model": name, "losses": by_place(found)})
        print(name, flush=True)
    return {"trained": TRAINED, "table": rows}


def by_place(found: Any, width: int = 128) -> list[float]:
    """Mean losses of stretches of a text."""
    starts = range(0, LONGEST, width)
    return [round(found.between(start, start + width).nats_per_token, 4) for start in starts]


def smollm2() -> dict:
    """A step of a Transformer that people use, over what it has read; and of a RetNet's."""
    real = load("smollm2-135m", device="cpu").model
    config = real.config
    heads = config.num_attention_heads
    shape = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads,
        config.num_key_value_heads, config.vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    twin = RetNetLM(RetNetConfig.twin_of(*shape)).eval()
    rows, token = [], torch.zeros(1, 1, dtype=torch.long)
    for tokens in (64, 1024, 4096):
        readers = {"SmolLM2-135M": after(real, tokens), "RetNet": after(twin, tokens)}
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(6):
            for name, one in readers.items():
                seconds[name].append(processor_seconds(lambda one=one: one.step(token)))
        for name, one in readers.items():
            row = {"model": name, "tokens": tokens, "state_bytes": one.bytes}
            row |= {
                "seconds": [round(s, 5) for s in seconds[name][1:]],
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "weight_bytes": weight_bytes(one.model),
            }
            rows.append(row)
            print({k: v for k, v in row.items() if k != "seconds"}, flush=True)
    return {"table": rows}


PARTS = {"twins": trained, "positions": positions, "smollm2": smollm2}

if __name__ == "__main__":
    torch.set_num_threads(1)
    Table.chapter = "02_design/5_retention"
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
