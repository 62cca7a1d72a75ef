"""Sprites that no Python package carries: the drawing hands of training, and photographic cut-outs.

*Hands* are sets of drawings of the same names. The weights are trained on all `HANDS`; nothing else needs them.
`python -m lavender.world.hands --packages FOLDER --out FOLDER` renders them from npm packages `@iconify-json/HAND`,
with the PyPI package `resvg-py`. `$LAVENDER_HANDS` names the folder of the rendered drawings.

*Cut-outs* are photographs of things with an alpha channel, from Debian's `tuxpaint-stamps-default`. No model is trained
on them. `$LAVENDER_CUTOUTS` names their folder, if it is not where Debian installs them.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from lavender.errors import FileError

HANDS = ("twemoji", "noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji", "streamline-emojis")
"""The hands of training. `twemoji` comes from a Python package, the others from npm packages. `fxemoji` and
`streamline-emojis` lack some names. OpenMoji is held out."""
HANDS_VARIABLE, CUTOUTS_VARIABLE = "LAVENDER_HANDS", "LAVENDER_CUTOUTS"
INSTALLED_CUTOUTS = Path("/usr/share/tuxpaint/stamps")
DRAWN_HEIGHT = 72  # pixels of a rendered drawing, as Twemoji's have

_ICONS: dict[str, tuple[str, ...]] = {
    "cake": ("birthdaycake",),
    "car": ("automobile",),
    "caterpillar": ("bug",),
    "house": ("house", "housebuilding"),
    "frog": ("frog", "frogface"),
    "ice cream": ("softicecream",),
    "ladybug": ("ladybeetle",),
    "pizza": ("pizza", "sliceofpizza"),
    "tree": ("deciduoustree",),
    "whale": ("spoutingwhale", "spurtingwhale"),
}
"""Name → what its icon is called, without hyphens, where that is not the name itself."""
_ICONS_OF_HAND = {
    "fxemoji": {"dog": ("dogside",), "cat": ("catside",), "pig": ("pigside",), "rabbit": ("bunnyside",)},
}

CUTOUTS: dict[str, tuple[str, ...]] = {
    "dog": ("animals/mammals/dogs/dog.png",),
    "horse": ("animals/mammals/equines/horse.png",),
    "cow": ("animals/mammals/bovines/cow.png", "animals/mammals/bovines/cow_white.png"),
    "pig": ("animals/mammals/pig.png",),
    "rabbit": ("animals/mammals/rodents/rabbit.png", "animals/mammals/rodents/rabbit-2.png"),
    "elephant": ("animals/mammals/elephant.png",),
    "monkey": ("animals/mammals/apes/chimp.png",),
    "penguin": ("animals/birds/penguin.png", "animals/birds/magellanic_penguin.png"),
    "duck": ("animals/birds/duck.png",),
    "owl": ("animals/birds/owl.png",),
    "fish": ("animals/fish/coraltrout.png", "animals/fish/bluegroper.png"),
    "whale": ("animals/mammals/aquatic/whale.png",),
    "frog": ("animals/amphibians/frog.png", "animals/amphibians/frog-1.png"),
    "red apple": ("food/fruit/apple_red.png",),
    "green apple": ("food/fruit/apple_green.png", "food/fruit/apple_granny_smith.png"),
    "banana": ("food/fruit/banana.png",),
    "grapes": ("food/fruit/grapes.png",),
    "strawberry": ("food/fruit/strawberry.png", "food/fruit/Strawberry2.png"),
    "carrot": ("food/vegetables/carrot.png",),
    "mushroom": ("food/vegetables/mushroom.png", "plants/mushrooms/cep.png", "plants/mushrooms/cep-1.png"),
    "pizza": ("food/pizza.png",),
    "car": ("vehicles/auto/sedan.png", "vehicles/auto/beetle.png", "vehicles/auto/sportscar2.png"),
    "bus": ("vehicles/masstransit/green_korean_bus.png",),
    "fire engine": ("vehicles/emergency/firetruck.png",),
    "tree": ("plants/trees/holm_oak.png",),
    "palm tree": ("plants/trees/liberia-palm.png",),
}
"""Name → photographs of it, below the folder of cut-outs."""


def hands_folder() -> Path:
    """The folder of rendered drawings, `HAND/NAME.png`.

    Raises:
        FileError: `$LAVENDER_HANDS` is not set, or is no folder.
    """
    named = os.environ.get(HANDS_VARIABLE)
    if not named or not Path(named).is_dir():
        raise FileError(
            f"{HANDS_VARIABLE}={named!r}",
            "the folder of the drawings that the weights are trained on",
            f"`npm pack` and unpack {', '.join(f'@iconify-json/{hand}' for hand in HANDS[1:])}, "
            "`pip install resvg-py`, run `python -m lavender.world.hands --packages FOLDER --out DRAWINGS`, "
            f"and set {HANDS_VARIABLE}=DRAWINGS",
        )
    return Path(named)


def cutouts_folder() -> Path:
    """The folder of photographic cut-outs: `$LAVENDER_CUTOUTS`, or where Debian installs them.

    Raises:
        FileError: there is no such folder.
    """
    folder = Path(os.environ.get(CUTOUTS_VARIABLE) or INSTALLED_CUTOUTS)
    if not folder.is_dir():
        raise FileError(
            f"no folder {folder}",
            "photographic cut-outs for scenes of the style 'cutout'",
            "install Debian's package tuxpaint-stamps-default, or unpack it and set "
            f"{CUTOUTS_VARIABLE} to its folder usr/share/tuxpaint/stamps",
        )
    return folder


@cache
def _names_in(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        raise FileError(
            f"no folder {folder}",
            f"the drawings of the hand {folder.name!r} there",
            "run `python -m lavender.world.hands` again with the package of every hand",
        )
    return frozenset(path.stem for path in folder.glob("*.png"))


def names_drawn(hand: str) -> frozenset[str]:
    """The names that a hand other than `twemoji` has a drawing of."""
    return _names_in(hands_folder() / hand)


def hand_drawing(name: str, hand: str) -> Image.Image:
    """The rendered drawing of a name in a hand other than `twemoji`, RGBA with its transparent border."""
    return Image.open(hands_folder() / hand / f"{name}.png").convert("RGBA")


@cache
def _cutouts_in(folder: Path) -> dict[str, tuple[str, ...]]:
    there = {name: tuple(part for part in parts if (folder / part).is_file()) for name, parts in CUTOUTS.items()}
    return {name: parts for name, parts in there.items() if parts}


def cutouts_by_name() -> dict[str, tuple[str, ...]]:
    """Name → its photographs, as paths below the folder of cut-outs. Only names that have one."""
    return _cutouts_in(cutouts_folder())


def cutout(part: str) -> Image.Image:
    """A photographic cut-out, RGBA with its transparent border. `part` is its path below the folder of cut-outs."""
    return Image.open(cutouts_folder() / part).convert("RGBA")


def icon_of(name: str, hand: str, icons: Iterable[str]) -> str | None:
    """Which icon of a package draws the name; None if none does. A number after an icon's name counts variants."""
    called = {icon.replace("-", ""): icon for icon in icons}
    default = _ICONS.get(name, (name.replace(" ", ""),))
    for plain in _ICONS_OF_HAND.get(hand, {}).get(name, default):
        for candidate in (plain, f"{plain}1"):
            if candidate in called:
                return called[candidate]
    return None


def render_hand(package: Path, out: Path, names: Collection[str]) -> list[str]:
    """Render the drawings of one unpacked npm package as PNG files `NAME.png`; the names that it lacks.

    Args:
        package: folder with the package's `icons.json`; the folder's name is the hand's.
        out: folder of the drawings.
    """
    pack = json.loads((package / "icons.json").read_text())
    aliases: dict[str, Any] = pack.get("aliases", {})
    lacking = []
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        icon = icon_of(name, package.name, [*aliases, *pack["icons"]])
        while icon in aliases:
            icon = aliases[icon]["parent"]
        if icon is None:
            lacking.append(name)
            continue
        drawn = {"left": 0, "top": 0, "width": 16, "height": 16} | pack | pack["icons"][icon]
        box = " ".join(str(drawn[key]) for key in ("left", "top", "width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{drawn["width"]}" height="{drawn["height"]}">{drawn["body"]}</svg>'
        )
        _render(svg).save(out / f"{name}.png")
    return lacking


def _render(svg: str) -> Image.Image:
    try:
        resvg = importlib.import_module("resvg_py")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Got no package 'resvg_py'. Expected it to render drawings from SVG. Do this: pip install resvg-py."
        ) from error
    return Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg, height=DRAWN_HEIGHT)))).convert("RGBA")


def main() -> None:
    """Render every hand of `HANDS`, except `twemoji`."""
    from lavender.world.sprites import NAMES

    parser = argparse.ArgumentParser(prog="python -m lavender.world.hands", description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked npm packages, one a hand")
    parser.add_argument("--out", type=Path, required=True, help="folder of the drawings, for $LAVENDER_HANDS")
    arguments = parser.parse_args()
    for hand in HANDS[1:]:
        lacking = render_hand(arguments.packages / hand, arguments.out / hand, NAMES)
        print(f"{hand}: {len(NAMES) - len(lacking)} names" + (f", lacks {', '.join(lacking)}" if lacking else ""))


if __name__ == "__main__":
    main()
