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
from lavender.evaluation.report.figure import draw_figure, drawable, figure_of
from lavender.evaluation.report.page import (
    Curve,
    Panel,
    Report,
    Table,
    WordRow,
    render_report,
    show_number,
    styles_of,
    write_report,
)
from lavender.evaluation.report.pdf import IntervalRow, interval_figure, write_figures
from lavender.evaluation.report.pixels import map_address, map_detail, picture_addresses


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

    VOID = ("meta", "link", "img", "br", "line", "polyline", "circle", "input")

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
    assert "--x:80.77%;--y:31.82%" in page
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


def test_a_run_has_the_same_line_in_all_curves():
    points = [(0.0, 1.0), (1.0, 2.0)]
    curves = [Curve("one", "x", "y", {"plain": points, "aligned": points}), Curve("two", "x", "y", {"aligned": points})]
    assert styles_of(curves) == {"plain": 0, "aligned": 1}
    assert re.findall(r'<polyline class="stroke (s\d)"', render_report(report_of(curves=curves))) == ["s0", "s1", "s1"]
    alone = [Curve(name, "x", "y", {name: points}) for name in ("one", "two")]  # histograms of different things
    assert styles_of(alone) == {"one": 0, "two": 0}


def words_report(**parts) -> Report:
    """Two words to choose from; the first of the text has the second row."""
    maps: dict[str, torch.Tensor | None] = {"teacher": spot(1, 5), "run": None}
    rows = [WordRow("cat", maps, None, (12, 15)), WordRow("dog", maps, None, (2, 5)), WordRow("it", maps)]
    panels = [Panel(picture(), name, rows, {"run": "a"}, "a <dog> and cat.", "", name) for name in ("best", "worst")]
    panels[0].rows[1] = WordRow("<dog>", maps, None, (2, 7))
    return report_of(*panels, choose_words=True, pictures_note="By <a> rule.", commands=["lavender a <b>"], **parts)


def test_words_of_the_answer_choose_their_row():
    page = render_report(words_report())
    elements = Elements(page)
    radios = elements.all("input")
    assert [radio["name"] for radio in radios] == ["word-1"] * 3 + ["word-2"] * 3
    assert ["checked" in radio for radio in radios] == [False, True, False] * 2
    labels = re.findall(r'<label class="(w\d)"><input[^>]*>([^<]+)</label>', page)
    assert labels[:3] == [("w1", "&lt;dog&gt;"), ("w0", "cat"), ("w2", "it")]  # the last has no place in the text
    assert len(elements.all("fieldset")) == 2
    assert re.findall(r'<tr role="row" class="(r\d)">', page) == ["r0", "r1", "r2"] * 2
    for number in range(3):
        assert f".choose:has(.w{number} :checked) tbody tr:nth-child({number + 1})" in page
    assert "By &lt;a&gt; rule." in page
    assert "<li><code>lavender a &lt;b&gt;</code></li>" in page
    assert re.findall(r'<h3 class="group">(\w+)</h3>', page) == ["best", "worst"]
    assert len(elements.all("h4")) == 2
    assert elements.all("script") == []


def test_a_panel_holds_its_picture_once():
    mapped = render_report(words_report())
    assert len(re.findall(r"--picture:url\(data:image/(?:png|jpeg)", mapped)) == 2
    assert 'role="img" aria-label="a &lt;dog&gt; and cat."' in mapped
    alone = render_report(report_of(Panel(picture(), "p", [], truth="t")))
    assert "--picture:url" not in alone
    assert len(Elements(alone).all("img")) == 1


def test_many_pictures_are_reduced_until_they_fit():
    draws = np.random.default_rng(0)
    pictures = [Image.fromarray(draws.integers(0, 256, (400, 500, 3), dtype=np.uint8)) for _ in range(3)]
    sizes = {}
    for most in (10**7, 200_000, 1):
        found = picture_addresses(pictures, most)
        sides = {max(opened_address(address).size) for address in found}
        assert len(sides) == 1
        sizes[most] = (sides.pop(), sum(map(len, found)))
    assert sizes[10**7][0] == 500
    assert 160 < sizes[200_000][0] < 500
    assert sizes[200_000][1] < 201_000
    assert sizes[1][0] == 160
    drawing = Image.new("RGB", (300, 200), "red")
    assert picture_addresses([drawing])[0].startswith("data:image/png")
    assert picture_addresses(pictures)[0].startswith("data:image/jpeg")


def opened_address(address: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))


def test_maps_are_smaller_on_pages_of_many():
    sides = [map_detail(number)[0] for number in (1, 400, 401, 2000, 2001, 4001)]
    assert sides == [160, 160, 64, 64, 32, 16]
    image = opened_address(map_address(spot(1, 5), (300, 400), (40, 16)))
    assert (image.mode, image.size) == ("P", (40, 30))
    assert len(map_address(torch.rand(32, 32), (300, 400), map_detail(9600))) < 400  # with the text around it, 10 MB
    pixels = np.asarray(image.convert("RGBA"))
    assert np.unravel_index(pixels[..., 3].argmax(), (30, 40)) == (8, 31)  # the middle of cell (1, 5): 9 and 31.4
    assert pixels[0, 0, 3] == 0


def test_maps_of_pages_of_many_are_backgrounds_with_the_same_texts():
    def cells(number: int) -> list[dict[str, str | None]]:
        maps: dict[str, torch.Tensor | None] = {f"source {index}": spot(index % 5, 3) for index in range(number)}
        elements = Elements(render_report(report_of(Panel(picture(), "p", [WordRow("dog", maps)]))))
        return [one for _, one in elements.found if "alt" in one or (one.get("aria-label") or "").startswith("Map of")]

    few, many = cells(400), cells(401)
    assert [one["alt"] for one in few] == [one["aria-label"] for one in many[:400]]
    assert all(one["role"] == "img" for one in many)
    assert len(few) == len(many) - 1 == 400
    address = map_address(spot(2, 3), (11, 13), map_detail(401))
    assert (many[2]["style"] or "").endswith(f";--map:url({address})")


def test_the_figures_are_a_pdf_that_repeats(tmp_path: Path):
    rows = [
        IntervalRow("content_f1", "aligned − plain", 0.1, 0.0, 0.2),
        IntervalRow("content_f1", "aligned − base", 0.3, float("nan"), float("nan")),
    ]
    curves = full_report().curves
    for name in ("one", "two"):
        write_figures(tmp_path / f"{name}.pdf", "A run", rows, curves, full_report().panels)
    content = (tmp_path / "one.pdf").read_bytes()
    assert content == (tmp_path / "two.pdf").read_bytes()
    assert content.count(b"/Type /Page ") == 3  # intervals, curves, one picture
    axes = interval_figure(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["aligned − plain", "aligned − base"]
    drawn = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert drawn == [[0, 0], [0.0, 0.2], [0.1], [0.3]]  # zero, an interval, and both differences


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


def test_a_row_keeps_the_lines_of_its_name():
    maps: dict[str, torch.Tensor | None] = {"a": spot(1, 5)}
    figure = figure_of([Panel(picture(), "p", [WordRow("dog\nentropy 1.39 nats", maps)], {})])
    assert "dog\nentropy 1.39\nnats" in [axes.get_ylabel() for axes in figure.axes]


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
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: (drawn.append(self), savefig(self, *to, **how)))
    maps: dict[str, torch.Tensor | None] = {"a": spot(1, 5), "b": None}
    panels = [Panel(picture(), "p", [WordRow(word, maps)], {}) for word in ("x", "a much longer word")]
    draw_figure(panels, tmp_path / "figure.png")
    titled = [axes for axes in drawn[0].axes if axes.get_title() in ("a", "b")]
    assert [axes.get_title() for axes in titled] == ["a", "b"] * 2
    lefts = [axes.get_position().x0 for axes in titled]
    assert lefts[0] == pytest.approx(lefts[2])
    assert lefts[0] < lefts[1]


def test_a_dollar_in_a_caption_is_no_formula(tmp_path: Path):
    answer = "costs $5 or $6_{ and has \x18, \x1d and 狗 in it"  # what the font has not would warn
    assert drawable(answer) == "costs $5 or $6_{ and has ?, ? and ? in it"
    assert drawable("é “λ” ↑ −\n") == "é “λ” ↑ −\n"
    draw_figure([Panel(picture(), "$\\frac{", [], {"plain": answer})], tmp_path / "figure.png")
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
