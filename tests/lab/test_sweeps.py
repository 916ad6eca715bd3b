"""The runner of stored measurements: parts, tables that resume, and what is refused."""

import pytest

from effnb.lab import corpora, results, sweeps
from effnb.lab._files import forget_use

CHAPTER = "05_inference/1_pruning"


class Table(sweeps.Table):
    chapter = CHAPTER


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run parts with a command line; results and sweeps lie in a folder of the test."""
    for module in (results, sweeps):
        monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    script = tmp_path / "sweeps" / f"{CHAPTER}.py"
    script.parent.mkdir(parents=True)
    script.write_text("")

    def go(parts, *arguments):
        monkeypatch.setattr("sys.argv", [str(script), *arguments])
        return sweeps.run(parts, script, "About it.")

    yield go
    sweeps.Table.resume = False
    forget_use()


def read(part, **how):
    return results.read(f"{CHAPTER}/{part}", **how)


def test_each_part_is_stored_where_its_chapter_lies(run):
    parts = {"a": lambda: {"x": 1}, "b": lambda: {"x": 2}}
    assert run(parts, "b") == 0
    assert not read("a")
    found = read("b")
    assert found.data == {"x": 2} and found.provenance.complete
    assert found.provenance.command == f"python data/sweeps/{CHAPTER}.py b"
    assert run(parts) == 0
    assert read("a").data == {"x": 1}


def test_a_part_carries_only_what_it_read(run):
    def reading():
        corpora.documents("novels", "test")
        return {}

    run({"a": reading, "b": dict})
    assert list(read("a").provenance.sha256) == ["corpus novels"]
    assert read("b").provenance.sha256 == {}


def test_an_unknown_part_is_refused_before_any_work(run, capsys):
    with pytest.raises(SystemExit):
        run({"a": lambda: pytest.fail("it ran")}, "a", "z")
    assert "there is no part 'z'; choose from a." in capsys.readouterr().err


def test_an_interrupted_table_goes_on_where_it_ended(run):
    measured = []

    def table(stop=None):
        def part():
            corpora.documents("novels", "test")
            rows = Table("t", model="m")
            for number in range(4):
                if number == stop:
                    raise KeyboardInterrupt
                about = {"number": number}
                rows.add(about, lambda n=number: measured.append(n) or {"square": n * n})

        return {"t": part}

    with pytest.raises(KeyboardInterrupt):
        run(table(stop=2))
    assert not read("t").provenance.complete
    assert len(read("t").data["table"]) == 2
    assert run(table(), "--resume") == 0
    assert measured == [0, 1, 2, 3]
    found = read("t")
    assert found.provenance.complete
    assert found.data == {
        "model": "m",
        "table": [{"number": n, "square": n * n} for n in range(4)],
    }
    assert list(found.provenance.sha256) == ["corpus novels"]
    run(table(), "--resume")  # complete: nothing is measured
    assert measured == [0, 1, 2, 3]
    run(table())
    assert measured == [0, 1, 2, 3] * 2


def test_a_point_without_a_value_is_left_out(run):
    def part():
        rows = Table("t")
        rows.add({"n": 1}, lambda: None)
        rows.add({"n": 2}, lambda: {"x": 1})

    run({"t": part})
    assert read("t").data["table"] == [{"n": 2, "x": 1}]


def test_nothing_goes_on_with_another_model(run, capsys):
    for data in ({"table": [{"n": 1}]}, {"x": 1}):
        results.store(f"{CHAPTER}/t", data, sha256={"corpus novels": "0" * 64}, complete=False)

        def part():
            Table("t").add({"n": 1}, lambda: pytest.fail("it was measured"))

        assert run({"t": part}, "--resume") == 1
        said = capsys.readouterr().err
        assert "measured with another corpus novels" in said
        assert "Without --resume" in said
        assert read("t", any_model=True).data == data  # nothing is lost


def test_a_script_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not lie in data/sweeps/"):
        sweeps.chapter_of(tmp_path / "sweep.py")


def test_rows_hold_what_the_bench_measures(monkeypatch, capsys):
    bench = sweeps.Bench("mini-300k", questions=4, windows=2)
    row = bench.row(bench.model, method="original")
    assert row["loss"] == pytest.approx(sum(row["windows"]) / 2, abs=1e-4)
    assert set(row["answers"]) <= {"0", "1"} and len(row["answers"]) == 4
    assert row["accuracy"] == row["answers"].count("1") / 4
    weights = sum(p.numel() for p in bench.model.parameters())
    assert row["bytes"] == pytest.approx(2 * weights, rel=0.01)
    assert bench.row(bench.model, 17)["bytes"] == 17
    assert "answers" not in bench.quality(bench.model, ask=False)
    assert "windows" not in capsys.readouterr().out
