"""Build the chapters: the `.py` file is what a person edits, the `.ipynb` is what a reader opens.

    python -m effnb.book.build                          # execute and write every chapter
    python -m effnb.book.build 05_inference/1_pruning   # only this one
    python -m effnb.book.build --check                  # do the pairs agree? nothing is executed
    python -m effnb.book.build --learners FOLDER        # the same chapters without their answers
    python -m effnb.book.build --lines                  # how long each chapter is
    python -m effnb.book.build --shrink                 # store the built ones smaller, unexecuted
    python -m effnb.book.build --words                  # new prose into them, unexecuted

Building executes a chapter in a clean kernel of this environment, started in the chapter's folder,
offline and with EFFNB_BUILD=1 (panels then store the frames that move without a kernel). What is
written depends on the source and on what the cells print, never on the time or on chance: cell ids
come from the cells, widget ids are numbered, nothing is stamped.

Tags of cells: `exercise` (a stub to fill in), `hint` (Markdown, folded in <details>), `solution`
(left out of the learners' edition), `real-model` (stored results unless `results.live()`),
`nbval-check-output` (compared on every run), `hide-input`, and `run-time` (the builder writes
the measured time into its output).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path

import ipykernel.kernelspec
import jupytext
import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets import default

from effnb.book import equations, first_cell, limits, methods
from effnb.book.limits import tags
from effnb.book.shrink import VIEW, WIDGETS, shrink, text_of
from effnb.lab.chapters import (
    NOTEBOOKS,
    Measured,
    chapter_map,
    live_costs,
    run_time_sentence,
    update_readme,
)
from effnb.lab.claims import changed_registrations, unregistered, verdicts_in
from effnb.lab.devices import cores

TAGS = {
    "exercise",
    "hide-input",
    "hint",
    "map",
    "nbval-check-output",
    "real-model",
    "run-time",
    "solution",
}
SIZE_LIMIT = 800_000
"""Bytes that a built notebook may take: more, and repository browsers show nothing."""
CELL_SECONDS = 600
"""Seconds after which a cell counts as hanging."""
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:root|tmp|home/\w+|Users/\w+)/|[A-Z]:\\Users\\")
MAGIC = re.compile(r"^\s*(?:[%!?]|\w.*\?$)", re.MULTILINE)

Notebook = nbformat.NotebookNode


class BuildError(RuntimeError):
    """A chapter that cannot be built; the message says which cell and why."""


# --- reading the source ---------------------------------------------------------------------------


def read_source(path: Path) -> Notebook:
    """Read a chapter's `.py` file into a notebook without outputs, ready to execute.

    Raises:
        BuildError: When the file is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BuildError(f"{path.name} does not exist in {path.parent.name}/.") from None
    notebook = nbformat.from_dict(jupytext.reads(text, fmt="py:percent"))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": LANGUAGE,
            **{key: notebook.metadata[key] for key in ("effnb",) if key in notebook.metadata},
        }
    )
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        metadata: dict = {"tags": list(tags(cell))} if tags(cell) else {}
        if cell.cell_type == "code" and {"solution", "hide-input"} & set(tags(cell)):
            metadata["jupyter"] = {"source_hidden": True}  # folded when the page is opened
        cell.metadata = nbformat.from_dict(metadata)
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def sources(folder: Path = NOTEBOOKS) -> list[Path]:
    """The `.py` files of all chapters, in the order of the map."""
    return sorted(path for path in folder.rglob("*.py") if ".ipynb_checkpoints" not in path.parts)


def chosen(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The sources that a person named, by path below `notebooks/` or by file; all without names.

    Raises:
        BuildError: When a name fits none.
    """
    everything = sources(folder)
    if not names:
        return everything
    found = []
    for name in names:
        fitting = [
            path
            for path in everything
            if name in (name_of(path, folder), path.stem)
            or path.with_suffix("") == Path(name).resolve().with_suffix("")
        ]
        if not fitting:
            known = ", ".join(name_of(path, folder) for path in everything) or "none yet"
            raise BuildError(f"there is no chapter {name!r}; there are: {known}.")
        found += fitting
    return found


def name_of(path: Path, folder: Path = NOTEBOOKS) -> str:
    """A chapter's name: its path below the folder, without the ending."""
    return path.resolve().relative_to(folder.resolve()).with_suffix("").as_posix()


# --- executing ------------------------------------------------------------------------------------


class _ThisEnvironment(KernelSpecManager):
    """Kernels of the very Python that builds, whatever kernels the user has installed elsewhere."""

    def get_kernel_spec(self, kernel_name: str):
        """The specification of this environment's kernel, for any name."""
        return self.kernel_spec_class(
            resource_dir=str(ipykernel.kernelspec.RESOURCES),
            **ipykernel.kernelspec.get_kernel_dict(),
        )


class _KernelHere(AsyncKernelManager):
    """Starts those kernels; a client that makes it also shuts it down."""

    @default("kernel_spec_manager")
    def _this_environment(self) -> KernelSpecManager:
        return _ThisEnvironment(parent=self)


class _PeakMemory(threading.Thread):
    """Watches the resident memory of a kernel and of the processes that it starts."""

    def __init__(self, client: NotebookClient) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._done = threading.Event()
        self.peak = 0

    def run(self) -> None:
        """Look ten times a second until told to stop."""
        while not self._done.wait(0.1):
            pid = getattr(getattr(self._client.km, "provisioner", None), "pid", None)
            if pid is None:
                continue
            try:
                kernel = psutil.Process(pid)
                family = [kernel, *kernel.children(recursive=True)]
                self.peak = max(self.peak, sum(one.memory_info().rss for one in family))
            except psutil.Error:  # a process that ended while we looked
                continue

    def stop(self) -> int:
        """Stop and return the peak in bytes."""
        self._done.set()
        self.join()
        return self.peak


def execute(
    notebook: Notebook,
    folder: Path,
    variables: dict[str, str] | None = None,
    cell_seconds: float = CELL_SECONDS,
) -> tuple[float, int]:
    """Execute a notebook in place, in a clean kernel of this environment.

    Args:
        notebook: The notebook; its outputs, execution counts and widget state are filled in.
        folder: Where the kernel starts.
        variables: Environment variables for the kernel, beside this process's own.
        cell_seconds: Time after which a cell counts as hanging.

    Returns:
        Wall time in seconds, and peak memory of the kernel in bytes.

    Raises:
        BuildError: When a cell raises, hangs, or takes the kernel down.
    """
    reached = [0]
    client = NotebookClient(
        notebook,
        on_cell_execute=lambda cell, cell_index: reached.append(cell_index),
        timeout=cell_seconds,
        kernel_name=KERNEL["name"],
        kernel_manager_class=_KernelHere,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    watch = _PeakMemory(client)
    watch.start()
    start = time.perf_counter()
    try:
        client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", **(variables or {})})
    except CellTimeoutError:
        where = _where(reached[-1], notebook.cells[reached[-1]])
        raise BuildError(f"{where} ran for more than {cell_seconds:g} s.") from None
    except DeadKernelError:
        where = _where(reached[-1], notebook.cells[reached[-1]])
        raise BuildError(f"{where} took its kernel down (out of memory?).") from None
    except CellExecutionError as error:
        where = _where(reached[-1], notebook.cells[reached[-1]])
        raise BuildError(f"{where} raised {error.ename}: {error.evalue}\n{error}") from None
    finally:
        peak = watch.stop()
    return time.perf_counter() - start, peak


def _where(index: int, cell: Notebook) -> str:
    """A cell as an author finds it: its number and its first line."""
    first = next((line for line in cell.source.splitlines() if line.strip()), "(empty)")
    return f"cell {index} ({first.strip()[:60]!r})"


def settle(notebook: Notebook, name: str, measured: Measured) -> None:
    """Make an executed notebook the same on every build: widget ids, measured time, metadata."""
    notebook.metadata.measured = nbformat.from_dict(asdict(measured))
    notebook.metadata.language_info = nbformat.from_dict(LANGUAGE)
    minutes = notebook.metadata.get("effnb", {}).get("minutes")
    sentence = run_time_sentence(minutes, measured, live_costs(notebook.metadata)) + "\n"
    for cell in notebook.cells:
        if "run-time" in tags(cell):
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=sentence)]
    shrink(notebook)
    number_widgets(notebook, name)


def number_widgets(notebook: Notebook, name: str) -> None:
    """Replace the random ids of widgets by numbered ones, wherever they are mentioned."""
    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state")
    if not state:
        notebook.metadata.pop("widgets", None)
        return
    new = {
        old: hashlib.sha256(f"{name} widget {index}".encode()).hexdigest()[:32]
        for index, old in enumerate(state)
    }
    pattern = re.compile("|".join(map(re.escape, new)))

    def renamed(value):
        """The value with every widget id in it replaced."""
        if isinstance(value, str):
            # Pictures are long strings without ids; references are `IPY_MODEL_<id>` or the id.
            return pattern.sub(lambda m: new[m[0]], value) if len(value) < 10_000 else value
        if isinstance(value, dict):
            return {renamed(key): renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        return value

    notebook.metadata.widgets = nbformat.from_dict(renamed(notebook.metadata.widgets))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = nbformat.from_dict(renamed(cell.outputs))


def build(path: Path, folder: Path = NOTEBOOKS) -> Measured:
    """Execute one chapter and write its `.ipynb`; on failure the old one stays as it was.

    Args:
        path: The chapter's `.py` file.
        folder: The folder of all chapters.

    Raises:
        BuildError: When a cell fails; the message names it.
    """
    notebook = read_source(path)
    seconds, peak = execute(notebook, path.parent, {"EFFNB_BUILD": "1"})
    measured = Measured.rounded(seconds, peak, cores())
    settle(notebook, name_of(path, folder), measured)
    write(notebook, path.with_suffix(".ipynb"))
    return measured


def write(notebook: Notebook, path: Path) -> None:
    """Write a notebook whole or not at all."""
    nbformat.validate(notebook)
    text = text_of(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


def shrink_built(path: Path) -> tuple[int, int]:
    """Store a built chapter, given by its `.py` file, in fewer bytes; nothing is executed.

    Returns:
        The bytes before and after.

    Raises:
        BuildError: When it was never built, or its file is damaged.
    """
    built = path.with_suffix(".ipynb")
    notebook, size = _built(built)
    shrink(notebook)
    write(notebook, built)
    return size, built.stat().st_size


def renew_words(path: Path) -> bool:
    """Bring the prose of a built chapter, given by its `.py` file, up to date; nothing is executed.

    Returns:
        Whether it could be done: not when a code cell has changed, which has to be executed.

    Raises:
        BuildError: When it was never built, or its file is damaged.
    """
    built = path.with_suffix(".ipynb")
    notebook, _ = _built(built)
    cells = read_source(path).cells
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    new = [cell for cell in cells if cell.cell_type == "code"]
    if [(c.source, tags(c)) for c in new] != [(c.source, tags(c)) for c in executed]:
        return False
    kept = iter(executed)
    notebook.cells = [next(kept) if cell.cell_type == "code" else cell for cell in cells]
    write(notebook, built)
    return True


def _built(path: Path) -> tuple[Notebook, int]:
    """A built notebook, and how many bytes it takes."""
    try:
        text = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise BuildError(f"{path.name} has never been built; run `make notebooks`.") from None
    except (ValueError, nbformat.ValidationError):
        raise BuildError(f"{path.name} is not a valid notebook; build it again.") from None
    return notebook, len(text.encode())


def renew_maps(folder: Path = NOTEBOOKS) -> list[Path]:
    """Bring the map of the chapters up to date in built notebooks that show it; those changed.

    The map says which chapters are written and how long they run, so every build makes it old
    elsewhere. Its cell is tagged "map"; nothing is executed.
    """
    changed = []
    for path, notebook in _with_old_maps(folder):
        for cell in notebook.cells:
            if "map" in tags(cell):
                for output in cell.outputs:
                    output.data["text/markdown"] = chapter_map(folder)
        write(notebook, path)
        changed.append(path)
    return changed


def _with_old_maps(folder: Path) -> Iterator[tuple[Path, Notebook]]:
    """Built notebooks whose map is not that of today; a damaged notebook is no matter of maps."""
    for source in sources(folder):
        path = source.with_suffix(".ipynb")
        if not any("map" in tags(cell) for cell in read_source(source).cells) or not path.exists():
            continue
        try:
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        except (ValueError, nbformat.ValidationError):
            continue
        now = chapter_map(folder)
        shown = (o for c in notebook.cells if "map" in tags(c) for o in c.get("outputs", ()))
        if any(output.get("data", {}).get("text/markdown") != now for output in shown):
            yield path, notebook


# --- checking -------------------------------------------------------------------------------------


def check(folder: Path = NOTEBOOKS) -> list[str]:
    """What is wrong with the chapters as they lie there, as sentences; nothing is executed."""
    found = []
    for path in sources(folder):
        found += [f"{name_of(path, folder)}: {problem}" for problem in problems(path)]
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and not path.with_suffix(".py").exists():
            found.append(f"{name_of(path, folder)}: the .ipynb has no .py beside it.")
    for path, _ in _with_old_maps(folder):
        found.append(f"{name_of(path, folder)}: its map of the chapters is old; build any chapter.")
    found += [
        f"data/claims.json: the parts of {name} are not those that were registered."
        for name in changed_registrations()
    ]
    return found


def beyond_limits(paths: list[Path], folder: Path = NOTEBOOKS) -> list[str]:
    """What chapters do not keep to, as sentences."""
    return [
        f"{name_of(path, folder)}: {problem}"
        for path in paths
        for problem in limits.violations(path, read_source(path), name_of(path, folder))
    ]


def problems(path: Path) -> list[str]:
    """What is wrong with one chapter, given by its `.py` file, as sentences."""
    source = read_source(path)
    found = list(_source_problems(path, source))
    if path.resolve().is_relative_to(NOTEBOOKS.resolve()):
        found += first_cell.problems(source, name_of(path, NOTEBOOKS))
    built_path = path.with_suffix(".ipynb")
    if not built_path.exists():
        return [*found, "it has never been built; run `make notebooks`."]
    size = built_path.stat().st_size
    if size > SIZE_LIMIT:
        found.append(f"the .ipynb takes {size:,} bytes; {SIZE_LIMIT:,} is the limit.")
    try:
        built = nbformat.reads(built_path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(built)
    except (ValueError, nbformat.ValidationError) as error:
        return [*found, f"the .ipynb is not a valid notebook ({str(error).splitlines()[0]})."]
    found += _disagreements(source, built)
    found += _output_problems(built)
    found += _unproven_numbers(built)
    found += [f"{one}." for verdict in verdicts_in(built) for one in unregistered(verdict)]
    return found


def _source_problems(path: Path, source: Notebook) -> Iterator[str]:
    """What is wrong with the text that the author wrote."""
    if not isinstance(source.metadata.get("effnb", {}).get("minutes"), int):
        yield "the header does not say how long it takes: put `effnb: {minutes: 20}` there."
    header = path.read_text(encoding="utf-8").split("# %%")[0]
    if re.search(r"^#\s+formats:", header, re.MULTILINE):
        yield "the header pairs the file (`formats:`); JupyterLab then refuses it after a clone."
    exercises = verdicts = 0
    for index, cell in enumerate(source.cells):
        where = _where(index, cell)
        for unknown in sorted(set(tags(cell)) - TAGS):
            yield f"{where} has the unknown tag {unknown!r}; there are {', '.join(sorted(TAGS))}."
        if cell.cell_type == "markdown":
            if "hint" in tags(cell) and "<details" not in cell.source:
                yield f"{where} is a hint that is not folded: put it into <details>."
            if re.search(r"!\[\s*\]\(", cell.source):
                yield f"{where} has a picture without alternative text."
            for problem in images_without_alt(cell.source):
                yield f"{where} has {problem}."
        elif "hint" in tags(cell):
            yield f"{where} is a hint, which is Markdown folded in <details>, not code."
        elif MAGIC.search(cell.source):
            # A failing `%magic` or `!command` passes every check that nbval makes.
            yield f"{where} uses a magic or a shell command; write it in Python."
        exercises += "exercise" in tags(cell)
        verdicts += cell.cell_type == "code" and ".check(" in cell.source
    yield from equations.problems([c.source for c in source.cells if c.cell_type == "markdown"])
    if exercises and not verdicts:
        yield "it has exercises, and none is checked with `.check(…)`."


def _disagreements(source: Notebook, built: Notebook) -> list[str]:
    """The first cell, or the metadata, in which the built notebook is not what the source says."""
    for index, (mine, theirs) in enumerate(zip_longest(source.cells, built.cells)):
        if mine is None or theirs is None:
            side = "only the .py" if theirs is None else "only the .ipynb"
            return [f"{side} has {_where(index, mine or theirs)}; run `make notebooks`."]
        same = (mine.cell_type, mine.source, tags(mine)) == (
            theirs.cell_type,
            theirs.source,
            tags(theirs),
        )
        if not same:
            return [f"{_where(index, mine)} differs in the .ipynb; run `make notebooks`."]
    if source.metadata.get("effnb") != built.metadata.get("effnb"):
        return ["the header's `effnb` differs in the .ipynb; run `make notebooks`."]
    return []


def _output_problems(built: Notebook) -> Iterator[str]:
    """What is wrong with what the cells printed and showed."""
    for index, cell in enumerate(built.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        where = _where(index, cell)
        if not cell.execution_count:
            yield f"{where} was never executed."
        if "nbval-check-output" in tags(cell) and not cell.outputs:
            yield f"{where} is compared on every run, but prints nothing."
        for output in cell.outputs:
            yield from (f"{where} {problem}." for problem in _one_output(output))
        yield from (f"{where} {problem}." for problem in _verdict_problems(cell))
    widgets = built.metadata.get("widgets", {}).get(WIDGETS)
    shown = any(
        VIEW in output.get("data", {})
        for cell in built.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    if shown and not (widgets and widgets.get("state")):
        yield "it shows widgets whose state was not saved."
    if widgets is not None and "state" not in widgets:
        yield "its widget state lacks the key `state`; repository browsers call that invalid."


def _unproven_numbers(built: Notebook) -> Iterator[str]:
    """Decimal numbers and percentages in the prose that no compared cell prints or is given."""
    compared = [cell for cell in built.cells if "nbval-check-output" in tags(cell)]
    texts = [cell.source for cell in compared]
    texts += [printed(output) for cell in compared for output in cell.get("outputs", ())]
    proven = "\n".join(texts)
    numbers = set(re.findall(r"\d+(?:\.\d+)?", proven.replace(",", "")))
    for index, cell in enumerate(built.cells):
        if cell.cell_type != "markdown":
            continue
        for quoted in quoted_numbers(cell.source):
            if quoted.replace(",", "").rstrip(" %") not in numbers:
                yield (
                    f"{_where(index, cell)} says {quoted}, which no cell tagged "
                    "nbval-check-output prints."
                )


def quoted_numbers(markdown: str) -> list[str]:
    """The decimal numbers and percentages that a text states as its own findings.

    Code, mathematics, links, block quotes and tables of contents are left out, and so
    are versions, sections, equations and identifiers of papers.
    """
    prose = re.sub(r"^```.*?^```|^>.*?$", " ", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(
        r"`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|<[^>]*>", " ", prose, flags=re.DOTALL
    )
    prose = re.sub(
        r"(?i)\b(?:arxiv|python|version|torch|transformers|section|chapter|eq\.|equation|fig\.|table)"
        r"[\s:]*[\d.]+",
        " ",
        prose,
    )
    return [
        found.strip()
        for found in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+(?:\s?%)?|\s?%)(?![\w])(?!\.\d)", prose)
    ]


def _one_output(output: Notebook) -> Iterator[str]:
    """What is wrong with one output."""
    if output.output_type == "error":
        yield f"raised {output.ename}: {output.evalue}"
        return
    text = printed(output)
    if output.output_type == "stream" and output.name == "stderr":
        yield f"wrote to stderr: {text.strip()[:100]!r}"
    if "UsageError" in text:
        yield "shows a UsageError"
    path = MACHINE_PATH.search(text)
    if path:
        yield f"shows a path of the machine that built it ({path[0]!r})"
    data = output.get("data", {})
    html = data.get("text/html", "")
    yield from (f"has {problem}" for problem in images_without_alt(html))
    if any(kind.startswith("image/") for kind in data) and "alt=" not in html:
        yield "shows a picture without alternative text"


def _verdict_problems(cell: Notebook) -> Iterator[str]:
    """Solutions must pass their checks and blank stubs fail them, in the page that readers see."""
    if ".check(" not in cell.source:
        return
    said = "".join(printed(output) for output in cell.outputs)
    expected = "Correct" if "solution" in tags(cell) else "Not yet"
    if expected not in said:
        yield f"should answer {expected!r} and says {said.strip()[:100]!r}"


def printed(output: Notebook) -> str:
    """The text of an output, in whatever form it has one."""
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return "\n".join(str(data[kind]) for kind in ("text/plain", "text/markdown") if kind in data)


class _Images(HTMLParser):
    """Collects the images that say nothing to those who do not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Look at one tag."""
        named = dict(attributes)
        hidden = named.get("aria-hidden") == "true" or named.get("role") == "presentation"
        if tag == "img" and not hidden and not (named.get("alt") or "").strip():
            self.silent.append((named.get("src") or "")[:40])


def images_without_alt(html: str) -> list[str]:
    """The images of a piece of HTML that lack alternative text, in words."""
    parser = _Images()
    parser.feed(html)
    return [f"an <img> without alternative text ({source!r})" for source in parser.silent]


# --- the learners' edition ------------------------------------------------------------------------


def learners_edition(path: Path) -> Notebook:
    """A chapter without its answers and outputs, for those who want to find them.

    Solutions are left out, and so are hints that repeat a line of one. References and diagnoses of
    the exercises lie in the chapter's companion module, which the edition imports.
    """
    notebook = read_source(path)
    answers = limits.answers(notebook)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "solution" not in tags(cell)
        and not ("hint" in tags(cell) and limits.tells(cell, answers))
    ]
    return notebook


def write_learners(folder: Path, out: Path, paths: list[Path]) -> list[Path]:
    """Write the learners' edition of chapters, with the pictures that lie beside them."""
    written = []
    for path in paths:
        target = out / path.relative_to(folder).with_suffix(".ipynb")
        write(learners_edition(path), target)
        written.append(target)
    for images in folder.rglob("images"):
        if images.is_dir():
            shutil.copytree(images, out / images.relative_to(folder), dirs_exist_ok=True)
    return written


# --- the command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None, folder: Path = NOTEBOOKS) -> int:
    """The command `python -m effnb.book.build`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effnb.book.build", description="Build the chapters, or check that they are."
    )
    parser.add_argument("chapters", nargs="*", help="such as 05_inference/1_pruning; default all")
    parser.add_argument("--check", action="store_true", help="only say what is out of step")
    parser.add_argument("--learners", metavar="FOLDER", type=Path, help="write without answers")
    parser.add_argument("--lines", action="store_true", help="print how long each chapter is")
    parser.add_argument("--shrink", action="store_true", help="store built chapters smaller")
    parser.add_argument("--words", action="store_true", help="put new prose into built chapters")
    options = parser.parse_args(arguments)
    try:
        paths = chosen(options.chapters, folder)
        if options.lines:
            sizes = {name_of(p, folder): limits.counts(p, read_source(p)) for p in paths}
            print(limits.table(sizes))
            return 0
        if options.shrink:
            for path in paths:
                before, after = shrink_built(path)
                print(
                    f"{name_of(path, folder)}: {before / 1000:.0f} kB, now {after / 1000:.0f} kB."
                )
            return 0
        if options.words:
            changed = [name_of(path, folder) for path in paths if not renew_words(path)]
            for name in changed:
                print(f"{name} has new code: build it.", file=sys.stderr)
            return 1 if changed else 0
        if options.learners:
            written = write_learners(folder, options.learners, paths)
            print(f"{len(written)} chapters without solutions are in {options.learners}.")
            return 0
        if not options.check:
            for path in paths:
                measured = build(path, folder)
                print(
                    f"{name_of(path, folder)}: {measured.seconds} s, {measured.mebibytes} MiB, "
                    f"{path.with_suffix('.ipynb').stat().st_size / 1000:.0f} kB",
                    flush=True,
                )
            renew_maps(folder)
            if folder == NOTEBOOKS:
                update_readme(NOTEBOOKS.parent / "README.md")
                methods.update_readme(NOTEBOOKS.parent / "README.md")
        everything = not options.chapters
        found = (
            check(folder)
            if everything
            else [f"{name_of(p, folder)}: {problem}" for p in paths for problem in problems(p)]
        )
        if folder == NOTEBOOKS:
            found += beyond_limits(paths)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
