"""The built book in a browser without network: desktop and phone, light and dark."""

import functools
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from bs4 import BeautifulSoup
from pages import HTML, ROOT, WIDTHS, Visit

PAGES = [*re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text()),
         "genindex", "search"]
CHAPTERS = [name for name in PAGES if name.startswith("nbs/")]
each_page = pytest.mark.parametrize("name", PAGES)
each_chapter = pytest.mark.parametrize("name", CHAPTERS)
pytestmark = pytest.mark.usefixtures("book")


@functools.cache
def soup(page):
    return BeautifulSoup((HTML / f"{page}.html").read_text(), "html.parser")


@functools.cache
def anchors(path):
    return set(re.findall(r'\s(?:id|name)="([^"]+)"', path.read_text(errors="ignore")))


BROKEN = """[...document.images].filter(i => !(i.complete && i.naturalWidth))
    .map(i => i.src.slice(0, 99))"""
RAW = """[...document.querySelectorAll('.math')]
    .filter(m => !m.querySelector('mjx-container')).map(m => m.textContent)"""
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
SCROLLS = """[...document.querySelectorAll('div.highlight pre')]
    .filter(pre => pre.scrollWidth > pre.clientWidth + 1)
    .map(pre => `${pre.scrollWidth - pre.clientWidth} pixels: `
                + pre.textContent.trim().split('\\n')[0])"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@each_page
def test_page(browser, site, name, width, theme):
    with Visit(browser, site, name, width, theme) as visit:
        page = visit.page
        if folder := os.environ.get("MINIGEN_SCREENSHOTS"):
            file = f"{name.replace('/', '-')}-{width}-{theme}.png"
            page.screenshot(path=Path(folder) / file, full_page=True)
        assert visit.complaints == []
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert page.evaluate(BROKEN) == [], "images that are not shown"
        assert page.evaluate(RAW) == [], "formulas left as they were typed"
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
        assert page.evaluate(OVERFLOW) <= 0, "the page is wider than the screen"


@each_chapter
def test_no_code_scrolls_sideways(browser, site, name):
    with Visit(browser, site, name) as visit:
        folded = visit.page.locator("details.hide")
        folded.evaluate_all("all => all.forEach(each => each.open = true)")
        assert visit.page.evaluate(SCROLLS) == [], f"{name}: code too wide for the page"


@each_chapter
def test_sliders_work_without_a_kernel(browser, site, name):
    image = """output => JSON.stringify([...output.querySelectorAll('img, canvas, svg')]
        .map(e => [e.tagName == 'CANVAS' ? e.toDataURL() : e.currentSrc || e.innerHTML,
                   e.checkVisibility(), getComputedStyle(e).opacity,
                   getComputedStyle(e).objectPosition]))"""
    move = """(e, value) => { e.value = value; for (const kind of ['input', 'change'])
        e.dispatchEvent(new Event(kind, {bubbles: true})) }"""
    output = """xpath=ancestor::*[contains(@class, 'cell_output')
        or contains(@class, 'output')][last()]"""
    with Visit(browser, site, name) as visit:
        for slider in visit.page.locator("article input[type=range]").all():
            low, high = (float(slider.get_attribute(key) or default)
                         for key, default in (("min", 0), ("max", 100)))
            seen = set()
            for value in (low, (low + high) // 2, high):
                slider.evaluate(move, value)
                visit.page.wait_for_timeout(50)
                seen.add(slider.locator(output).evaluate(image))
            assert len(seen) > 1, f"a slider of {name} shows the same image everywhere"
        assert visit.complaints == []


def test_the_book_can_be_played_with():
    slider = "article input[type=range]"
    assert any(soup(name).select(slider) for name in CHAPTERS), "no slider anywhere"


def test_search_finds_a_chapter(browser, site):
    with Visit(browser, site, "search") as visit:
        visit.page.goto(f"{site}/search.html?q=sequence")
        visit.page.wait_for_selector("#search-results li a", timeout=15_000)
        assert visit.complaints == []


@each_page
def test_links_lead_somewhere(name):
    lost = []
    page = HTML / f"{name}.html"
    for link in soup(name).select("a[href]"):
        url = urlparse(link["href"])
        if url.scheme or url.netloc or link["href"] == "#":
            continue
        target = (page.parent / unquote(url.path)).resolve() if url.path else page
        anchor = unquote(url.fragment)
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            lost.append(link["href"])
    assert lost == []


@each_page
def test_page_is_for_readers(name):
    page = soup(name)
    assert not re.search(r"^\s*#\s*\|", page.get_text(), re.M), "a directive is shown"
    assert "vnd.jupyter.widget" not in str(page), "a live control is stored"
    assert tempfile.gettempdir() not in page.get_text(), "a path of this machine"
    if name in CHAPTERS:
        colab = page.select_one("a[href^='https://colab.research.google.com/github/']")
        assert (ROOT / colab["href"].split("/blob/main/")[1]).is_file()
        assert page.select(".cell_output"), "a chapter without outputs: it was not run"
