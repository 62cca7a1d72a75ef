"""The page as a browser shows it: headless Chromium, from disk, wide and on a phone. A page of photographs is in
test_real_photographs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavender.evaluation.report.page import Curve, Panel, Report, Table, WordRow, write_report
from slow.pages import SCHEMES, WIDTHS, assert_whole, browser  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def scenes_page(some_scenes, captions, tmp_path_factory) -> Path:
    """A page as the demo's: true masks, curves, tables, many arms and long words; maps are random."""
    generator = torch.Generator().manual_seed(0)
    panels = []
    for scene, caption in zip(some_scenes, captions, strict=True):
        rows = [
            WordRow(
                thing.name + " with a long name" * (len(scene.things) > 2),
                {arm: torch.rand(16, 16, generator=generator) for arm in ("teacher", "base", "plain", "aligned")},
                thing.mask,
            )
            for thing in scene.things
        ]
        panels.append(Panel(scene.image, f"scene {scene.seed}", rows, {"base": caption * 3, "plain": ""}, caption))
    points = [(float(step), 1 / (step + 1)) for step in range(20)]
    page = Report(
        "A page",
        "What it shows.",
        [Table("Scores", ["", "base", "plain", "aligned"], [["captions, object F1", 0.1, 0.2, None]] * 4, "A note.")],
        panels,
        ["A note & <another>."],
        {"a": {"b": 1}, "folder": "/a/very/long/path" * 8},
        [Curve("Loss", "step", "nats a token", {"plain": points, "aligned": points[::2]})],
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(page, path)
    return path


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_whole_and_asks_for_nothing(scenes_page, browser, width, scheme):  # noqa: F811
    assert_whole(browser, scenes_page, width, scheme)


def test_a_missing_picture_would_be_seen(scenes_page, browser, tmp_path):  # noqa: F811
    """So that the test above can fail: a page with a foreign, a broken and a too wide element."""
    text = scenes_page.read_text()
    broken = '<img src="https://192.0.2.1/x.png" alt="x"><img src="data:image/png;base64,AAAA" alt="y">'
    wide = '<div style="width: 900px">wide</div>'
    (tmp_path / "broken.html").write_text(text.replace("</body>", f"{broken}{wide}</body>"))
    page = browser.new_page(viewport={"width": 400, "height": 800})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.goto((tmp_path / "broken.html").as_uri(), wait_until="load")
    assert any("Content Security Policy" in fault for fault in faults)
    assert page.evaluate("[...document.images].filter(image => image.naturalWidth === 0).length") == 2
    assert page.evaluate("document.documentElement.scrollWidth") > 400
    page.close()
