"""The guide: numbers come from stored rows at measured settings, and every card cites its table."""

import re
from html import unescape

import pytest

from effnb.book.site import guide
from effnb.book.site.book import SiteError, read_book
from effnb.book.site.words import Answer, Number, read_words
from effnb.lab import results

DATA = {
    "table": [
        {"method": "original", "bytes": 100, "loss": 3.0, "right": "1110"},
        {"method": "GPTQ", "bits": 2, "bytes": 20, "loss": [3.2, 3.4], "seed": 0},
        {"method": "GPTQ", "bits": 2, "bytes": 20, "loss": [3.4, 3.6], "seed": 1},
    ],
    "times": {"int4": [2.0, 9.0, 3.0]},
}
TWO = {"method": "GPTQ", "bits": 2}
ORIGINAL = {"method": "original"}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (Number("bytes", ORIGINAL, over=TWO), "5.0"),
        (Number("loss", TWO, minus=ORIGINAL, form=".2f"), "0.40"),
        (Number("loss", ORIGINAL, minus=TWO, form=".2f"), "−0.40"),
        (Number("loss[-1:]", TWO, form=".1f"), "3.5"),
        (Number("loss", ORIGINAL, by="perplexity"), "20.1"),
        (Number("right", ORIGINAL, form=".0%"), "75%"),
        (Number("times.int4", by="median"), "3.0"),
        (Number("bytes", TWO, times=0.5, form=".0f"), "10"),
    ],
)
def test_a_number_is_read_from_rows(number, said):
    assert guide.spoken(number, DATA) == said


def test_what_is_not_measured_or_no_number_is_said():
    with pytest.raises(guide.Missing):
        guide.spoken(Number("loss", {"method": "GPTQ", "bits": 3}), DATA)
    with pytest.raises(SiteError, match="'size', which the stored rows lack"):
        guide.spoken(Number("size", TWO), DATA)
    with pytest.raises(SiteError, match="'method', which is no number"):
        guide.spoken(Number("method", TWO), DATA)


@pytest.fixture
def answer(monkeypatch):
    """A card on a stored result that is planted."""
    about = results.Provenance("make", "2030-01-31", "cpu", {})
    planted = {"x/t": results.StoredResult("x/t", DATA, about)}
    monkeypatch.setattr(
        guide.results, "read", lambda name: planted.get(name) or results.NotMeasured(name)
    )
    return lambda **numbers: Answer("g", "q?", "It is {n}.", "x/t", "The idea", numbers)


def test_a_card_without_its_measurement_is_silent(answer):
    assert guide.sentence(answer(n=Number("loss", TWO))) == "It is 3.4."
    assert guide.sentence(answer(n=Number("loss", {"bits": 5}))) is None
    assert guide.sentence(answer(n=Number("loss", TWO, table="x/none"))) is None


def test_a_result_of_another_model_is_not_quoted(answer, monkeypatch):
    def refuse(name):
        raise results.Outdated(name)

    monkeypatch.setattr(guide.results, "read", refuse)
    assert guide.sentence(answer(n=Number("loss", TWO))) is None


CARD = """
[[answer]]
goal = "g"
asked = "q?"
says = "{a} of it."
table = "x/t"
at = "The idea"
numbers.a = { of = "loss", where = { method = "GPTQ" } }
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{a}", "{b}"), "disagree on 'a'"),
        (('table = "x/t"\n', 'table = ""\n'), "'table' is empty"),
        (("of =", "off ="), "unexpected keyword argument 'off'"),
        (('asked = "q?"\n', ""), "missing 1 required positional argument: 'asked'"),
    ],
)
def test_a_card_is_checked_when_it_is_read(tmp_path, change, said):
    path = tmp_path / "x.toml"
    path.write_text(CARD, encoding="utf-8")
    assert read_words(path).answers[0].numbers["a"].where == {"method": "GPTQ"}
    path.write_text(CARD.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)):
        read_words(path)


def test_advice_with_numbers_cites_a_table_too(tmp_path):
    path = tmp_path / "x.toml"
    because = 'because = [{ claim = "C-1", part = "p" }]'
    advice = CARD.replace("[[answer]]", "[[advice]]").replace('asked = "q?"', because)
    path.write_text(advice.replace('table = "x/t"\n', 'when = "w"\nuse = "u"\n'), encoding="utf-8")
    with pytest.raises(ValueError, match="cites no table"):
        read_words(path)


@pytest.fixture(scope="module")
def book():
    return read_book()


def test_every_family_has_a_card_of_which_all_numbers_are_stored(book):
    """A card that waits for its measurement is silent; no family has only such cards."""
    silent = []
    for written in book.written:
        cards = [*written.words.advice, *written.words.answers]
        assert cards and all(card.says for card in cards if card.table), written.name
        silent += [written.name] if not any(guide.sentence(c) for c in cards if c.says) else []
    assert silent == []


def test_cards_on_the_page_speak_in_numbers_and_cite_their_tables(book):
    page = guide.advice_part(book)
    cards = re.findall(r'<section class="advice.*?</section>', page, re.DOTALL)
    assert len(cards) > 16
    for card in cards:
        said = re.search(r'<p class="advice-says">(.*?)</p>', card)
        assert said and re.search(r"\d", said[1]), card
        assert re.search(r'class="advice-table">Table: .*href="results/[^"]+\.json"', card), card
        if "advice-measured" not in card:
            assert 'class="advice-why"' in card
    files = set(re.findall(r'href="results/([^"]+)\.json"', page))
    assert files <= set(guide.tables(book))
    for name in files:
        assert (results.data_folder() / "results" / f"{name}.json").is_file()


def test_a_cache_of_two_bits_is_4_2_times_smaller(book):
    """One card, counted by hand from its table."""
    table = results.read("05_inference/3_quantization/cache").data["table"]
    byte = {
        r["bits"]: r["bytes"] for r in table if r["injected"] == "none" and r["keys"] == "channel"
    }
    (card,) = (
        one
        for written in book.written
        for one in written.words.answers
        if one.asked == "What does a cache of two bits save?"
    )
    assert f"{byte[16] / byte[2]:.1f} times smaller at two bits" in guide.sentence(card)
    assert "What does a cache of two bits save?" in unescape(guide.advice_part(book))


def test_a_card_that_cites_a_heading_of_no_chapter_is_refused(book):
    from dataclasses import replace

    written = next(one for one in book.written if one.words.answers)
    wrong = replace(written.words.answers[0], at="No such heading")
    words = replace(written.words, advice=(), answers=(wrong,))
    planted = replace(book, written=(replace(written, words=words),))
    with pytest.raises(SiteError, match="no such heading"):
        guide.advice_part(planted)
