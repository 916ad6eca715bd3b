"""The slides of a chapter as a teacher opens them: one file, from the disk, by the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from effnb.book.workshop.pack import read_lessons, write_pages

CHAPTER = "05_inference/2_low_rank"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of every chapter that can be taught."""
    out = tmp_path_factory.mktemp("pack")
    write_pages(out, read_lessons())
    return out


@pytest.fixture(scope="module")
def deck(pack: Path) -> Path:
    """The slides of one chapter."""
    return pack / CHAPTER / "slides.html"


def test_a_teacher_goes_through_the_slides(browser: Browser, deck: Path):
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(deck.as_uri())

    # One slide at a time, and the place is said.
    here = page.locator(".slide.here")
    expect(page.locator(".slide:visible")).to_have_count(1)
    expect(here.locator("h1")).to_have_text("Low rank")
    count = page.locator(".slide").count()
    expect(page.locator(".place")).to_have_text(f"1 / {count}")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".place")).to_have_text(f"2 / {count}")
    expect(here.locator("h2")).to_have_text("The picture")
    page.keyboard.press("ArrowLeft")

    # Notes are hidden until they are asked for; a window of the speaker's has them too.
    expect(here.locator(".notes")).to_be_hidden()
    page.keyboard.press("n")
    expect(here.locator(".notes")).to_contain_text("50 minutes")
    page.keyboard.press("n")
    with page.expect_popup() as opened:
        page.keyboard.press("s")
    expect(opened.value.locator("body")).to_contain_text("50 minutes")
    opened.value.close()

    # A panel asks for a guess first; then its slider moves, with no kernel.
    panel = page.locator("section.panel").first
    number = panel.locator("xpath=ancestor::section[contains(@class, 'slide')]").get_attribute("id")
    page.evaluate(f"location.hash = '#{number}'")
    expect(panel).to_be_visible()
    expect(panel.locator(".panel-body")).to_be_hidden()
    panel.get_by_role("button", name="Skip").click()
    before = panel.locator(".panel-frame:visible .effnb-numbers").inner_text()
    slider = panel.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("ArrowLeft" if slider.input_value() != "0" else "ArrowRight")
    expect(panel.locator(".panel-frame:visible .effnb-numbers")).not_to_have_text(before)

    # Nothing leaves the room, no slide is wider than the screen, and formulas are set.
    assert page.locator(".katex").count() > 20
    for at in range(count):
        page.evaluate(f"go({at})")
        wide = page.locator(".slide.here .stage").evaluate("s => s.scrollWidth - s.clientWidth")
        assert wide <= 2, f"slide {at + 1} is {wide} pixels too wide"
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
    assert complaints == []
    page.close()


GROUND = {"light": "rgb(250, 249, 246)", "dark": "rgb(21, 24, 28)"}


@pytest.mark.parametrize("name", ["slides", "plan", "key"])
def test_pages_of_the_pack_can_be_read_in_light_and_dark(
    browser: Browser, deck: Path, page_files: Path, name: str
):
    axe = next(page_files.glob("*-axe.min.js")).read_text(encoding="utf-8")
    page = browser.new_page()
    page.goto(deck.with_name(f"{name}.html").as_uri())
    page.evaluate(axe)
    for theme, ground in GROUND.items():
        page.emulate_media(color_scheme=theme)
        for width in (390, 768, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if name == "slides":
                place = page.locator(".place").bounding_box()
                last = page.locator(".keys button:visible").last.bounding_box()
                assert last["x"] + last["width"] < place["x"]
        slides = range(page.locator(".slide").count()) if name == "slides" else [None]
        for slide in list(slides)[::5]:  # they have few kinds, each several times
            if slide is not None:
                page.evaluate(f"go({slide})")
            place = "document" if slide is None else "slides[here]"
            found = page.evaluate(f"axe.run({place}, {{runOnly: ['color-contrast']}})")
            assert [
                f"{theme}: {node['target'][0]}: {node['failureSummary'][:200]}"
                for rule in found["violations"]
                for node in rule["nodes"]
            ] == []
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == GROUND["light"]
    page.close()


LOST = """() => slides.flatMap((slide, i) => {
    go(i);
    const stage = slide.querySelector(".stage"), body = slide.querySelector(".body"), lost = [];
    if (stage.scrollHeight > stage.clientHeight + 2) lost.push("goes on below the screen");
    if (stage.scrollWidth > stage.clientWidth + 2) lost.push("is wider than the screen");
    if (parseFloat(body.style.zoom) < 0.65) lost.push("is too small to read");
    for (const one of stage.querySelectorAll(".stage *")) {
        if (!one.offsetParent || one.matches(".katex *")) continue;
        const style = getComputedStyle(one);
        const hidden =
            (style.overflowX !== "visible" && one.scrollWidth > one.clientWidth + 2) ||
            (style.overflowY === "auto" && one.scrollHeight > one.clientHeight + 2);
        if (!hidden || one.matches(".visually-hidden, input")) continue;
        const said = one.nextElementSibling;
        const box = said && said.matches(".more") && said.getBoundingClientRect();
        const told = one.matches(".boxed[tabindex='0']") && box && box.bottom < innerHeight;
        if (!told) lost.push(`hides a part of ${one.tagName} ${one.className}`);
    }
    return lost.map((what) => `slide ${i + 1} ${what}`);
})"""


def test_every_slide_of_every_chapter_fits_or_says_that_it_goes_on(browser: Browser, pack: Path):
    page = browser.new_page()
    bad, boxes, seen = [], 0, 0
    for deck in sorted(pack.rglob("slides.html")):
        page.goto(deck.as_uri())
        for width, height in ((1280, 720), (1024, 768)):
            page.set_viewport_size({"width": width, "height": height})
            found = page.evaluate(LOST)
            bad += [f"{deck.parent.name} at {width}: {one}" for one in found]
            boxes += page.locator(".boxed").count()
        seen += page.locator(".slide").count()
    assert bad == []
    assert seen > 400 and 0 < boxes < seen / 20, "a box is the exception"

    # The measure would find a slide that is too long; one long block in it gets a box.
    page.evaluate("slides[1].querySelector('.body').append('word '.repeat(9000))")
    assert page.evaluate(LOST) != []
    page.evaluate("slides[1].querySelector('.body').innerHTML = `<div>${'<p>x</p>'.repeat(99)}`")
    assert page.evaluate(LOST) == []
    box = page.locator("#s2 .boxed")
    assert box.get_attribute("aria-label").startswith("Goes on below")
    page.close()
