"""The built book in a real browser: every page, desktop and phone, light and dark, with no network."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
NO_BROWSER = (
    "The browser tests need Chromium: install it (for example `apt install chromium` or "
    "`playwright install chromium`) or name one in the environment variable CHROMIUM."
)


def toc_pages():
    names = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
    return [*names, "genindex", "search"]


@functools.cache
def soup(page):
    return BeautifulSoup((HTML / f"{page}.html").read_text(), "html.parser")


@functools.cache
def anchors(path):
    return set(re.findall(r'\s(?:id|name)="([^"]+)"', path.read_text(errors="ignore")))


@pytest.fixture(scope="session", autouse=True)
def book():
    if not (HTML / "index.html").exists():
        subprocess.run([sys.executable, str(ROOT / "book" / "build.py")], check=True)
    return HTML


@pytest.fixture(scope="session")
def site(book):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(book)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import Error, sync_playwright

    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    give_up = pytest.fail if os.environ.get("CI") else pytest.skip
    manager = sync_playwright()
    try:
        playwright = manager.start()
    except Exception as error:
        give_up(f"Playwright does not start; on a small Debian `apt install libatomic1` helps. ({error})")
    try:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
    except Error as error:
        playwright.stop()
        if program:
            raise
        give_up(f"{NO_BROWSER} ({str(error).splitlines()[0]})")
    yield chromium
    chromium.close()
    playwright.stop()


class Visit:
    """One page, opened once: what it asked for, what it complained about, and the page itself."""

    def __init__(self, browser, site, name, width="desktop", theme="light"):
        wide, high = WIDTHS[width]
        self.context = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=theme)
        self.page = self.context.new_page()
        self.complaints = []
        page, note = self.page, self.complaints.append
        page.on("console", lambda message: message.type == "error" and note(f"console: {message.text}"))
        page.on("pageerror", lambda error: note(f"script: {error}"))
        page.on("requestfailed", lambda request: note(f"failed: {request.url}"))
        page.on("response", lambda reply: reply.status >= 400 and note(f"{reply.status}: {reply.url}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((site, "data:", "blob:")) or note(f"elsewhere: {request.url}")
            ),
        )
        page.goto(f"{site}/{name}.html", wait_until="load")
        page.evaluate("window.MathJax?.startup?.promise")
        # Pictures further down are loaded as a reader reaches them.
        page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        page.wait_for_load_state("networkidle")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", toc_pages())
def test_page(browser, site, name, width, theme):
    with Visit(browser, site, name, width, theme) as visit:
        page = visit.page
        if folder := os.environ.get("MINIGEN_SCREENSHOTS"):
            page.screenshot(
                path=Path(folder) / f"{name.replace('/', '-')}-{width}-{theme}.png", full_page=True
            )
        assert visit.complaints == []
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        broken = page.evaluate(
            "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 99))"
        )
        assert broken == []
        raw = page.evaluate(
            "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container')).map(m => m.textContent)"
        )
        assert raw == [], "formulas left as they were typed"
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, "a formula with an error"
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"the page is {overflow} pixels wider than the screen"


@pytest.mark.parametrize("name", [name for name in toc_pages() if name.startswith("nbs/")])
def test_sliders_work_without_a_kernel(browser, site, name):
    picture = """output => JSON.stringify([...output.querySelectorAll('img, canvas, svg')].map(e => [
        e.tagName == 'CANVAS' ? e.toDataURL() : e.currentSrc || e.innerHTML,
        e.checkVisibility(), getComputedStyle(e).opacity, getComputedStyle(e).objectPosition]))"""
    with Visit(browser, site, name) as visit:
        sliders = visit.page.locator("article input[type=range]")
        for i in range(sliders.count()):
            slider = sliders.nth(i)
            output = slider.locator(
                "xpath=ancestor::*[contains(@class, 'cell_output') or contains(@class, 'output')][last()]"
            )
            seen = set()
            low, high = (
                float(slider.get_attribute(key) or default) for key, default in (("min", 0), ("max", 100))
            )
            for value in (low, (low + high) // 2, high):
                slider.evaluate(
                    "(e, value) => { e.value = value; for (const kind of ['input', 'change']) "
                    "e.dispatchEvent(new Event(kind, {bubbles: true})) }",
                    value,
                )
                visit.page.wait_for_timeout(50)
                seen.add(output.evaluate(picture))
            assert len(seen) > 1, f"slider {i} of {name} shows the same picture everywhere"
        assert visit.complaints == []


def test_the_book_can_be_played_with():
    chapters = [name for name in toc_pages() if name.startswith("nbs/")]
    assert any(soup(name).select("article input[type=range]") for name in chapters), "no slider anywhere"


def test_search_finds_a_chapter(browser, site):
    with Visit(browser, site, "search") as visit:
        visit.page.goto(f"{site}/search.html?q=sequence")
        visit.page.wait_for_selector("#search-results li a", timeout=15_000)
        assert visit.complaints == []


@pytest.mark.parametrize("name", toc_pages())
def test_links_lead_somewhere(name):
    lost = []
    page = HTML / f"{name}.html"
    for link in soup(name).select("a[href]"):
        url = urlparse(link["href"])
        if url.scheme or url.netloc or link["href"] == "#":
            continue
        target = (page.parent / unquote(url.path)).resolve() if url.path else page
        if not target.is_file() or (url.fragment and unquote(url.fragment) not in anchors(target)):
            lost.append(link["href"])
    assert lost == []


@pytest.mark.parametrize("name", toc_pages())
def test_page_is_for_readers(name):
    page = soup(name)
    text = page.get_text()
    assert not re.search(r"^\s*#\s*\|", text, re.M), "a directive line is shown"
    assert "application/vnd.jupyter.widget" not in str(page), "a live control is stored in the page"
    if name.startswith("nbs/"):
        colab = page.select_one("a[href^='https://colab.research.google.com/github/']")
        path = colab["href"].split("/blob/main/")[1]
        assert (ROOT / path).is_file()
        notebook = json.loads((ROOT / path).read_text())
        codes = sum(cell["cell_type"] == "code" for cell in notebook["cells"])
        assert codes and page.select(".cell_output"), "a chapter without outputs: it was not run"
