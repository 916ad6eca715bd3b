"""The teacher's pack says what is so, keeps answers where they belong, and needs no network."""

import ast
import csv
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from effnb.book import build
from effnb.book.site import teach
from effnb.book.workshop import __main__ as command
from effnb.book.workshop import grading, pack, practice, predictions, preflight, prose, slides
from effnb.book.workshop.teaching import (
    ENDING,
    LENGTHS,
    NoTeaching,
    Step,
    Teaching,
    path_for,
    read_teaching,
)
from effnb.lab.chapters import NOTEBOOKS, TABLE

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = [name for name in TABLE if (NOTEBOOKS / f"{name}.py").is_file()]

# --- what teachers are told -----------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_every_chapter_says_what_its_teacher_needs(name):
    path = NOTEBOOKS / f"{name}.py"
    teaching = read_teaching(path_for(path))
    assert 3 <= len(teaching.goals) <= 6
    assert all(goal[0].isupper() and goal.endswith(".") for goal in teaching.goals)
    for length in LENGTHS:
        assert sum(step.minutes for step in teaching.pacing[length]) == length
        assert all(step.does.endswith((".", "?", "!")) for step in teaching.pacing[length])
    assert any("break" in step.does.lower() for step in teaching.pacing[120])
    tasks = practice.tasks(build.read_source(path))
    assert tasks
    assert practice.problems(tasks, teaching) == []
    for one in teaching.practices:
        assert one.wrong
        assert all(len(wrong.why.split()) >= 8 for wrong in one.wrong)


def test_every_file_for_teachers_belongs_to_a_chapter_that_is_there():
    found = {path.relative_to(NOTEBOOKS).as_posix() for path in NOTEBOOKS.rglob(f"*{ENDING}")}
    assert found == {f"{name}{ENDING}" for name in WRITTEN}


GOOD = """
goals = ["Do one thing.", "Do another.", "Do a third."]
pacing_50 = [[20, "Begin."], [30, "End."]]
pacing_120 = [[60, "Begin."], [10, "Break."], [50, "End."]]

[[exercise]]
name = "The rank for a budget"
[[exercise.wrong]]
answer = "int(kept * min(m, n))"
why = "They take a part of the rank and not of the numbers."
says = "This is a part of the full rank"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"Do a third."', "", "has 2 goals"),
        ('[30, "End."]', '[31, "End."]', "add up to 51 minutes"),
        ('[30, "End."]', '["30", "End."]', "a step of pacing_50 is"),
        ("[[exercise.wrong]]", "[[exercise.right]]", "an exercise has a name"),
        ('why = "They take', 'because = "They take', "has `answer`, `why`"),
        ("pacing_120 =", "pacing_90 =", "'pacing_90' is none of"),
        ("goals = [", "goals = [[", "is not TOML"),
    ],
)
def test_a_file_for_teachers_that_is_wrong_is_refused_in_a_sentence(tmp_path, old, new, said):
    path = tmp_path / f"chapter{ENDING}"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(NoTeaching, match=re.escape(said)):
        read_teaching(path)
    path.unlink()
    with pytest.raises(NoTeaching, match="is missing"):
        read_teaching(path)


# --- a chapter as a pack --------------------------------------------------------------------------

CHAPTER = '''\
# ---
# jupyter:
#   effnb:
#     minutes: 5
# ---

# %% [markdown]
# # Tiny
#
# **A matrix is a sum.** It is also $W = U V$, and that et al. matters. A last sentence.

# %% [markdown]
# ## The idea
#
# First things come first. This sentence is for the notes alone.
#
# $$\\\\sigma_1 \\\\ge \\\\sigma_2$$
#
# - one point
# - another point

# %%
print("seven")

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.low_rank import exercises

# %% [markdown]
# **1.** The largest rank.


# %% tags=["exercise", "nbval-check-output"]
def rank_of(kept, m, n):
    """A whole number."""
    raise NotImplementedError


_ = exercises.saving.check(rank_of)

# %% [markdown] tags=["hint"]
# Solve for $r$.


# %% tags=["solution"]
exercises.saving.solution()
'''.replace("\\\\", "\\")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of notebooks with one chapter, stored as if it had been executed."""
    made = tmp_path_factory.mktemp("book") / "notebooks"
    made.mkdir()
    (made / "tiny.py").write_text(CHAPTER, encoding="utf-8")
    notebook = build.read_source(made / "tiny.py")
    for cell in notebook.cells:
        if 'print("seven")' in cell.source:
            cell.outputs = [{"output_type": "stream", "name": "stdout", "text": "7 <numbers>\n"}]
        if "solution" in cell.metadata.get("tags", ()):
            listing = '<a href="effnb/lab.py#L1">lab</a><pre>ANSWER</pre>'
            answer = f"<details><summary>Solution</summary>{listing}</details>"
            data = {"text/html": answer, "text/plain": ""}
            cell.outputs = [{"output_type": "display_data", "metadata": {}, "data": data}]
    (made / "tiny.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (made / f"tiny{ENDING}").write_text(GOOD, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def packed(folder):
    """Its pack."""
    out = folder.parent / "pack"
    assert command.main(["tiny", "--out", str(out)], folder) == 0
    return out


def text(path):
    return path.read_text(encoding="utf-8")


def test_a_deck_is_one_file_that_asks_no_network(packed):
    deck = text(packed / "tiny/slides.html")
    assert not re.search(r'(?:src|href)="(?!#|data:)', deck)
    assert not re.search(r"url\((?!data:)", deck)
    assert "data:font/woff2" in deck  # the mathematics of the page
    assert "KaTeX_Fraktur" not in re.sub(r"\.[\w-]+\{[^}]*\}", "", deck)
    assert deck.count('<section class="slide') == 4  # title, idea, output, exercise


def test_slides_show_points_and_notes_hold_the_prose(packed):
    parts = re.findall(
        r'<section class="slide.*?</section>', text(packed / "tiny/slides.html"), re.S
    )
    title, idea, output, exercise = parts
    assert "Do another." in title.partition("<aside")[0]
    assert "50 minutes" in title.partition("<aside")[2]
    shown, _, notes = idea.partition("<aside")
    assert "First things come first." in shown
    assert "for the notes alone" not in shown
    assert "for the notes alone" in notes
    assert "another point" in shown
    assert "katex-display" in shown
    assert "7 &lt;numbers&gt;" in output
    shown, _, notes = exercise.partition("<aside")
    assert "The rank for a budget" in shown
    assert "raise NotImplementedError" in shown
    assert "ANSWER" not in exercise
    assert "int(kept * min(m, n))" in notes


def test_a_verdict_is_short_on_a_slide_and_whole_in_its_notes():
    parts = [{"outcome": "shown"}, {"outcome": "shown"}, {"outcome": "undecided"}]
    verdict = {"id": "C-4", "verdict": "holds in part", "parts": parts}
    data = {slides.CLAIMS: {"verdicts": [verdict]}, "text/html": "<ul>ALL THE EVIDENCE</ul>"}
    cell = {"cell_type": "code", "metadata": {}, "source": "claims_table(x)"}
    outputs = [{"output_type": "display_data", "metadata": {}, "data": data}]
    title = {"cell_type": "markdown", "metadata": {}, "source": "# Title"}
    notebook = {"cells": [title, cell | {"outputs": outputs}], "metadata": {}}
    teaching = Teaching(("Do.",), dict.fromkeys(LENGTHS, (Step(50, "All."),)), ())
    last = slides.slides(notebook, teaching, {})[-1]
    assert "C-4: holds in part" in last.body
    assert "2 shown, 1 undecided" in last.body
    assert "EVIDENCE" not in last.body
    assert "ALL THE EVIDENCE" in last.notes


def test_a_listing_has_a_slide_of_its_own_and_verdicts_share_few():
    listing = '<figure style="x"><figcaption><code>{}</code></figcaption><pre>y</pre></figure>'
    both = listing.format("one") + listing.format("two")
    assert slides._parts([both]) == [listing.format("one"), listing.format("two")]
    assert slides._parts([both, "<p>more</p>"]) == [both + "<p>more</p>"]
    verdicts = [f'<div class="verdict">{i}</div>' for i in range(slides.VERDICTS + 1)]
    assert slides._parts(["".join(verdicts)]) == ["".join(verdicts[:-1]), verdicts[-1]]
    assert slides._parts(["<table></table>"]) == ["<table></table>"]


def test_the_key_has_the_answer_and_the_learners_have_none(packed, folder):
    key = text(packed / "tiny/key.html")
    assert "<pre>ANSWER</pre>" in key
    assert "This is a part of the full rank; two factors hold" in key  # in full
    assert "What the check recognizes besides" in key
    assert "ANSWER" not in text(packed / "tiny/plan.html")
    ours, theirs = (
        [cell["source"] for cell in json.loads(text(path))["cells"]]
        for path in (packed / "tiny/learners.ipynb", packed / "learners/tiny.ipynb")
    )
    assert ["".join(one) for one in ours] == ["".join(one) for one in theirs]
    assert not any("solution()" in "".join(one) for one in ours)
    assert "ANSWER" not in text(packed / "tiny/learners.ipynb")


def test_the_index_leads_to_files_that_are_there(packed):
    for page in packed.rglob("*.html"):
        for target in re.findall(r'href="([^"#]+)"', text(page)):
            if not target.startswith("data:"):
                assert (page.parent / target).is_file(), target


def test_only_a_pack_is_ever_replaced(packed, folder, tmp_path, capsys):
    (packed / "wheels").mkdir(exist_ok=True)
    (packed / "wheels/kept.whl").write_text("")
    (packed / "old.html").write_text("")
    assert command.main(["tiny", "--out", str(packed)], folder) == 0
    assert (packed / "wheels/kept.whl").exists()
    assert not (packed / "old.html").exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    assert command.main(["tiny", "--out", str(tmp_path)], folder) == 1
    assert "is no pack" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()
    assert command.main(["nothing", "--out", str(packed)], folder) == 1
    assert "no built notebook" in capsys.readouterr().err


def test_the_site_has_an_index_whose_links_lead_somewhere(tmp_path, folder, monkeypatch):
    found = pack.read_lessons(["tiny"], folder)
    monkeypatch.setattr(teach, "lessons", lambda book: found)
    teach.write(tmp_path, None)
    links = re.findall(r'href="([^"]+)"', teach.teach_part(None))
    assert len(links) == 4
    for target in links:
        assert (tmp_path / target).is_file()
    monkeypatch.setattr(teach, "lessons", lambda book: [])
    assert "No chapter" in teach.teach_part(None)


# --- prose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paragraph", "first"),
    [
        ("One. Two.", "One."),
        ("Zhao et al. (2021) ask. Then more.", "Zhao et al. (2021) ask."),
        ("Let $x. Y$ be small. Go.", "Let $x. Y$ be small."),
        ("Use `a. B`! It works.", "Use `a. B`!"),
        ("**Bold. Still bold.** Rest.", "**Bold.**"),
        ("No end", "No end"),
    ],
)
def test_the_first_sentence_of_a_paragraph(paragraph, first):
    assert prose.first_sentence(paragraph) == first


def test_a_first_sentence_of_a_word_or_two_takes_the_next_one_along():
    assert prose.opening("**Speed.** The last row is the mistake. More.") == (
        "**Speed.** The last row is the mistake."
    )
    assert prose.opening("This says enough alone. More.") == "This says enough alone."
    assert prose.opening("Short.") == "Short."


def test_formulas_and_lists_come_before_paragraphs():
    many = "\n\n".join(f"Paragraph {i}. More." for i in range(9))
    shown = prose.points(f"{many}\n\n$$x$$\n\n- a\n- b", most=4)
    assert shown == ["Paragraph 0. More.", "Paragraph 1. More.", "$$x$$", "- a\n- b"]


def test_code_that_only_prints_the_labs_sentences_is_no_code_to_show():
    assert slides._code("print(tables.said(x))\ntables.methods_table(x)") == ""
    assert "3 + 4" in slides._code("x = 1\nprint(3 + 4)")


# --- assignments ----------------------------------------------------------------------------------

MARKED = re.compile(r"^( *)### BEGIN SOLUTION.*?### END SOLUTION$", re.DOTALL | re.MULTILINE)


def run(cells, change):
    """Execute an assignment's code, its answers changed; what is defined in the end."""
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile(change("".join(cell["source"])), "cell", "exec"), space)
    return space


def test_an_assignment_passes_with_its_answers_and_fails_without(packed, capsys):
    notebook = json.loads(text(packed / "nbgrader/source/tiny/tiny.ipynb"))
    assert grading.violations(notebook) == []
    kinds = [cell["metadata"]["nbgrader"] for cell in notebook["cells"]]
    assert [kind["grade"] for kind in kinds] == [False, False, False, False, True]
    assert [kind["solution"] for kind in kinds] == [False, False, False, True, False]
    run(notebook["cells"], lambda code: code)
    assert capsys.readouterr().out.startswith("Correct: The rank for a budget")
    blank = lambda code: MARKED.sub(r"\1raise NotImplementedError()", code)  # noqa: E731
    assert "reference" not in "".join(blank("".join(c["source"])) for c in notebook["cells"])
    with pytest.raises(AssertionError, match="Not yet"):
        run(notebook["cells"], blank)
    mistaken = lambda code: MARKED.sub(r"\1return max(1, int(kept * min(m, n)))", code)  # noqa: E731
    with pytest.raises(AssertionError, match="a part of the full rank"):
        run(notebook["cells"], mistaken)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_chapters_assignment_keeps_to_the_schema(name):
    notebook = build.read_source(NOTEBOOKS / f"{name}.py")
    tasks = practice.tasks(notebook)
    made = grading.assignment(notebook, tasks, name)
    assert grading.violations(made) == []
    for cell in made.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert cell.source.count("### BEGIN") == cell.source.count("### END")
        if cell.metadata["nbgrader"]["solution"]:
            assert "### BEGIN SOLUTION" in cell.source
            assert ".check(" not in cell.source
    answers = [cell for cell in made.cells if cell.metadata["nbgrader"]["solution"]]
    assert len(answers) == len(tasks)


def test_a_gpu_kernel_gets_its_own_body_as_an_answer():
    name = "06_hardware/2_codesign"
    tasks = practice.tasks(build.read_source(NOTEBOOKS / f"{name}.py"))
    task = next(one for one in tasks if len(one.answers) == 2)
    code = grading.solved(task)
    kernel, _, plain = code.partition("else:")
    assert "tl.store(" in kernel or "no reference" in kernel
    assert f"return {task.check}.reference(a, b, size)" in plain
    assert code.count("### BEGIN SOLUTION") == 2


def graded(**changes):
    about = {
        "schema_version": 3, "grade": True, "solution": False, "locked": True, "task": False,
        "grade_id": "one-test", "points": 2,
    }  # fmt: skip
    about |= changes
    metadata = {"nbgrader": {k: v for k, v in about.items() if v is not None}}
    return {"cell_type": "code", "metadata": metadata, "source": ""}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": 2}, "version 2"),
        ({"schema_version": "3"}, "'schema_version' is '3'"),
        ({"locked": None}, "'locked' is missing"),
        ({"grade_id": "a b"}, "other letters"),
        ({"grade_id": None}, "is empty"),
        ({"points": None}, "has points"),
        ({"points": True}, "'points' is True"),
        ({"points": -1}, "has points"),
        ({"difficulty": "easy"}, "unknown to the schema"),
        ({"task": True}, "a task is a Markdown cell"),
    ],
)
def test_metadata_that_nbgrader_would_refuse_are_found(changes, said):
    assert grading.violations({"cells": [graded()]}) == []
    found = grading.violations({"cells": [graded(**changes)]})
    assert len(found) == 1
    assert said in found[0]


def test_a_name_that_comes_twice_is_found():
    assert "not the first" in grading.violations({"cells": [graded(), graded()]})[0]


# --- what a class guessed -------------------------------------------------------------------------

TIMES, WHICH = "How many times?", "Which one?"


@pytest.fixture
def handed_in(tmp_path):
    """What five learners handed in: three notebooks' files, two CSV files; one of them both."""
    made = tmp_path / "handed in"
    for learner, times, which in (("a", 12.0, "PI"), ("b", 10.2, "YaRN"), ("c", None, "PI")):
        (made / learner).mkdir(parents=True)
        rows = [
            {"question": TIMES, "guess": times, "answer": "10 %", "unit": "%"},
            {"question": WHICH, "guess": which, "answer": "YaRN"},
        ]
        (made / learner / "chapter.guesses.json").write_text(json.dumps(rows))
    with (made / "a" / "my_guesses.csv").open("w", newline="") as file:  # the same once more
        csv.writer(file).writerows([["question", "guess", "answer"], [TIMES, "12 %", "10 %"]])
    for number, guess in enumerate(("2,000 %", "30 %")):
        with (made / f"{number}.csv").open("w", newline="") as file:
            rows = [["question", "guess", "answer"], [TIMES, guess, "10 %"]]
            csv.writer(file).writerows(rows)
    return made


def test_a_class_is_summed_up(handed_in, tmp_path, capsys):
    times, which = sorted(
        predictions.summarize(predictions.read(handed_in)), key=lambda s: s.question
    )
    assert sorted(times.guesses) == [10.2, 12.0, 30.0, 2000.0]
    assert (times.skipped, times.answer, times.right) == (1, 10.0, 1)
    assert times.error == "too high, 3 of 3 wrong guesses, typically by a factor of 3"
    assert sorted(which.guesses) == ["PI", "PI", "YaRN"]
    assert (which.answer, which.right) == ("YaRN", 1)
    assert which.error == "“PI”, 2 of 2 wrong answers"
    out = tmp_path / "summary"
    assert predictions.main([str(handed_in), "--out", str(out)]) == 0
    assert "too high, 3 of 3" in capsys.readouterr().out
    page = text(out / "predictions.html")
    assert page.count("<img ") == 2
    assert 'alt="Guessed: median 21, from 10.2 to 2000. Came out: 10. Right: 1."' in page
    rows = list(csv.DictReader(text(out / "predictions.csv").splitlines()))
    assert {row["question"] for row in rows} == {TIMES, WHICH}
    assert "handed in" not in page  # and no learner is named


def test_guesses_that_are_not_there_get_a_sentence(tmp_path, capsys):
    assert predictions.main([str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err.lower()
    assert predictions.main([str(tmp_path)]) == 1
    assert "holds no guesses" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text('{"other": 1}')
    assert predictions.main([str(tmp_path)]) == 1
    assert "mine.json does not hold guesses" in capsys.readouterr().err.replace("Mine", "mine")


def test_what_a_notebook_exports_is_what_is_read(tmp_path):
    from effnb.lab.panels.guesses import Guesses, Made

    made = [Made(TIMES, 12.5, "2,048 tokens", "tokens"), Made(WHICH, None, "", "")]
    (tmp_path / "my_guesses.csv").write_text(Guesses(made).csv(), encoding="utf-8")
    first, second = predictions.read(tmp_path)
    assert (first.guess, first.answer) == (12.5, 2048.0)
    assert (second.guess, second.answer) == (None, None)


# --- is a laptop ready? ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "given", "said"),
    [
        (preflight.python, {"version": (3, 9, 1)}, "this is Python 3.9"),
        (preflight.python, {"version": (3, 14, 0)}, "needs 3.11, 3.12 or 3.13"),
        (preflight.memory, {"total": 3.0, "free": 2.0}, "has 3.0 GiB of memory"),
        (preflight.memory, {"total": 8.0, "free": 0.7}, "only 0.7 of 8.0 GiB"),
        (preflight.threads, {"cores": 1, "used": 1}, "one processor core"),
        (preflight.threads, {"cores": 8, "used": 1, "set_to": "1"}, "OMP_NUM_THREADS is 1"),
        (preflight.room, {"free": 0.1}, "0.1 GiB left"),
        (preflight.packages, {"names": ("torch", "no_such_package")}, "lacks no_such_package"),
    ],
)
def test_each_fault_is_one_sentence(check, given, said):
    with pytest.raises(preflight.Fault) as fault:
        check(**given)
    sentence = str(fault.value)
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_machine_that_has_everything_passes():
    assert preflight.python((3, 12, 0)) == "Python 3.12"
    assert preflight.memory(16.0, 8.0) == "16.0 GiB of memory, 8.0 free"
    assert preflight.threads(4, 4) == "4 cores, 4 threads"
    assert "6 packages" in preflight.packages()
    assert "with the right SHA-256" in preflight.models()
    assert "with the right SHA-256" in preflight.corpora()


def test_a_panel_answers_and_a_broken_model_does_not():
    assert preflight.panel().startswith("a panel answered in")
    with pytest.raises(preflight.Fault, match="a panel on no-model does not answer"):
        preflight.panel("no-model")


def test_a_damaged_or_missing_model_is_named(tmp_path):
    (tmp_path / "mini").mkdir()
    content = b"weights"
    (tmp_path / "mini/model.safetensors").write_bytes(content)
    about = {"bytes": 7, "sha256": hashlib.sha256(content).hexdigest()}
    manifest = tmp_path / "MANIFEST.json"
    manifest.write_text(json.dumps({"mini": {"model.safetensors": about}}))
    assert preflight.models(tmp_path) == "1 models, 1 files with the right SHA-256"
    (tmp_path / "mini/model.safetensors").write_bytes(b"Weights")
    with pytest.raises(preflight.Fault, match="model mini is damaged: run `git checkout"):
        preflight.models(tmp_path)
    (tmp_path / "mini/model.safetensors").unlink()
    with pytest.raises(preflight.Fault, match="model mini is missing"):
        preflight.models(tmp_path)
    manifest.unlink()
    with pytest.raises(preflight.Fault, match=r"MANIFEST\.json is missing"):
        preflight.models(tmp_path)


def test_the_command_counts_faults_and_ends_with_their_status(capsys):
    def broken():
        raise preflight.Fault("the disk is full: free some space.")

    def strange():
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    well = ("Python", lambda: "Python 3.12")
    assert preflight.main([], [well]) == 0
    assert "Ready, after" in capsys.readouterr().out
    assert preflight.main([], [well, ("disk", broken), ("panel", lambda: "fine")]) == 1
    said = capsys.readouterr().out
    assert "FAULT  disk            The disk is full: free some space." in said
    assert "Fine" in said
    assert "Not ready: 1 fault, after" in said
    assert preflight.main([], [("memory", strange), ("panel", broken)]) == 1
    said = capsys.readouterr().out
    assert "The package psutil cannot be imported: run `make lab` once." in said
    assert "disk" not in said


# --- a room without a network ---------------------------------------------------------------------


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """`.make/environment.py` of a small checkout whose only index is a folder of wheels."""
    shutil.copytree(ROOT / ".make", tmp_path / ".make", ignore=shutil.ignore_patterns("site"))
    index = tmp_path / "index"
    index.mkdir()
    for name in ("tiny", "builder", "weights"):
        wheel(index, name)
    (tmp_path / "data").mkdir()
    digest = hashlib.sha256((index / "weights-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    pins = f"weights==1.0 --hash=sha256:{digest}\n"
    (tmp_path / "data/model-wheels.txt").write_text(pins)
    (tmp_path / "constraints.txt").write_text("tiny==1.0\ntorch==2.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["builder>=1"]\n[project]\nname = "effnb"\n'
        'dependencies = ["tiny"]\n[project.optional-dependencies]\nlab = []\n'
    )
    spec = importlib.util.spec_from_file_location("environment", tmp_path / ".make/environment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(tmp_path / ".make"))
    for other in ("browser", "copies"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "python_in", lambda environment: Path(sys.executable))
    monkeypatch.setattr(module, "make_environment", lambda: None)
    monkeypatch.delenv("TORCH", raising=False)  # what `make test` was told is not for this copy
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return module


def wheel(folder, name):
    """An installable package without content."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_a_room_gets_every_wheel_and_a_text_that_says_how(setup, tmp_path, capfd):
    out = tmp_path / "wheels"
    assert setup.main(["wheels", str(out)]) == 0
    found = {path.name for path in out.iterdir()}
    wanted = {f"{name}-1.0-py3-none-any.whl" for name in ("tiny", "builder", "weights")}
    assert found == wanted | {"INSTALL.txt"}
    said = text(out / "INSTALL.txt")
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels make lab" in said
    assert "make preflight" in said
    assert "4 files" in capfd.readouterr().out


def test_a_wheel_that_no_index_has_ends_with_a_sentence(setup, tmp_path, capfd):
    (tmp_path / "index/tiny-1.0-py3-none-any.whl").unlink()
    assert setup.main(["wheels", str(tmp_path / "wheels")]) == 1
    assert "The package index has no tiny" in capfd.readouterr().err
    assert not (tmp_path / "wheels/INSTALL.txt").exists()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert setup.main(["wheels", str(tmp_path / "wheels")]) == 1
    assert "pyproject.toml does not say" in capfd.readouterr().err.replace("Pyproject", "pyproject")


def test_preflight_says_when_nothing_is_installed(setup, capfd):
    assert setup.main(["preflight"]) == 1
    said = capfd.readouterr().err
    assert "run `make lab` once" in said
    assert said.count("\n") == 1
