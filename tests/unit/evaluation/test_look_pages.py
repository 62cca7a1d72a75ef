"""What the pages of `lavender look` hold: maps as tiles, levels and places by hand, and a gallery's order."""

from __future__ import annotations

import base64
import doctest
import importlib
import json
import re
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavender.data.images import image_id
from lavender.data.store import MapStore
from lavender.errors import ConfigError, DataError, ModelError
from lavender.evaluation.look.attention import ANSWER, QUESTION, ReadWord, WordAttention, require_template
from lavender.evaluation.look.gallery import gallery_page, judge, judge_of, read_gallery
from lavender.evaluation.look.kinds import kind_of
from lavender.evaluation.look.looking import MAX_WORDS
from lavender.evaluation.look.page import attention_page, detail_note, percent, render
from lavender.evaluation.look.tiles import (
    MAX_MAP_BYTES,
    atlas,
    coloured,
    detail_grid,
    levels_of,
    palette,
    place_of,
    with_means,
)
from lavender.evaluation.report.page import Panel, Report, WordRow, render_report
from lavender.maps import Word, WordMaps
from lavender.words import content_words

SHELL = {"title": "T", "lead": "L", "notes": ["a <note>"], "command": "lavender look", "faithfulness": None}
DOG = ReadWord(ANSWER, Word("dog", 2, 5, "dog", "noun"))
PET = ReadWord(QUESTION, Word("pet", 5, 8, "pet", "noun"))


def decoded(source: str) -> Image.Image:
    assert source.startswith("data:image/")
    return Image.open(BytesIO(base64.b64decode(source.partition(",")[2])))


def tile_of(kept: dict[str, Any], number: int) -> torch.Tensor:
    """A tile of an atlas, from 0 to 1."""
    rows, cols = kept["grid"]
    down, across = divmod(number, kept["columns"])
    pixels = np.asarray(decoded(kept["src"]))[down * rows : (down + 1) * rows, across * cols : (across + 1) * cols]
    return torch.from_numpy(pixels / 255)


def data_of(html: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def attention_of(words=(DOG, PET), layers=(3, 7), heads=3, grid=(5, 7), seed=0) -> WordAttention:
    """Random shares of attention: 0.5 of a row lies on the map, and 0.6 on all image keys."""
    maps = torch.rand(len(words), len(layers), heads, *grid, generator=torch.Generator().manual_seed(seed))
    maps = 0.5 * maps / maps.sum(dim=(3, 4), keepdim=True)
    return WordAttention(words, layers, maps, torch.full(maps.shape[:3], 0.6), False, ())


@pytest.mark.parametrize("name", ["attention", "gallery", "kinds", "page", "tiles"])
def test_the_examples_of_docstrings_run(name):
    module = importlib.import_module(f"lavender.evaluation.look.{name}")
    assert not doctest.testmod(module).failed


def test_the_examples_of_scores_and_curves_run():
    for module in ("faithfulness", "map_scores"):
        result = doctest.testmod(importlib.import_module(f"lavender.evaluation.{module}"))
        assert result.attempted
        assert not result.failed


# tiles


def test_levels_by_hand():
    """Cells of at least 0.2: two of six, with 0.4 + 0.2 of the attention. All of the map is 0.75."""
    levels = levels_of(torch.tensor([[[0.1, 0.4, 0.0], [0.05, 0.2, 0.0]], [[0.0] * 3, [0.0] * 3]]))
    assert levels.placed.tolist() == pytest.approx([0.75, 0])
    assert levels.region.tolist() == pytest.approx([0.6, 0])
    assert levels.area.tolist() == pytest.approx([2 / 6, 0])
    assert levels.top.tolist() == pytest.approx([0.4, 0])
    assert levels.peak.tolist()[0] == 1


def test_of_the_equal_cells_of_an_image_key_the_middle_is_its_place():
    heat = torch.zeros(9, 9)
    heat[4:7, 1:4] = 0.1
    heat[0, 8] = 0.1
    assert levels_of(heat).peak == 5 * 9 + 2


def test_means_are_first():
    maps = torch.tensor([[1.0, 3.0], [5.0, 11.0]])  # (layer, head)
    assert with_means(maps).tolist() == [[5, 3, 7], [2, 1, 3], [8, 5, 11]]


@pytest.mark.parametrize(
    ("peak", "name"),
    [
        (0, "top left, 7 % from left and 10 % from top"),
        (17, "centre, 50 % from left and 50 % from top"),
        (34, "bottom right, 93 % from left and 90 % from top"),
        (14, "middle left, 7 % from left and 50 % from top"),
    ],
)
def test_places_in_words(peak, name):
    assert place_of(peak, (5, 7)) == name


def test_shares_are_rounded_once():
    assert [percent(share) for share in (0, 4, 5, 994, 995, 1049, 1050, 10_000)] == [
        *("0.0 %", "0.0 %", "0.1 %", "9.9 %", "10 %", "10 %", "11 %", "100 %")
    ]


def test_an_atlas_holds_every_tile_by_its_own_maximum():
    maps = (
        torch.rand(7, 5, 6, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1e-3, 1, 5, 1, 1, 1, 9])[:, None, None]
    )
    kept = atlas(maps, (5, 6))
    for number, heat in enumerate(maps):
        torch.testing.assert_close(tile_of(kept, number), (heat / heat.max()).double(), atol=0.51 / 255, rtol=0)


def test_a_coarser_atlas_averages_cells():
    maps = torch.zeros(1, 4, 6)
    maps[0, 0, 0], maps[0, 3, 5] = 1.0, 0.5
    assert tile_of(atlas(maps, (2, 3)), 0).tolist() == [[1, 0, 0], [0, 0, pytest.approx(0.5, abs=1 / 255)]]


def test_all_maps_fit_into_a_page_or_the_grid_gets_coarser():
    assert detail_grid(5, 8, 32, (32, 32)) == (32, 32)
    assert detail_grid(20, 28, 28, (32, 32)) == (16, 16)
    assert detail_grid(40, 80, 64, (32, 32)) is None
    for words, layers, heads in ((5, 8, 32), (20, 28, 28), (12, 40, 40)):
        rows, cols = detail_grid(words, layers, heads, (32, 32)) or (0, 0)
        tiles = words * (layers * heads * rows * cols + (1 + layers + heads) * 1024)
        assert tiles * 4 / 3 <= MAX_MAP_BYTES


def test_a_coloured_map_has_the_colours_of_the_script():
    colours = np.array(palette()).reshape(256, 4)
    still = np.asarray(decoded(coloured(torch.tensor([[0.0, 0.5], [0.25, 1.0]]))).convert("RGBA"))
    expected = [[colours[0], colours[128]], [colours[64], colours[255]]]
    assert np.abs(still.astype(int) - np.array(expected)).max() <= 1
    assert still[0, 0, 3] == 0, "where a map is 0, the picture is seen"


# the page of a model


def test_the_page_holds_each_layer_and_head():
    seen = attention_of()
    image = Image.effect_noise((210, 150), 60).convert("RGB")
    html = render("look", SHELL | attention_page(seen, image, ("Is a pet here?", "a dog")) | {"picture_name": "p.jpg"})
    data = data_of(html)
    assert (data["layers"], data["heads"], data["grid"]) == (2, 3, [5, 7])
    for index, kept in enumerate(data["words"]):
        maps = seen.maps_WLH[index]
        summaries = [maps.mean(dim=(0, 1)), *maps.mean(dim=1), *maps.mean(dim=0)]
        for number, heat in enumerate(summaries):
            expected = (heat / heat.max()).double()
            torch.testing.assert_close(tile_of(kept["summary"], number), expected, atol=0.51 / 255, rtol=0)
        for layer in range(2):
            for head in range(3):
                heat = maps[layer, head]
                expected = (heat / heat.max()).double()
                tile = tile_of(kept["detail"], layer * 3 + head)
                torch.testing.assert_close(tile, expected, atol=0.51 / 255, rtol=0)
                view = (layer + 1) * 4 + head + 1
                assert kept["peak"][view] == heat.argmax()
                assert kept["top"][view] == pytest.approx(float(heat.max()), rel=6e-3)
                assert (kept["on_picture"][view], kept["placed"][view]) == (6000, 5000)
    assert re.findall(r'<option value="\d+">(layer \d+)</option>', html) == ["layer 3", "layer 7"]
    assert html.count(">head ") == 3
    assert re.findall(r'<button type="button" class="word" data-word="(\d)"[^>]*>(\w+)', html) == [
        *(("1", "pet"), ("0", "dog"))
    ]
    assert "60 %; 10 % without a place" in html
    assert "a &lt;note&gt;" in html


def test_every_page_has_the_same_legend(four):
    folder, records = four
    image, scale = Image.new("RGB", (70, 50)), 'low<span class="ramp" aria-hidden="true"></span>high'
    gallery, _ = gallery_page(read_gallery(store_of(folder / "maps", records, {"teacher": "t"}), folder))
    report = Report("A run", "", [], [Panel(image, "p", [WordRow("dog", {"teacher": torch.rand(5, 7)})])], [], {})
    pages = {
        "look": render("look", SHELL | attention_page(attention_of(), image, ("", "a dog")) | {"picture_name": "p"}),
        "report": render_report(report),
        "gallery": render("gallery", SHELL | gallery),
    }
    first, last = (bytes(palette()[place : place + 4]).hex() for place in (0, 4 * 255))
    for name, html in pages.items():
        legend = html.partition('class="legend"')[2].partition("</p>")[0]
        assert scale in legend, name
        assert ("the map’s maximum" in legend) == ('class="peak"' in html), name
        assert len(re.findall(r"\.ramp {[^}]*}", html)) == 1, name
        assert re.search(rf"\.ramp {{[^}}]*#{first}, [^}}]*#{last}\)", html), name


def test_maps_of_single_heads_are_left_out_by_name_where_they_do_not_fit(monkeypatch):
    seen = attention_of()
    monkeypatch.setattr("lavender.evaluation.look.tiles.MAX_MAP_BYTES", 500)
    page = attention_page(seen, Image.new("RGB", (70, 50)), ("", "a dog"))
    assert not page["data"]["has_detail"]
    data = page["data"]["words"][0]
    assert data["detail"] is None
    maps = seen.maps_WLH[0].double().flatten(-2)  # (layer, head, cell)
    tops = [maps.mean(dim=(0, 1)).max(), *maps.mean(dim=1).amax(dim=-1), *maps.mean(dim=0).amax(dim=-1)]
    assert data["top"] == pytest.approx([float(top) for top in tops], rel=0.005), "the means alone, in three digits"
    assert all(len(data[name]) == len(tops) for name in ("peak", "placed", "region", "area", "on_picture"))
    assert "Maps of one head in one layer are left out" in detail_note(seen)


def test_the_most_words_of_the_largest_models_fit_into_a_page():
    """As many layers and heads as Qwen2.5-VL-72B: their single heads are left out, with their numbers."""
    words = tuple(ReadWord(ANSWER, Word("dog", 4 * at, 4 * at + 3, "dog", "noun")) for at in range(MAX_WORDS))
    one = attention_of((DOG,), tuple(range(80)), 64, (32, 32))
    seen = WordAttention(
        words, one.layers, one.maps_WLH.expand(40, -1, -1, -1, -1), one.on_picture_WLH.expand(40, -1, -1), False, ()
    )
    image = Image.effect_noise((800, 600), 60).convert("RGB")
    page = attention_page(seen, image, ("", "dog " * MAX_WORDS))
    assert not page["data"]["has_detail"]
    assert len(render("look", SHELL | page | {"picture_name": "p"})) < 9_000_000


def test_a_page_cannot_be_broken_by_a_text_nor_load_anything():
    evil = '</script><script>alert(1)</script><img src="https://192.0.2.1/x">'
    word = ReadWord(ANSWER, Word(evil, 0, len(evil), evil, "noun"))
    image = Image.new("RGB", (70, 50))
    page = SHELL | attention_page(attention_of((word,)), image, ("", evil)) | {"picture_name": evil}
    html = render("look", page | {"title": evil, "lead": evil, "command": evil})
    assert evil not in html
    assert html.count("<script") == 2
    assert data_of(html)["words"][0]["word"] == evil
    assert "default-src 'none'" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html.partition("<body>")[2].partition("<script")[0])


def test_a_processor_without_a_template_is_refused():
    class Bare:
        chat_template = None

    with pytest.raises(ModelError, match="which has no chat template"):
        require_template(Bare(), "a model")


# kinds


def test_what_a_folder_is(tmp_path):
    for kind, mark in (("model", "config.json"), ("teacher", "model_index.json"), ("maps", "manifest.json")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / mark).write_text("{}")
        assert kind_of(str(tmp_path / kind)) == kind
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert kind_of(str(tmp_path / "run")) == kind_of(str(tmp_path / "lora")) == "model"
    assert kind_of("someone/of-the-hub") == "model"  # which loading then refuses


def test_an_unclear_or_another_folder_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="which is no model, run, teacher or map store"):
        kind_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"Got the file .*\. Expected a folder, or a hub id"):
        kind_of(str(tmp_path / "config.json"))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"which has config\.json of a vision-language model and model_index\.json"):
        kind_of(str(tmp_path))


# the gallery


def store_of(path, records, identity) -> MapStore:
    with MapStore.writer(path, identity, {}, (2, 2)) as writer:
        for image, text, maps in records:
            words = content_words(text, ("noun",))
            writer.add(WordMaps(image_id(image), text, words, torch.tensor(maps)))
    return MapStore.open(path)


@pytest.fixture
def four(tmp_path):
    """Four texts with 1, 1, 2 and 1 words: sharp, flat, half and sharp maps; and their data."""
    colours = ["red", "green", "blue", "white"]
    images = [Image.new("RGB", (20, 12), colour) for colour in colours]
    texts = ["a dog", "a cat", "a dog and a bird", "a fish"]
    corner, flat, half = [[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]
    maps = [[corner], [flat], [corner, half], [corner]]
    rows = []
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path, list(zip(images, texts, maps, strict=True))


def test_without_another_store_the_worst_is_the_most_spread(four):
    folder, records = four
    gallery = read_gallery(store_of(folder / "maps", records, {"teacher": "t"}), folder)
    assert gallery.by == "entropy"
    assert [record.maps.text for record in gallery.records] == ["a cat", "a dog and a bird", "a dog", "a fish"]
    assert [record.place for record in gallery.records] == [1, 2, 0, 3]
    assert gallery.records[0].judged[0].text == "entropy 1.39 nats"  # ln 4
    page, number = gallery_page(gallery)
    assert number == 4
    assert page["data"]["store_order"] == [1, 2, 0, 3]
    assert page["records"][1]["score"] == "worst word: bird"
    html = render("gallery", SHELL | page)
    assert html.count("data-record=") == 4
    assert re.findall(r'data-word="([^"]+)"', html) == ["cat cat", "dog dog", "bird bird", "dog dog", "fish fish"]


def test_with_annotated_masks_the_worst_points_outside(four):
    """dog: in the mask. cat: flat, its first maximum is in it, and a quarter of it. bird: half. fish: misses."""
    folder, records = four
    store = store_of(folder / "maps", records, {"teacher": "t"})
    corner, other = [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]
    masks = [[corner], [corner], [corner, corner], [other]]
    annotated = [(image, text, mask) for (image, text, _), mask in zip(records, masks, strict=True)]
    against = store_of(folder / "masks", annotated, {"teacher": "annotations"})
    assert judge_of(against) == "pointing"
    gallery = read_gallery(store, folder, against=against)
    found = {record.maps.text: [one.text for one in record.judged] for record in gallery.records}
    assert found == {
        "a fish": ["miss, 0 % of the map in the mask"],
        "a cat": ["hit, 25 % of the map in the mask"],
        "a dog and a bird": ["hit, 100 % of the map in the mask", "hit, 50 % of the map in the mask"],
        "a dog": ["hit, 100 % of the map in the mask"],
    }
    assert list(found) == ["a fish", "a cat", "a dog and a bird", "a dog"]
    worst = read_gallery(store, folder, limit=1, against=against, worst=True)
    assert [record.maps.text for record in worst.records] == ["a fish"]
    assert worst.total == 4
    dogs = read_gallery(store, folder, word="Dogs".removesuffix("s"), against=against)
    assert [record.maps.text for record in dogs.records] == ["a dog", "a dog and a bird"], "by the dogs alone they tie"
    assert dogs.total == 2


def test_every_miss_is_worse_than_every_hit():
    """cat misses with 1.8/2.8 of its map in the mask; dog hits with 1/4 of it."""
    words = content_words("a dog and a cat", ("noun",))
    maps = WordMaps("0", "a dog and a cat", words, torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.6, 0.6], [0.6, 1.0]]]))
    masks = WordMaps("0", maps.text, words, torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]]))
    dog, cat = judge(maps, masks, "pointing")
    assert (dog.verdict, cat.verdict) == ("hit", "miss")
    assert (dog.badness, cat.badness) == (pytest.approx(3 / 4), pytest.approx(1 + 1 / 2.8))


def test_with_another_teacher_the_worst_disagrees():
    """Correlations by hand: 1 with itself, −1/3 of one corner with another, none with a flat map."""
    words = content_words("a dog, a cat, a bird and a fish", ("noun",))
    corner = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    maps = WordMaps("0", "a dog, a cat, a bird and a fish", words, corner.expand(4, 2, 2))
    others = torch.stack([corner, corner.flip(1), torch.ones(2, 2)])
    other = WordMaps("0", maps.text, words[:3], others)
    judged = judge(maps, other, "disagreement")
    assert [one.badness for one in judged] == [pytest.approx(0), pytest.approx(4 / 3), 2, None]
    assert [one.text for one in judged[:2]] == ["correlation 1.00", "correlation -0.33"]
    assert judged[3].text == "not in the other store"
    assert [one.badness for one in judge(maps, None, "disagreement")] == [None] * 4


def test_words_that_the_other_store_lacks_are_counted(four):
    folder, records = four
    store = store_of(folder / "maps", records, {"teacher": "t"})
    other = store_of(folder / "other", records[:2], {"teacher": "u"})
    gallery = read_gallery(store, folder, against=other)
    assert (gallery.total, gallery.not_compared) == (4, 3)  # dog, bird and fish
    assert read_gallery(store, folder).not_compared == 0
    with pytest.raises(DataError, match="which has none of the 1 words to compare in .* name another store"):
        read_gallery(store, folder, word="fish", against=other)


def test_texts_are_spread_over_the_whole_store(tmp_path):
    """Of seven, four: not the first four."""
    rows, records = [], []
    for index in range(7):
        image = Image.new("RGB", (20, 12), (30 * index, 0, 0))
        image.save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": "a dog"}))
        records.append((image, "a dog", [[[1.0, 0.0], [0.0, 0.0]]]))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    gallery = read_gallery(store_of(tmp_path / "maps", records, {"teacher": "t"}), tmp_path, limit=4)
    assert [record.place for record in gallery.records] == [0, 1, 3, 5]


def test_records_without_a_picture_are_counted(four):
    folder, records = four
    store = store_of(folder / "maps", records, {"teacher": "t"})
    (folder / "1.png").unlink()
    Image.new("RGB", (20, 12), "black").save(folder / "1.png")
    gallery = read_gallery(store, folder)
    assert (len(gallery.records), gallery.without_picture) == (3, 1)
    with pytest.raises(DataError, match="in which no text has the word 'zebra'"):
        read_gallery(store, folder, word="zebra")
    with pytest.raises(ConfigError, match="Got --limit 0"):
        read_gallery(store, folder, limit=0)
    with pytest.raises(ConfigError, match="Got --limit 1001. Expected from 1 to 1000"):
        read_gallery(store, folder, limit=1001)
    for index in (0, 2, 3):
        Image.new("RGB", (20, 12), "black").save(folder / f"{index}.png")
    with pytest.raises(DataError, match="which has the picture and text of none of 4 records"):
        read_gallery(store, folder)


def test_what_does_not_fit_into_a_page_is_left_out(four, monkeypatch):
    folder, records = four
    gallery = read_gallery(store_of(folder / "maps", records, {"teacher": "t"}), folder)
    monkeypatch.setattr("lavender.evaluation.look.gallery.MAX_BYTES", 67_000)
    page, number = gallery_page(gallery)
    assert 0 < number < 4
    assert len(page["records"]) == number
    assert sorted(page["data"]["store_order"]) == list(range(number))
