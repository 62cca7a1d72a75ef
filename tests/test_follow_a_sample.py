"""The code of docs/follow-a-sample.md runs, and prints what the page says."""

from __future__ import annotations

import doctest
import re
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "follow-a-sample.md"


def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    page = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(page, out=said.append)
    assert len(page.examples) > 40
    assert not result.failed, "".join(said)


def test_the_files_it_names_are_there():
    source = PAGE.parents[1] / "src" / "lavender"
    headings = re.findall(r"^## \d.*$", PAGE.read_text(), re.M)
    named = [path for heading in headings for path in re.findall(r"`([^`]+)`", heading)]
    assert len(named) > 10
    assert [path for path in named if not (source / path).exists()] == []
