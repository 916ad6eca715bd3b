"""The panels of the chapter on retrieval: a memory with four knobs, and RETRO's alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from matplotlib.figure import Figure
from torch import Tensor

from effnb.chapters.design.retrieval import live
from effnb.design.retrieval import readers
from effnb.lab import PALETTE, knob, panel
from effnb.lab.figures import BLACK, GREY
from effnb.lab.panels import Panel, guess

LAMS = (0.0, 0.15, 0.3, 0.5, 0.8, 0.95)
KS = (1, 4, 16, 64)
TEMPERATURES = (0.3, 1.0, 10.0, 100.0)


def memory(here: live.Live) -> Panel:
    """Share, neighbours, temperature and size of the datastore."""

    def compute(lam: float, k: int, temperature: float, entries: int) -> live.Answer:
        return here.answer(lam, k, temperature, entries)

    def draw(answer: live.Answer, fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.5))
        left.barh(
            ["with the datastore", "decoder alone"],
            [answer.loss, answer.alone],
            color=[PALETTE[0], PALETTE[6]],
            height=0.5,
        )
        left.set_xlim(0, 8)
        left.set_title("nats per token")
        edges = torch.linspace(-3, 5, 33)
        right.hist(answer.gains.clamp(-3, 5).numpy(), bins=edges.tolist(), color=PALETTE[2])
        right.axvline(0, color=BLACK, linewidth=1)
        right.set_yscale("symlog")
        right.set_title("tokens, over the nats that each gains")

    def text(answer: live.Answer) -> str:
        gain = answer.alone - answer.loss
        return "\n".join(
            [
                f"Decoder alone: {answer.alone:.2f} nats",
                f"With the datastore: {answer.loss:.2f} nats",
                f"Gain: {gain:+.2f} nats",
                f"Tokens that gain: {100 * answer.helped:.0f} %",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="A memory beside a model",
        caption=f"mini-300k reads {len(here.judged)} held-out descriptions with a datastore of "
        "others. A share of 0 is the decoder alone. Tokens right of 0 are foreseen better with the "
        "datastore.",
        figsize=(7.0, 2.0),
        frames={"lam": [0.0, 0.3, 0.8], "entries": [1_000, 30_000]},
        predict=guess(
            "The datastore answers for 30 % of each prediction. Of 100 tokens, how many are "
            "foreseen better than by the decoder alone?",
            answer=lambda answer: round(100 * answer.helped),
            at={"lam": 0.3, "k": 16, "temperature": 1.0, "entries": 30_000},
        ),
        ignored=lambda values: (
            dict.fromkeys(("k", "temperature", "entries"), "the share of the neighbours is 0")
            if values["lam"] == 0
            else {"temperature": "one neighbour has all the weight"}
            if values["k"] == 1
            else {}
        ),
        lam=knob(list(LAMS), default=0.3, label="λ, share of the neighbours"),
        k=knob(list(KS), default=16, label="k, neighbours"),
        temperature=knob(list(TEMPERATURES), default=1.0, label="τ, temperature"),
        entries=knob(list(live.SIZES), default=30_000, label="entries of the datastore"),
    )


@dataclass(frozen=True)
class Alignment:
    """Who reads what.

    Attributes:
        reads: Which token reads the neighbours of which chunk.
        leaks: Which of these were chosen by looking at tokens that come later.
    """

    reads: Bool[Tensor, "time chunks"]
    leaks: Bool[Tensor, "time chunks"]


TIME = 24
STARTS = {"last of its chunk (RETRO)": 1, "first of its chunk": None, "first of the next": 0}


def aligned(chunk: int, start: str, time: int = TIME) -> Alignment:
    """Which tokens read which chunk's neighbours, when reading starts at some token.

    Raises:
        ValueError: When there is no such start.
    """
    if start not in STARTS:
        raise ValueError(f'start is "{start}"; it must be one of {", ".join(STARTS)}.')
    rows, chunks = torch.arange(time)[:, None], torch.arange(time // chunk)
    if STARTS[start] == 1:
        reads = readers(time, chunk)
    else:
        reads = rows // chunk - (1 if STARTS[start] == 0 else 0) == chunks
    last = (chunks + 1) * chunk - 1  # a neighbour was chosen with all tokens up to this one
    return Alignment(reads, reads & (rows < last))


def alignment() -> Panel:
    """Where chunked cross-attention may start to read."""

    def draw(found: Alignment, fig: Figure) -> None:
        axes = fig.subplots()
        time, chunks = found.reads.shape
        for t in range(time):
            for u in range(chunks):
                if not found.reads[t, u]:
                    continue
                colour = PALETTE[1] if found.leaks[t, u] else PALETTE[0]
                axes.add_patch(_square(t, u, colour))
        for u in range(chunks + 1):
            axes.axvline(u * time // chunks, color=GREY, linewidth=0.5)
        axes.set_xlim(0, time)
        axes.set_ylim(chunks, 0)
        axes.set_xlabel("token that reads")
        axes.set_ylabel("neighbours of chunk")
        axes.set_yticks([u + 0.5 for u in range(chunks)], [str(u) for u in range(chunks)])

    def text(found: Alignment) -> str:
        return (
            f"Tokens that read neighbours: {int(found.reads.sum())} of {len(found.reads)}\n"
            f"of which see what comes after them: {int(found.leaks.sum())}"
        )

    return panel(
        aligned,
        draw,
        text=text,
        title="Who may read which neighbours",
        caption="Blue: a token reads neighbours that were found with tokens up to its own. "
        "Vermilion: it reads neighbours that were found with tokens after it, which tell the "
        "future. Grey lines part the chunks.",
        figsize=(7.0, 2.2),
        frames={"start": list(STARTS), "chunk": [4, 8]},
        predict=guess(
            "Chunks of 4 tokens, and each token reads the neighbours of its own chunk. How many of "
            "24 tokens see what comes after them?",
            answer=lambda found: int(found.leaks.sum()),
            at={"chunk": 4, "start": "first of its chunk"},
        ),
        chunk=knob([2, 4, 6, 8, 12], default=4, label="tokens of a chunk"),
        start=knob(list(STARTS), label="reading starts at the token that is"),
    )


def _square(t: int, u: int, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((t + 0.08, u + 0.12), 0.84, 0.76, color=colour, linewidth=0)
