"""The page of architectures says what the stored table says."""

import re

from effnb.book import architectures


def test_every_cell_is_on_the_page():
    table = {
        "Plain": {"traits": "nothing & more", "methods": {"A": {"works": True, "file": "model"}}},
        "Odd": {
            "traits": "experts",
            "methods": {
                "A": {"works": True, "left out": "75% are left: router."},
                "B": {"refused": "B needs <blocks>."},
                "C": {"refused": "B needs <blocks>."},
                "D": {"works": True, "not saved": "D is not saved."},
            },
        },
    }
    found = architectures.page(table)
    assert "nothing &amp; more" in found and "1 of 1: A" in found
    assert "<li>B, C: B needs &lt;blocks&gt;.</li>" in found
    assert "<li>A: 75% are left: router.</li>" in found
    assert "1 of 4: D" in found and "D is not saved." in found
    assert len(re.findall("<tr>", architectures._each(table))) == 3


def test_the_glance_has_a_mark_for_every_method_and_architecture():
    marked = {
        "right": {"works": True},
        "part": {"works": True, "left out": "x"},
        "unsaved": {"works": True, "not saved": "x"},
        "refused": {"refused": "x"},
    }
    found = architectures.glance({"Plain": {"methods": marked}, "Odd": {"methods": {}}})
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', found)
    said = {name: re.findall(r'hidden">([^<]*)<', cells) for name, cells in rows}
    assert said == {
        "right": ["right", "not run"],
        "part": ["in part", "not run"],
        "unsaved": ["in part", "not run"],
        "refused": ["refused", "not run"],
    }


def test_the_stored_table_makes_a_page():
    table = architectures.read()
    found = architectures.page(table)
    assert all(f'<th scope="row">{name}<br>' in found for name in table)
    assert len(table) >= 20
