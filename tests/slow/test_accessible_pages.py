"""Pages under axe-core in headless Chromium, wide and on a phone, light and dark; and `lavender look` by keyboard.

axe-core is the one that axe-playwright-python brings; no violation that it calls serious or critical is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

from command_line import lavender, write_scenes
from lavender.evaluation.look.attention import ANSWER, ReadWord, WordAttention
from lavender.evaluation.look.page import attention_page, percent, render
from lavender.evaluation.report.page import Curve, Panel, Report, Table, WordRow, write_report
from lavender.maps import Word
from lavender.world import STUDENT_PATHS
from slow.pages import SCHEMES, assert_whole, browser  # noqa: F401
from unit.evaluation.test_look_pages import SHELL, data_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WIDTHS = (1280, 390)
PAGES = ("student", "teacher", "gallery", "report")
CAPTION = (
    "A smiling astronaut in an orange suit with a white collar, a flag and a small model of the shuttle on a table."
)


@pytest.fixture(scope="module")
def pages(some_scenes, captions, store_path, tmp_path_factory) -> dict[str, Path]:
    """A page of each kind, as users get it."""
    from PIL import Image
    from skimage.data import astronaut

    folder = tmp_path_factory.mktemp("pages")
    Image.fromarray(astronaut()).save(folder / "astronaut.png")
    (folder / "data").mkdir()
    data = write_scenes(folder / "data", some_scenes, captions)
    photo = (folder / "astronaut.png", CAPTION)
    calls = {
        "student": (STUDENT_PATHS["llava"], *photo, "--faithfulness", "--steps", 2),
        "teacher": ("world", *photo),
        "gallery": (store_path, "--data", data),
    }
    paths = {name: folder / f"{name}.html" for name in PAGES}
    for name, arguments in calls.items():
        ran = lavender("look", *arguments, "--out", paths[name])
        assert ran.code == 0, ran
    write_report(_report(some_scenes, captions), paths["report"])
    return paths


def _report(scenes, captions) -> Report:
    panels = []
    for scene, caption in zip(scenes, captions, strict=True):
        arms = ("teacher", "base", "plain", "aligned")
        rows = [WordRow(one.name, {arm: torch.rand(16, 16) for arm in arms}, one.mask) for one in scene.things]
        panels.append(Panel(scene.image, f"scene {scene.seed}", rows, {"base": caption, "plain": ""}, caption))
    points = [(float(step), 1 / (step + 1)) for step in range(20)]
    curve = Curve("Loss", "step", "nats", {"plain": points, "aligned": points[::2]})
    table = Table("Scores", ["", "base", "plain", "aligned"], [["captions, object F1", 0.1, 0.2, None]] * 4, "A note.")
    return Report("A page", "What it shows.", [table], panels, ["A note."], {"a": {"b": 1}}, [curve])


def opened(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> Any:  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(path.as_uri(), wait_until="load")
    return page


def serious(page: Any) -> list[str]:
    """What axe-core calls serious or critical, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_serious_violation(name, width, scheme, pages, browser):  # noqa: F811
    page = opened(browser, pages[name], width, scheme)
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_a_violation_would_be_found(pages, browser, tmp_path):  # noqa: F811
    """So that the test above can fail: grey on grey, a picture and a button without a name."""
    broken = '<p style="color:#999;background:#aaa">pale</p><img src="data:,"><button></button>'
    path = tmp_path / "broken.html"
    path.write_text(pages["teacher"].read_text().replace("</main>", f"{broken}</main>"))
    page = opened(browser, path)
    found = {one.split()[0] for one in serious(page)}
    assert {"color-contrast", "image-alt", "button-name"} <= found
    page.close()


@pytest.mark.parametrize("name", PAGES[:3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_look_pages_are_whole_and_ask_for_nothing(name, width, scheme, pages, browser):  # noqa: F811
    assert_whole(browser, pages[name], width, scheme)


def test_words_layers_and_heads_are_chosen_by_keyboard(pages, browser):  # noqa: F811
    page, data = opened(browser, pages["student"]), data_of(pages["student"].read_text())
    words = [word["word"] for word in data["words"]]
    large = "document.querySelector('#large img').src"
    page.wait_for_selector("#controls:not([hidden])")
    page.locator(".word").first.focus()
    assert page.text_content("#status").startswith(f"“{words[0]}”: ")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == words[1] == page.text_content("#chosen-word")
    assert page.get_attribute(".word[aria-pressed=true]", "data-word") == "1"
    page.keyboard.press("End")
    assert page.text_content("#chosen-word") == words[-1]
    page.keyboard.press("Home")
    still = page.evaluate(large)
    for control, view in (("layer", data["heads"] + 1), ("head", data["heads"] + 2)):
        page.focus(f"#{control}")
        page.keyboard.press("ArrowDown")
        page.wait_for_function(f"old => {large} !== old", arg=still, timeout=20_000)
        still = page.evaluate(large)
        level = percent(data["words"][0]["on_picture"][view])
        assert page.text_content("#status").startswith(f"“{words[0]}”: {level}")
        assert page.text_content("[data-card='0'] .value").startswith(level)
    page.close()


def test_the_script_writes_and_draws_what_the_page_came_with(pages, browser):  # noqa: F811
    """Mean layers and heads, drawn by the script: the same words, and the same colours but for two roundings."""
    page = opened(browser, pages["student"])
    page.wait_for_selector("#controls:not([hidden])")
    texts = "[...document.querySelectorAll('[data-card] .value')].map(one => one.textContent)"
    pixels = """async () => {
      const image = document.querySelector('[data-card="0"] img'), canvas = document.createElement('canvas');
      await image.decode();
      [canvas.width, canvas.height] = [60, 60];
      const context = canvas.getContext('2d');
      context.fillStyle = 'white';
      context.fillRect(0, 0, 60, 60);
      context.drawImage(image, 0, 0, 60, 60);
      return [...context.getImageData(0, 0, 60, 60).data];
    }"""
    before, drawn_before = page.evaluate(texts), torch.tensor(page.evaluate(pixels)).double()
    page.evaluate("render()")
    page.wait_for_function("document.querySelector('[data-card] img').naturalWidth === 240", timeout=20_000)
    assert page.evaluate(texts) == before
    after = torch.tensor(page.evaluate(pixels)).double()
    assert (after - drawn_before).abs().mean() < 6, "of 255"
    page.select_option("#show", "particular")
    page.wait_for_timeout(2000)
    assert (torch.tensor(page.evaluate(pixels)).double() - drawn_before).abs().mean() > 6, (
        "another view looks otherwise"
    )
    ring_is_on_the_maximum = """async () => {
      const off = [];
      for (const card of document.querySelectorAll('[data-card]')) {
        const image = card.querySelector('img'), ring = card.querySelector('.peak');
        await image.decode();
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const drawn = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const levels = Array.from({ length: drawn.length / 4 }, (_, at) => drawn[4 * at + 3]);  // the opacity rises
        const top = Math.max(...levels);
        const col = Math.floor((parseFloat(ring.style.left) / 100) * canvas.width);
        const row = Math.floor((parseFloat(ring.style.top) / 100) * canvas.height);
        if (top > 0 ? levels[row * canvas.width + col] < top : !ring.hidden) off.push(card.dataset.card);
      }
      return off;
    }"""
    assert page.evaluate(ring_is_on_the_maximum) == []
    page.close()


def test_a_word_is_found_and_the_order_is_chosen(pages, browser):  # noqa: F811
    page = opened(browser, pages["gallery"])
    shown = "[...document.querySelectorAll('[data-record]')].filter(one => !one.hidden).map(one => one.dataset.record)"
    every = page.evaluate(shown)
    assert every == sorted(every, key=int)
    word = page.text_content("[data-record='1'] .name >> nth=1").strip()
    page.focus("#find")
    page.keyboard.type(word[:3].upper())
    found = page.evaluate(shown)
    assert 1 <= len(found) <= len(every)
    assert page.locator("mark", has_text=word).count() >= 1
    assert page.text_content("#status").startswith(f"{len(found)} of {len(every)} texts have “{word[:3].lower()}”")
    page.fill("#find", "")
    page.select_option("#order", "best")
    assert page.evaluate(shown) == every[::-1]
    page.select_option("#order", "store")
    order = data_of(pages["gallery"].read_text())["store_order"]
    assert page.evaluate(shown) == sorted(every, key=lambda index: order[int(index)])
    page.close()


def test_a_page_of_a_large_model_has_at_most_ten_megabytes():
    """28 layers of 28 heads, 20 words, 1024 cells of noise, which no PNG makes smaller."""
    from PIL import Image

    names = [f"word{chr(97 + index)}" for index in range(20)]
    text = " ".join(names)
    words = tuple(
        ReadWord(ANSWER, Word(name, text.index(name), text.index(name) + len(name), name, "noun")) for name in names
    )
    maps = torch.rand(20, 28, 28, 32, 32, generator=torch.Generator().manual_seed(0)) / 2000
    seen = WordAttention(words, tuple(range(28)), maps, torch.full((20, 28, 28), 0.6), False, ())
    photo = Image.effect_noise((1200, 900), 100).convert("RGB")
    html = render("look", SHELL | attention_page(seen, photo, ("", text)) | {"picture_name": "noise"})
    assert 5_000_000 < len(html.encode()) < 10_000_000
    assert data_of(html)["words"][0]["detail"]["grid"] == [16, 16]
