"""The page as a browser shows it: headless Chromium, from disk, wide and on a phone. A page of photographs is in
test_real_photographs.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


TEXT = "a red cat on a table."


def photograph(seed: int) -> Image.Image:
    """Soft shapes with noise: about as hard to compress as a photograph."""
    draws = np.random.default_rng(seed)
    soft = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    return Image.fromarray((np.asarray(soft) + draws.normal(0, 6, (480, 640, 3))).clip(0, 255).astype(np.uint8))


def chosen_page(number: int, words: int) -> Report:
    """A page as `lavender report` writes it: words to choose from, in groups."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(32, 32, generator=generator) for _ in range(5)]
    names = ("teacher", "base", "plain", "aligned")
    spans = [(2, 5), (6, 9), (15, 20)]
    panels = []
    for index in range(number):
        rows = []
        for word in range(words):
            heats: dict[str, torch.Tensor | None] = {
                name: maps[(index + word + place) % 5] for place, name in enumerate(names)
            }
            start, end = spans[word] if word < len(spans) else (0, 0)
            span = (start, end) if word < len(spans) else None
            rows.append(WordRow(TEXT[start:end] or f"word {word}", heats, None, span))
        group = ("best", "typical", "worst")[3 * index // number]
        panels.append(Panel(photograph(index), f"p{index}", rows, dict.fromkeys(names[1:], TEXT), TEXT, "", group))
    wide = Table(
        "Differences",
        ["score", *(f"{name} − a run with a long name" for name in names)],
        [["a", *["+0.1 (+0.0 to +0.2), better"] * 4]],
    )
    return Report(
        "A run", "", [wide], panels, [], {}, choose_words=True, commands=["lavender eval " + "a-long-path/" * 30]
    )


def test_two_hundred_pictures_fit_into_ten_megabytes(tmp_path):
    """With maps of twelve words by four sources each, which is the most that `lavender report` shows."""
    write_report(chosen_page(200, 12), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size <= 10_000_000


SHOWN = (
    "[...document.querySelectorAll('article')].map("
    "article => [...article.querySelectorAll('tbody tr')].map(row => row.offsetParent !== null))"
)
BOXES = (
    "[...document.querySelectorAll('*')].filter(one => one.scrollWidth > one.clientWidth + 1 && "
    "getComputedStyle(one).overflowX === 'auto').every(one => one.tabIndex === 0)"
)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_word_is_chosen_with_keys_and_seen_when_pointed_at(browser, width, tmp_path):  # noqa: F811
    write_report(chosen_page(3, 3), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page.set_default_timeout(300_000)
    page.goto((tmp_path / "report.html").as_uri(), wait_until="load")
    first, second, third = [True, False, False], [False, True, False], [False, False, True]
    article = page.locator("article").first
    article.scroll_into_view_if_needed()
    assert page.evaluate(SHOWN)[0] == first
    radios = article.get_by_role("group", name="reference answer").get_by_role("radio")
    assert [radios.nth(index).evaluate("e => e.labels[0].textContent") for index in range(3)] == ["red", "cat", "table"]
    radios.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(SHOWN)[0] == second
    article.locator("label").nth(2).hover()
    assert page.evaluate(SHOWN)[0] == third
    page.mouse.move(1, 1)
    assert page.evaluate(SHOWN)[0] == second
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # what is too wide scrolls in its own box, which the keyboard reaches
    assert page.evaluate(BOXES)
    page.emulate_media(media="print")
    assert page.evaluate(SHOWN)[0] == [True] * 3
    page.close()


def test_a_missing_picture_would_be_seen(scenes_page, browser, tmp_path):  # noqa: F811
    """So that the test above can fail: a page with a foreign, a broken and a too wide element."""
    text = scenes_page.read_text()
    broken = '<img src="https://192.0.2.1/x.png" alt="x"><img src="data:image/png;base64,AAAA" alt="y">'
    wide = '<div style="width: 900px">wide</div>'
    (tmp_path / "broken.html").write_text(text.replace("</body>", f"{broken}{wide}</body>"))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.goto((tmp_path / "broken.html").as_uri(), wait_until="load")
    assert any("Content Security Policy" in fault for fault in faults)
    assert page.evaluate("[...document.images].filter(image => image.naturalWidth === 0).length") == 2
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    page.close()
