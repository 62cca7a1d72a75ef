"""The legend of word maps: one wording and one scale of colours for every page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lavender.drawing import heat_colours

if TYPE_CHECKING:
    from markupsafe import Markup

LOW, HIGH, MAXIMUM = "low", "high", "the map’s maximum"
_STOPS = 9
_PICTURE = "#8c8c8c"  # what a map lies over: a desaturated picture


def legend() -> dict[str, Markup]:
    """HTML for a paragraph of class `legend`: the `scale` of a map, its `peak`, and the `style` of the scale.

    A page says itself how it draws the class `peak`, which its maps have too.
    """
    from markupsafe import Markup

    colours = ", ".join("#" + bytes(colour).hex() for colour in heat_colours(np.linspace(0, 1, _STOPS)))
    box = "display: inline-block; width: 8rem; height: .7rem; margin: 0 .5rem; border-radius: 99px;"
    return {
        "scale": Markup(f'<span>{LOW}<span class="ramp" aria-hidden="true"></span>{HIGH}</span>'),
        "peak": Markup(f'<span><span class="peak" aria-hidden="true"></span>{MAXIMUM}</span>'),
        "style": Markup(f".ramp {{ {box} background: linear-gradient(90deg, {colours}), {_PICTURE}; }}"),
    }
