"""Insertion and deletion curves, worked out by hand, with scores that look at single pixels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lavender.errors import ConfigError, NotFiniteError
from lavender.evaluation.faithfulness import (
    OcclusionCurves,
    answer_score,
    faithfulness,
    hidden,
    occlusion_curves,
    ranks_of,
)
from lavender.evaluation.look.curves import faithfulness_view
from lavender.maps import WordMaps
from lavender.students.word_maps import AnsweredPicture, processor_inputs
from lavender.words import content_words

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def board(*white: tuple[int, int], size: tuple[int, int] = (2, 5)) -> Image.Image:
    """A black picture (height, width) with some white pixels (row, col)."""
    image = Image.new("RGB", (size[1], size[0]), BLACK)
    for row, col in white:
        image.putpixel((col, row), WHITE)
    return image


def brightness_at(*pixels: tuple[int, int]):
    """A score per pixel (row, col): its red."""

    def score(pictures: Iterable[Image.Image]) -> Tensor:
        return torch.tensor([[int(np.asarray(one)[row, col, 0]) for row, col in pixels] for one in pictures])

    return score


def heat_of(*order: tuple[int, int], size: tuple[int, int] = (2, 5)) -> Tensor:
    """A map whose highest cells are in this order."""
    heat = torch.zeros(size)
    for place, cell in enumerate(order):
        heat[cell] = 1 - place / 100
    return heat


def test_the_order_is_that_of_the_map():
    ranks = ranks_of(heat_of((1, 4), (0, 2)), (2, 5))
    assert ranks[1, 4] == 0
    assert ranks[0, 2] == pytest.approx(0.1)
    assert sorted(ranks.flatten()) == pytest.approx([place / 10 for place in range(10)])


def test_equal_pixels_have_a_random_order_of_the_seed():
    flat = [ranks_of(torch.ones(2, 5), (2, 5), seed) for seed in (0, 0, 1)]
    assert np.array_equal(flat[0], flat[1])
    assert not np.array_equal(flat[0], flat[2])
    assert not np.array_equal(flat[0], np.arange(10).reshape(2, 5) / 10), "not in reading order"


def test_neighbours_share_a_place_in_large_pictures():
    """1024 × 512 pixels are ordered at 256 × 128: blocks of 4 × 4."""
    ranks = ranks_of(torch.rand(4, 3), (1024, 512))
    assert ranks.shape == (1024, 512)
    blocks = ranks.reshape(256, 4, 128, 4)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert len(np.unique(ranks)) == 256 * 128


def test_curves_by_hand():
    """Ten pixels, five steps of two. The white pixel (0, 0) is the third of the order: hidden and shown in step 2.

    The mean colour of one white pixel of ten is 25.5, rounded to even: 26.
    """
    curves = occlusion_curves(
        board((0, 0)),
        ranks_of(heat_of((1, 0), (1, 1), (0, 0)), (2, 5)),
        brightness_at((0, 0), (1, 0)),
        steps=5,
        fill="mean",
    )
    assert curves.shares.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert curves.deletion.T.tolist() == [[255, 255, 26, 26, 26, 26], [0, 26, 26, 26, 26, 26]]
    assert curves.insertion.T.tolist() == [[26, 26, 255, 255, 255, 255], [26, 0, 0, 0, 0, 0]]
    # trapezoids of width 0.2: the ends count half
    assert curves.deletion_auc.tolist() == pytest.approx([0.2 * (127.5 + 255 + 3 * 26 + 13), 0.2 * (4 * 26 + 13)])
    assert curves.insertion_auc.tolist() == pytest.approx([0.2 * (13 + 26 + 3 * 255 + 127.5), 0.2 * 13])


def test_what_matters_first_falls_first_and_rises_first():
    """The control: the same picture in the opposite order."""
    score = brightness_at((0, 0))
    first, last = (
        occlusion_curves(board((0, 0)), ranks_of(heat, (2, 5)), score, steps=10, fill="mean")
        for heat in (heat_of((0, 0)), 1 - heat_of((0, 0)))
    )
    assert float(first.deletion_auc) < float(last.deletion_auc)
    assert float(first.insertion_auc) > float(last.insertion_auc)


def test_fills():
    image = board((0, 0), (0, 1))
    assert set(np.asarray(hidden(image, "mean")).flatten().tolist()) == {51}
    photograph = Image.effect_noise((300, 200), 100).convert("RGB")
    blurred = hidden(photograph)
    assert blurred.size == photograph.size
    assert np.asarray(blurred).std() < 0.1 * np.asarray(photograph).std()
    assert np.asarray(blurred).mean() == pytest.approx(np.asarray(photograph).mean(), abs=3)


def test_wrong_settings_and_scores_are_errors():
    image, ranks = board(), np.zeros((2, 5))
    with pytest.raises(ConfigError, match="Got steps=0"):
        occlusion_curves(image, ranks, brightness_at((0, 0)), steps=0)
    with pytest.raises(ConfigError, match=r"Got fill='black'\. Expected 'blur' or 'mean'"):
        occlusion_curves(image, ranks, brightness_at((0, 0)), fill="black")  # ty: ignore[invalid-argument-type]
    with pytest.raises(NotFiniteError):
        occlusion_curves(image, ranks, lambda pictures: torch.full((len(list(pictures)), 1), torch.nan))


def test_the_faithfulness_of_a_student_has_its_controls(make_student, processor, some_scenes, captions):
    """Any weights: the curves of maps and of random orders begin and end at the same pictures."""
    model, scene = make_student(), some_scenes[0]
    words = content_words(captions[0], ("noun",))
    reading = AnsweredPicture(scene.image, "describe the picture.", captions[0], words)
    maps = WordMaps("", captions[0], words, torch.rand(len(words), 7, 9))
    calls = []
    judged = faithfulness(model, processor, reading, maps, 2, num_random=2, progress=lambda: calls.append(1))
    assert judged.names == ("the whole answer", *(word.text for word in words))
    assert len(judged.of_maps) == len(words) + 1
    assert len(judged.of_random) == 2
    assert len(calls) == len(words) + 3
    score, _ = answer_score(model, processor, reading)
    whole, nothing = score([scene.image, hidden(scene.image)])
    for target, own in enumerate(judged.of_maps):
        for curves, column in ((own, 0), *((random, target) for random in judged.of_random)):
            ends = [curves.deletion[0], curves.deletion[-1], curves.insertion[0], curves.insertion[-1]]
            found = [float(end[column]) for end in ends]
            expected = [float(end[target]) for end in (whole, nothing, nothing, whole)]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    first, second = judged.of_random
    assert not torch.allclose(first.deletion[1], second.deletion[1], atol=1e-6), "two orders hide other places"
    with pytest.raises(ConfigError, match="num_random=0"):
        faithfulness(model, processor, reading, maps, num_random=0)


def test_the_question_that_was_asked_is_the_one_that_is_scored(make_student, processor, some_scenes, captions):
    model, scene = make_student(), some_scenes[0]
    words = content_words(captions[0], ("noun",))
    shows: dict = {"type": "image"}
    asked = [{"role": "user", "content": [{"type": "text", "text": "look at"}, shows, {"type": "text", "text": "."}]}]
    reading = AnsweredPicture(scene.image, "another prompt", captions[0], words, asked)
    inputs = processor_inputs(processor, [reading])
    tokens = inputs["input_ids"][0]
    ends = tokens.tolist()
    length = len(processor.tokenizer(captions[0], add_special_tokens=False)["input_ids"])
    begin = next(at for at in range(len(ends)) if processor.decode(ends[at : at + length]).strip() == captions[0])
    with torch.no_grad():
        logits = model(**inputs).logits[0].log_softmax(dim=-1)
    expected = logits[range(begin - 1, begin + length - 1), tokens[begin : begin + length]].mean()
    score, found = answer_score(model, processor, reading)
    assert found == list(words)
    assert score([scene.image])[0, 0] == pytest.approx(float(expected), rel=1e-4)


def test_a_difference_from_random_orders_is_named():
    """AUCs by hand: of straight lines, the mean of their ends."""

    def line(start: float, end: float) -> OcclusionCurves:
        values = torch.tensor([[start], [end]], dtype=torch.float64)
        return OcclusionCurves(torch.tensor([0.0, 1.0], dtype=torch.float64), values, values.flip(0))

    from lavender.evaluation.faithfulness import Faithfulness

    judged = Faithfulness(("the whole answer",), (line(-1, -4),), (line(-1, -2), line(-1, -3)), "blur")
    (row,) = faithfulness_view(judged, 1)["rows"]
    assert row["cells"][0] == row["cells"][2] == "−2.50"
    assert row["cells"][1] == "−1.75 (−2.00 to −1.50)"
    assert row["verdict"] == "deletion below all 2, insertion below all 2"
    shares, low, high = judged.of_random[0].shares, torch.full((2, 1), -5.0), torch.full((2, 1), -1.0)
    control = (OcclusionCurves(shares, 0.9 * low, 3 * high), OcclusionCurves(shares, 0.8 * low, 2 * high))
    apart = Faithfulness(("the whole answer",), (OcclusionCurves(shares, low, high),), control, "blur")
    (row,) = faithfulness_view(apart, 1)["rows"]
    assert row["cells"][:4] == ["−5.00", "−4.25 (−4.50 to −4.00)", "−1.00", "−2.50 (−3.00 to −2.00)"]
    assert row["verdict"] == "deletion below all 2, insertion above all 2"
    middle = Faithfulness(("the whole answer",), (line(-1, -2.5),), judged.of_random, "blur")
    assert faithfulness_view(middle, 1)["rows"][0]["verdict"] == "deletion within the 2, insertion within the 2"
