"""Word maps and the small functions on maps, worked out by hand."""

from __future__ import annotations

import base64
import math
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from lavender.errors import DataError
from lavender.maps import MAX_PANELS, Dropped, Word, WordMaps, entropy, min_max, to_distribution, to_heat

MAPS = torch.tensor([[[1.0, 2.0, 5.0], [2.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
TEXT = "a red dog"
RED, DOG = Word("red", 2, 5, "red", "adjective"), Word("dog", 6, 9, "dog", "noun")


def test_heat_has_maximum_one_and_zero_stays_zero():
    torch.testing.assert_close(to_heat(MAPS)[0], torch.tensor([[0.2, 0.4, 1.0], [0.4, 0, 0]]))
    assert to_heat(MAPS)[1].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert to_heat(torch.full((2, 3), 1e-30)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_distribution_sums_to_one_and_zero_becomes_uniform():
    torch.testing.assert_close(to_distribution(MAPS)[0], torch.tensor([[0.1, 0.2, 0.5], [0.2, 0, 0]]))
    torch.testing.assert_close(to_distribution(MAPS)[1], torch.full((2, 3), 1 / 6))


def test_min_max_scales_each_map_by_itself_and_a_flat_map_becomes_zero():
    maps = torch.stack([MAPS[0] + 3, torch.full((2, 3), 7.0)])
    expected = torch.stack([torch.tensor([[0.2, 0.4, 1.0], [0.4, 0, 0]]), torch.zeros(2, 3)])
    torch.testing.assert_close(min_max(maps), expected, rtol=0, atol=1e-6)
    assert min_max(maps).max() <= 1


def test_min_max_has_a_gradient_on_a_flat_map():
    flat = torch.full((1, 5, 7), 2.0, requires_grad=True)
    min_max(flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_entropy_in_nats():
    assert entropy(torch.ones(5, 7)).item() == pytest.approx(math.log(35))
    assert entropy(torch.tensor([[0.0, 4.0], [0.0, 4.0]])).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([[0.0, 0.3]])).item() == 0
    assert entropy(MAPS).tolist() == pytest.approx(
        [-(0.1 * math.log(0.1) + 0.4 * math.log(0.2) + 0.5 * math.log(0.5)), math.log(6)]
    )


def test_any_leading_axes():
    stack = torch.rand(2, 3, 5, 7)
    for function in (to_heat, to_distribution, min_max):
        assert torch.equal(function(stack)[1, 2], function(stack[1, 2]))
    assert entropy(stack).shape == (2, 3)


def test_word_maps_know_their_grid():
    assert WordMaps("ab", TEXT, (RED, DOG), torch.zeros(2, 5, 7)).grid == (5, 7)
    assert WordMaps("ab", TEXT, (), torch.zeros(0, 5, 7)).grid == (5, 7)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (2, 35), (1, 2, 5, 7)])
def test_maps_and_words_must_be_as_many(shape):
    with pytest.raises(ValueError, match=r"for 2 words; expected \(word, rows, cols\)"):
        WordMaps("ab", TEXT, (RED, DOG), torch.zeros(shape))


def test_a_word_must_stand_at_its_span():
    with pytest.raises(ValueError, match="Got word 'dog' at 5:8, which is not in 'a red dog'"):
        WordMaps("ab", TEXT, (Word("dog", 5, 8, "dog", "noun"),), torch.zeros(1, 5, 7))


@pytest.mark.parametrize(("text", "start", "end"), [("", 3, 3), ("do", -3, -1), ("red dog", 2, 99)])
def test_a_span_must_be_of_the_text(text, start, end):
    with pytest.raises(ValueError, match="which is not in 'a red dog'"):
        WordMaps("ab", TEXT, (Word(text, start, end, "dog", "noun"),), torch.zeros(1, 5, 7))


def test_map_of_a_span_is_the_mean_of_its_words():
    maps = torch.stack([torch.full((5, 7), 0.25), torch.full((5, 7), 0.75)])
    word_maps = WordMaps("ab", TEXT, (RED, DOG), maps)

    def value(start: int, end: int) -> float | None:
        found = word_maps.map_of(start, end)
        return None if found is None else found[3, 5].item()

    assert value(2, 5) == 0.25
    assert value(6, 9) == 0.75
    assert value(2, 9) == value(4, 7) == 0.5
    assert value(0, 1) is None
    assert value(5, 6) is None  # the space between


IMAGE = Image.new("RGB", (60, 40), (0, 200, 0))


@pytest.fixture
def no_figures_left():
    yield
    pyplot.close("all")


def panels(html: str) -> list[np.ndarray]:
    """The images in a page, (height, width, 3)."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(one)))).astype(int) for one in found]


@pytest.mark.usefixtures("no_figures_left")
def test_a_plot_has_a_panel_per_word_with_the_map_over_the_image(tmp_path):
    maps = torch.zeros(2, 2, 3)
    maps[0, 0, 2] = maps[1, 1, 0] = 1  # top right, bottom left
    figure = WordMaps("ab", TEXT, (RED, DOG), maps).plot(IMAGE)
    assert [axes.get_title() for axes in figure.axes] == ["red", "dog"]
    red, dog = (np.asarray(axes.images[0].get_array()).astype(int) for axes in figure.axes)
    assert red.shape == (40, 60, 3)
    assert red[2, -3, 0] > red[-3, 2, 0] + 100  # heat is bright, the image green
    assert dog[-3, 2, 0] > dog[2, -3, 0] + 100
    figure.savefig(tmp_path / "maps.png")


@pytest.mark.usefixtures("no_figures_left")
def test_the_image_of_a_plot_is_the_argument_a_path_or_the_attribute(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a person sees it turned: 40 wide, 60 high
    IMAGE.save(tmp_path / "turned.png", exif=exif)
    words = (DOG,), torch.ones(1, 4, 8)
    given = {
        (40, 60): WordMaps("ab", TEXT, *words).plot(IMAGE),
        (60, 40): WordMaps("ab", TEXT, *words, image=IMAGE).plot(tmp_path / "turned.png"),
        (160, 320): WordMaps("ab", TEXT, *words).plot(),  # no image: the map alone, in the shape of its grid
    }
    for size, figure in given.items():
        assert np.asarray(figure.axes[0].images[0].get_array()).shape[:2] == size
    attribute = WordMaps("ab", TEXT, *words, image=IMAGE).plot()
    assert np.asarray(attribute.axes[0].images[0].get_array()).shape[:2] == (40, 60)


@pytest.mark.usefixtures("no_figures_left")
def test_a_plot_into_given_axes():
    figure, axes = pyplot.subplots(1, 3)
    assert WordMaps("ab", TEXT, (RED, DOG), torch.ones(2, 2, 3)).plot(IMAGE, axes=axes) is figure
    assert [one.get_title() for one in axes] == ["red", "dog", ""]


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0", None])
def test_a_path_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "a.eps"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"Got the image .*a\.eps, which cannot be read"):
        WordMaps("ab", TEXT, (DOG,), torch.ones(1, 2, 2)).plot(path)


@pytest.mark.usefixtures("no_figures_left")
@pytest.mark.parametrize("text", ["", "$x_$ and \\frac{", "half \ud800 of one", "a\nb\0", "dog " * 2000])
def test_maps_of_no_word_and_of_odd_texts_are_shown(text, tmp_path):
    maps = WordMaps("ab", text, (), torch.zeros(0, 2, 3))
    maps.plot().savefig(tmp_path / "maps.png")
    html = maps._repr_html_()
    assert "no word has a map" in html
    assert len(html.encode()) < 20_000
    assert len(panels(html)) == 1


@pytest.mark.usefixtures("no_figures_left")
def test_of_many_words_the_first_are_shown():
    text = "dog " * 90
    words = tuple(Word("dog", start, start + 3, "dog", "noun") for start in range(0, len(text), 4))
    maps = WordMaps("ab", text, words, torch.rand(90, 2, 3))
    assert len(maps.plot(columns=7).axes) == 42  # six rows of seven, the last two of them empty
    assert len(panels(maps._repr_html_())) == MAX_PANELS
    assert "and 50 more words" in maps._repr_html_()


def test_a_notebook_shows_the_image_and_escapes_texts():
    text = "<script>alert(1)</script> & a dog"
    place = text.index("dog")
    word, tag = Word("dog", place, place + 3, "dog", "noun"), Word("script>", 1, 8, "x", "noun")
    maps = torch.zeros(2, 2, 3)
    maps[1, 0, 0] = 1
    dropped = (Dropped("<i>", "no token for <i>"),)
    html = WordMaps("ab", text, (word, tag), maps, dropped, image=IMAGE)._repr_html_()
    assert not re.search(r"<script|<i>", html)
    assert "&lt;<b>script&gt;</b>alert(1)&lt;/script&gt; &amp; a <b>dog</b></p>" in html
    assert "<figcaption>script&gt;</figcaption>" in html
    assert "Without a map: &lt;i&gt; (no token for &lt;i&gt;)" in html
    cold, warm = panels(html)
    assert warm.shape == (40, 60, 3)
    assert warm[2, 2, 0] > cold[2, 2, 0] + 100
    assert cold[2, 2, 1] > cold[2, 2, 0]  # green


def test_the_image_is_no_part_of_the_repr():
    assert "image=" not in repr(WordMaps("ab", TEXT, (), torch.zeros(0, 2, 3), image=IMAGE))
