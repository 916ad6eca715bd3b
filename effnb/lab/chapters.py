"""The map of the workbook: its notebooks in order, which are written, and how long each takes.

The table below is the one list of chapters. Everything else is read from the built notebooks: the
minutes from the metadata that the author wrote into the header of the `.py` file, the running time
and memory from what `effnb.book.build` measured when it executed the chapter. The README's map and
the one in `00_start_here` are generated from here, and `make notebooks` renews them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

SECTIONS: dict[str, str] = {
    "00_start_here": "Start here",
    "01_data": "Data",
    "02_design": "Model design",
    "03_pretraining": "Pre-training",
    "04_finetuning": "Fine-tuning",
    "05_inference": "Inference",
    "06_hardware": "Hardware",
    "07_evaluation": "Evaluation",
    "08_selection": "Model selection",
    "09_capstone": "Capstone",
}

TABLE: dict[str, tuple[str, str]] = {  # path below notebooks/: title, what it is about
    "00_start_here": ("Start here", "a tour: your machine, a first slider, a first exercise"),
    "01_data/1_filtering": ("Filtering", "duplicates and low-quality text, found and removed"),
    "01_data/2_active_learning": ("Active learning", "which examples are worth a label"),
    "01_data/3_curriculum": ("Curriculum", "the order in which a model meets its data"),
    "02_design/1_attention": ("Attention", "recurrence, local windows, sparse and linear forms"),
    "02_design/2_experts": ("Experts", "more parameters at the same work per token"),
    "02_design/3_sharing": ("Sharing", "one set of weights for many layers; latent bottlenecks"),
    "02_design/4_retrieval": ("Retrieval", "a database in place of parameters"),
    "02_design/5_retention": ("Retention", "one layer that is parallel, recurrent and chunked"),
    "02_design/6_context": ("Context", "stretching positions beyond the trained length"),
    "03_pretraining/1_objectives": ("Objectives", "what a model is asked to predict"),
    "04_finetuning/1_delta_tuning": ("Delta tuning", "adapting a model by a few kilobytes"),
    "04_finetuning/2_delta_analysis": ("Delta analysis", "why so few parameters are enough"),
    "04_finetuning/3_multitask": ("Many tasks", "one model for many tasks; prompting"),
    "05_inference/1_pruning": ("Pruning", "removing weights, heads and layers"),
    "05_inference/2_low_rank": ("Low rank", "thin factors in place of wide matrices"),
    "05_inference/3_quantization": ("Quantization", "fewer bits for weights and activations"),
    "05_inference/4_self_distilled_quantization": (
        "Self-distilled quantization",
        "a model that teaches its own quantized copy",
    ),
    "05_inference/5_distillation": ("Distillation", "a small student of a large teacher"),
    "05_inference/6_retrieval_distillation": (
        "Distilling retrievers",
        "a fast encoder that ranks like a slow one",
    ),
    "05_inference/7_adaptive_computation": (
        "Adaptive computation",
        "early exits, cascades, speculative decoding",
    ),
    "05_inference/8_matryoshka": ("Matryoshka", "one embedding that can be cut to any length"),
    "06_hardware/1_training_memory": ("Training memory", "optimizer state, offloading, recompute"),
    "06_hardware/2_codesign": ("Co-design", "kernels, partitioning, number formats"),
    "06_hardware/3_edge": ("Edge", "models for small devices"),
    "07_evaluation/1_evaluation": ("Evaluation", "cost measured fairly; Pareto fronts; energy"),
    "08_selection/1_search": ("Search", "hyper-parameters and architectures on a budget"),
    "08_selection/2_transfer": ("Transfer", "choosing and tuning small for large"),
    "09_capstone": ("Capstone", "compress a model under a budget, with everything above"),
}

BEGIN = "<!-- chapters: written by `make notebooks`, do not edit -->"
END = "<!-- end of chapters -->"


@dataclass(frozen=True)
class Measured:
    """What executing a chapter took when it was built.

    Attributes:
        seconds: Wall time of the whole chapter, kernel start included, rounded up to 5.
        mebibytes: Peak resident memory of its kernel, rounded up to 100 MiB.
        cores: CPU cores of the machine that built it.
    """

    seconds: int
    mebibytes: int
    cores: int

    @classmethod
    def rounded(cls, seconds: float, bytes_: float, cores: int) -> Measured:
        """Round up, so that a rebuild on the same machine mostly gives the same file."""
        return cls(5 * math.ceil(seconds / 5), 100 * math.ceil(bytes_ / 2**20 / 100), cores)


@dataclass(frozen=True)
class Live:
    """What a panel on a real model takes where it computes instead of reading what is stored.

    Attributes:
        seconds: Time of one of its positions.
        mebibytes: Peak resident memory of the process that computes it.
    """

    seconds: float
    mebibytes: int


@dataclass(frozen=True)
class Chapter:
    """One notebook of the workbook.

    Attributes:
        name: Path below `notebooks/` without an ending.
        title: Title in the map.
        about: What it is about, in a few words.
        written: Whether the built notebook exists.
        minutes: Minutes to read it, exercises included; None when it is not written.
        measured: What executing it took; None when it is not written.
        live: What its panel on a real model takes; None when no stored result says so.
    """

    name: str
    title: str
    about: str
    written: bool
    minutes: int | None = None
    measured: Measured | None = None
    live: Live | None = None

    @property
    def section(self) -> str:
        """Title of the section that the chapter belongs to."""
        return SECTIONS[self.name.split("/")[0]]


def chapters(folder: Path = NOTEBOOKS) -> list[Chapter]:
    """All chapters in order, with the times that the built notebooks state.

    Raises:
        ValueError: When a built notebook does not state its minutes; the sentence says where to.
    """
    return [_chapter(name, folder) for name in TABLE]


def _chapter(name: str, folder: Path) -> Chapter:
    """One row of the map, read from its built notebook if there is one."""
    title, about = TABLE[name]
    path = folder / f"{name}.ipynb"
    if not path.is_file():
        return Chapter(name, title, about, written=False)
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    minutes = metadata.get("effnb", {}).get("minutes")
    if not isinstance(minutes, int):
        raise ValueError(
            f"notebooks/{name}.py does not say how many minutes it takes to read: put `effnb: "
            "{minutes: 20}` under `jupyter:` in its header and run `make notebooks`."
        )
    measured = metadata.get("measured")
    live = live_costs(metadata, folder)
    measured = Measured(**measured) if measured else None
    return Chapter(name, title, about, True, minutes, measured, live)


def live_costs(metadata: dict, folder: Path = NOTEBOOKS) -> Live | None:
    """What a chapter's real model takes, from the stored result that its header names.

    The header says `effnb: {minutes: 10, live: NAME}`, and `data/results/NAME.json` holds `live`
    with `seconds` and `mebibytes`, measured when the result was computed.
    """
    name = metadata.get("effnb", {}).get("live")
    if name is None:
        return None
    try:
        path = folder.parent / "data" / "results" / f"{name}.json"
        return Live(**json.loads(path.read_text(encoding="utf-8"))["data"]["live"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the page itself says that its stored result is missing or damaged


def minutes_to_run(measured: Measured) -> str:
    """Running time as a reader wants to know it."""
    if measured.seconds < 60:
        return "under 1 min"
    return f"{math.ceil(measured.seconds / 60)} min"


def chapter_map(folder: Path = NOTEBOOKS, prefix: str = "") -> str:
    """The chapters that are written as a Markdown table; those that are not, folded below it.

    Args:
        folder: The notebooks.
        prefix: Path from the page that shows the table to the notebooks, such as `notebooks/`.
    """
    everything = chapters(folder)
    lines = ["| section | chapter | about | read | run |", "|---|---|---|---|---|"]
    for shown, chapter in _by_section([c for c in everything if c.written]):
        title = f"[{chapter.title}]({prefix}{chapter.name}.ipynb)"
        run = minutes_to_run(chapter.measured) if chapter.measured else ""
        lines.append(f"| {shown} | {title} | {chapter.about} | {chapter.minutes} min | {run} |")
    missing = [c for c in everything if not c.written]
    if missing:
        count = f"{len(missing)} chapter{' is' if len(missing) == 1 else 's are'} not written yet"
        lines += ["", f"<details><summary>{count}</summary>", ""]
        lines += ["| section | chapter | about |", "|---|---|---|"]
        lines += [f"| {shown} | {c.title} | {c.about} |" for shown, c in _by_section(missing)]
        lines += ["", "</details>"]
    return "\n".join(lines)


def _by_section(rows: list[Chapter]) -> list[tuple[str, Chapter]]:
    """Chapters, each with its section's title where a section begins."""
    before = ["", *(chapter.section for chapter in rows)]
    return [("" if c.section == last else c.section, c) for last, c in zip(before, rows)]


def run_time_sentence(
    minutes: int | None, measured: Measured | None, live: Live | None = None
) -> str:
    """How long a chapter takes, as printed at its top."""
    if minutes is None or measured is None:
        return "This chapter's time and memory are measured when it is built (`make notebooks`)."
    real = ""
    if live is not None:
        real = (
            f" Where its real model computes, a position takes about {live.seconds:.2g} s and the "
            f"memory grows to {math.ceil(live.mebibytes / 100) * 100:,} MiB."
        )
    return (
        f"Reading: about {minutes} minutes, exercises included. Running all cells: "
        f"{measured.seconds} s and {measured.mebibytes:,} MiB of memory, measured on "
        f"{measured.cores} CPU core{'' if measured.cores == 1 else 's'} when this page was built."
        f"{real}"
    )


def run_time(name: str, folder: Path = NOTEBOOKS) -> None:
    """Print how long the chapter takes; its cell carries the tag `run-time`.

    The chapter cannot know while it runs how long it will have taken, so the builder writes the
    sentence into this cell's output at the end, and a live kernel reads it from the built file.

    Raises:
        ValueError: When there is no such chapter in the map.
    """
    if name not in TABLE:
        raise ValueError(f"there is no chapter {name!r}; the map has {', '.join(TABLE)}.")
    chapter = _chapter(name, folder)
    print(run_time_sentence(chapter.minutes, chapter.measured, chapter.live))


def update_readme(readme: Path, folder: Path = NOTEBOOKS) -> bool:
    """Renew the map in the README; returns whether it changed.

    Raises:
        ValueError: When the README has lost the two comments between which the map is.
    """
    text = readme.read_text(encoding="utf-8")
    renewed = readme_with_map(text, folder)
    if renewed != text:
        readme.write_text(renewed, encoding="utf-8", newline="\n")
    return renewed != text


def readme_with_map(text: str, folder: Path = NOTEBOOKS) -> str:
    """The README's text with the map as it is now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r} around its map.")
    return f"{before}{BEGIN}\n\n{chapter_map(folder, 'notebooks/')}\n\n{END}{after}"
