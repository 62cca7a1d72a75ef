"""Scenes in many hands and of photographic cut-outs, with stand-ins for both: squares of one colour per hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lavender.errors import FileError
from lavender.world import hands, scenes, sprites
from lavender.world.hands import CUTOUTS, CUTOUTS_VARIABLE, HANDS, HANDS_VARIABLE, icon_of, render_hand
from lavender.world.language import ask_about
from lavender.world.scenes import draw_scene
from lavender.world.sprites import NAMES, NEW_NAMES

COLOURS = {hand: (36 * index, 255 - 30 * index, 20 * index) for index, hand in enumerate(HANDS[1:], start=1)}
SPARSE_HAND, ITS_NAMES = "fxemoji", ("dog", "cat", "pizza", "rocket", "house")


def clear_sprites() -> None:
    for cached in (sprites.sprite, sprites.share_of_box, scenes._scaled_sprite):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def other_sprites():
    """Stand-ins have the names of real sprites, so none may stay in the caches."""
    clear_sprites()
    yield
    clear_sprites()


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """A folder of squares, each in the colour of its hand."""
    for hand, colour in COLOURS.items():
        (tmp_path / hand).mkdir()
        for name in ITS_NAMES if hand == SPARSE_HAND else NAMES:
            Image.new("RGBA", (20, 20), (*colour, 255)).save(tmp_path / hand / f"{name}.png")
    monkeypatch.setenv(HANDS_VARIABLE, str(tmp_path))
    return tmp_path


def hands_in(scene: scenes.Scene) -> set[str]:
    """The hands of a scene's squares, by their colour; twemoji's drawings have none of the colours everywhere."""
    colours = [{tuple(map(int, pixel)) for pixel in scene.pixels[thing.mask]} for thing in scene.things]
    squares = {hand for hand, colour in COLOURS.items() for of_thing in colours if of_thing == {colour}}
    return squares | ({"twemoji"} if any(len(of_thing) > 1 for of_thing in colours) else set())


def test_each_thing_of_a_mixed_scene_has_its_own_hand(drawings):
    found = [hands_in(draw_scene(seed, "mixed")) for seed in range(60)]
    assert set().union(*found) == set(HANDS)
    assert max(len(in_scene) for in_scene in found) >= 3


def test_a_mixed_scene_is_drawn_again_from_its_seed(drawings):
    first, second = draw_scene(7, "mixed"), draw_scene(7, "mixed")
    assert np.array_equal(first.pixels, second.pixels)
    assert first.names == second.names


def test_a_scene_in_one_hand_shows_the_names_that_it_has(drawings):
    for seed in range(20):
        scene = draw_scene(seed, "mixed", hands=(SPARSE_HAND,))
        assert hands_in(scene) == {SPARSE_HAND}
        assert set(scene.names) <= set(ITS_NAMES)


def test_plain_scenes_need_no_drawings_and_do_not_change_with_them(monkeypatch, drawings):
    with_drawings = draw_scene(11)
    monkeypatch.delenv(HANDS_VARIABLE)
    clear_sprites()
    without = draw_scene(11)
    assert np.array_equal(with_drawings.pixels, without.pixels)


@pytest.mark.parametrize("folder", [None, "no-such-folder"])
def test_a_mixed_scene_without_drawings_says_how_to_get_them(monkeypatch, folder):
    monkeypatch.delenv(HANDS_VARIABLE, raising=False)
    if folder:
        monkeypatch.setenv(HANDS_VARIABLE, folder)
    with pytest.raises(FileError, match=r"Got LAVENDER_HANDS=.*python -m lavender.world.hands"):
        draw_scene(0, "mixed")


def test_a_hand_without_a_folder_is_named(drawings):
    (drawings / "noto").rename(drawings / "other")
    with pytest.raises(FileError, match="the hand 'noto'"):
        draw_scene(0, "mixed")


def test_scenes_of_cutouts_show_only_the_names_that_have_one(tmp_path, monkeypatch):
    monkeypatch.setenv(CUTOUTS_VARIABLE, str(tmp_path))
    names = ("dog", "cow", "horse", "owl", "car")
    for name in names:
        path = tmp_path / CUTOUTS[name][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (20, 20), (255, 0, 255, 255)).save(path)
    shown = [scene for seed in range(30) for scene in [draw_scene(seed, "cutout")]]
    assert {name for scene in shown for name in scene.names} == set(names)
    assert all((scene.pixels[thing.mask] == (255, 0, 255)).all() for scene in shown for thing in scene.things)


def test_scenes_of_cutouts_without_the_package_say_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv(CUTOUTS_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(FileError, match="tuxpaint-stamps-default"):
        draw_scene(0, "cutout")


def test_names_are_found_under_the_names_of_icons():
    assert icon_of("fire engine", "noto", ["oncoming-fire-engine", "fire-engine"]) == "fire-engine"
    assert icon_of("ladybug", "noto", ["lady-beetle", "bug"]) == "lady-beetle"
    assert icon_of("pizza", "streamline-emojis", ["pizza-2", "pizza-1"]) == "pizza-1"
    assert icon_of("dog", "fxemoji", ["dog", "dogside"]) == "dogside"  # "dog" is a face there
    assert icon_of("duck", "noto", ["dog"]) is None


def test_a_package_is_rendered_and_what_it_lacks_is_returned(tmp_path, monkeypatch):
    rendered = []

    def render(svg: str) -> Image.Image:
        rendered.append(svg)
        return Image.new("RGBA", (4, 4))

    monkeypatch.setattr(hands, "_render", render)
    package = tmp_path / "noto"
    package.mkdir()
    pack = {
        "icons": {"dog": {"body": "<a/>"}, "automobile": {"body": "<b/>", "width": 9}},
        "aliases": {"lady-beetle": {"parent": "dog"}},
        "width": 64,
        "height": 32,
    }
    (package / "icons.json").write_text(json.dumps(pack))
    assert render_hand(package, tmp_path / "out", ["dog", "car", "ladybug", "owl"]) == ["owl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["car.png", "dog.png", "ladybug.png"]
    assert ['viewBox="0 0 64 32"' in svg for svg in rendered] == [True, False, True]
    assert 'viewBox="0 0 9 32"' in rendered[1]
    assert rendered[2] == rendered[0]


def test_openmoji_is_no_hand_of_training():
    assert not any("openmoji" in hand for hand in HANDS)
    assert len(set(HANDS)) == len(HANDS) >= 5


def test_questions_ask_only_for_the_names_that_they_may():
    known = [name for name in NAMES if name not in NEW_NAMES]
    assert len(NEW_NAMES) == 14
    assert NEW_NAMES[:3] == ("horse", "rabbit", "penguin")
    scene = next(scene for scene in map(draw_scene, range(100)) if set(scene.names) <= set(known))
    asked = {question.name for variant in range(200) for question in ask_about(scene, variant, known)}
    assert asked - {None} <= set(known)
    assert len(asked) > 20
