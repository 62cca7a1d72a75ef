"""The built site: strictly, from disk, without a request to anywhere, with a search, and without axe's violations."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import lavender
from slow.pages import SCHEMES, WIDTHS, browser  # noqa: F401
from slow.test_accessible_pages import opened, serious

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LOOKED_AT = ("index", "how-it-works", "api")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the site, and what the strict build printed: as `make site`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "zensical.toml", folder)
    (folder / "src").symlink_to(ROOT / "src")
    runpy.run_path(str(ROOT / "docs" / "lay_out.py"))["lay_out"](folder / "build" / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    printed = ran.stdout + ran.stderr
    assert ran.returncode == 0, printed[-4000:]
    return folder / "build" / "site", printed


class Page(HTMLParser):
    """What a page links to, what it loads, and the places that links may lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := attributes.get(name))}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"] or "")
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(attributes.get("href") or "")
        elif attributes.get("src"):
            self.loaded.append(attributes["src"] or "")


def is_outside(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


def test_the_build_has_no_warning(built):
    lines = [line for line in built[1].splitlines() if line.strip()]
    assert "No issues found" in lines
    assert len(lines) == 3, lines  # started, no issues, finished


def test_every_link_leads_somewhere(built):
    pages = {path.resolve(): Page(path) for path in built[0].rglob("*.html")}
    assert len(pages) > 40
    broken, followed = [], 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in [*page.links, *page.loaded]:
            if is_outside(link) or link.startswith(("mailto:", "data:", "javascript:")):
                continue
            file, _, place = unquote(link).partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            followed += 1
            if not target.is_file() or (target in pages and place not in pages[target].places):
                broken.append(f"{path.name}: {link}")
    assert not broken
    assert followed > 1000


def test_nothing_is_loaded_from_outside(built):
    outside = {address for path in built[0].rglob("*.html") for address in Page(path).loaded if is_outside(address)}
    assert not outside


def test_every_public_name_has_a_heading_and_its_signature(built):
    page = (built[0] / "api.html").read_text()
    for name in lavender.__all__:
        assert f'id="lavender.{name}"' in page
    assert "Parameters" in page
    assert "Raises" in page


def test_the_search_has_every_page(built):
    index = json.loads((built[0] / "search.json").read_text())
    found = {item["location"].partition("#")[0] for item in index["items"]}
    for name in ("index", "data", "check", "api", "faq", "glossary", "log"):
        assert f"{name}.html" in found
    assert any("attention forcing" in item["text"] for item in index["items"])


def test_the_search_works_from_disk(built, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    faults: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((built[0] / "index.html").as_uri(), wait_until="load")
    page.click("button.md-search__button")
    page.locator("input[role=combobox]").fill("mixes samples of what it knows already")
    found = page.locator("[role=listbox] a").first
    found.wait_for(timeout=60_000)
    assert re.search(r"training\.html.*#replay$", found.get_attribute("href"))
    assert not faults
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "about"}
    page.close()


@pytest.mark.parametrize("name", LOOKED_AT)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_serious_violation(name, width, scheme, built, browser):  # noqa: F811
    page: Any = opened(browser, built[0] / f"{name}.html", width, scheme)
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
