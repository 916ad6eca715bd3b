"""The map of the workbook, and how it is kept in step with what is written."""

import json

import pytest

from effnb.lab import chapters


def notebook(folder, name, minutes=12, seconds=95, mebibytes=1400, cores=2):
    """A built chapter, as far as the map is concerned."""
    metadata = {"effnb": {"minutes": minutes}} if minutes is not None else {}
    if seconds is not None:
        metadata["measured"] = {"seconds": seconds, "mebibytes": mebibytes, "cores": cores}
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": metadata}))


def test_the_map_has_all_notebooks_of_the_design():
    assert len(chapters.TABLE) == 29
    counted = {}
    for name in chapters.TABLE:
        section = name.split("/")[0]
        counted[section] = counted.get(section, 0) + 1
    assert counted == {
        "00_start_here": 1,
        "01_data": 3,
        "02_design": 6,
        "03_pretraining": 1,
        "04_finetuning": 3,
        "05_inference": 8,
        "06_hardware": 3,
        "07_evaluation": 1,
        "08_selection": 2,
        "09_capstone": 1,
    }
    assert list(chapters.TABLE) == sorted(chapters.TABLE)
    assert counted.keys() == chapters.SECTIONS.keys()


def test_a_chapter_says_what_its_notebook_says(tmp_path):
    notebook(tmp_path, "05_inference/1_pruning")
    rows = {chapter.name: chapter for chapter in chapters.chapters(tmp_path)}
    pruning = rows["05_inference/1_pruning"]
    assert pruning.written
    assert (pruning.minutes, pruning.section) == (12, "Inference")
    assert pruning.measured == chapters.Measured(95, 1400, 2)
    assert [name for name, chapter in rows.items() if chapter.written] == [pruning.name]


def test_the_map_links_what_is_written_and_marks_what_is_not(tmp_path):
    notebook(tmp_path, "05_inference/1_pruning")
    notebook(tmp_path, "05_inference/2_low_rank", seconds=40)
    lines = chapters.chapter_map(tmp_path, "notebooks/").splitlines()
    row = "[Pruning](notebooks/05_inference/1_pruning.ipynb)"
    assert lines[2] == (
        f"| Inference | {row} | removing weights, heads and layers | 12 min | 2 min |"
    )
    assert lines[3].endswith("| 12 min | under 1 min |")
    # What cannot be opened yet is folded.
    assert lines[4:7] == ["", "<details><summary>27 chapters are not written yet</summary>", ""]
    assert lines[-2:] == ["", "</details>"]
    folded = lines[9:-2]
    assert len(folded) == 27
    assert not any("](" in line for line in folded)


def test_a_chapter_tells_what_its_real_model_takes(tmp_path):
    folder = tmp_path / "notebooks"
    notebook(folder, "00_start_here", minutes=10, seconds=20)
    path = folder / "00_start_here.ipynb"
    metadata = json.loads(path.read_text())["metadata"]
    metadata["effnb"]["live"] = "capital"
    path.write_text(json.dumps({"metadata": metadata}))
    assert chapters.chapters(folder)[0].live is None  # not measured yet
    stored = tmp_path / "data" / "results" / "capital.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps({"data": {"live": {"seconds": 4.6, "mebibytes": 1834}}}))
    tour = chapters.chapters(folder)[0]
    assert tour.live == chapters.Live(4.6, 1834)
    said = chapters.run_time_sentence(tour.minutes, tour.measured, tour.live)
    assert "about 4.6 s" in said
    assert "1,900 MiB" in said


def test_minutes_that_are_missing_are_asked_for(tmp_path):
    notebook(tmp_path, "09_capstone", minutes=None)
    with pytest.raises(ValueError, match=r"notebooks/09_capstone.py does not say how many minutes"):
        chapters.chapters(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "bytes_", "expected"),
    [
        (0.4, 90 * 2**20, (5, 100)),
        (5.0, 100 * 2**20, (5, 100)),
        (61.2, 1301 * 2**20, (65, 1400)),
    ],
)
def test_what_is_measured_is_rounded_up(seconds, bytes_, expected):
    measured = chapters.Measured.rounded(seconds, bytes_, 2)
    assert (measured.seconds, measured.mebibytes) == expected


def test_a_chapter_prints_its_time(tmp_path, capsys):
    notebook(tmp_path, "09_capstone", cores=1)
    chapters.run_time("09_capstone", tmp_path)
    assert capsys.readouterr().out == (
        "Reading: about 12 minutes, exercises included. Running all cells: 95 s and 1,400 MiB of "
        "memory, measured on 1 CPU core when this page was built.\n"
    )
    chapters.run_time("01_data/1_filtering", tmp_path)
    assert "measured when it is built" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no chapter 'pruning'; the map has 00_start"):
        chapters.run_time("pruning", tmp_path)


def test_the_readme_is_renewed_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{chapters.BEGIN}\nold\n{chapters.END}\nafter\n")
    notebook(tmp_path, "09_capstone")
    assert chapters.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "[Capstone](notebooks/09_capstone.ipynb)" in text
    assert not chapters.update_readme(readme, tmp_path)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="around its map"):
        chapters.update_readme(readme, tmp_path)


def test_the_ledger_of_claims_names_chapters_of_the_map():
    ledger = json.loads((chapters.NOTEBOOKS.parent / "data" / "claims.json").read_text())
    named = {name for claim in ledger["claims"].values() for name in claim["chapters"]}
    assert named
    assert named <= chapters.TABLE.keys()
