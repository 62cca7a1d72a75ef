"""The page: self-contained, escaped, complete; the figure: as large as its content."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavender.errors import DataError
from lavender.evaluation.report.figure import draw_figure
from lavender.evaluation.report.page import (
    Curve,
    Panel,
    Report,
    Table,
    WordRow,
    render_report,
    show_number,
    write_report,
)


def picture(width: int = 13, height: int = 11) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def spot(row: int, column: int, grid: tuple[int, int] = (5, 7)) -> torch.Tensor:
    heat = torch.zeros(grid)
    heat[row, column] = 2.0
    return heat


def mask_of(row: int, column: int, size: tuple[int, int] = (11, 13)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[row, column] = True
    return mask


def report_of(*panels: Panel, **parts) -> Report:
    return replace(Report("A run", "", [], list(panels), [], {}), **parts)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class Elements(HTMLParser):
    """Every start tag with its attributes; fails on tags that do not close in order."""

    VOID = ("meta", "link", "img", "br", "line", "polyline", "circle")

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def full_report() -> Report:
    rows = [
        WordRow("dog", {"teacher": spot(1, 5), "before": None}, mask_of(3, 10)),
        WordRow("cat", {"before": spot(4, 0), "after": torch.zeros(2, 3)}, mask_of(3, 10)),
    ]
    return report_of(
        Panel(picture(), "Scene 7", rows, {"plain": "a dog.", "aligned": ""}, truth="a dog and a cat.", note="Drawn."),
        lead="What changed.",
        tables=[
            Table(
                "Scores", ["source", "pointing", "verdict"], [["teacher", 0.5, "ok"], ["before", None, None]], "Sealed."
            )
        ],
        notes=["One seed."],
        settings={"align_weight": 10.0, "extraction": {"grid": (32, 32)}},
        curves=[Curve("Loss", "step", "L_att", {"plain": [(0, 1.0), (10, 0.5), (20, float("nan"))], "none": []})],
    )


def test_the_page_asks_nothing_of_a_network():
    page = render_report(full_report())
    elements = Elements(page)
    addresses = [
        value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses if address)
    assert not elements.all("script")
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert re.findall(r"url\((?!data:)", page) == []
    assert "default-src 'none'; img-src data:" in page


def test_texts_of_users_are_escaped_everywhere():
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    report = report_of(
        Panel(
            picture(), evil, [WordRow(evil, {evil: spot(1, 5)}, mask_of(3, 10))], {evil: evil}, truth=evil, note=evil
        ),
        title=evil,
        lead=evil,
        tables=[Table(evil, [evil, evil], [[evil, evil]], evil)],
        notes=[evil],
        settings={evil: evil},
        curves=[Curve(evil, evil, evil, {evil: [(0, 0), (1, 1)]})],
    )
    page = render_report(report)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    elements = Elements(page)
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert all((image["src"] or "").startswith("data:image/png") for image in elements.all("img"))


def test_columns_are_the_same_for_every_panel_and_gaps_are_said():
    one = Panel(picture(), "one", [WordRow("dog", {"b": spot(0, 0)})])
    two = Panel(picture(), "two", [WordRow("cat", {"a": spot(0, 0), "b": spot(1, 1)}, mask_of(1, 1))])
    page = render_report(report_of(one, two))
    heads = re.findall(r'<thead role="rowgroup">(.*)</thead>', page)
    assert len(heads) == 2
    assert all(re.findall(r">([^<>]+)</th>", head) == ["word", "true mask", "b", "a"] for head in heads)
    assert page.count("no map") == 2  # the first panel's mask and its map by "a"


def test_alternative_texts_say_where_the_maximum_is():
    page = render_report(full_report())
    alts = [image["alt"] for image in Elements(page).all("img")]
    assert all(alts)
    # pixel (3, 10) of 11 × 13: centre at 10.5 / 13 from the left, 3.5 / 11 from the top
    # (1, 5) of 5 × 7 is 2.2 rows × 1.857 columns there; that pixel has 0.909 × 0.846 of it
    assert (
        "Map of “dog” by teacher: highest 81 % from left, 32 % from top, inside the true mask, "
        "which holds 19 % of the map"
    ) in alts
    assert "left:80.77%;top:31.82%" in page
    assert "Map of “cat” by after: zero everywhere" in alts
    outside = "outside the true mask, which holds 0 % of the map"
    assert any(alt and alt.startswith("Map of “cat” by before") and alt.endswith(outside) for alt in alts)
    verdicts = re.findall(r'<div class="verdict [^>]*>([^<]+)</div>', page)
    assert verdicts == ["✓ hit · 19 %", "✗ miss · 0 %", "all zero"]
    assert "True mask of “dog”, 1 % of the picture" in alts


def decoded(page: str, alt_begins: str) -> Image.Image:
    image = next(one for one in Elements(page).all("img") if (one["alt"] or "").startswith(alt_begins))
    return Image.open(BytesIO(base64.b64decode((image["src"] or "").partition(",")[2]))).convert("RGBA")


def test_heat_is_opaque_where_hot_and_clear_where_cold():
    layer = np.asarray(decoded(render_report(full_report()), "Map of “dog” by teacher"))
    assert layer.shape == (11, 13, 4)
    assert np.unravel_index(layer[..., 3].argmax(), (11, 13)) == (3, 10)
    assert layer[3, 10, 3] > 220
    assert layer[10, 0, 3] == 0
    outside = np.asarray(decoded(render_report(full_report()), "True mask of “dog”"))
    assert outside[3, 10, 3] == 0
    assert outside[0, 0, 3] > 150


def test_large_pictures_are_reduced_and_small_ones_show_their_pixels():
    large = render_report(report_of(Panel(picture(1201, 601), "large", [], truth="t")))
    assert decoded(large, "t").size == (512, 256)
    assert 'class="card panel unmapped"' in large
    small = render_report(report_of(Panel(picture(), "small", [], truth="t")))
    assert decoded(small, "t").size == (13, 11)
    assert 'class="card panel pixelated unmapped"' in small


def test_tables_have_heads_and_numbers_stand_right():
    page = render_report(full_report())
    assert '<th scope="col" class=number>pointing</th>' in page
    assert '<th scope="col">verdict</th>' in page
    assert '<th scope="row">teacher</th>' in page
    assert re.search(r"<td class=number>0\.500</td>\s*<td>ok</td>", page)
    assert re.search(r"<td class=number>–</td>\s*<td>–</td>", page)


def test_landmarks_and_sections():
    tags = [tag for tag, _ in Elements(render_report(full_report())).found]
    assert all(tags.count(tag) == 1 for tag in ("header", "nav", "main", "footer", "h1"))
    assert tags.count("section") == 5
    empty = Elements(render_report(report_of()))
    assert empty.all("section") == []
    assert empty.all("a") == []


def test_curves_lie_on_their_axes():
    page = render_report(full_report())
    # x from 0 to 10 and y from 0.5 to 1 fill the drawing: 48 to 464 and 212 up to 30; the NaN is left out
    assert 'points="48.0,30.0 464.0,212.0 "' in page
    assert "Loss: L_att against step. plain: from 1.000 to 0.500." in page
    constant = report_of(curves=[Curve("Flat", "x", "y", {"a": [(3, 2.0)]}), Curve("None", "x", "y", {})])
    assert "No points" in render_report(constant)


def test_settings_are_flat():
    page = render_report(full_report())
    assert re.search(r"<code>extraction\.grid</code></th><td><code>\(32, 32\)</code>", page)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.5, "0.500"),
        (12.34567, "12.346"),
        (-0.25, "-0.250"),
        (0.0, "0.000"),
        (0.00012345, "0.000123"),
        (1e-5, "1e-05"),
        (3_000_000, "3000000"),
        (np.float32(0.25), "0.250"),
        (np.int64(7), "7"),
        (True, "yes"),
        ("dog", "dog"),
    ],
)
def test_numbers_as_text(value, text: str):
    assert show_number(value) == text


def test_the_file_is_the_page_and_repeats(tmp_path: Path):
    write_report(full_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(full_report())


def test_the_figure_grows_with_its_rows(tmp_path: Path):
    panel = full_report().panels[0]
    draw_figure([panel], tmp_path / "one.png")
    draw_figure([panel, panel], tmp_path / "two.png")
    one, two = opened(tmp_path / "one.png"), opened(tmp_path / "two.png")
    assert one.width == two.width
    assert two.height > 1.8 * one.height
    assert one.getpixel((0, 0)) == (255, 255, 255)
    assert np.asarray(one).min() < 40


def test_the_figure_has_room_for_long_answers_and_words(tmp_path: Path):
    """Thirty lines of an answer are taller than the maps beside them; nothing touches the edge."""
    rows = [WordRow("a very long word " * 3, {"teacher": spot(1, 5)})]
    for name, answer in (("short", "x"), ("long", "all of " * 5 * 30)):
        draw_figure([Panel(picture(130, 110), "title", rows, {"plain": answer})], tmp_path / f"{name}.png")
    short, long = (np.asarray(opened(tmp_path / f"{name}.png")) for name in ("short", "long"))
    assert long.shape[0] > short.shape[0] + 20 * 18  # a line is 0.175 inches of 120 pixels
    assert long.shape[1] == short.shape[1]
    for pixels in (short, long):
        assert all(edge.min() == 255 for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]))
    assert long[-60:].min() < 100  # the last line is drawn


def test_columns_of_panels_stand_under_each_other(tmp_path: Path, monkeypatch):
    """Also where their words are of different length: one layout for all."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: (drawn.append(self), savefig(self, *args)))
    maps: dict[str, torch.Tensor | None] = {"a": spot(1, 5), "b": None}
    panels = [Panel(picture(), "p", [WordRow(word, maps)], {}) for word in ("x", "a much longer word")]
    draw_figure(panels, tmp_path / "figure.png")
    titled = [axes for axes in drawn[0].axes if axes.get_title() in ("a", "b")]
    assert [axes.get_title() for axes in titled] == ["a", "b"] * 2
    lefts = [axes.get_position().x0 for axes in titled]
    assert lefts[0] == pytest.approx(lefts[2])
    assert lefts[0] < lefts[1]


def test_a_dollar_in_a_caption_is_no_formula(tmp_path: Path):
    draw_figure([Panel(picture(), "$\\frac{", [], {"plain": "costs $5 or $6_{"})], tmp_path / "figure.png")
    assert opened(tmp_path / "figure.png").width > 100


def test_content_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"Got a mask \(13, 11\) of 'dog'. Expected the picture's \(11, 13\)"):
        Panel(picture(), "p", [WordRow("dog", {}, mask_of(0, 0, (13, 11)))])
    with pytest.raises(DataError, match=r"Got 1 cells in a row of table 'Scores'. Expected 2"):
        Table("Scores", ["a", "b"], [[1]])
    with pytest.raises(DataError, match="Got no panel"):
        draw_figure([], tmp_path / "figure.png")


def test_the_report_stands_alone():
    program = (
        "import sys, lavender.evaluation.report.page; "
        "print([m for m in ('lavender.training', 'lavender.world', 'trl', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
