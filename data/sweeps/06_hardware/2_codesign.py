"""Pruned attention on real models, and experts on real processes (`make results`).

    python data/sweeps/06_hardware/2_codesign.py [attention] [minilm] [experts] [scaling]

attention  `mini-5m` with SpAtten's and Energon's attention: losses, shares and recall per window
minilm     `minilm-l6` with both: the rank of each query's own document
experts    GShard's layer with 4, 8 and 16 experts on 1, 2 and 4 processes of this machine: bytes
           and operations counted, the processor's time, results equal to a loop over tokens
scaling    the same on 1 and 2 processes, by the clock, in turns; it needs two idle cores (minutes)

Losses are those of the first 8 windows of `effnb.lab.bench`.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace

import psutil
import torch
from torch import nn

from effnb.evaluation import retrieval
from effnb.hardware.codesign import energon, mean_of_kept, pruning_record, spatten
from effnb.hardware.codesign.expert_parallel import Settings, run_processes
from effnb.lab import corpora, load, sweeps

TOP_K = 16
RANDOM = (0, 1, 2, 3, 4)
KEEPS = (0.75, 0.5, 0.25)
WINDOWS = 8
ALPHAS = (-0.25, 0.0, 0.25, 0.5)
EXPERT_TURNS = 5
"""Runs of each number of experts and processes."""
TURNS = 7
"""Times that each number of processes has its turn by the clock."""
IDLE_TRIES, BUSY_PERCENT = 60, 25
"""Seconds to wait for idle cores, and what others may use of a core then."""


def attention() -> dict:
    """Quality and what is left out, window by window, so that two settings can be compared."""
    bench = sweeps.Bench(questions=0, windows=WINDOWS)
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
            "ranks": list(found.ranks),
        }
        if record is not None:
            row |= {"pair_share": round(record.pair_share, 4), "recall": round(record.recall, 4)}
        table.append(row)
        print({k: v for k, v in row.items() if k != "ranks"}, flush=True)

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


SIZES = dict(groups=8, tokens=256, model=256, hidden=1024)
ROOMY = dict(groups=4, tokens=64, model=64, hidden=128, factor=0, repeats=1)
"""Small, and with room for all tokens, so that the result can be compared with the loop."""
EXPERTS = (4, 8, 16)
DEVICES = (1, 2, 4)


def experts() -> dict:
    """The same tokens on 1, 2 and 4 processes with 4, 8 and 16 experts: bytes, work, results."""
    table = []
    for count in EXPERTS:
        for devices in DEVICES:
            busy: list[float] = []
            # The processor's time for a process hardly depends on who else uses the machine. Time
            # by the clock does: it is the matter of `scaling`.
            for _ in range(EXPERT_TURNS):
                settings = Settings(devices=devices, experts=count, repeats=5, **SIZES)
                reports = run_processes(settings, seconds=600)
                busy.append(max(report.busy_seconds for report in reports))
            roomy = run_processes(Settings(devices=devices, experts=count, **ROOMY), seconds=600)
            row = {
                "experts": count,
                "devices": devices,
                "slots": settings.slots,
                "sent_bytes": [r.sent_bytes for r in reports],
                "operations": [r.operations for r in reports],
                "weight_bytes": [r.weight_bytes for r in reports],
                "dropped_choices": sum(r.dropped_choices for r in reports),
                "output_sum": sum(r.output_sum for r in reports),
                "largest_error": max(r.largest_error for r in roomy),
                "busy_seconds": [round(b, 5) for b in busy],
            }
            table.append(row)
            print(row, flush=True)
    return {"sizes": SIZES, "roomy": ROOMY, "table": table}


def wait_for_idle_cores() -> float:
    """Wait until others use little of this machine; give what they use, in percent of a core.

    Raises:
        SystemExit: When two processes would share a core, or when the machine stays busy.
    """
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this process may use one core only: start it without `taskset`.")
    for _ in range(IDLE_TRIES):
        used = psutil.cpu_percent(interval=1) * psutil.cpu_count()
        if used < BUSY_PERCENT:
            return used
    raise SystemExit(
        f"others use {used:.0f} % of a core: this measures two processes by the clock, and needs "
        "two idle cores. Nothing was stored."
    )


def scaling() -> dict:
    """Seconds of the slowest process, on 1 and 2 processes in turns; on idle cores only."""
    others, table = [], []
    for count in EXPERTS:
        found: dict[int, list[list[float]]] = {1: [], 2: []}
        for _ in range(TURNS):
            others.append(wait_for_idle_cores())
            for devices, turns in found.items():
                settings = Settings(devices=devices, experts=count, repeats=15, **SIZES)
                reports = run_processes(settings, seconds=600)
                slowest = max(reports, key=lambda report: report.seconds)
                turns.append([round(slowest.seconds, 5), round(slowest.exchange_seconds, 5)])
            print(count, {n: turns[-1] for n, turns in found.items()}, flush=True)
        table += [
            {
                "experts": count,
                "devices": devices,
                "seconds": [t for t, _ in turns],
                "exchange_seconds": [t for _, t in turns],
            }
            for devices, turns in found.items()
        ]
    return {"sizes": SIZES, "others_percent_of_a_core": max(others), "table": table}


PARTS = {"attention": attention, "minilm": minilm, "experts": experts, "scaling": scaling}

if __name__ == "__main__":
    sys.exit(sweeps.run(PARTS, __file__, __doc__.splitlines()[0]))
