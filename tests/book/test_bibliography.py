"""Papers become links, from one file; and a chapter's ways out follow one setting."""

import re

import pytest

from effnb.book.site.address import Home, home, web_address
from effnb.book.site.bar import ways_out
from effnb.book.site.bibliography import (
    FILE,
    Paper,
    linked,
    papers,
    papers_aside,
    papers_part,
    read,
)

LORA = "2106.09685"


def test_every_entry_can_be_reached_and_has_title_and_year():
    known = read()
    assert len(known) > 150
    for name, paper in known.items():
        assert paper.title, name
        assert 1900 < paper.year < 2030, name
        assert paper.address.startswith(("https://arxiv.org/abs/", "https://doi.org/10."))
    assert len({paper.key for paper in known.values()}) == len(known)
    assert known[LORA].title == "LoRA: Low-Rank Adaptation of Large Language Models"
    assert known[LORA].people == "Hu et al."


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("@misc{a,\n  author = {A},\n  year = {2020},\n  eprint = {2001.00001}\n}\n", "no title"),
        ("@misc{a,\n  author = {A},\n  title = {T},\n  year = {2020}\n}\n", "no eprint or doi"),
        (
            "@misc{a,\n  author = {A},\n  title = {T},\n  year = {2020},\n  doi = {10.1/x}\n}\n"
            * 2,
            "two entries",
        ),
    ],
)
def test_a_broken_entry_is_named(tmp_path, entry, said):
    path = tmp_path / "b.bib"
    path.write_text(entry)
    with pytest.raises(ValueError, match=said):
        read(path)


def test_ids_dois_and_names_become_links():
    page = linked(
        "<p>Hu et al., <em>LoRA</em>, 2021, arXiv 2106.09685. As Hu et al. (2021) say, and"
        ' Li et al., 2021. See <a href="https://arxiv.org/abs/2106.09685">this</a>,'
        " doi:10.1234/ab.c.</p>"
    )
    assert page.count('href="https://arxiv.org/abs/2106.09685"') == 3
    assert page.count('title="LoRA: Low-Rank Adaptation of Large Language Models, 2021"') == 3
    assert ">Hu et al. (2021</a>)" in page
    assert "Li et al., 2021." in page  # this page cites no paper of theirs
    assert '<a class="paper" href="https://doi.org/10.1234/ab.c">doi:10.1234/ab.c</a>.' in page
    assert "<a" not in re.sub(r"<a .*?</a>", "", page)


def test_links_are_not_put_inside_of_links_or_scripts():
    for kept in (
        '<a href="x">arXiv 2106.09685</a>',
        "<script>// arXiv 2106.09685</script>",
        "<title>arXiv 2106.09685</title>",
    ):
        assert linked(kept) == kept


def test_an_id_in_a_listing_is_found_across_its_line_break():
    page = linked(
        '<pre><span class="sd">Hu et al., 2021, arXiv</span>\n<span>2106.09685.</span></pre>'
    )
    assert '<a class="paper" href="https://arxiv.org/abs/2106.09685"' in page


def test_two_papers_of_one_author_and_year_are_not_confused():
    twins = {
        name: Paper(name, ("Wang", "others"), name, 2020, name, "", "")
        for name in ("2001.00001", "2002.00002")
    }
    text = "Wang et al., 2020, found it: arXiv 2001.00001, arXiv 2002.00002."
    assert "Wang et al., 2020, found" in linked(text, twins)
    assert ">Wang et al., 2020</a>, found" in linked(text[:-18], twins)


def test_a_chapter_lists_what_it_cites_and_the_page_of_papers_lists_all():
    aside = papers_aside([LORA, "9999.99999"], "a/b")
    assert "Papers cited in this chapter (1)" in aside
    assert 'href="../papers.html#arxiv-2106-09685"' in aside
    assert papers_aside([], "a/b") == ""
    page = papers_part({LORA: [("Delta tuning", "d.html")]})
    assert page.count("<li id=") == len(papers())
    assert 'Cited in <a href="d.html">Delta tuning</a>.' in page
    for paper in papers().values():
        assert paper.bibtex in FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        ("https://github.com/owner/name.git\n", "https://github.com/owner/name"),
        ("https://me:word@gitlab.com/a/b/c", "https://gitlab.com/a/b/c"),
        ("ssh://git@codeberg.org:22/o/n.git", "https://codeberg.org/o/n"),
        ("/srv/git/name.git", ""),
        ("", ""),
    ],
)
def test_the_web_address_of_a_remote(remote, address):
    assert web_address(remote) == address


def test_the_address_is_given_or_asked_from_git_or_absent(tmp_path, monkeypatch):
    monkeypatch.delenv("EFFNB_REPOSITORY", raising=False)
    monkeypatch.delenv("EFFNB_SITE_ADDRESS", raising=False)
    assert home(tmp_path).address == ""
    assert home(tmp_path, "https://github.com/Owner/name").site == "https://owner.github.io/name/"
    monkeypatch.setenv("EFFNB_REPOSITORY", "https://github.com/o/n")
    monkeypatch.setenv("EFFNB_SITE_ADDRESS", "https://book.example/x")
    assert home(tmp_path) == Home("https://github.com/o/n", "main", "https://book.example/x/")
    with pytest.raises(ValueError, match="is no repository's address"):
        home(tmp_path, "somewhere")


def test_without_an_address_there_are_downloads_alone():
    alone = ways_out("05_inference/1_pruning", Home())
    assert re.findall(r">([^<>]+)</a>", alone) == ["Download .ipynb", "Download .py"]
    assert 'href="../download/05_inference/1_pruning.ipynb"' in alone
    there = ways_out("05_inference/1_pruning", Home("https://github.com/o/n"))
    assert re.findall(r">([^<>]+)</a>", there)[2:] == ["Open in Colab", "Source", "Edit"]
    place = "o/n/blob/main/notebooks/05_inference/1_pruning"
    assert f"https://colab.research.google.com/github/{place}.ipynb" in there
    assert f"https://github.com/{place}.py" in there
    gitlab = Home("https://gitlab.com/o/n").buttons("a")
    assert [words for words, _ in gitlab] == ["Source", "Edit"]
    assert Home("https://codeberg.org/o/n").buttons("a") == [("Source", "https://codeberg.org/o/n")]
