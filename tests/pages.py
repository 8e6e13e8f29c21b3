"""Pages of the built book in a browser without network, for the tests of the book."""

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
OFF = "gpu quic dev-shm-usage background-networking component-update sync".split()
FLAGS = ["--headless", "--no-sandbox", "--no-first-run",
         *(f"--disable-{name}" for name in OFF)]
NO_BROWSER = (
    "The browser tests need Chromium: install it (for example `apt install chromium` "
    "or `playwright install chromium`) or name one in the variable CHROMIUM.")


@pytest.fixture(scope="session")
def book():
    if not (HTML / "index.html").exists():
        pytest.fail("There is no book to test: run `make book` first.")


@pytest.fixture(scope="session")
def site(book):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(HTML))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import Error, sync_playwright

    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser",
             "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    give_up = pytest.fail if os.environ.get("CI") else pytest.skip
    manager = sync_playwright()
    try:
        playwright = manager.start()
    except Exception as error:
        give_up("Playwright does not start; on a small Debian "
                f"`apt install libatomic1` helps. ({error})")
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
    """A page, opened once, and what was wrong with it and its requests."""

    def __init__(self, browser, site, name, width="desktop", theme="light"):
        wide, high = WIDTHS[width]
        self.context = browser.new_context(viewport={"width": wide, "height": high},
                                           color_scheme=theme)
        self.page, self.complaints = self.context.new_page(), []
        self.site, page = site, self.page
        for event, check in (
                ("console", lambda found: found.type == "error" and found.text),
                ("pageerror", lambda error: f"script: {error}"),
                ("requestfailed", lambda request: f"failed: {request.url}"),
                ("response", lambda reply: reply.status >= 400 and reply.url),
                ("request", self.elsewhere)):
            page.on(event, lambda found, check=check: self.note(check(found)))
        page.goto(f"{site}/{name}.html", wait_until="load")
        page.evaluate("window.MathJax?.startup?.promise")
        # Images further down are loaded as a reader reaches them.
        page.locator("img").evaluate_all("all => all.forEach(i => i.loading = 'eager')")
        page.wait_for_load_state("networkidle")

    def note(self, complaint):
        if complaint:
            self.complaints.append(complaint)

    def elsewhere(self, request):
        own = request.url.startswith((self.site, "data:", "blob:"))
        return not own and f"elsewhere: {request.url}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()
