"""Round-to-nearest at every bit-width and grouping, on a model of the workbook (`make results`).

    python data/sweep_rtn.py            # mini-5m, about five minutes on two CPU cores

Perplexity on the first 8,177 tokens of the held-out novel (16 windows of 512), ranked choice on 150
questions about held-out packages, and bytes as stored. Written to `data/results/rtn_sweep.json`;
`notebooks/00_start_here` draws it behind its panel.
"""

from __future__ import annotations

import argparse

import torch

from effnb.evaluation import perplexity, ranked_choice, stored_bytes
from effnb.inference.quantization import QuantizedLinear, dequantized, rtn
from effnb.lab import corpora, load, results

GROUP_SIZES = ["tensor", "row", 128, 64, 32]
WINDOWS = 16


def main() -> None:
    """Measure every setting and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini-5m")
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    text = "\n\n".join(corpora.documents("novels", "test")[:6])
    ids = torch.tensor(loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False))
    ids = ids[: WINDOWS * 511 + 1]
    items = corpora.choice_items(150, context_characters=120, choice_characters=40)

    def row(model, **setting) -> dict:
        found = perplexity(model, ids)
        choice = ranked_choice(model, loaded.tokenizer, items)
        return {
            **setting,
            "perplexity": round(found.perplexity, 3),
            "accuracy": round(choice.accuracy, 4),
            "standard_error": round(choice.standard_error, 4),
        }

    table = [
        row(
            loaded.model,
            bits=32,
            group_size="none",
            bytes=stored_bytes(loaded.model),
            layer_bits=32.0,
        )
    ]
    for group_size in GROUP_SIZES:
        for bits in range(2, 9):
            packed = rtn(loaded.model, bits, group_size=group_size)
            layers = [m.quantized for m in packed.modules() if isinstance(m, QuantizedLinear)]
            numbers = sum(q.shape[0] * q.shape[1] for q in layers)
            table.append(
                row(
                    dequantized(packed),
                    bits=bits,
                    group_size=str(group_size),
                    bytes=stored_bytes(packed),
                    layer_bits=round(8 * sum(q.bytes for q in layers) / numbers, 4),
                )
            )
            print(table[-1], flush=True)
    about = {"model": arguments.model, "tokens": len(ids), "questions": len(items), "table": table}
    results.store("rtn_sweep", about, "python data/sweep_rtn.py")


if __name__ == "__main__":
    main()
