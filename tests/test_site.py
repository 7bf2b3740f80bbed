"""The built site: links lead somewhere, nothing is fetched, no page is too wide.

``make docs`` builds it and runs this.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import sgdgp

SITE = Path(__file__).resolve().parents[1] / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
WIDTHS = (390, 1280)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

pytestmark = pytest.mark.skipif(not PAGES, reason="no site here: make docs builds it")


class Page(HTMLParser):
    """What a page is reached by, where it leads, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loads = {""}, set[str](), set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a":
            self.links.add(given.get("href", ""))
        elif tag in ("script", "img", "iframe"):
            self.loads.add(given.get("src", ""))
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.add(given.get("href", ""))


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path)


class Target(NamedTuple):
    """Where a link leads."""

    path: Path
    anchor: str

    @property
    def exists(self) -> bool:
        if not self.path.is_file():
            return False
        return self.path.suffix != ".html" or self.anchor in parsed(self.path).anchors


def target_of(page: Path, link: str) -> Target | None:
    """The place on the site, or None for one that is elsewhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link.startswith("data:"):
        return None
    path = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    return Target(path, unquote(parts.fragment))


def test_links_within_the_site_lead_somewhere():
    missing = [
        f"{page.relative_to(SITE)}: {link}"
        for page in PAGES
        for link in parsed(page).links
        if (target := target_of(page, link)) is not None and not target.exists
    ]
    assert missing == []


def test_pages_load_nothing_from_elsewhere():
    elsewhere = {
        f"{page.relative_to(SITE)}: {link}"
        for page in PAGES
        for link in parsed(page).loads
        if link and urlsplit(link).netloc
    }
    assert elsewhere == set()


def test_what_is_public_is_in_the_reference():
    inventory = pytest.importorskip("sphinx.util.inventory").InventoryFile
    known = inventory.loads((SITE / "objects.inv").read_bytes(), uri="")
    names = {name for kind in known.data.values() for name in kind}
    same = {"__version__", "initialize"}  # the second is `initialise`
    missing = [n for n in sgdgp.__all__ if f"sgdgp.{n}" not in names and n not in same]
    assert missing == []


class Handler(SimpleHTTPRequestHandler):
    """The site, the page that measures it, and what that page has found."""

    def do_GET(self) -> None:
        if self.path != "/measure":
            super().do_GET()
            return
        pages = [page.relative_to(SITE).as_posix() for page in PAGES]
        script = MEASURE % (json.dumps(WIDTHS), json.dumps(pages))
        text = f"<!doctype html><body><script>{script}</script>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.found = json.loads(self.rfile.read(length))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()
        self.server.done.set()  # type: ignore[attr-defined]

    def log_message(self, *arguments: object) -> None:
        pass


MEASURE = """(async () => {
  const found = [];
  for (const width of %s) for (const page of %s) {
    const frame = document.createElement("iframe");
    frame.style.width = width + "px";
    frame.style.height = "800px";
    const loaded = new Promise((resolve) => { frame.onload = resolve; });
    frame.src = "/" + page;
    document.body.append(frame);
    await loaded;
    const root = frame.contentDocument.documentElement;
    if (root.clientWidth < width - 20) found.push(page + ": not measured");
    if (root.scrollWidth > root.clientWidth)
      found.push(page + ": " + root.scrollWidth + " of " + root.clientWidth);
    frame.remove();
  }
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
})();"""


def test_no_page_is_wider_than_its_window(tmp_path: Path):
    named = (os.environ.get("CHROMIUM"), *map(shutil.which, BROWSERS))
    browser = next(filter(None, named), None)
    if browser is None:
        pytest.skip("no Chromium on the path, and CHROMIUM names none")
    handler = functools.partial(Handler, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.done = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={tmp_path}", "--window-size=1400,900"]
        command += [
            "--remote-debugging-port=0",  # without it, it may leave after loading
            f"http://127.0.0.1:{server.server_port}/measure",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
            finished = server.done.wait(180)  # type: ignore[attr-defined]
            process.terminate()
        server.shutdown()
    assert finished, "the browser has not answered"
    assert server.found == []  # type: ignore[attr-defined]
