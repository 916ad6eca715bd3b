"""Pruned attention on real models, and experts on real processes (`make results`).

    python data/sweep_codesign.py [attention] [minilm] [experts] [scaling]

attention  `mini-5m` with SpAtten's and Energon's attention: losses, shares and recall per window
minilm     `minilm-l6` with both: retrieval quality
experts    GShard's layer on 1 and 2 processes of this machine: bytes, work, equal results
scaling    the same on 1 and 2 processes, timed in turns; it needs two idle cores

Losses are those of the first 8 windows of 512 tokens of the held-out novel.
"""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import sweeping
import torch
from torch import nn

from effnb.evaluation import retrieval
from effnb.hardware.codesign import energon, mean_of_kept, pruning_record, spatten
from effnb.hardware.codesign.expert_parallel import Settings, run_processes
from effnb.lab import corpora, load

TOP_K = 16
RANDOM = (0, 1)
KEEPS = (0.75, 0.5, 0.25)
WINDOWS = 8
ALPHAS = (-0.25, 0.0, 0.25, 0.5)
TURNS = 9
"""Times that each number of processes has its turn."""


def attention() -> dict:
    """Quality and what is left out, window by window, so that two settings can be compared."""
    bench = sweeping.Bench(questions=0, windows=WINDOWS)
    table = []

    def add(model: nn.Module, size: int = 4, **about) -> None:
        losses, records = [], []
        for part in bench.windows.split(size):
            losses += bench.losses(model, part)
            records.append(pruning_record(model) if about["method"] != "original" else None)
        row = about | {"loss": round(sum(losses) / len(losses), 5), "windows": losses}
        if records[0] is not None:
            for name in ("pair_share", "value_share", "head_share", "refetch_share", "recall"):
                values = [round(getattr(r, name), 5) for r in records]
                row[name] = round(sum(values) / len(values), 5)
                if size == 1:
                    row[f"{name}_windows"] = values
            shares = zip(*(r.round_shares for r in records))
            row["round_shares"] = [round(sum(s) / len(records), 5) for s in shares]
        table.append(row)
        print({k: v for k, v in row.items() if "windows" not in k}, flush=True)

    add(bench.model, method="original")
    common = {"top_k": TOP_K}
    choices = [("importance", 0), *(("random", seed) for seed in RANDOM)]
    for keep in KEEPS:
        for choose, seed in choices:
            pruned = spatten(bench.model, token_keep=keep, choose=choose, seed=seed, **common)
            add(pruned, method="tokens", keep=keep, choose=choose, seed=seed)
        pruned = spatten(bench.model, token_keep=keep, average=True, **common)
        add(pruned, method="tokens", keep=keep, choose="average", seed=0)
    for keep in KEEPS[:2]:
        for choose, seed in choices:
            pruned = spatten(bench.model, head_keep=keep, choose=choose, seed=seed, **common)
            add(pruned, method="heads", keep=keep, choose=choose, seed=seed)
    for keep in KEEPS[1:]:
        pruned = spatten(bench.model, value_keep=keep, **common)
        add(pruned, method="values", keep=keep, choose="importance", seed=0)
    for msb_bits, threshold in ((6, 0.1), (4, 0.1), (3, 0.1), (3, 0.0)):
        pruned = spatten(bench.model, msb_bits=msb_bits, threshold=threshold, **common)
        add(pruned, method="bits", msb_bits=msb_bits, threshold=threshold)
    together = dict(token_keep=0.5, head_keep=0.75, value_keep=0.5, msb_bits=6, lsb_bits=6)
    pruned = spatten(bench.model, average=True, **together, **common)
    add(pruned, method="together", **together)
    for rounds, alpha in (*(((2, 4), alpha) for alpha in ALPHAS), ((2,), 0.0)):
        about = {"method": "energon", "rounds": list(rounds), "alpha": alpha}
        pruned = energon(bench.model, rounds=rounds, alpha=alpha, **common)
        add(pruned, 1, **about, choose="importance", seed=0)
    for seed in RANDOM:
        pruned = energon(bench.model, choose="random", seed=seed, **common)
        add(pruned, 1, method="energon", rounds=[2, 4], alpha=0.0, choose="random", seed=seed)
    return {"model": "mini-5m", "top_k": TOP_K, "table": table}


@torch.inference_mode()
def minilm() -> dict:
    """Find a package's description from its synopsis, with an encoder that forgets tokens."""
    encoder = load("minilm-l6", device="cpu")
    chosen = [p for p in corpora.packages("test") if len(p.text) > 300]
    chosen = random.Random(0).sample(chosen, 200)
    queries, documents = [p.synopsis for p in chosen], [p.text[:600] for p in chosen]

    def encode(model: nn.Module, texts: list[str], survivors: bool) -> torch.Tensor:
        if not survivors:
            return replace(encoder, model=model).encode(texts)
        vectors = []
        for start in range(0, len(texts), 16):
            batch = encoder.tokenizer(
                texts[start : start + 16],
                padding=True,
                truncation=True,
                max_length=encoder.max_tokens,
                return_tensors="pt",
            )
            vectors.append(mean_of_kept(model, model(**batch).last_hidden_state))
        return nn.functional.normalize(torch.cat(vectors), dim=1)

    table = []

    def add(model: nn.Module, survivors: bool = True, **about) -> None:
        documents_found = encode(model, documents, survivors)
        record = pruning_record(model) if about["method"] != "original" else None
        found = retrieval(encode(model, queries, survivors), documents_found)
        row = about | {
            "recall_at_1": round(found.recall_at_1, 4),
            "mrr_at_10": round(found.mrr_at_10, 4),
            "standard_error": round(found.standard_error, 4),
        }
        if record is not None:
            row |= {"pair_share": round(record.pair_share, 4), "recall": round(record.recall, 4)}
        table.append(row)
        print(row, flush=True)

    add(encoder.model, survivors=False, method="original")
    for keep in (0.5, 0.25):
        for choose, seed in (("importance", 0), *(("random", seed) for seed in RANDOM)):
            pruned = spatten(encoder.model, token_keep=keep, choose=choose, seed=seed)
            add(pruned, method="tokens", keep=keep, choose=choose, seed=seed)
    add(
        spatten(encoder.model, head_keep=0.5), method="heads", keep=0.5, choose="importance", seed=0
    )
    for alpha in (0.0, 0.5):
        add(energon(encoder.model, alpha=alpha), survivors=False, method="energon", alpha=alpha)
    return {"model": "minilm-l6", "queries": len(queries), "table": table}


SIZES = dict(experts=8, groups=8, tokens=256, model=256, hidden=1024, repeats=7)


def experts() -> dict:
    """The same layer on one process and on two: what each holds, sends, and works."""
    runs, busy = {}, {}
    for devices, turns in ((1, 5), (2, 5)):
        busy[str(devices)] = []
        for _ in range(turns):
            reports = run_processes(Settings(devices=devices, **SIZES), seconds=600)
            busy[str(devices)].append(max(report.busy_seconds for report in reports))
        # Times by the clock are another part's matter: others may use the cores meanwhile.
        left_out = ("seconds", "exchange_seconds", "busy_seconds", "largest_error")
        runs[str(devices)] = [
            {k: v for k, v in asdict(r).items() if k not in left_out} for r in reports
        ]
        print(devices, busy[str(devices)], flush=True)
    exact = run_processes(
        Settings(devices=2, experts=8, groups=4, tokens=64, model=64, hidden=128, factor=0)
    )
    return {
        "sizes": SIZES,
        "runs": runs,
        "busy_seconds": busy,
        "largest_error": max(report.largest_error for report in exact),
    }


def scaling() -> dict:
    """Seconds of the slowest process, each number of processes in its turn; on idle cores only."""
    seconds: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(TURNS):
        for devices, found in seconds.items():
            reports = run_processes(Settings(devices=int(devices), **SIZES), seconds=600)
            found.append(max(report.seconds for report in reports))
            print(devices, found[-1], flush=True)
    return {"sizes": SIZES, "seconds": seconds}


PARTS = {"attention": attention, "minilm": minilm, "experts": experts, "scaling": scaling}

if __name__ == "__main__":
    sweeping.run(PARTS, "codesign", __file__, __doc__.splitlines()[0])
