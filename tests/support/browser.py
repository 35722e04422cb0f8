"""Debian's Chromium without a window, driven by playwright, that keeps what a page asked for and what it complained of. It fakes no answer.

Tests look at pages of this machine alone: what goes elsewhere is a defect of the page and is told by `Tab.strays`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# Without a sandbox, since tests run as root; and nothing that a browser does by itself on the network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 30_000
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@dataclass
class Tab:
    """A page of the browser, in a context of its own (no cookies). `complaints` are errors of scripts and what the console says of the policy."""

    page: Page
    context: BrowserContext
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str) -> None:
        """Go there."""
        self.page.goto(url)

    @property
    def strays(self) -> list[str]:
        """What was asked of another origin than the page's."""
        own = urlsplit(self.page.url).netloc
        return [url for url in self.asked if urlsplit(url).netloc != own]

    def violations(self) -> list[str]:
        """What the page's own policy forbade."""
        return list(self.page.evaluate("window.violations"))

    def check(self) -> None:
        """Nothing from elsewhere, nothing against the policy, no error in a script."""
        assert self.strays == []
        assert self.violations() == []
        assert self.complaints == []


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser: Browser, *, width: int = 1100, height: int = 900, **options: Any) -> Iterator[Tab]:
    """A fresh one; `options` are playwright's, such as color_scheme."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(WAIT_MS)
    context.add_init_script(WATCH)
    page = context.new_page()
    opened = Tab(page, context)
    page.on("request", lambda request: opened.asked.append(request.url))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("console", lambda said: opened.complaints.append(said.text) if "Policy" in said.text else None)
    try:
        yield opened
    finally:
        context.close()


def keep_screenshot(page: Page, name: str, place: Path) -> Path:
    """A picture of the whole page in the directory NVCACHE_SCREENSHOTS, else in `place`."""
    path = Path(os.environ.get("NVCACHE_SCREENSHOTS") or place) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=True)
    return path
